"""Pictures of results: .png, .svg or .pdf, written whole or not at all. The only module that knows matplotlib.

Each function that draws returns the Figure that it has written. All raise what `check` does, and
CheckpointError where the file cannot be written. Nothing depends on the settings of matplotlib that a user may have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minidl.atomic_file import FilePath, write_atomically
from minidl.device import Array
from minidl.errors import CheckpointError, UsageError
from minidl.extras import library
from minidl.wording import words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
# Of M. Okabe and K. Ito, "Color universal design", 2008: told apart by the colour-blind. Its yellow is too light for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PARTS: dict[str, dict[str, Any]] = {  # of a data set
    "train": dict(linestyle=(0, (3, 1.5)), linewidth=1.1, markerfacecolor="white"), "val": dict(linestyle=(0, (1, 1))),
    "test": dict(linestyle="solid")}
GRAY = "0.4"


def check(path: FilePath) -> None:
    """Raises UsageError where no picture can be written to `path`: another suffix, or no matplotlib;
    CheckpointError where no folder can be written at all."""
    if Path(path).suffix.lower() not in FORMATS:
        raise UsageError(f"{path}: a picture is one of {', '.join(FORMATS)}")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where it cannot keep a cache in the user's folder
    try:
        library("matplotlib", "plot")
    except OSError as error:  # it finds no folder for its cache
        raise CheckpointError(f"{path} cannot be drawn: {error}") from None


@contextlib.contextmanager
def picture(path: FilePath, width: float, height: float, layout: str | None = "constrained") -> Iterator[Figure]:
    """A Figure of that size in inches, to be drawn in the body of the `with` and written at its end."""
    check(path)
    style = library("matplotlib.style", "plot")
    suffix = Path(path).suffix.lower()
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the font lacks a letter of a name
        figure = library("matplotlib.figure", "plot").Figure((width, height), layout=layout)
        if layout:
            figure.get_layout_engine().set(w_pad=0.1, h_pad=0.05)
        yield figure
        write_atomically(path, lambda file: figure.savefig(file, format=suffix[1:], metadata=FORMATS[suffix]))


@dataclass(frozen=True)
class History:
    """What is drawn of a run. history: rows of its metrics.csv, {column: number as text}; classes: of its data, if known;
    other_seeds: the rows of the same run with each other seed."""

    name: str
    history: Sequence[Mapping[str, str]]
    classes: int | None = None
    other_seeds: Sequence[Sequence[Mapping[str, str]]] = ()

    def column(self, name: str) -> Array:
        """(seeds, epochs), as many as all seeds have; NaN where there is no number."""
        return np.array([[float(row.get(name) or "nan") for row in epoch]
                         for epoch in zip(self.history, *self.other_seeds)]).T

    def means(self, name: str) -> Array:
        """(epochs): of all seeds."""
        return np.mean(self.column(name), axis=0)


def curves(runs: Sequence[History], path: FilePath) -> Figure:
    """Loss, top-1 and learning rate over the epochs, a colour for each of the runs; its last test top-1 is named. Of a run
    with several seeds the mean, and a band from the least to the greatest."""
    runs = [dataclasses.replace(run, name=_printable(run.name)) for run in runs]
    legend_columns = max(1, 120 // (8 + max(len(run.name) for run in runs)))
    legend_lines = -(-len(runs) // legend_columns)
    colours = _colours(len(runs))
    with picture(path, 10, 3 + 0.2 * legend_lines) as figure:
        loss, top1, rate = figure.subplots(1, 3, width_ratios=(3, 3, 2))
        for run, colour in zip(runs, colours):
            for part, style in PARTS.items():
                _line(loss, run, f"{part}_loss", color=colour, **style)
                _line(top1, run, f"{part}_top1", color=colour, **style)
            _line(rate, run, "lr", color=colour)
        chances = sorted({math.log(run.classes) for run in runs if run.classes})
        for chance in chances:
            loss.axhline(chance, color=GRAY, linewidth=0.8, linestyle=(0, (1, 2)))
            loss.annotate(f"chance, {math.exp(chance):.0f} classes", (1, chance), (0, 2), textcoords="offset points",
                          xycoords=loss.get_yaxis_transform(), ha="right", color=GRAY, fontsize=SMALL)
        # A loss beyond all reason would press the others into one line.
        _frame(loss, "loss", 1.5 * chances[-1] if chances else math.inf)
        _frame(top1, "top-1 accuracy", 1.02)
        _frame(rate, "learning rate")
        _name_last(top1, runs, colours)
        line = library("matplotlib.lines", "plot").Line2D
        parts = [part for part in PARTS if any(f"{part}_top1" in row for run in runs for row in run.history)]
        top1.legend([line([], [], color=GRAY, **PARTS[part]) for part in parts], parts, loc="lower right")
        figure.legend([line([], [], color=colour, linewidth=2.5) for colour in colours], [run.name for run in runs],
                      loc="outside lower center", ncols=legend_columns, borderaxespad=0)
    return figure


def _printable(name: str) -> str:
    """A file's name, of which some bytes may be no text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _colours(count: int) -> Sequence[Any]:
    if count <= len(COLOURS):
        return COLOURS[:count]
    return list(library("matplotlib", "plot").colormaps["viridis"](np.linspace(0, 0.9, count)))


def _line(axes: Axes, run: History, column: str, **style: Any) -> None:
    """Draw a column over the epochs, where it has finite numbers."""
    values = run.column(column)
    known = np.isfinite(values).all(axis=0)
    if known.any():
        epochs, values = run.means("epoch")[known], values[:, known]
        marker = "o" if len(epochs) <= 10 else None  # a single point is no line
        axes.plot(epochs, np.mean(values, axis=0), marker=marker, markersize=3, **style)
        if len(values) > 1:
            axes.fill_between(epochs, np.min(values, axis=0), np.max(values, axis=0), color=style["color"], alpha=0.15,
                              linewidth=0)


def _frame(axes: Axes, title: str, most: float = math.inf) -> None:
    """Title, and limits from 0 to the highest that is drawn, or to `most`."""
    highest = axes.dataLim.ymax if axes.lines else 0.0
    axes.set(title=title, xlabel="epoch", ylim=(0, min(1.05 * highest, most) or 1))
    axes.xaxis.set_major_locator(library("matplotlib.ticker", "plot").MaxNLocator(6, integer=True, min_n_ticks=1))


def _name_last(axes: Axes, runs: Sequence[History], colours: Sequence[Any]) -> None:
    """Write the last test top-1 of each run beside the axes, as near to its height as the others allow."""
    highest = axes.get_ylim()[1]
    last = sorted((value, index) for index, run in enumerate(runs) if math.isfinite(value := run.means("test_top1")[-1]))
    for (value, index), y in zip(last, spread([value for value, _ in last], 0.06 * highest, 0.02 * highest, highest)):
        axes.annotate(f"{value:.1%}", (1, y), (3, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
                      va="center", color=colours[index], fontsize=8)
    axes.yaxis.set_major_formatter(library("matplotlib.ticker", "plot").PercentFormatter(xmax=1, decimals=0))


def spread(positions: Sequence[float], gap: float, least: float = -math.inf, most: float = math.inf) -> list[float]:
    """Rising positions -> the nearest ones, in least squares, with at least `gap` between neighbours, in least..most."""
    blocks: list[list[float]] = []  # of neighbours that push each other: sum and count of their positions, gaps taken out
    for index, position in enumerate(positions):
        block = [position - index * gap, 1]
        while blocks and blocks[-1][0] / blocks[-1][1] > block[0] / block[1]:
            block = [sum(pair) for pair in zip(block, blocks.pop())]
        blocks.append(block)
    means = [total / count for total, count in blocks for _ in range(int(count))]
    end = len(means) - 1
    return [max(least + index * gap, min(mean + index * gap, most - (end - index) * gap)) for index, mean in enumerate(means)]


def evaluation(matrix: Array, groups: Sequence[str], accuracies: Array, classes: Sequence[str], path: FilePath) -> Figure:
    """What a network takes for what, and how often it is right in each class.

    matrix (G, G): how many images of the group in a row were taken for the group in a column; accuracies (K): share of
    the images of each class that were taken for this class, NaN without images.
    """
    side = 2.2 + 0.27 * len(groups)
    with picture(path, side + 4, side) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(side, 3))
        _confusion(left, matrix, groups)
        _per_class(right, accuracies, classes)
    return figure


def _confusion(axes: Axes, matrix: Array, names: Sequence[str]) -> None:
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0)
    ticks = range(len(names))
    slanted: dict[str, Any] = dict(rotation=45, ha="right", rotation_mode="anchor") if max(map(len, names)) > 2 else {}
    axes.set_xticks(ticks, map(words, names), **slanted)
    axes.set_yticks(ticks, map(words, names))
    axes.set(xlabel="predicted", ylabel="true", title="confusion, % of each row")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8)
    for row, column in np.argwhere(shares >= 0.05):
        share = shares[row, column]
        axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=SMALL,
                  color="white" if share > 0.6 * shares.max() else "black")


def _per_class(axes: Axes, accuracies: Array, classes: Sequence[str]) -> None:
    named = 10
    order = [index for index in np.argsort(accuracies, kind="stable") if math.isfinite(accuracies[index])]
    values = [accuracies[index] for index in order]
    names = [words(classes[index]) for index in order]
    count = len(order)
    far = [index for index in range(count) if index < named or index >= count - named]
    axes.barh(range(count), values, height=0.8, color=[COLOURS[0] if index in far else COLOURS[5] for index in range(count)])
    axes.set(yticks=[], xlim=(0, 1), ylim=(-0.7, count - 0.3), title="accuracy of each class")
    axes.xaxis.set_major_formatter(library("matplotlib.ticker", "plot").PercentFormatter(xmax=1, decimals=0))
    axes.spines["left"].set_visible(False)
    beside = axes.get_yaxis_transform()
    for index, y in zip(far, spread(far, count / 58, 0, count - 1)):
        axes.plot((-0.08, -0.01), (y, index), transform=beside, clip_on=False, color=GRAY, linewidth=0.5)
        axes.text(-0.1, y, f"{names[index]}  {values[index]:.0%}", transform=beside, ha="right", va="center", fontsize=SMALL)


def lr_find(rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], suggestion: float | None,
            path: FilePath) -> Figure:
    """The losses of a run whose learning rate grows from step to step, smoothed, and the rate suggested, None for none."""
    with picture(path, 5.5, 3.5) as figure:
        axes = figure.subplots()
        axes.plot(rates, losses, color=COLOURS[5], linewidth=0.7)
        axes.plot(rates, smoothed, color=COLOURS[0])
        # The end, where the loss explodes, would press the rest into one line.
        low = min(smoothed)
        start = max(smoothed[:smoothed.index(low) + 1])
        margin = 0.3 * (start - low) or 1
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")  # the default writes powers, as mathematics
        axes.set(xlabel="learning rate", ylabel="training loss", ylim=(low - margin, start + margin))
        if suggestion:
            axes.axvline(suggestion, color=COLOURS[1], linestyle=(0, (3, 1.5)))
            axes.annotate(f"suggested: {suggestion:.2g}", (suggestion, 1), (0, 3), xycoords=axes.get_xaxis_transform(),
                          textcoords="offset points", ha="center", color=COLOURS[1])
    return figure


MAPS = {"output_zeros": "zeros of the output", "gradient_rms": "gradient of the output", "update_ratio": "update over weight"}


FURTHEST = 1e4  # what is smaller than the largest value over this is drawn as that: the last steps of a cosine are almost 0


def layers_over_epochs(epochs: Sequence[int], statistics: Sequence[Mapping[str, Mapping[str, float]]], path: FilePath) -> Figure:
    """What `--inspect` saw: a map for each of MAPS, a row for each layer, a column for each of the epochs.

    statistics: of each epoch, {layer: {one of inspection.STATISTICS: value}}. Shares are linear, lengths logarithmic.
    """
    names = list(dict.fromkeys(name for rows in statistics for name in rows))
    height = 1.4 + 0.14 * max(len(names), 10)
    colors, ticker = library("matplotlib.colors", "plot"), library("matplotlib.ticker", "plot")
    with picture(path, 11, height) as figure:
        maps = figure.subplots(1, len(MAPS), sharey=True)
        for axes, (key, title) in zip(maps, MAPS.items()):
            table = np.array([[rows.get(name, {}).get(key, math.nan) for rows in statistics] for name in names], float)
            shares = key == "output_zeros"
            table = table if shares else np.where(table > 0, table, math.nan)
            seen = table[np.isfinite(table)]
            high = 1 if shares or not seen.size else seen.max()
            low = 0 if shares else max(seen.min(), high / FURTHEST) if seen.size else 0.1
            norm = colors.Normalize(low, high) if shares else colors.LogNorm(low, high if high > low else 10 * low)
            image = axes.pcolormesh(np.append(np.array(epochs) - 0.5, epochs[-1] + 0.5), np.arange(len(names) + 1) - 0.5, table,
                                    norm=norm, cmap="viridis")
            bar = figure.colorbar(image, ax=axes, location="bottom", aspect=30, extend="min" if (seen < low).any() else "neither")
            bar.ax.tick_params(labelsize=SMALL)
            bar.ax.xaxis.set_major_locator(ticker.LinearLocator(3) if shares else ticker.LogLocator(numticks=4))
            bar.ax.xaxis.set_minor_locator(ticker.NullLocator())
            bar.ax.xaxis.set_major_formatter("{x:.1f}" if shares else "{x:.0e}")  # the default writes powers, as mathematics
            axes.set(title=title, xlabel="epoch")
            axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, min_n_ticks=1))
            axes.grid(False)
        maps[0].set_yticks(range(len(names)), names, fontsize=SMALL)
        maps[0].set_ylim(len(names) - 0.5, -0.5)  # in the order of the forward, from the top
    return figure


def contact_sheet(images: Array, titles: Sequence[str], path: FilePath, columns: int = 10) -> Figure:
    """images uint8 (M, 3, H, W), M at least 1, row by row, `columns` in each; titles: M names, each written under its image."""
    side, gap, letters, line = 0.8, 0.14, 14, 0.12  # inches, inches, letters in a line, inches
    count, _, height, width = images.shape
    columns = min(columns, count)
    lines = [textwrap.wrap(words(title), letters, max_lines=2, placeholder=" …") for title in titles]
    step_x = side + gap
    step_y = side * height / width + max(map(len, lines)) * line + gap
    sheet_width, sheet_height = gap + columns * step_x, gap + -(-count // columns) * step_y
    with picture(path, sheet_width, sheet_height, layout=None) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        for index, (image, title) in enumerate(zip(images, lines, strict=True)):
            left, top = gap + index % columns * step_x, gap + index // columns * step_y
            bottom = top + side * height / width
            axes.imshow(image.transpose(1, 2, 0), extent=(left, left + side, bottom, top), interpolation="nearest")
            axes.text(left + side / 2, bottom + 0.03, "\n".join(title), fontsize=SMALL, ha="center", va="top")
        axes.set(xlim=(0, sheet_width), ylim=(sheet_height, 0))
        axes.axis("off")
    return figure
