"""Several processes that share each batch: all have the same bits, those of one process but for rounding; none outlives another.

What the ranks do in these tests is in functions of this module, which they import: see `parallel.launch`.
"""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing.context import SpawnProcess
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from minidl import data, device, nvidia_driver, optim, parallel, signals
from minidl.data.batches import Augmentation, Batches
from minidl.errors import DeviceError, UsageError
from minidl.layers import BatchNorm2d, Conv2d, GlobalAvgPool2d, Linear, ReLU, Sequential
from minidl.nvidia_driver import Driver, Gpu
from minidl.parallel import ALONE, Team
from minidl.training import Batch, Trainer, evaluate
from minidl.wording import warn
from small_runs import main
from test_train import DIGITS, SECONDS, Started, environment, rows, start, train

TESTS = Path(__file__).parent
BATCH_SIZE = 7  # which neither 2 nor 3 divide


def network(norm):
    layers = {"conv": Conv2d(3, 5, 3, stride=2, padding=1), "norm": BatchNorm2d(5, relu=True), "relu": ReLU(),
              "pool": GlobalAvgPool2d(), "classifier": Linear(5, 10)}
    return Sequential(**{name: layer for name, layer in layers.items() if norm or name != "norm"})


def trainer_of(team, norm):
    model = network(norm).initialize(device.select("cpu"), "float64", seed=1)
    train_set, _ = data.load("digits")
    batches = Batches(train_set, model.device, model.dtype, BATCH_SIZE, seed=1)
    return Trainer(model, optim.SGD(model.parameters, weight_decay=1e-3), batches, Augmentation(3, flips=True, cutout=8), team=team)


def train_steps(folder, team, norm, steps=4):
    """Train, and write what the rank has at the end."""
    trainer = trainer_of(team, norm)
    metrics = trainer.epoch([Batch(indices, 0.05) for indices in trainer.batches.epoch(0)[:steps]])
    test = evaluate(trainer.network, trainer.batches, 20, team)
    np.savez(Path(folder) / f"{norm}-{team.size}-{team.rank}.npz", metrics=[metrics.loss, metrics.top1, metrics.top5],
             test=[test.loss, test.top1, test.top5], gradient=trainer.network.parameters.grad, **trainer.network.state_dict())


def train_without_norm(folder, team):
    train_steps(folder, team, norm=False)


def one_step_with_norm(folder, team):
    train_steps(folder, team, norm=True, steps=1)


def fail_in_rank_1(folder, team):
    trainer = trainer_of(team, norm=False)
    warn("something that each rank meets")
    for number, indices in enumerate(tqdm(trainer.batches.epoch(0), disable=True)):
        if number == 3 and team.rank == 1:
            raise RuntimeError("a fault of one rank")
        trainer.step(Batch(indices, 0.05))


def wait_for_ever(folder, team):
    (Path(folder) / f"{os.getpid()}.rank").touch()
    trainer = trainer_of(team, norm=False)
    while True:
        trainer.step(Batch(trainer.batches.epoch(0)[0], 0.05))


def launch(work, size, folder, **settings):
    """Start a process that launches ranks, each of which calls work(folder, team)."""
    code = (f"import sys; sys.path.insert(0, {str(TESTS)!r})\nfrom minidl import parallel\nimport test_parallel\n"
            f"if __name__ == '__main__':\n    sys.exit(parallel.launch({size}, test_parallel.{work.__name__}, {str(folder)!r}))\n")
    script = folder / f"launch_{work.__name__}_{size}.py"
    script.write_text(code)
    return Started([sys.executable, script], env=environment(), stderr=subprocess.PIPE, **settings)


def results(work, size, norm, folder):
    with launch(work, size, folder) as process:
        _, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, errors) == (0, "")
    return [dict(np.load(folder / f"{norm}-{size}-{rank}.npz")) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_have_the_same_bits_and_those_of_one_but_for_rounding(tmp_path, size):
    train_steps(tmp_path, ALONE, norm=False)
    expected = dict(np.load(tmp_path / "False-1-0.npz"))
    first, *others = results(train_without_norm, size, False, tmp_path)
    for other in others:
        assert all(np.array_equal(first[name], other[name]) for name in expected)
    for name in expected:
        np.testing.assert_allclose(first[name], expected[name], rtol=1e-6, atol=1e-12, err_msg=name)


def test_ranks_that_cannot_be_started(monkeypatch, tmp_path):
    """As the second, where `ulimit -u` allows no more processes; the first goes, too."""
    start, started = SpawnProcess._Popen, []

    def limited(process):
        if started:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.append(start(process))
        return started[0]

    monkeypatch.setattr(SpawnProcess, "_Popen", staticmethod(limited))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which launch sets
    with pytest.raises(DeviceError, match=f"^2 ranks cannot be started: {os.strerror(errno.EAGAIN)}$"):
        parallel.launch(2, wait_for_ever, str(tmp_path))
    assert started[0].wait(SECONDS) == -signal.SIGKILL


@pytest.mark.parametrize("folder", ["/dev/shm", "the temporary one"])
def test_memory_that_ranks_share_is_where_there_is_room(monkeypatch, tmp_path, folder):
    """In memory, or on a disk; where there is none the launcher would die of SIGBUS."""
    room = {folder}
    monkeypatch.setattr(parallel, "_has_room", lambda it: ("/dev/shm" if it == "/dev/shm" else "the temporary one") in room)
    monkeypatch.setattr(SpawnProcess, "_Popen", staticmethod(lambda process: 1 / 0))  # so far it comes
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(ZeroDivisionError):
        parallel.launch(2, wait_for_ever, str(tmp_path))
    room.clear()
    with pytest.raises(DeviceError, match="^2 ranks need 32 MB that processes can share: No space left on device$"):
        parallel.launch(2, wait_for_ever, str(tmp_path))


class Part(Team):
    """A rank whose exchange with others is left out."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def test_batch_norm_takes_the_statistics_of_the_part_and_keeps_the_average(tmp_path):
    first, other = results(one_step_with_norm, 2, True, tmp_path)
    assert all(np.array_equal(first[name], other[name]) for name in first)
    parts = []
    for rank in range(2):
        trainer = trainer_of(Part(rank, 2), norm=True)
        trainer.network.train()
        trainer.step(Batch(trainer.batches.epoch(0)[0], 0.0))
        parts.append((trainer.network.parameters.grad, trainer.network.state_dict()["norm.running_var"]))
    shares = (4 / 7, 3 / 7)
    for index, name in enumerate(("gradient", "norm.running_var")):
        np.testing.assert_allclose(first[name], sum(s * part[index] for s, part in zip(shares, parts)), rtol=1e-12)


def test_inspected_gradients_of_outputs_are_those_of_the_whole_batch():
    """Without batch norm, the parts' are together those of one process."""
    squares = []
    for team in (ALONE, Part(0, 2), Part(1, 2)):
        trainer = trainer_of(team, norm=False)
        trainer.inspects = True
        trainer.epoch([Batch(trainer.batches.epoch(0)[0], 0.05)])
        part = team.part(BATCH_SIZE)
        squares.append({name: row["gradient_rms"] ** 2 * (part.stop - part.start) for name, row in trainer.statistics.items()})
    whole, first, second = squares
    assert {name: pytest.approx(first[name] + second[name]) for name in whole} == whole and min(whole.values()) > 0


@pytest.mark.parametrize("count, size, lengths", [(7, 2, [4, 3]), (8, 3, [3, 3, 2]), (2, 3, [1, 1, 0]), (5, 1, [5])])
def test_parts(count, size, lengths):
    parts = [range(count)[Part(rank, size).part(count)] for rank in range(size)]
    assert [len(part) for part in parts] == lengths
    assert [i for part in parts for i in part] == list(range(count))


def add_a_large_array(folder, team):
    array = np.arange(100_000.0) * (team.rank + 1)
    parallel.CAPACITY = 300_000  # bytes: several pieces, the last of another size
    team.add(array, 0.5, device.select("cpu"))
    numbers = np.full(3, team.rank, np.float32)
    team.add(numbers, 1.0, device.select("cpu"))
    first = team.of_first(team.rank + 40)
    np.savez(Path(folder) / f"None-3-{team.rank}.npz", array=array, numbers=numbers, first=first)


def test_large_arrays_are_added_piece_by_piece(tmp_path):
    for result in results(add_a_large_array, 3, None, tmp_path):
        np.testing.assert_allclose(result["array"], 3.0 * np.arange(100_000), rtol=1e-15)
        assert result["numbers"].tolist() == [3, 3, 3] and result["first"] == 40


# ---- failures ----------------------------------------------------------------------------------------------------


def test_where_one_rank_raises_all_end_within_ten_seconds(tmp_path):
    with launch(fail_in_rank_1, 2, tmp_path) as process:
        errors = process.stderr.readline() + process.stderr.readline()  # a warning and the beginning of the traceback
        begin = time.monotonic()
        errors += process.stderr.read()
        process.wait(SECONDS)
        assert time.monotonic() - begin < 10
    assert process.returncode == 1
    assert errors.count("Traceback") == 1 and errors.endswith("RuntimeError: a fault of one rank\n")
    assert errors.count("warning: ") == 1, "one rank speaks"


def alive(folder):
    """The ranks of `wait_for_ever` that still run."""
    found = []
    for file in folder.glob("*.rank"):
        stat = Path(f"/proc/{file.stem}/stat")
        try:
            if stat.read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(file.stem))
        except FileNotFoundError:
            pass
    return found


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("victim", ["a rank", "the launcher"])
def test_where_one_process_is_killed_all_end_within_ten_seconds(tmp_path, victim):
    with launch(wait_for_ever, 2, tmp_path) as process:
        wait_until(lambda: len(alive(tmp_path)) == 2, SECONDS)
        os.kill(alive(tmp_path)[1] if victim == "a rank" else process.pid, signal.SIGKILL)
        wait_until(lambda: not alive(tmp_path), 10)
        process.communicate(timeout=10)
    assert process.returncode == (128 + 9 if victim == "a rank" else -9)


# ---- train.py ----------------------------------------------------------------------------------------------------

RANKS = ("--device", "cpu", "--dataset", "digits", "--arch", "report-resnext3", "--limit-train-batches", "4", "--ranks", "2",
         "--batch-size", "9", "--epochs", "3")


def arrays(folder):
    with np.load(folder / "last.npz") as file:
        return {name: array for name, array in file.items() if name != "metadata"}


def test_train_with_ranks_and_resume_where_it_was_interrupted(tmp_path):
    result = train(tmp_path, *RANKS, "-o", "whole")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("test top-1") == 1, "one rank speaks"
    with start(tmp_path, *RANKS, "-o", "it", stderr=subprocess.PIPE) as process:
        while not (line := process.stdout.readline()).lstrip().startswith("1/3 "):
            assert line
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130 and errors.count("error: ") == 1, errors
    assert re.match(r"error: interrupted, and saved after 1 epoch and \d+ steps?; go on with --resume it\n", errors), errors
    resumed = train(tmp_path, "--resume", "it")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    whole, it = arrays(tmp_path / "whole"), arrays(tmp_path / "it")
    assert whole.keys() == it.keys() and all(np.array_equal(whole[name], it[name]) for name in whole)
    assert [row["test_loss"] for row in rows(tmp_path / "whole")] == [row["test_loss"] for row in rows(tmp_path / "it")]


def stop_while_rank_0_saves(folder, team):
    """What train.py does when it is interrupted, with a disk that takes its time."""
    trainer = trainer_of(team, norm=False)
    (Path(folder) / f"{os.getpid()}.rank").touch()
    try:
        trainer.epoch([Batch(trainer.batches.epoch(0)[0], 0.05)] * 1_000_000)
    except signals.Stop as stop:
        if team.rank == 0:
            time.sleep(parallel.GRACE_SECONDS + 2)
            (Path(folder) / "saved").touch()
        team.of_first(0.0)
        raise signals.Stop(stop.exit_code, "" if team.rank else "saved") from None


def test_ranks_wait_for_the_one_that_saves(tmp_path):
    with launch(stop_while_rank_0_saves, 2, tmp_path) as process:
        wait_until(lambda: len(list(tmp_path.glob("*.rank"))) == 2, SECONDS)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, errors) == (130, "error: saved\n") and (tmp_path / "saved").exists()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_signal_to_each_process_at_once_is_one_request(tmp_path):
    """As systemd and others stop a job: the first rank gets its own, and that which the launcher passes on."""
    with start(tmp_path, *RANKS, "--epochs", "1000", "-o", "it", stderr=subprocess.PIPE) as process:
        while not (line := process.stdout.readline()).lstrip().startswith("1/1000 "):
            assert line
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) >= 2
        for pid in (process.pid, *map(int, children)):
            os.kill(pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 143 and "error: interrupted, and saved after " in errors, errors


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("seconds", [0, 0.2, 0.4, 0.6, 0.8, 1.2])
def test_ctrl_c_of_a_terminal_while_ranks_start(tmp_path, seconds):
    """It goes to the whole group of processes."""
    with start(tmp_path, *RANKS, "--epochs", "1000", "-o", "it", stderr=subprocess.PIPE, start_new_session=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: children.read_text(), SECONDS)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130 and "Traceback" not in errors, errors


def test_what_is_not_shared_is_refused(tmp_path):
    result = train(tmp_path, *DIGITS, "--ranks", "2", "--profile")
    assert result.returncode == 2 and "--profile is for one rank, not 2" in result.stderr


def test_one_gpu_for_several_ranks(monkeypatch):
    monkeypatch.setattr(device, "_missing_for_gpu", lambda: None)
    with pytest.raises(UsageError, match="^device cuda:1 is one GPU, and of 2 ranks each needs its own: say cuda$"):
        main("--dataset", "digits", "--arch", "wrn-10-1", "--ranks", "2", "--device", "cuda:1")


def test_each_rank_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(device, "_missing_for_gpu", lambda: None)
    monkeypatch.setattr(nvidia_driver, "find", lambda: Driver((13, 0), [Gpu("NVIDIA Test", 24 * 2**30, (9, 0))]))
    with pytest.raises(DeviceError, match="^ranks 2: on GPUs each needs its own, and there is 1: ask for fewer, or use --device "):
        main("--dataset", "digits", "--arch", "wrn-10-1", "--ranks", "2")


def test_an_error_of_all_ranks_is_said_once(tmp_path):
    result = train(tmp_path, *RANKS, "--lr", "1e30", "-o", "it")
    assert result.returncode == 6 and result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr, result.stderr
