"""Read weights of others, check that they fit the network, and write them as minidl's."""

import argparse
import os
from pathlib import Path

import numpy as np

import models
from minidl import data, weights
from minidl.commands.arguments import add_architecture, new_file
from minidl.commands.trained import network_with
from minidl.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="weights by the names of the network: .npz, .safetensors, .pt")
    add_architecture(parser, required=True)
    parser.add_argument("--dataset", choices=data.NAMES,
                        help="what the weights were trained on, downloaded if need be; the file then says its classes, mean "
                             "and standard deviation")
    parser.add_argument("--data-dir", help="folder with the official files of CIFAR")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: FILE's name, with .npz, in this folder")


def main(args: argparse.Namespace) -> None:
    output = new_file(args.output or Path(beside(args.file, ".npz").name))
    state, metadata = weights.load(args.file)
    metadata = described(args, state, metadata)
    state = network_with(state, metadata).state_dict()
    if args.dataset:
        dataset = data.load(args.dataset, args.data_dir)[0]
        if len(dataset.classes) != metadata["classes"]:
            raise UsageError(f"{args.file} knows {metadata['classes']} classes, {args.dataset} has {len(dataset.classes)}")
        of_data = weights.describe(metadata["arch"], metadata["classes"], metadata["options"], dataset)
        for key in ("dataset", "class_names"):
            if metadata[key] not in (None, of_data[key]):
                raise UsageError(f"{args.file} says that it was trained on {metadata['dataset'] or 'other classes'}, not on "
                                 f"{args.dataset}")
        # How its images were normalized, the file knows better: not every recipe takes the mean of the data.
        metadata = {key: of_data[key] if metadata[key] is None else metadata[key] for key in of_data}
    weights.save(output, state, metadata)
    report(output, state, metadata)


def beside(source: str, suffix: str) -> Path:
    """Where a command writes, unless told otherwise, what it makes of a file of weights: beside it; of a run: in its folder."""
    return (Path(source, "weights") if os.path.isdir(source) else Path(source)).with_suffix(suffix)


def described(args: argparse.Namespace, state: weights.State, metadata: weights.Metadata | None) -> weights.Metadata:
    """The metadata of a state: its network as the command line names it, with the options that the file knows of if it names the
    same one; its data as the file says."""
    arch = models.named(args.arch)
    of_file = metadata["options"] if metadata and metadata["arch"] == arch else {}
    classes = metadata["classes"] if metadata else _classes(state, arch, getattr(args, "dataset", None))
    given = weights.describe(arch, classes, {**of_file, **models.parse_options(args.model_kwargs)})
    return {**given, **{key: (metadata or given)[key] for key in ("dataset", "mean", "std", "class_names")}}


def _classes(state: weights.State, arch: str, dataset: str | None) -> int:
    """How many classes a state knows: by minidl's name of the last layer, which a user's need not have, or by its data."""
    classifier = state.get("classifier.weight", np.empty(0))
    if classifier.size and classifier.ndim:
        return classifier.shape[0]
    if dataset:
        return data.CLASSES[dataset]
    if models.find(arch)[1].source == models.YOURS:
        raise UsageError("the file does not say how many classes its network has: `minidl import FILE --arch NAME --dataset "
                         "NAME` writes one that does")
    return 1  # which fits none of minidl's, and the message shows what is missing


def report(path: Path, state: weights.State, metadata: weights.Metadata | None) -> None:
    """The one line of a command that wrote a file."""
    learned = sum(array.size for name, array in state.items()
                  if not name.endswith(("running_mean", "running_var", "num_batches_tracked")))
    print(f"{path}: {learned:,} parameters" + (f" of {metadata['arch']}" if metadata else ""))
