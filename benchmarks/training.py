#!/usr/bin/env python3
"""Images per second and peak memory of a training step, beside PyTorch's of the same network.

    python benchmarks/training.py                                       on a GPU the four networks, on a CPU smaller work
    python benchmarks/training.py --peer torch --precision fp32 tf32 bf16 --json out.json
    python benchmarks/training.py --networks wrn-16-4:64 simplenet-5m   a batch of 64, and the one of --batch-size
    python benchmarks/training.py --memory                              only memory
    python benchmarks/training.py --scaling --plot scaling.png          over the batch and over the width of the network
    python benchmarks/training.py --startup                             import, and the first step of a fresh process

steps.py says what a step is. Both peers have the same weights, and first their losses are compared. Times are medians, taken
in turn (A B A B ...) in one warm process with the same number of threads. PyTorch runs eagerly unless --compile is given, on
the CPU in the better of its two layouts, on a GPU in channels_last, bf16 by autocast. Memory is on the CPU the peak of the
resident set in three steps, above the start, in a process of its own; on a GPU what the peer's memory pool has taken. On a GPU
the host's time is that until the call of a step returns, while the device is idle.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import models
import records
from minidl import command, device, plots, signals
from minidl.commands.arguments import positive
from minidl.errors import UsageError
from steps import LAYOUTS, Minidl, Torch, macs

ON_CPU = ("simplenet-310k:128", "wrn-16-4:64", "resnext29-2x64d:32", "res2next29-2c24w4s:32")
WARM_UP = 2  # turns
BATCHES = (32, 64, 127, 128, 256, 512, 1024)  # of --scaling
WIDTHS = ("wrn-16-1", "wrn-16-2", "wrn-16-4", "wrn-16-8")
STARTS = {"warm": 5, "cold": 3}  # processes of --startup, with a cache of kernels and without


def peer_names(place, compiled):
    """What PyTorch is measured as here: the best of these counts."""
    names = list(LAYOUTS) if place.name == "cpu" else ["torch channels_last"]
    return [f"{name} compiled" for name in names] if compiled else names


def make(peer, name, place, precision, batch, state=None):
    """The steps of a peer: minidl, or one of `peer_names`."""
    if peer == "minidl":
        return Minidl(name, place, precision, batch)
    compiled = peer.endswith(" compiled")
    return Torch(name, place, precision, batch, LAYOUTS[peer.removesuffix(" compiled")], compiled, state)


# ---- memory ------------------------------------------------------------------------------------------------------


RESET = Path("/proc/self/clear_refs")  # the peak of a process on the CPU, by writing 5; on Linux alone


def tells_memory(place):
    """Whether the memory of a process can be measured."""
    return place.name != "cpu" or RESET.exists()


def resident_bytes(what):
    """what: VmRSS, the resident set now, or VmHWM, its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def measure_memory(peer, name, place, precision, batch):
    """In this process: the peak of three steps of the peer above what was there before."""
    if place.name == "cpu":
        make(peer, "wrn-10-1", place, precision, 2).step()  # threads, libraries and compiled kernels are not the network's
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what that has freed must not serve the network uncounted
        RESET.write_text("5")
        start = resident_bytes("VmRSS")
    it = make(peer, name, place, precision, batch)
    for _ in range(3):
        it.step()
    it.synchronize()
    return resident_bytes("VmHWM") - start if place.name == "cpu" else it.pool_bytes()


def memory_in_a_process(peer, name, batch, args, precision):
    """`measure_memory` in a fresh process: what one peer has freed must not serve the next."""
    result = subprocess.run([sys.executable, __file__, "--device", args.device, "--precision", precision, "--networks",
                             f"{name}:{batch}", "--memory-of", peer, *(["--peer", args.peer] if peer != "minidl" else [])],
                            stdout=subprocess.PIPE, text=True, check=True)
    return int(result.stdout)


# ---- time --------------------------------------------------------------------------------------------------------


def seconds_of_a_step(it):
    """-> (of the step, of the host until the call returned)."""
    signals.obey()
    it.synchronize()
    begin = time.perf_counter()
    it.step()
    returned = time.perf_counter()
    it.synchronize()
    return time.perf_counter() - begin, returned - begin


def measure_times(name, batch, place, precision, args):
    """-> {peer: [(seconds of a step, of the host), ...]}, and on a GPU {peer: bytes of its pool}; PyTorch in the layout that is
    faster here, as "torch". Raises Differ."""
    if place.name != "cpu":
        empty_pools(place, args.peer)
    ours = make("minidl", name, place, precision, batch)
    peers = {"minidl": ours}
    if args.peer:
        state = ours.network.state_dict()
        candidates = [make(peer, name, place, precision, batch, state) for peer in peer_names(place, args.compile)]
        expected, got = candidates[-1].loss(), ours.loss()
        if not abs(got - expected) < (0.05 if precision == "bf16" else 1e-3) * expected:
            raise records.Differ(f"{name} {precision}, batch {batch}: the first loss of minidl is {got}, PyTorch's {expected}")
        peers["torch"] = min(candidates, key=lambda it: min(seconds_of_a_step(it) for _ in range(3)))
        del candidates
    times = {peer: [] for peer in peers}
    for turn in range(args.repeats + WARM_UP):
        for peer, it in peers.items():
            seconds = seconds_of_a_step(it)
            if turn >= WARM_UP:
                times[peer].append(seconds)
            if peer == "torch":
                records.pause(place)
    return times, {peer: it.pool_bytes() for peer, it in peers.items()} if place.name != "cpu" else {}


def empty_pools(place, peer):
    """On a GPU: of what the networks before have taken."""
    gc.collect()
    place.xp.get_default_memory_pool().free_all_blocks()
    if peer:
        cuda = sys.modules["torch"].cuda
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()


def row_of(name, batch, place, precision, args, peaks, times):
    """What is recorded: peaks {peer: bytes} and times as from `measure_times`, either of them empty if it was not asked for."""
    peer = args.peer and ("torch compiled" if args.compile else args.peer)
    medians = {who: [statistics.median(column) for column in zip(*seconds)] for who, seconds in times.items()}
    speeds = {who: batch / step for who, (step, _) in medians.items()}
    host = {who: value for who, (_, value) in medians.items()} if place.name != "cpu" else {}
    steps = [seconds for seconds, _ in times.get("minidl", ())]
    return {
        "network": name, "device": place.name, "precision": precision, "batch": batch,
        "threads": device.cpu_threads() if place.name == "cpu" else None, "images_per_second": speeds.get("minidl"),
        "peer": peer, "peer_images_per_second": speeds.get("torch"),
        "ratio": speeds["minidl"] / speeds["torch"] if "torch" in speeds else None, "peak_bytes": peaks.get("minidl"),
        "peer_peak_bytes": peaks.get("torch"), "macs": macs(name), "runs": len(steps),
        "p10_seconds": records.quantile(steps, 0.1) if steps else None,
        "p90_seconds": records.quantile(steps, 0.9) if steps else None, "host_seconds": host.get("minidl"),
        "peer_host_seconds": host.get("torch")}


HEAD = (f"{'network':22}{'precision':>10}{'batch':>7}{'ms':>9}{'images/s':>10}{'torch':>10}{'ratio':>8}{'peak MB':>10}"
        f"{'torch':>10}{'ratio':>8}{'host ms':>9}{'torch':>8}")


def line(row):
    """A row, for people."""
    ours, peak, peer_peak = row["images_per_second"], row["peak_bytes"], row["peer_peak_bytes"]
    return f"{row['network']:22}{row['precision']:>10}" + records.cells(
        (row["batch"], "d", 7), (ours and 1e3 * row["batch"] / ours, ".1f", 9), (ours, ".1f", 10),
        (row["peer_images_per_second"], ".1f", 10), (row["ratio"], ".2f", 8), (peak and peak / 1e6, ".0f", 10),
        (peer_peak and peer_peak / 1e6, ".0f", 10), (peak and peer_peak and peak / peer_peak, ".2f", 8),
        *((row[key] and 1e3 * row[key], ".3f", width) for key, width in (("host_seconds", 9), ("peer_host_seconds", 8))))


def steps(cells, place, args):
    """What measures a row, for each (network, batch) and precision."""
    for name, batch in cells:
        for precision in args.precision:
            yield partial(step_row, name, batch, place, precision, args)


def step_row(name, batch, place, precision, args):
    times, peaks = ({}, {}) if args.memory else measure_times(name, batch, place, precision, args)
    if not peaks and tells_memory(place):
        asked = {"minidl": ["minidl"], **({"torch": peer_names(place, args.compile)} if args.peer else {})}
        peaks = {who: min(memory_in_a_process(peer, name, batch, args, precision) for peer in peers)
                 for who, peers in asked.items()}
    return row_of(name, batch, place, precision, args, peaks, times)


def scaling(cells, place, args):
    """What measures a row, over the batch, of the first of the networks or those that were named, and over the width."""
    names = list(dict.fromkeys(name for name, _ in cells))
    plan = [("batch", name, batch) for name in (names if args.networks else names[:1]) for batch in BATCHES]
    plan += [("width", name, args.batch_size) for name in WIDTHS]
    for precision in args.precision:
        for series, name, batch in plan:
            yield partial(scaling_row, series, name, batch, place, precision, args)


def scaling_row(series, name, batch, place, precision, args):
    times, _ = measure_times(name, batch, place, precision, args)
    return {**row_of(name, batch, place, precision, args, {}, times), "series": series}


# ---- start -------------------------------------------------------------------------------------------------------


FIRST_STEP = """
import json, sys, time
times = [time.perf_counter()]
import minidl
times.append(time.perf_counter())
sys.path.insert(0, sys.argv[1])
from steps import Minidl
name, batch, device, precision = sys.argv[2:]
it = Minidl(name, minidl.select(device), precision, int(batch))
it.synchronize()
times.append(time.perf_counter())
it.step()
it.synchronize()
times.append(time.perf_counter())
print(json.dumps([after - before for before, after in zip(times, times[1:])]))
"""


def startup(cells, place, args):
    """What measures a row, for each network and state of the cache of kernels: medians of fresh processes."""
    for name, batch in cells if args.networks else cells[:1]:
        for precision in args.precision:
            for cache, processes in STARTS.items():
                yield partial(startup_row, name, batch, place, precision, args, cache, processes)


def startup_row(name, batch, place, precision, args, cache, processes):
    arguments = [str(Path(__file__).parent), name, str(batch), args.device, precision]
    if cache == "warm":
        start_fresh(arguments, {})  # after which there is one
    found = []
    for _ in range(processes):
        signals.obey()
        with tempfile.TemporaryDirectory() as folder:
            found.append(start_fresh(arguments, dict(MINIDL_CACHE=folder, CUPY_CACHE_DIR=folder) if cache == "cold" else {}))
    imported, made, stepped = (statistics.median(column) for column in zip(*found))
    return {"network": name, "device": place.name, "precision": precision, "batch": batch, "cache": cache,
            "processes": processes, "import_seconds": imported, "network_seconds": made, "first_step_seconds": stepped}


def start_fresh(arguments, variables):
    """-> seconds of `import minidl`, of making the network, of its first step."""
    result = subprocess.run([sys.executable, "-c", FIRST_STEP, *arguments], env={**os.environ, **variables},
                            stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


STARTUP_HEAD = f"{'network':22}{'precision':>10}{'batch':>7}{'cache':>7}{'import s':>10}{'network s':>11}{'first step s':>14}"


def startup_line(row):
    return f"{row['network']:22}{row['precision']:>10}" + records.cells(
        (row["batch"], "d", 7), (row["cache"], "", 7), (row["import_seconds"], ".3f", 10), (row["network_seconds"], ".3f", 11),
        (row["first_step_seconds"], ".3f", 14))


# ---- arguments ---------------------------------------------------------------------------------------------------


def cell(word, batch):
    """"wrn-16-4:64" or "wrn-16-4" -> (full name, batch). Raises UsageError."""
    name, colon, own = word.partition(":")
    if colon and not (own.isdigit() and int(own)):
        raise UsageError(f"--networks {word}: {own!r} is not a whole number of at least 1, the batch")
    return models.find(name)[0], int(own) if colon else batch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", metavar="{auto,cpu,cuda,cuda:N}")
    parser.add_argument("--networks", nargs="+", metavar="NAME[:BATCH]",
                        help=f"default: {' '.join(models.ALIASES.values())}, on a CPU {' '.join(ON_CPU)}")
    parser.add_argument("--precision", nargs="+", choices=records.PRECISIONS, default=["fp32"])
    parser.add_argument("-b", "--batch-size", type=positive, default=128, help="of networks without one; default: 128")
    parser.add_argument("--repeats", type=positive, default=20, metavar="N", help="steps of each peer; default: 20")
    parser.add_argument("--peer", choices=["torch"], help="also measure PyTorch")
    parser.add_argument("--compile", action="store_true", help='PyTorch by torch.compile(mode="max-autotune")')
    parser.add_argument("--json", metavar="FILE", help="write the rows and the environment there")
    parser.add_argument("--plot", metavar="FILE", help="draw what --scaling finds there: .png, .svg or .pdf")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--memory", action="store_true", help="measure memory only")
    what.add_argument("--scaling", action="store_true", help="speed over the batch and the width, of --networks if given")
    what.add_argument("--startup", action="store_true", help="import and first step of fresh processes")
    what.add_argument("--memory-of", help=argparse.SUPPRESS)  # one peer, in this process
    args = parser.parse_args()
    if args.plot and not args.scaling:
        raise UsageError("--plot draws what --scaling finds")
    if args.compile and not args.peer:
        raise UsageError("--compile is for --peer torch")
    if args.plot:
        plots.check(args.plot)

    place = records.select(args.device, args.peer)
    if args.memory and not tells_memory(place):
        raise UsageError("--memory: the memory of a process on the CPU is told by Linux alone")
    words = args.networks or (ON_CPU if place.name == "cpu" else models.ALIASES.values())
    cells = [cell(word, args.batch_size) for word in words]
    if args.memory_of:
        print(measure_memory(args.memory_of, *cells[0][:1], place, args.precision[0], cells[0][1]))
        return
    how = "medians of fresh processes" if args.startup else f"medians of {args.repeats} steps in turn"
    print(f"{place.description} | {how}\n{STARTUP_HEAD if args.startup else HEAD}")
    record = records.Record(args.json, place)
    for measure in (startup if args.startup else scaling if args.scaling else steps)(cells, place, args):
        row = record.add(measure)
        if row:
            print((startup_line if args.startup else line)(row), flush=True)
    if args.plot:
        import pictures

        pictures.scaling(record.rows, args.plot)
    record.end()


if __name__ == "__main__":
    sys.exit(command.run(main))
