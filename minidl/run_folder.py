"""The folder of a run: settings, environment, metrics of each epoch, final weights. Nothing in it is overwritten."""

import csv
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minidl import __version__, weights
from minidl.device import Device
from minidl.errors import UsageError

COLUMNS = ("epoch", "lr", "train_loss", "train_top1", "test_loss", "test_top1", "test_top5", "images_per_second", "seconds")


class RunFolder:
    """path: `output`, which must not exist or be empty; or a new folder runs/<name>-<time>."""

    def __init__(self, name: str, output: str | os.PathLike[str] | None = None) -> None:
        try:
            self.path = Path(output) if output else _new_folder(name)
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()):
                raise UsageError(f"the output folder {self.path} is not empty: name another one")
        except OSError as error:
            raise UsageError(f"the output folder {output or 'runs'} cannot be made: {error.strerror}") from None
        self.metrics_path = self.path / "metrics.csv"

    def write_settings(self, settings: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """settings: {name: str, number, bool or None}, to config.toml; environment: to env.json."""
        # What is None was not set, and TOML has no word for it.
        lines = [f"{name} = {_toml(value)}\n" for name, value in settings.items() if value is not None]
        (self.path / "config.toml").write_text("".join(lines), encoding="utf-8")
        (self.path / "env.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Append {column: value} to metrics.csv."""
        new = not self.metrics_path.exists()
        with self.metrics_path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)

    def save_weights(self, state: Mapping[str, Any], metadata: weights.Metadata) -> Path:
        """Write weights.npz as `weights.save` does. Raises CheckpointError where it cannot be written."""
        path = self.path / "weights.npz"
        weights.save(path, state, metadata)
        return path


def _toml(value: str | float) -> str:
    """A str, number or bool in TOML: JSON's are TOML's too, once a path holds no bytes beyond its encoding."""
    if isinstance(value, str):
        value = os.fsencode(value).decode("utf-8", "replace")
    return json.dumps(value, ensure_ascii=False)


def _new_folder(name: str) -> Path:
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1, 1000):  # two runs may start in one second
        path = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
    raise UsageError(f"the folder runs holds 999 runs named {stem}")


def environment(device: Device) -> dict[str, Any]:
    """What a result depends on besides its settings: versions, hardware, commit."""
    versions = {"minidl": __version__, "python": platform.python_version(), "numpy": np.__version__}
    if "cupy" in sys.modules:
        versions["cupy"] = sys.modules["cupy"].__version__
    return {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], "device": device.name,
            "hardware": device.description, "cpu": _cpu_model(), "platform": platform.platform(),
            "versions": versions, "commit": _commit()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str | None:
    """The commit of this checkout, "+" appended where files differ from it, or None outside of one."""
    source = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", source, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
