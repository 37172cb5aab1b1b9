"""Libraries that only some commands need: imported where they are used, and what to install is said then."""

import importlib
from typing import Any

from minidl.errors import UsageError


def library(module: str, extra: str) -> Any:
    """The module, which the extra of that name brings. Raises UsageError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(f"the package {module.partition('.')[0]} is needed: `pip install \"minidl[{extra}]\"`") from None
