"""Batches of a data set, epochs of training, and evaluation, against loops a child could follow."""

from dataclasses import replace

import numpy as np
import pytest

import reference
from minidl import blas, inspection, optim, random_keys
from minidl.data.batches import Augmentation, Batches
from minidl.data.dataset import Dataset
from minidl.device import select
from minidl.errors import DivergedError
from minidl.layers import BatchNorm2d, Conv2d, Dropout, GlobalAvgPool2d, Linear, Sequential
from minidl.ops import augment, loss
from minidl.ops import optimizer as optimizer_op
from minidl.training import MOST_SKIPPED_STEPS, Batch, Trainer, evaluate
from reference import assert_close

CPU = select("cpu")
CLASSES = 7


def dataset(size=23, side=6):
    rng = np.random.default_rng(1)
    return Dataset("random", rng.integers(0, 256, (size, 3, side, side), np.uint8), rng.integers(0, CLASSES, size, np.int32),
                   tuple("abcdefg"), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def batches(size=23, batch_size=5, seed=0, dtype="float64"):
    return Batches(dataset(size), CPU, np.dtype(dtype), batch_size, seed)


def small_network(dtype="float64"):
    return Sequential(conv=Conv2d(3, 8, 3), norm=BatchNorm2d(8, relu=True), drop=Dropout(0.2), mean=GlobalAvgPool2d(),
                      classifier=Linear(8, CLASSES)).initialize(CPU, dtype, seed=2)


def trainer(dtype="float64", **settings):
    network = small_network(dtype)
    return Trainer(network, optim.SGD(network.parameters), batches(dtype=dtype), **settings)


def epoch(it, lr, number=0):
    """The Batches of an epoch of a Trainer, all with one learning rate."""
    return [Batch(indices, lr) for indices in it.batches.epoch(number)]


# ---- batches


def test_an_epoch_shows_every_image_at_most_once_in_whole_batches():
    epoch = batches().epoch(0)
    assert [indices.shape for indices in epoch] == [(5,)] * 4  # 23 images: 3 are left out
    seen = np.concatenate(epoch)
    assert len(set(seen)) == 20 and seen.min() >= 0 and seen.max() < 23 and seen.dtype == np.int32
    everything = {index for number in range(30) for index in np.concatenate(batches().epoch(number))}
    assert everything == set(range(23)), "the images left out change"
    assert sorted(np.concatenate(batches(20).epoch(0))) == list(range(20)), "where they fill the batches, none is"


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return np.concatenate(batches(seed=seed).epoch(epoch)).tolist()

    assert order(3, 1) == order(3, 1)
    assert len({tuple(order(seed, epoch)) for seed in (3, 4) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("batch_size, valid", [(5, [5, 5, 5, 5, 3]), (23, [23]), (1, [1] * 23), (22, [22, 1])])
def test_all_images_once_in_order(batch_size, valid):
    parts = batches(batch_size=batch_size).all()
    assert [count for _, count in parts] == valid
    assert {indices.shape for indices, _ in parts} == {(batch_size,)}
    assert np.concatenate([indices[:count] for indices, count in parts]).tolist() == list(range(23))


def test_images_are_normalized_and_turned_to_channels_first_batch_last():
    indices = np.array([4, 0, 22, 4, 7], np.int32)
    x, labels = batches().load(indices, np.zeros(1, np.int64))
    data = dataset()
    expected = (data.images[indices] / 255 - np.reshape(data.mean, (3, 1, 1))) / np.reshape(data.std, (3, 1, 1))
    assert_close(x, np.moveaxis(expected, 0, -1), 1e-12)
    assert labels.tolist() == data.labels[indices].tolist()


def test_augmentation_depends_on_seed_and_step():
    indices = np.arange(5, dtype=np.int32)

    def images(seed, step):
        return batches(seed=seed).load(indices, np.array([step]), Augmentation(padding=2, flips=True))[0].tobytes()

    assert images(0, 1) == images(0, 1)
    assert len({images(seed, step) for seed in (0, 1) for step in (0, 1)}) == 4


@pytest.mark.parametrize("varied", [
    Augmentation(padding=2), Augmentation(padding=2, reflect=True), Augmentation(flips=True), Augmentation(cutout=3)])
def test_images_vary_as_their_augmentation_says(varied):
    data, indices, step = dataset(), np.array([4, 0, 22, 4, 7], np.int32), np.array([3])
    x, _ = batches(seed=9).load(indices, step, varied)
    draws, _ = augment.draw(indices, data.labels, step, (6, 6), key=random_keys.philox_key(9, random_keys.AUGMENT),
                            padding=varied.padding, flips=varied.flips, cutout=varied.cutout)
    how = data.mean, data.std, varied.padding, varied.reflect, varied.cutout
    expected = [reference.augment(data.images[i], *draws[:, n], *how) for n, i in enumerate(indices)]
    assert_close(x, np.stack(expected, axis=-1), 1e-12)
    assert not np.array_equal(x, batches(seed=9).load(indices, step)[0])


def test_refused():
    with pytest.raises(ValueError, match="batch size 24 is more than the 23 images of random"):
        batches(batch_size=24)
    with pytest.raises(ValueError, match="mirrored padding 6 reaches beyond images of 6x6"):
        batches().load(np.arange(5, dtype=np.int32), np.zeros(1, np.int64), Augmentation(padding=6, reflect=True))
    flat = Batches(replace(dataset(), images=np.zeros((23, 3, 4, 6), np.uint8)), CPU, "float64", 5, seed=0)
    with pytest.raises(ValueError, match="mirrored padding 4 reaches beyond images of 4x6"):
        flat.load(np.arange(5, dtype=np.int32), np.zeros(1, np.int64), Augmentation(padding=4, reflect=True))


# ---- training


def test_an_epoch_reports_the_mean_over_its_images_and_calls_back():
    it, calls = trainer(), []
    whole = it.epoch(epoch(it, 0.0), lambda *call: calls.append(call))  # rate 0: the network stays
    again = trainer()
    parts = [again.epoch([batch]) for batch in epoch(again, 0.0)]
    assert whole.loss == pytest.approx(np.mean([part.loss for part in parts]), rel=1e-12)
    assert whole.top1 == pytest.approx(np.mean([part.top1 for part in parts]))
    assert whole.top5 == pytest.approx(np.mean([part.top5 for part in parts])) and whole.top5 > whole.top1
    assert calls == [(1, None), (2, None), (3, None), (4, whole)]


def test_metrics_are_read_now_and_then(monkeypatch):
    monkeypatch.setattr("minidl.training.READ_EVERY", 2)
    it, calls = trainer(), []
    whole = it.epoch(epoch(it, 0.0), lambda done, metrics: calls.append(metrics))
    assert calls[0] is None and calls[1] is calls[2] and calls[1] != whole == calls[3]


def test_an_epoch_in_two_parts_is_the_same():
    """As a run that goes on in the middle of one: metrics are those of all of it."""
    whole, parts = trainer(), trainer()
    metrics = whole.epoch(epoch(whole, 0.1))
    parts.epoch(epoch(parts, 0.1)[:3])
    assert parts.epoch(epoch(parts, 0.1), first=3) == metrics
    assert np.array_equal(whole.network.parameters.master, parts.network.parameters.master)


def test_training_learns_labels_by_heart():
    it = trainer()
    first = it.epoch(epoch(it, 0.05))
    for number in range(1, 120):
        last = it.epoch(epoch(it, 0.05, number))
    assert last.loss < 0.6 * first.loss and last.top1 > first.top1


def test_each_step_counts_and_uses_its_own_learning_rate():
    it = trainer()
    it.optimizer.settings["momentum"] = 0.0
    moved = []
    for lr in (0.1, 0.0, 0.2):
        before = it.network.parameters.master.copy()
        it.epoch(epoch(it, lr)[:1])
        moved.append(np.abs(it.network.parameters.master - before - -lr * it.network.parameters.grad).max())
    assert max(moved) < 1e-15
    assert it.network.step[0] == 3, "dropout and augmentation change with it"


def test_trainers_in_turn_have_each_its_own_precision():
    """Steps and evaluations of one that may round to TF32, and of one that may not, are what they are without the other."""
    alone, taking_turns = ([trainer("float32", tf32=tf32) for tf32 in (False, True)] for _ in range(2))

    def results(group):
        for it in group:
            it.network.train()
        for number in range(3):
            for it in group:
                it.step(epoch(it, 0.1)[number])
        return [(it.evaluate(it.batches), it.network.parameters.master) for it in group]

    (exact, exact_weights), (rounded, rounded_weights) = results(taking_turns)
    for it, metrics, weights in zip(alone, (exact, rounded), (exact_weights, rounded_weights), strict=True):
        (expected, expected_weights), = results([it])
        assert metrics == expected
        assert np.array_equal(weights, expected_weights)
    assert exact != rounded and not np.array_equal(exact_weights, rounded_weights)
    assert not blas.allow_tf32


@pytest.mark.parametrize("shares", [(None, None, None), (0.9, 0.6, 1.0), (0.7, None, 0.8)])
def test_each_step_takes_its_own_images_rate_and_share(shares):
    augmentation = Augmentation(2, flips=True)
    it, network = trainer(augmentation=augmentation), small_network().train()
    optimizer, totals, one = optim.SGD(network.parameters), np.zeros(4), np.ones(1)
    it.network.train()
    for number, (indices, lr, share) in enumerate(zip(it.batches.epoch(0), (0.1, 0.3, 0.2), shares)):
        share = None if share is None else np.array([share])
        it.step(Batch(indices, lr, share))
        x, labels = it.batches.load(indices, np.array([number]), augmentation)
        mixed = {}
        if share is not None:
            augment.mix(x, share)
            mixed = {"other_labels": np.ascontiguousarray(labels[::-1]), "share": share}
        network.backward(loss.forward_backward(network.forward(x), labels, totals, one, **mixed))
        optimizer.step(lr)
    assert np.array_equal(it.network.parameters.master, network.parameters.master)


def test_a_batch_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"step: indices \(4,\) of a batch of 5 images"):
        trainer().step(Batch(np.arange(4, dtype=np.int32), 0.1))


def test_label_smoothing_reaches_the_loss():
    plain, smooth = trainer(), trainer(label_smoothing=0.5)
    assert plain.epoch(epoch(plain, 0.0)).loss != smooth.epoch(epoch(smooth, 0.0)).loss


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_no_number_ends_the_run(value):
    it = trainer()
    it.network.classifier.bias.master[...] = value
    with pytest.raises(DivergedError, match="^step 1: layer classifier, its output is not finite: try a lower --lr$") as caught:
        it.epoch(epoch(it, 0.1))
    assert caught.value.exit_code == 6


def test_a_loss_that_is_no_number_is_found_before_the_epoch_ends(monkeypatch):
    monkeypatch.setattr("minidl.training.READ_EVERY", 2)
    it, done = trainer(), []
    it.network.classifier.bias.master[...] = np.nan
    with pytest.raises(DivergedError, match="^step 1: layer classifier, its output is not finite"):
        it.epoch(epoch(it, 0.1), lambda steps, metrics: done.append(steps))
    assert done == [1], "of four, the second was the last"


def test_a_step_that_failed_is_looked_at_again_with_its_own_images_and_draws(monkeypatch):
    """Though it was not the last when its loss was read."""
    it, steps = trainer(), []
    batches, look = epoch(it, 0.1), inspection.first_nonfinite
    batches[1] = replace(batches[1], share=np.array([np.nan]))

    def observed(network, step):
        steps.append(int(network.step[0]))
        return look(network, step)

    monkeypatch.setattr(inspection, "first_nonfinite", observed)
    with pytest.raises(DivergedError, match="^step 2: layer conv, its output is not finite"):
        it.epoch(batches)
    assert steps == [1]


def test_float16_gives_up_after_too_many_skipped_steps():
    it = trainer("float16")
    it.optimizer.state[optimizer_op.SCALE] = 3e38  # every gradient overflows, and halving does not help in time
    with pytest.raises(DivergedError, match="20 steps in a row had gradients beyond float16: try --precision bf16"):
        for number in range(MOST_SKIPPED_STEPS):
            it.epoch(epoch(it, 0.1, number))


# ---- evaluation


@pytest.mark.parametrize("batch_size", [1, 5, 22, 23])
def test_evaluation_is_that_of_image_by_image(batch_size):
    """The last batch is ragged, and its padding must not count."""
    network, data = small_network(), dataset()
    for array in network.named_buffers().values():
        array += np.random.default_rng(3).uniform(0, 1, array.shape)
    metrics = evaluate(network, batches(batch_size=batch_size))

    losses, ranks = [], []
    for image, label in zip(data.images, data.labels):
        x = (image / 255 - np.reshape(data.mean, (3, 1, 1))) / np.reshape(data.std, (3, 1, 1))
        logits = network.eval().forward(np.ascontiguousarray(x[..., None]))
        losses.append(reference.cross_entropies(logits, [label], 0.0)[0])
        ranks.append(reference.ranks(logits, [label])[0])
    ranks = np.array(ranks)
    assert metrics.loss == pytest.approx(np.mean(losses), rel=1e-12)
    assert (metrics.top1, metrics.top5) == (np.mean(ranks < 1), np.mean(ranks < 5))


def test_evaluation_changes_nothing():
    network = small_network()
    before = network.state_dict()
    assert evaluate(network, batches()) == evaluate(network, batches())
    assert all(np.array_equal(array, before[name]) for name, array in network.state_dict().items())
    assert network.step[0] == 0


def test_training_goes_on_after_an_evaluation():
    it = trainer()
    evaluate(it.network, batches())
    it.epoch(epoch(it, 0.1))
    assert it.network.training and it.network.norm.running_mean.any()


def test_an_evaluation_rounds_as_the_steps_do():
    it = trainer("float32", tf32=True)
    with blas.tf32(True):
        rounded = evaluate(it.network, it.batches)
    assert it.evaluate(it.batches) == it.evaluate(it.batches) == rounded != evaluate(it.network, it.batches)


def test_an_evaluation_begins_anew():
    it = trainer()
    it.evaluate(it.batches)
    it.epoch(epoch(it, 0.1))
    assert it.evaluate(it.batches) == evaluate(it.network, it.batches)


def test_the_layer_is_named_where_only_tf32_overflows():
    it = trainer("float32", tf32=True)
    it.network.classifier.weight.master[0, 0] = np.finfo(np.float32).max  # which TF32 rounds to infinity
    with pytest.raises(DivergedError, match="^step 1: layer classifier, its output is not finite"):
        it.epoch(epoch(it, 0.1))
