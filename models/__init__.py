"""The architectures, by name: `create("resnext29-8x64d", 100)`. One file each, paper and table cited. Yours: `register`."""

import difflib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minidl.errors import UsageError
from minidl.layer import Layer
from models import report, res2net, resnext, simplenet, wideresnet
from models.architecture import Architecture, parse_options

__all__ = ["ALIASES", "REGISTRY", "create", "find", "from_file", "named", "parse_options", "register",
           "register_found"]

REGISTRY: dict[str, Architecture] = {
    **simplenet.ARCHITECTURES, **resnext.ARCHITECTURES, **res2net.ARCHITECTURES, **wideresnet.ARCHITECTURES,
    **report.ARCHITECTURES}
YOURS = "yours"  # the source of an architecture that a user has registered
# One member of each family, of comparable size.
ALIASES = {"simplenet": "simplenet-5m", "resnext": "resnext29-2x64d", "res2net": "res2next29-2c24w4s", "wideresnet": "wrn-28-4"}
# Families whose names have numbers, which may be any, but for the depth of a WRN.
_FAMILIES: dict[str, Callable[..., Architecture]] = {
    r"resnext29-(\d+)x(\d+)d": resnext.architecture, r"res2next29-(\d+)c(\d+)w(\d+)s": res2net.architecture,
    r"wrn-(\d+)-(\d+)": wideresnet.architecture}


def find(name: str) -> tuple[str, Architecture]:
    """A name or an alias -> the full name, the Architecture. Raises UsageError for an unknown one, with the nearest known.

    Besides those of REGISTRY, resnext29-CxWd, res2next29-CcWwSs and wrn-D-K are known with any numbers from 1 to 9,999. That
    the depth D must be 6 N + 4, the builder says.
    """
    name = ALIASES.get(name, name)
    if name in REGISTRY:
        return name, REGISTRY[name]
    for pattern, architecture in _FAMILIES.items():
        match = re.fullmatch(pattern, name)
        if match and all(0 < int(number) < 10_000 for number in match.groups()):
            return name, architecture(*map(int, match.groups()))
    known = [*ALIASES, *REGISTRY]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    raise UsageError(f"unknown architecture {name!r}: " + (
        f"did you mean {' or '.join(near)}?" if near else "`minidl train --arch list` prints those that are known; one of yours is "
        "named with its file, --arch FILE.py:FUNCTION"))


def register(name: str, builder: Callable[..., Layer]) -> None:
    """From now on `find` knows an architecture of yours by this name. builder: function (classes, **options) -> Layer. Raises
    UsageError for a name that minidl's own have."""
    known = REGISTRY.get(name)
    if name in ALIASES or known and known.source != YOURS or any(re.fullmatch(pattern, name) for pattern in _FAMILIES):
        raise UsageError(f"{name} is the name of an architecture of minidl: choose another")
    REGISTRY[name] = Architecture(builder, {}, "-", YOURS)


def named(text: str) -> str:
    """What a user calls an architecture -> its full name. FILE.py:FUNCTION is one of the user's, which is registered by its
    own name. Raises UsageError as `find`, and for what is no such function."""
    found = from_file(text)
    return find(text)[0] if found is None else register_found(text, found)


def register_found(text: str, found: Any) -> str:
    """What `from_file` found by the text -> its name, by which it is registered. Raises UsageError where it is no function."""
    if not inspect.isfunction(found):
        raise UsageError(f"{text} is not a function (classes) -> Layer")
    name = text.rpartition(":")[2]
    register(name, found)
    return name


def from_file(text: str) -> Any:
    """FILE.py:NAME -> what is called so in that file, which is executed and finds modules beside it; None for a text of another
    form. Raises UsageError where there is none."""
    file, _, name = text.rpartition(":")
    if not file.endswith(".py"):
        return None
    path = Path(file)
    spec = importlib.util.spec_from_file_location(f"yours_{path.stem}", path)
    if not os.path.isfile(path) or not os.access(path, os.R_OK) or spec is None or spec.loader is None:
        raise UsageError(f"{text}: there is no file {file} that can be read")
    sys.path.append(str(path.parent.absolute()))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    found = vars(module).get(name)
    if found is None:
        raise UsageError(f"{text}: there is no {name} in {file}")
    return found


def create(name: str, classes: int = 100, /, **options: Any) -> Layer:
    """The network `name` -> Layer, not initialized. options: of its builder, such as dropout=0.3 for wrn-28-10.

    Raises UsageError for an unknown name, an unknown option, or a value that the builder refuses.
    """
    return find(name)[1].create(classes, options)
