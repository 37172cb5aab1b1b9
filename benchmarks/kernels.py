#!/usr/bin/env python3
"""Time every kernel and every matrix product of the networks against the hardware's ceilings, and beside their peers.

    python benchmarks/kernels.py                                   what the four networks do, on the GPU if there is one
    python benchmarks/kernels.py --peer torch --precision fp32 tf32 bf16 --json out.json --plot roofline.png
    python benchmarks/kernels.py --networks wrn-16-4 --filter convolution

Shapes are found by tracing the networks (works.py); equal ones appear once, with how often a training step of each network
has them. "others" is what these networks leave out. Peers take turns (A B A B ...) in one process with the same number of
threads; first their results are compared. Peers: a NumPy (CuPy) expression for what is bound by memory, and with --peer torch
PyTorch, in the better of its two layouts on a CPU, in channels_last on a GPU.

The ceilings are measured in the same run: bytes/s of a copy of a tensor that no cache holds, FLOP/s of the fastest large
matrix product that either peer has. "ceiling" is the time at these speeds over the time taken. A copy on a CPU also reads the
lines that it overwrites: kernels that mostly read, or store past the caches, exceed 100 %. The copy takes turns with
the peers of each row that memory bounds, as its speed may double within minutes on a machine that others use too; the one at
the start only decides what bounds a row. "alike" is the time of a copy of as many bytes over the time taken: what is lost
against it is the kernel's, the rest of what is lost against the ceiling belongs to any launch of this size.

The bytes are those that any implementation must move, each tensor once per pass; the FLOPs of a convolution are those of its
definition, so that a faster algorithm (Winograd's) may exceed 100 %. What multiplies runs once in its turn, on a CPU for 10 ms,
and then once more, which is timed. All else finds its tensors in no cache: before each run another tensor is read, and then the
same is done with other arrays.
"""

import argparse
import itertools
import statistics
import sys
import time

import numpy as np

import models
import records
import works
from minidl import blas, command, device, plots, signals
from minidl.commands.arguments import positive
from minidl.errors import UsageError
from minidl.kernels import storage_dtype
from minidl.ops import conv, optimizer

ROW_SECONDS, FEWEST = 1.0, 5  # a row takes no longer, unless so many runs do
AWAKE = 0.01  # seconds after which threads that have slept are on cores of their own: at first, one core may have two of them
BEYOND_CACHES = 128 << 20  # bytes
SPIN = 'extern "C" __global__ void spin(long long cycles) { const long long end = clock64() + cycles; while (clock64() < end); }'
SPIN_CYCLES = 20_000_000  # about 10 ms
# Most that peers may differ, in root mean square: a ReLU decides otherwise where rounding does.
TOLERANCES = {"fp32": 3e-3, "tf32": 2e-2, "bf16": 1e-1}


class Bench:
    """Measures cases on one device, in one precision. copy, gemm: the ceilings at the start, bytes/s and FLOP/s."""

    def __init__(self, place, precision, with_torch):
        blas.allow_tf32 = precision == "tf32"
        self.place, self.precision = place, precision
        dtype = storage_dtype(records.PRECISIONS[precision])
        self.torch = records.torch_with(precision) if with_torch else None
        self.inputs = works.Inputs(place, dtype, self.torch)
        self.other_tensor = self.inputs.master(BEYOND_CACHES // 4)
        self.target = place.xp.zeros_like(self.other_tensor)
        self.state = place.xp.zeros(optimizer.STATE_SIZE, self.inputs.acc)
        if place.name != "cpu":
            self.spin = place.xp.RawKernel(SPIN, "spin")

    def measure_ceilings(self):
        """Of a copy; of the fastest product of n x n matrices, be it that of BLAS, of a convolution or of PyTorch."""
        copy = self.copies(0)["copy"]
        self.copy = 2 * self.other_tensor.nbytes / statistics.median(self.seconds(*copy) for _ in range(10))
        n = 8192 if self.place.name != "cpu" else 2048
        a, b, out = (self.inputs.normal(n, n) for _ in range(3))
        candidates = [lambda: blas.gemm(a, b, out), lambda: conv.forward(b.reshape(n, 4, 4, n // 16), a.reshape(n, n, 1, 1))]
        if self.torch:
            ta, tb = self.inputs.tensor(a), self.inputs.tensor(b)
            candidates.append(lambda: ta @ tb)
        self.gemm = max(2 * n**3 / min(self.seconds(product, product) for _ in range(4)) for product in candidates)

    def seconds(self, function, before):
        """Of function(), after before(). On a GPU its launches, which may be hundreds, are queued behind a kernel that takes so
        long that the host does not count."""
        before()
        if self.place.name == "cpu":
            begin = time.perf_counter()
            function()
            return time.perf_counter() - begin
        start, end = (self.place.xp.cuda.Event() for _ in range(2))
        self.spin((1,), (1,), (np.int64(SPIN_CYCLES),))
        start.record()
        function()
        end.record()
        end.synchronize()
        return self.place.xp.cuda.get_elapsed_time(start, end) / 1e3

    def before(self, function, twin):
        """What precedes a run of function(): itself; or, where it has a twin on other arrays, what leaves in the caches the
        code of both, and not the arrays of function(). Threads are awake then, as in a network."""
        def run_twin():
            optimizer.norm(self.other_tensor, self.state)  # reads it by all threads, each of which may have a cache of its own
            self.kept = twin()  # so that its result does not lend its memory

        def run():
            begin = time.perf_counter()
            function()
            while self.place.name == "cpu" and time.perf_counter() - begin < AWAKE:
                function()
        return run if twin is None else run_twin

    def check(self, case):
        """Raises Differ where the results of the first call of each peer do."""
        results = {name: self.to_host(function()) for name, function in self.without_torch(case).items()}
        if case.torch:
            results["torch"] = [tensor.detach().float().cpu().numpy().copy() for tensor in case.torch[-1]()]
        for name, arrays in results.items():
            for ours, theirs in zip(results["minidl"], arrays, strict=True):
                error = float(np.linalg.norm((ours - theirs).ravel()) / np.linalg.norm(theirs.ravel()))
                if not error < (np.inf if case.random else TOLERANCES[self.precision]):
                    raise records.Differ(f"{case.name} {self.precision}: minidl and {name} differ by {error:.2g} of a typical "
                                         "value")

    def without_torch(self, case):
        """{name: function} of minidl and NumPy."""
        return {"minidl": case.ours, **({"numpy": case.numpy} if case.numpy and self.inputs.exact else {})}

    def to_host(self, arrays):
        """Copies, as some cases write to the same array again."""
        return [self.place.to_host(array).astype(np.float32) for array in arrays]

    def peers(self, case, twin):
        """{name: (function, what precedes it)}: PyTorch in the layout that is faster here."""
        functions, twins = self.without_torch(case), self.without_torch(twin) if twin else {}
        peers = {name: (function, self.before(function, twins.get(name))) for name, function in functions.items()}
        candidates = [(function, self.before(function, twin.torch[layout] if twin else None))
                      for layout, function in enumerate(case.torch)]
        if candidates:
            peers["torch"] = min(candidates, key=lambda candidate: min(self.seconds(*candidate) for _ in range(2)))
        return peers

    def copies(self, traffic):
        """As `peers`: "copy", of a tensor that no cache holds, and "alike", of so much of it that `traffic` bytes are read or
        written, at most of all. By a kernel, with as many threads as others have."""
        def copy(part):
            return lambda: optimizer.cast(self.other_tensor[part], self.target[part])

        size = max(1, min(traffic // 2 // self.target.itemsize, self.target.size))
        twin = copy(slice(-size, None))
        return {name: (function, self.before(function, twin))
                for name, function in (("copy", copy(slice(None))), ("alike", copy(slice(size))))}

    def bound(self, case):
        return "memory" if case.floor(self.copy, np.inf) == case.floor(self.copy, self.gemm) else "product"

    def measure(self, case, twin, repeats):
        """-> {peer: seconds of each run}, in turn; "copy" and "alike" are among the peers of what memory bounds."""
        self.check(case)
        peers = self.peers(case, twin)
        if self.bound(case) == "memory":
            peers |= self.copies(case.bytes)
        times = {name: [] for name in peers}
        begin = time.perf_counter()
        while len(times["minidl"]) < repeats and (len(times["minidl"]) < FEWEST or time.perf_counter() - begin < ROW_SECONDS):
            for name, peer in peers.items():
                signals.obey()
                times[name].append(self.seconds(*peer))
                if name == "torch":
                    records.pause(self.place)
        return times

    def row(self, work, case, twin, occurrences, repeats):
        """What is recorded of a case. twin: the same case with other arrays, or None for a product."""
        times = self.measure(case, twin, repeats)
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        ours = median["minidl"]
        copy = 2 * self.target.nbytes / median["copy"] if "copy" in median else None
        return {
            "kernel": case.name, "kind": work.kind, "shape": str(work), "precision": self.precision, "occurrences": occurrences,
            "also_in": case.also_in, "runs": len(times["minidl"]), "median_us": 1e6 * ours,
            "p10_us": 1e6 * records.quantile(times["minidl"], 0.1), "p90_us": 1e6 * records.quantile(times["minidl"], 0.9),
            "bytes": case.bytes, "flops": case.flops,
            "gigabytes_per_second": case.bytes / ours / 1e9, "teraflops_per_second": case.flops / ours / 1e12,
            "bound": self.bound(case), "copy_gigabytes_per_second": copy and copy / 1e9,
            "share_of_ceiling": (case.floor(copy, np.inf) if copy else case.floor(self.copy, self.gemm)) / ours,
            "share_of_copy_alike": median["alike"] / ours if copy else None,
            **{f"{peer}_us": 1e6 * median[peer] if peer in median else None for peer in ("numpy", "torch")},
            **{f"speed_over_{peer}": median[peer] / ours if peer in median else None for peer in ("numpy", "torch")}}


HEAD = (f"{'kernel':34}{'shape':>36}{'times':>6}{'us':>10}{'p10':>10}{'p90':>10}{'GB/s':>8}{'copy':>7}{'TFLOP/s':>9}"
        f"{'ceiling':>9}{'alike':>7}{'vs numpy':>10}{'torch us':>10}{'vs torch':>10}")


def line(row):
    """A row, for people."""
    return f"{row['kernel']:34}{row['shape']:>36}" + records.cells(
        (sum(row["occurrences"].values()), "d", 6), (row["median_us"], ".0f", 10), (row["p10_us"], ".0f", 10),
        (row["p90_us"], ".0f", 10), (row["gigabytes_per_second"], ".1f", 8), (row["copy_gigabytes_per_second"], ".1f", 7),
        (row["teraflops_per_second"], ".3f", 9), (row["share_of_ceiling"], ".0%", 9), (row["share_of_copy_alike"], ".0%", 7),
        (row["speed_over_numpy"], ".2f", 10), (row["torch_us"], ".0f", 10), (row["speed_over_torch"], ".2f", 10))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", metavar="{auto,cpu,cuda,cuda:N}")
    parser.add_argument("--networks", nargs="+", default=[*models.ALIASES.values(), works.OTHERS], metavar="NAME",
                        help="whose kernels; default: %(default)s")
    parser.add_argument("--precision", nargs="+", choices=records.PRECISIONS, default=["fp32"])
    parser.add_argument("-b", "--batch-size", type=positive, help="default: 128, on a CPU 32")
    parser.add_argument("--filter", nargs="+", default=[""], metavar="TEXT",
                        help="only what has one of these in its kind or shape: convolution, 64x32x32")
    parser.add_argument("--peer", choices=["torch"], help="also time PyTorch")
    parser.add_argument("--repeats", type=positive, default=20, metavar="N", help="runs of a row, at most; default: 20")
    parser.add_argument("--json", metavar="FILE", help="write the rows and the environment there")
    parser.add_argument("--plot", metavar="FILE", help="draw the roofline there: .png, .svg or .pdf")
    args = parser.parse_args()
    if args.plot:
        plots.check(args.plot)

    place = records.select(args.device, args.peer)
    batch = args.batch_size or (128 if place.name != "cpu" else 32)
    found = {work: occurrences for work, occurrences in works.of(args.networks, batch).items()
             if any(text in f"{work.kind} {work}" for text in args.filter)}
    if not found:
        kinds = dict.fromkeys(work.kind for work in works.of(args.networks, batch))
        raise UsageError(f"--filter {' '.join(args.filter)}: nothing that these networks do has this in its kind or shape; there are "
                         + ", ".join(kinds))
    ceilings = {}
    record = records.Record(args.json, place, batch=batch, threads=device.cpu_threads() if place.name == "cpu" else None,
                            ceilings=ceilings)
    for precision in args.precision:
        bench = Bench(place, precision, args.peer == "torch")
        bench.measure_ceilings()
        ceilings[precision] = {"copy_gigabytes_per_second": bench.copy / 1e9, "gemm_teraflops_per_second": bench.gemm / 1e12}
        print(f"{place.description} | {precision}, batch {batch}, medians of up to {args.repeats} | "
              f"copy {bench.copy / 1e9:.1f} GB/s | matrix product {bench.gemm / 1e12:.3f} TFLOP/s\n{HEAD}")
        for work, occurrences in found.items():
            twins = itertools.repeat(None) if isinstance(work, works.PRODUCTS) else work.cases(bench.inputs)
            for case, twin in zip(work.cases(bench.inputs), twins):
                row = record.add(bench.row, work, case, twin, occurrences, args.repeats)
                if row:
                    print(line(row), flush=True)
    if args.plot:
        import pictures

        pictures.roofline(record.rows, ceilings, args.plot)
    record.end()


if __name__ == "__main__":
    sys.exit(command.run(main))
