"""Test a network: top-1, top-5 and loss, the accuracy of each class, what is taken for what.

By default on the test set of the data that it was trained on. Computed in float32, whatever it was trained in.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

from minidl import data, device, plots, settings
from minidl.atomic_file import write_atomically
from minidl.commands.arguments import add_own_architecture, know, new_file, positive
from minidl.commands.trained import load, network_with
from minidl.errors import UsageError
from minidl.evaluation import Evaluation, outputs, predictions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="folder of a run, or a file of weights that names its network")
    parser.add_argument("--dataset", choices=data.NAMES, help="default: the one that it was trained on")
    parser.add_argument("--data-dir", help="folder with the official files of CIFAR; default: the run's")
    add_own_architecture(parser)
    parser.add_argument("--device", default="auto", metavar="{auto,cpu,cuda,cuda:N}")
    parser.add_argument("-b", "--batch-size", type=positive, default=128)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="write what each image is taken for, in CSV")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw confusion and accuracy of classes: .png, .svg, .pdf")


def main(args: argparse.Namespace) -> None:
    if args.picture:
        plots.check(new_file(args.picture, "--picture"))
    if args.predictions:
        new_file(args.predictions, "--predictions")
    know(args.arch)
    place = device.select(args.device)
    state, metadata = load(args.checkpoint)
    name = args.dataset or metadata["dataset"]
    if name is None:
        raise UsageError(f"{args.checkpoint} does not say what data it was trained on: name a data set with --dataset")
    if name not in data.NAMES:
        raise UsageError(f"{args.checkpoint} was trained on {name}, the data of a program, which must give it: see "
                         "\"Your own\" in docs/guide.md")
    test_set = data.load(name, args.data_dir or data_dir_of(args.checkpoint, name))[1]
    classes = metadata["class_names"] or test_set.classes
    if len(test_set.classes) != metadata["classes"] or tuple(classes) != test_set.classes:
        raise UsageError(f"the {metadata['classes']} classes that {args.checkpoint} knows are not the {len(test_set.classes)} "
                         f"of {name}")
    if metadata["mean"] and metadata["std"]:
        test_set = dataclasses.replace(test_set, mean=tuple(metadata["mean"]), std=tuple(metadata["std"]))
    logits = outputs(network_with(state, metadata, place), test_set, args.batch_size, args.checkpoint)
    evaluation = Evaluation.of(logits, test_set)
    if args.json:
        print(json.dumps({"checkpoint": args.checkpoint, "arch": metadata["arch"], "dataset": name, **evaluation.as_dict()}))
    else:
        print(f"{metadata['arch']} on the {len(test_set.labels):,} test images of {name}\n\n{evaluation.as_text()}")
    if args.predictions:
        write_atomically(args.predictions, lambda file: file.write(predictions(logits, test_set).encode()))
    if args.picture:
        plots.evaluation(evaluation.confusion, evaluation.groups, evaluation.accuracies, evaluation.classes, args.picture)


def data_dir_of(path: str, dataset: str) -> str | None:
    """The folder of data that the run in the folder `path` was given, if it was this data set and the folder is there."""
    config = Path(path, "config.toml")
    if not config.is_file():
        return None
    given = settings.read_toml(config)
    return given["data_dir"] if given.get("dataset") == dataset and os.path.isdir(given.get("data_dir", "")) else None
