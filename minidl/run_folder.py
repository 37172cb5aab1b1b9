"""The folder of a run: settings, environment, metrics of each epoch, events, checkpoints. Nothing in it is overwritten by
another run."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minidl import __version__, checkpoint, data, host_build, plots, process_lock, weights
from minidl.atomic_file import write_atomically
from minidl.device import Device
from minidl.errors import CheckpointError, UsageError
from minidl.extras import library
from minidl.wording import warn

SEED = "seed-"  # the name of a folder begins so, where there are several seeds, and ends with the seed
COLUMNS = ("epoch", "lr", "train_loss", "train_top1", "test_loss", "test_top1", "test_top5", "images_per_second", "seconds")


class RunFolder:
    """What a run writes. Where the disk does not take it, the run goes on: there is one warning, and `troubles` has the last.

    path: the folder, which is there. Until `close` no other process may make a RunFolder of it: UsageError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._release = process_lock.take_folder(path, self)
        except BlockingIOError:
            raise UsageError(f"another process writes to {path}: wait for its end, or name another folder") from None
        self.troubles: dict[str, str] = {}  # {file: why it was not written}
        self._tensorboard: Any = None

    @classmethod
    def new(cls, path: str | os.PathLike[str]) -> RunFolder:
        """A folder that is not there yet, or empty. Raises UsageError."""
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"the output folder {path} cannot be made: {error.strerror}") from None
        folder = cls(path)
        check_empty(path)
        return folder

    @classmethod
    def dated(cls, name: str) -> RunFolder:
        """A new folder runs/<name>-<time>. Raises UsageError."""
        stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        for number in range(1, 1000):  # two runs may start in one second
            path = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
            try:
                path.mkdir(parents=True)
                return cls(path)
            except FileExistsError:
                continue
            except OSError as error:
                raise UsageError(f"the output folder runs cannot be made: {error.strerror}") from None
        raise UsageError(f"the folder runs holds 999 runs named {stem}")

    def write_settings(self, settings: str, environment: Mapping[str, Any]) -> None:
        """settings: the text of config.toml; environment: to env.json. Raises CheckpointError where they cannot be written: that
        is said before the training, not after it."""
        write_atomically(self.path / "config.toml", lambda file: file.write(settings.encode()))
        text = json.dumps(environment, indent=2) + "\n"
        write_atomically(self.path / "env.json", lambda file: file.write(text.encode()))

    def compare(self, environment: Mapping[str, Any]) -> None:
        """Warn where env.json tells of other hardware or versions than `environment`: no bits are promised then."""
        try:
            before = json.loads((self.path / "env.json").read_text())
            changed = [f"{key} {before[key]!r}, now {environment[key]!r}" for key in ("hardware", "cpu", "versions")
                       if before[key] != environment[key]]
        except (OSError, ValueError, KeyError, TypeError):
            return
        if changed:
            warn(f"the run will not be, bit for bit, what it would have been without the stop: it had {'; '.join(changed)}")

    def add_metrics(self, history: Sequence[Mapping[str, str]]) -> None:
        """Append the last of `history`, {column: text} per epoch, to metrics.csv; where that failed before, or it has other
        columns than the one before, write all."""
        again = "metrics.csv" in self.troubles or len(history) == 1 or history[-1].keys() != history[-2].keys()
        with self.survives("metrics.csv"):
            if again:
                self.write_metrics(history)
            else:
                with (self.path / "metrics.csv").open("a", newline="", encoding="utf-8") as file:
                    file.write(_csv(history, header=False, first=len(history) - 1))
        if self._tensorboard:
            with self.survives("tensorboard"):
                row = history[-1]
                for column in row.keys() - {"epoch"}:
                    part, _, metric = column.partition("_")
                    tag = f"{part}/{metric}" if part in ("train", "val", "test") else column
                    self._tensorboard.add_scalar(tag, float(row[column]), int(row["epoch"]))
                self._tensorboard.flush()

    def write_metrics(self, history: Sequence[Mapping[str, str]]) -> None:
        """metrics.csv holds `history` and nothing else. Raises CheckpointError where it cannot be written."""
        write_atomically(self.path / "metrics.csv", lambda file: file.write(_csv(history, header=True).encode()))

    def log(self, event: str, **values: Any) -> None:
        """Append an event to events.jsonl, which nothing is ever taken from: what a kill or a full disk has cut off stays, as a
        line of its own."""
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **values}) + "\n"
        with self.survives("events.jsonl"), (self.path / "events.jsonl").open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            cut_off = file.read() not in (b"", b"\n")
            file.write((b"\n" if cut_off else b"") + line.encode())

    def save(self, state: checkpoint.Checkpoint) -> None:
        """last.npz, whole or not at all; the one before is kept."""
        with self.survives(checkpoint.LAST):
            checkpoint.save(self.path, state)

    def save_best(self, state: checkpoint.Checkpoint) -> None:
        """best.npz: the weights alone."""
        with self.survives(checkpoint.BEST):
            weights.save(self.path / checkpoint.BEST, state.state, state.about)

    def draw_curves(self, history: Sequence[Mapping[str, str]], classes: int) -> None:
        """curves.png, where the extra that draws is installed."""
        with self.survives("curves.png"), contextlib.suppress(UsageError):
            plots.curves([plots.History(self.path.name, history, classes)], self.path / "curves.png")

    def start_tensorboard(self) -> None:
        """Write the metrics for TensorBoard as well, to the folder tensorboard. Raises UsageError without the extra."""
        writer = tensorboard_writer()
        with self.survives("tensorboard"):
            self._tensorboard = writer(str(self.path / "tensorboard"))

    def close(self) -> None:
        """Nothing more will be added. TensorBoard's file is written by a thread, which may be behind."""
        if self._tensorboard:
            with self.survives("tensorboard"):
                self._tensorboard.close()
        self._release()

    @contextlib.contextmanager
    def survives(self, file: str) -> Iterator[None]:
        """A `with` block that writes the file of that name: where it fails, the run goes on."""
        try:
            yield
        except (OSError, CheckpointError) as error:
            reason = str(error) if isinstance(error, CheckpointError) else f"{self.path / file}: {error.strerror or error}"
            if file not in self.troubles:
                warn(f"{reason}; the run goes on")
            self.troubles[file] = reason
        else:
            self.troubles.pop(file, None)


def folder_of(path: Path) -> Path:
    """The folder in which a run goes on whose folder, or checkpoint, is `path`. Raises UsageError where another run may be
    overwritten there: the file is a copy."""
    if path.is_dir():
        return path
    if path.name not in (checkpoint.LAST, checkpoint.PREVIOUS) and (path.parent / checkpoint.LAST).exists():
        raise UsageError(f"the run of {path} would go on in its folder, whose {checkpoint.LAST} would be lost: copy the file, as "
                         f"{checkpoint.LAST}, to a folder of its own")
    return path.parent


def check_empty(path: Path) -> None:
    """Raise UsageError where there is something in the folder, or it cannot be read. What a process leaves that is killed while
    it writes its first file is nothing."""
    try:
        empty = not (path.is_dir() and any(not file.match(".config.toml.*.tmp") for file in path.iterdir()))
        again = f", or go on with --resume {path}" if (path / checkpoint.LAST).exists() else ""
    except OSError as error:
        raise UsageError(f"the output folder {path} cannot be read: {error.strerror}") from None
    if not empty:
        raise UsageError(f"the output folder {path} is not empty: name another one{again}")


class NoFolder(RunFolder):
    """What ranks write to that leave writing to another."""

    def __init__(self) -> None:
        self.path, self.troubles = Path(os.devnull), {}

    def _nothing(self, *values: Any, **named: Any) -> None:
        pass

    write_settings = compare = add_metrics = write_metrics = log = _nothing
    save = save_best = draw_curves = start_tensorboard = close = _nothing


def tensorboard_writer() -> Any:
    """The class of what writes for TensorBoard. Raises UsageError without the extra."""
    return library("tensorboardX", "tensorboard").SummaryWriter


def _csv(rows: Sequence[Mapping[str, str]], header: bool, first: int = 0) -> str:
    """The rows from `first` on, with the columns of all: of a resumed run, some may have a validation."""
    text = io.StringIO()
    columns = dict.fromkeys(column for row in rows for column in row) if rows else COLUMNS
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows[first:])
    return text.getvalue()


def newest(arch: str | None = None) -> Path:
    """The folder in runs/ that was written to last, of the architecture `arch` if one is given. Raises UsageError."""
    found = [path.parent for path in Path("runs").glob("*/" + checkpoint.LAST)]
    if arch:
        stems = tuple(f"{arch}-{dataset}-" for dataset in data.NAMES)
        found = [path for path in found if path.name.startswith(stems)]
    if not found:
        raise UsageError(f"there is no run {'of ' + arch + ' ' if arch else ''}in the folder runs: name one, --resume FOLDER")
    return max(found, key=lambda path: (path / checkpoint.LAST).stat().st_mtime_ns)


def environment(device: Device) -> dict[str, Any]:
    """What a result depends on besides its settings: versions, hardware, commit."""
    versions = {"minidl": __version__, "python": platform.python_version(), "numpy": np.__version__}
    if "cupy" in sys.modules:
        versions["cupy"] = sys.modules["cupy"].__version__
    return {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], "device": device.name,
            "hardware": device.description, "cpu": _cpu_model(), "platform": platform.platform(),
            "versions": versions, "commit": _commit()}


def _cpu_model() -> str:
    """With its numbers, where there are some: a virtual machine's name may tell no generation from another."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        first = ""
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    # Of x86 and of ARM.
    words = {"family": "cpu family", "model": "model", "implementer": "CPU implementer", "part": "CPU part"}
    numbers = [f"{word} {facts[name]}" for word, name in words.items() if name in facts]
    return " ".join([facts.get("model name") or host_build.cpu_name(), *numbers])


def _commit() -> str | None:
    """The commit of this checkout, "+" appended where files differ from it, or None outside of one."""
    source = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", source, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(Path(__file__)))  # an environment may lie in the checkout of something else
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
