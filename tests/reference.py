"""The definitions: what each operation is, in float64 and word for word. Read this first.

Only forwards are written here. Their gradients come from one generic finite difference, `numerical_vjp`, so that no
derivative made by hand is checked against another one made by hand. minidl never imports this file.

Arrays are (C, H, W, N), channels first and batch last.
"""

import pickle

import numpy as np


def padded(x, padding, outside):
    """x (C, H, W, N) -> (C, H + 2 padding, W + 2 padding, N): np.pad, in a tenth of its time."""
    channels, height, width, batch = x.shape
    result = np.full((channels, height + 2 * padding, width + 2 * padding, batch), outside, dtype=np.float64)
    result[:, padding:padding + height, padding:padding + width] = x
    return result


def conv2d(x, weight, bias, stride, padding, groups):
    """x (C, H, W, N), weight (O, C/groups, kh, kw), bias (O) -> y (O, H', W', N)."""
    outputs, group_channels, kernel_h, kernel_w = weight.shape
    x = padded(x, padding, 0)
    out_h, out_w = ((size - kernel) // stride + 1 for size, kernel in zip(x.shape[1:3], (kernel_h, kernel_w)))
    y = np.zeros((outputs, out_h, out_w, x.shape[3]))
    for group in range(groups):
        inputs = x[group * group_channels:(group + 1) * group_channels]
        of_group = slice(group * outputs // groups, (group + 1) * outputs // groups)
        filters = weight[of_group].reshape(-1, group_channels * kernel_h * kernel_w)
        for oy in range(out_h):
            for ox in range(out_w):
                window = inputs[:, oy * stride:oy * stride + kernel_h, ox * stride:ox * stride + kernel_w]
                y[of_group, oy, ox] = filters @ window.reshape(filters.shape[1], -1) + bias[of_group, None]
    return y


def batch_moments(x):
    """x (C, H, W, N) -> mean (C), biased variance (C)."""
    return x.mean(axis=(1, 2, 3)), x.var(axis=(1, 2, 3))


def batch_norm(x, gamma, beta, mean, var, eps):
    """x (C, H, W, N), the rest (C) -> y (C, H, W, N)."""
    gamma, beta, mean, var = (v[:, None, None, None] for v in (gamma, beta, mean, var))
    return gamma * (x - mean) / np.sqrt(var + eps) + beta


def relu(x):
    return np.maximum(x, 0)


def max_pool(x, window, stride, padding):
    """x (C, H, W, N) -> y (C, H', W', N); padding never wins."""
    return _pool(x, window, stride, padding, -np.inf, lambda w: w.max(axis=(1, 2)))


def avg_pool(x, window, stride, padding):
    """x (C, H, W, N) -> y (C, H', W', N); zeros of the padding count."""
    return _pool(x, window, stride, padding, 0.0, lambda w: w.mean(axis=(1, 2)))


def _pool(x, window, stride, padding, outside, reduce):
    x = padded(x, padding, outside)
    out_h, out_w = ((size - side) // stride + 1 for size, side in zip(x.shape[1:3], window))
    y = np.zeros((x.shape[0], out_h, out_w, x.shape[3]))
    for oy in range(out_h):
        for ox in range(out_w):
            y[:, oy, ox] = reduce(x[:, oy * stride:oy * stride + window[0], ox * stride:ox * stride + window[1]])
    return y


def linear(x, weight, bias):
    """x (C, N), weight (O, C), bias (O) -> y (O, N)."""
    return weight @ x + bias[:, None]


def cross_entropies(logits, labels, smoothing, other_labels=None, share=1.0):
    """logits (K, N), labels (N) -> loss of each column (N). After `mix`: its share, and other labels (N)."""
    classes, batch = logits.shape
    target = np.full((classes, batch), smoothing / classes)
    target[labels, np.arange(batch)] += (1 - smoothing) * share
    if other_labels is not None:
        target[other_labels, np.arange(batch)] += (1 - smoothing) * (1 - share)
    shifted = logits - logits.max(axis=0)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=0))
    return -(target * log_p).sum(axis=0)


def ranks(logits, labels):
    """Place of the label, 0 for the first, when the classes are sorted by falling logit, ties by class -> (N)."""
    order = np.argsort(-logits, axis=0, kind="stable")
    return np.array([np.flatnonzero(order[:, n] == label)[0] for n, label in enumerate(labels)])


def augment(image, shift_y, shift_x, flip, cut_y, cut_x, mean, std, padding, reflect, cutout):
    """One image uint8 (C, H, W) -> float64 (C, H, W): normalize, pad, crop, flip, cut out."""
    channels, height, width = image.shape
    x = (image / 255 - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)), mode="reflect" if reflect else "constant")
    top, left = padding + shift_y, padding + shift_x
    x = x[:, top:top + height, left:left + width]
    if flip:
        x = x[:, :, ::-1]
    x = x.copy()
    x[:, max(cut_y, 0):max(cut_y + cutout, 0), max(cut_x, 0):max(cut_x + cutout, 0)] = 0
    return x


def mix(x, share):
    """Mixup of x (C, H, W, N): each image with the one as far from the end of the batch as itself from its beginning."""
    return share * x + (1 - share) * x[..., ::-1]


def sgd(w, grads, lr, momentum, weight_decay, nesterov):
    """w after one step of SGD per gradient in `grads`."""
    velocity = np.zeros_like(w)
    for grad in grads:
        grad = grad + weight_decay * w
        velocity = momentum * velocity + grad
        w = w - lr * (grad + momentum * velocity if nesterov else velocity)
    return w


def adam(w, grads, lr, beta1, beta2, eps, weight_decay):
    """w after one step of Adam per gradient in `grads`."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, grad in enumerate(grads, start=1):
        grad = grad + weight_decay * w
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2
        w = w - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    return w


def adamw(w, grads, lr, beta1, beta2, eps, weight_decay):
    """w after one step of AdamW per gradient in `grads`."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, grad in enumerate(grads, start=1):
        w = w - lr * weight_decay * w
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2
        w = w - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    return w


def adadelta(w, grads, lr, rho, eps, weight_decay):
    """w after one step of AdaDelta per gradient in `grads`."""
    mean_g2, mean_dx2 = np.zeros_like(w), np.zeros_like(w)
    for grad in grads:
        grad = grad + weight_decay * w
        mean_g2 = rho * mean_g2 + (1 - rho) * grad**2
        dx = np.sqrt((mean_dx2 + eps) / (mean_g2 + eps)) * grad
        mean_dx2 = rho * mean_dx2 + (1 - rho) * dx**2
        w = w - lr * dx
    return w


def average(values, decay):
    """The exponential average of `values`, the first from the beginning, one after each step; it soon forgets the first."""
    e = values[0]
    for t, value in enumerate(values[1:], start=1):
        d = min(decay, (1 + t) / (10 + t))
        e = d * e + (1 - d) * value
    return e


def clip(grad, clip_norm):
    """The gradient, shortened to a norm of `clip_norm` where it is longer."""
    return grad * min(1, clip_norm / (np.linalg.norm(grad) + 1e-6))


def numerical_vjp(f, arguments, index, dy, h=1e-3):
    """d <dy, f(*arguments)> / d arguments[index], by central differences of fourth order, in float64.

    The error is about h^4 times the fifth derivative plus 1e-16 / h: near 1e-12 for smooth f of size 1.
    Computed once for equal arguments, which a test has on all targets; so it can only be read.
    """
    key = f, pickle.dumps((arguments, index, dy, h))
    if key not in _known:
        _known[key] = _central_differences(f, arguments, index, dy, h)
        _known[key].flags.writeable = False
    return _known[key]


_known = {}


def _central_differences(f, arguments, index, dy, h):
    arguments = [np.array(argument, dtype=np.float64) if isinstance(argument, np.ndarray) and argument.dtype.kind == "f"
                 else argument for argument in arguments]
    x = arguments[index]
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        value = x[i]
        for offset, factor in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
            x[i] = value + offset * h
            gradient[i] += factor * (dy * f(*arguments)).sum()
        x[i] = value
        gradient[i] /= 12 * h
    return gradient


def distinct(rng, shape, gap=0.05):
    """Shuffled distinct values, at least `gap` apart and gap/2 from 0: no kinks of maxima and ReLUs within reach of h."""
    count = int(np.prod(shape))
    return rng.permutation((np.arange(count) - count // 2 + 0.5) * gap).reshape(shape)


# Tolerances. float64 kernels against float64 references; float32 kernels, whose error grows with the square root of
# the number of terms in a sum; 16-bit storage, which rounds by up to 2^-8 (bfloat16) or 2^-11 (float16) of a value.
def tolerance(dtype, terms=1):
    """Relative tolerance of a result that sums `terms` products."""
    return {"float64": 1e-6, "float32": min(1e-5 * terms**0.5, 1e-3), "bfloat16": 2.0**-7, "float16": 2.0**-10}[dtype]


def assert_close(actual, expected, rtol, what=""):
    """|actual - expected| <= rtol * max(|expected| of this element, a typical size of all). NaN never passes.

    The typical size, the root mean square, keeps sums that cancel to nearly 0 from being asked for more digits than
    their terms have.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    if expected.size == 0:
        return
    allowed = rtol * np.maximum(np.abs(expected), np.sqrt(np.mean(expected**2)))
    wrong = ~(np.abs(actual - expected) <= allowed + 1e-300)
    if wrong.any():
        worst = np.unravel_index(np.nanargmax(np.where(np.isnan(actual), np.inf, np.abs(actual - expected)) - allowed), actual.shape)
        raise AssertionError(f"{what}: {wrong.sum()} of {wrong.size} elements differ; worst at {tuple(map(int, worst))}: "
                             f"got {actual[worst]!r}, expected {expected[worst]!r}, allowed {allowed[worst]:.3g}")
