"""The settings of a run. Each is one field here, whose name is that of its flag and of its key in config.toml.

    settings = resolve({"arch": "wrn-28-4", "epochs": 20}, recipe)    # what is given wins over the recipe

A recipe is {name: value}; models/recipes.py has them.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minidl import data, optim
from minidl.data.dataset import IMAGE_SHAPE
from minidl.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STORAGE = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]] | None] = {  # mean and std on the 0..1 scale
    "dataset": None,  # of its own training pixels
    "cifar10": ((0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)),  # 125.3, 123.0, 113.9 and 63.0, 62.1, 66.7 of 255
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
LARGEST_FILE = 1_000_000  # bytes of a config.toml
LONGEST_SHOWN = 100  # letters of a value in a message
LEAST_EPS = 1.2e-38  # which float32 does not make 0
MOST_BETA = 0.9999999  # which float32 does not make 1: Adam divides by 1 - beta
LARGEST: dict[type, float] = {int: 2**63 - 1, float: 3.4e38}  # what kernels take
SIDE = IMAGE_SHAPE[1]  # pixels
MOST_RANKS = 64  # of one machine
LONGEST_WARMUP = 0.2   # of all steps
ONECYCLE_WARMUP = 0.35  # of all steps; architectures differ in it by 0.3 to 0.4
NEEDED = ("arch", "dataset", "epochs", "batch_size", "optimizer", "lr", "sched")  # all but the first two are in each recipe
# Known to optimizers, each with its own defaults: a recipe's values hold with the recipe's optimizer alone.
HYPERPARAMETERS = ("lr", *dict.fromkeys(name for optimizer in optim.OPTIMIZERS.values() for name in
                                        inspect.signature(optimizer).parameters if name not in ("parameters", "clip_norm")))
OF_MULTISTEP = ("milestones", "factor", "restart_at_milestones")


@dataclass(frozen=True)
class Spec:
    """What is known of a setting besides its value.

    default: None for none. kind: int, float, str, bool, list (of whole numbers) or dict. low, high: bounds of its values;
    excluded: the one of them that is no value. flags: more than that of its name; word: what stands for a value in help. free: a
    resumed run may have another value. begins: the title of a group of settings, of which it is the first.
    """

    default: Any
    kind: type
    help: str
    low: float = -math.inf
    high: float = math.inf
    excluded: float | None = None
    choices: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    word: str = ""
    free: bool = False
    begins: str = ""


def setting(default: Any, kind: type, help: str, **more: Any) -> Any:
    """A field of Settings. more: of its Spec."""
    spec = Spec(default, kind, help, **{"word": {int: "N", float: "X", list: "N", dict: "NAME=VALUE"}.get(kind, ""), **more})
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"spec": spec})
    return field(default=default, metadata={"spec": spec})


@dataclass(frozen=True)
class Settings:
    """Raises UsageError for a value of the wrong type or out of range, for settings that do not go together, and where one of
    NEEDED is missing. None: not set, or not known to the optimizer."""

    arch: str = setting(None, str, "simplenet, resnext, res2net, wideresnet, a name that `--arch list` prints, or "
                                   "FILE.py:FUNCTION", flags=("-a",), word="NAME", begins="what is trained, and on what")
    model_kwargs: dict[str, Any] = setting({}, dict, "options of the network, such as dropout=0.3 for a Wide ResNet")
    dataset: str = setting(None, str, "digits need no download; own: given by a program in Python",
                           choices=(*data.NAMES, data.OWN))
    data_dir: str | None = setting(None, str, "where the official files of CIFAR are, or shall be downloaded to", word="FOLDER",
                                   free=True)
    init: str | None = setting(None, str, "weights to begin with, of a run or a file, as far as they fit the network", word="RUN",
                               free=True)
    normalize: str = setting("dataset", str, "whose mean and standard deviation the pixels are normalized with",
                             choices=tuple(NORMALIZATIONS))
    val_split: int = setting(0, int, "training images that are held out for validation", low=0)

    recipe: str = setting("fast", str, "where settings that are not given come from: fast, 50 epochs; paper, each author's "
                                       "own; report, the student report's", choices=("fast", "paper", "report"),
                         begins="recipe and length")
    epochs: int = setting(None, int, "passes over the training images", low=1, flags=("-e",))
    time_budget: str | None = setting(None, str, "train as many epochs as fit into this time, such as 6h or 30m",
                                      word="TIME", free=True)
    patience: int = setting(0, int, "stop after so many epochs without a better validation accuracy; 0: never", low=0)
    limit_train_batches: int | None = setting(None, int, "stop each epoch after so many steps", low=1)
    batch_size: int = setting(None, int, "images per step", low=1, flags=("-b",))
    seed: int = setting(0, int, "two runs with one seed are identical, bit for bit", low=0)

    device: str = setting("auto", str, "cpu, cuda, cuda:N, or auto: the first GPU, or the CPU where none can be used",
                          word="NAME", free=True, begins="machine")
    precision: str = setting("fp32", str, "of stored activations and of matrix products", choices=tuple(STORAGE))
    ranks: int = setting(1, int, "processes that share each batch; on GPUs, one GPU each", low=1, high=MOST_RANKS)

    optimizer: str = setting(None, str, "its own settings are below", choices=tuple(optim.OPTIMIZERS), begins="optimizer")
    lr: float = setting(None, float, "peak learning rate; default: the recipe's, for sgd in proportion to the batch size", low=0)
    momentum: float | None = setting(None, float, "of sgd", low=0, high=1, excluded=1)
    nesterov: bool | None = setting(None, bool, "momentum of sgd in Nesterov's form")
    beta1: float | None = setting(None, float, "of adam and adamw", low=0, high=MOST_BETA)
    beta2: float | None = setting(None, float, "of adam and adamw", low=0, high=MOST_BETA)
    rho: float | None = setting(None, float, "of adadelta", low=0, high=1, excluded=1)
    eps: float | None = setting(None, float, "of adam, adamw and adadelta", low=LEAST_EPS)
    weight_decay: float | None = setting(None, float, "on every parameter", low=0)
    clip_norm: float = setting(0.0, float, "largest norm of the whole gradient; 0: no limit", low=0)

    sched: str = setting(None, str, "course of the learning rate", choices=tuple(optim.SCHEDULES),
                         begins="schedule")
    warmup_epochs: float = setting(0.0, float, f"epochs in which the rate grows, at most {LONGEST_WARMUP:.0%}% of all; of onecycle "
                                               f"always {ONECYCLE_WARMUP:.0%}%", low=0)
    milestones: list[int] = setting([], list, "of multistep: after how many epochs the rate drops", low=1)
    factor: float = setting(0.1, float, "of multistep: what a drop multiplies the rate with", low=0, high=1)
    restart_at_milestones: bool = setting(False, bool, "the optimizer forgets its moments at each drop")

    label_smoothing: float = setting(0.0, float, "share of the target that is spread over all classes", low=0, high=1,
                                     begins="regularization and augmentation")
    ema: float = setting(0.0, float, "decay of the averaged weights, which are evaluated; 0: no average", low=0, high=1,
                         excluded=1)
    padding: int = setting(0, int, "pixels by which training images are shifted at most", low=0, high=SIDE - 1)
    reflect: bool = setting(False, bool, "shifted images are continued by their mirror image, not by zeros, the mean colour")
    flip: bool = setting(False, bool, "half of the training images are mirrored")
    cutout: int = setting(0, int, "side of a square that is cut out of training images; 0: none", low=0, high=SIDE)
    mixup: float = setting(0.0, float, "alpha of mixup, images blended in pairs; 0: none", low=0)

    save_every: str = setting("10m", str, "longest time between two checkpoints, or a number of steps", word="TIME", free=True,
                              begins="what is written")
    inspect: bool = setting(False, bool, "statistics of activations, gradients and updates, per layer and epoch", free=True)
    tensorboard: bool = setting(False, bool, "also write the metrics for TensorBoard", free=True)

    def __post_init__(self) -> None:
        for name, spec in FIELDS.items():
            value = getattr(self, name)
            if value is not None or spec.default is not None:
                object.__setattr__(self, name, _checked(name, value, spec))
        for name in NEEDED:
            if getattr(self, name) in (None, ""):
                raise UsageError(f"{name} must be set")
        own = known_to(self.optimizer)
        for name in HYPERPARAMETERS[1:]:
            if getattr(self, name) is not None and name not in own:
                raise UsageError(f"{name} is not a setting of the optimizer {self.optimizer}, which has {', '.join(own)}")
        if self.ranks > self.batch_size:
            raise UsageError(f"ranks {self.ranks} cannot share a batch of {self.batch_size}")
        if self.patience and not self.val_split:
            raise UsageError("patience needs val_split: without held-out images only the test set could tell when to stop")
        if self.sched == "multistep" and not self.milestones:
            raise UsageError("sched multistep needs milestones: after how many epochs the rate drops")
        for name in ("milestones", "restart_at_milestones"):
            if getattr(self, name) and self.sched != "multistep":
                raise UsageError(f"{name} is of sched multistep, not {self.sched}")
        for name, seconds_of in (("save_every", save_interval), ("time_budget", duration)):
            try:
                if getattr(self, name) is not None:
                    seconds_of(getattr(self, name))
            except UsageError as error:
                raise UsageError(f"{name}: {error}") from None

    def as_dict(self) -> dict[str, Any]:
        """{name: value}, without what is not set."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def as_toml(self) -> str:
        """The text of a config.toml that gives these settings."""
        values = self.as_dict()
        options = values.pop("model_kwargs")
        if self.time_budget and not self.milestones:  # else they are what these are counted in
            del values["epochs"]
        lines: list[str] = [f"{name} = {_toml(value)}\n" for name, value in values.items()]
        if options:
            lines += ["\n[model_kwargs]\n", *(f"{_key(name)} = {_toml(value)}\n" for name, value in options.items())]
        return "".join(lines)

    def hyperparameters(self) -> dict[str, Any]:
        """What the class of the optimizer is given, besides clip_norm."""
        given = {name: getattr(self, name) for name in known_to(self.optimizer)}
        return {name: value for name, value in given.items() if value is not None}

    def with_epochs(self, epochs: int) -> Settings:
        """The same for another number of epochs; milestones keep their place in proportion."""
        return dataclasses.replace(self, epochs=epochs, milestones=scaled(self.milestones, epochs / self.epochs))


FIELDS: dict[str, Spec] = {item.name: item.metadata["spec"] for item in dataclasses.fields(Settings)}


def scaled(milestones: Sequence[int], factor: float) -> list[int]:
    """The milestones of a run that is `factor` times as long; none comes before the first epoch is done."""
    return [max(1, round(milestone * factor)) for milestone in milestones]


def known_to(optimizer: str) -> dict[str, Any]:
    """{name: default} of the hyperparameters of an optimizer, besides the learning rate."""
    parameters = inspect.signature(optim.OPTIMIZERS[optimizer].__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name in HYPERPARAMETERS}


def resolve(given: Mapping[str, Any], recipe: Mapping[str, Any]) -> Settings:
    """The settings that were given, arch and dataset at least, what they leave open from the recipe, and the defaults.

    A recipe's hyperparameters are those of its own optimizer: another one has its own. Its learning rate is that of its
    batch size, and of SGD in proportion to it (Goyal et al., arXiv 1706.02677). Its milestones are those of its epochs.
    Raises UsageError for what Settings refuses.
    """
    given = checked(given)
    recipe = dict(recipe)
    if given.get("sched", recipe["sched"]) != "multistep":
        recipe = {name: value for name, value in recipe.items() if name not in OF_MULTISTEP}
    optimizer = given.get("optimizer", recipe["optimizer"])
    if optimizer != recipe["optimizer"]:
        recipe = {name: value for name, value in recipe.items() if name not in HYPERPARAMETERS}
    batch_size = given.get("batch_size", recipe["batch_size"])
    rate = recipe.get("lr", optim.OPTIMIZERS[optimizer].default_lr)
    if optimizer == "sgd":
        rate = rate * batch_size / (recipe["batch_size"] if "lr" in recipe else optim.SGD.BATCH_OF_DEFAULT_LR)
    recipe["lr"] = rate
    if "epochs" in given and "milestones" in recipe:
        recipe["milestones"] = scaled(recipe["milestones"], given["epochs"] / recipe["epochs"])
    options = {**recipe.get("model_kwargs", {}), **given.get("model_kwargs", {})}
    return Settings(**{**known_to(optimizer), **recipe, **given, "optimizer": optimizer, "model_kwargs": options})


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same, each value as the type of its setting. Raises UsageError for what is no setting, or not its value."""
    for name in given:
        if name not in FIELDS:
            raise UsageError(f"unknown setting {_shown(name)}")
    return {name: _checked(name, value, FIELDS[name]) for name, value in given.items()}


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that a file gives. Raises UsageError where it cannot be read or holds what is no setting."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
        if len(raw) > LARGEST_FILE:
            raise ValueError(f"it has more than {LARGEST_FILE:,} bytes")
        given = tomllib.loads(raw.decode("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise UsageError(f"{path} cannot be read: it is nested too deeply") from None
    except ValueError as error:  # of the encoding, or of TOML
        raise UsageError(f"{path} cannot be read: {error}") from None
    try:
        return checked(given)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def duration(text: str) -> float:
    """"6h", "30m", "90s", "1h30m" -> seconds. Raises UsageError for another form, or nothing."""
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text)
    seconds = sum(float(number or 0) * unit for number, unit in zip(match.groups(), (3600, 60, 1))) if match else 0.0
    if not 0 < seconds < math.inf:
        raise UsageError(f"{_shown(text)} is not a time such as 6h, 30m, 90s or 1h30m")
    return seconds


def save_interval(text: str) -> tuple[float, int]:
    """`save_every` -> (seconds, steps) between two checkpoints; of steps 0 where it is a time."""
    if re.fullmatch(r"[1-9][0-9]{0,17}", text):
        return math.inf, int(text)
    try:
        return duration(text), 0
    except UsageError as error:
        raise UsageError(f"{error}, nor a number of steps") from None


def _checked(name: str, value: Any, spec: Spec) -> Any:
    """The value, as its type. Raises UsageError."""
    def refuse(need: str) -> UsageError:
        return UsageError(f"{name} is {_shown(value)}: it must be {need}")

    def number(value: Any, kind: type) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            raise refuse("a number" if kind is float else "a whole number")
        if not abs(value) <= LARGEST[kind]:  # nor is NaN
            raise refuse("a number below 3.4e38" if kind is float else "below 2**63")
        if not spec.low <= value <= spec.high or value == spec.excluded:
            raise refuse((f"at least {spec.low}" if spec.high == math.inf else f"from {spec.low} to {spec.high}")
                         + ("" if spec.excluded is None else f", but not {spec.excluded}"))
        return kind(value)

    if spec.kind in (int, float):
        return number(value, spec.kind)
    if spec.kind is list:
        if not isinstance(value, list):
            raise refuse("a list of whole numbers")
        return [number(item, int) for item in value]
    if not isinstance(value, spec.kind):
        raise refuse({bool: "true or false", str: "a text", dict: "a table"}[spec.kind])
    if isinstance(value, str) and "\0" in value:
        raise refuse("a text without a NUL")
    if spec.choices and value not in spec.choices:
        raise refuse(f"one of {', '.join(spec.choices)}")
    if isinstance(value, dict) and not all(
            isinstance(item, (bool, str)) or type(item) in LARGEST and abs(item) <= LARGEST[type(item)]
            for item in value.values()):
        raise refuse("a table of texts, true, false, numbers below 3.4e38 and whole ones below 2**63")
    return value


def _shown(value: Any) -> str:
    """A value in a message: the file that it is from may hold a million digits."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."


def _toml(value: Any) -> str:
    """A text, number, bool or list in TOML: JSON's are TOML's too, but for one letter and for what has no letter, bytes of
    a path that are not UTF-8."""
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)
