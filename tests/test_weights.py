"""Files of weights: what goes in comes out, what is damaged or hostile is refused in one line, what fits is converted."""

import io
import json
import os
import pickle
import random
import re
import resource
import shlex
import stat
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from argparse import Namespace
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

import models
from minidl import data, weights
from minidl.commands.import_weights import described
from minidl.errors import CheckpointError, UsageError
from test_train import DIGITS, assert_refused, python, train

METADATA = {"format": "minidl weights 1", "arch": "report-resnext3", "options": {"logits": "linear"}, "classes": 7,
            "dataset": "digits", "mean": [0.3, 0.3, 0.3], "std": [0.4, 0.4, 0.4], "class_names": list("abcdefg")}
GRID = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
ARRAYS = {  # as they lie in memory
    "contiguous": GRID, "by_columns": np.asfortranarray(GRID), "transposed": GRID.T, "strided": GRID[:, ::2, 1::2],
    "backwards": GRID[::-1, :, ::-1], "repeated": np.broadcast_to(GRID[:, :1], (2, 5, 4)), "big_endian": GRID.astype(">f4"),
    "number": np.array(7.5), "big_endian_number": np.array(7.5, ">f8"), "empty": np.zeros((0, 3)),
    "half": GRID.astype(np.float16), "count": np.array(12345678901), "small": np.array([1, -2], np.int8),
    "bool": np.array([True, False]), "file": GRID, "läufer.✓": GRID,
}


def npy(array, **settings):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **settings)
    return file.getvalue()


def pack(path, members, compression=zipfile.ZIP_STORED):
    """A zip file of {name: bytes}."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return path


def write_compressed(path, state):
    pack(path, {f"{name}.npy": npy(array) for name, array in state.items()}, zipfile.ZIP_DEFLATED)


def write_safetensors(path, state):
    pytest.importorskip("safetensors", reason="its files need it: pip install 'minidl[interchange]'")
    weights.save_safetensors(path, state)


def write_torch(path, content, **settings):
    """content: a state, or what holds one; arrays become tensors. PyTorch has no big-endian and no backward arrays."""
    torch = pytest.importorskip("torch", reason="its files need it: pip install 'minidl[torch]'")

    def tensors(part):
        if isinstance(part, dict):
            return {name: tensors(value) for name, value in part.items()}
        return torch.tensor(part.astype(part.dtype.newbyteorder("="), order="C")) if isinstance(part, np.ndarray) else part

    torch.save(tensors(content), path, **settings)


def write_old_torch(path, content):
    write_torch(path, content, _use_new_zipfile_serialization=False)


WRITERS = {"npz": weights.save, "compressed npz": write_compressed, "safetensors": write_safetensors, "PyTorch": write_torch,
           "PyTorch before 1.6": write_old_torch}


@pytest.fixture(params=WRITERS)
def write(request):
    """A function (path, state) that writes a file of some kind."""
    return WRITERS[request.param]


def refusal(path):
    """Why `load` refuses a file: in one line, and without advice to trust it."""
    with pytest.raises(CheckpointError) as caught:
        weights.load(path)
    text = str(caught.value)
    assert caught.value.exit_code == 5 and "\n" not in text
    assert "allow_pickle" not in text and "weights_only" not in text
    assert text.startswith(f"{path} cannot be read: ")
    return text.removeprefix(f"{path} cannot be read: ")


@contextmanager
def at_most(megabytes):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 1e6
    finally:
        tracemalloc.stop()


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(state[name], array) and state[name].shape == array.shape, name


# ---- round trips -------------------------------------------------------------------------------------------------


def test_arrays_go_round(write, tmp_path):
    write(tmp_path / "it", ARRAYS)  # the name says nothing about the kind
    state, metadata = weights.load(tmp_path / "it")
    assert_same(state, ARRAYS)
    assert metadata is None
    for name, array in state.items():
        assert array.flags.c_contiguous and array.flags.writeable and array.dtype.isnative, name
        assert array.dtype == (np.float32 if name == "half" else ARRAYS[name].dtype.newbyteorder("=")), name


def test_later_versions_of_npy(tmp_path):
    pack(tmp_path / "it.npz", {"a.npy": npy(GRID, version=(2, 0)), "b.npy": npy(GRID, version=(1, 0))})
    assert_same(weights.load(tmp_path / "it.npz")[0], {"a": GRID, "b": GRID})


@pytest.mark.parametrize("save", [weights.save, weights.save_safetensors])
def test_metadata_go_round(tmp_path, save):
    if save is weights.save_safetensors:
        pytest.importorskip("safetensors", reason="its files need it: pip install 'minidl[interchange]'")
    save(tmp_path / "it", {"metadata": GRID} if save is weights.save_safetensors else {"a": GRID}, METADATA)
    state, metadata = weights.load(tmp_path / "it")
    assert metadata == METADATA and len(state) == 1


def test_description():
    train_set, _ = data.load("digits")
    assert weights.describe("wrn-28-10", 10, {"dropout": 0.3}, train_set) == {
        "format": "minidl weights 1", "arch": "wrn-28-10", "options": {"dropout": 0.3}, "classes": 10, "dataset": "digits",
        "mean": list(train_set.mean), "std": list(train_set.std), "class_names": list("0123456789")}
    unknown = weights.describe("wrn-28-10", 10, {})
    assert [unknown[name] for name in ("dataset", "mean", "std", "class_names")] == [None] * 4


def test_numpy_alone_reads_it(tmp_path):
    weights.save(tmp_path / "it.npz", ARRAYS, METADATA)
    with np.load(tmp_path / "it.npz", allow_pickle=False) as file:
        assert file["metadata"].dtype.kind == "U" and '"arch": "report-resnext3"' in str(file["metadata"])
        assert_same({name: array for name, array in file.items() if name != "metadata"}, ARRAYS)


def test_one_state_one_file(tmp_path):
    for name in "ab":
        weights.save(tmp_path / name, ARRAYS, METADATA)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# ---- whole or not at all -----------------------------------------------------------------------------------------


def test_what_cannot_be_written_leaves_what_was(tmp_path):
    path = tmp_path / "it.npz"
    weights.save(path, {"a": GRID})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="it.npz cannot be written: File too large$"):
            weights.save(path, {"a": np.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_same(weights.load(path)[0], {"a": GRID})
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        weights.save(path, {"a": np.array([None])})
    assert list(tmp_path.iterdir()) == [path]


def test_the_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        weights.save(tmp_path / "it.npz", {"a": GRID})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "it.npz").stat().st_mode) == 0o640


# ---- damage ------------------------------------------------------------------------------------------------------


def test_a_file_cut_anywhere(write, tmp_path):
    path = tmp_path / "it"
    write(path, ARRAYS)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert refusal(path)


def write_sealed(path, state):
    weights.save(path, state, METADATA)


@pytest.mark.parametrize("write, stride", [(weights.save, 3), (write_compressed, 3), (write_sealed, 29)])
def test_every_flipped_bit_is_found_or_makes_no_difference(tmp_path, write, stride):
    path, state = tmp_path / "it", {"a": GRID[0], "b": np.array(1.5)}
    write(path, state)
    whole = path.read_bytes()
    refused = 0
    for bit in range(0, 8 * len(whole), stride):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            read, metadata = weights.load(path)
            assert_same(read, state)  # a time, a version, a permission
            assert metadata == (METADATA if write is write_sealed else None)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 4 * len(whole) // stride


@pytest.mark.parametrize("kind", ["safetensors", "PyTorch", "PyTorch before 1.6"])
def test_random_damage_ends_in_a_message(tmp_path, kind):
    """These have no sums that would find all of it."""
    path = tmp_path / "it"
    WRITERS[kind](path, ARRAYS)
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            weights.load(path)
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("content, reason", [
    (b"", "it is empty"), (b"weights", "it is neither .npz, .safetensors nor a file of PyTorch"),
    (b"<html>404 Not Found</html>", "it is neither"), (b"PK\3\4" + bytes(100), "it is damaged: File is not a zip file"),
    (b"PK\5\6" + bytes(18), "it holds no arrays")])
def test_what_is_no_file_of_weights(tmp_path, content, reason):
    (tmp_path / "it.npz").write_bytes(content)
    assert refusal(tmp_path / "it.npz").startswith(reason)


def test_what_is_no_file(tmp_path):
    assert refusal(tmp_path / "it.npz") == "No such file or directory"
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == "it is not a file"
    with pytest.raises(CheckpointError, match="last.npz cannot be read: No such file or directory$"):
        weights.load(tmp_path)  # as if it were the folder of a run
    assert refusal(tmp_path / ("x" * 300)) == "File name too long"


@pytest.mark.parametrize("raw, reason", [
    (b"text", "not an array of NumPy"), (b"", "not an array of NumPy"),
    (npy(GRID)[:-1], "float32 (2, 3, 4) needs 96 bytes, the file has 95"),
    (npy(GRID) + b"x", "float32 (2, 3, 4) needs 96 bytes, the file has 97"),
    (npy(GRID).replace(b"(2, 3, 4)", b"(2, 3, 9)"), "float32 (2, 3, 9) needs 216 bytes, the file has 96"),
    (npy(np.zeros((1, 1))).replace(b"(1, 1)", b"(9**9)"), "not a plain array of NumPy"),
    (npy(np.zeros(1)).replace(b"(1,), }", b"(1,),} "), "not a plain array of NumPy"),
    (npy(GRID).replace(b"'<f4'", b"'<f3'"), "type '<f3' is unknown"),
    (npy(GRID).replace(b"'<f4'", b"'<q4'"), "not a plain array of NumPy"),
    (npy(GRID).replace(b"NUMPY\1", b"NUMPY\3"), "not an array of NumPy"),
    (npy(np.zeros(2, np.complex64)), "complex64 is not a type of weights"),
    (npy(np.array(["a"])), "<U1 is not a type of weights"),
    (npy(np.zeros(2, [("a", "<f4")])), "not a plain array of NumPy"), (npy(np.zeros(2, "V2")), "|V2 is not a type of weights"),
])
def test_members_that_are_not_weights(tmp_path, raw, reason):
    assert refusal(pack(tmp_path / "it.npz", {"a.npy": npy(GRID), "b.npy": raw})) == f"'b': {reason}"


def test_names_of_members(tmp_path):
    assert refusal(pack(tmp_path / "it.npz", {"read\nme": b""})) == "its member 'read\\nme' is not an .npy"
    with zipfile.ZipFile(tmp_path / "it.npz", "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        for _ in range(2):
            archive.writestr("a.npy", npy(GRID))
    assert refusal(tmp_path / "it.npz") == "its member 'a.npy' is there twice"


@pytest.mark.parametrize("text, reason", [
    ("{", "its metadata are not JSON"), ("[" * 100_000, "its metadata are not JSON"),
    ("[]", "its metadata are not of the form"),
    ('{"format": "minidl weights 2"}', "its metadata are not of the form 'minidl weights 1'")])
def test_metadata_that_are_none(tmp_path, text, reason):
    pack(tmp_path / "it.npz", {"a.npy": npy(GRID), "metadata.npy": npy(np.array(text))})
    assert refusal(tmp_path / "it.npz").startswith(reason)


@pytest.mark.parametrize("change", [
    dict(classes=0), dict(classes="7"), dict(arch=None), dict(options=[]), dict(mean=0.5), dict(dataset=1),
    dict(class_names="a")])
def test_metadata_of_wrong_content(tmp_path, change):
    weights.save(tmp_path / "it.npz", {"a": GRID}, {**METADATA, **change})
    assert refusal(tmp_path / "it.npz") == "its metadata are not of the form 'minidl weights 1'"


def edit(path, name, change):
    """Let change(bytes) replace the member `name` of a zip file, with all checksums of zip as they should be."""
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    members[name] = change(members[name])
    return pack(path, {member: raw for member, raw in members.items() if raw is not None})


@pytest.mark.parametrize("name, change, reason", [
    ("a.npy", lambda raw: raw[:-1] + b"!", "'a' is not what was written"),
    ("a.npy", lambda raw: raw.replace(b"(2, 3, 4)", b"(2, 4, 3)"), "'a' is not what was written"),
    ("a.npy", lambda raw: raw.replace(b"<f4", b"<i4"), "'a' is not what was written"),
    ("a.npy", lambda raw: None, "arrays are missing"),
    ("c.npy", lambda raw: npy(GRID), "'c' is not what was written"),
    ("metadata.npy", lambda raw: raw.replace(*("r\0\0\0e\0\0\0p".encode(), "R\0\0\0e\0\0\0p".encode())),
     "its metadata are not those that their hash was taken of"),
])
def test_what_was_changed_after_it_was_sealed(tmp_path, name, change, reason):
    """By whoever also made the checksums of the zip file right: damage in memory, or a program of others."""
    weights.save(tmp_path / "it.npz", {"a": GRID, "b": GRID}, METADATA)
    with zipfile.ZipFile(tmp_path / "it.npz") as archive:
        if name not in archive.namelist():
            pack(tmp_path / "it.npz", {member: archive.read(member) for member in archive.namelist()} | {name: b""})
    assert refusal(edit(tmp_path / "it.npz", name, change)) == f"it is damaged: {reason}"


def test_what_others_wrote_needs_no_seal(tmp_path):
    np.savez(tmp_path / "it.npz", a=GRID, metadata=np.array(json.dumps(METADATA)))
    state, metadata = weights.load(tmp_path / "it.npz")
    assert_same(state, {"a": GRID})
    assert metadata == METADATA


# ---- files that are meant to do harm -----------------------------------------------------------------------------


class Evil:
    """Its pickle leaves a file behind where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.path))}",)


def test_an_array_of_objects(tmp_path):
    raw = npy(np.array([Evil(tmp_path / "harm")]), allow_pickle=True)
    pack(tmp_path / "it.npz", {"a.npy": raw})
    assert refusal(tmp_path / "it.npz") == "'a': an array of Python objects, which only a pickle can hold"
    assert not (tmp_path / "harm").exists()
    np.load(tmp_path / "it.npz", allow_pickle=True)["a"]
    assert (tmp_path / "harm").exists(), "this is what it would do"


@pytest.mark.parametrize("kind", ["plain pickle", "PyTorch", "PyTorch before 1.6"])
def test_a_pickle_that_calls_something(tmp_path, kind):
    pytest.importorskip("torch", reason="its files need it: pip install 'minidl[torch]'")
    content = {"a": GRID, "state_dict": Evil(tmp_path / "harm")}
    if kind == "plain pickle":
        (tmp_path / "it.pt").write_bytes(pickle.dumps({"state_dict": content["state_dict"]}, 2))
    else:
        WRITERS[kind](tmp_path / "it.pt", content)
    assert re.match(r"PyTorch refuses it: [Uu]nsupported .*system", refusal(tmp_path / "it.pt"))
    assert not (tmp_path / "harm").exists()


def lie_about_the_size(path, size):
    """Let each member of a zip file declare `size` bytes."""
    raw = bytearray(path.read_bytes())
    for start in [match.start() for match in re.finditer(b"PK\1\2", raw)]:
        raw[start + 24:start + 28] = struct.pack("<I", size)
    path.write_bytes(raw)


def test_a_compressed_bomb(tmp_path):
    path = tmp_path / "it.npz"
    bomb = npy(np.zeros(25_000_000))
    pack(path, {"a.npy": bomb}, zipfile.ZIP_DEFLATED)
    with at_most(megabytes=3):
        assert refusal(path).startswith(f"it declares arrays of 200,000,128 bytes, and has {path.stat().st_size:,}")
    lie_about_the_size(path, 10_000)
    with at_most(megabytes=3):
        assert refusal(path) == "it is damaged: Bad CRC-32 for file 'a.npy'"


def test_members_that_share_their_bytes(tmp_path):
    path = pack(tmp_path / "it.npz", {f"{name}.npy": npy(GRID) for name in "abcdefghij"})
    raw = bytearray(path.read_bytes())
    for start in [match.start() for match in re.finditer(b"PK\1\2", raw)]:
        raw[start + 20:start + 28] = struct.pack("<II", 1000, 1000)
    path.write_bytes(raw)
    assert refusal(path) == "it is damaged: its members overlap"


def test_arrays_larger_than_their_file(tmp_path):
    header = npy(np.zeros(1)).replace(b"(1,), }" + b" " * 12, b"(1000000000000,), }")
    with at_most(megabytes=3):
        assert refusal(pack(tmp_path / "it.npz", {"a.npy": header})) == (
            "'a': float64 (1000000000000,) needs 8,000,000,000,000 bytes, the file has 8")


def test_a_tensor_of_strides_0(tmp_path):
    torch = pytest.importorskip("torch", reason="its files need it: pip install 'minidl[torch]'")
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "it.pt")
    assert refusal(tmp_path / "it.pt").startswith("it declares arrays of 4,000,000,000,000 bytes, and has ")


# ---- files of others ---------------------------------------------------------------------------------------------


def test_safetensors_of_16_bits(tmp_path):
    pytest.importorskip("safetensors", reason="its files need it: pip install 'minidl[interchange]'")
    values = np.array([1.0, -2.5, 3e38, 0.0], np.float32)
    upper_halves = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    header = b'{"a":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}'
    (tmp_path / "it").write_bytes(struct.pack("<Q", len(header)) + header + upper_halves)
    state, _ = weights.load(tmp_path / "it")
    assert state["a"].dtype == np.float32 and state["a"].shape == (2, 2)
    assert np.allclose(state["a"].ravel(), values, rtol=2**-7)
    header = header.replace(b"BF16", b"F8_E4M3").replace(b"[2,2]", b"[4,2]")
    (tmp_path / "it").write_bytes(struct.pack("<Q", len(header)) + header + upper_halves)
    assert refusal(tmp_path / "it") in ("'a': F8_E4M3 is not a type of weights",
                                        "it is damaged: Error while deserializing: InvalidHeaderDeserialization")  # before 0.5


def test_safetensors_that_say_nothing_about_themselves(tmp_path):
    pytest.importorskip("safetensors", reason="its files need it: pip install 'minidl[interchange]'")
    for about in (b"null", b"{}", b'{"format":"pt"}'):
        header = b'{"__metadata__":' + about + b',"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'
        (tmp_path / "it").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        state, metadata = weights.load(tmp_path / "it")
        assert_same(state, {"a": np.array(0.0)})
        assert metadata is None


@pytest.mark.parametrize("wrap", [
    lambda state: state, lambda state: {"state_dict": state, "epoch": 3}, lambda state: {"model": state, "args": {"lr": 0.1}},
    lambda state: {"state_dict": {f"module.{name}": array for name, array in state.items()}},
    lambda state: {"model": {f"_orig_mod.module.{name}": array for name, array in state.items()}}])
def test_ways_to_keep_a_state_dict(tmp_path, wrap):
    state = {"conv.weight": GRID, "bn.num_batches_tracked": np.array(3)}
    write_torch(tmp_path / "it.pth", wrap(state))
    assert_same(weights.load(tmp_path / "it.pth")[0], state)


def test_tensors_of_pytorch(tmp_path):
    torch = pytest.importorskip("torch", reason="its files need it: pip install 'minidl[torch]'")
    tensors = {"half": torch.ones(2, dtype=torch.float16), "brain": torch.ones(2, dtype=torch.bfloat16),
               "single": torch.ones(2), "double": torch.ones(2, dtype=torch.float64),
               "parameter": torch.nn.Parameter(torch.ones(2)), "transposed": torch.arange(6.0).reshape(2, 3).T}
    torch.save(tensors, tmp_path / "it.pt")
    state, _ = weights.load(tmp_path / "it.pt")
    assert [str(array.dtype) for array in state.values()] == ["float32"] * 3 + ["float64"] + ["float32"] * 2
    assert np.array_equal(state["transposed"], np.arange(6).reshape(2, 3).T)
    torch.save({"a": torch.ones(2).to_sparse()}, tmp_path / "it.pt")
    assert refusal(tmp_path / "it.pt") == "'a': torch.float32, torch.sparse_coo is not a type of weights"


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, {"state_dict": {"a": "b"}}])
def test_files_of_pytorch_without_weights(tmp_path, content):
    write_torch(tmp_path / "it.pt", content)
    assert refusal(tmp_path / "it.pt") == 'it holds no state dict, neither alone nor as "state_dict" or "model"'


@pytest.mark.parametrize("module", [None, SimpleNamespace(__version__="2.5.1+cu121")], ids=["none", "old"])
def test_without_pytorch_there_is_a_command_that_converts(tmp_path, monkeypatch, module):
    pytest.importorskip("safetensors", reason="its files need it: pip install 'minidl[interchange]'")
    path = tmp_path / "It's.pt"
    write_torch(path, {"state_dict": {"module.a": GRID, "module.b": np.asfortranarray(GRID)}})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", module)
        with pytest.raises(CheckpointError) as caught:
            weights.load(path)
    said, _, command = str(caught.value).partition("this converts the file: python ")
    assert "PyTorch 2.6 or newer" in said and "\n" not in command
    subprocess.run([sys.executable, *shlex.split(command)], check=True, timeout=100)
    assert_same(weights.load(path.with_suffix(".safetensors"))[0], {"a": GRID, "b": GRID})


def test_without_safetensors(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "it", {"a": GRID})
    for module in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    for use in (lambda: weights.load(tmp_path / "it"), lambda: weights.save_safetensors(tmp_path / "more", {"a": GRID})):
        with pytest.raises(UsageError, match=re.escape('safetensors is needed: `pip install "minidl[interchange]"`')):
            use()
    assert not (tmp_path / "more").exists()


# ---- python -m minidl --------------------------------------------------------------------------------------------


def minidl(folder, *arguments):
    return python(folder, "-m", "minidl", *arguments)


@pytest.fixture(scope="module")
def state():
    """Of a report-resnext3-fixed with 7 classes, whose statistics have moved."""
    network = models.create("report-resnext3-fixed", 7).initialize(seed=1)
    network.forward(np.random.default_rng(0).normal(2, 3, (3, 32, 32, 4)).astype(np.float32))
    return network.state_dict()


@pytest.fixture
def run_folder(tmp_path, state):
    """What is left of a run: tmp_path/it/last.npz."""
    (tmp_path / "it").mkdir()
    weights.save(tmp_path / "it" / "last.npz", state, METADATA)
    return tmp_path / "it"


def test_a_run_is_exported_and_imported(tmp_path):
    for module in ("safetensors", "onnx"):
        pytest.importorskip(module, reason="its files need it: pip install 'minidl[interchange]'")
    assert train(tmp_path, *DIGITS, "--epochs", "1", "-o", "it").returncode == 0
    state, metadata = weights.load(tmp_path / "it")
    assert (metadata["arch"], metadata["classes"], metadata["dataset"]) == ("simplenet-310k", 10, "digits")
    for kind in ("safetensors", "onnx"):
        result = minidl(tmp_path, "export", "it", "--to", kind)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == f"it/weights.{kind}: 312,362 parameters of simplenet-310k\n"
    result = minidl(tmp_path, "import", "it/weights.safetensors", "--arch", "simplenet-310k")
    assert (result.returncode, result.stdout) == (0, "weights.npz: 312,362 parameters of simplenet-310k\n")
    imported, what_is_known = weights.load(tmp_path / "weights.npz")
    assert_same(imported, state)
    assert what_is_known == metadata


def test_what_an_imported_file_was_trained_on(run_folder, state, tmp_path):
    """A plain .npz does not say it."""
    _, digits = data.load("digits")
    fitting = {**state, "classifier.weight": np.zeros((10, state["classifier.weight"].shape[1])), "classifier.bias": np.zeros(10)}
    for name, arrays in (("other.npz", state), ("fits.npz", fitting)):
        weights.save(tmp_path / name, arrays)
    arguments = ("--arch", "report-resnext3", "--dataset", "digits", "-o", "new.npz")
    assert_refused(minidl(tmp_path, "import", "other.npz", *arguments), 2, "other.npz knows 7 classes, digits has 10")
    weights.save(tmp_path / "no network.npz", {f"renamed.{name}": array for name, array in fitting.items()})
    assert_refused(minidl(tmp_path, "import", "no network.npz", *arguments), 5, "conv.weight: missing in the file")
    assert minidl(tmp_path, "import", "fits.npz", *arguments).returncode == 0
    metadata = weights.load(tmp_path / "new.npz")[1]
    assert (metadata["dataset"], metadata["mean"], metadata["class_names"]) == ("digits", list(digits.mean), list("0123456789"))


def test_what_the_file_says_of_its_data_holds(run_folder, state, tmp_path):
    """A recipe may normalize images otherwise than the data set's own mean would."""
    arrays = {**state, "classifier.weight": np.zeros((10, state["classifier.weight"].shape[1])), "classifier.bias": np.zeros(10)}
    _, digits = data.load("digits")
    known = {**weights.describe("report-resnext3", 10, {}, digits), "mean": [0.0] * 3, "std": [1.0] * 3}
    for name, changes, said in (("its own", {}, ""), ("dataset", {"dataset": "cifar10"}, "trained on cifar10, not on digits"),
                                ("classes", {"dataset": None, "class_names": list("abcdefghij")}, "trained on other classes, not on")):
        weights.save(tmp_path / f"{name}.npz", arrays, {**known, **changes})
        result = minidl(tmp_path, "import", f"{name}.npz", "--arch", "report-resnext3", "--dataset", "digits", "-o", "new.npz")
        if said:
            assert_refused(result, 2, f"{name}.npz says that it was {said}")
        else:
            assert result.returncode == 0 and weights.load(tmp_path / "new.npz")[1] == known
            (tmp_path / "new.npz").unlink()


def test_options_that_the_file_knows(tmp_path):
    """Whoever names the network again does not lose them: extra_pool has no weights that would tell."""
    pytest.importorskip("onnx", reason="its files need it: pip install 'minidl[interchange]'")
    network = models.create("simplenet-310k", 10, extra_pool=True).initialize(seed=1)
    weights.save(tmp_path / "it.npz", network.state_dict(), weights.describe("simplenet-310k", 10, {"extra_pool": True}))
    for name, more in (("a", ()), ("b", ("--arch", "simplenet-310k"))):
        assert minidl(tmp_path, "export", "it.npz", "--to", "onnx", "-o", f"{name}.onnx", *more).returncode == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    other = ("--arch", "simplenet-310k", "--model-kwargs", "extra_pool=false", "-o", "c.onnx")
    assert minidl(tmp_path, "export", "it.npz", "--to", "onnx", *other).returncode == 0
    assert (tmp_path / "c.onnx").read_bytes() != (tmp_path / "a.onnx").read_bytes()


def test_a_damaged_checkpoint_names_the_one_before_it(run_folder):
    (run_folder / "last.npz").rename(run_folder / "last.previous.npz")
    with pytest.raises(CheckpointError, match=r"last\.npz cannot be read: No such file or directory; "
                                              r"the one before it is .*last\.previous\.npz$"):
        weights.load(run_folder)


def test_the_plain_npz(run_folder, state):
    result = minidl(run_folder.parent, "export", "it", "--to", "npz")
    assert (result.returncode, result.stdout) == (0, "it/weights.npz: 3,869 parameters of report-resnext3\n")
    with np.load(run_folder / "weights.npz", allow_pickle=False) as file:
        assert_same(dict(file), state)


def test_weights_without_a_name(tmp_path, state):
    """From PyTorch to ONNX, the network named on the command line."""
    onnx = pytest.importorskip("onnx", reason="its files need it: pip install 'minidl[interchange]'")
    write_torch(tmp_path / "it.pt", state)
    assert_refused(minidl(tmp_path, "export", "it.pt", "--to", "onnx"), 2, "does not say which network its weights belong to", "--arch")
    named = "--arch", "report-resnext3", "--model-kwargs", "logits=linear"
    assert minidl(tmp_path, "export", "it.pt", "--to", "onnx", *named).returncode == 0
    properties = {entry.key: entry.value for entry in onnx.load(tmp_path / "it.onnx").metadata_props}
    assert [properties[name] for name in ("arch", "options", "classes")] == ["report-resnext3", '{"logits": "linear"}', "7"]
    assert_refused(minidl(tmp_path, "export", "it.pt", "--to", "npz", *named[2:]), 2, "name it with --arch")
    assert_refused(minidl(tmp_path, "export", "it.pt", "--to", "npz", "--arch", "wrn-10-1"), 5,
                   "conv1.weight: missing in the file")
    assert not (tmp_path / "it.npz").exists()


def test_nothing_is_overwritten(run_folder):
    folder = run_folder.parent
    for precious in (folder / "weights.npz", run_folder / "weights.npz"):
        precious.write_text("precious")
    (folder / "dangling.npz").symlink_to("nowhere")
    for arguments, output in ((("export", "it", "--to", "npz"), "it/weights.npz"),
                              (("import", "it", "--arch", "report-resnext3"), "weights.npz"),
                              (("export", "it", "--to", "npz", "-o", "dangling.npz"), "dangling.npz"),
                              (("import", "it", "--arch", "report-resnext3", "-o", "it"), "it")):
        result = minidl(folder, *arguments)
        assert_refused(result, 2, f"{output} exists: name another with -o")
        assert result.stdout == ""
    assert {(path / "weights.npz").read_text() for path in (folder, run_folder)} == {"precious"}
    assert (folder / "dangling.npz").is_symlink()


def test_weights_that_do_not_fit(tmp_path, state):
    faulty = {name: array for name, array in state.items() if not name.startswith("stem.")}
    faulty["spare"] = GRID
    faulty["halve1.conv.weight"] = np.zeros((8, 16, 1, 1), np.float32)
    weights.save(tmp_path / "it.npz", faulty)
    result = minidl(tmp_path, "import", "it.npz", "--arch", "report-resnext3-fixed", "-o", "new.npz")
    assert_refused(result, 5, "\nstem.conv.weight: missing in the file\nstem.conv.bias: missing in the file\n",
                   "\n... and 3 more\n")
    assert len(result.stderr.splitlines()) == 7 and result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["it.npz"]


@pytest.mark.parametrize("change, line", [
    (dict(spare=GRID), "spare: not in the model"),
    ({"halve1.conv.weight": np.zeros((8, 16, 1, 1))}, "halve1.conv.weight: file (8, 16, 1, 1), model (8, 16, 3, 3)"),
    ({"classifier.weight": np.zeros(())}, "classifier.weight: file (), model (1, 4)"),
    ({"classifier.weight": np.zeros((10**12, 0))}, "classifier.weight: file (1000000000000, 0), model (1, 4)"),
])
def test_each_mismatch_is_named(tmp_path, state, change, line):
    weights.save(tmp_path / "it.npz", {**state, **change})
    result = minidl(tmp_path, "import", "it.npz", "--arch", "report-resnext3-fixed", "-o", "new.npz")
    assert_refused(result, 5, "the weights do not fit this network:\n", f"\n{line}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["it.npz"]


def test_usage(tmp_path):
    assert_refused(minidl(tmp_path), 2, "the following arguments are required: COMMAND")
    assert_refused(minidl(tmp_path, "exprot"), 2, "invalid choice: 'exprot'")
    assert_refused(minidl(tmp_path, "export", "nothing", "--to", "npz"), 5, "nothing cannot be read: No such file or directory")
    weights.save(tmp_path / "it.npz", {"a": GRID})
    nowhere = "x" * 300
    assert_refused(minidl(tmp_path, "export", "it.npz", "--to", "npz", "-o", f"{nowhere}/it.npz"), 2, f"no folder {nowhere}")
    wrong = "--arch", "wrn-10-1", "--model-kwargs", "classes=3"
    assert_refused(minidl(tmp_path, "import", "it.npz", *wrong, "-o", "new.npz"), 2,
                   "unknown model option 'classes': this architecture has dropout, gamma, classifier")


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_pytorch_loads_what_is_exported(tmp_path, kind):
    """Into its own implementation of the network, strictly; only batch norm's counters may be absent."""
    torch = pytest.importorskip("torch", reason="the other side of the exchange: pip install 'minidl[torch]'")
    import torch_networks
    network = models.create("wrn-10-1", 10).initialize(seed=1)
    images = np.random.default_rng(0).normal(1, 2, (3, 32, 32, 4)).astype(np.float32)
    network.forward(images)
    weights.save(tmp_path / "it", network.state_dict(), weights.describe("wrn-10-1", 10, {}))
    result = minidl(tmp_path, "export", "it", "--to", kind, "-o", "out")
    assert result.returncode == 0, result.stderr
    if kind == "npz":
        with np.load(tmp_path / "out") as file:
            tensors = {name: torch.from_numpy(array) for name, array in file.items()}
    else:
        load_file = pytest.importorskip("safetensors.torch", reason="pip install 'minidl[interchange]'").load_file
        tensors = load_file(tmp_path / "out")
    module = torch_networks.wide_resnet(10, 1, 10)
    module.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        logits = module.eval()(torch.from_numpy(np.ascontiguousarray(images.transpose(3, 0, 1, 2)))).numpy().T
    assert np.allclose(logits, network.eval().forward(images), rtol=1e-4, atol=1e-5)


def test_options_of_another_network_are_not_taken_over():
    of_file = weights.describe("wrn-10-1", 10, {"dropout": 0.3})
    given = Namespace(arch="simplenet-310k", model_kwargs=[])
    assert described(given, {"classifier.weight": np.zeros((10, 64))}, of_file)["options"] == {}


def test_a_list_in_place_of_the_checksums(tmp_path):
    metadata = {**weights.describe("it", 10, {}), "crc32": []}
    np.savez(tmp_path / "it.npz", a=np.zeros(3), metadata=json.dumps({**metadata, "sha256": weights._digest(metadata)}))
    with pytest.raises(CheckpointError, match="'a' is not what was written"):
        weights.load(tmp_path / "it.npz")


def test_more_arrays_than_the_directory_of_a_zip_file_counts(tmp_path):
    """The directory of a zip file counts to 65,535, and no further."""
    weights.save(tmp_path / "it.npz", {str(number): np.zeros(1, np.uint8) for number in range(65_536)})
    assert len(weights.load(tmp_path / "it.npz")[0]) == 65_536
