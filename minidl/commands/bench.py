"""Time kernels, or training steps, with the benchmarks of the repository.

The arguments that follow are the benchmark's own: `bench kernels --help` lists them.
"""

import argparse
import runpy
import sys
from pathlib import Path

import minidl
from minidl.errors import UsageError

_PACKAGE = Path(minidl.__file__).parent
FOLDERS = (_PACKAGE / "benchmarks", _PACKAGE.parent / "benchmarks")  # as installed; in a checkout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", choices=("kernels", "training"))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of the benchmark")


def main(args: argparse.Namespace) -> None:
    script = next((path for folder in FOLDERS if (path := folder / f"{args.benchmark}.py").is_file()), None)
    if script is None:
        raise UsageError(f"{args.benchmark}.py is in neither of {' and '.join(map(str, FOLDERS))}: install minidl again")
    sys.argv = [f"minidl bench {args.benchmark}", *args.arguments]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise UsageError("--peer torch needs PyTorch: `pip install 'minidl[torch]'`") from None
        if error.name == "torch_networks":
            raise UsageError("--peer torch needs the networks in PyTorch of the repository's tests: run it in a checkout") from None
        raise
