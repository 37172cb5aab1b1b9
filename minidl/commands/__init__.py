"""The commands of `python -m minidl`, one file each: a docstring whose first line is its help, add_arguments, and main."""
