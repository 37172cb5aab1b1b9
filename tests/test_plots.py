"""Pictures: what is drawn is what was given, all that is written can be read, files are whole. And `python -m minidl plot`."""

import argparse
import itertools
import json
import math
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minidl import plots
from minidl.commands import plot
from minidl.errors import CheckpointError, UsageError
from minidl.extras import library

matplotlib = pytest.importorskip("matplotlib", reason="pictures need it: pip install 'minidl[plot]'")
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from PIL import Image  # noqa: E402

RECORDS = Path(__file__).parent.parent / "benchmarks" / "results"
GROUPS = ("aquatic_mammals", "fish", "large_omnivores_and_herbivores", "large_man-made_outdoor_things", "people")


def history(epochs, final, **changes):
    """Rows of a metrics.csv that ends at the accuracy `final`."""
    rows = []
    for epoch in range(1, epochs + 1):
        done = epoch / epochs
        numbers = {"epoch": epoch, "lr": 0.1 * (1 - done), "train_loss": 4 - 3 * done, "train_top1": 0.9 * final * done,
                   "test_loss": 4 - 2.5 * done, "test_top1": final * done, "test_top5": done, **changes}
        rows.append({name: str(value) for name, value in numbers.items()})
    return rows


def numbers(run, column):
    return [float(row[column]) for row in run.history]


def texts(artist):
    return [text.get_text() for text in artist.findobj(matplotlib.text.Text) if text.get_text()]


def written(figure):
    """Those texts that a reader sees in level lines, and their boxes in pixels."""
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    ticks = {id(label): axes.axison and low <= place <= high for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)
             for low, high in [sorted(axis.get_view_interval())]
             for label, place in zip(axis.get_ticklabels(), axis.get_ticklocs())}
    return [(text.get_text(), text.get_window_extent()) for text in figure.findobj(matplotlib.text.Text)
            if text.get_text() and text.get_visible() and text.get_rotation() == 0 and ticks.get(id(text), True)]


def assert_legible(figure):
    """No text covers another or leaves the picture, and none is smaller than 7 points."""
    boxes = written(figure)
    assert len(boxes) > 3
    for (first, a), (second, b) in itertools.combinations(boxes, 2):
        assert not (min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1), (first, second)
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height, text
    assert all(text.get_fontsize() >= 7 for text in figure.findobj(matplotlib.text.Text))


# ---- curves ------------------------------------------------------------------------------------------------------


def test_curves_are_the_columns(tmp_path):
    runs = [plots.History("one", history(30, 0.6), 100), plots.History("other", history(20, 0.7, val_loss=2, val_top1=0.65), 100)]
    loss, top1, rate = plots.curves(runs, tmp_path / "it.png").axes
    for axes, columns in ((loss, ("train_loss", "val_loss", "test_loss")), (top1, ("train_top1", "val_top1", "test_top1")),
                          (rate, ("lr",))):
        expected = [(numbers(run, "epoch"), numbers(run, column))
                    for run in runs for column in columns if column in run.history[0]]
        drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if len(line.get_xdata()) > 2]
        assert drawn == expected
    colours = [to_hex(line.get_color()) for line in top1.lines]
    assert colours == ["#0072b2"] * 2 + ["#d55e00"] * 3, "a colour for each run"
    assert [line.is_dashed() for line in top1.lines] == [True, False, True, True, False], "only test is solid"
    assert texts(top1.get_legend()) == ["train", "val", "test"]
    assert {"60.0%", "70.0%"} <= set(texts(top1)), "the last accuracies"
    assert texts(top1.figure.legends[0]) == ["one", "other"]


def test_chance_is_the_loss_of_a_network_that_knows_nothing(tmp_path):
    runs = [plots.History("a", history(3, 0.9), 100), plots.History("b", history(3, 0.9), 10), plots.History("c", history(3, 0.9))]
    loss = plots.curves(runs, tmp_path / "it.png").axes[0]
    assert [line.get_ydata()[0] for line in loss.lines[-2:]] == [math.log(10), math.log(100)]
    assert {"chance, 10 classes", "chance, 100 classes"} <= set(texts(loss))


def test_limits(tmp_path):
    loss, top1, rate = plots.curves([plots.History("it", history(5, 0.5), 100)], tmp_path / "it.png").axes
    assert loss.get_ylim() == (0, pytest.approx(1.05 * math.log(100)))
    assert top1.get_ylim() == (0, pytest.approx(1.05 * 0.5)) and rate.get_ylim() == (0, pytest.approx(1.05 * 0.08))
    exploded = history(5, 1.0)
    exploded[0]["train_loss"] = "1e9"
    loss, top1, _ = plots.curves([plots.History("it", exploded, 100)], tmp_path / "it.png").axes
    assert loss.get_ylim() == (0, pytest.approx(1.5 * math.log(100))), "the others can still be seen"
    assert top1.get_ylim() == (0, 1.02)


def test_several_seeds_are_their_mean_and_a_band(tmp_path):
    seeds = [history(epochs, top1) for epochs, top1 in ((12, 0.5), (11, 0.6), (30, 0.9))]
    for row, value in zip(seeds[1], ("nan", "0.99")):
        row["test_top1"] = value
    run = plots.History("seeds", seeds[0], other_seeds=seeds[1:])
    top1 = plots.curves([run, plots.History("one", history(11, 0.55))], tmp_path / "it.png").axes[1]
    values = [[float(row["test_top1"]) for row in rows[1:11]] for rows in seeds]  # not of the first epoch, which a seed lacks
    line, (train, test) = top1.lines[1], top1.collections
    assert list(line.get_xdata()) == list(range(2, 12)), "as far as all seeds have come"
    assert list(line.get_ydata()) == pytest.approx([sum(column) / 3 for column in zip(*values)])
    corners = test.get_paths()[0].vertices
    for epoch, column in zip(range(2, 12), zip(*values)):
        assert {*corners[corners[:, 0] == epoch, 1]} == {min(column), max(column)}
    assert to_hex(test.get_facecolor()[0][:3]) == to_hex(line.get_color())
    assert top1.get_ylim()[1] == pytest.approx(min(1.05 * corners[:, 1].max(), 1.02)), "the band counts"
    assert f"{line.get_ydata()[-1]:.1%}" in texts(top1)


def test_what_is_missing_is_not_drawn(tmp_path):
    rows = history(4, 0.5)
    rows[1]["test_loss"], rows[2]["test_loss"], rows[3]["test_top1"] = "", "nan", "inf"
    for row in rows:
        del row["lr"], row["train_loss"]
    loss, top1, rate = plots.curves([plots.History("it", rows)], tmp_path / "it.png").axes
    assert [list(line.get_xdata()) for line in loss.lines] == [[1, 4]]
    assert [list(line.get_xdata()) for line in top1.lines] == [[1, 2, 3, 4], [1, 2, 3]]
    assert not rate.lines and not any("inf" in text for text in texts(top1))


def test_a_single_epoch_is_a_point(tmp_path):
    loss, top1, _ = plots.curves([plots.History("it", history(1, 0.5), 10)], tmp_path / "it.png").axes
    assert {line.get_marker() for line in top1.lines} == {"o"}


def test_a_picture_of_six_runs_is_legible(tmp_path):
    names = ["res2next29-2c24w4s", "resnext29-2x64d", "simplenet-5m", "wrn-28-4", "wrn-16-2", "simplenet-310k"]
    runs = [plots.History(f"{name}-cifar100-20260101-00000{index}", history(60, 0.99 - 0.001 * index), 100)
            for index, name in enumerate(names)]
    figure = plots.curves(runs, tmp_path / "it.png")
    assert_legible(figure)
    assert len({to_hex(line.get_color()) for line in figure.axes[2].lines}) == 6


def test_runs_beyond_the_palette_have_colours_of_their_own(tmp_path):
    figure = plots.curves([plots.History(f"run {index}", history(3, 0.5)) for index in range(12)], tmp_path / "it.png")
    assert len({to_hex(line.get_color()) for line in figure.axes[2].lines}) == 12
    assert_legible(figure)


@pytest.mark.parametrize("name", ["$a_{b$", "_it", "実験 ✓", "a" * 250, "%d {} \\frac", ""])
def test_any_name(tmp_path, name):
    figure = plots.curves([plots.History(name, history(2, 0.5)), plots.History("other", history(2, 0.5))], tmp_path / "it.png")
    assert name in [text.get_text() for text in figure.legends[0].get_texts()]


def test_spread():
    rng = np.random.default_rng(0)
    assert plots.spread([], 1) == [] and plots.spread([0.0, 5.0, 7.0], 2) == [0, 5, 7]
    assert plots.spread([1.0, 1.0], 1) == [0.5, 1.5]
    for count in range(1, 12):
        positions = np.sort(rng.uniform(0, 5, count))
        spread = np.array(plots.spread(positions, 0.5))
        assert (np.diff(spread) > 0.5 - 1e-12).all()
        within = np.array(plots.spread(positions, 0.4, 0, 5))
        assert (np.diff(within) > 0.4 - 1e-12).all() and within[0] >= 0 and within[-1] <= 5
        for _ in range(200):  # nothing that keeps the distances is nearer
            other = spread + rng.normal(0, 0.2, count)
            if (np.diff(other) >= 0.5).all():
                assert np.square(other - positions).sum() >= np.square(spread - positions).sum()


# ---- the others --------------------------------------------------------------------------------------------------


def test_confusion_and_accuracy_of_classes(tmp_path):
    matrix = np.array([[60, 40, 0], [4, 96, 0], [0, 0, 0]])
    accuracies = np.array([0.25, np.nan, 0.75, 0.5])
    figure = plots.evaluation(matrix, ("a_b", "c", "d"), accuracies, ("one_way", "none", "three", "four"), tmp_path / "it.png")
    left, right = figure.axes
    np.testing.assert_array_equal(left.images[0].get_array(), [[0.6, 0.4, 0], [0.04, 0.96, 0], [0, 0, 0]])
    assert {(text.get_position(), text.get_text()) for text in left.texts} == {((0, 0), "60"), ((1, 0), "40"), ((1, 1), "96")}
    assert [label.get_text() for label in left.get_yticklabels()] == ["a b", "c", "d"]
    assert [bar.get_width() for bar in right.patches] == [0.25, 0.5, 0.75], "sorted, and only classes with images"
    assert [text.get_text() for text in right.texts] == ["one way  25%", "four  50%", "three  75%"]


def test_the_best_and_the_worst_of_many_classes_are_named(tmp_path):
    rng = np.random.default_rng(0)
    groups = tuple(f"{name}_{number}" for name in GROUPS for number in range(4))
    accuracies = rng.permutation(np.linspace(0.3, 0.9, 100))
    figure = plots.evaluation(rng.multinomial(500, [0.05] * 20, 20) + 500 * np.eye(20), groups, accuracies,
                              [f"class_{index}" for index in range(100)], tmp_path / "it.png")
    order = np.argsort(accuracies)
    named = [text.get_text().split("  ")[0] for text in figure.axes[1].texts]
    assert named == [f"class {index}" for index in (*order[:10], *order[-10:])]
    assert_legible(figure)


def test_learning_rate_search(tmp_path):
    rates, losses = list(np.geomspace(1e-5, 1, 100)), list(np.linspace(4, 2, 99)) + [50.0]
    smoothed = [loss + 0.25 for loss in losses[:99]] + [3.0]
    (axes,) = plots.lr_find(rates, losses, smoothed, 0.02, tmp_path / "it.png").axes
    raw, smooth, suggested = axes.lines
    assert list(raw.get_xdata()) == list(smooth.get_xdata()) == rates
    assert list(raw.get_ydata()) == losses and list(smooth.get_ydata()) == smoothed
    assert list(suggested.get_xdata()) == [0.02, 0.02] and "suggested: 0.02" in texts(axes)
    assert axes.get_xscale() == "log" and axes.get_ylim()[0] < 2 < 4 < axes.get_ylim()[1] < 6, "the end is not what is shown"
    assert_legible(axes.figure)
    (axes,) = plots.lr_find(rates[:4], [2.3, 2.5, 2.6, 2.2], [2.3, 2.4, 2.5, 2.4 - 0.15], None, tmp_path / "it.png").axes
    assert axes.get_ylim()[1] > 2.5, "a loss that rises first is seen"
    assert len(plots.lr_find(rates, losses, smoothed, None, tmp_path / "it.png").axes[0].lines) == 2


def test_contact_sheet_shows_each_pixel(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 32, 32), np.uint8)
    titles = ["apple", "aquarium_fish", "x", "a title that is too long for its two lines", "", "$", "last"]
    figure = plots.contact_sheet(images, titles, tmp_path / "it.png", columns=3)
    sheet = np.asarray(Image.open(tmp_path / "it.png").convert("RGB"))
    for index, image in enumerate(images):  # 200 pixels an inch: each of an image is a square of 5
        top, left = 28 + 236 * (index // 3), 28 + 188 * (index % 3)
        shown = sheet[top:top + 160, left:left + 160].reshape(32, 5, 32, 5, 3)
        assert (shown == image.transpose(1, 2, 0)[:, None, :, None]).all()
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "apple", "aquarium fish", "x", "a title that\nis too long …", "", "$", "last"]
    assert_legible(figure)


def test_contact_sheet_of_one_image(tmp_path):
    plots.contact_sheet(np.zeros((1, 3, 8, 16), np.uint8), ["it"], tmp_path / "it.png")
    assert Image.open(tmp_path / "it.png").size == (200 * (0.8 + 2 * 0.14), 200 * (0.4 + 2 * 0.14 + 0.12))


# ---- files -------------------------------------------------------------------------------------------------------


def draw(path):
    return plots.curves([plots.History("it", history(2, 0.5), 10)], path)


@pytest.mark.parametrize("name, start", [("it.png", b"\x89PNG"), ("it.PDF", b"%PDF"), ("it.svg", b"<?xml")])
def test_formats_and_that_equal_pictures_are_equal_files(tmp_path, name, start):
    draw(tmp_path / name)
    first = (tmp_path / name).read_bytes()
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "savefig.dpi": 10, "axes.facecolor": "red"}):
        draw(tmp_path / name)
    assert first.startswith(start) and (tmp_path / name).read_bytes() == first, "whatever the user's settings are"


@pytest.mark.parametrize("name", ["it.jpeg", "it", "it.csv", "png"])
def test_other_formats_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match=f"{name}: a picture is one of .png, .svg, .pdf"):
        draw(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_picture_is_whole_or_not_there(tmp_path):
    (tmp_path / "it.png").mkdir()
    with pytest.raises(CheckpointError, match="it.png cannot be written: "):
        draw(tmp_path / "it.png")
    with pytest.raises(CheckpointError, match="it.png cannot be written: No such file or directory"):
        draw(tmp_path / "nowhere" / "it.png")
    assert [path.name for path in tmp_path.iterdir()] == ["it.png"]


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r'the package matplotlib is needed: `pip install "minidl\[plot\]"`'):
        draw(tmp_path / "it.png")


def test_with_what_cannot_be_imported(tmp_path, monkeypatch):
    """As matplotlib, where the environment names a backend that it does not know."""
    (tmp_path / "picky.py").write_text("raise ValueError('backend: what is that?')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="^the package picky cannot be imported: backend: what is that.$"):
        library("picky", "plot")


def test_without_any_folder_for_what_matplotlib_keeps():
    nowhere = {name: text for name, text in os.environ.items() if name not in ("MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")}
    result = subprocess.run([sys.executable, "-m", "minidl", "plot", "it"], env=nowhere | {"HOME": os.devnull}, text=True,
                            capture_output=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)))
    assert result.returncode == 5
    assert re.fullmatch("error: it/curves.png cannot be drawn: Matplotlib requires access to a writable cache directory.*\n",
                        result.stderr)


def test_it_is_imported_only_where_a_picture_is_drawn():
    code = "import sys, minidl.commands.plot, minidl.commands.predict; print({'matplotlib', 'PIL'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# ---- python -m minidl plot ---------------------------------------------------------------------------------------


def call(*arguments):
    parser = argparse.ArgumentParser()
    plot.add_arguments(parser)
    plot.main(parser.parse_args(list(map(str, arguments))))


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """make_run(name, text of metrics.csv) makes a folder of a run; the current folder is theirs."""
    monkeypatch.chdir(tmp_path)

    def make(name, metrics):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(metrics)
        return tmp_path / name

    return make


HEAD = "epoch,lr,train_loss,train_top1,test_loss,test_top1,test_top5\n"
ROWS = "1,0.1,4.1,0.1,3.9,0.125,0.3\n2,0.05,3.1,0.2,3.5,0.25,0.5\n"


def test_a_run_gets_its_curves_again_and_again(make_run):
    run = make_run("it", HEAD + ROWS)
    for _ in range(2):
        result = subprocess.run([sys.executable, "-m", "minidl", "plot", "it"], capture_output=True, text=True, cwd=run.parent)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == "run  epochs  test top-1\nit        2      25.00%\npicture: it/curves.png\n"
    assert sorted(path.name for path in run.iterdir()) == ["curves.png", "metrics.csv"]


def test_several_runs(make_run, capsys):
    for name in "ab":
        make_run(name, HEAD + ROWS)
    call("a", "b")
    assert capsys.readouterr().out.endswith("picture: curves.png\n")
    call("a", "b", "-o", "it.svg")
    for arguments in (["a", "b"], ["a", "b", "-o", "curves.png"], ["a", "-o", "it.svg"]):
        with pytest.raises(UsageError, match="exists: name another with -o"):
            call(*arguments)


def test_the_last_epoch_counts_and_not_the_best(make_run, capsys):
    make_run("it", HEAD + ROWS + "3,0.01,3.1,0.2,3.5,0.2,0.5\n")
    call("it")
    assert "20.00%" in capsys.readouterr().out


@pytest.mark.parametrize("rest", ["", "3", "3,0.01,3.0,0.2,3.4,0.2", "3,0.01,3.0,0.2,3.4,0.26,0.5"])
def test_a_line_in_the_making_is_not_read(make_run, rest):
    assert [row["epoch"] for row in plot.read(make_run("it", HEAD + ROWS + rest)).history] == ["1", "2"]


@pytest.mark.parametrize("metrics, reason", [
    ("", "no epoch is complete yet"), (HEAD, "no epoch is complete yet"), (HEAD.strip(), "no epoch is complete yet"),
    (HEAD + "1,0.1", "no epoch is complete yet"), (HEAD + "1,0.1\n", "test_top1 is missing in 1,0.1"),
    (HEAD.replace("test_top1", "x") + ROWS, "test_top1 is missing in 1,0.1,"),
    (HEAD.replace("epoch", "x") + ROWS, "epoch is missing in 1,0.1,"),
    (HEAD + ROWS.replace("4.1", "much"), "train_loss is 'much', not a number"),
    (HEAD + ROWS.replace("1,", "inf,", 1), "epoch is 'inf', not a whole number"),
    (HEAD + ROWS.replace("0.3\n", "0.3,7\n"), "not a number"),
    (HEAD + "\0" * 50 + "\n", "is missing in|line contains NUL"), ("\udcff\n" * 3, "codec can't decode")])
def test_what_is_not_the_metrics_of_a_run(make_run, metrics, reason):
    run = make_run("it", "")
    (run / "metrics.csv").write_bytes(metrics.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=f"it/metrics.csv cannot be read: .*({reason})"):
        call("it")
    assert not (run / "curves.png").exists()


def test_what_is_not_a_run(make_run):
    make_run("it", HEAD)
    for path in ("nothing", "it/metrics.csv", ".", "x" * 300):
        with pytest.raises(CheckpointError, match="metrics.csv cannot be read: "):
            call(path)


def test_the_folder_of_several_seeds(make_run, capsys):
    """Also where the last has not come as far."""
    third = "3,0.01,3.1,0.2,3.5,0.75,0.9\n"
    for seed, rows in {7: ROWS + third, 8: ROWS.replace("0.25", "0.35") + third, 10: ROWS.replace("0.25", "0.45")}.items():
        folder = make_run(f"seed-{seed}", HEAD + rows)
    (folder.parent / "seed-11").mkdir()
    call(".")
    assert re.fullmatch(r"run +epochs +test top-1\n.+ 2 +35\.00% \+- 10\.00\npicture: curves.png\n", capsys.readouterr().out)
    (folder / "metrics.csv").write_text(HEAD)
    with pytest.raises(CheckpointError, match="seed-10/metrics.csv cannot be read: no epoch is complete yet"):
        call(".")


def test_the_committed_records_can_be_read():
    runs = [plot.read(folder.parent) for folder in RECORDS.glob("*/metrics.csv")]
    assert len(runs) > 5 and {run.classes for run in runs} == {10, 100}
    assert all(0 < run.means("test_top1")[-1] < 1 for run in runs)
    epochs, layers = plot.inspected(RECORDS / "simplenet-310k-cifar100-inspected-cpu")
    assert epochs == list(range(1, 11)) and all("classifier" in rows for rows in layers)


# ---- layers over epochs ------------------------------------------------------------------------------------------


def statistics(names, epochs):
    """Of each epoch; the last layer has no weight, as a ReLU."""
    return [{name: {"output_zeros": 0.1 * epoch, "gradient_rms": 10.0 ** -number, **({} if name == names[-1] else
                    {"update_ratio": 1e-3 * epoch})} for number, name in enumerate(names)} for epoch in epochs]


@pytest.mark.parametrize("names, epochs", [(["conv", "norm", "relu"], [1, 2, 3]), (["one"], [7]),
                                           ([f"stage3.block{i}.body.conv{i}" for i in range(60)], list(range(1, 51)))])
def test_a_map_shows_each_layer_and_epoch(tmp_path, names, epochs):
    given = statistics(names, epochs)
    figure = plots.layers_over_epochs(epochs, given, tmp_path / "it.png")
    maps = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in maps] == list(plots.MAPS.values())
    for axes, key in zip(maps, plots.MAPS):
        table = np.ma.filled(axes.collections[0].get_array(), np.nan)
        expected = [[rows[name].get(key, np.nan) for rows in given] for name in names]
        np.testing.assert_array_equal(table, expected)
    assert [label.get_text() for label in maps[0].get_yticklabels()] == names
    assert maps[0].get_ylim()[0] > maps[0].get_ylim()[1], "the first layer is on top"
    assert_legible(figure)


def test_zeros_have_no_logarithm(tmp_path):
    """As of a layer that is dead, or a rate of 0."""
    plots.layers_over_epochs([1], [{"a": {"output_zeros": 1.0, "gradient_rms": 0.0, "update_ratio": 0.0}}], tmp_path / "it.png")
    assert (tmp_path / "it.png").stat().st_size > 1000


def test_the_layers_of_a_run(make_run, capsys):
    run = make_run("it", HEAD + ROWS)
    events = [{"event": "start"}, *({"event": "inspect", "epoch": epoch, "layers": layers}
                                    for epoch, layers in zip((1, 2, 1), statistics("abc", (1, 2, 3)))), {"event": "end"}]
    cut_off = '{"event": "inspect", "epoch": 3, "layers": {"a": {}\n'
    (run / "events.jsonl").write_text(cut_off + "".join(json.dumps(event) + "\n" for event in events) + cut_off[:20])
    assert plot.inspected(run) == ([1, 2], statistics("abc", (3, 2)))
    for _ in range(2):
        call("it", "--inspect")
        assert capsys.readouterr().out == "picture: it/layers.png\n"
    make_run("other", HEAD + ROWS)
    with pytest.raises(UsageError, match="--inspect is for one run"):
        call("it", "other", "--inspect")
    with pytest.raises(CheckpointError, match="other/events.jsonl cannot be read: No such file or directory"):
        call("other", "--inspect")
    (run / "events.jsonl").write_text('{"event": "start"}\n')
    with pytest.raises(CheckpointError, match="it/events.jsonl tells of no layers: train with --inspect"):
        call("it", "--inspect")
    (run / "events.jsonl").write_text('{"event": "inspect"}\n')
    with pytest.raises(CheckpointError, match="it/events.jsonl cannot be read: "):
        call("it", "--inspect")
