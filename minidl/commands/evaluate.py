"""Test a network: top-1, top-5 and loss, the accuracy of each class, what is taken for what.

By default on the test set of the data that it was trained on. Computed in float32, whatever it was trained in.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minidl import data, device, plots, settings, signals, weights
from minidl.commands.arguments import network_with, new_file, positive
from minidl.data.batches import Batches
from minidl.data.dataset import Dataset
from minidl.device import Array
from minidl.errors import CheckpointError, UsageError
from minidl.layers import Layer
from minidl.wording import aligned, words

LISTED = 5  # of the best and of the worst classes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="folder of a run, or a file of weights that names its network")
    parser.add_argument("--dataset", choices=data.NAMES, help="default: the one that it was trained on")
    parser.add_argument("--data-dir", help="folder with the official files of CIFAR; default: the run's")
    parser.add_argument("--device", default="auto", metavar="{auto,cpu,cuda,cuda:N}")
    parser.add_argument("-b", "--batch-size", type=positive, default=128)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw confusion and accuracy of classes: .png, .svg, .pdf")


def main(args: argparse.Namespace) -> None:
    if args.picture:
        plots.check(new_file(args.picture, "--picture"))
    place = device.select(args.device)
    state, metadata = load(args.checkpoint)
    name = args.dataset or metadata["dataset"]
    if name is None:
        raise UsageError(f"{args.checkpoint} does not say what data it was trained on: name a data set with --dataset")
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
    if args.picture:
        plots.evaluation(evaluation.confusion, evaluation.groups, evaluation.accuracies, evaluation.classes, args.picture)


def data_dir_of(path: str, dataset: str) -> str | None:
    """The folder of data that the run in the folder `path` was given, if it was this data set and the folder is there."""
    config = Path(path, "config.toml")
    if not config.is_file():
        return None
    given = settings.read_toml(config)
    return given["data_dir"] if given.get("dataset") == dataset and os.path.isdir(given.get("data_dir", "")) else None


# ---- a network and its outputs -----------------------------------------------------------------------------------


def load(path: str) -> tuple[weights.State, weights.Metadata]:
    """As weights.load, for a file that says enough to run its network. Raises CheckpointError otherwise."""
    state, metadata = weights.load(path)
    if metadata is None:
        raise CheckpointError(f"{path} does not say whose weights it holds: `minidl import FILE --arch NAME` writes a file "
                              "that does")
    mean, std, names = (metadata[key] for key in ("mean", "std", "class_names"))
    if not (_may_be_numbers(mean) and _may_be_numbers(std) and (std is None or min(std) > 0) and
            (names is None or len(names) == metadata["classes"] and all(isinstance(name, str) for name in names))):
        raise CheckpointError(f"{path}: its mean, std or class_names cannot be those of a data set")
    return state, metadata


def _may_be_numbers(values: Any) -> bool:
    """Whether the list `values` is one of three numbers, one for each colour, or None."""
    return values is None or len(values) == 3 and all(isinstance(value, (int, float)) and abs(value) < 1e6 for value in values)


def outputs(network: Layer, dataset: Dataset, batch_size: int, path: str) -> Array:
    """The logits of all images, float32 (K, M), in host memory. Raises CheckpointError, with the path of the weights, where
    they are not finite."""
    network.eval()
    batches = Batches(dataset, network.device, network.dtype, min(batch_size, len(dataset.labels)), seed=0)
    logits = []
    for indices, valid in tqdm(batches.all(), unit="batch", disable=None, leave=False, dynamic_ncols=True):
        x, _ = batches.load(indices, network.step)
        logits.append(network.device.to_host(network.forward(x))[:, :valid])
        signals.obey()
    if not all(np.isfinite(part).all() for part in logits):
        raise CheckpointError(f"{path}: this network computes numbers that are not finite")
    return np.concatenate(logits, axis=1)


# ---- what they are worth -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """loss; top1, top5 as shares 0..1; accuracies (K): share of the images of each class that are recognized, NaN without
    images; confusion (G, G): how many images of the group in a row were taken for the group in a column.

    Groups are the superclasses of the data, or its classes where it has none.
    """

    loss: float
    top1: float
    top5: float
    classes: tuple[str, ...]
    accuracies: Array
    groups: tuple[str, ...]
    confusion: Array

    @classmethod
    def of(cls, logits: Array, dataset: Dataset) -> Evaluation:
        """logits (K, M) for the M images of the Dataset -> Evaluation. Formulas: loss.cu."""
        logits, labels = logits.astype(np.float64), dataset.labels
        count = len(dataset.classes)
        of_label = np.take_along_axis(logits, labels[None], axis=0)  # (1, M)
        highest = logits.max(axis=0)
        losses = np.log(np.exp(logits - highest).sum(axis=0)) + highest - of_label[0]
        before = (logits > of_label) | (logits == of_label) & (np.arange(count)[:, None] < labels)
        ranks = before.sum(axis=0)
        predicted = logits.argmax(axis=0)
        with np.errstate(invalid="ignore"):
            accuracies = np.bincount(labels[ranks < 1], minlength=count) / np.bincount(labels, minlength=count)
        group_of = np.array(dataset.superclass_of or range(count))
        groups = dataset.superclasses or dataset.classes
        confusion = np.zeros((len(groups), len(groups)), np.int64)
        np.add.at(confusion, (group_of[labels], group_of[predicted]), 1)
        return cls(float(losses.mean()), float((ranks < 1).mean()), float((ranks < 5).mean()), dataset.classes, accuracies,
                   groups, confusion)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        per_class = {name: None if math.isnan(share) else share for name, share in zip(self.classes, self.accuracies.tolist())}
        return {"images": int(self.confusion.sum()), "loss": self.loss, "top1": self.top1, "top5": self.top5,
                "per_class": per_class, "groups": self.groups, "confusion": self.confusion.tolist()}

    def as_text(self) -> str:
        """For people: the totals, the best and the worst classes, and what each group is most often taken for."""
        order = [index for index in np.argsort(-self.accuracies, kind="stable") if not math.isnan(self.accuracies[index])]
        listed = [(words(self.classes[index]), f"{self.accuracies[index]:6.1%}") for index in order]
        extremes = [("best classes", "", "worst classes", "")]
        extremes += [(*best, *worst) for best, worst in zip(listed[:LISTED], reversed(listed[-LISTED:]))]
        rows = [("superclass" if self.groups != self.classes else "class", "recognized", "most often taken for", "")]
        for index, (name, row) in enumerate(zip(self.groups, self.confusion)):
            shares = row / max(row.sum(), 1)
            others = np.where(np.arange(len(row)) == index, 0, shares)
            other = others.argmax()
            taken_for = (words(self.groups[other]), f"{others[other]:6.1%}") if others[other] else ("-", "")
            rows.append((words(name), f"{shares[index]:6.1%}", *taken_for))
        return "\n\n".join([f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%}, loss {self.loss:.3f}",
                            aligned(extremes, left=4), aligned(rows, left=4)])
