"""Say what is on images: the most probable classes of each.

An image may have any size: the square in its middle is scaled to 32x32, the size of what the networks were trained on.
"""

import argparse
import json

import numpy as np

from minidl import device, images
from minidl.commands.arguments import add_own_architecture, know, positive
from minidl.commands.trained import load, network_with
from minidl.data.dataset import IMAGE_SHAPE, Dataset
from minidl.errors import CheckpointError
from minidl.evaluation import outputs, probabilities_of
from minidl.wording import aligned, words

BATCH_SIZE = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="folder of a run, or a file of weights that names its network")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=f"a file: {', '.join(images.FORMATS)}")
    parser.add_argument("-k", "--topk", type=positive, default=5, metavar="K", help="how many classes of each image")
    add_own_architecture(parser)
    parser.add_argument("--device", default="auto", metavar="{auto,cpu,cuda,cuda:N}")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
    know(args.arch)
    place = device.select(args.device)
    state, metadata = load(args.checkpoint)
    if not (metadata["mean"] and metadata["std"]):
        raise CheckpointError(f"{args.checkpoint} does not say how images must be normalized: `minidl import FILE --arch NAME "
                              "--dataset NAME` writes a file that does")
    classes = tuple(metadata["class_names"] or (f"class {number}" for number in range(metadata["classes"])))
    pixels = np.stack([images.read(path, IMAGE_SHAPE[1]) for path in args.images])
    nothing_known = np.zeros(len(pixels), np.int32)  # labels
    dataset = Dataset("the images", pixels, nothing_known, classes, tuple(metadata["mean"]), tuple(metadata["std"]))
    logits = outputs(network_with(state, metadata, place), dataset, BATCH_SIZE, args.checkpoint)
    probabilities = probabilities_of(logits)
    best = np.argsort(-logits, axis=0, kind="stable")[:args.topk]  # (k, M)
    found = [[{"class": classes[index], "probability": float(column[index])} for index in order]
             for order, column in zip(best.T, probabilities.T)]
    if args.json:
        print(json.dumps([{"image": path, "classes": answers} for path, answers in zip(args.images, found)]))
    else:
        print(aligned([(path if answer is answers[0] else "", words(str(answer["class"])), f"{answer['probability']:6.1%}")
                       for path, answers in zip(args.images, found) for answer in answers], left=2))
