"""Show a data set: where its files are, whether they are the official ones, its classes, and how many images each has.

What is missing is downloaded first, unless the environment variable MINIDL_OFFLINE is set.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from minidl import data, plots
from minidl.commands.arguments import new_file
from minidl.data import cifar, digits
from minidl.data.dataset import Dataset
from minidl.errors import DataError
from minidl.wording import aligned, words

COLUMNS = ROWS = 10  # of the picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", choices=data.NAMES, default="cifar100", help="default: %(default)s")
    parser.add_argument("--data-dir", help="folder with the official files of CIFAR, or for them")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw images of each class: .png, .svg, .pdf")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
    if args.picture:
        plots.check(new_file(args.picture, "--picture"))
    it = data.CIFARS.get(args.dataset)
    found = cifar.obtain(it, data.folders(args.data_dir)) if it else None
    files = found.files() if found else [(digits.PATH, digits.FILE)]
    differences = [file.difference(path) for path, file in files]
    if not args.json:
        print(files[0][0].parent)
        print(aligned([(file.name, f"{path.stat().st_size:,} bytes", f"md5 {file.md5}" if file.md5 else "its md5 is not known",
                        "differs" if difference else "ok") for (path, file), difference in zip(files, differences)], left=1))
    if any(differences):
        raise DataError("\n".join(f"{path}: {difference}" for (path, _), difference in zip(files, differences) if difference))
    train, test = cifar.read(it, found) if it and found else digits.load()
    rows = counts(train, test)
    if args.json:
        print(json.dumps({"dataset": train.name, "shape": train.images.shape[1:], "classes": rows,
                          "files": [{"path": str(path), "bytes": file.size, "md5": file.md5} for path, file in files]}))
    else:
        print(f"\n{in_words(train, test, rows)}")
    if args.picture:
        draw(train, args.picture)
        if not args.json:
            print(f"picture: {args.picture}")


def counts(train: Dataset, test: Dataset) -> list[dict[str, Any]]:
    """For each class its name, that of its superclass, None where there are none, and how many images it has."""
    superclasses: list[str | None] = [train.superclasses[index] for index in train.superclass_of]
    superclasses = superclasses or [None] * len(train.classes)
    images = [np.bincount(part.labels, minlength=len(part.classes)).tolist() for part in (train, test)]
    return [dict(zip(("name", "superclass", "train", "test"), row)) for row in zip(train.classes, superclasses, *images)]


def in_words(train: Dataset, test: Dataset, rows: list[dict[str, Any]]) -> str:
    grouped = f" in {len(train.superclasses)} superclasses" if train.superclasses else ""
    lines = [f"{train.name}: {len(train.labels):,} training and {len(test.labels):,} test images of "
             f"{'x'.join(map(str, train.images.shape[1:]))}, {len(rows)} classes{grouped}"]
    if len({(row["train"], row["test"]) for row in rows}) == 1:
        lines.append(f"of each class {rows[0]['train']:,} training and {rows[0]['test']:,} test images")
    else:
        lines.append(aligned([("class", "training", "test"),
                              *((words(row["name"]), str(row["train"]), str(row["test"])) for row in rows)], left=1))
    if train.superclasses:
        lines.append(aligned([(words(name), ", ".join(words(row["name"]) for row in rows if row["superclass"] == name))
                              for name in train.superclasses], left=2))
    return "\n".join(lines)


def draw(train: Dataset, path: Path) -> Any:
    """The first training images of each class, those of a superclass side by side -> the Figure."""
    classes = range(len(train.classes))
    order = sorted(classes, key=lambda index: train.superclass_of[index]) if train.superclasses else classes
    of_each = [np.flatnonzero(train.labels == index) for index in order]
    most = max(1, COLUMNS * ROWS // len(classes))
    chosen = [images[number] for number in range(most) for images in of_each if number < len(images)]
    names = [train.classes[label] for label in train.labels[chosen]]
    return plots.contact_sheet(train.images[chosen], names, path, columns=COLUMNS)
