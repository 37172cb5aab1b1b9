"""Weights for which a PyTorch network has no kinks: no ReLU and no maximum near the edge where rounding would decide it.

One decision moves the gradients of a network by 1e-3; without kinks, two correct implementations agree in float32 to a
few roundings. Whole channels are switched on or off, so such a network is blind to ReLUs that err on single elements:
those are for ordinary weights in float64, and for the tests of the layers.
"""

import math

import torch
from torch import nn


def _windows(pool, x):
    """x (N, C, H, W) -> (N, C, H', W', pixels of a window) of a max-pool without padding or overlap."""
    if isinstance(pool, nn.AdaptiveMaxPool2d):
        return x.flatten(2)[:, :, None, None]
    return x.unfold(2, pool.kernel_size, pool.stride).unfold(3, pool.kernel_size, pool.stride).flatten(4)


def _gaps(pool, x):
    """Between the two largest of each window. Infinite where there is one pixel only, or where all are zeros of a
    channel that is off: both sides decide that tie alike, and no gradient passes.
    """
    windows = _windows(pool, x)
    if windows.shape[-1] == 1:
        return windows[..., 0] + math.inf
    first, second = windows.topk(2).values.unbind(-1)
    return torch.where((first == 0) & (second == 0), math.inf, first - second)


def _hooked(network, x, on_relu, on_pool, on_bias=lambda module: None):
    """A forward pass that calls on_relu and on_pool with (module, its input), which may return another input, and
    on_bias with each module that has a bias and has just been applied.
    """
    handles = []
    for module in network.modules():
        if isinstance(module, (nn.ReLU, nn.MaxPool2d, nn.AdaptiveMaxPool2d)):
            look = on_relu if isinstance(module, nn.ReLU) else on_pool
            handles.append(module.register_forward_pre_hook(lambda module, inputs, look=look: look(module, inputs[0])))
        elif getattr(module, "bias", None) is not None:
            handles.append(module.register_forward_hook(lambda module, inputs, y: on_bias(module)))
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()


def remove_kinks(network, x, margin=0.5, gap=2e-5, seed=0):
    """Shift the biases so that on x, in training, each channel is on everywhere or off everywhere at each ReLU, `margin`
    away from 0. Off is a quarter, and those channels with a pooling window whose maxima are closer than `gap`.
    """
    chosen, last = torch.Generator().manual_seed(seed), [None]

    def shift(v, by):
        last[0].bias += by  # of the batch norm, convolution or linear layer whose result arrives here
        return v + by[:, None, None]

    def on_relu(relu, v):
        pixels = v if v.ndim == 4 else v[..., None, None]
        off = torch.randperm(v.shape[1], generator=chosen) < v.shape[1] // 4
        by = torch.where(off, -margin - pixels.amax((0, 2, 3)), margin - pixels.amin((0, 2, 3)))
        return shift(pixels, by).reshape(v.shape)

    def on_pool(pool, v):
        if v.min() < 0:  # no ReLU before it that could switch off
            return v
        close = _gaps(pool, v).amin((0, 2, 3)) < gap
        return shift(v, torch.where(close, -margin - v.amax((0, 2, 3)), 0)).relu()

    _hooked(network, x, on_relu, on_pool, lambda module: last.__setitem__(0, module))


def distance_to_kinks(network, x):
    """The smallest distance of a ReLU's input from 0, and the smallest gap between the maxima of a window."""
    distances, gaps = [math.inf], [math.inf]
    _hooked(network, x, lambda relu, v: distances.append(v.abs().min().item()),
            lambda pool, v: gaps.append(_gaps(pool, v).min().item()))
    return min(distances), min(gaps)
