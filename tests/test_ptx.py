"""The GPU's own text of the kernels without a GPU: training steps by nothing else, and the interpreter that runs it.

`pytest --ptx sm_90 -k ptx` tests all ops that way.
"""

import numpy as np
import pytest

import nvrtc
import ptx_machine
import reference
import stand_in_gpu
from conftest import active
from minidl.device import select
from minidl.host_build import OPS
from minidl.kernels import KernelFault, Kernels, launch_settings
from minidl.layers import (AvgPool2d, BatchNorm2d, ChannelDropout, Conv2d, Dropout, GlobalAvgPool2d, Linear, MaxPool2d, ReLU,
                           Residual, Sequential)
from minidl.ops import conv_tensor_core
from test_conv_tensor_core import BROKEN, CASES, forward, inputs
from test_step_graph import ALL, new_run, replayed, train

STEPS = 3


@pytest.fixture(autouse=True)
def ptx(request, monkeypatch):
    """A Target."""
    if request.config.getoption("--sanitize"):
        pytest.skip("with the host's sanitizers NVRTC does not find its own libraries")
    try:
        nvrtc.library()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    monkeypatch.setattr(ptx_machine, "architecture", request.config.getoption("--ptx") or "sm_90")
    with active("ptx") as it:
        yield it


# ---- training --------------------------------------------------------------------------------------------------------


def network():
    """Layers of all kinds, small; two convolutions that tensor cores take, of one not its input gradient. No bias where BLAS
    multiplies: in 16 bits that rounds once more than the CPU's own products."""
    return Sequential(
        conv=Conv2d(3, 16, 3, stride=4, padding=1, bias=False), bn=BatchNorm2d(16, relu=True), pool=MaxPool2d(2),
        block=Residual(Sequential(conv=Conv2d(16, 16, 3, padding=1), drop=ChannelDropout(0.1)), BatchNorm2d(16)),
        down=Conv2d(16, 16, 3, stride=2, padding=1), groups=Conv2d(16, 16, 3, padding=1, groups=4), relu=ReLU(),
        drop=Dropout(0.2), wide=Conv2d(16, 20, 1, bias=False), half=AvgPool2d(2),
        mean=GlobalAvgPool2d(), classifier=Linear(20, 10, bias=False))


@pytest.mark.parametrize("precision, settings", [
    ("fp32", dict(ALL, optimizer="sgd")), ("fp32", dict(optimizer="adamw", reflect=True, padding=3)),
    ("fp32", dict(optimizer="adadelta", warmup_epochs=1)), ("tf32", dict(optimizer="sgd")), ("bf16", dict(optimizer="sgd")),
    ("fp16", dict(optimizer="adam"))], ids=["fp32-sgd", "fp32-adamw", "fp32-adadelta", "tf32", "bf16", "fp16"])
def test_training_steps(monkeypatch, precision, settings):
    """Recorded and replayed, as on a GPU: augmentation, forward, loss, backward, optimizer; and an evaluation. Weights move as on
    the CPU, where other sums are rounded in another order."""
    gpu = stand_in_gpu.install(monkeypatch)
    monkeypatch.setattr(conv_tensor_core, "_has_tensor_cores", lambda device: True)
    run = new_run(gpu, network(), precision=precision, limit_train_batches=STEPS, **settings)
    before = run.network.state_dict()
    metrics = train(run, 1)
    assert replayed(run)
    with launch_settings("fast"):
        other = new_run(select("cpu"), network(), precision=precision, limit_train_batches=STEPS, **settings)
        for got, expected in zip(metrics, train(other, 1), strict=True):
            assert got.loss == pytest.approx(expected.loss, rel=1e-3)
    expected = other.network.state_dict()
    for name, array in run.network.state_dict().items():
        assert np.abs(array - expected[name]).max() < 1e-3 * np.abs(expected[name] - before[name]).max(), name


# ---- what it finds -----------------------------------------------------------------------------------------------------


GPU_ONLY_BUGS = {
    "a fragment is not transposed": ("m8n8.x4.trans.shared", "m8n8.x4.shared"),
    "two words of the left factor exchanged": ('"r"(left[0]), "r"(left[1]), "r"(left[2])', '"r"(left[0]), "r"(left[2]), "r"(left[1])'),
    "one step too early": ('"n"(UNDER_WAY)', '"n"(UNDER_WAY + 1)'),
    "padding is copied": ('"r"(exists ? 16 : 0)', '"r"(16)'),
    "the words of four matrices in another order": ('"=r"(words[0]), "=r"(words[1])', '"=r"(words[1]), "=r"(words[0])'),
}


@pytest.mark.parametrize("bug", [None, *GPU_ONLY_BUGS])
def test_bugs_in_the_text_for_the_gpu_alone(ptx, rng, monkeypatch, tmp_path, bug):
    """Which the emulator, with a text of its own for these words, cannot see."""
    words = (OPS / "tensor_core.cuh").read_text()
    if bug:
        right, wrong = GPU_ONLY_BUGS[bug]
        assert right in words
        words = words.replace(right, wrong)
    source = tmp_path / "conv_tensor_core.cu"
    source.write_text((OPS / source.name).read_text().replace('#include "tensor_core.cuh"', words))
    monkeypatch.setattr(conv_tensor_core, "KERNELS", Kernels(source, fixed_threads=True))
    x, weight, dy = inputs(rng, "bfloat16", *CASES[0])
    try:
        y = forward(ptx, x, weight, dy, 1, 1, "bfloat16")
        right = np.allclose(y, reference.conv2d(x, weight, np.zeros(len(weight)), 1, 1, 1), atol=0.1)
    except KernelFault:
        right = False
    assert right == (bug is None)


FAULTS = {
    "misaligned": ("((const float2*)(x + 1))[0].x + ((const float2*)(x + 1))[0].y", "8 bytes at an address that is not a multiple of that"),
    "behind": ("x[n]", r"400 bytes behind the beginning of an array of 400"),
    "in front": ("x[-(1LL << 36)]", "an address in front of all arrays"),
    "trap": ("(__trap(), 0.f)", "trap"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(ptx, tmp_path, fault):
    value, message = FAULTS[fault]
    source = tmp_path / "faulty.cu"
    source.write_text('#include "common.cuh"\nextern "C" __global__ void faulty(const real* x, real* y, int n) '
                      f'{{ if (threadIdx.x == 3) y[0] = {value}; }}\n')
    with pytest.raises(KernelFault, match=f"^faulty: {message}$"):
        Kernels(source).faulty[2, 32](ptx.array(np.zeros(100), "float32"), ptx.poison(100, "float32"), 100)


def test_results_are_written_where_they_may_be(ptx):
    y = ptx.poison(4, "float32")
    y.flags.writeable = False
    relu = Kernels("relu.cu").relu_forward
    with pytest.raises(KernelFault, match="^relu_forward: writes an array that is read only$"):
        ptx_machine.launch(relu, "float32", (1, 1), 32, [ptx.array(np.ones(4), "float32"), y, np.int64(4)])


@pytest.mark.parametrize("kernel", ["broken_branch", "broken_wait", "broken_commit", "broken_alignment"])
def test_faults_of_warps(ptx, kernel):
    """What does not arrive in time is NaN."""
    x, y = ptx.array(np.arange(128), "float32"), ptx.poison(128, "float32")
    try:
        getattr(BROKEN, kernel)[1, 32](x, y, 128)
        message = "NaN" if np.isnan(y).all() else "nothing"
    except KernelFault as fault:
        message = str(fault).partition(": ")[2]
    assert message == {"broken_branch": "divergent operation of a warp",
                       "broken_alignment": "16 bytes at an address that is not a multiple of that"}.get(kernel, "NaN")


def test_an_instruction_that_it_does_not_know(ptx, tmp_path):
    source = tmp_path / "strange.cu"
    source.write_text('extern "C" __global__ void strange(int* y) { y[0] = __popc(y[1]); }\n')
    with pytest.raises(NotImplementedError, match="the instruction popc"):
        Kernels(source).strange[1, 1](np.zeros(2, np.int32))
