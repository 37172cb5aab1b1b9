"""Steps that are recorded and replayed: the same training bit for bit, on a stand-in for CuPy and wherever there is a GPU."""

import contextlib
import gc

import numpy as np
import pytest

import stand_in_gpu
from conftest import CUPY
from minidl import device, inspection
from minidl.errors import DivergedError
from minidl.layer import Layer
from minidl.layers import Sequential
from minidl.ops import optimizer as optimizer_op
from minidl.parallel import Team
from minidl.step_graph import StepGraph
from minidl.training import Trainer
from small_runs import small
from test_failures import run_of

STEPS = 6  # of an epoch


@pytest.fixture(params=["stand-in", *(["cuda"] if CUPY else [])])
def gpu(request, monkeypatch):
    """A Device."""
    return device.select("cuda") if request.param == "cuda" else stand_in_gpu.install(monkeypatch)


def new_run(place, network=None, arch="wrn-10-1", batch_size=8, **more):
    run = run_of(arch, batch_size, place, network, **{"epochs": 3, "limit_train_batches": STEPS, **more})
    run.evaluation_limit = 2
    return run


def train(run, epochs=2, first=0, before_step=lambda done: None):
    """Epochs, each followed by an evaluation -> their Metrics."""
    metrics = []
    while run.epoch < epochs:
        run.begin_epoch()
        metrics.append(run.trainer.epoch(run.batches(run.epoch), lambda done, _: before_step(done + 1), first=first))
        metrics.append(run.test())
        run.epoch, first = run.epoch + 1, 0
    return metrics


def everything(run):
    """{name: array}, all that training has changed."""
    saved = run.checkpoint()
    return {**saved.state, **saved.arrays, "gradient": run.place.to_host(run.network.parameters.grad)}


def differing(run, other):
    ours, theirs = everything(run), everything(other)
    assert ours.keys() == theirs.keys()
    return [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]


def replayed(run):
    """Whether steps of the run are being replayed."""
    return [graph._graph is not None for graph in run.trainer._graphs.values()] == [True]


def without_graphs(monkeypatch):
    """From now on each kernel is launched by itself."""
    monkeypatch.setattr(StepGraph, "run", lambda self, step: step())


# ---- the same training -------------------------------------------------------------------------------------------

ALL = dict(ema=0.9, clip_norm=0.5, mixup=0.2, cutout=5, padding=2, flip=True, label_smoothing=0.1)


@pytest.mark.parametrize("settings", [
    dict(ALL, optimizer="sgd", sched="onecycle"), dict(ALL, optimizer="adam", precision="bf16"),
    dict(optimizer="adamw", sched="cosine", warmup_epochs=1, val_split=40), dict(optimizer="adadelta", reflect=True, padding=3),
    dict(optimizer="sgd", sched="multistep", milestones=[1], restart_at_milestones=True)], ids=lambda it: it["optimizer"])
def test_replayed_training_is_that_of_single_launches(gpu, monkeypatch, capsys, settings):
    """With evaluations in between, which change the weights for a while where there is an average of them."""
    if settings.get("precision") == "bf16":
        pytest.importorskip("ml_dtypes")
    run = new_run(gpu, small(), **settings)
    metrics = train(run)
    assert replayed(run) and capsys.readouterr().err == ""
    without_graphs(monkeypatch)
    other = new_run(gpu, small(), **settings)
    assert train(other) == metrics and not differing(run, other)


@pytest.mark.parametrize("arch", ["simplenet-310k", "wrn-10-1", "res2next29-1c4w4s", "report-resnext3"])
@pytest.mark.parametrize("precision", ["fp32", *(["tf32", "bf16", "fp16"] if CUPY else [])])
def test_networks(gpu, monkeypatch, capsys, arch, precision):
    batch_size = 12 if precision == "fp32" else 16  # of which tensor cores take multiples of 8 alone
    given = dict(arch=arch, batch_size=batch_size, limit_train_batches=3, precision=precision)
    run, other = new_run(gpu, **given), new_run(gpu, **given)
    metrics = train(run, 1)
    assert replayed(run) and capsys.readouterr().err == ""
    without_graphs(monkeypatch)
    assert train(other, 1) == metrics and not differing(run, other)


def test_a_step_of_float16_that_is_skipped(gpu, monkeypatch):
    def trained():
        run = new_run(gpu, small(), precision="fp16", ema=0.9)
        run.trainer.optimizer.state[optimizer_op.SCALE] = 2.0**29
        return run, train(run)

    run, metrics = trained()
    state = gpu.to_host(run.trainer.optimizer.state)
    assert replayed(run) and 2 < state[optimizer_op.CALLS] - state[optimizer_op.STEP] < 2 * STEPS
    without_graphs(monkeypatch)
    other, expected = trained()
    assert metrics == expected and not differing(run, other)


def test_a_run_goes_on_from_the_middle_of_an_epoch(gpu):
    """Its first step is not replayed, where that of the whole run is."""
    whole = new_run(gpu, small(), **ALL)
    train(whole)
    one, other = new_run(gpu, small(), **ALL), new_run(gpu, small(), **ALL)
    one.trainer.epoch(one.batches(0)[:4])
    other.load(one.checkpoint())
    train(other, first=4)
    assert replayed(other) and not differing(whole, other)


def test_a_run_goes_back_while_it_is_replayed(gpu):
    """As a time budget and the search for a learning rate do."""
    run, other = new_run(gpu, small(), **ALL), new_run(gpu, small(), **ALL)
    with run.rehearsal():
        train(run)
    assert train(run) == train(other) and replayed(run) and not differing(run, other)


def test_steps_with_and_without_mixup(gpu, monkeypatch):
    def trained():
        run = new_run(gpu, small(), **ALL)
        batches = run.batches(0)
        run.network.train()
        for number in range(8):
            batch = batches[number % STEPS]
            run.trainer.step(batch if number % 2 else type(batch)(batch.indices, batch.lr))
        return run

    run = trained()
    assert {mixed: graph._graph is not None for mixed, graph in run.trainer._graphs.items()} == {False: True, True: True}
    without_graphs(monkeypatch)
    assert not differing(run, trained())


def test_a_record_takes_the_memory_that_single_launches_gave_back(gpu):
    run = new_run(gpu, batch_size=16)
    run.network.train()
    pool, batch, held = gpu.xp.get_default_memory_pool(), run.batches(0)[0], []
    gc.collect()
    pool.free_all_blocks()  # of other tests
    before = pool.total_bytes()
    for _ in range(4):
        run.trainer.step(batch)
        held.append(pool.total_bytes() - before)
    assert replayed(run) and held[1] == held[2] == held[3] <= 1.3 * held[0]


def test_evaluations_are_replayed(gpu, monkeypatch):
    """But for the last batch, of which a part counts; weights and running statistics are those of the moment."""
    run = new_run(gpu, small(), batch_size=7, **ALL)
    run.evaluation_limit = None
    metrics = train(run)
    (evaluator,) = run.trainer._evaluators.values()
    assert evaluator._graph._graph is not None and evaluator._graph._runs == 2 * (run.test_batches.size // 7)
    assert run.test_batches.size % 7
    without_graphs(monkeypatch)
    other = new_run(gpu, small(), batch_size=7, **ALL)
    other.evaluation_limit = None
    assert metrics == train(other)


def test_an_evaluation_takes_the_memory_of_steps(gpu):
    run = new_run(gpu, batch_size=16)
    run.trainer.epoch(run.batches(0))
    pool = gpu.xp.get_default_memory_pool()
    held = pool.total_bytes()
    run.test()
    assert pool.total_bytes() < 1.001 * held


def test_a_record_gives_its_memory_back_in_the_end(gpu):
    def used_after_a_run():
        train(new_run(gpu, small(), **ALL), 1)
        gc.collect()
        return gpu.xp.get_default_memory_pool().used_bytes()

    assert used_after_a_run() == used_after_a_run()


def test_what_a_record_works_with_is_given_to_nobody_else(gpu):
    run, other = new_run(gpu, small(), **ALL), new_run(gpu, small(), **ALL)
    train(run, 1)
    for whose in (run.trainer.memory.lent(), contextlib.nullcontext()):
        with whose, pytest.raises(MemoryError):  # before which CuPy gives back what is free
            gpu.xp.empty(2**60, np.uint8)
    others = [gpu.array(np.full(2**power, 42, np.uint8)) for power in range(6, 20) for _ in range(20)]
    train(run, 2)
    assert all((gpu.to_host(array) == 42).all() for array in others)
    train(other, 2)
    assert replayed(run) and not differing(run, other)


# ---- what a step that is replayed may not do, and what is done then ------------------------------------------------


class Once(Layer):
    """The identity, but for something that the host does in each forward."""

    def __init__(self, act):
        self.act = act

    def forward(self, x):
        return self.act(x)

    def backward(self, dy):
        return dy


def with_layer(act):
    return Sequential(before=Once(act), **small().children())


def test_the_host_s_numbers_are_frozen(gpu, monkeypatch):
    """These tests would notice them: a factor that the host draws anew is that of the second step in all later ones."""
    def trained():
        rng = np.random.default_rng(1)
        run = new_run(gpu, with_layer(lambda x: x * np.float32(rng.uniform())))
        return run, train(run)

    run, metrics = trained()
    without_graphs(monkeypatch)
    other, expected = trained()
    assert metrics != expected and "conv.weight" in differing(run, other)


def test_a_step_that_waits_for_the_device_is_not_replayed(gpu, monkeypatch, capsys):
    def trained():
        run = new_run(gpu, with_layer(lambda x: x * np.float32(float(x[0, 0, 0, 0]) < 9)), **ALL)
        return run, train(run)

    run, metrics = trained()
    said = capsys.readouterr().err
    assert said.startswith("warning: steps are not replayed as a CUDA graph, kernels are launched one by one: ")
    assert said.count("\n") == 1 and "capturing" in said
    assert not replayed(run)
    without_graphs(monkeypatch)
    other, expected = trained()
    assert metrics == expected and not differing(run, other)


def test_a_record_for_which_there_is_no_memory(gpu, monkeypatch, capsys):
    """What a step takes was there once, but what it keeps for good may be too much: training goes on without."""
    calls = []

    def act(x):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("none left")
        return x

    run = new_run(gpu, with_layer(act))
    metrics = train(run)
    assert capsys.readouterr().err.endswith("launched one by one: MemoryError: none left\n")
    assert not replayed(run) and len(calls) == 1 + 2 * STEPS + 2 * 2
    without_graphs(monkeypatch)
    other = new_run(gpu, with_layer(lambda x: x))
    assert train(other) == metrics and not [name for name in differing(run, other) if "totals" not in name]


def test_an_interrupt_while_it_is_recorded(gpu, capsys):
    """Whatever else comes through, and nothing is being recorded any more."""
    calls = []

    def act(x):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return x

    run = new_run(gpu, with_layer(act))
    with pytest.raises(KeyboardInterrupt):
        train(run)
    assert capsys.readouterr().err == "" and train(run)


# ---- who looks into a step ---------------------------------------------------------------------------------------


def test_an_inspected_step_is_the_same(gpu):
    run, other = new_run(gpu, small(), **ALL), new_run(gpu, small(), **ALL)
    run.trainer.inspects = True
    before_steps = []
    assert train(run, before_step=lambda done: before_steps.append(replayed(run))) == train(other)
    assert any(before_steps) and replayed(run) and not differing(run, other)
    assert list(run.trainer.statistics) == ["conv", "bn", "drop", "mean", "classifier"]
    assert run.trainer.statistics["conv"]["update_ratio"] > 0


def test_each_layer_of_a_replayed_step_is_timed(gpu):
    run = new_run(gpu, small())
    run.network.train()
    times = inspection.profile(run.network, lambda: run.trainer.step(run.batches(0)[0]), repeats=3)
    assert replayed(run) and set(times) == {"step", "conv", "bn", "drop", "mean", "classifier"}


@pytest.mark.parametrize("step", [1, 2, 3, STEPS, STEPS + 1, STEPS + 4])
@pytest.mark.parametrize("layer", ["conv", "classifier"])
def test_the_layer_that_diverged_is_named(gpu, step, layer):
    """The failed step was replayed; it is done again, kernel by kernel, to find out."""
    run = new_run(gpu, small(), **ALL)

    def plant(done):
        if run.epoch * STEPS + done == step:
            getattr(run.network, layer).weight.master[...] = np.nan

    plant(1)
    with pytest.raises(DivergedError, match=f"^step {step}: layer {layer}, its output is not finite: try a lower --lr$"):
        train(run, before_step=plant)


# ---- who does without --------------------------------------------------------------------------------------------


def test_ranks_are_not_recorded(gpu):
    class Two(Team):
        size = 2

    run = new_run(gpu, small())
    trainer = Trainer(run.network, run.trainer.optimizer, run.train_batches, team=Two())
    trainer.epoch(run.batches(0))
    assert not trainer._graphs


def test_the_cpu_records_nothing():
    run = new_run(device.select("cpu"), small())
    train(run)
    assert not run.trainer._graphs
