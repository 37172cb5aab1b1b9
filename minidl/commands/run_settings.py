"""The settings of a run, from a command line: flags, --config FILE, and the recipe."""

from __future__ import annotations

import argparse
import os
from typing import Any

import models
from minidl import device, settings
from minidl.errors import UsageError
from minidl.settings import Settings
from models import recipes

DEMO_ARCH, LARGE_ARCH = "simplenet-310k", "simplenet-5m"  # without --arch, on a CPU and on a GPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting of a run, in groups, and --config."""
    parser.usage = "%(prog)s [option ...]"  # there are too many to list
    # None: not given. Values are checked where those of files are, by Settings.
    for name, spec in settings.FIELDS.items():
        flag = "--" + name.replace("_", "-")
        if spec.begins:
            group = parser.add_argument_group(spec.begins)
        if spec.kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=spec.help)
        elif spec.kind in (list, dict):
            group.add_argument(flag, nargs="+" if spec.kind is dict else "*", type=int if spec.kind is list else str,
                               metavar=spec.word, help=spec.help)
        else:
            group.add_argument(*spec.flags, flag, type=spec.kind, choices=spec.choices or None, metavar=spec.word or None,
                               help=spec.help)
    parser.add_argument("--config", metavar="FILE", help="settings from a file in TOML, such as the config.toml of a run")


def is_demo(args: argparse.Namespace, on_cpu: bool) -> bool:
    """Whether digits are trained on: it is on the CPU, and neither network nor data were asked for."""
    return on_cpu and not any((args.arch, args.dataset, args.data_dir, args.config))


def given(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line and the file say, the command line first."""
    from_file = settings.read_toml(args.config) if args.config else {}
    flags = {name: getattr(args, name) for name in settings.FIELDS if getattr(args, name) is not None}
    if "model_kwargs" in flags:
        flags["model_kwargs"] = {**from_file.get("model_kwargs", {}), **models.parse_options(flags["model_kwargs"])}
    flags = settings.checked(flags)
    if "arch" in flags:
        flags["arch"] = models.named(flags["arch"])
    for source in (from_file, flags):
        for name in {"data_dir", "init"} & source.keys():  # the run's folder tells it to who stands elsewhere
            try:
                source[name] = os.path.abspath(os.path.expanduser(source[name]))
            except FileNotFoundError:
                raise UsageError(f"{name} {source[name]}: the present folder, which this begins at, is gone") from None
        counted = source is from_file and from_file.get("milestones")  # in these epochs
        if "epochs" in source and "time_budget" in source and not counted:
            raise UsageError("epochs and time_budget exclude each other: the budget decides how many epochs there are")
    without_length = flags.get("milestones") or from_file.get("milestones") and "epochs" not in from_file
    if without_length and "time_budget" in {**from_file, **flags}:
        raise UsageError("milestones count epochs, whose number the time budget decides: leave them to the recipe, or give a file "
                         "that says of how many epochs they are")
    for choice, belong in (("optimizer", settings.HYPERPARAMETERS), ("sched", settings.OF_MULTISTEP)):
        if choice in from_file and flags.get(choice, from_file[choice]) != from_file[choice]:
            from_file = {name: value for name, value in from_file.items() if name not in belong}  # they are of the file's own
    if "epochs" in flags:
        from_file.pop("time_budget", None)
        if "epochs" in from_file and "milestones" in from_file:
            from_file["milestones"] = settings.scaled(from_file["milestones"], flags["epochs"] / from_file["epochs"])
    return {**from_file, **flags}


def chosen(args: argparse.Namespace) -> Settings:
    """All settings of a new run."""
    values = given(args)
    on_cpu = device.gpu_number(values.get("device", "auto")) is None
    demo = is_demo(args, on_cpu)
    values["dataset"] = values.get("dataset") or ("digits" if demo else "cifar100")
    values["arch"] = models.find(values.get("arch") or (DEMO_ARCH if on_cpu else LARGE_ARCH))[0]
    recipe = recipes.recipe(values.get("recipe", "fast"), values["arch"], values["dataset"])
    resolved = settings.resolve(values, recipe)
    models.create(resolved.arch, **resolved.model_kwargs)  # a wrong option is said before data is looked for
    return resolved


def differences(before: Settings, values: dict[str, Any]) -> dict[str, Any]:
    """Of {name: value}, what is not what it was before, without settings that are free."""
    specs = settings.FIELDS
    return {name: value for name, value in values.items() if not specs[name].free and getattr(before, name) != value}
