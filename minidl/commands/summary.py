"""Print what a network costs, layer by layer: shapes, parameters, multiply-accumulates, memory."""

import argparse
import json

import models
from minidl import device, summary
from minidl.commands.arguments import MODEL_KWARGS, positive
from minidl.data.dataset import IMAGE_SHAPE
from minidl.layer import output_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arch", metavar="ARCH", help="name of the network, or FILE.py:FUNCTION for one of yours")
    parser.add_argument("--model-kwargs", **MODEL_KWARGS)
    parser.add_argument("--classes", type=positive, default=100)
    parser.add_argument("-b", "--batch-size", type=positive, default=128, help="for which memory is given")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
    name, architecture = models.find(models.named(args.arch))
    network = architecture.create(args.classes, models.parse_options(args.model_kwargs))
    output_for(network, IMAGE_SHAPE)  # which names the layer that does not fit
    costs = summary.summarize(network, IMAGE_SHAPE, args.batch_size, device=device.select())
    if args.json:
        print(json.dumps({"arch": name, "batch_size": args.batch_size, **costs.as_dict()}))
    else:
        print(f"{name}, {args.classes} classes, training on batches of {args.batch_size} in float32\n\n{summary.table(costs)}")
