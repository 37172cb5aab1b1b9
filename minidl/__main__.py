"""The commands besides training, which is train.py: python -m minidl COMMAND."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import models
from minidl import command, device, onnx_export, summary, weights
from minidl.command import positive
from minidl.errors import UsageError
from minidl.layers import Layer

IMAGE_SHAPE = (3, 32, 32)  # of all architectures
MODEL_KWARGS: dict[str, Any] = dict(nargs="+", default=[], metavar="NAME=VALUE", help="options of the network")


def add_architecture(parser: argparse.ArgumentParser, required: bool) -> None:
    """The arguments that name a network, as train.py has them."""
    parser.add_argument("-a", "--arch", required=required, help="name of the network")
    parser.add_argument("--model-kwargs", **MODEL_KWARGS)


def new_file(path: Path) -> Path:
    """The path, if there is nothing yet. Raises UsageError otherwise: nothing is ever overwritten."""
    if os.path.lexists(path):
        raise UsageError(f"{path} exists: name another with -o")
    return path


def described(args: argparse.Namespace, state: weights.State, metadata: weights.Metadata | None) -> weights.Metadata:
    """The metadata of a state: its network as the command line names it, its data as the file that it comes from does."""
    classifier = state.get("classifier.weight", np.empty(0))
    # Without a classifier the state fits no network, however many classes it has.
    classes = classifier.shape[0] if classifier.size and classifier.ndim else 1
    given = weights.describe(models.find(args.arch)[0], classes, models.parse_options(args.model_kwargs))
    return {**given, **{key: (metadata or given)[key] for key in ("dataset", "mean", "std")}}


def network_with(state: weights.State, metadata: weights.Metadata) -> Layer:
    """The network of the metadata with its weights. Raises CheckpointError with the first mismatches if they do not fit."""
    network = models.find(metadata["arch"])[1].create(metadata["classes"], metadata["options"]).initialize()
    network.load_state_dict(state)
    return network


def report(path: Path, state: weights.State, metadata: weights.Metadata | None) -> None:
    """The one line of a command that wrote a file."""
    learned = sum(array.size for name, array in state.items()
                  if not name.endswith(("running_mean", "running_var", "num_batches_tracked")))
    print(f"{path}: {learned:,} parameters" + (f" of {metadata['arch']}" if metadata else ""))


# ---- summary -----------------------------------------------------------------------------------------------------


def add_summary_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arch", metavar="ARCH", help="name of the network")
    parser.add_argument("--model-kwargs", **MODEL_KWARGS)
    parser.add_argument("--classes", type=positive, default=100)
    parser.add_argument("-b", "--batch-size", type=positive, default=128, help="for which memory is given")
    parser.add_argument("--json", action="store_true", help="for programs")


def print_summary(args: argparse.Namespace) -> None:
    """Print what a network costs, layer by layer: shapes, parameters, multiply-accumulates, memory."""
    name, architecture = models.find(args.arch)
    network = architecture.create(args.classes, models.parse_options(args.model_kwargs))
    costs = summary.summarize(network, IMAGE_SHAPE, args.batch_size, device=device.select())
    if args.json:
        print(json.dumps({"arch": name, "batch_size": args.batch_size, **costs.as_dict()}))
    else:
        print(f"{name}, {args.classes} classes, training on batches of {args.batch_size} in float32\n\n{summary.table(costs)}")


# ---- export ------------------------------------------------------------------------------------------------------


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="folder of a run, or a file of weights: .npz, .safetensors, .pt")
    parser.add_argument("--to", required=True, choices=("safetensors", "npz", "onnx"))
    add_architecture(parser, required=False)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: beside CKPT, with the suffix of the format")


def export_weights(args: argparse.Namespace) -> None:
    """Write weights in a form that others read: .safetensors, a plain .npz, or the network with them as ONNX."""
    output = new_file(args.output or weights.file_of(args.checkpoint).with_suffix(f".{args.to}"))
    state, metadata = weights.load(args.checkpoint)
    if args.arch:
        metadata = described(args, state, metadata)
    elif args.model_kwargs:
        raise UsageError("--model-kwargs are options of a network: name it with --arch")
    network = network_with(state, metadata) if metadata and (args.arch or args.to == "onnx") else None
    if args.to == "npz":
        weights.save(output, state)
    elif args.to == "safetensors":
        weights.save_safetensors(output, state, metadata)
    elif network is None:
        raise UsageError(f"{args.checkpoint} does not say whose weights it holds: name the network with --arch")
    else:
        onnx_export.export(network, output, IMAGE_SHAPE, metadata)
    report(output, state, metadata)


# ---- import ------------------------------------------------------------------------------------------------------


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="weights by the names of the network: .npz, .safetensors, .pt")
    add_architecture(parser, required=True)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: FILE's name, with .npz, in this folder")


def import_weights(args: argparse.Namespace) -> None:
    """Read weights of others, check that they fit the network, and write them as minidl's."""
    output = new_file(args.output or Path(weights.file_of(args.file).with_suffix(".npz").name))
    state, metadata = weights.load(args.file)
    metadata = described(args, state, metadata)
    state = network_with(state, metadata).state_dict()
    weights.save(output, state, metadata)
    report(output, state, metadata)


# ---- the commands ------------------------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], None], Callable[[argparse.ArgumentParser], None]]] = {
    "summary": (print_summary, add_summary_arguments),
    "export": (export_weights, add_export_arguments),
    "import": (import_weights, add_import_arguments),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minidl", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (act, add_arguments) in COMMANDS.items():
        subparser = commands.add_parser(name, help=act.__doc__, description=act.__doc__)
        add_arguments(subparser)
        subparser.set_defaults(act=act)
    args = parser.parse_args()
    args.act(args)


if __name__ == "__main__":
    sys.exit(command.run(main))
