#!/usr/bin/env python3
"""Write benchmarks/README.md, and its pictures, from the records in benchmarks/results/.

    python benchmarks/report.py

Every number there comes from a record: kernels-*.json, training-*.json, memory-*.json, scaling-*.json, startup-*.json,
overhead-*.json, the folders of runs of train.py that runs.toml names, and experiments.toml, the log of what was tried.
"""

import argparse
import csv
import json
import shlex
import statistics
import sys
import textwrap
from pathlib import Path

import pictures
from minidl import command
from minidl.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
README = FOLDER / "README.md"
LOST = 10  # rows of the table of what is lost most

HEAD = """# Benchmarks

Written by `python benchmarks/report.py` from the records in [results/](results/). Do not edit it: repeat a benchmark, or edit
experiments.toml and runs.toml. Each record holds its command, commit, hardware and versions. Times on shared machines vary
from hour to hour: compare ratios.

    python benchmarks/kernels.py --help       every kernel and every matrix product of the networks, against the ceilings
    python benchmarks/training.py --help      images per second and memory of a training step; scaling; start-up
    python benchmarks/overhead.py --help      what an epoch of train.py costs beyond its steps

`minidl bench kernels`, `training` and `overhead` are the same. `--peer torch` measures PyTorch too, with as many threads: times
in turn, in one process; memory on a CPU in a process for each. A speed ratio above 1 means that minidl is faster, a memory
ratio below 1 that it needs less. A commit with + had files that differed from it.
"""


def main():
    if not RESULTS.is_dir():
        raise UsageError(f"{RESULTS} is not there: the records are in a checkout of minidl")
    for path in found("kernels"):
        record = read(path)
        pictures.roofline(record["rows"], record["ceilings"], path.with_suffix(".png"))
    for path in found("scaling"):
        pictures.scaling(read(path)["rows"], path.with_suffix(".png"))
    README.write_text(text(), encoding="utf-8")
    print(f"written: {README}")


def text():
    """All of README.md."""
    sections = [HEAD, *(section(path) for kind, section in SECTIONS.items() for path in found(kind)), experiments(), runs()]
    return "\n".join(sections)


def found(kind):
    return sorted(RESULTS.glob(f"{kind}-*.json"))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


# ---- pieces ------------------------------------------------------------------------------------------------------


def table(head, rows, left=1):
    """head and rows of text -> a Markdown table, the first `left` columns flush left."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


def paragraph(text, indent=""):
    """In lines; indent: of all but the first."""
    return textwrap.fill(text, 128, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) + "\n"


def title(name, path, record):
    """A heading, the command, and on what it was run."""
    environment = record["environment"]
    script, *arguments = environment["command"]
    versions = ", ".join(f"{library} {version}" for library, version in environment["versions"].items())
    commit = environment["commit"]
    return (f"## {name}: [{path.stem}](results/{path.name})\n\n    python benchmarks/{script} {shlex.join(arguments)}\n\n"
            f"{environment['cpu']}, {environment['hardware']}. {versions}. "
            f"Commit {commit[:7] + '+' * commit.endswith('+') if commit else 'unknown'}.\n\n")


def number(value, form, scale=1):
    return "-" if value is None else format(value * scale, form)


def spread(values, form, scale=1):
    """The median, and the least and the greatest in brackets; a dash for none."""
    values = [value * scale for value in values if value is not None]
    if not values:
        return "-"
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}}..{max(values):{form}})"


# ---- sections, each of one record --------------------------------------------------------------------------------


def training(path):
    record = read(path)
    rows = [(row["network"], row["precision"], str(row["batch"]), number(row["images_per_second"], ",.1f"),
             number(row["peer_images_per_second"], ",.1f"), number(row["ratio"], ".2f"), *peaks(row),
             number(row["host_seconds"], ".3f", 1e3)) for row in record["rows"]]
    return title("A training step", path, record) + table(
        ["network", "precision", "batch", "images/s", "PyTorch images/s", "speed ratio", "peak MB", "PyTorch MB", "memory ratio",
         "host ms"], rows)


def peaks(row):
    """Megabytes of minidl and of PyTorch, and their ratio."""
    ours, peer = row["peak_bytes"], row["peer_peak_bytes"]
    return number(ours, ",.0f", 1e-6), number(peer, ",.0f", 1e-6), number(ours / peer if peer else None, ".2f")


def kernels(path):
    record = read(path)
    numpy = "NumPy" if record["threads"] else "CuPy"  # whose expressions those of the CPU are on a GPU
    said = title("Kernels", path, record)
    said += f"![Roofline](results/{path.stem}.png)\n\n"
    for precision, ceiling in record["ceilings"].items():
        rows = [row for row in record["rows"] if row["precision"] == precision]
        copies = spread([row["copy_gigabytes_per_second"] for row in rows], ".1f")
        said += paragraph(f"{precision}, batch {record['batch']}. Ceilings of the same run: a copy of a large tensor, "
                          f"{ceiling['copy_gigabytes_per_second']:.1f} GB/s at the start, and in turn with each kernel that "
                          f"memory bounds {copies}, where on a CPU it also reads the lines that it overwrites, so that "
                          "kernels that store past the caches exceed 100 %; a matrix product, "
                          f"{ceiling['gemm_teraflops_per_second']:.3f} TFLOP/s. Over "
                          "the shapes of each kernel, the median (least..greatest): per cent of the ceiling, and of a copy of "
                          f"as many bytes, which is a launch, too; speed in multiples of {numpy}'s and PyTorch's.") + "\n"
        said += table(["kernel", "shapes", "% of ceiling", "% of copy alike", f"x {numpy}", "x PyTorch"], [
            (name, str(len(group)), spread([row["share_of_ceiling"] for row in group], ".0f", 100),
             spread([row["share_of_copy_alike"] for row in group], ".0f", 100),
             spread([row["speed_over_numpy"] for row in group], ".1f"),
             spread([row["speed_over_torch"] for row in group], ".2f")) for name, group in grouped(rows, "kernel").items()])
        said += f"\n{of_a_step(rows)}\n{lost(rows)}\n"
    return said.removesuffix("\n")


def of_a_step(rows):
    """Milliseconds of each kind of kernel in a training step of each network, and how near the copy's speed come those that
    memory bounds, all together."""
    rows = [row for row in rows if not row["also_in"]]
    networks = list(dict.fromkeys(name for row in rows for name in row["occurrences"]))
    bound_by_memory = [row for row in rows if row["bound"] == "memory"]

    def milliseconds(group, network, key=lambda row: 1):
        return sum(row["median_us"] * key(row) * row["occurrences"].get(network, 0) for row in group) / 1e3

    def share(network):
        return (milliseconds(bound_by_memory, network, lambda row: row["share_of_ceiling"])
                / milliseconds(bound_by_memory, network))

    groups = grouped(rows, "kind") | {"all": rows}
    body = [(kind, *(f"{milliseconds(group, network):,.1f}" for network in networks)) for kind, group in groups.items()]
    body.append(("what memory bounds, % of ceiling", *(f"{100 * share(network):.0f}" for network in networks)))
    return ("Milliseconds of a training step, each kernel's median times how often the step has it:\n\n"
            + table(["kind", *networks], body))


def lost(rows):
    """The rows that lie farthest above the time that the ceilings allow, over all networks."""
    def milliseconds(row):
        return row["median_us"] * (1 - row["share_of_ceiling"]) * sum(row["occurrences"].values()) / 1e3

    most = sorted((row for row in rows if not row["also_in"]), key=milliseconds, reverse=True)[:LOST]
    return ("Where most is lost against the ceilings, in one step of each of these networks:\n\n" + table(
        ["kernel", "shape", "times", "us", "GB/s", "TFLOP/s", "% of ceiling", "x PyTorch", "ms lost"],
        [(row["kernel"], row["shape"], str(sum(row["occurrences"].values())), f"{row['median_us']:,.0f}",
          f"{row['gigabytes_per_second']:.1f}", f"{row['teraflops_per_second']:.3f}", f"{row['share_of_ceiling']:.0%}",
          number(row["speed_over_torch"], ".2f"), f"{milliseconds(row):,.1f}") for row in most], left=2))


def grouped(rows, key):
    groups = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def scaling(path):
    record = read(path)
    said = title("Batch and width", path, record) + f"![Speed over batch and width](results/{path.stem}.png)\n\n"
    rows = [(row["network"], row["precision"], str(row["batch"]), f"{1e3 * row['batch'] / row['images_per_second']:,.1f}",
             f"{row['images_per_second']:,.1f}", f"{6 * row['macs'] * row['images_per_second'] / 1e12:.3f}",
             number(row["ratio"], ".2f")) for row in record["rows"]]
    return said + table(["network", "precision", "batch", "ms", "images/s", "TFLOP/s", "x PyTorch"], rows)


def startup(path):
    record = read(path)
    rows = [(row["network"], row["precision"], str(row["batch"]), row["cache"], str(row["processes"]),
             f"{row['import_seconds']:.3f}", f"{row['network_seconds']:.3f}", f"{row['first_step_seconds']:.3f}")
            for row in record["rows"]]
    return title("Start of a fresh process", path, record) + table(
        ["network", "precision", "batch", "cache of kernels", "processes", "`import minidl`, s", "network made, s",
         "first step, s"], rows)


def overhead(path):
    record = read(path)
    rows = [(row["arch"], row["dataset"], str(row["batch"]), str(row["steps"]), f"{row['bare_seconds']:.2f}",
             f"{row['epoch_seconds']:.2f}", f"{row['loop_percent']:+.1f} %", f"{row['checkpoints_percent']:.1f} %")
            for row in record["rows"]]
    return (title("What the training loop costs beyond its steps", path, record)
            + paragraph("An epoch of train.py, with bar, metrics and events, against the bare loop over the same steps, in "
                        "turn; and what its checkpoints take. A negative cost is the noise of the machine.") + "\n"
            + table(["network", "data", "batch", "steps", "bare, s", "in train.py, s", "loop", "checkpoints"], rows, left=2))


def memory(path):
    record = read(path)
    rows = [(row["network"], row["precision"], str(row["batch"]), *peaks(row)) for row in record["rows"]]
    return title("Peak memory of a training step", path, record) + table(
        ["network", "precision", "batch", "peak MB", "PyTorch", "ratio"], rows)


SECTIONS = {"training": training, "memory": memory, "kernels": kernels, "scaling": scaling, "startup": startup,
            "overhead": overhead}


# ---- what was tried, and runs ------------------------------------------------------------------------------------


def experiments():
    """The log, newest first."""
    log = tomllib.loads((RESULTS / "experiments.toml").read_text(encoding="utf-8"))["experiment"]
    said = ("## Experiments\n\nWhat was tried for speed and memory, newest first, also what did not help: "
            "[experiments.toml](results/experiments.toml).\n\n")
    for entry in reversed(log):
        kept = "Kept." if entry["kept"] else "Not kept."
        said += paragraph(f"- **{entry['tried']}** ({entry['date']}, {entry['commit']}, {entry['where']}). "
                          f"Predicted: {entry['predicted']} Measured: {entry['measured']} {kept}", "  ")
    return said


def runs():
    """Runs of train.py, in the groups of runs.toml."""
    said = "## Runs of train.py\n"
    for group in tomllib.loads((RESULTS / "runs.toml").read_text(encoding="utf-8"))["group"]:
        said += f"\n### {group['title']}\n\n"
        said += "".join(f"    {run_command(name)}\n" for name in group["runs"]) + f"\n{group['note'].strip()}\n\n"
        said += table(["run", "commit", "epochs", "train loss", "test loss", "test top-1", "test top-5", "seconds"],
                      [run_row(name) for name in group["runs"]])
    return said


def run_command(name):
    script, *arguments = environment_of(name)["command"]
    if "-o" in arguments:  # where the run was written to says nothing
        at = arguments.index("-o")
        del arguments[at:at + 2]
    return f"python {script} {shlex.join(arguments)}"


def run_row(name):
    with (RESULTS / name / "metrics.csv").open(encoding="utf-8", newline="") as file:
        epochs = list(csv.DictReader(file))
    last = epochs[-1]
    return (f"[{name}](results/{name}/metrics.csv)", environment_of(name)["commit"][:7], last["epoch"],
            f"{float(last['train_loss']):.3f}", f"{float(last['test_loss']):.3f}", f"{float(last['test_top1']):.2%}",
            f"{float(last['test_top5']):.2%}", f"{sum(float(epoch['seconds']) for epoch in epochs):,.0f}")


def environment_of(name):
    return read(RESULTS / name / "env.json")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    sys.exit(command.run(main))
