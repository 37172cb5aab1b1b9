"""The commands of `python -m minidl`, one file each: a docstring whose first line is its help, add_arguments, and main.
arguments.py, run_settings.py, runs.py and trained.py hold what several of them share; seeds.py is a part of train.py."""

import models
from minidl.errors import UsageError

if not hasattr(models, "REGISTRY"):  # `python -m` looks in the present folder first
    raise UsageError(f"{models.__file__} takes the place of the package models of minidl: use the script `minidl` in place of "
                     "`python -m minidl`, or another folder")
