"""Write weights in a form that others read: .safetensors, a plain .npz, or the network with them as ONNX."""

import argparse
from pathlib import Path

from minidl import onnx_export, weights
from minidl.commands.arguments import add_architecture, new_file
from minidl.commands.import_weights import beside, described, report
from minidl.commands.trained import network_with
from minidl.data.dataset import IMAGE_SHAPE
from minidl.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="folder of a run, or a file of weights: .npz, .safetensors, .pt")
    parser.add_argument("--to", required=True, choices=("safetensors", "npz", "onnx"))
    add_architecture(parser, required=False)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: beside CKPT, or in its folder")


def main(args: argparse.Namespace) -> None:
    output = new_file(args.output or beside(args.checkpoint, f".{args.to}"))
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
        raise UsageError(f"{args.checkpoint} does not say which network its weights belong to: name the network with --arch")
    else:
        onnx_export.export(network, output, IMAGE_SHAPE, metadata)
    report(output, state, metadata)
