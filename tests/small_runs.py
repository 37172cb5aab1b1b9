"""`train.py` in a fraction of a second: the whole command, in a forked process, on few digits and with a network of two layers.

The fork spares the start of Python; everything else is what a user's process does, its end by a signal included.
"""

import csv
import gc
import hashlib
import os
import signal
import sys
import traceback
from argparse import ArgumentParser
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import models
from minidl import command, data, signals
from minidl.commands import train as train_command
from minidl.layers import BatchNorm2d, ChannelDropout, Conv2d, GlobalAvgPool2d, Linear, Sequential
from minidl.run import subset
from minidl.training import Trainer
from minidl.weights import load_all
from models import recipes
from models.architecture import Architecture

STEPS = 5  # of an epoch
ARGUMENTS = ("--device", "cpu", "--dataset", "digits", "--arch", "small", "-b", "8", "--limit-train-batches", str(STEPS),
             "--epochs", "3", "--quiet")
TRAINING_IMAGES, TEST_IMAGES = 48, 19  # the last batch of a test is a ragged one
TIMES = ("images_per_second", "seconds")
CRASHED = 99  # exit code of a process that ended with a traceback


def small(classes=10, *, width=4):
    """The network."""
    return Sequential(conv=Conv2d(3, width, 3, stride=4, padding=1), bn=BatchNorm2d(width, relu=True), drop=ChannelDropout(0.2),
                      mean=GlobalAvgPool2d(), classifier=Linear(width, classes))


@pytest.fixture
def few_digits(monkeypatch):
    """The digits are few, and pass for CIFAR too; the network is known by its name, and one of the same shapes by another."""
    sets = [subset(dataset, np.arange(count))
            for dataset, count in zip(data.load("digits"), (TRAINING_IMAGES, TEST_IMAGES), strict=True)]

    def load(name, folder=None):
        classes = tuple(map(str, range(100 if name == "cifar100" else 10)))
        return tuple(replace(dataset, name=name, classes=classes) for dataset in sets)

    monkeypatch.setattr(data, "load", load)
    for name, settings in (("small", {}), ("small-twin", {}), ("small-wide", {"width": 6})):
        monkeypatch.setitem(models.REGISTRY, name, Architecture(small, settings, "-", "-"))
    monkeypatch.setitem(recipes.FAMILIES, small, "report-resnext")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # drawing would take longer than training
    small().initialize()  # asks the compiler for its version, which all forks then know


def forked(folder, work):
    """Call work() in a copy of this process, whose folder is `folder`, as `python` runs a command -> its end."""
    streams = [folder / name for name in (".stdout", ".stderr")]
    process = os.fork()
    if process == 0:
        code = CRASHED
        gc.freeze()  # what belongs to the parent, perhaps on a GPU, is not cleared away here
        try:
            os.chdir(folder)
            for number in signals.NUMBERS:
                signal.signal(number, signal.SIG_DFL)
            sys.stdout, sys.stderr = (path.open("w", encoding="utf-8") for path in streams)
            code = command.run(work)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
    _, status = os.waitpid(process, 0)
    stdout, stderr = (path.read_text(encoding="utf-8") for path in streams)
    return SimpleNamespace(returncode=os.waitstatus_to_exitcode(status), stdout=stdout, stderr=stderr)


def main(*arguments):
    """What `train.py *arguments` does."""
    parser = ArgumentParser()
    train_command.add_arguments(parser)
    return train_command.main(parser.parse_args([str(argument) for argument in arguments]))


def train(folder, *arguments, before=lambda: None):
    """Run `train.py *arguments` in `folder`, before which its process calls before() -> its end."""
    def work():
        before()
        return main(*arguments)

    return forked(folder, work)


def at_step(number, call):
    """What to call in a process so that it calls `call(trainer)` after the step `number` of the run, counted from 1."""
    def patch():
        step = Trainer.step

        def observed(self, batch):
            step(self, batch)
            if int(self.network.step[0]) == number:
                call(self)

        Trainer.step = observed

    return patch


def send(number):
    """What sends the signal `number` to the process that calls it."""
    return lambda *_: os.kill(os.getpid(), number)


def rows(folder):
    """metrics.csv, but for times."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: text for name, text in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def digests(path):
    """{name: a hash of the array} of a file."""
    state, _ = load_all(path)
    return {name: (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).hexdigest()) for name, array in state.items()}
