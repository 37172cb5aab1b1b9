"""What a run shows: a table of 80 columns, and a bar that never takes more than a line."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from minidl import wording
from minidl.progress import Progress
from minidl.wording import brief, loss_text, percent, rate_text
from minidl.training import Metrics

USUAL = dict(epoch="7", lr="0.0325", train_loss="4.10512", train_top1="0.05120", val_loss="3.9", val_top1="0.06600",
             test_loss="3.85549", test_top1="0.10423", test_top5="0.32110", images_per_second="12345.6", seconds="125.2")
WIDEST = dict(epoch="1000", lr="0.000123456", train_loss="1234.567", train_top1="1.00000", val_loss="1234.567",
              val_top1="1.00000", test_loss="99999.5", test_top1="1.00000", test_top5="1.00000", images_per_second="1234567.8",
              seconds="359999")
NARROWEST = dict(epoch="1", lr="0", train_loss="0.00000", train_top1="0.00000", val_loss="0.00000", val_top1="0.00000",
                 test_loss="nan", test_top1="0.00000", test_top5="0.00000", images_per_second="0.4", seconds="0.04")


def lines(capsys, epochs, validates, *rows):
    progress = Progress(epochs, validates)
    for row in rows:
        progress.row(row if validates else {name: text for name, text in row.items() if not name.startswith("val")})
    return capsys.readouterr().out.split("\n")[:-1]


# ---- the table


def test_table(capsys):
    assert lines(capsys, 50, False, USUAL, USUAL) == [
        "                train           test",
        "epoch      lr    loss  top-1    loss  top-1  top-5      img/s   time",
        " 7/50  0.0325   4.105   5.12   3.855  10.42  32.11     12,346  2m05s",
        " 7/50  0.0325   4.105   5.12   3.855  10.42  32.11     12,346  2m05s"]


def test_table_with_validation_and_the_widest_numbers(capsys):
    shown = lines(capsys, 1000, True, USUAL, WIDEST)
    assert shown == [
        "                    train            val    test",
        "    epoch      lr    loss  top-1   top-1    loss  top-1  top-5      img/s   time",
        "   7/1000  0.0325   4.105   5.12    6.60   3.855  10.42  32.11     12,346  2m05s",
        "1000/1000 1.23e-4    1235 100.00  100.00  100000 100.00 100.00  1,234,568 99h59m"]
    assert max(map(len, shown)) == 80


@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize("epochs", [1, 9, 10, 999, 1000])
def test_columns_stay_in_line_and_within_80(capsys, epochs, validates):
    values = [dict(USUAL, lr=lr, train_loss=value, test_loss=value, seconds=time)
              for lr, value, time in (("1e-05", "1234.567", "0.1"), ("0.00125", "0.00001", "59.7"),
                                      ("6.49213e-10", "1e6", "3599.9"), ("1", "98.9999", "356400"))]
    shown = lines(capsys, epochs, validates, NARROWEST, *values, WIDEST if epochs == 1000 else dict(WIDEST, epoch=str(epochs)))
    assert max(map(len, shown)) <= 80
    head, *rows = shown[1:]
    assert {len(row) for row in rows} == {len(head)}
    columns = 10 if validates else 9
    ends = [match.end() for match in re.finditer(r"\S+", head)]
    assert len(ends) == columns
    for row in rows:
        assert [match.end() for match in re.finditer(r"\S+", row)] == ends, "each cell ends where its heading ends"


def test_quiet_says_nothing(capsys):
    progress = Progress(3, False, quiet=True)
    progress.row(USUAL)
    with progress.bar(0, 5, 0) as show:
        for _ in range(5):
            show(Metrics(1, 0, 0))
    assert capsys.readouterr() == ("", "")


needs_a_full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")


@needs_a_full_disk
def test_a_log_on_a_full_disk_does_not_end_the_run(monkeypatch, capsys):
    progress = Progress(3, False)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        for _ in range(2):
            progress.row(USUAL)
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # for what is left in its buffer
    assert capsys.readouterr().err == ("warning: the output cannot be written: No space left on device; the run goes on "
                                       "without\n")


@needs_a_full_disk
def test_where_the_log_of_warnings_is_full_too(monkeypatch):
    progress = Progress(3, False)
    with open("/dev/full", "w") as full:
        for stream in ("stdout", "stderr"):
            monkeypatch.setattr(sys, stream, full)
        progress.row(USUAL)
        wording.warn("it goes on")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert progress.quiet


# ---- numbers


@pytest.mark.parametrize("lr, text", [
    (0.1, "0.1"), (0.0125, "0.0125"), (0.00125, "0.00125"), (0.000125, "1.25e-4"), (1e-5, "1e-5"), (0.0001, "0.0001"),
    (1.5082e-06, "1.51e-6"), (6.49e-10, "6.5e-10"), (0, "0"), (12.3456, "12.3"), (1e18, "1e+18"), (0.0325, "0.0325")])
def test_rate(lr, text):
    assert rate_text(lr) == text and len(text) <= 7


@pytest.mark.parametrize("value, text", [
    (4.60517, "4.605"), (0.00004, "0.000"), (98.9999, "99.000"), (99.4, "99"), (1234.567, "1235"), (999_998.4, "999998"),
    (999_999.9, "1e+06"), (2.34e30, "2e+30"), (float("nan"), "nan"), (float("inf"), "inf")])
def test_loss(value, text):
    assert loss_text(value) == text and len(text) <= 6


@pytest.mark.parametrize("seconds, text", [
    (0, "0.0s"), (0.44, "0.4s"), (9.94, "9.9s"), (9.96, "10s"), (59.4, "59s"), (59.6, "1m00s"), (60, "1m00s"), (245, "4m05s"),
    (3599.4, "59m59s"), (3599.6, "1h00m"), (3720, "1h02m"), (359_999, "99h59m"), (86_400 * 10, "240h00m")])
def test_brief(seconds, text):
    assert brief(seconds) == text


def test_percent():
    assert (percent("0.4512"), percent(1), percent(0.00004)) == ("45.12%", "100.00%", "0.00%")


# ---- the bar


@pytest.fixture
def terminal(monkeypatch):
    """terminal(columns) makes stderr one of that width; returns what to call at the end for all that was shown."""
    def open_terminal(columns):
        ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        monkeypatch.setattr(sys, "stderr", os.fdopen(its, "w", encoding="utf-8"))
        parts = []

        def read():
            try:
                while part := os.read(ours, 4096):
                    parts.append(part)
            except OSError:  # how Linux reports that the other side is closed
                pass

        reader = threading.Thread(target=read)
        reader.start()

        def close():
            sys.stderr.close()
            reader.join()
            os.close(ours)
            return b"".join(parts).decode()

        return close

    return open_terminal


@pytest.mark.parametrize("columns, epochs, steps, metrics, shows", [
    (80, 50, 390, Metrics(4.605, 0.0123, 0.05), ["epoch 50/50: ", " 303/390 ", "loss=4.605, top1=1.2%]"]),
    (120, 1000, 123_456, Metrics(1234.567, 1, 1), ["epoch 1000/1000: ", " 303/123456 ", "loss=1235, top1=100.0%]"]),
    (80, 1000, 123_456, Metrics(1234.567, 1, 1), ["epoch 1000/1000: "]),
    (20, 50, 390, Metrics(4.605, 0.0123, 0.05), ["epoch 50/"])])
def test_the_bar_takes_one_line(terminal, capsys, columns, epochs, steps, metrics, shows):
    close = terminal(columns)
    with Progress(epochs, True).bar(epochs - 1, steps, done=2) as show:
        show(None)
        for _ in range(300):
            show(metrics)
            time.sleep(0.001)
    shown = close()
    frames = shown.split("\r")
    assert "\n" not in shown and max(map(len, frames)) <= columns, "it does not wrap"
    assert any(all(text in frame for text in shows) for frame in frames)
    assert frames[-1] == "" and frames[-2].strip() == "", "it is gone at the end"
    assert capsys.readouterr() == ("", "")


def test_no_bar_without_a_terminal(capsys):
    with Progress(3, False).bar(0, 5, 0) as show:
        for _ in range(5):
            show(Metrics(1, 0, 0))
    assert capsys.readouterr() == ("", "")
