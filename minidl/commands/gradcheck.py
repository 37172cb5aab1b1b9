"""Check gradients in float64 against finite differences: of the layers, or of a network.

`gradcheck` takes every layer and `gradcheck Conv2d` one, each element of small inputs and weights; `gradcheck wrn-16-2` a
network, along random directions. Yours are FILE.py:NAME: a class of layers that needs no arguments, on x (3, 4, 5, 2), or a
function (classes) -> Layer. For others: minidl.gradient_check.check.
"""

import argparse
import collections
import dataclasses
import difflib
import inspect
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import models
from minidl import device
from minidl.commands.arguments import MODEL_KWARGS
from minidl.data.dataset import IMAGE_SHAPE
from minidl.errors import UsageError, UserError
from minidl.gradient_check import LIMIT, Result, check, check_directions
from minidl.layer import Layer, output_for
from minidl.layers import (AvgPool2d, BatchNorm2d, ChannelDropout, Conv2d, Dropout, Flatten, GlobalAvgPool2d, GlobalMaxPool2d,
                           Linear, MaxPool2d, ReLU, Residual, Sequential, ZeroPadChannels)

CLASSES, BATCH = 10, 2  # of networks
YOUR_SHAPE = (3, 4, 5, 2)  # (C, H, W, N) for a layer of a user
SEVERITY = ("ok", "kink", "unrepeatable", "wrong")  # a case is as bad as the worst of its results


class Case(NamedTuple):
    """What is checked: the layer, and the shape (C, H, W, N) of its input."""

    name: str
    make: Callable[[], Layer]
    shape: tuple[int, int, int, int]


CASES = {
    "Conv2d": [
        Case("padding 1", lambda: Conv2d(2, 3, 3, padding=1), (2, 4, 3, 3)),
        Case("stride 2, odd sizes", lambda: Conv2d(3, 2, 3, stride=2, padding=1), (3, 5, 7, 1)),
        Case("stride 2, last row unused", lambda: Conv2d(2, 2, 3, stride=2), (2, 6, 5, 2)),
        Case("window 2x3, no bias", lambda: Conv2d(2, 3, (2, 3), bias=False), (2, 3, 4, 2)),
        Case("1x1", lambda: Conv2d(3, 4, 1), (3, 3, 2, 2)),
        Case("1x1, stride 2", lambda: Conv2d(3, 4, 1, stride=2, bias=False), (3, 5, 3, 1)),
        Case("groups", lambda: Conv2d(4, 6, 3, padding=1, groups=2), (4, 3, 4, 2)),
        Case("groups, stride 2, batch 1", lambda: Conv2d(6, 3, 3, stride=2, padding=1, groups=3), (6, 5, 3, 1)),
        Case("groups too wide for direct kernels", lambda: Conv2d(34, 2, 1, groups=2, bias=False), (34, 1, 2, 1)),
        Case("3x3 with many channels, by Winograd", lambda: Conv2d(16, 16, 3, padding=1, bias=False), (16, 3, 5, 1)),
    ],
    "BatchNorm2d": [
        Case("odd sizes", lambda: BatchNorm2d(3), (3, 3, 5, 2)),
        Case("with ReLU", lambda: BatchNorm2d(3, relu=True), (3, 3, 3, 2)),
        Case("batch 1", lambda: BatchNorm2d(2), (2, 1, 3, 1)),
    ],
    "Linear": [
        Case("of an image", lambda: Linear(12, 5), (3, 2, 2, 3)),
        Case("batch 1, no bias", lambda: Linear(7, 3, bias=False), (7, 1, 1, 1)),
    ],
    "ReLU": [Case("odd sizes", ReLU, (3, 5, 3, 1))],
    "MaxPool2d": [
        Case("window 2, last row unused", lambda: MaxPool2d(2), (2, 5, 4, 3)),
        Case("windows that overlap, padding 1", lambda: MaxPool2d(3, stride=2, padding=1), (2, 7, 5, 1)),
    ],
    "AvgPool2d": [
        Case("window 2, last row unused", lambda: AvgPool2d(2), (2, 5, 4, 3)),
        Case("windows that overlap, padding 1", lambda: AvgPool2d(3, stride=1, padding=1), (2, 3, 5, 1)),
    ],
    "GlobalMaxPool2d": [Case("odd sizes", GlobalMaxPool2d, (3, 5, 3, 2))],
    "GlobalAvgPool2d": [Case("odd sizes", GlobalAvgPool2d, (3, 5, 3, 2))],
    "Flatten": [Case("odd sizes", Flatten, (3, 5, 3, 2))],
    "ZeroPadChannels": [Case("3 to 5 channels", lambda: ZeroPadChannels(5), (3, 3, 2, 2))],
    "Dropout": [
        Case("rate 0.4", lambda: Dropout(0.4), (3, 3, 3, 3)),
        Case("rate 0", lambda: Dropout(0.0), (2, 2, 3, 1)),
    ],
    "ChannelDropout": [Case("rate 0.4", lambda: ChannelDropout(0.4), (5, 2, 3, 3))],
    "Sequential": [
        Case("convolution forgets its input", lambda: Sequential(Conv2d(2, 3, 1, bias=False), BatchNorm2d(3, relu=True),
                                                                 Conv2d(3, 2, 3, padding=1), AvgPool2d(2)), (2, 4, 4, 2)),
    ],
    "Residual": [
        Case("identity", lambda: Residual(Conv2d(2, 2, 3, padding=1)), (2, 3, 4, 2)),
        Case("shortcut", lambda: Residual(Conv2d(2, 3, 3, stride=2, padding=1), Conv2d(2, 3, 1, stride=2)), (2, 5, 3, 2)),
        Case("sum and ReLU in the norm", lambda: Residual(Conv2d(2, 2, 3, padding=1, bias=False), norm=BatchNorm2d(2)),
             (2, 3, 3, 2)),
        Case("in a residual block", lambda: Residual(Residual(Sequential(Conv2d(2, 2, 3, padding=1), Dropout(0.0)))), (2, 3, 3, 2)),
        Case("shortcut that adds no array", lambda: Residual(Conv2d(2, 3, 3, padding=1), ZeroPadChannels(3)), (2, 3, 3, 2)),
    ],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="LAYER", help="a layer, or a network; default: every layer of minidl")
    parser.add_argument("--model-kwargs", **MODEL_KWARGS)
    parser.add_argument("--device", default="auto", metavar="{auto,cpu,cuda,cuda:N}")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
    cases, place = _cases(args), device.select(args.device)
    if not args.json:
        print(f"{place.description} | float64 | relative errors, at most {LIMIT:g}", flush=True)
    rows = []
    for name, case, checked in cases:
        results = checked(case.make(), case.shape, device=place)
        verdict = max((result.verdict for result in results), key=SEVERITY.index)
        rows.append({"layer": name, "case": case.name, "shape": case.shape, "verdict": verdict,
                     "results": [_plain(result) for result in results]})
        if not args.json:
            print(f"{verdict:13}{name:21}{case.name:36}{max(result.error for result in results):>10.1e}")
            print("".join(f"  {result}\n" for result in results if result.verdict != "ok"), end="", flush=True)
    count = collections.Counter(row["verdict"] for row in rows)
    if args.json:
        print(json.dumps({"device": place.name, "limit": LIMIT, "cases": rows}))
    else:
        print(", ".join(f"{count[verdict]} {verdict}" for verdict in SEVERITY if count[verdict]))
    if count["wrong"] or count["unrepeatable"]:
        raise UserError(f"{count['wrong'] + count['unrepeatable']} of {len(rows)} gradient checks failed")


def _cases(args: argparse.Namespace) -> list[tuple[str, Case, Callable[..., list[Result]]]]:
    """[(name of the layer or network, case, how it is checked), ...]. Raises UsageError for an unknown name."""
    if args.name is None or args.name in CASES:
        if args.model_kwargs:
            raise UsageError("--model-kwargs are options of a network, not of a layer")
        return [(name, case, check) for name in CASES if args.name in (None, name) for case in CASES[name]]
    spelled = {name.lower(): name for name in CASES}
    for near in difflib.get_close_matches(args.name.lower(), spelled, n=1, cutoff=0.75):
        raise UsageError(f"unknown layer {args.name!r}: did you mean {spelled[near]}?")
    yours = models.from_file(args.name)
    if isinstance(yours, type) and issubclass(yours, Layer):
        if any(it.default is it.empty and it.kind not in (it.VAR_POSITIONAL, it.VAR_KEYWORD)
               for it in inspect.signature(yours).parameters.values()):
            raise UsageError(f"{args.name} needs arguments: name a class derived from it that needs none")
        return [(yours.__name__, Case("yours", yours, YOUR_SHAPE), check)]
    name, architecture = models.find(args.name if yours is None else models.register_found(args.name, yours))
    network = architecture.create(CLASSES, models.parse_options(args.model_kwargs))
    output_for(network, IMAGE_SHAPE)
    return [(name, Case("random directions", lambda: network, (*IMAGE_SHAPE, BATCH)), check_directions)]


def _plain(result: Result) -> dict[str, Any]:
    """What JSON can hold, which has no NaN."""
    values = dataclasses.asdict(result)
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}
