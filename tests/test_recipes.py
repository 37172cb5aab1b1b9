"""The recipes against the tables that they are from, written down here by hand, and a trial of each.

fast: a schedule for 50 epochs. paper: the authors' released code. report: what a student report states, and leaves open.
"""

import argparse
import os
from types import SimpleNamespace

import numpy as np
import pytest

import models
from minidl import data
from minidl.commands import runs, train
from minidl.data import cifar
from minidl.layers import ChannelDropout, Dropout
from minidl.run import Run
from minidl.settings import NORMALIZATIONS, Settings, resolve
from models.recipes import FAMILIES, recipe

CIFAR100 = os.environ.get("MINIDL_TEST_CIFAR100")
FAMILY_MEMBERS = ["simplenet-5m", "simplenet-310k", "resnext29-8x64d", "resnext29-32x4d", "res2next29-6c24w4s", "wrn-28-10",
                  "wrn-16-4", "report-simplenet", "report-resnext2", "report-wideresnet4"]
UNUSED = dict(label_smoothing=0.0, mixup=0.0, ema=0.0, cutout=0, clip_norm=0.0, time_budget=None, limit_train_batches=None,
              ranks=1, seed=0, precision="fp32")
NESTEROV = dict(optimizer="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4)


def settings(name, arch, dataset="cifar100", **given) -> Settings:
    return resolve({"arch": arch, "dataset": dataset, **given}, recipe(name, arch, dataset))


def rates(chosen, steps_per_epoch):
    """The learning rate of each step of the whole schedule, (epochs, steps)."""
    schedule = Run.schedule(SimpleNamespace(settings=chosen, steps_per_epoch=steps_per_epoch))
    every = [schedule(step) for step in range(chosen.epochs * steps_per_epoch)]
    return np.reshape(every, (chosen.epochs, steps_per_epoch))


def assert_has(chosen, **expected):
    actual = chosen.as_dict()
    assert {name: actual.get(name) for name in expected} == expected


# ---- fast: 50 epochs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", FAMILY_MEMBERS)
def test_fast(arch):
    chosen = settings("fast", arch)
    assert_has(chosen, **UNUSED, recipe="fast", epochs=50, batch_size=128, **NESTEROV, lr=0.1, sched="cosine",
               warmup_epochs=2.0, milestones=[], restart_at_milestones=False, padding=4, flip=True, normalize="dataset",
               reflect="wrn" in arch or "wideresnet" in arch, val_split=0, patience=0, model_kwargs={})


def test_fast_warms_up_from_a_tenth_and_ends_at_zero():
    """390 steps an epoch, 19,500 in all."""
    lr = rates(settings("fast", "wrn-28-4"), 390).ravel()
    assert lr.size == 19_500
    assert lr[0] == pytest.approx(0.01) and lr[390] == pytest.approx(0.055) and lr[780] == 0.1 == lr.max()
    assert np.allclose(np.diff(lr[:781]), 0.09 / 780), "linear"
    middle = 780 + (19_500 - 780) // 2
    assert lr[middle] == pytest.approx(0.05)
    assert (np.diff(lr[780:]) < 0).all() and 0 < lr[-1] < 1e-8


def test_fast_learning_rate_goes_with_the_batch():
    assert settings("fast", "resnext29-8x64d", batch_size=256).lr == pytest.approx(0.2)
    assert settings("fast", "res2next29-6c24w4s", batch_size=64).lr == pytest.approx(0.05)


def test_channel_dropout_of_the_fast_and_the_paper_simplenet():
    """0.1 after each of the five pools of the 5M network; none in the small one."""
    for name in ("fast", "paper"):
        for arch, expected in (("simplenet-5m", [0.1] * 5), ("simplenet-310k", [])):
            network = models.create(arch, 100, **settings(name, arch).model_kwargs)
            dropouts = [layer for _, layer in network.named_layers() if isinstance(layer, (ChannelDropout, Dropout))]
            assert [type(layer) for layer in dropouts] == [ChannelDropout] * len(expected)
            assert [layer.rate for layer in dropouts] == expected


# ---- paper: the authors' own ---------------------------------------------------------------------------------------


# {architecture: (steps an epoch, {first epoch, counted from 1: learning rate})}, the last entry: epochs in all.
SCHEDULES = {
    "wrn-28-10": (390, {1: 0.1, 60: 0.02, 120: 0.004, 160: 0.0008}, 200),
    "resnext29-8x64d": (390, {1: 0.1, 148: 0.01, 223: 0.001}, 300),
    "res2next29-6c24w4s": (781, {1: 0.05, 151: 0.005, 226: 0.0005}, 300),
    "simplenet-5m": (500, {1: 0.1, 101: 0.01, 191: 1e-3, 307: 1e-4, 391: 1e-5, 441: 1e-6, 541: 1e-7}, 550),
    # 120,800 iterations of 64 images, drops after 50,000 and 95,000.
    "simplenet-310k": (781, {1: 0.1, 65: 0.01, 123: 0.001}, 155),
}


@pytest.mark.parametrize("arch", SCHEDULES)
def test_paper_schedule(arch):
    steps, drops, epochs = SCHEDULES[arch]
    chosen = settings("paper", arch)
    lr = rates(chosen, steps)
    assert chosen.epochs == len(lr) == epochs and 50_000 // chosen.batch_size == steps
    assert (lr == lr[:, :1]).all(), "one rate in an epoch"
    expected = np.zeros(epochs)
    for first, value in drops.items():
        expected[first - 1:] = value
    assert np.allclose(lr[:, 0], expected, rtol=1e-12)


@pytest.mark.parametrize("arch", ["wrn-28-10", "wrn-16-4", "report-wideresnet2"])
def test_paper_wide_resnet(arch):
    assert_has(settings("paper", arch), **UNUSED, **NESTEROV, batch_size=128,
               padding=4, reflect=True, flip=True, normalize="cifar10", restart_at_milestones=True, warmup_epochs=0.0,
               val_split=0, patience=0, model_kwargs=dict(gamma="uniform"))


@pytest.mark.parametrize("arch", ["resnext29-8x64d", "resnext29-16x64d", "report-resnext1"])
def test_paper_resnext(arch):
    assert_has(settings("paper", arch), **UNUSED, **NESTEROV, batch_size=128,
               padding=4, reflect=False, flip=True, normalize="dataset", restart_at_milestones=False, warmup_epochs=0.0,
               val_split=0, patience=0, model_kwargs={})


@pytest.mark.parametrize("arch", ["res2next29-6c24w4s", "res2next29-8c25w4s"])
def test_paper_res2net(arch):
    assert_has(settings("paper", arch), **UNUSED, **NESTEROV, batch_size=64,
               padding=4, reflect=False, flip=True, normalize="imagenet", restart_at_milestones=False, warmup_epochs=0.0,
               val_split=0, patience=0, model_kwargs={})


@pytest.mark.parametrize("arch, batch_size, weight_decay", [
    ("simplenet-5m", 100, 0.002), ("report-simplenet", 100, 0.002), ("simplenet-310k", 64, 1e-4), ("simplenet-460k", 64, 1e-4)])
def test_paper_simplenet(arch, batch_size, weight_decay):
    assert_has(settings("paper", arch), **UNUSED, optimizer="adadelta", rho=0.9, eps=1e-3, weight_decay=weight_decay,
               batch_size=batch_size, padding=4, reflect=False, flip=True, normalize="dataset", restart_at_milestones=False,
               warmup_epochs=0.0, val_split=0, patience=0, model_kwargs={}, momentum=None, nesterov=None)


def test_normalization_constants():
    """As the authors have them. Theirs are rounded to 0.1 on the scale 0..255, ours to 1e-4 on the scale 0..1."""
    def close(ours, theirs):
        return np.allclose(ours, np.divide(theirs, 255), rtol=0, atol=0.05 / 255 + 0.5e-4)

    mean, std = NORMALIZATIONS["cifar10"]
    assert close(mean, (125.3, 123.0, 113.9)) and close(std, (63.0, 62.1, 66.7))
    assert close(cifar.CIFAR100.mean, (129.3, 124.1, 112.4)) and close(cifar.CIFAR100.std, (68.2, 65.4, 70.4))
    assert NORMALIZATIONS["imagenet"] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert NORMALIZATIONS["none"] == ((0, 0, 0), (1, 1, 1)), "divided by 255, and nothing else"


def test_momentum_is_discarded_at_the_drops_of_a_wide_resnet():
    chosen = settings("paper", "wrn-10-1", "digits", epochs=200, batch_size=8, limit_train_batches=1, device="cpu")
    run = runs.new_run(chosen)
    optimizer = run.trainer.optimizer
    kept = []
    for run.epoch in range(200):
        optimizer.moments["velocity"][...] = 1
        run.begin_epoch()
        kept.append(bool(optimizer.moments["velocity"].all()))
        assert optimizer.moments["velocity"].any() == kept[-1], "all of it or nothing"
    assert [epoch for epoch, whole in enumerate(kept, start=1) if not whole] == [60, 120, 160]


# ---- report --------------------------------------------------------------------------------------------------------


ADAM = dict(UNUSED, epochs=50, batch_size=128, optimizer="adam", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-7, weight_decay=0.0,
            sched="constant", warmup_epochs=0.0, milestones=[], padding=0, reflect=False, flip=False, normalize="none",
            momentum=None, nesterov=None)


@pytest.mark.parametrize("arch", ["report-resnext1", "report-resnext3-fixed", "report-resnext2-flatten", "resnext29-8x64d",
                                  "res2next29-6c24w4s"])
def test_report_resnext(arch):
    assert_has(settings("report", arch), **ADAM, val_split=0, patience=0, model_kwargs={})


@pytest.mark.parametrize("arch", ["report-wideresnet1", "report-wideresnet6", "wrn-16-2"])
def test_report_wide_resnet(arch):
    """5,000 images are held out, and ten epochs without a better accuracy on them end it; Dense layers have He's values."""
    assert_has(settings("report", arch), **ADAM, val_split=5000, patience=10, model_kwargs={"classifier": "he"})


@pytest.mark.parametrize("arch", ["report-simplenet", "simplenet-5m"])
def test_report_simplenet(arch):
    chosen = settings("report", arch)
    assert_has(chosen, **ADAM, val_split=0, patience=0)
    network = models.create(arch, 100, **chosen.model_kwargs)
    layers = dict(network.named_layers())
    dropouts = {name: layer.rate for name, layer in layers.items() if isinstance(layer, (ChannelDropout, Dropout))}
    assert dropouts == {f"drop{number}": 0.2 for number in range(1, 13)}
    assert not any(isinstance(layer, ChannelDropout) for layer in layers.values())
    weight = network.initialize(seed=1).state_dict()["conv10.weight"]  # 1.2 million numbers
    assert weight.std() == pytest.approx(np.sqrt(2 / (256 * 9)), rel=5e-3)
    assert np.abs(weight).max() > 4 * weight.std(), "normal, not uniform"


def test_report_learning_rate_never_changes():
    assert (rates(settings("report", "report-resnext1", batch_size=256), 195) == 1e-3).all()


# ---- all -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fast", "paper", "report"])
@pytest.mark.parametrize("dataset", data.NAMES)
def test_every_architecture_has_every_recipe(name, dataset):
    """And its network can be built with the options of the recipe."""
    for arch, architecture in models.REGISTRY.items():
        chosen = settings(name, arch, dataset)
        assert chosen.recipe == name and chosen.arch == arch and chosen.dataset == dataset
        architecture.create(10, chosen.model_kwargs)
    assert FAMILIES.keys() == {architecture.builder for architecture in models.REGISTRY.values()}


@pytest.mark.parametrize("name", ["fast", "paper", "report"])
def test_digits_are_as_they_are(name):
    """A mirrored digit is none, and all lie alike."""
    for arch in FAMILY_MEMBERS:
        assert_has(settings(name, arch, "digits"), padding=0, reflect=False, flip=False)


def test_digits_are_few():
    assert_has(settings("fast", "wrn-10-1", "digits"), epochs=3, batch_size=16, lr=0.0125)
    assert settings("report", "wrn-10-1", "digits").val_split == 143, "a tenth, as of CIFAR"


SMALL = ["simplenet-310k", "resnext29-2x8d", "res2next29-2c8w4s", "wrn-10-1", "report-resnext3"]
TRIALS = [*(("paper", arch) for arch in SMALL), ("report", "wrn-16-2"), ("report", "simplenet-310k"),
          ("report", "report-resnext1"), ("fast", "res2next29-2c8w4s")]


def trial(capsys, name, arch, *more):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    train.main(parser.parse_args(["--recipe", name, "--arch", arch, "--fast-dev-run", "--batch-size", "8", "--device", "cpu",
                                  *more]))
    output = capsys.readouterr()
    assert output.err == "" and output.out.splitlines()[-1].startswith("trial: 2 steps, "), output
    return output.out


@pytest.mark.parametrize("name, arch", TRIALS)
def test_trial_on_digits(capsys, name, arch):
    assert f"| {arch}: " in trial(capsys, name, arch, "--dataset", "digits")


@pytest.mark.skipif(not CIFAR100, reason="MINIDL_TEST_CIFAR100 names no folder with the genuine files")
@pytest.mark.parametrize("name, arch", [trial for trial in TRIALS if trial[1] != "report-resnext1"])
def test_trial_on_cifar100(capsys, name, arch):
    output = trial(capsys, name, arch, "--dataset", "cifar100", "--data-dir", CIFAR100)
    images = "45,000 training, 5,000 validation, " if (name, arch) == ("report", "wrn-16-2") else "50,000 training, "
    assert f"| cifar100: {images}10,000 test images | {arch}: " in output


def test_the_longest_warmup():
    assert rates(settings("fast", "wrn-28-4", epochs=3), 100).argmax() == 60, "a fifth of all steps, not two epochs"
    assert rates(settings("fast", "wrn-28-4", epochs=3, sched="onecycle"), 100).argmax() == 105


def test_sgd_in_place_of_the_optimizer_of_a_recipe():
    """Its rate is that of 128 images, whatever batches the recipe has."""
    it = settings("paper", "simplenet-5m", optimizer="sgd")
    assert (it.batch_size, it.lr) == (100, 0.1 * 100 / 128)
