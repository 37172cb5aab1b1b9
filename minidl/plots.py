"""Pictures of results: .png, .svg or .pdf, written whole or not at all. The only module that knows matplotlib.

Each function that draws returns the Figure that it has written. All raise UsageError where `check` does, and
CheckpointError where the file cannot be written. Nothing depends on the settings of matplotlib that a user may have.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidl.device import Array
from minidl.errors import UsageError
from minidl.weights import FilePath, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# {suffix: what the file would say besides the picture}. Without a date, equal results are equal files.
FORMATS: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8, "savefig.dpi": 200, "lines.linewidth": 1.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "0.9", "grid.linewidth": 0.6, "legend.frameon": False,
    "text.parse_math": False,  # a name may hold a $
    "pdf.fonttype": 42, "svg.hashsalt": "minidl"}
SMALL = 7  # points: the smallest letters


def check(path: FilePath) -> None:
    """Raises UsageError where no picture can be written to `path`: another suffix, or matplotlib is not installed."""
    if Path(path).suffix.lower() not in FORMATS:
        raise UsageError(f"{path}: a picture is one of {', '.join(FORMATS)}")
    library("matplotlib")


def library(module: str) -> Any:
    """The module, of a library of the extra "plot". Raises UsageError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(f"the package {module.partition('.')[0]} is needed: `pip install \"minidl[plot]\"`") from None


@contextlib.contextmanager
def _picture(path: FilePath, width: float, height: float, layout: str | None = "constrained") -> Iterator[Figure]:
    """A Figure of that size in inches, to be drawn in the body of the `with` and written at its end."""
    check(path)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a home folder that cannot be written is no concern of a picture
    style = library("matplotlib.style")
    suffix = Path(path).suffix.lower()
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the font lacks a letter of a name
        figure = library("matplotlib.figure").Figure((width, height), layout=layout)
        yield figure
        write_whole(path, lambda file: figure.savefig(file, format=suffix[1:], metadata=FORMATS[suffix]))


def contact_sheet(images: Array, titles: Sequence[str], path: FilePath, columns: int = 10) -> Figure:
    """images uint8 (M, 3, H, W), M at least 1, row by row, `columns` in each; titles: M names, each written under its image."""
    side, gap, letters, line = 0.8, 0.14, 14, 0.12  # inches, inches, letters in a line, inches
    count, _, height, width = images.shape
    columns = min(columns, count)
    lines = [textwrap.wrap(title.replace("_", " "), letters, max_lines=2, placeholder=" …") for title in titles]
    step_x = side + gap
    step_y = side * height / width + max(map(len, lines)) * line + gap
    sheet_width, sheet_height = gap + columns * step_x, gap + -(-count // columns) * step_y
    with _picture(path, sheet_width, sheet_height, layout=None) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        for index, (image, title) in enumerate(zip(images, lines, strict=True)):
            left, top = gap + index % columns * step_x, gap + index // columns * step_y
            bottom = top + side * height / width
            axes.imshow(image.transpose(1, 2, 0), extent=(left, left + side, bottom, top), interpolation="nearest")
            axes.text(left + side / 2, bottom + 0.03, "\n".join(title), fontsize=SMALL, ha="center", va="top")
        axes.set(xlim=(0, sheet_width), ylim=(sheet_height, 0))
        axes.axis("off")
    return figure
