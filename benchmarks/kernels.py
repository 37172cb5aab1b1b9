#!/usr/bin/env python3
"""Time every kernel against the hardware's ceilings, and against its peers: a NumPy (CuPy) expression, PyTorch.

    python benchmarks/kernels.py                        all, on the GPU if there is one
    python benchmarks/kernels.py --filter conv --peer torch --json out.json

Shapes are those of CIFAR networks at batch 128. Each row: the median of --repeats runs, peers in turn (A B A B ...) in
one process with the same number of threads; first the outputs of all peers are compared. In its turn a peer runs twice
and the second run is timed, so that it finds its inputs in the caches as it leaves them itself: in a network they have
just been written by the layer before. GB/s counts the bytes that any implementation must move, each tensor read or
written once a pass; per cent are of the copy bandwidth (of tensors that no cache holds) and of the GEMM rate, measured in
the same run.
"""

import argparse
import json
import statistics
import sys
import time

import numpy as np

from minidl import blas, command, device, run_folder
from minidl.ops import augment, batchnorm, conv, loss, maxpool, optimizer, relu

BATCH = 128


class Case:
    """One row: a function and its peers.

    ours, numpy, torch: functions without arguments that return arrays in one order and layout, or None where there is
    no such peer. bytes: least traffic; flops: of matrix products. A convolution in groups has "/groups" in its name.
    """

    def __init__(self, name, shape, ours, bytes=0, flops=0, numpy=None, torch=None):
        self.name, self.shape, self.bytes, self.flops = name, shape, bytes, flops
        self.functions = {name: f for name, f in (("minidl", ours), ("numpy", numpy), ("torch", torch)) if f}


class Bench:
    """Inputs and cases on one device."""

    def __init__(self, place, peers):
        self.place, self.xp, self.peers = place, place.xp, peers
        self.rng = np.random.default_rng(1)
        if "torch" in peers:
            import torch

            self.torch = torch
            torch.set_num_threads(device.cpu_threads())
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            torch.backends.cudnn.benchmark = True

    def array(self, *shape):
        return self.place.array(self.rng.standard_normal(shape, dtype=np.float32))

    def to_torch(self, array, order=(3, 0, 1, 2)):
        """An array (C, H, W, N) -> a tensor (N, C, H, W) on the same device, its own copy."""
        tensor = self.torch.from_numpy(np.ascontiguousarray(self.place.to_host(array).transpose(order)))
        return tensor if self.place.name == "cpu" else tensor.cuda()

    def from_torch(self, *tensors):
        """Tensors (N, C, H, W), (C,) or weights, detached -> NumPy arrays as minidl has them."""
        return tuple(t.detach().cpu().numpy().transpose(1, 2, 3, 0) if of_images else t.detach().cpu().numpy()
                     for of_images, t in tensors)

    def cases(self):
        for channels, size in ((64, 32), (128, 16), (256, 8)):
            yield from self.batch_norm(channels, size)
            yield from self.max_pool(channels, size)
            yield from self.relu(channels, size)
        yield self.augmentation()
        yield from self.optimizers()
        yield self.loss()
        for channels, size in ((64, 32), (128, 16), (256, 8)):
            yield from self.conv(channels, size)
        for channels, size in ((128, 32), (256, 16), (512, 8)):  # of ResNeXt 32x4d
            yield from self.conv(channels, size, groups=32)

    # ---- memory-bound kernels

    def batch_norm(self, channels, size):
        x, dy = self.array(channels, size, size, BATCH), self.array(channels, size, size, BATCH)
        gamma, beta = self.array(channels), self.array(channels)
        dgamma, dbeta = self.array(channels), self.array(channels)
        eps, m = 1e-5, x.size // channels
        settings = dict(training=True, relu=True)

        def forward():
            running = self.xp.zeros(channels, np.float32), self.xp.ones(channels, np.float32)
            return batchnorm.forward(x, gamma, beta, *running, momentum=0.1, eps=eps, **settings)

        def forward_in_numpy():
            g, b = gamma[:, None, None, None], beta[:, None, None, None]
            mean, var = x.mean(axis=(1, 2, 3), keepdims=True), x.var(axis=(1, 2, 3), keepdims=True)
            rstd = 1 / self.xp.sqrt(var + np.float32(eps))
            return self.xp.maximum(g * (x - mean) * rstd + b, 0), mean.ravel(), rstd.ravel()

        _, mean, rstd = forward()

        def backward():
            return batchnorm.backward(dy, x, gamma, beta, mean, rstd, dgamma, dbeta, **settings), dgamma, dbeta

        def backward_in_numpy():
            g, b = gamma[:, None, None, None], beta[:, None, None, None]
            xhat = (x - mean[:, None, None, None]) * rstd[:, None, None, None]
            masked = dy * (g * xhat + b > 0)
            sum_dy = masked.sum(axis=(1, 2, 3), keepdims=True)
            sum_dy_xhat = (masked * xhat).sum(axis=(1, 2, 3), keepdims=True)
            dx = g * rstd[:, None, None, None] * (masked - (sum_dy + xhat * sum_dy_xhat) / np.float32(m))
            return dx, sum_dy_xhat.ravel(), sum_dy.ravel()

        shape = tuple(x.shape)
        # Statistics need one pass over x before y can be written: x twice, y once; backward: x, dy twice, dx once.
        yield Case("bn+relu forward", shape, forward, 3 * x.nbytes, numpy=forward_in_numpy)
        yield Case("bn+relu backward", shape, backward, 5 * x.nbytes, numpy=backward_in_numpy)

    def max_pool(self, channels, size):
        x, dy = self.array(channels, size, size, BATCH), self.array(channels, size // 2, size // 2, BATCH)
        _, winner = maxpool.forward(x, (2, 2), 2)

        def windows(a):
            """a (C, 2h, 2w, N) -> (4, C, h, w, N): the four pixels of each window."""
            return self.xp.stack([a[:, ky::2, kx::2] for ky in range(2) for kx in range(2)])

        def backward_in_numpy():
            w = windows(x)
            first = w.argmax(axis=0)
            dx = self.xp.zeros_like(x)
            for place in range(4):
                dx[:, place // 2::2, place % 2::2] = dy * (first == place)
            return (dx,)

        shape = tuple(x.shape)
        yield Case("max-pool forward", shape, lambda: maxpool.forward(x, (2, 2), 2)[:1],
                   x.nbytes + dy.nbytes + winner.nbytes, numpy=lambda: (windows(x).max(axis=0),))
        yield Case("max-pool backward", shape, lambda: (maxpool.backward(dy, winner, x.shape, (2, 2), 2),),
                   x.nbytes + dy.nbytes + winner.nbytes, numpy=backward_in_numpy)

    def relu(self, channels, size):
        x, dy = self.array(channels, size, size, BATCH), self.array(channels, size, size, BATCH)
        y, shape = relu.forward(x), tuple(x.shape)
        yield Case("relu forward", shape, lambda: (relu.forward(x),), 2 * x.nbytes, numpy=lambda: (self.xp.maximum(x, 0),))
        yield Case("relu backward", shape, lambda: (relu.backward(dy, y),), 3 * x.nbytes, numpy=lambda: (dy * (y > 0),))

    def augmentation(self):
        images = self.place.array(self.rng.integers(0, 256, (10_000, 3, 32, 32), dtype=np.uint8))
        labels = self.place.array(self.rng.integers(0, 100, 10_000).astype(np.int32))
        indices = self.place.array(self.rng.permutation(10_000)[:BATCH].astype(np.int32))
        scale, shift = self.array(3), self.array(3)
        step = self.xp.zeros(1, np.int64)
        settings = dict(key=1, padding=4, flips=True)
        draws = self.place.to_host(augment.draw(indices, labels, step, (32, 32), **settings)[0])

        def ours():
            drawn, _ = augment.draw(indices, labels, step, (32, 32), **settings)
            return (augment.apply(images, indices, drawn, scale, shift, dtype=np.dtype("float32")),)

        def in_numpy():
            x = images[indices] * scale[:, None, None] + shift[:, None, None]
            x = self.xp.pad(x, ((0, 0), (0, 0), (4, 4), (4, 4)))
            x = self.xp.stack([image[:, 4 + dy:36 + dy, 4 + dx:36 + dx][:, :, ::-1 if flip else 1]
                               for image, dy, dx, flip in zip(x, *draws[:3])])
            return (self.xp.ascontiguousarray(x.transpose(1, 2, 3, 0)),)

        return Case("augmentation", (3, 32, 32, BATCH), ours, BATCH * 3 * 32 * 32 * 5, numpy=in_numpy)

    def optimizers(self):
        size = 5_521_508  # simplenet-5m
        w, grad, m, v = (self.array(size) for _ in range(4))
        v = abs(v)
        lr, state = np.float32(1e-3), self.xp.zeros(optimizer.STATE_SIZE, np.float32)
        state[optimizer.LR], state[optimizer.GRAD_FACTOR] = lr, 1
        copies = [a.copy() for a in (w, m, v)]

        def restore():
            for target, source in zip((w, m, v), copies):
                target[...] = source

        def sgd_in_numpy():
            g = grad + np.float32(5e-4) * w
            velocity = np.float32(0.9) * m + g
            return w - lr * (g + np.float32(0.9) * velocity), velocity

        def adam_in_numpy():
            first = np.float32(0.9) * m + np.float32(0.1) * grad
            second = np.float32(0.999) * v + np.float32(0.001) * grad**2
            return w - lr * (first / np.float32(0.1)) / (self.xp.sqrt(second / np.float32(0.001)) + np.float32(1e-8)), first, second

        def sgd():
            optimizer.sgd(w, grad, m, w, state, momentum=0.9, weight_decay=5e-4, nesterov=True)
            return w, m

        def adam():
            optimizer.adam(w, grad, m, v, w, state, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
            return w, m, v

        for name, ours, in_numpy, arrays in (("sgd step", sgd, sgd_in_numpy, 5), ("adam step", adam, adam_in_numpy, 7)):
            case = Case(name, (size,), ours, arrays * w.nbytes, numpy=in_numpy)
            case.before_check = restore  # the step is in place: the comparison starts from the same weights
            yield case

    def loss(self):
        logits = self.array(100, BATCH)
        labels = self.place.array(self.rng.integers(0, 100, BATCH).astype(np.int32))
        one, totals = self.xp.ones(1, np.float32), self.xp.zeros(4)

        def in_numpy():
            p = self.xp.exp(logits - logits.max(axis=0))
            p /= p.sum(axis=0)
            p[labels, self.xp.arange(BATCH)] -= 1
            return (p / BATCH,)

        return Case("softmax cross-entropy", (100, BATCH), lambda: (loss.forward_backward(logits, labels, totals, one),),
                    2 * logits.nbytes, numpy=in_numpy)

    # ---- convolution

    def conv(self, channels, size, groups=1):
        settings = dict(padding=1, groups=groups)
        x, dy = self.array(channels, size, size, BATCH), self.array(channels, size, size, BATCH)
        weight, dweight = (self.array(channels, channels // groups, 3, 3) for _ in range(2))
        flops = 2 * dweight.size * size * size * BATCH
        torch_forward = torch_both = None
        if "torch" in self.peers:
            layouts = [self.torch.contiguous_format, self.torch.channels_last]
            tensors = {layout: [self.to_torch(a).to(memory_format=layout) for a in (x, dy)]
                       + [self.to_torch(weight, (0, 1, 2, 3)).to(memory_format=layout)] for layout in layouts}

            def run(layout, backward):
                tx, tdy, tw = tensors[layout]
                tx.requires_grad_(backward), tw.requires_grad_(backward)
                tx.grad = tw.grad = None
                y = self.torch.nn.functional.conv2d(tx, tw, **settings)
                if not backward:
                    return ((True, y),)
                y.backward(tdy)
                return (True, y), (True, tx.grad), (False, tw.grad)

            def better(backward):
                """PyTorch in the layout that is faster here."""
                seconds = {layout: min(self.seconds(lambda: run(layout, backward)) for _ in range(4)) for layout in layouts}
                layout = min(layouts, key=seconds.get)
                return lambda: run(layout, backward)

            torch_forward, torch_both = better(False), better(True)

        def both():
            y = conv.forward(x, weight, **settings)
            dx = conv.backward(dy, x, weight, dweight, **settings)
            return y, dx, dweight

        name, shape = "conv 3x3" + (f"/{groups}" if groups > 1 else ""), tuple(x.shape)
        yield Case(name + " forward", shape, lambda: (conv.forward(x, weight, **settings),), flops=flops, torch=torch_forward)
        yield Case(name + " forward+backward", shape, both, flops=3 * flops, torch=torch_both)

    # ---- measuring

    def seconds(self, function):
        self.place.synchronize()
        begin = time.perf_counter()
        function()
        if "torch" in self.peers and self.place.name != "cpu":
            self.torch.cuda.synchronize()
        self.place.synchronize()
        return time.perf_counter() - begin

    def ceilings(self):
        """Bytes/s of a copy (read + written) and FLOP/s of a float32 GEMM, the best of several, in this run."""
        source = self.array(1 << 26 if self.place.name != "cpu" else 1 << 24)
        # relu reads and writes each element once: a copy by as many threads as kernels use.
        copy = min(self.seconds(lambda: relu.forward(source)) for _ in range(20))
        n = 8192 if self.place.name != "cpu" else 2048
        a, b, out = self.array(n, n), self.array(n, n), self.array(n, n)
        product = min(self.seconds(lambda: blas.gemm(a, b, out)) for _ in range(5))
        return 2 * source.nbytes / copy, 2 * n**3 / product

    def check(self, case):
        """The outputs of all peers agree; ours, computed a second time into poisoned memory, too."""
        results = {}
        for name, function in case.functions.items():
            getattr(case, "before_check", lambda: None)()
            arrays = function()
            results[name] = self.from_torch(*arrays) if name == "torch" else [self.place.to_host(a).copy() for a in arrays]
        for name, arrays in results.items():
            for ours, theirs in zip(results["minidl"], arrays):
                scale = float(np.sqrt(np.mean(np.square(theirs, dtype=np.float64)))) or 1.0
                error = float(np.abs(ours - theirs).max()) / scale
                if not error < 1e-3:
                    sys.exit(f"{case.name} {case.shape}: minidl and {name} differ by {error:.2g} of a typical value")

    def measure(self, case, repeats):
        """-> {peer: sorted seconds}, in turn; before the turn of a peer, the threads of the others may fall asleep."""
        times = {name: [] for name in case.functions}
        for _ in range(repeats):
            for name, function in case.functions.items():
                if "torch" in case.functions and self.place.name == "cpu":
                    time.sleep(0.05)
                function()
                times[name].append(self.seconds(function))
        return {name: sorted(seconds) for name, seconds in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto", metavar="{auto,cpu,cuda,cuda:N}")
    parser.add_argument("--filter", default="", help="only rows whose name contains this")
    parser.add_argument("--peer", choices=["torch"], action="append", default=[], help="also time PyTorch")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", metavar="FILE", help="write the rows and the environment there")
    args = parser.parse_args()

    place = device.select(args.device)
    bench = Bench(place, args.peer)
    copy, gemm = bench.ceilings()
    print(f"{place.description} | copy {copy / 1e9:.1f} GB/s | float32 GEMM {gemm / 1e9:.0f} GFLOP/s | batch {BATCH}, float32, "
          f"median of {args.repeats}")
    print(f"{'kernel':28}{'shape':>20}{'us':>10}{'p10':>10}{'p90':>10}{'GB/s':>8}{'GFLOP/s':>9}{'ceiling':>9}{'vs numpy':>10}{'vs torch':>10}")
    rows = []
    for case in bench.cases():
        if args.filter not in case.name:
            continue
        bench.check(case)
        times = bench.measure(case, args.repeats)
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        ours = times["minidl"]
        rate, ceiling = (case.flops / median["minidl"], gemm) if case.flops else (case.bytes / median["minidl"], copy)
        row = {"kernel": case.name, "shape": case.shape, "median_us": 1e6 * median["minidl"],
               "p10_us": 1e6 * ours[len(ours) // 10], "p90_us": 1e6 * ours[len(ours) * 9 // 10],
               "gigabytes_per_second": case.bytes / median["minidl"] / 1e9 or None,
               "gigaflops_per_second": case.flops / median["minidl"] / 1e9 or None, "share_of_ceiling": rate / ceiling}
        for peer in ("numpy", "torch"):
            row[f"speed_over_{peer}"] = median[peer] / median["minidl"] if peer in median else None
        rows.append(row)
        numbers = [f"{row[key]:.{digits}f}" if row[key] else "-" for key, digits in
                   (("gigabytes_per_second", 1), ("gigaflops_per_second", 0))]
        ratios = [f"{row[key]:.2f}x" if row[key] else "-" for key in ("speed_over_numpy", "speed_over_torch")]
        shape = "x".join(map(str, case.shape))
        print(f"{case.name:28}{shape:>20}{row['median_us']:>10.0f}{row['p10_us']:>10.0f}{row['p90_us']:>10.0f}"
              f"{numbers[0]:>8}{numbers[1]:>9}{rate / ceiling:>9.0%}{ratios[0]:>10}{ratios[1]:>10}", flush=True)
    if args.json:
        record = {"environment": run_folder.environment(place), "copy_gigabytes_per_second": copy / 1e9,
                  "gemm_gigaflops_per_second": gemm / 1e9, "batch": BATCH, "repeats": args.repeats, "rows": rows}
        if "torch" in args.peer:
            record["environment"]["versions"]["torch"] = bench.torch.__version__
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    sys.exit(command.run(main))
