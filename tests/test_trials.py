"""What train.py does besides one plain run: several seeds, trials, validation and patience, statistics, TensorBoard."""

import csv
import json
import math
import os
import re
import signal
import statistics
import struct
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest

import models
from minidl import checkpoint, data, run_folder
from minidl.commands import runs
from minidl.data.batches import Batches
from minidl.errors import CheckpointError
from minidl.run import Run
from minidl.run_folder import RunFolder
from minidl.settings import read_toml, resolve
from minidl.training import Metrics, evaluate
from minidl.weights import load
from models.recipes import recipe
from small_runs import ARGUMENTS, STEPS, at_step, digests, few_digits, main, rows, send, train  # noqa: F401

RUN = ARGUMENTS[:-1]  # not quiet

pytestmark = pytest.mark.usefixtures("few_digits")


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def assert_ended_well(result):
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout.splitlines()


def left_by(folder):
    """What a run left in the folder where it was started."""
    return sorted(path.name for path in folder.iterdir() if path.name not in (".stdout", ".stderr"))


# ---- what is said


def test_quiet_leaves_the_first_and_the_last_lines(tmp_path):
    loud, quiet = (assert_ended_well(train(tmp_path, *RUN, "-o", name, *more)) for name, more in (("a", ()), ("b", ["-q"])))
    assert quiet[:2] == [loud[0], loud[-2]] and quiet[2] == "run folder: b" and len(quiet) == 3
    assert [line.split()[0] for line in loud[3:6]] == ["1/3", "2/3", "3/3"] and len(loud) == 8


# ---- a run again


@pytest.mark.parametrize("options", [
    "", "--optimizer adamw --ema 0.9 --mixup 0.3 --label-smoothing 0.1 --cutout 8 --padding 3 --flip --val-split 10 "
        "--sched onecycle --clip-norm 0.5 --seed 7", "--recipe paper --model-kwargs width=5", "--recipe report"])
def test_the_settings_of_a_run_give_it_again(tmp_path, options):
    assert_ended_well(train(tmp_path, *RUN, *options.split(), "-o", "first"))
    assert_ended_well(train(tmp_path, "--config", "first/config.toml", "-o", "second"))
    assert digests(tmp_path / "first" / "last.npz") == digests(tmp_path / "second" / "last.npz")
    assert rows(tmp_path / "first") == rows(tmp_path / "second")
    texts = [(tmp_path / name / "config.toml").read_text() for name in ("first", "second")]
    assert texts[0] == texts[1]


# ---- several seeds


def test_seeds(tmp_path):
    said = assert_ended_well(train(tmp_path, *RUN, "--runs", "3", "--seed", "4", "-o", "it"))
    assert left_by(tmp_path) == ["it"] and left_by(tmp_path / "it") == ["seed-4", "seed-5", "seed-6", "summary.json"]
    found = json.loads((tmp_path / "it" / "summary.json").read_text())
    assert found.keys() == {"test_top1", "test_top5", "test_loss"}
    for name, numbers in found.items():
        values = [float(rows(tmp_path / "it" / f"seed-{seed}")[-1][name]) for seed in (4, 5, 6)]
        mean = sum(values) / 3
        assert numbers == {"mean": pytest.approx(mean), "values": values,
                           "std": pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in values) / 2))}
    assert len(set(found["test_loss"]["values"])) == 3
    top1, top5 = ([100 * value for value in found[name]["values"]] for name in ("test_top1", "test_top5"))
    assert said[-2] == (f"3 seeds, mean +- standard deviation: test top-1 {statistics.mean(top1):.2f}% +- "
                        f"{statistics.stdev(top1):.2f}, top-5 {statistics.mean(top5):.2f}% +- {statistics.stdev(top5):.2f}")
    assert said[-1] == "folder: it"
    assert [line for line in said if line.startswith("seed")] == ["seed 4", "seed 5", "seed 6"]


@pytest.mark.parametrize("loss, in_json", [(math.nan, None), (math.inf, None), (2.5, 2.5)])
def test_seeds_whose_test_has_a_loss_that_is_not_finite(tmp_path, loss, in_json):
    def patch():
        Run.test = lambda run: Metrics(2.5 if run.settings.seed == 0 else loss, 0.5, 1.0)

    said = assert_ended_well(train(tmp_path, *RUN, "--epochs", "1", "--runs", "2", "-o", "it", before=patch))
    assert said[-2:] == ["2 seeds, mean +- standard deviation: test top-1 50.00% +- 0.00, top-5 100.00% +- 0.00", "folder: it"]
    found = json.loads((tmp_path / "it" / "summary.json").read_text())
    assert found["test_loss"] == {"mean": in_json, "std": None if in_json is None else 0, "values": [2.5, in_json]}


@pytest.mark.parametrize("step", [2, 3 * STEPS - 1])
def test_the_same_command_finishes_seeds_that_were_interrupted(tmp_path, step):
    """What is there then is what an undisturbed run of each seed would have left; what was finished is not touched."""
    arguments = [*RUN, "--runs", "2", "-o", "it"]

    def interrupt():
        """In the second run."""
        at_step(3 * STEPS, lambda _: at_step(step, send(signal.SIGINT))())()

    result = train(tmp_path, *arguments, before=interrupt)
    assert result.returncode == 130 and "interrupted, and saved after" in result.stderr
    assert "with all seeds: the same command with -o it" in result.stderr
    finished = {path.name: path.read_bytes() for path in (tmp_path / "it" / "seed-0").iterdir()}
    told = (tmp_path / "it" / "seed-1" / "events.jsonl").read_bytes()
    assert left_by(tmp_path / "it") == ["seed-0", "seed-1"]

    said = assert_ended_well(train(tmp_path, *arguments))
    assert "it/seed-0 is finished: 3 epochs of 3, test top-1 " in "\n".join(said)
    assert {path.name: path.read_bytes() for path in (tmp_path / "it" / "seed-0").iterdir()} == finished
    assert (tmp_path / "it" / "seed-1" / "events.jsonl").read_bytes().startswith(told), "nothing is ever taken from it"
    assert [event["event"] for event in events(tmp_path / "it" / "seed-1") if event["event"] in ("stop", "resume", "end")] == [
        "stop", "resume", "end"]
    for seed in (0, 1):
        assert_ended_well(train(tmp_path, *RUN, "--seed", seed, "-o", f"alone-{seed}"))
        assert digests(tmp_path / f"alone-{seed}" / "last.npz") == digests(tmp_path / "it" / f"seed-{seed}" / "last.npz")
        assert rows(tmp_path / f"alone-{seed}") == rows(tmp_path / "it" / f"seed-{seed}")

    more = assert_ended_well(train(tmp_path, *RUN, "--runs", "3", "-o", "it"))
    assert "\n".join(more).count(" is finished: ") == 2 and left_by(tmp_path / "it") == [
        "seed-0", "seed-1", "seed-2", "summary.json"]


def test_a_seed_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    in_its_first_file = train(tmp_path, *RUN, "--runs", "2", "-o", "it", before=lambda: setattr(os, "fsync", send(signal.SIGKILL)))
    assert in_its_first_file.returncode == -signal.SIGKILL
    (left,) = left_by(tmp_path / "it" / "seed-0")
    assert left.startswith(".config.toml.")
    result = train(tmp_path, *RUN, "--runs", "2", "-o", "it", before=at_step(2, lambda _: os._exit(137)))
    assert result.returncode == 137 and not (tmp_path / "it" / "seed-0" / "last.npz").exists()
    assert_ended_well(train(tmp_path, *RUN, "--runs", "2", "-o", "it"))
    assert_ended_well(train(tmp_path, *RUN, "-o", "alone"))
    assert digests(tmp_path / "alone" / "last.npz") == digests(tmp_path / "it" / "seed-0" / "last.npz")


def test_seeds_of_other_settings_are_not_mixed(tmp_path):
    assert_ended_well(train(tmp_path, *RUN, "--runs", "2", "-o", "it"))
    result = train(tmp_path, *RUN, "--runs", "2", "-o", "it", "--lr", "0.5")
    assert result.returncode == 2 and "lr: the run has 0.00625, given is 0.5\nname another folder" in result.stderr


def test_seeds_without_a_setting_that_they_had_are_not_mixed(tmp_path):
    at = RUN.index("--limit-train-batches")
    assert_ended_well(train(tmp_path, *RUN, "--runs", "2", "-o", "it"))
    result = train(tmp_path, *RUN[:at], *RUN[at + 2:], "--runs", "2", "-o", "it")
    assert result.returncode == 2 and "limit_train_batches: the run has 5, given is None\nname another folder" in result.stderr


def test_seeds_do_not_go_into_the_folder_of_a_run(tmp_path):
    assert_ended_well(train(tmp_path, *RUN, "-o", "it"))
    before = left_by(tmp_path / "it")
    result = train(tmp_path, *RUN, "--runs", "2", "-o", "it")
    assert result.returncode == 2 and "it is the folder of one run: name another one" in result.stderr
    assert left_by(tmp_path / "it") == before


def test_all_seeds_must_be_seeds(tmp_path):
    result = train(tmp_path, *RUN, "--runs", "2", "--seed", str(2**63 - 1), "-o", "it")
    assert result.returncode == 2 and "error: seed is 9223372036854775808: it must be below 2**63" in result.stderr
    assert not (tmp_path / "it").exists()


def test_seeds_do_not_touch_what_is_not_theirs(tmp_path):
    kept = tmp_path / "it" / "seed-0" / "precious"
    kept.parent.mkdir(parents=True)
    kept.write_text("")
    result = train(tmp_path, *RUN, "--runs", "2", "-o", "it")
    assert result.returncode == 2 and "the output folder it/seed-0 is not empty" in result.stderr
    assert left_by(kept.parent) == ["precious"]
    result = train(tmp_path, *RUN, "--runs", "2", "-o", "x" * 300)
    assert result.returncode == 2 and "/seed-0 cannot be made: File name too long" in result.stderr


# ---- trials


def test_a_trial_leaves_nothing_behind(tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()

    def into(folder):
        os.environ["TMPDIR"], tempfile.tempdir = str(folder), None

    said = assert_ended_well(train(tmp_path, *RUN, "--fast-dev-run", "--val-split", "10", "--tensorboard",
                                   before=lambda: into(temporary)))
    assert left_by(tmp_path) == ["tmp"] and not list(temporary.iterdir())
    assert said[3].split()[0] == "1/1"
    assert said[-1] == "trial: 2 steps, evaluation, checkpoint and resume work; nothing was kept"


def test_a_trial_that_is_interrupted_leaves_nothing_to_go_on_with(tmp_path):
    result = train(tmp_path, *RUN, "--fast-dev-run", before=at_step(1, send(signal.SIGINT)))
    assert (result.returncode, result.stderr) == (130, "error: interrupted\n") and not left_by(tmp_path)


def test_a_trial_takes_two_steps_and_a_batch_of_each_evaluation(tmp_path):
    counted = tmp_path / "counted"

    def count():
        load, epoch = Batches.load, []

        def counting(self, indices, step, *more):
            epoch.append((self.size, int(step[0])))
            counted.write_text(json.dumps(epoch))
            return load(self, indices, step, *more)

        Batches.load = counting

    assert_ended_well(train(tmp_path, *RUN, "--fast-dev-run", "--val-split", "10", "--epochs", "30", before=count))
    assert json.loads(counted.read_text()) == [[38, 0], [38, 1], [10, 2], [19, 2]]


def test_a_batch_is_learnt_by_heart(tmp_path, monkeypatch):
    """By the network of the demo, though the settings vary images and soften labels."""
    monkeypatch.chdir(tmp_path)
    varied = "--padding 4 --flip --mixup 1 --cutout 8 --label-smoothing 0.2".split()
    main("--device", "cpu", "--dataset", "digits", "--arch", "simplenet-310k", "-b", "8", "--lr", "0.02", *varied,
         "--overfit-batch", "--quiet", "-o", "it")
    last = rows(tmp_path / "it")[-1]
    assert float(last["train_loss"]) < 0.02 and last["train_top1"] == "1.00000"
    settings = read_toml("it/config.toml")
    assert (settings["padding"], settings["mixup"], settings["label_smoothing"]) == (0, 0, 0), "it says what was done"


def test_the_batch_is_one_and_the_test_set(tmp_path):
    said = assert_ended_well(train(tmp_path, *RUN, "--overfit-batch", "--val-split", "10", "--patience", "2", "-o", "it"))
    assert "| digits: 8 training, 8 test images |" in said[0] and said[1].startswith("A trial: one batch again and again")
    assert len(rows(tmp_path / "it")) == 3 and "val_top1" not in rows(tmp_path / "it")[0]


def test_a_trial_with_one_batch_goes_on_as_one(tmp_path):
    whole, it = ([*RUN, "--overfit-batch", "-o", name] for name in ("whole", "it"))
    said = assert_ended_well(train(tmp_path, *whole))
    assert train(tmp_path, *it, before=at_step(STEPS + 2, send(signal.SIGINT))).returncode == 130
    resumed = assert_ended_well(train(tmp_path, "--resume", "it"))
    assert resumed[0] == said[0] and digests(tmp_path / "it") == digests(tmp_path / "whole")


def test_profile(tmp_path):
    said = assert_ended_well(train(tmp_path, *RUN, "--profile"))
    assert left_by(tmp_path) == []
    head, *layers, total = said[1:]
    assert head.split() == ["layer", "type", "forward", "ms", "backward", "ms", "of", "all"]
    assert [line.split()[:2] for line in layers] == [
        ["conv", "Conv2d"], ["bn", "BatchNorm2d"], ["drop", "ChannelDropout"], ["mean", "GlobalAvgPool2d"],
        ["classifier", "Linear"]]
    numbers = [[float(cell.rstrip("%")) for cell in line.split()[2:]] for line in layers]
    assert all(forward > 0 and backward > 0 for forward, backward, _ in numbers)
    whole = sum(forward + backward for forward, backward, _ in numbers)
    assert [share for *_, share in numbers] == pytest.approx([100 * (f + b) / whole for f, b, _ in numbers], abs=0.5)
    assert re.fullmatch(r"layers \S+ ms, each waited for; a step without that \S+ ms, [\d,]+ images/s; medians of 5", total)
    assert float(total.split()[1]) == pytest.approx(whole, abs=0.06)


# ---- statistics, TensorBoard


def test_inspect(tmp_path):
    said = assert_ended_well(train(tmp_path, *RUN, "--inspect", "-o", "it"))
    told = [event for event in events(tmp_path / "it") if event["event"] == "inspect"]
    assert [event["epoch"] for event in told] == [1, 2, 3]
    layers = told[-1]["layers"]
    assert list(layers) == ["conv", "bn", "drop", "mean", "classifier"]
    assert layers["conv"].keys() > layers["mean"].keys() and 0 < layers["bn"]["output_zeros"] < 1
    head = next(index for index, line in enumerate(said) if line.split()[:1] == ["layer"])
    assert said[head].split() == ["layer", "mean", "std", "zeros", "gradient", "weight", "dweight", "update"]
    for line, (name, row) in zip(said[head + 1:head + 6], layers.items(), strict=True):
        cells = line.split()
        assert cells[0] == name and cells[1] == f"{row['output_mean']:.1e}"
        assert cells[-1] == (f"{row['update_ratio']:.1e}" if "update_ratio" in row else "-")
    assert said.count(said[head]) == 1 and said[3].split()[0] == "1/3" and said[5].split()[0] == "3/3", "in one piece"
    assert digests_equal_without(tmp_path, "--inspect")


def digests_equal_without(tmp_path, flag):
    """Whether the run `it` is that without the flag, bit for bit."""
    assert_ended_well(train(tmp_path, *RUN, "-o", f"without{flag}"))
    return digests(tmp_path / f"without{flag}" / "last.npz") == digests(tmp_path / "it" / "last.npz")


def scalars(folder):
    """{tag: {step: value}} of the event files in a folder: records of length, its checksum, an Event, its checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = {}
    for path in sorted(folder.iterdir()):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            (length,) = struct.unpack_from("<Q", raw, at)
            event = event_pb2.Event.FromString(raw[at + 12:at + 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
            at += 16 + length
    return found


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX", reason="pip install 'minidl[tensorboard]'")
    assert_ended_well(train(tmp_path, *RUN, "--tensorboard", "--val-split", "10", "-o", "it"))
    with (tmp_path / "it" / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    found = scalars(tmp_path / "it" / "tensorboard")
    tags = {column: re.sub("^(train|val|test)_", r"\1/", column) for column in table[0] if column != "epoch"}
    assert {"train/loss", "val/top1", "test/top5", "lr", "images_per_second"} < found.keys() == set(tags.values())
    for column, tag in tags.items():
        assert found[tag] == pytest.approx({int(row["epoch"]): float(row[column]) for row in table}, rel=1e-6)


def test_no_tensorboard(tmp_path):
    result = train(tmp_path, *RUN, "--tensorboard", before=lambda: sys.modules.update(tensorboardX=None))
    assert result.returncode == 2 and result.stdout == "" and left_by(tmp_path) == []
    assert result.stderr == 'error: the package tensorboardX is needed: `pip install "minidl[tensorboard]"`\n'


# ---- validation


def new_run(**given):
    given = {"arch": "small", "dataset": "digits", "device": "cpu", "batch_size": 8, **given}
    return runs.new_run(resolve(given, recipe("fast", "small", "digits")))


def contents(batches, indices=None):
    """The images of Batches, or those that `indices` choose, and their labels, as bytes."""
    indices = range(batches.size) if indices is None else indices
    return [batches.images[index].tobytes() + bytes([batches.labels[index]]) for index in indices]


def test_held_out_images_are_never_trained_on():
    run = new_run(val_split=10, epochs=20)
    everything = new_run().train_batches
    assert len(set(contents(everything))) == 48, "no two are equal"
    held_out = set(contents(run.val_batches))
    assert run.val_batches.size == len(held_out) == 10
    assert set(contents(run.train_batches)) == set(contents(everything)) - held_out
    seen = {image for epoch in range(20) for batch in run.batches(epoch)
            for image in contents(run.train_batches, batch.indices)}
    assert len(seen) == 38 and not seen & held_out
    assert not set(contents(run.test_batches)) & (held_out | seen)


def test_which_are_held_out_is_a_function_of_the_seed():
    def held_out(**given):
        return contents(new_run(val_split=10, **given).val_batches)

    assert held_out(seed=3) == held_out(seed=3, epochs=7, batch_size=4, lr=0.1, flip=True)
    assert len({tuple(held_out(seed=seed)) for seed in range(5)}) == 5


def test_patience(tmp_path):
    """The best epoch is the first with the highest accuracy; so many epochs later it ends, with the last epoch's result on the
    test set as its own."""
    said = assert_ended_well(train(tmp_path, *RUN[:-1], "60", "--val-split", "16", "--patience", "3", "-o", "it"))
    folder = tmp_path / "it"
    accuracies = [float(row["val_top1"]) for row in rows(folder)]
    best, epochs = accuracies.index(max(accuracies)) + 1, len(accuracies)
    assert epochs == best + 3 < 60
    last, at_best = rows(folder)[-1], rows(folder)[best - 1]
    assert said[-3] == (f"after epoch {epochs} of 60, no better in 3: test top-1 {float(last['test_top1']):.2%}, "
                        f"top-5 {float(last['test_top5']):.2%}, loss {float(last['test_loss']):.3f}")
    assert said[-2] == (f"best on validation ({max(accuracies):.2%}), epoch {best}: "
                        f"test top-1 {float(at_best['test_top1']):.2%}, top-5 {float(at_best['test_top5']):.2%}")

    run = new_run(val_split=16)
    for file, row in (("best.npz", at_best), ("last.npz", last)):
        state, metadata = load(folder / file)
        run.network.load_state_dict(state)
        found = {f"{part}_{name}": f"{value:.5f}" for part, metrics in (("val", run.validate()), ("test", run.test()))
                 for name, value in vars(metrics).items()}
        names = ("val_loss", "val_top1", "test_loss", "test_top1", "test_top5")
        assert {name: found[name] for name in names} == {name: row[name] for name in names}, file
        assert metadata["arch"] == "small"

    again = assert_ended_well(train(tmp_path, "--resume", "it"))
    assert again[-2].startswith(f"it is finished: {epochs} epochs of 60, test top-1 ")


def test_without_validation_there_is_no_best(tmp_path):
    assert_ended_well(train(tmp_path, *RUN, "-o", "it"))
    assert not (tmp_path / "it" / "best.npz").exists() and "val_loss" not in rows(tmp_path / "it")[0]


def test_validation_changes_no_training_but_by_its_images(tmp_path):
    """With one image held out and 47 left, an epoch has as many steps; metrics of validation are those of that image."""
    assert_ended_well(train(tmp_path, *RUN, "--val-split", "1", "-o", "it"))
    for row in rows(tmp_path / "it"):
        assert row["val_top1"] in ("0.00000", "1.00000") and float(row["val_loss"]) > 0
    network = models.create("small", 10).initialize()
    state, _ = load(tmp_path / "it" / "last.npz")
    network.load_state_dict(state)
    test_set = data.load("digits")[1]
    metrics = evaluate(network, Batches(test_set, network.device, network.dtype, 4, seed=0))
    assert f"{metrics.loss:.5f}" == rows(tmp_path / "it")[-1]["test_loss"]


def test_shares_of_mixup(few_digits):
    """The larger one of each pair's, drawn anew for each step of each epoch."""
    for alpha, mean in ((1.0, 0.75), (0.2, 0.9)):
        run = new_run(mixup=alpha, epochs=40)
        shares = np.array([[float(batch.share[0]) for batch in run.batches(epoch)] for epoch in range(40)])
        assert shares.min() >= 0.5 and abs(shares.mean() - mean) < 0.05
        assert len({tuple(row) for row in shares.tolist()}) == 40


def test_a_trial_reads_what_it_wrote(few_digits, tmp_path):
    def patch():
        def refuse(path):
            raise CheckpointError(f"{path} cannot be read")

        checkpoint.load = refuse

    result = train(tmp_path, *ARGUMENTS, "--fast-dev-run", before=patch)
    assert result.returncode == 5 and "resume work" not in result.stdout


def test_a_trial_where_nothing_can_be_written(few_digits, tmp_path):
    def patch():
        tempfile.tempdir, tempfile._candidate_tempdir_list = None, lambda: ["nowhere"]

    result = train(tmp_path, *ARGUMENTS, "--fast-dev-run", before=patch)
    assert result.returncode == 5 and result.stderr.startswith("error: a trial writes a checkpoint, too: No usable temporary dir")


def test_the_constants_of_a_setting_normalize_all_images(few_digits):
    run, mean, std = new_run(normalize="imagenet", val_split=10), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for batches in (run.train_batches, run.val_batches, run.test_batches):
        x, _ = batches.load(np.zeros(8, np.int32), run.network.step)
        expected = (batches.images[0] / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
        assert x[..., 0] == pytest.approx(expected, abs=1e-5)
    assert (run.about()["mean"], run.about()["std"]) == ([*mean], [*std])


def test_the_average_is_evaluated(few_digits):
    run = new_run(ema=0.9, val_split=10)
    run.trainer.epoch(run.batches(0))
    with run.average.swapped():
        expected = [evaluate(run.network, batches) for batches in (run.val_batches, run.test_batches)]
    assert [run.validate(), run.test()] == expected
    assert run.test() != evaluate(run.network, run.test_batches)


def test_tensorboard_sees_each_epoch_at_once(tmp_path):
    folder, told = RunFolder.new(tmp_path / "it"), []
    folder._tensorboard = SimpleNamespace(add_scalar=lambda *scalar: told.append(scalar), flush=lambda: told.append("flushed"))
    folder.add_metrics([{"epoch": "1", "test_top1": "0.5"}])
    assert told == [("test/top1", 0.5, 1), "flushed"]


def test_tensorboard_where_nothing_can_be_written(tmp_path, monkeypatch, capsys):
    """As of a run that goes on in a folder that is read-only now."""
    monkeypatch.setattr(run_folder, "tensorboard_writer", lambda: os.mkdir)
    folder = RunFolder.new(tmp_path / "it")
    (folder.path / "tensorboard").touch()
    folder.start_tensorboard()
    folder.add_metrics([{"epoch": "1"}])
    folder.close()
    assert capsys.readouterr().err == f"warning: {folder.path / 'tensorboard'}: File exists; the run goes on\n"
