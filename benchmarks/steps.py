"""One training step of a network, by minidl and by PyTorch.

A step is forward, loss, backward and SGD with Nesterov momentum, on a batch that is there already. Dropout is left out: its
masks would differ.
"""

import re
import sys
from pathlib import Path

import numpy as np

import models
import records
from minidl import blas, optim
from minidl.data.dataset import IMAGE_SHAPE
from minidl.kernels import acc_dtype, storage_dtype
from minidl.ops import loss
from minidl.step_graph import StepGraph, StepMemory

WITHOUT_DROPOUT = {"simplenet-5m": dict(rate=0.0)}
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
CLASSES = 100
LAYOUTS = {"torch": "contiguous_format", "torch channels_last": "channels_last"}  # of peers


def macs(name):
    """Multiply-accumulates of one image, forward."""
    return models.create(name, CLASSES).macs(IMAGE_SHAPE)


class Minidl:
    """Steps of minidl's network `name`, and the weights that it starts with."""

    def __init__(self, name, place, precision, batch):
        blas.allow_tf32 = precision == "tf32"
        dtype = storage_dtype(records.PRECISIONS[precision])
        self.place, self.graph = place, StepGraph(StepMemory(place))
        self.network = models.create(name, CLASSES, **WITHOUT_DROPOUT.get(name, {})).initialize(place, dtype)
        self.network.skip_input_gradient()
        self.optimizer = optim.SGD(self.network.parameters, MOMENTUM, WEIGHT_DECAY)
        x, labels = inputs(batch)
        self.x, self.labels = place.array(x.astype(dtype)), place.array(labels)
        self.totals, self.one = place.xp.zeros(4), place.xp.ones(1, acc_dtype(dtype))

    def step(self):
        self.optimizer.set_rate(LR)
        if self.place.name == "cpu":
            self._step()
        else:  # as Trainer does
            self.graph.run(self._step)

    def _step(self):
        logits = self.network.forward(self.x)
        self.network.backward(loss.forward_backward(logits, self.labels, self.totals, self.one))
        self.optimizer.update()

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
    """The same in PyTorch, from the tests' definition of the network. layout: of torch's memory formats."""

    def __init__(self, name, place, precision, batch, layout, compiled=False, state=None):
        self.torch = torch = records.torch_with(precision)
        sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
        import torch_networks

        self.on_gpu, self.bf16 = place.name != "cpu", precision == "bf16"
        where = dict(device=place.name, memory_format=getattr(torch, layout))
        family, _, rest = name.partition("-")
        numbers = map(int, re.findall(r"\d+", rest))
        network = {"simplenet": lambda *_: torch_networks.simplenet(name, CLASSES), "wrn": torch_networks.wide_resnet,
                   "resnext29": torch_networks.resnext29, "res2next29": torch_networks.res2next29}[family](*numbers)
        if state:
            network.load_state_dict({key: torch.from_numpy(array) for key, array in state.items()})
        network.to(**where)
        self.network = torch.compile(network, mode="max-autotune") if compiled else network
        self.optimizer = torch.optim.SGD(network.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
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
