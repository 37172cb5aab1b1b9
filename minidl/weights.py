"""Files of weights: minidl's .npz, and .safetensors and PyTorch's .pt of others. Reading one executes nothing in it.

    state, metadata = load("runs/it")         # the folder of a run, or a file: its content says which kind
    save("copy.npz", state, metadata)

A file may come from anywhere, so what it declares is checked against what it holds before memory is taken for it. An .npz
with metadata is sealed: they hold a checksum of each array, and a hash of themselves.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import shlex
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from minidl.atomic_file import FilePath, write_atomically
from minidl.data.dataset import Dataset
from minidl.device import Array
from minidl.errors import CheckpointError
from minidl.extras import library

State: TypeAlias = dict[str, Array]
Metadata: TypeAlias = dict[str, Any]  # see `describe`

FORMAT = "minidl weights 1"
METADATA = ("format", "arch", "options", "classes", "dataset", "mean", "std", "class_names")  # see `describe`
LAST, PREVIOUS = "last.npz", "last.previous.npz"  # of the files in the folder of a run: its newest checkpoints
TRAINING = "training/"  # how the names of arrays begin that are not weights, in a checkpoint
# Compression takes a tenth off trained weights. A file that promises to grow a hundredfold is made to fill the memory.
MOST_EXPANSION = 100
OLDEST_TORCH = (2, 6)  # the first whose weights_only=True is known to execute nothing (CVE-2025-32434)
# How zipfile reports damage, by the place of the damage.
ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, struct.error, OverflowError)
SAFETENSORS_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?",
                     "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"}
# numpy.lib.format evaluates the header as Python, and where it refuses one, it recommends to trust the file.
NPY_HEADER = re.compile(rb"\{'descr': '([<>|=]?[?biufcmMOSUV]\d*)', 'fortran_order': (True|False), "
                        rb"'shape': \(((?:\d+, ?)*\d*)\), \}\s*")


def describe(arch: str, classes: int, options: Mapping[str, Any], dataset: Dataset | None = None) -> Metadata:
    """What a file says about its weights, besides names and shapes.

    arch: full name of the network; options: of its builder; dataset: what it was trained on, with the mean and std that its
    images were normalized with, None where nobody knows.
    """
    values = (FORMAT, arch, dict(options), classes, dataset and dataset.name, dataset and list(dataset.mean),
              dataset and list(dataset.std), dataset and list(dataset.classes))
    return dict(zip(METADATA, values, strict=True))


# ---- writing -----------------------------------------------------------------------------------------------------


def save(path: FilePath, state: Mapping[str, Array], metadata: Metadata | None = None,
         previous: FilePath | None = None) -> None:
    """Write {name: array} to an .npz, whole or not at all, and the metadata as its entry "metadata", a text in JSON.

    previous: where to keep the file that was there before. Raises CheckpointError where it cannot be written.
    """
    entries = {name: np.asarray(array) for name, array in state.items()}
    if metadata is not None:
        sealed = {**metadata, "crc32": {name: _checksum(array) for name, array in entries.items()}}
        entries["metadata"] = np.array(json.dumps({**sealed, "sha256": _digest(sealed)}))

    def write(file: BinaryIO) -> None:
        # numpy.savez would pickle what is not numbers, and takes an array named "file" for its argument.
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in entries.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    write_atomically(path, write, previous)


def _checksum(array: Array) -> int:
    return zlib.crc32(array.tobytes(), zlib.crc32(f"{array.dtype.str} {array.shape}".encode()))


def _digest(metadata: Metadata) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def save_safetensors(path: FilePath, state: Mapping[str, Array], metadata: Metadata | None = None) -> None:
    """As `save`, to a .safetensors; the metadata are the entry "minidl" of its own. UsageError without the library."""
    safetensors = library("safetensors.numpy", "interchange")
    # The library writes memory as it lies, whatever the strides.
    arrays = {name: np.asarray(array, np.asarray(array).dtype.newbyteorder("<"), order="C") for name, array in state.items()}
    raw = safetensors.save(arrays, None if metadata is None else {"minidl": json.dumps(metadata)})
    write_atomically(path, lambda file: file.write(raw))


# ---- reading -----------------------------------------------------------------------------------------------------


def load(path: FilePath) -> tuple[State, Metadata | None]:
    """Read a file of weights, or the last checkpoint of the run folder `path` -> {name: array}, metadata; None without.

    The first bytes say whether it is an .npz, a .safetensors, or a PyTorch file: a state dict, alone or as "state_dict" or
    "model" of a dict. Arrays are contiguous and in the byte order of this machine; floats of 16 bits come as float32.
    Raises CheckpointError with the reason where it cannot be read, UsageError where safetensors is not installed.
    """
    state, metadata = load_all(path)
    state = {name: array for name, array in state.items() if not name.startswith(TRAINING)}
    return state, metadata and {key: metadata[key] for key in METADATA}


def load_all(path: FilePath) -> tuple[State, Metadata | None]:
    """As `load`, with all arrays and metadata of a checkpoint: see minidl/checkpoint.py."""
    folder, path = Path(path), Path(path)
    if os.path.isdir(folder):  # unlike Path.is_dir, of any name and in folders of others
        path = folder / LAST
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for whoever writes to it
            raise ValueError("it is not a file")
        with path.open("rb") as file:
            state, text = _read(file, path)
        if not state:
            raise ValueError("it holds no arrays")
        return state, None if text is None else _parse(text)
    except (OSError, ValueError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        other = f"; the one before it is {folder / PREVIOUS}" if os.path.exists(folder / PREVIOUS) else ""
        raise CheckpointError(f"{path} cannot be read: {reason}{other}") from None


def _read(file: BinaryIO, path: Path) -> tuple[State, str | None]:
    """The state and the text of the metadata. Like all that follows, raises ValueError with the reason."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(9)
    file.seek(0)
    if not start:
        raise ValueError("it is empty")
    if start[4:] == b"\0\0\0\0{":  # the length of the header in 8 bytes, and the header, in JSON
        return _read_safetensors(file.read())
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(file) as archive:
                _check_members(archive, file, size)
                if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                    return _read_npz(archive)
                if name := archive.testzip():  # PyTorch does not look at checksums
                    raise ValueError(f"it is damaged: Bad CRC-32 for file {name!r}")
        except ZIP_DAMAGE as error:
            raise ValueError(f"it is damaged: {str(error)[:200] or type(error).__name__}") from None  # it may quote the file
    elif not start.startswith(b"\x80"):  # a pickle, as PyTorch wrote before version 1.6
        raise ValueError("it is neither .npz, .safetensors nor a file of PyTorch")
    return _read_torch(file, path, size), None


def _check_members(archive: zipfile.ZipFile, file: BinaryIO, size: int) -> None:
    members = archive.infolist()
    _check_growth(sum(member.file_size for member in members), size)
    if sum(member.compress_size for member in members) > size:
        raise ValueError("it is damaged: its members overlap")
    # Damage to its directory can hide members from zipfile. Its last record knows their number.
    file.seek(-22 - len(archive.comment), os.SEEK_END)
    if int.from_bytes(file.read(12)[10:], "little") != min(len(members), 0xffff):
        raise ValueError("it is damaged: members are missing in its directory")


def _check_growth(declared: int, size: int) -> None:
    if declared > MOST_EXPANSION * size:
        raise ValueError(f"it declares arrays of {declared:,} bytes, and has {size:,}")


def _parse(text: str) -> Metadata:
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("its metadata are not JSON") from None
    match metadata:
        case {"format": str(form), "arch": str(), "options": dict(), "classes": int(classes), "dataset": str() | None,
              "mean": list() | None, "std": list() | None, "class_names": list() | None} if form == FORMAT and classes > 0:
            return metadata
    raise ValueError(f"its metadata are not of the form {FORMAT!r}")


def _read_npz(archive: zipfile.ZipFile) -> tuple[State, str | None]:
    state: State = {}
    text = None
    checksums = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name == member.filename or name in state:
            raise ValueError(f"its member {member.filename!r} is " + ("there twice" if name in state else "not an .npy"))
        with archive.open(member) as stream:
            raw = stream.read(member.file_size)  # without a number, it would unpack 2 GB at once
        try:
            array = _array_of_npy(raw)
            if name == "metadata" and array.dtype.kind == "U" and array.shape == ():
                text = str(array)
            else:
                state[name] = _plain(array)
                checksums[name] = _checksum(array)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
    if text is not None:
        _check_seal(_parse(text), checksums)
    return state, text


def _check_seal(metadata: Metadata, checksums: dict[str, int]) -> None:
    seal = metadata.pop("sha256", None)
    if seal is None:  # written by others
        return
    if seal != _digest(metadata):
        raise ValueError("it is damaged: its metadata are not those that their hash was taken of")
    written = metadata.get("crc32")
    if written != checksums:
        wrong = [name for name, checksum in checksums.items()
                 if not isinstance(written, dict) or written.get(name) != checksum]
        raise ValueError("it is damaged: " + (f"{min(wrong)!r} is not what was written" if wrong else "arrays are missing"))


def _array_of_npy(raw: bytes) -> Array:
    """The content of an .npy file -> array, a view of it."""
    stream = io.BytesIO(raw)
    magic, version = stream.read(6), stream.read(2)
    if magic != b"\x93NUMPY" or version not in (b"\x01\0", b"\x02\0"):
        raise ValueError("not an array of NumPy")
    (length,) = struct.unpack("<H" if version == b"\x01\0" else "<I", stream.read(2 if version == b"\x01\0" else 4))
    header = NPY_HEADER.fullmatch(stream.read(length))
    if header is None:
        raise ValueError("not a plain array of NumPy")
    kind, by_columns, numbers = (group.decode() for group in header.groups())
    if kind.endswith("O"):
        raise ValueError("an array of Python objects, which only a pickle can hold")
    try:
        dtype = np.dtype(kind)
    except TypeError:
        raise ValueError(f"type {kind!r} is unknown") from None
    shape = tuple(int(number) for number in numbers.split(",") if number.strip())
    declared, held = math.prod(shape) * dtype.itemsize, len(raw) - stream.tell()
    if declared != held:
        raise ValueError(f"{dtype} {shape} needs {declared:,} bytes, the file has {held:,}")
    return np.frombuffer(raw, dtype, offset=stream.tell()).reshape(shape, order="F" if by_columns == "True" else "C")


def _plain(array: Array) -> Array:
    """A copy: C-contiguous, byte order of this machine, floats as float32 or float64. Raises ValueError but for numbers."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{array.dtype} is not a type of weights")
    dtype: npt.DTypeLike = array.dtype.newbyteorder("=")
    if array.dtype.kind == "f":
        dtype = np.float32 if array.dtype.itemsize <= 4 else np.float64
    return array.astype(dtype, order="C")


def _read_safetensors(raw: bytes) -> tuple[State, str | None]:
    safetensors = library("safetensors", "interchange")
    try:
        tensors = safetensors.deserialize(raw)
    except safetensors.SafetensorError as error:
        raise ValueError(f"it is damaged: {error}") from None
    state = {}
    for name, tensor in tensors:
        kind = tensor["dtype"]
        if kind not in SAFETENSORS_TYPES:
            raise ValueError(f"{name!r}: {kind} is not a type of weights")
        array = np.frombuffer(tensor["data"], SAFETENSORS_TYPES[kind]).reshape(tensor["shape"])
        if kind == "BF16":  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        state[name] = _plain(array)
    header = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
    return state, (header.get("__metadata__") or {}).get("minidl")


# ---- PyTorch -----------------------------------------------------------------------------------------------------


def _read_torch(file: BinaryIO, path: Path, size: int) -> State:
    torch = _torch()
    if torch is None:
        raise ValueError("it is a file of PyTorch, and PyTorch 2.6 or newer, which reads it without executing what is in "
                         f"it, is not installed; where it is, this converts the file: {_conversion(path)}")
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how the file was written
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"PyTorch refuses it: {_reason(error)}") from None
    tensors = _state_dict(content, torch)
    # Strides of 0 make a large tensor of a small file.
    _check_growth(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), size)
    state = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise ValueError(f"{name!r}: {tensor.dtype}, {tensor.layout} is not a type of weights")
        if tensor.is_floating_point() and tensor.dtype != torch.float64:
            tensor = tensor.float()  # NumPy has no bfloat16
        state[name] = _plain(tensor.detach().resolve_neg().numpy())
    for wrapper in ("_orig_mod.", "module."):  # of torch.compile, of DataParallel
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): array for name, array in state.items()}
    return state


def _torch() -> Any:
    """PyTorch, or None where there is none that is new enough."""
    try:
        import torch
    except (ImportError, OSError):  # OSError: a library that it needs
        return None
    return torch if tuple(int(number) for number in torch.__version__.split(".")[:2]) >= OLDEST_TORCH else None


def _state_dict(content: Any, torch: Any) -> dict[str, Any]:
    """The {name: tensor} in what a file holds."""
    parts = [content, content.get("state_dict"), content.get("model")] if isinstance(content, dict) else []
    for part in parts:
        if isinstance(part, dict) and part and all(isinstance(name, str) and isinstance(value, torch.Tensor)
                                                   for name, value in part.items()):
            return part
    raise ValueError('it holds no state dict, neither alone nor as "state_dict" or "model"')


def _reason(error: Exception) -> str:
    """The part of PyTorch's message that says what is wrong; the rest is advice to trust the file."""
    match = re.search(r"[Uu]nsupported .*?(?=\. |\.?$)", str(error), re.MULTILINE)
    return match[0] if match else str(error).partition(". ")[0].partition("\n")[0] or type(error).__name__


def _conversion(path: Path) -> str:
    """A command that turns a file of PyTorch into a .safetensors beside it."""
    code = ("import torch, safetensors.torch as s; "
            f"d = torch.load({str(path)!r}, map_location='cpu', weights_only=True); "
            "d = d.get('state_dict') or d.get('model') or d; "
            "s.save_file({k.removeprefix('module.'): v.clone().contiguous() for k, v in d.items()}, "
            f"{str(path.with_suffix('.safetensors'))!r})")
    return f"python -c {shlex.quote(code)}"
