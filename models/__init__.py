"""The architectures, by name: `create("resnext29-8x64d", 100)`. One file each, paper and table cited."""

import difflib
import re
from collections.abc import Callable
from typing import Any

from minidl.errors import UsageError
from minidl.layers import Layer
from models import report, res2net, resnext, simplenet, wideresnet
from models.architecture import Architecture, parse_options

__all__ = ["ALIASES", "REGISTRY", "create", "find", "parse_options"]

REGISTRY: dict[str, Architecture] = {
    **simplenet.ARCHITECTURES, **resnext.ARCHITECTURES, **res2net.ARCHITECTURES, **wideresnet.ARCHITECTURES,
    **report.ARCHITECTURES}
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
    raise UsageError(f"unknown architecture {name!r}: " + (f"did you mean {' or '.join(near)}?" if near else
                                                           "`minidl train --arch list` prints those that are known"))


def create(name: str, classes: int = 100, /, **options: Any) -> Layer:
    """The network `name` -> Layer, not initialized. options: of its builder, such as dropout=0.3 for wrn-28-10.

    Raises UsageError for an unknown name, an unknown option, or a value that the builder refuses.
    """
    return find(name)[1].create(classes, options)
