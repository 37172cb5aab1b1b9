"""Runs that fail: numbers that are not finite, float16 beyond its range, memory that does not suffice. What is left then."""

import contextlib
import gc
import json
import re
import resource
import signal
import sys
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

import models
from conftest import CUPY
from minidl import blas, checkpoint, command, data, device, memory, random_keys, weights
from minidl.data.batches import Batches
from minidl.errors import DeviceError
from minidl.layers import Conv2d, GlobalAvgPool2d, Linear
from minidl.memory import ample_memory
from minidl.ops import optimizer as optimizer_op
from minidl.run import Run
from minidl.settings import resolve
from models import recipes
from small_runs import (ARGUMENTS, STEPS, TRAINING_IMAGES, at_step, digests, few_digits, main, rows, send, small,  # noqa: F401
                        train)
from test_train import assert_refused, python

TESTS = Path(__file__).parent
LONG = ("-b", "1", "--limit-train-batches", "48")  # an epoch is one window between two looks at the loss


def assert_finite(path):
    state, _ = weights.load_all(path)
    assert all(np.isfinite(array).all() for name, array in state.items() if name != "training/state"), path


def assert_diverged(folder, result, message):
    """Exit 6 with one line, in events.jsonl too; what is left is finite."""
    assert_refused(result, 6)
    assert result.stderr == f"error: {message}\n"
    last = json.loads((folder / "events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["message"]) == ("error", message)
    for path in folder.glob("*.npz"):
        assert_finite(path)
    assert not list(folder.glob(".*"))


# ---- numbers that are not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_learning_rate_that_is_much_too_high(few_digits, tmp_path, precision):
    if precision == "bf16":
        pytest.importorskip("ml_dtypes")
    result = train(tmp_path, *ARGUMENTS, "--lr", "9e18", "--precision", precision, "--val-split", 8, "--ema", "0.5", "-o", "it")
    said = re.fullmatch(r"error: (step [2-5]: layer \S+, its output is not finite: try a lower --lr)\n", result.stderr)
    assert_diverged(tmp_path / "it", result, said and said[1])


def set_weight(layer, name, value):
    """What puts a value into a parameter of a layer."""
    def plant(trainer):
        getattr(getattr(trainer.network, layer), name).master.reshape(-1)[:1] = value
        trainer.network.parameters.cast()

    return plant


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("step", [2, 20, 48, 70, 96])
def test_a_weight_that_is_no_number(few_digits, tmp_path, step, value):
    """At the begin, in the middle and at the end of an epoch of 48 steps, which is one window; before and after a save."""
    result = train(tmp_path, *ARGUMENTS, *LONG, "--save-every", 1000, "-o", "it",
                   before=at_step(step - 1, set_weight("conv", "weight", value)))
    assert_diverged(tmp_path / "it", result, f"step {step}: layer conv, its output is not finite: try a lower --lr")
    saved = tmp_path / "it" / "last.npz"
    assert saved.exists() == (step > 48) and (step <= 48 or checkpoint.load(saved)[0].progress["epoch"] == 1)


@pytest.mark.parametrize("layer, name, precision", [
    ("bn", "weight", "fp32"), ("bn", "bias", "bf16"), ("classifier", "bias", "fp32"), ("classifier", "weight", "tf32")])
def test_the_layer_is_named(few_digits, tmp_path, layer, name, precision):
    if precision == "bf16":
        pytest.importorskip("ml_dtypes")
    result = train(tmp_path, *ARGUMENTS, "--precision", precision, "-o", "it",
                   before=at_step(2, set_weight(layer, name, np.inf)))
    assert_diverged(tmp_path / "it", result, f"step 3: layer {layer}, its output is not finite: try a lower --lr")


def spoil_backward(kind, layer, tensor, step, times=2):
    """What makes a tensor of a layer's backward Inf in one step of the run, whenever it is repeated, or so many times."""
    def patch():
        backward, done = kind.backward, []

        def spoiled(self, dy, *args, **out):
            dx = backward(self, dy, *args, **out)
            if self is getattr(spoiled.network, layer) and spoiled.network.step[0] == step - 1 and len(done) < times:
                done.append(step)
                (dx if tensor == "input" else getattr(self, tensor).grad)[...] = np.inf
            return dx

        initialize = Run.__init__

        def remember(self, settings, network, *more):
            spoiled.network = network
            initialize(self, settings, network, *more)

        kind.backward, Run.__init__ = spoiled, remember

    return patch


@pytest.mark.parametrize("kind, layer, tensor, step", [
    (Linear, "classifier", "weight", 1), (Linear, "classifier", "bias", 2), (Linear, "classifier", "input", STEPS),
    (GlobalAvgPool2d, "mean", "input", STEPS + 1), (Conv2d, "conv", "weight", 7), (Conv2d, "conv", "bias", 2 * STEPS)])
def test_a_gradient_that_is_no_number(few_digits, tmp_path, kind, layer, tensor, step):
    result = train(tmp_path, *ARGUMENTS, "--val-split", 8, "-o", "it", before=spoil_backward(kind, layer, tensor, step))
    what = f"layer {layer}, the gradient of its {tensor}"
    assert_diverged(tmp_path / "it", result, f"step {step}: {what} is not finite: try a lower --lr")
    assert (tmp_path / "it" / "best.npz").exists() == (tmp_path / "it" / "last.npz").exists() == (step > STEPS)


def test_a_gradient_that_is_no_number_once(few_digits, tmp_path):
    """It is not the learning rate: the step gives another result when it is repeated."""
    result = train(tmp_path, *ARGUMENTS, "-o", "it", before=spoil_backward(Conv2d, "conv", "weight", 8, times=1))
    assert_diverged(tmp_path / "it", result,
                    "step 8: a gradient was not finite, but all are where the step is repeated: is the hardware sound?")


def test_an_image_that_is_no_number(few_digits, tmp_path):
    """The step is that in which it comes up, and is repeated with its own batch."""
    def patch():
        load = Batches.load

        def spoiled(self, indices, *more):
            x, labels = load(self, indices, *more)
            if self.size == TRAINING_IMAGES and image in indices:
                x[...] = np.inf
            return x, labels

        Batches.load = spoiled

    image = random_keys.generator(0, random_keys.SHUFFLE, 0).permutation(TRAINING_IMAGES)[8 + 3]  # in the second batch
    result = train(tmp_path, *ARGUMENTS, "-o", "it", before=patch)
    assert_diverged(tmp_path / "it", result, "step 2: layer conv, its output is not finite: try a lower --lr")


def test_a_loss_that_is_no_number_though_its_gradient_is_one(few_digits, tmp_path):
    """Logits whose difference float32 does not hold."""
    def plant(trainer):
        trainer.network.classifier.bias.master[:] = [3e38, -3e38] * 5

    result = train(tmp_path, *ARGUMENTS, "--lr", "0", "-o", "it", before=at_step(7, plant))
    assert_diverged(tmp_path / "it", result, "the loss became inf by step 5 of this epoch: try a lower --lr")


def test_the_last_step_of_an_epoch_can_spoil_the_weights(few_digits, tmp_path):
    """No step comes after it in which that would show, but the evaluation, and the best weights would be saved."""
    result = train(tmp_path, *ARGUMENTS, "--val-split", 8, "-o", "it",
                   before=at_step(STEPS, set_weight("bn", "weight", np.nan)))
    assert_diverged(tmp_path / "it", result, "after 1 epoch and 0 steps bn.weight is not finite: try a lower --lr")
    assert not list((tmp_path / "it").glob("*.npz"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_does_not_hide_it(few_digits, tmp_path, number):
    def patch():
        at_step(STEPS + 1, set_weight("conv", "weight", np.nan))()
        at_step(STEPS + 3, send(number))()

    result = train(tmp_path, *ARGUMENTS, "-o", "it", before=patch)
    assert_diverged(tmp_path / "it", result, f"step {STEPS + 2}: layer conv, its output is not finite: try a lower --lr")
    assert checkpoint.load(tmp_path / "it")[0].progress["epoch"] == 1


def test_what_is_left_can_be_gone_on_from(few_digits, tmp_path):
    arguments = *ARGUMENTS, "--save-every", 2, "--ema", "0.9"
    assert train(tmp_path, *arguments, "-o", "whole").returncode == 0
    result = train(tmp_path, *arguments, "-o", "it", before=spoil_backward(Conv2d, "conv", "weight", STEPS + 4))
    assert_diverged(tmp_path / "it", result, f"step {STEPS + 4}: layer conv, the gradient of its weight is not finite: "
                                             "try a lower --lr")
    assert checkpoint.load(tmp_path / "it")[0].progress["step"] == 2
    assert train(tmp_path, "--resume", "it").returncode == 0
    assert digests(tmp_path / "it" / "last.npz") == digests(tmp_path / "whole" / "last.npz")


# ---- float16 -----------------------------------------------------------------------------------------------------


def set_scale(value):
    return lambda trainer: trainer.optimizer.state.__setitem__(optimizer_op.SCALE, value)


def state(folder):
    return checkpoint.load(folder)[0].arrays["state"]


def test_float16_skips_steps_until_the_scale_is_low_enough(few_digits, tmp_path):
    """And what was stopped meanwhile goes on with the scale that it had."""
    arguments = *ARGUMENTS, "--precision", "fp16", "--ema", "0.9", "--save-every", "1"
    too_large = set_scale(2.0**28)  # four steps overflow, or some more
    assert train(tmp_path, *arguments, "-o", "whole", before=at_step(3, too_large)).returncode == 0

    def patch():
        at_step(3, too_large)()
        at_step(STEPS + 1, send(signal.SIGKILL))()

    assert train(tmp_path, *arguments, "-o", "it", before=patch).returncode == -signal.SIGKILL
    at_kill, at_end = state(tmp_path / "it"), state(tmp_path / "whole")
    assert at_kill[optimizer_op.SKIPPED_IN_ROW] == 2 and at_kill[optimizer_op.SCALE] == 2.0**26
    skipped = at_end[optimizer_op.CALLS] - at_end[optimizer_op.STEP]
    assert 4 <= skipped <= 10 and at_end[optimizer_op.SCALE] == 2.0**28 / 2**skipped
    assert at_end[optimizer_op.SKIPPED_IN_ROW] == 0
    assert train(tmp_path, "--resume", "it").returncode == 0
    assert digests(tmp_path / "it" / "last.npz") == digests(tmp_path / "whole" / "last.npz")
    assert rows(tmp_path / "it") == rows(tmp_path / "whole")


def test_float16_gives_up_after_twenty_steps(few_digits, tmp_path):
    result = train(tmp_path, *ARGUMENTS, "--epochs", "9", "--precision", "fp16", "--save-every", "100", "-o", "it",
                   before=at_step(STEPS, set_scale(2.0**120)))
    assert_diverged(tmp_path / "it", result, "20 steps in a row had gradients beyond float16: try --precision bf16")
    assert len(rows(tmp_path / "it")) == 4, "nineteen are not enough"
    assert state(tmp_path / "it")[optimizer_op.SCALE] == 2.0**105


# ---- memory ------------------------------------------------------------------------------------------------------


def run_of(arch, batch_size, place=None, network=None, **more):
    """A run on all digits, by default on the CPU and with the network of that name."""
    given = {"arch": arch, "dataset": "digits", "batch_size": batch_size, **more}
    settings = resolve(given, recipes.recipe("fast", arch, "digits"))
    return Run(settings, network or models.create(arch, 10), *data.load("digits"), place or device.select("cpu"))


def steps(run, count, first=0):
    batches = run.batches(0)
    run.network.train()
    for number in range(first, first + count):
        run.trainer.step(batches[number % len(batches)])


@pytest.mark.parametrize("arch, batch_size, more", [
    ("wrn-10-1", 64, {}), ("simplenet-310k", 16, {"ema": 0.9}), ("report-resnext3", 64, {"optimizer": "adam"}),
    ("res2next29-1c8w4s", 4, {}), ("wrn-10-1", 128, {"precision": "bf16"})])
def test_the_need_is_near_what_is_measured(monkeypatch, arch, batch_size, more):
    if more.get("precision") == "bf16":
        pytest.importorskip("ml_dtypes")
    monkeypatch.setattr(device, "_host_pool", device.HostPool())
    run = run_of(arch, batch_size, **more)
    steps(run, 2)
    measured = device._host_pool._peak_bytes + memory._kept_bytes(run)
    assert 1 / 1.3 < memory.needed_bytes(run, batch_size) / measured < 1.3


@pytest.mark.skipif(not CUPY, reason="needs a GPU")
@pytest.mark.parametrize("arch, batch_size, more", [
    ("wrn-16-1", 128, {}), ("simplenet-310k", 64, {"ema": 0.9}), ("wrn-16-4", 32, {"precision": "bf16"})])
def test_the_need_is_near_what_is_measured_on_a_gpu(arch, batch_size, more):
    place = device.select("cuda")
    steps(run_of("wrn-10-1", 8, place), 1)  # takes the workspace of cuBLAS
    gc.collect()
    pool = place.xp.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    run = run_of(arch, batch_size, place, **more)
    steps(run, 3)
    run.test()
    measured = pool.total_bytes() - before + blas.WORKSPACE_BYTES
    assert 1 / 1.3 < memory.needed_bytes(run, batch_size) / measured < 1.3


def limit_memory(megabytes):
    """Keep this process from taking more address space than this, beyond what it has for code, threads and BLAS."""
    steps(run_of("wrn-10-1", 8), 2)
    tqdm(disable=True)  # has a thread, too
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken - device.pooled_bytes() + megabytes * 10**6,) * 2)


def in_a_new_process(folder, call, *arguments):
    """Run call(*arguments), a function of this module: a process that has run other tests has memory that they gave back."""
    code = (f"import sys; sys.path.insert(0, {str(TESTS)!r}); sys.modules['matplotlib'] = None\n"  # it would take memory, too
            f"import test_failures; sys.exit(test_failures.{call.__name__}(*sys.argv[1:]))")
    return python(folder, "-c", code, *map(str, arguments))


def train_within(megabytes, *arguments):
    def work():
        limit_memory(int(megabytes))
        return main(*arguments)

    return command.run(work)


def take_what_the_pool_keeps():
    pool = device.HostPool()
    pool.empty((80_000_000,), np.dtype(np.uint8))  # and gone
    limit_memory(20)
    assert pool.empty((30_000_000,), np.dtype(np.uint8)).size == 30_000_000  # of which the block of 80 MB is no good half


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_what_the_pool_keeps_for_later_is_given_back_when_there_is_no_other(tmp_path):
    result = in_a_new_process(tmp_path, take_what_the_pool_keeps)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_a_batch_that_does_not_fit(tmp_path, monkeypatch):
    """The error says what would, and that runs under the same limit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # each thread needs memory of its own

    def attempt(batch_size):
        return in_a_new_process(tmp_path, train_within, 90, *ARGUMENTS, "--arch", "wrn-10-1", "-b", batch_size,
                                "--limit-train-batches", "2", "--epochs", "1")

    result = attempt(256)
    assert_refused(result, 4)
    said = re.fullmatch(r"error: not enough memory in layer (\S+): batches of 256 need about (\d+) MB, and there are (\d+) MB; "
                        r"a batch size of (\d+) would fit\n", result.stderr)
    assert said, result.stderr
    layer, need, limit, fitting = said[1], *map(int, said.groups()[1:])
    assert layer in dict(models.create("wrn-10-1", 10).named_layers())
    assert 100 < need < 150 and 70 < limit < need and fitting in (64, 128)
    assert attempt(fitting).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_a_network_that_does_not_fit(tmp_path):
    result = in_a_new_process(tmp_path, train_within, 60, *ARGUMENTS, "--arch", "wrn-10-16", "-b", "2")
    assert_refused(result, 4, "not enough memory")


def test_the_error_keeps_nothing_alive():
    """Whoever catches it may try a smaller batch."""
    run = run_of("wrn-10-1", 8)
    of_run = weakref.ref(run)
    with contextlib.suppress(DeviceError), ample_memory(run):
        raise MemoryError
    del run
    gc.collect()
    assert of_run() is None


@pytest.mark.skipif(not CUPY, reason="needs a GPU")
def test_a_batch_that_does_not_fit_on_a_gpu():
    """The process can go on, with the batch size that was named."""
    place = device.select("cuda")
    pool = place.xp.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.get_limit()
    pool.set_limit(size=pool.total_bytes() + (200 << 20))
    try:
        try:
            run = run_of("simplenet-310k", 256, place)
            with ample_memory(run):
                steps(run, 2)
            pytest.fail("there was enough memory")
        except DeviceError as error:  # which holds the arrays of the step
            assert error.exit_code == 4
            fitting = int(re.fullmatch(r"not enough memory in layer \S+: batches of 256 need about \S+ MB, and there are \S+ MB; "
                                       r"a batch size of (\d+) would fit", str(error))[1])
        del run
        gc.collect()
        assert fitting >= 32
        steps(run_of("simplenet-310k", fitting, place), 2)
    finally:
        pool.set_limit(size=before)


def peak_bytes(place, start, monkeypatch):
    """Memory at the peak of start(), which gives a run, and its first steps."""
    gc.collect()
    if place.name != "cpu":
        pool = place.xp.get_default_memory_pool()
        pool.free_all_blocks()
        steps(start(), 3)
        return pool.total_bytes()
    monkeypatch.setattr(device, "_host_pool", device.HostPool())
    tracemalloc.start()
    try:
        steps(start(), 3)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_resumed_run_takes_no_more_memory(place, tmp_path, monkeypatch):
    def fresh():
        return run_of("wrn-10-4", 32, place, ema=0.9)  # a second copy of its checkpoint would be 12 % more

    def resumed():
        run = fresh()
        run.load(checkpoint.load(tmp_path)[0])
        return run

    first = fresh()
    steps(first, 1)
    checkpoint.save(tmp_path, first.checkpoint())
    del first
    # How many threads' buffers are alive at one time is up to the machine: the least of three.
    least = {start: min(peak_bytes(place, start, monkeypatch) for _ in range(3)) for start in (resumed, fresh)}
    assert least[resumed] <= 1.05 * least[fresh]


def test_many_steps_take_no_more_memory_than_few(place, monkeypatch):
    monkeypatch.setattr(device, "_host_pool", device.HostPool())
    held = device.pooled_bytes if place.name == "cpu" else place.xp.get_default_memory_pool().total_bytes
    tracemalloc.start()
    try:
        run = run_of("report-resnext3", 128, place, small(), cutout=4, ema=0.9, clip_norm=1.0)
        taken = []
        for count in (20, 200, 200, 200):
            steps(run, count)
            gc.collect()
            taken.append((held(), tracemalloc.get_traced_memory()[0]))
    finally:
        tracemalloc.stop()
    pooled, traced = zip(*taken)
    assert len(set(pooled)) == 1 and pooled[0] > 1_000_000
    # What grows, grows in each part. Once in a while Python takes a larger table for its own strings.
    assert min(after - before for before, after in zip(traced, traced[1:])) < 10_000, "of all that Python and NumPy took"
