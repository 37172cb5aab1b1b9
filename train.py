#!/usr/bin/env python3
"""Train one of the architectures on CIFAR-100, CIFAR-10 or the bundled digits.

    python train.py                                        a demo: digits on the CPU, under a minute
    python train.py --arch simplenet-5m --epochs 50        CIFAR-100, looked for in --data-dir, $MINIDL_DATA and the cache

The last line of a run names its folder: config.toml, env.json, metrics.csv (a row per epoch) and weights.npz.
"""

import argparse
import sys
import time

from tqdm import tqdm

import models
from minidl import blas, command, data, device, optim, run_folder, weights
from minidl.data.batches import AUGMENTATIONS, Batches
from minidl.commands.arguments import positive
from minidl.errors import UsageError
from minidl.kernels import storage_dtype
from minidl.training import Trainer, evaluate
from models import listing

STORAGE = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}
OPTIMIZERS = {  # name: (class, peak learning rate of a batch size, other settings)
    # In proportion to the batch, as the ResNeXt authors have it: 0.1 for 128, 0.05 for 64, 0.025 for 32.
    "sgd": (optim.SGD, lambda batch_size: 0.1 * batch_size / 128, dict(momentum=0.9, nesterov=True, weight_decay=5e-4)),
    "adam": (optim.Adam, lambda batch_size: 1e-3, dict()),
}
WARMUP_EPOCHS, LONGEST_WARMUP = 2, 0.2  # of which the shorter: 0.2 of all steps
DEMO_ARCH, DIGITS_EPOCHS, DIGITS_BATCH_SIZE = "simplenet-310k", 3, 16


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-a", "--arch", help="simplenet, resnext, res2net, wideresnet, or a name that `--arch list` prints")
    parser.add_argument("--model-kwargs", nargs="+", default=[], metavar="NAME=VALUE",
                        help="options of the architecture, such as dropout=0.3 for a Wide ResNet")
    parser.add_argument("-e", "--epochs", type=positive, help="default: 50, digits 3")
    parser.add_argument("-b", "--batch-size", type=positive, help="images per step; default: 128, digits 16")
    parser.add_argument("--lr", type=rate, help="peak learning rate; default: adam 0.001, sgd 0.1 at batch size 128 and in "
                                                 "proportion to it")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="sgd: Nesterov 0.9, weight decay 5e-4")
    parser.add_argument("--sched", choices=optim.SCHEDULES, default="cosine", help="of the learning rate, after a warm-up")
    parser.add_argument("--seed", type=int, default=0, help="two runs with one seed are identical, bit for bit")
    parser.add_argument("--dataset", choices=data.NAMES)
    parser.add_argument("--data-dir", help="folder with the official files of CIFAR")
    parser.add_argument("--device", default="auto", metavar="{auto,cpu,cuda,cuda:N}")
    parser.add_argument("--precision", choices=STORAGE, default="fp32", help="of activations and matrix products")
    parser.add_argument("--limit-train-batches", type=positive, metavar="N", help="stop each epoch after N steps")
    parser.add_argument("-o", "--output", help="folder of the run; default: runs/<arch>-<dataset>-<time>")
    return parser.parse_args()


def rate(text):
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def main():
    args = parse_arguments()
    if args.arch == "list":
        print(listing.table())
        return
    place = device.select(args.device)
    demo = args.arch is None and args.dataset is None and args.data_dir is None and place.name == "cpu"
    args.dataset = args.dataset or ("digits" if demo else "cifar100")
    small = args.dataset == "digits"
    args.arch = models.find(args.arch or (DEMO_ARCH if place.name == "cpu" else "simplenet-5m"))[0]
    args.epochs = args.epochs or (DIGITS_EPOCHS if small else 50)
    args.batch_size = args.batch_size or (DIGITS_BATCH_SIZE if small else 128)
    optimizer_class, default_lr, optimizer_settings = OPTIMIZERS[args.optimizer]
    args.lr = default_lr(args.batch_size) if args.lr is None else args.lr
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: it must be at least 0")

    dtype = storage_dtype(STORAGE[args.precision])
    blas.allow_tf32 = args.precision == "tf32"
    options = models.parse_options(args.model_kwargs)
    network = models.create(args.arch, 10 if args.dataset != "cifar100" else 100, **options)
    train_set, test_set = data.load(args.dataset, args.data_dir)
    if args.batch_size > len(test_set.labels):
        raise UsageError(f"--batch-size {args.batch_size} is more than the {len(test_set.labels)} test images of {args.dataset}")
    network.initialize(place, dtype, args.seed)
    train_batches = Batches(train_set, place, dtype, args.batch_size, args.seed)
    test_batches = Batches(test_set, place, dtype, args.batch_size, args.seed)
    trainer = Trainer(network, optimizer_class(network.parameters, **optimizer_settings), train_batches,
                      AUGMENTATIONS[args.dataset])

    print(f"{place.description} | {args.dataset}: {len(train_set.labels):,} training and {len(test_set.labels):,} test images | "
          f"{args.arch}: {network.parameters.count():,} parameters, {network.macs(train_set.images.shape[1:]):,} MACs an image | "
          f"{args.precision}", flush=True)
    if demo:
        print("This is a demo on 1,797 small digits, because no GPU was found and no network or data were asked for.", flush=True)
    folder = run_folder.RunFolder(f"{args.arch}-{args.dataset}", args.output)
    folder.write_settings(vars(args), run_folder.environment(place))

    steps_per_epoch = min(train_batches.size // args.batch_size, args.limit_train_batches or sys.maxsize)
    steps = args.epochs * steps_per_epoch
    warmup = min(WARMUP_EPOCHS * steps_per_epoch, int(LONGEST_WARMUP * steps))
    schedule = optim.SCHEDULES[args.sched]
    for epoch in range(args.epochs):
        first_step = epoch * steps_per_epoch
        rates = [schedule(step, steps, args.lr, warmup) for step in range(first_step, first_step + steps_per_epoch)]
        begin = time.perf_counter()
        with tqdm(total=steps_per_epoch, desc=f"epoch {epoch + 1}/{args.epochs}", unit="step", disable=None, leave=False,
                  dynamic_ncols=True) as bar:

            def show(done, metrics):
                if metrics:
                    bar.set_postfix(loss=f"{metrics.loss:.3f}", top1=f"{metrics.top1:.1%}", refresh=False)
                bar.update()

            train = trainer.epoch(train_batches.epoch(epoch)[:steps_per_epoch], rates, show)
            bar.refresh()  # the last step may have come too soon after the one before to be drawn
        train_seconds = time.perf_counter() - begin
        test = evaluate(network, test_batches)
        seconds = time.perf_counter() - begin
        images_per_second = steps_per_epoch * args.batch_size / train_seconds
        folder.add_metrics({
            "epoch": epoch + 1, "lr": f"{rates[-1]:.6g}", "train_loss": f"{train.loss:.5f}", "train_top1": f"{train.top1:.5f}",
            "test_loss": f"{test.loss:.5f}", "test_top1": f"{test.top1:.5f}", "test_top5": f"{test.top5:.5f}",
            "images_per_second": f"{images_per_second:.1f}", "seconds": f"{seconds:.2f}"})
        print(f"epoch {epoch + 1}/{args.epochs}  lr {rates[-1]:.4f}  train: loss {train.loss:.3f}, top-1 {train.top1:.2%}  "
              f"test: loss {test.loss:.3f}, top-1 {test.top1:.2%}, top-5 {test.top5:.2%}  "
              f"{images_per_second:,.0f} images/s, {seconds:.1f} s", flush=True)

    folder.save_weights(network.state_dict(), weights.describe(args.arch, len(train_set.classes), options, train_set))
    if demo:
        print("Next, the real thing: python train.py --arch simplenet-310k --epochs 3 --dataset cifar100 --data-dir FOLDER")
    print(f"run folder: {folder.path}")


if __name__ == "__main__":
    sys.exit(command.run(main))
