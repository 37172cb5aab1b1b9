"""Checkpoints: whatever happens while they are written, or to them later, a run can go on from one of them."""

import contextlib
import json
import mmap
import os
import platform
import random
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest

from minidl import checkpoint, weights
from minidl.atomic_file import write_atomically
from minidl.checkpoint import LAST, PREVIOUS, Checkpoint
from minidl.commands import train as train_command
from minidl.errors import CheckpointError
from minidl.parallel import ALONE
from minidl.run_folder import RunFolder
from small_runs import ARGUMENTS, STEPS, at_step, digests, few_digits, forked, rows, send, train  # noqa: F401
from test_train import assert_refused
from test_weights import npy, pack

HERE = f"-{re.sub('[^A-Za-z0-9]', '', platform.node())}.tmp"  # how temporary names of this machine end
ABOUT = weights.describe("it", 10, {})


def save(folder, step):
    """A checkpoint all of whose numbers are `step`."""
    arrays = {name: np.full(size, step, np.float32) for name, size in (("a", 3000), ("b", 1))}
    checkpoint.save(folder, Checkpoint(arrays, {"c": np.full(2000, step)}, ABOUT,
                                       {"settings": {}, "epoch": 0, "step": step, "history": []}))


def step_of(folder):
    """The step of the checkpoint that is read from `folder`, all of whose numbers are it."""
    it, remarks = checkpoint.load(folder)
    assert remarks == []
    assert {*np.concatenate([*it.state.values(), *it.arrays.values()])} == {it.progress["step"]}
    assert [array.size for array in (*it.state.values(), *it.arrays.values())] == [3000, 1, 2000]
    return it.progress["step"]


def hidden(folder):
    return sorted(path.name for path in folder.glob(".*"))


# ---- kills -------------------------------------------------------------------------------------------------------


def killed(work, after):
    """Fork a process that calls work(), and kill it after so many seconds."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(1)
    time.sleep(after)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def test_two_hundred_kills_lose_nothing(tmp_path):
    """A process that does nothing but save dies at a random moment; what it had finished, or the save after, is there."""
    done = mmap.mmap(-1, 8)  # shared with the processes: the last step that they saved

    def save_for_ever():
        while True:
            step = struct.unpack("q", done[:])[0] + 1
            save(tmp_path, step)
            done[:] = struct.pack("q", step)

    save(tmp_path, 0)
    rng, left_over = random.Random(0), 0
    for _ in range(200):
        killed(save_for_ever, rng.uniform(0.0, 0.03))
        finished, = struct.unpack("q", done[:])
        assert step_of(tmp_path) in (finished, finished + 1)
        left_over += bool(hidden(tmp_path))
    assert finished and left_over > 20, "they were killed in the middle of a save"
    save(tmp_path, finished + 2)
    assert {path.name for path in tmp_path.iterdir()} == {PREVIOUS, LAST} and step_of(tmp_path) == finished + 2


def killed_before_operation(number, work):
    """Fork a process that calls work() and dies before its `number`-th operation on a file's name. False if it lived."""
    process = os.fork()
    if process == 0:
        seen = []

        def hook(event, arguments):
            if event in ("open", "os.link", "os.rename", "os.remove"):
                seen.append(event)
                if len(seen) == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_between_any_two_operations(tmp_path, damaged):
    """Even where last.npz was damaged before, so that the one before it is the only one."""
    number, steps = 1, []
    while True:
        for step in (1, 2):
            save(tmp_path, step)
        if damaged:
            (tmp_path / LAST).write_bytes(b"")
        if not killed_before_operation(number, lambda: save(tmp_path, 3)):
            break
        it, _ = checkpoint.load(tmp_path)
        steps.append(it.progress["step"])
        save(tmp_path, 4)
        assert step_of(tmp_path) == 4 and hidden(tmp_path) == []
        number += 1
    assert number > 5 and step_of(tmp_path) == 3
    assert steps == sorted(steps) and {*steps} == ({1, 3} if damaged else {2, 3})


def test_the_temporary_files_of_the_dead_are_swept_and_not_those_of_the_living(tmp_path):
    with subprocess.Popen(["sleep", "100"]) as living:
        dead = subprocess.Popen(["true"])
        dead.wait()
        kept = [f".{LAST}.{living.pid}{HERE}", f".{PREVIOUS}.{living.pid}{HERE}", f".last.npz.it{HERE}",
                f".best.npz.{dead.pid}{HERE}", f".{LAST}.{dead.pid}-elsewhere.tmp"]  # of a machine that shares the disk
        for name in (*kept, f".{LAST}.{dead.pid}{HERE}", f".{PREVIOUS}.{dead.pid}{HERE}", f".{LAST}.99999999999999999999{HERE}"):
            (tmp_path / name).write_bytes(b"half")
        save(tmp_path, 1)
        assert hidden(tmp_path) == sorted(kept)
        living.kill()


def test_a_temporary_file_that_somebody_removes(tmp_path):
    """Nothing is called written that is not."""
    (tmp_path / "it").write_bytes(b"old")
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/it cannot be written: No such file or directory$"):
        write_atomically(tmp_path / "it", lambda file: [path.unlink() for path in tmp_path.glob(".it.*")])
    assert (tmp_path / "it").read_bytes() == b"old"


def test_a_checkpoint_of_a_later_format(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/{LAST} is not a checkpoint of this version$"):
        checkpoint.load(tmp_path / LAST)


def test_a_file_system_without_second_names(tmp_path, monkeypatch):
    """As on some memory sticks and network shares."""
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert step_of(tmp_path) == 3 and checkpoint.load(tmp_path / PREVIOUS)[0].progress["step"] == 2
    assert hidden(tmp_path) == []


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        for step in (1, 2):
            save(tmp_path, step)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_runs_that_start_in_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len({RunFolder.dated("it").path for _ in range(20)}) == 20 == len(list((tmp_path / "runs").iterdir()))


# ---- a full disk -------------------------------------------------------------------------------------------------


def limit_files(size):
    """No file may grow beyond `size` bytes from now on."""
    return lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


TOO_LARGE = "it/last.npz cannot be written: File too large"


def test_a_disk_that_is_full_for_ever(few_digits, tmp_path):
    """One warning, and the run goes on to its end, which fails. What was saved before is there, and half a file is not."""
    result = train(tmp_path, *ARGUMENTS, "-o", "it", "--save-every", 2, before=at_step(STEPS + 3, limit_files(6000)))
    assert_refused(result, 5, f"warning: {TOO_LARGE}; the run goes on\n", f"error: the run is at its end, but {TOO_LARGE}\n")
    assert result.stderr.count(TOO_LARGE) == 2 and "after epoch 3: test top-1" in result.stdout
    assert len(rows(tmp_path / "it")) == 3 and hidden(tmp_path / "it") == []
    it, remarks = checkpoint.load(tmp_path / "it")
    assert (it.progress["epoch"], it.progress["step"], remarks) == (1, 2, [])
    assert train(tmp_path, "--resume", "it").returncode == 0


def test_a_disk_that_is_full_from_the_start(few_digits, tmp_path):
    """Nothing would be left of the training, so that there is none."""
    result = train(tmp_path, *ARGUMENTS, "-o", "it", before=limit_files(300))
    assert_refused(result, 5, "error: it/config.toml cannot be written: File too large\n")
    assert "warning" not in result.stderr and list((tmp_path / "it").iterdir()) == []


def test_a_disk_that_is_full_for_a_while(few_digits, tmp_path):
    def patch():
        at_step(STEPS + 1, limit_files(6000))()
        at_step(2 * STEPS + 1, limit_files(resource.RLIM_INFINITY))()

    result = train(tmp_path, *ARGUMENTS, "-o", "it", "--save-every", 2, before=patch)
    assert (result.returncode, result.stderr) == (0, f"warning: {TOO_LARGE}; the run goes on\n")
    assert checkpoint.load(tmp_path / "it")[0].progress["epoch"] == 3
    events = [json.loads(line) for line in (tmp_path / "it" / "events.jsonl").read_text().splitlines()]
    saves = [(event["epoch"], event["step"]) for event in events if event["event"] == "save"]
    assert saves == [(0, 2), (0, 4), (1, 0), (2, 2), (2, 4), (3, 0)], "those that succeeded"


def test_a_signal_while_the_disk_is_full(few_digits, tmp_path):
    def patch():
        at_step(STEPS + 1, limit_files(6000))()
        at_step(STEPS + 3, send(signal.SIGTERM))()

    result = train(tmp_path, *ARGUMENTS, "-o", "it", "--save-every", 2, before=patch)
    assert_refused(result, 143, f"error: interrupted after 1 epoch and 3 steps, and not saved: {TOO_LARGE}\n")


def test_best_weights_that_cannot_be_written(few_digits, tmp_path):
    """They are never improved on, so that they are not there in the end, also where another process comes to it."""
    def patch():
        at_step(1, limit_files(3000))()
        at_step(STEPS + 1, limit_files(resource.RLIM_INFINITY))()

    arguments, lost = (*ARGUMENTS, "--val-split", 8, "--lr", "1e-9", "-o"), "best.npz cannot be written: File too large"
    result = train(tmp_path, *arguments, "it", before=patch)
    assert_refused(result, 5, f"the run is at its end, but it/{lost}")
    assert checkpoint.load(tmp_path / "it")[0].progress["epoch"] == 3 and not (tmp_path / "it" / "best.npz").exists()
    stopped = train(tmp_path, *arguments, "stopped", before=lambda: (patch(), at_step(STEPS + 2, send(signal.SIGTERM))()))
    assert_refused(stopped, 143, f"warning: stopped/{lost}; the run goes on", "and saved after 1 epoch and 2 steps")
    assert_refused(train(tmp_path, "--resume", "stopped"), 5, f"the run is at its end, but stopped/{lost}")


@contextlib.contextmanager
def small_disk(path, size):
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here: the tests with a limit for files must do")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_full_file_system(few_digits, tmp_path):
    def fill(_):
        with open("disk/filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1000))

    with small_disk(tmp_path / "disk", "1m") as disk:
        result = train(tmp_path, *ARGUMENTS, "-o", "disk/it", "--save-every", 2, before=at_step(STEPS + 3, fill))
        full = "disk/it/last.npz cannot be written: No space left on device"
        assert_refused(result, 5, f"warning: {full}; the run goes on\n", f"error: the run is at its end, but {full}\n")
        it, remarks = checkpoint.load(disk / "it")
        assert (it.progress["epoch"], it.progress["step"], remarks) == (1, 2, []) and hidden(disk / "it") == []
        (disk / "filler").unlink()
        assert train(tmp_path, "--resume", "disk/it").returncode == 0
        assert len(rows(disk / "it")) == 3


# ---- damage ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with the run "it", which was killed after 1 epoch and 4 steps, and "whole", which was not."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        few_digits.__wrapped__(patch)
        assert train(folder, *ARGUMENTS, "-o", "whole").returncode == 0
        result = train(folder, *ARGUMENTS, "-o", "it", "--save-every", 2, before=at_step(2 * STEPS, send(signal.SIGKILL)))
    assert result.returncode == -signal.SIGKILL
    return folder


@pytest.fixture
def copy(few_digits, stopped, tmp_path):
    """A copy of the folder of `stopped`."""
    return shutil.copytree(stopped, tmp_path / "copy")


def flip(raw):
    changed = bytearray(raw)
    changed[len(raw) // 3] ^= 16
    return bytes(changed)


DAMAGE = {  # what is done to the file: why it cannot be read
    "empty": (lambda raw: b"", "it is empty"),
    "half": (lambda raw: raw[:len(raw) // 2], "it is damaged: File is not a zip file"),
    "a byte short": (lambda raw: raw[:-1], "it is damaged: File is not a zip file"),
    "a bit": (flip, "it is damaged: Bad CRC-32 for file "),
    "a text": (lambda raw: b"my notes\n", "it is neither .npz, .safetensors nor a file of PyTorch"),
    "missing": (None, "No such file or directory"),
}


def damage(path, kind):
    change, reason = DAMAGE[kind]
    raw = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(raw))  # a new file: the previous checkpoint may be the same one by another name
    return reason


@pytest.mark.parametrize("kind", [*DAMAGE, "objects", "weights only"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(copy, kind):
    path = copy / "it" / LAST
    if kind == "objects":
        pack(path, {"a.npy": npy(np.array([None]), allow_pickle=True)})
        reason = "cannot be read: 'a': an array of Python objects, which only a pickle can hold"
    elif kind == "weights only":
        weights.save(path, {"a": np.zeros(1)}, ABOUT)
        reason = "holds weights only: a run cannot go on from it"
    else:
        reason = f"cannot be read: {damage(path, kind)}"
    result = train(copy, "--resume", "it")
    assert result.returncode == 0 and f"going on after 1 epoch and 2 steps of {STEPS}" in result.stdout
    assert result.stderr.startswith(f"warning: it/last.npz {reason}") and result.stderr.count("\n") == 1
    assert result.stderr.endswith("; going on from last.previous.npz\n") and "pickle=" not in result.stderr
    assert digests(copy / "it" / LAST) == digests(copy / "whole" / LAST) and rows(copy / "it") == rows(copy / "whole")


def test_what_the_process_that_started_the_ranks_has_said_they_do_not_say_again(copy):
    damage(copy / "it" / LAST, "half")
    parser = ArgumentParser()
    train_command.add_arguments(parser)
    result = forked(copy, lambda: train_command.one_of_ranks(parser.parse_args(["--resume", "it"]), ALONE))
    assert (result.returncode, result.stderr) == (0, "") and "going on after 1 epoch and 2 steps" in result.stdout


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_file_that_is_named_is_taken_or_refused(copy, kind):
    reason = damage(copy / "it" / LAST, kind)
    result = train(copy, "--resume", "it/last.npz")
    assert_refused(result, 5, f"error: it/last.npz cannot be read: {reason}")
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_without_a_good_one_both_reasons_are_said(copy):
    damage(copy / "it" / LAST, "half")
    damage(copy / "it" / PREVIOUS, "empty")
    before = {path: path.read_bytes() for path in (copy / "it").iterdir()}
    assert_refused(train(copy, "--resume", "it"), 5, "error: it/last.npz cannot be read: it is damaged: File is not a zip "
                                                     "file; it/last.previous.npz cannot be read: it is empty\n")
    assert {path: path.read_bytes() for path in (copy / "it").iterdir()} == before


def test_bits_that_flip_anywhere_are_found_or_make_no_difference(tmp_path):
    """Of a checkpoint with its metadata, all that is in it: names, shapes, numbers, settings."""
    save(tmp_path, 1)
    save(tmp_path, 1)
    path = tmp_path / LAST
    whole, expected = path.read_bytes(), checkpoint.load(path)[0]
    rng, refused = random.Random(0), 0
    for _ in range(400):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.unlink()
        path.write_bytes(changed)
        it, remarks = checkpoint.load(tmp_path)
        assert it.about == expected.about and it.progress == expected.progress
        for ours, theirs in ((it.state, expected.state), (it.arrays, expected.arrays)):
            assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
        refused += len(remarks)
    assert refused > 350


@pytest.mark.parametrize("progress", [
    {"epoch": 1}, {"step": "1"}, {"history": None}, {"settings": {"lr": "much"}}, {"settings": {"colour": "red"}},
    {"settings": []}])
def test_what_is_no_progress_of_a_run(few_digits, tmp_path, progress):
    good = {"settings": {"arch": "small", "dataset": "digits"}, "epoch": 0, "step": 0, "history": []}
    checkpoint.save(tmp_path, Checkpoint({"a": np.zeros(1)}, {}, ABOUT, {**good, **progress}))
    result = train(tmp_path, "--resume", ".")
    assert_refused(result, 5, " is not a checkpoint of this version")
    assert result.stderr.count("\n") == 1


def test_what_is_synced_is_all_of_it(tmp_path, monkeypatch):
    """A machine that stops, not only a process: the file is on the disk before it gets its name, and then its name."""
    told, sync, replace = [], os.fsync, Path.replace

    def fsync(descriptor):
        about = os.fstat(descriptor)
        told.append("folder" if stat.S_ISDIR(about.st_mode) else about.st_size)
        sync(descriptor)

    def renamed(path, name):
        told.append("name")
        return replace(path, name)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", renamed)
    write_atomically(tmp_path / "it", lambda file: file.write(b"a little"))
    assert told == [8, "name", "folder"]


def test_names_with_brackets_are_swept_too(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".it[1].npz.{dead.pid}{HERE}").write_bytes(b"half")
    write_atomically(tmp_path / "it[1].npz", lambda file: file.write(b"all"))
    assert [path.name for path in tmp_path.iterdir()] == ["it[1].npz"]


def test_a_folder_that_cannot_be_opened(tmp_path, monkeypatch):
    def refuse(path, *arguments, **named):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    write_atomically(tmp_path / "it", lambda file: file.write(b"all"))
    assert (tmp_path / "it").read_bytes() == b"all"


def test_a_row_that_could_not_be_written_comes_with_the_next(tmp_path):
    folder, path = RunFolder.new(tmp_path / "it"), tmp_path / "it" / "metrics.csv"
    history = [{"epoch": str(number)} for number in (1, 2, 3)]
    folder.add_metrics(history[:1])
    path.unlink()
    path.mkdir()
    folder.add_metrics(history[:2])
    path.rmdir()
    folder.add_metrics(history)
    assert path.read_text() == "epoch\n1\n2\n3\n" and folder.troubles == {}


def test_an_event_after_one_that_was_cut_off_has_a_line_of_its_own(tmp_path):
    folder, path = RunFolder.new(tmp_path / "it"), tmp_path / "it" / "events.jsonl"
    folder.log("first")
    os.truncate(path, path.stat().st_size - 3)  # as a disk that gets full leaves it
    for event in ("second", "third"):
        folder.log(event)
    cut_off, *whole = path.read_text().splitlines()
    assert cut_off.endswith('"first') and [json.loads(line)["event"] for line in whole] == ["second", "third"]
