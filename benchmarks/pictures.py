"""Pictures of benchmarks, in the form of minidl's own (plots.py)."""

import itertools

from minidl.plots import COLOURS, GRAY, SMALL, picture

KINDS = {"convolution": "o", "linear": "s", "batch norm": "^", "pooling": "v", "element-wise": "D", "optimizer": "P",
         "loss": "X", "augmentation": "*"}


def roofline(rows, ceilings, path):
    """Each row of kernels.py at its FLOPs per byte and its FLOP/s, below the two ceilings at the start; one axes for
    each precision."""
    with picture(path, 5 * len(ceilings) + 1.5, 4) as figure:
        panels = figure.subplots(1, len(ceilings), squeeze=False)[0]
        for axes, (precision, ceiling) in zip(panels, ceilings.items()):
            points = [row for row in rows if row["precision"] == precision]
            intensities = [row["flops"] / row["bytes"] for row in points]
            copy, gemm = ceiling["copy_gigabytes_per_second"] / 1e3, ceiling["gemm_teraflops_per_second"]
            ridge, left, right = gemm / copy, min(intensities) / 2, max(*intensities, gemm / copy) * 2
            axes.plot((left, ridge, right), (left * copy, gemm, gemm), color=GRAY)
            axes.annotate(f"copy, {1e3 * copy:,.0f} GB/s", (left, gemm), (4, 4), textcoords="offset points", color=GRAY,
                          fontsize=SMALL)
            axes.annotate(f"matrix product, {gemm:.3g} TFLOP/s", (right, gemm), (0, 4), textcoords="offset points", ha="right",
                          color=GRAY, fontsize=SMALL)
            for colour, (kind, marker) in zip((*COLOURS, GRAY), KINDS.items()):
                chosen = [(x, row["teraflops_per_second"]) for x, row in zip(intensities, points) if row["kind"] == kind]
                if chosen:
                    axes.plot(*zip(*chosen), linestyle="", marker=marker, markersize=4, color=colour, alpha=0.7, label=kind)
            axes.set(xscale="log", yscale="log", xlim=(left, right), title=precision,
                     xlabel="arithmetic intensity, FLOP/byte", ylabel="TFLOP/s")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:g}")  # the default writes powers, as mathematics
        handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    return figure


def scaling(rows, path):
    """Images/s over the batch, a line for each network, precision and peer, and FLOP/s over the width."""
    series = {kind: [row for row in rows if row["series"] == kind] for kind in ("batch", "width")}
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    named = {precision: f" {precision}" if len(precisions) > 1 else "" for precision in precisions}  # in the legends
    with picture(path, 9, 3.5) as figure:
        left, right = figure.subplots(1, 2)
        names = sorted({(row["network"], row["precision"]) for row in series["batch"]})
        for name, peer in itertools.product(names, ("minidl", "torch")):
            key = "images_per_second" if peer == "minidl" else "peer_images_per_second"
            points = sorted((row["batch"], row[key]) for row in series["batch"]
                            if (row["network"], row["precision"]) == name and row[key])
            colour = COLOURS[names.index(name) % len(COLOURS)]
            even = [point for point in points if point[0] % 2 == 0]
            if points:
                left.plot(*zip(*even), marker="o", markersize=3, color=colour,
                          linestyle="solid" if peer == "minidl" else (0, (3, 1.5)),
                          label=name[0] + named[name[1]] + (", PyTorch" if peer == "torch" else ""))
                left.plot(*zip(*(point for point in points if point not in even)), linestyle="", marker="x", color=colour)
        batches = sorted({row["batch"] for row in series["batch"]})
        left.set(xscale="log", xlabel="batch (crosses: odd)", ylabel="images/s", title="batch: level is linear time",
                 ylim=(0, None))
        left.set_xticks([batch for batch in batches if batch % 2 == 0], minor=False)
        left.minorticks_off()
        left.xaxis.set_major_formatter("{x:g}")
        left.legend()
        widths, colours = list(dict.fromkeys(row["network"] for row in series["width"])), itertools.cycle(COLOURS)
        peers = ("minidl", "images_per_second"), ("PyTorch", "peer_images_per_second")
        for precision, (peer, key) in itertools.product(precisions, peers):
            points = [(widths.index(row["network"]), 6 * row["macs"] * row[key] / 1e12) for row in series["width"]
                      if row["precision"] == precision and row[key]]
            if points:
                right.plot(*zip(*points), marker="o", markersize=3, color=next(colours), label=peer + named[precision])
        right.set_xticks(range(len(widths)), widths)
        right.set(ylabel="TFLOP/s of the step", title="width", ylim=(0, None))
        right.legend()
    return figure
