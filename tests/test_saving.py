"""When checkpoints are written: on a clock of the test's own."""

from types import SimpleNamespace

import pytest

from minidl import checkpoint, saving
from minidl.parallel import ALONE


def saver(monkeypatch, cost=1.0):
    """A Saver whose folder takes `cost` seconds of a clock that stands still otherwise; the clock, and when it saved."""
    clock, saves = [0.0], []

    class Folder:
        troubles = {}

        def save(self, state):
            saves.append(clock[0])
            clock[0] += cost

        def log(self, *_, **__):
            pass

    monkeypatch.setattr(saving.time, "perf_counter", lambda: clock[0])
    run = SimpleNamespace(settings=SimpleNamespace(save_every="10m"), seconds=0.0, team=ALONE, epoch=0, step=0,
                          checkpoint=lambda: SimpleNamespace(state={}, arrays={}))
    return saving.Saver(run, Folder()), clock, saves


def test_ends_of_epochs_are_saved_for_a_hundredth_of_the_time(monkeypatch):
    it, clock, saves = saver(monkeypatch)
    for it.run.epoch in range(1, 10):
        clock[0] += 33.2
        it.after_epoch()
    assert saves == pytest.approx([33.2, 5 * 33.2 + 1, 9 * 33.2 + 2])


def test_ten_minutes_are_the_most_between_two_saves(monkeypatch):
    it, clock, saves = saver(monkeypatch)
    it.run.trainer = SimpleNamespace(read=lambda *_: None)
    for it.run.step in range(1, 8):
        clock[0] += 199
        it.after_step([None] * 9)
    assert saves == [4 * 199], "and the next one ten minutes after the end of that"


def test_a_save_that_failed_is_tried_again(monkeypatch):
    it, _, saves = saver(monkeypatch)
    write = it.folder.save

    def fails_once(state):
        it.folder.troubles = {} if saves else {checkpoint.LAST: "the disk is full"}
        write(state)

    it.folder.save = fails_once
    it.run.epoch = 1
    it.save(), it.save(), it.save()
    assert len(saves) == 2, "a third one would be of the same step"
