"""What a network says of images, and what that is worth: accuracies, per class too, and what is taken for what."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from minidl import signals
from minidl.data.batches import Batches
from minidl.data.dataset import Dataset
from minidl.device import Array
from minidl.errors import CheckpointError
from minidl.layer import Layer, output_for
from minidl.wording import aligned, words

LISTED = 5  # of the best and of the worst classes


def outputs(network: Layer, dataset: Dataset, batch_size: int, path: str) -> Array:
    """The logits of all images (K, M), of the network's type, in host memory. Raises CheckpointError, with the path of the
    weights, where they are not finite, UsageError where the network does not take such images."""
    output_for(network, dataset.images.shape[1:])
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


def probabilities_of(logits: Array) -> Array:
    """logits (K, M) -> the probabilities of the classes, float64 (K, M)."""
    logits = logits.astype(np.float64)
    shares = np.exp(logits - logits.max(axis=0))
    return shares / shares.sum(axis=0)


def predictions(logits: Array, dataset: Dataset) -> str:
    """logits (K, M) for the M images of the Dataset -> a text in CSV: of each image its number, its class, the class that the
    network takes it for, and how probable that is to it."""
    found, shares = logits.argmax(axis=0), probabilities_of(logits).max(axis=0)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "class", "predicted", "probability"))
    writer.writerows((number, dataset.classes[label], dataset.classes[index], f"{share:.6f}")
                     for number, (label, index, share) in enumerate(zip(dataset.labels, found, shares)))
    return text.getvalue()


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
