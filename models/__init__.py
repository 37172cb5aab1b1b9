"""The architectures, by name: `create("simplenet-5m", classes=100)`. One file each, paper and table cited."""

import difflib

from minidl.errors import UsageError
from minidl.layers import Layer
from models.simplenet import VERSIONS, simplenet

# name -> function of the number of classes
REGISTRY = {f"simplenet-{version}": lambda classes, version=version: simplenet(version, classes) for version in VERSIONS}


def create(name: str, classes: int = 100) -> Layer:
    """The network `name` -> Layer, not initialized. Raises UsageError for an unknown name, with the nearest known ones."""
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(REGISTRY)}"
        raise UsageError(f"unknown architecture {name!r}: {hint}")
    return REGISTRY[name](classes)
