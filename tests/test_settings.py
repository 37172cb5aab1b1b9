"""Settings: where their values come from, what is refused, and that TOML gives back what it was given."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import models
from minidl import data, settings
from minidl.commands import run_settings, train
from minidl.data.batches import Augmentation
from minidl.errors import UsageError
from minidl.settings import Settings, duration, read_toml, resolve, save_interval, scaled
from models.recipes import recipe
from test_failures import run_of

ROOT = Path(__file__).parent.parent


def chosen(*arguments) -> Settings:
    """What the command line `arguments` comes to."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return run_settings.chosen(parser.parse_args([*map(str, arguments), "--device", "cpu"]))


def toml(folder, text):
    path = folder / "it.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def resolved(name="fast", arch="wrn-28-4", **given):
    return resolve({"arch": arch, "dataset": "cifar100", **given}, recipe(name, arch, "cifar100"))


# ---- who wins ------------------------------------------------------------------------------------------------------


def test_flags_win_over_the_file_that_over_the_recipe_and_that_over_the_defaults(tmp_path):
    file = toml(tmp_path, 'arch = "wrn-16-4"\nbatch_size = 32\nseed = 7\nmomentum = 0.8\n[model_kwargs]\ndropout = 0.3\n'
                          'gamma = "uniform"\n')
    it = chosen("--config", file, "--seed", 9, "--model-kwargs", "dropout=0.5", "--dataset", "cifar10")
    assert (it.seed, it.dataset) == (9, "cifar10")                                 # flags
    assert (it.arch, it.batch_size, it.momentum) == ("wrn-16-4", 32, 0.8)          # file
    assert it.model_kwargs == {"dropout": 0.5, "gamma": "uniform"}                 # one of each
    assert (it.epochs, it.weight_decay, it.reflect, it.warmup_epochs) == (50, 5e-4, True, 2.0)  # recipe
    assert (it.val_split, it.mixup, it.save_every) == (0, 0.0, "10m")              # defaults


def test_a_flag_can_take_back_what_the_file_or_the_recipe_says(tmp_path):
    file = toml(tmp_path, 'arch = "wrn-16-4"\nsched = "multistep"\nmilestones = [10]\nrestart_at_milestones = true\n')
    it = chosen("--config", file, "--no-restart-at-milestones", "--no-flip", "--milestones", "--sched", "constant")
    assert (it.restart_at_milestones, it.flip, it.milestones, it.sched) == (False, False, [], "constant")


def test_a_folder_of_data_is_one_from_wherever_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/it")
    assert [chosen("--arch", "wrn-10-1", "--data-dir", it).data_dir for it in ("data", "../data", "/data", "~/data")] == [
        f"{tmp_path}/data", f"{tmp_path.parent}/data", "/data", "/home/it/data"]
    (tmp_path / "it.toml").write_text('data_dir = "data"\n')
    assert chosen("--arch", "wrn-10-1", "--config", str(tmp_path / "it.toml")).data_dir == f"{tmp_path}/data"
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UsageError, match="^data_dir data: the present folder, which this begins at, is gone$"):
        chosen("--arch", "wrn-10-1", "--data-dir", "data")


def test_the_file_chooses_the_device_and_the_recipe(tmp_path):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    file = toml(tmp_path, 'device = "cpu"\nrecipe = "paper"\narch = "resnext"\n')
    it = run_settings.chosen(parser.parse_args(["--config", str(file)]))
    assert (it.device, it.recipe, it.arch, it.epochs) == ("cpu", "paper", "resnext29-2x64d", 300)
    (tmp_path / "it.toml").write_text('device = "gpu"')
    with pytest.raises(UsageError, match="device 'gpu' is not one of auto, cpu, cuda, cuda:N"):
        run_settings.chosen(parser.parse_args(["--config", str(file)]))


def test_without_anything_digits_on_a_cpu():
    it = chosen()
    assert (it.arch, it.dataset) == ("simplenet-310k", "digits")
    assert chosen("--arch", "wrn-16-2").dataset == chosen("--data-dir", "there").dataset == "cifar100"


@pytest.mark.parametrize("name, arch, given, lr", [
    ("fast", "wrn-28-4", dict(batch_size=32), 0.025),
    ("fast", "wrn-28-4", dict(batch_size=32, lr=0.3), 0.3),
    ("paper", "res2next29-6c24w4s", dict(batch_size=128), 0.1),
    ("report", "wrn-28-4", dict(batch_size=32), 1e-3),
    ("paper", "simplenet-5m", dict(batch_size=32), 0.1),             # AdaDelta's
    ("report", "wrn-28-4", dict(batch_size=32, optimizer="sgd"), 0.025),
    ("fast", "wrn-28-4", dict(batch_size=32, optimizer="adam"), 1e-3),
    ("fast", "wrn-28-4", dict(optimizer="adadelta"), 1.0)])
def test_only_the_learning_rate_of_sgd_goes_with_the_batch(name, arch, given, lr):
    assert resolved(name, arch, **given).lr == pytest.approx(lr, rel=1e-15)


def test_another_optimizer_has_its_own_hyperparameters():
    it = resolved(optimizer="adam")
    assert it.hyperparameters() == {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    assert it.momentum is it.nesterov is it.rho is None
    assert resolved(optimizer="adamw").hyperparameters()["weight_decay"] == 0.01
    assert resolved("report", optimizer="sgd").hyperparameters() == {"momentum": 0.9, "weight_decay": 0.0, "nesterov": True}
    assert resolved(optimizer="adam", weight_decay=1e-4, beta2=0.95).hyperparameters() == {
        "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 1e-4}
    assert resolved(optimizer="sgd") == resolved(), "the recipe's own is not another one"


@pytest.mark.parametrize("optimizer, name, value, has", [
    ("adam", "momentum", 0.9, "beta1, beta2, eps, weight_decay"), ("sgd", "beta1", 0.9, "momentum, weight_decay, nesterov"),
    ("adamw", "rho", 0.9, "beta1, beta2, eps, weight_decay"), ("adadelta", "nesterov", True, "rho, eps, weight_decay")])
def test_a_hyperparameter_of_another_optimizer_is_refused(optimizer, name, value, has):
    with pytest.raises(UsageError, match=f"^{name} is not a setting of the optimizer {optimizer}, which has {has}$"):
        resolved(optimizer=optimizer, **{name: value})


def test_every_hyperparameter_is_a_setting():
    assert set(settings.HYPERPARAMETERS) <= settings.FIELDS.keys()


def test_milestones_keep_their_place_in_proportion(tmp_path):
    assert resolved("paper", epochs=100).milestones == [30, 60, 80]  # of 59, 119, 159 in 200
    assert resolved("paper", epochs=400).milestones == [118, 238, 318]
    assert resolved("paper", epochs=1).milestones == [1, 1, 1], "never before the first epoch is done"
    assert resolved("paper", epochs=100, milestones=[7]).milestones == [7], "what is given is meant"
    file = toml(tmp_path, resolved("paper").as_toml())
    assert chosen("--config", file, "--epochs", 100).milestones == [30, 60, 80]
    assert chosen("--config", file, "--epochs", 100, "--milestones", 50).milestones == [50]
    assert resolved("paper").with_epochs(20) == resolved("paper", epochs=20)
    assert scaled([10, 20], 1.5) == [15, 30]


def test_milestones_and_a_time_budget(tmp_path):
    """They keep their proportion to the epochs that they were written for, however often the settings go round."""
    steps = "--arch", "wrn-10-1", "--dataset", "digits", "--sched", "multistep"
    file = toml(tmp_path, chosen(*steps, "--epochs", "4", "--milestones", "2", "3").as_toml())
    budget = chosen("--config", file, "--time-budget", "1h")
    assert (budget.epochs, budget.milestones) == (4, [2, 3])
    again = chosen("--config", toml(tmp_path, budget.as_toml()))
    assert again == budget and again.with_epochs(40).milestones == [20, 30]
    for refused in ((*steps, "--milestones", "2", "3", "--time-budget", "1h"),
                    ("--config", file, "--milestones", "1", "--time-budget", "1h"),
                    ("--config", toml(tmp_path, 'arch = "wrn-10-1"\nsched = "multistep"\nmilestones = [1, 2]\ntime_budget = "1h"\n'))):
        with pytest.raises(UsageError, match="^milestones count epochs, whose number the time budget decides: "):
            chosen(*refused)
    with pytest.raises(UsageError, match="^epochs and time_budget exclude each other"):
        chosen("--config", file, "--epochs", "3", "--time-budget", "1h")
    recipe_s = chosen("--arch", "wrn-10-1", "--recipe", "paper", "--time-budget", "1h")
    assert chosen("--config", toml(tmp_path, recipe_s.as_toml())) == recipe_s


def test_another_schedule_drops_what_is_of_multistep():
    it = resolved("paper", sched="cosine")
    assert (it.milestones, it.restart_at_milestones) == ([], False)


def test_epochs_or_a_time_budget(tmp_path):
    with pytest.raises(UsageError, match="epochs and time_budget exclude each other"):
        chosen("--epochs", 3, "--time-budget", "1h")
    with pytest.raises(UsageError, match="epochs and time_budget exclude each other"):
        chosen("--config", toml(tmp_path, 'epochs = 3\ntime_budget = "1h"'))
    it = chosen("--config", toml(tmp_path, 'time_budget = "1h"'), "--epochs", 3)
    assert (it.epochs, it.time_budget) == (3, None)
    it = chosen("--config", toml(tmp_path, 'epochs = 3'), "--time-budget", "1h")
    assert it.time_budget == "1h"


# ---- refused -------------------------------------------------------------------------------------------------------


VALUES = [  # name, value, what is said
    ("epochs", 0, "epochs is 0: it must be at least 1"),
    ("epochs", 2.0, "epochs is 2.0: it must be a whole number"),
    ("epochs", True, "epochs is True: it must be a whole number"),
    ("epochs", "3", "epochs is '3': it must be a whole number"),
    ("epochs", 10**30, f"epochs is {10**30}: it must be below 2**63"),
    ("epochs", 10**200, f"epochs is {10**99}...: it must be below 2**63"),
    ("seed", -1, "seed is -1: it must be at least 0"),
    ("lr", float("nan"), "lr is nan: it must be a number below 3.4e38"),
    ("lr", float("inf"), "lr is inf: it must be a number below 3.4e38"),
    ("lr", 1e39, "lr is 1e+39: it must be a number below 3.4e38"),
    ("lr", 10**309, f"lr is {10**99}...: it must be a number below 3.4e38"),
    ("lr", -0.1, "lr is -0.1: it must be at least 0"),
    ("lr", "fast", "lr is 'fast': it must be a number"),
    ("momentum", 1.1, "momentum is 1.1: it must be from 0 to 1, but not 1"),
    ("momentum", 1, "momentum is 1: it must be from 0 to 1, but not 1"),
    ("eps", 0, "eps is 0: it must be at least 1.2e-38"),
    ("beta1", 1, "beta1 is 1: it must be from 0 to 0.9999999"),
    ("beta2", 0.99999999, "beta2 is 0.99999999: it must be from 0 to 0.9999999"),
    ("data_dir", "a\0b", "data_dir is 'a\\x00b': it must be a text without a NUL"),
    ("padding", 32, "padding is 32: it must be from 0 to 31"),
    ("cutout", 33, "cutout is 33: it must be from 0 to 32"),
    ("milestones", 3, "milestones is 3: it must be a list of whole numbers"),
    ("milestones", [3, 1.5], "milestones is [3, 1.5]: it must be a whole number"),
    ("milestones", [0], "milestones is [0]: it must be at least 1"),
    ("flip", 1, "flip is 1: it must be true or false"),
    ("dataset", "mnist", "dataset is 'mnist': it must be one of cifar100, cifar10, digits"),
    ("dataset", ["digits"], "dataset is ['digits']: it must be a text"),
    ("model_kwargs", [1], "model_kwargs is [1]: it must be a table"),
    ("model_kwargs", {"dropout": [0.3]}, "it must be a table of texts, true, false, numbers below 3.4e38 and whole"),
    ("model_kwargs", {"dropout": float("nan")}, "it must be a table of texts, true, false, numbers below 3.4e38 and whole"),
    ("time_budget", "soon", "time_budget: 'soon' is not a time such as 6h, 30m, 90s or 1h30m"),
    ("time_budget", "0s", "time_budget: '0s' is not a time"),
    ("save_every", "often", "save_every: 'often' is not a time such as 6h, 30m, 90s or 1h30m, nor a number of steps"),
    ("save_every", "0", "save_every: '0' is not a time"),
    ("ranks", 65, "ranks is 65: it must be from 1 to 64"),
    ("patience", 3, "patience needs val_split"),
    ("milestones", [3], "milestones is of sched multistep, not cosine"),
    ("restart_at_milestones", True, "restart_at_milestones is of sched multistep, not cosine"),
    ("sched", "multistep", "sched multistep needs milestones: after how many epochs the rate drops"),
    ("colour", "blue", "unknown setting 'colour'"),
    ("x" * 1000, 1, "unknown setting 'xxx"),
]


def test_more_ranks_than_images_of_a_batch():
    with pytest.raises(UsageError, match="^ranks 3 cannot share a batch of 2$"):
        resolved(ranks=3, batch_size=2)


@pytest.mark.parametrize("name, value, said", VALUES, ids=lambda part: str(part)[:20])
def test_values(name, value, said):
    with pytest.raises(UsageError) as caught:
        resolved(**{name: value})
    message = str(caught.value)
    assert said in message and len(message) < 250 and "\n" not in message


@pytest.mark.parametrize("missing", ["arch", "dataset", "epochs", "batch_size", "optimizer", "lr", "sched"])
def test_what_has_no_default_is_needed(missing):
    """Of a checkpoint, too: what it does not say is not filled in."""
    with pytest.raises(UsageError, match=f"^{missing} must be set$"):
        Settings(**{name: value for name, value in resolved().as_dict().items() if name != missing})


def test_a_number_of_more_digits_than_python_writes():
    with pytest.raises(UsageError, match="^epochs is a number of thousands of digits: it must be below 2"):
        resolved(epochs=16**5000)


FILES = {  # {content: what is said after the path}
    b"": None,
    b"# nothing\n": None,
    b"epochs = 'three'": "epochs is 'three': it must be a whole number",
    b"epochs = inf": "epochs is inf: it must be a whole number",
    b"lr = nan": "lr is nan: it must be a number below 3.4e38",
    b"lr = -inf": "lr is -inf: it must be a number below 3.4e38",
    b"lr = 1e400": "lr is inf: it must be a number below 3.4e38",
    b"seed = 99999999999999999999": "seed is 99999999999999999999: it must be below 2**63",
    b"seed = 0x" + 9000 * b"f": "seed is a number of thousands of digits: it must be below 2**63",
    b"seed = " + 9000 * b"1": "cannot be read: Exceeds the limit",
    b"arch = 5": "arch is 5: it must be a text",
    b"epochs = 1979-05-27": "epochs is datetime.date(1979, 5, 27): it must be a whole number",
    b"[training]\nepochs = 3": "unknown setting 'training'",
    b"epochs.very = 3": "epochs is {'very': 3}: it must be a whole number",
    b"[model_kwargs.deep]\nx = 1": "model_kwargs is {'deep': {'x': 1}}: it must be a table of texts, true, false, numbers",
    b"[[milestones]]\nx = 1": "milestones is [{'x': 1}]: it must be a whole number",
    b"learning_rate = 0.1": "unknown setting 'learning_rate'",
    b'"\\n" = 1': r"unknown setting '\n'",
    b"epochs = 3\nepochs = 4": "cannot be read: Cannot overwrite a value",
    b"epochs": "cannot be read: Expected '=' after a key",
    b"epochs = 3 # \xff": "cannot be read: 'utf-8' codec can't decode byte 0xff",
    b"\x89PNG\r\n\x1a\n" + bytes(range(256)): "cannot be read: 'utf-8' codec can't decode byte 0x89",
    b"#" * 2_000_000: "cannot be read: it has more than 1,000,000 bytes",
    b"seed = " + b"[" * 400_000: "cannot be read: it is nested too deeply",
    b"arch = '" + b"x" * 900_000 + b"'\nepochs = 'x'": "epochs is 'x'",
}


@pytest.mark.parametrize("content", FILES, ids=lambda content: repr(content[:30]))
def test_files(tmp_path, content):
    path = toml(tmp_path, content)
    if FILES[content] is None:
        assert read_toml(path) == {}
        return
    with pytest.raises(UsageError) as caught:
        read_toml(path)
    said = str(caught.value)
    assert said.startswith(str(path)) and FILES[content] in said
    assert "\n" not in said and len(said) < 400, "one line"
    assert caught.value.exit_code == 2


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(UsageError, match=f"^{tmp_path} cannot be read: Is a directory$"):
        read_toml(tmp_path)
    with pytest.raises(UsageError, match=f"^{tmp_path}/none cannot be read: No such file or directory$"):
        read_toml(tmp_path / "none")


# ---- what a run makes of them ------------------------------------------------------------------------------------


def test_settings_reach_what_they_set():
    run = run_of("wrn-10-1", 8, padding=3, reflect=True, flip=False, cutout=5, label_smoothing=0.1, ema=0.75, clip_norm=0.5,
                 momentum=0.6, nesterov=False, weight_decay=0.01, val_split=30, seed=7)
    trainer = run.trainer
    assert trainer.augmentation == Augmentation(padding=3, reflect=True, flips=False, cutout=5)
    assert (trainer.label_smoothing, trainer.average.decay, trainer.optimizer.clip_norm) == (0.1, 0.75, 0.5)
    assert trainer.optimizer.settings == {"momentum": 0.6, "nesterov": False, "weight_decay": 0.01}
    assert (run.val_batches.size, run.train_batches.size) == (30, 1437 - 30)
    state, of_seed = run.network.state_dict(), models.create("wrn-10-1", 10).initialize(seed=7).state_dict()
    assert all(np.array_equal(array, of_seed[name]) for name, array in state.items())


# ---- TOML ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", data.NAMES)
def test_every_recipe_of_every_architecture_comes_back(tmp_path, dataset):
    for arch in models.REGISTRY:
        for name in ("fast", "paper", "report"):
            it = resolve({"arch": arch, "dataset": dataset, "device": "cpu"}, recipe(name, arch, dataset))
            assert chosen("--config", toml(tmp_path, it.as_toml())) == it


def test_every_setting_comes_back(tmp_path):
    it = resolved("paper", epochs=7, optimizer="adamw", lr=1e-7, beta1=0.1, beta2=1 / 3, eps=2.5e-30, weight_decay=12345.678,
                  clip_norm=1e15, warmup_epochs=0.1, milestones=[1, 2**62], factor=1.0, restart_at_milestones=True,
                  label_smoothing=1, mixup=0.2, ema=0.999, padding=31, reflect=False, cutout=32, val_split=10, patience=3,
                  limit_train_batches=5, save_every="90s", inspect=True, tensorboard=True, seed=2**63 - 1, precision="bf16",
                  ranks=2, device="cpu", data_dir="/there", model_kwargs={"dropout": 0.1, "gamma": "uniform"})
    assert chosen("--config", toml(tmp_path, it.as_toml())) == it
    budget = resolved(device="cpu", time_budget="1h30m")
    assert chosen("--config", toml(tmp_path, budget.as_toml())) == budget


LETTERS = "".join(map(chr, [*range(1, 0x3000), 0x2028, 0xfeff, 0xfffd, 0xffff, 0x1d538, 0x1f600, 0x10ffff]))
TEXTS = ["", " ", "'", '"', '"""', "'''", "\\", "\\n", "a\nb", "a\r\nb", "\x7f", "# no comment", "[table]", "x = 1",
         "Läufe ✓ 𝔸", "../a b", LETTERS]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text)[:20])
def test_any_text_comes_back(tmp_path, text):
    it = resolved(device="cpu", data_dir=text, model_kwargs={text: text, "x": text})
    assert read_toml(toml(tmp_path, it.as_toml())) == it.as_dict()


def test_a_path_that_is_not_utf8_can_be_written(tmp_path):
    """TOML has no letter for such a byte; whoever reads the file sees that something is there."""
    name = os.fsdecode("Läufe".encode("latin-1"))
    it = resolved(device="cpu", data_dir=name)
    assert read_toml(toml(tmp_path, it.as_toml()))["data_dir"] == "L\ufffdufe"
    whole = os.fsdecode("Läufe".encode())
    assert read_toml(toml(tmp_path, resolved(data_dir=whole).as_toml()))["data_dir"] == "Läufe"
    ascii_locale = "Läufe".encode().decode("ascii", "surrogateescape")  # as an argument comes where only ASCII is known
    assert read_toml(toml(tmp_path, resolved(data_dir=ascii_locale).as_toml()))["data_dir"] == "Läufe"


def test_printed_settings_are_a_file_of_settings(tmp_path):
    """Whatever the locale, and byte by byte."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = ["--device", "cpu", "--recipe", "paper", "--arch", "wideresnet", "--data-dir", "/Läufe 𝔸\n",
                 "--epochs", "30", "--model-kwargs", "dropout=0.3"]
    result = subprocess.run([sys.executable, ROOT / "train.py", *arguments, "--print-config"], cwd=tmp_path, env=environment,
                            capture_output=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, b"") and not list(tmp_path.iterdir())
    expected = chosen(*arguments)
    assert (expected.data_dir, expected.milestones, expected.model_kwargs) == ("/Läufe 𝔸\n", [9, 18, 24],
                                                                                  {"gamma": "uniform", "dropout": 0.3})
    assert result.stdout.decode("utf-8") == expected.as_toml()
    assert chosen("--config", toml(tmp_path, result.stdout)) == expected


def test_another_optimizer_or_schedule_than_that_of_the_file(tmp_path):
    """What the file says of its own is not that of the other."""
    of_paper = chosen("--arch", "wrn-10-1", "--dataset", "digits", "--recipe", "paper", "-b", "64")
    file = toml(tmp_path, of_paper.as_toml().encode())
    adam = chosen("--config", file, "--optimizer", "adam", "--beta1", "0.8")
    assert (adam.lr, adam.momentum, adam.beta1, adam.beta2, adam.weight_decay) == (1e-3, None, 0.8, 0.999, 0.0)
    assert (adam.batch_size, adam.sched, adam.milestones) == (64, "multistep", [59, 119, 159])
    cosine = chosen("--config", file, "--sched", "cosine")
    assert (cosine.milestones, cosine.restart_at_milestones, cosine.momentum, cosine.lr) == ([], False, 0.9, 0.05)
    assert chosen("--config", file, "--optimizer", "sgd", "--sched", "multistep") == chosen("--config", file)


# ---- times, flags --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, seconds", [("6h", 21600), ("30m", 1800), ("90s", 90), ("1h30m", 5400), ("1.5h", 5400),
                                           ("0.5s", 0.5), ("1h0m1s", 3601)])
def test_durations(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "10", "1d", "-1h", "1h 30m", "30m1h", "1e3s", "nans", "infs", "0h0m0s", " 1h",
                                  "9" * 400 + "h", "1h\n"])
def test_what_is_no_duration(text):
    with pytest.raises(UsageError, match="is not a time such as 6h, 30m, 90s or 1h30m"):
        duration(text)


def test_intervals_of_saving():
    assert save_interval("250") == (np.inf, 250) and save_interval("10m") == (600.0, 0)


def test_every_setting_is_a_flag_in_a_group_and_a_key_of_the_file(capsys):
    parser = argparse.ArgumentParser(prog="it")
    train.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = capsys.readouterr().out
    for name, spec in settings.FIELDS.items():
        assert shown.count(f"\n  --{name.replace('_', '-')}") + shown.count(f", --{name.replace('_', '-')} ") == 1, name
        assert spec.help and spec.help[0] != " "
    titles = [spec.begins for spec in settings.FIELDS.values() if spec.begins]
    assert list(settings.FIELDS)[0] == "arch" and len(titles) == len(set(titles)) == 7
    positions = [shown.index(f"\n{title}:\n") for title in titles]
    assert positions == sorted(positions)
    assert shown.startswith("usage: it [option ...]\n")


def test_a_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "it.toml").write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert read_toml(tmp_path / "it.toml") == {"seed": 3}
