"""Libraries that only some commands need: imported where they are used, and what to install is said then."""

import importlib
from typing import Any

from minidl.errors import UsageError


def library(module: str, extra: str) -> Any:
    """The module, which the extra of that name brings. Raises UsageError where it is not installed, or cannot be imported."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except (ImportError, ValueError) as error:  # ValueError: matplotlib's, of an MPLBACKEND that it does not know
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package:
            raise UsageError(f"the package {package} is needed: `pip install \"minidl[{extra}]\"`") from None
        raise UsageError(f"the package {package} cannot be imported: {error}") from None
