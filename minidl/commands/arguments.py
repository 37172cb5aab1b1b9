"""Arguments that several commands have."""

import argparse
import os
from pathlib import Path
from typing import Any

import models
from minidl.atomic_file import check_folder
from minidl.errors import UsageError

MODEL_KWARGS: dict[str, Any] = dict(nargs="+", default=[], metavar="NAME=VALUE", help="options of the network")


def positive(text: str) -> int:
    """A whole number of at least 1, as the type of an argument."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_architecture(parser: argparse.ArgumentParser, required: bool) -> None:
    """The arguments that name a network, as train.py has them."""
    parser.add_argument("-a", "--arch", required=required, help="name of the network, or FILE.py:FUNCTION for one of yours")
    parser.add_argument("--model-kwargs", **MODEL_KWARGS)


def add_own_architecture(parser: argparse.ArgumentParser) -> None:
    """The argument that brings an architecture of the user's, for `know`."""
    parser.add_argument("-a", "--arch", metavar="FILE.py:FUNCTION", help="where a network of yours is")


def know(arch: str | None) -> None:
    """Register the user's architecture, if there is one, so that a file of weights may name it. Raises UsageError for a name of
    minidl's, which would have no effect: the file says which network its weights belong to."""
    if arch is None:
        return
    found = models.from_file(arch)
    if found is None:
        raise UsageError(f"--arch {arch}: only a network of yours is named here, FILE.py:FUNCTION; of others the file says what it is")
    models.register_found(arch, found)


def new_file(path: Path, flag: str = "-o") -> Path:
    """The path, if there is nothing yet, in a folder that is there. Raises UsageError otherwise, with the flag that names
    another: nothing is ever overwritten."""
    check_folder(path)
    if os.path.lexists(path):
        raise UsageError(f"{path} exists: name another with {flag}")
    return path
