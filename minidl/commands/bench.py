"""Time kernels, training steps, or what train adds to them, with the benchmarks of the repository.

The arguments that follow are the benchmark's own: `bench kernels --help` lists them.
"""

import argparse
import importlib.util
import runpy
import sys
from pathlib import Path

import minidl
from minidl.errors import UsageError

_PACKAGE = Path(minidl.__file__).parent
FOLDERS = (_PACKAGE / "benchmarks", _PACKAGE.parent / "benchmarks")  # as installed; in a checkout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", choices=("kernels", "training", "overhead"))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of the benchmark")


def main(args: argparse.Namespace) -> None:
    script = next((path for folder in FOLDERS if (path := folder / f"{args.benchmark}.py").is_file()), None)
    if script is None:
        raise UsageError(f"{args.benchmark}.py is neither in {FOLDERS[0]} nor in {FOLDERS[1]}: install minidl again")
    if any(word.startswith("--peer") for word in args.arguments):
        _check_peer(args.benchmark, script)
    sys.argv[1:] = args.arguments
    sys.path.insert(0, str(script.parent))  # as Python does for a script
    runpy.run_path(str(script), run_name="__main__")


def _check_peer(benchmark: str, script: Path) -> None:
    """Raises UsageError where PyTorch, or what the comparison with it needs, is not here."""
    if importlib.util.find_spec("torch") is None:
        raise UsageError("--peer torch needs PyTorch: `pip install 'minidl[torch]'`")
    if benchmark == "training" and not (script.parent.parent / "tests" / "torch_networks.py").is_file():
        raise UsageError("--peer torch needs the networks in PyTorch, which are among the tests: run it in a checkout of minidl")
