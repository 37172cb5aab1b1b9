#!/usr/bin/env python3
"""Images per second and peak memory of a training step, beside PyTorch's of the same network.

    python benchmarks/training.py                                       the four alias networks, batch 128
    python benchmarks/training.py --peer torch --precision fp32 tf32 bf16 --json out.json
    python benchmarks/training.py --peer torch --memory                 only memory

A step is forward, loss, backward and SGD with Nesterov momentum on a batch that is there already. Both peers have the same
weights, and first their losses are compared. Times are medians, taken in turn (A B A B ...) in one process with the same
number of threads; PyTorch runs eagerly, on the CPU in the better of its two layouts, on a GPU in channels_last, bf16 by
autocast. Memory is the peak of two steps above the start. On the CPU: of the resident set, in a process of its own; on a
GPU: of what the peer's memory pool has taken.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import models
from minidl import blas, command, device, optim, run_folder
from minidl.kernels import acc_dtype, storage_dtype
from minidl.ops import loss

# Dropout is left out: its masks would differ.
NETWORKS = {"simplenet-5m": dict(rate=0.0), "wrn-28-4": {}, "resnext29-2x64d": {}, "res2next29-2c24w4s": {}}
STORAGE = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16"}
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
CLASSES = 100


class Minidl:
    """Steps of minidl's network `name`, and the weights that it starts with."""

    def __init__(self, name, place, precision, batch):
        blas.allow_tf32 = precision == "tf32"
        dtype = storage_dtype(STORAGE[precision])
        self.place = place
        self.network = models.create(name, CLASSES, **NETWORKS.get(name, {})).initialize(place, dtype)
        self.network.skip_input_gradient()
        self.optimizer = optim.SGD(self.network.parameters, MOMENTUM, WEIGHT_DECAY)
        x, labels = inputs(batch)
        self.x, self.labels = place.array(x.astype(dtype)), place.array(labels)
        self.totals, self.one = place.xp.zeros(4), place.xp.ones(1, acc_dtype(dtype))

    def step(self):
        logits = self.network.forward(self.x)
        self.network.backward(loss.forward_backward(logits, self.labels, self.totals, self.one))
        self.optimizer.step(LR)

    def loss(self):
        """Of the first step."""
        self.totals[...] = 0
        self.step()
        return float(self.totals[0]) / self.x.shape[-1]

    def synchronize(self):
        self.place.synchronize()

    def pool_bytes(self):
        return self.place.xp.get_default_memory_pool().total_bytes()


class Torch:
    """The same in PyTorch, from the tests' definition of the network."""

    def __init__(self, name, place, precision, batch, channels_last, state=None):
        import torch

        sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
        import torch_networks

        self.torch, self.on_gpu, self.bf16 = torch, place.name != "cpu", precision == "bf16"
        torch.set_num_threads(device.cpu_threads())
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.benchmark = True
        where = dict(device=place.name, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        family, _, rest = name.partition("-")
        numbers = map(int, re.findall(r"\d+", rest))
        self.network = {"simplenet": lambda *_: torch_networks.simplenet(name, CLASSES), "wrn": torch_networks.wide_resnet,
                        "resnext29": torch_networks.resnext29, "res2next29": torch_networks.res2next29}[family](*numbers)
        if state:
            self.network.load_state_dict({key: torch.from_numpy(array) for key, array in state.items()})
        self.network.to(**where)
        self.optimizer = torch.optim.SGD(self.network.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
        x, labels = inputs(batch)
        self.x = torch.from_numpy(np.ascontiguousarray(x.transpose(3, 0, 1, 2))).to(**where)
        self.labels = torch.from_numpy(labels).long().to(place.name)

    def step(self):
        torch = self.torch
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda" if self.on_gpu else "cpu", torch.bfloat16, enabled=self.bf16):
            self.last = torch.nn.functional.cross_entropy(self.network(self.x), self.labels)
        self.last.backward()
        self.optimizer.step()

    def loss(self):
        self.step()
        return self.last.item()

    def synchronize(self):
        if self.on_gpu:
            self.torch.cuda.synchronize()

    def pool_bytes(self):
        return self.torch.cuda.max_memory_reserved()


def inputs(batch):
    """Images (3, 32, 32, N) and labels (N): random, as zeros would run faster than real ones."""
    rng = np.random.default_rng(1)
    return rng.standard_normal((3, 32, 32, batch), np.float32), rng.integers(0, CLASSES, batch, np.int32)


# ---- memory ------------------------------------------------------------------------------------------------------


def resident_bytes(what):
    """what: VmRSS, the resident set now, or VmHWM, its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def measure_memory(peer, name, place, precision, batch):
    """In this process: the peak of two steps of the peer above what was there before."""
    make = {"minidl": lambda n, b: Minidl(n, place, precision, b),
            "torch": lambda n, b: Torch(n, place, precision, b, channels_last=False),
            "torch channels_last": lambda n, b: Torch(n, place, precision, b, channels_last=True)}[peer]
    if place.name == "cpu":
        make("wrn-10-1", 2).step()  # threads, libraries and compiled kernels are not the network's
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        start = resident_bytes("VmRSS")
    it = make(name, batch)
    it.step(), it.step(), it.synchronize()
    return resident_bytes("VmHWM") - start if place.name == "cpu" else it.pool_bytes()


def memory_in_a_process(peer, name, args, precision):
    """`measure_memory` in a fresh process: what one peer has freed must not serve the next."""
    result = subprocess.run([sys.executable, __file__, "--device", args.device, "--precision", precision, "--batch-size",
                             str(args.batch_size), "--networks", name, "--memory-of", peer],
                            stdout=subprocess.PIPE, text=True, check=True)
    return int(result.stdout)


# ---- time --------------------------------------------------------------------------------------------------------


def seconds_of_a_step(it):
    it.synchronize()
    begin = time.perf_counter()
    it.step()
    it.synchronize()
    return time.perf_counter() - begin


def measure_times(name, place, precision, args):
    """-> {peer: median seconds of a step}; PyTorch in the layout that is faster here."""
    ours = Minidl(name, place, precision, args.batch_size)
    peers = {"minidl": ours}
    if args.peer:
        state = ours.network.state_dict()
        layouts = [True] if place.name != "cpu" else [False, True]
        candidates = [Torch(name, place, precision, args.batch_size, layout, state) for layout in layouts]
        expected, got = candidates[-1].loss(), ours.loss()
        if not abs(got - expected) < (0.05 if precision == "bf16" else 1e-3) * expected:
            sys.exit(f"{name} {precision}: the first loss of minidl is {got}, PyTorch's {expected}")
        peers["torch"] = min(candidates, key=lambda it: min(seconds_of_a_step(it) for _ in range(3)))
        del candidates
    times = {peer: [] for peer in peers}
    for turn in range(args.repeats + 2):
        for peer, it in peers.items():
            if args.peer and place.name == "cpu":
                time.sleep(0.1)  # until the threads of the other peer sleep
            seconds = seconds_of_a_step(it)
            if turn >= 2:
                times[peer].append(seconds)
    return {peer: statistics.median(seconds) for peer, seconds in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto", metavar="{auto,cpu,cuda,cuda:N}")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--precision", nargs="+", choices=STORAGE, default=["fp32"])
    parser.add_argument("-b", "--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--peer", choices=["torch"], help="also measure PyTorch")
    parser.add_argument("--memory", action="store_true", help="measure memory only")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # one peer, in this process
    parser.add_argument("--json", metavar="FILE", help="write the rows and the environment there")
    args = parser.parse_args()
    place = device.select(args.device)
    if args.memory_of:
        print(measure_memory(args.memory_of, args.networks[0], place, args.precision[0], args.batch_size))
        return

    print(f"{place.description} | batch {args.batch_size}, median of {args.repeats} steps in turn")
    print(f"{'network':22}{'precision':>10}{'images/s':>10}{'torch':>10}{'ratio':>8}{'peak MB':>10}{'torch':>10}{'ratio':>8}")
    rows = []
    for name in args.networks:
        for precision in args.precision:
            layouts = ("torch channels_last",) if place.name != "cpu" else ("torch", "torch channels_last")
            peak = memory_in_a_process("minidl", name, args, precision)
            peer_peak = min(memory_in_a_process(layout, name, args, precision) for layout in layouts) if args.peer else None
            times = {} if args.memory else measure_times(name, place, precision, args)
            ours, peer = (args.batch_size / times[it] if it in times else None for it in ("minidl", "torch"))
            rows.append({
                "network": name, "device": place.name, "precision": precision, "batch": args.batch_size,
                "threads": device.cpu_threads() if place.name == "cpu" else None, "images_per_second": ours, "peer": args.peer,
                "peer_images_per_second": peer, "ratio": ours / peer if ours and peer else None, "peak_bytes": peak,
                "peer_peak_bytes": peer_peak})
            cells = [(ours, ".1f", 10), (peer, ".1f", 10), (rows[-1]["ratio"], ".2f", 8), (peak / 1e6, ".0f", 10),
                     (peer_peak and peer_peak / 1e6, ".0f", 10), (peer_peak and peak / peer_peak, ".2f", 8)]
            print(f"{name:22}{precision:>10}" + "".join(f"{'-' if value is None else format(value, form):>{width}}"
                                                        for value, form, width in cells), flush=True)
    if args.json:
        record = {"environment": run_folder.environment(place), "rows": rows}
        if args.peer:
            import torch

            record["environment"]["versions"]["torch"] = torch.__version__
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    sys.exit(command.run(main))
