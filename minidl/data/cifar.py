"""CIFAR-10 and CIFAR-100, read from the official files, unpacked or still in their archives.

A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.

Each data set is published in two editions with equal contents: binary (records of fixed size) and python (pickles).
The files come from the network, so nothing in them is trusted: of an archive only the named members are read, each a
regular file of exactly its official size; nothing is written to disk, and no pickle is executed.
"""

from __future__ import annotations

import gzip
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from minidl.data import plain_pickle
from minidl.data.dataset import Dataset, check_labels
from minidl.device import Array
from minidl.errors import DataError

HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
IMAGE = (3, 32, 32)  # channels red, green, blue; rows from the top
PIXELS = 3 * 32 * 32  # bytes of an image
ARCHIVE_EXTRA = 1_000_000  # bytes that an archive may unpack to beside the files read: headers, padding, a readme


@dataclass(frozen=True)
class File:
    """An official file: its size in bytes and how many images it holds (0: it holds the class names)."""

    name: str
    size: int
    records: int = 0


_Files: TypeAlias = Iterator[tuple[str | Path, File, bytes]]  # where each was found, and its content


@dataclass(frozen=True)
class Edition:
    """One form in which a data set is published: the files of `folder`, packed as `archive` with that md5.

    A subclass knows the format: `images_and_labels(raw, records)` and `class_names(raw)` read the bytes of a file, and
    raise ValueError where they are not what they should be.
    """

    folder: str
    archive: str
    md5: str
    train: tuple[File, ...]
    test: File
    names: File

    @property
    def files(self) -> tuple[File, ...]:
        return (*self.train, self.test, self.names)

    def layout(self, file: File) -> str:
        """What a message adds to the size of `file`."""
        return ""


@dataclass(frozen=True)
class BinaryEdition(Edition):
    """Records of `label_bytes` labels, the fine one last, and the bytes of an image. Class names, one a line."""

    label_bytes: int

    def layout(self, file: File) -> str:
        return f" ({file.records:,} records of {self.label_bytes + PIXELS} bytes)" if file.records else ""

    def images_and_labels(self, raw: bytes, records: int) -> tuple[Array, Array]:
        """raw (bytes) -> uint8 (records, 3, 32, 32), uint8 (records,)"""
        table = np.frombuffer(raw, np.uint8).reshape(records, self.label_bytes + PIXELS)
        return table[:, self.label_bytes :].reshape(records, *IMAGE), table[:, self.label_bytes - 1]

    def class_names(self, raw: bytes) -> list[str]:
        return raw.decode("ascii").split()


@dataclass(frozen=True)
class PythonEdition(Edition):
    """Pickled dictionaries: of an array "data" (records, 3072) and a list of labels; of a list of class names."""

    labels_key: str
    names_key: str

    def images_and_labels(self, raw: bytes, records: int) -> tuple[Array, Array]:
        """raw (bytes) -> uint8 (records, 3, 32, 32), int32 (records,)"""
        contents = plain_pickle.describe(raw)
        labels = _list(contents, self.labels_key, int)
        if len(labels) != records:
            raise ValueError(f"{len(labels):,} labels, expected {records:,}")
        pixels = plain_pickle.uint8_array(contents.get("data"), (records, PIXELS))
        return pixels.reshape(records, *IMAGE), np.array(labels, np.int32)

    def class_names(self, raw: bytes) -> list[str]:
        return _list(plain_pickle.describe(raw), self.names_key, str)


def _list(contents: Any, key: str, kind: type) -> list[Any]:
    """contents[key], where that is a list of `kind`."""
    entry = contents.get(key) if isinstance(contents, dict) else None
    if not isinstance(entry, list) or not all(type(item) is kind for item in entry):
        raise ValueError(f"the pickle holds no list {key!r} of {kind.__name__}")
    return entry


@dataclass(frozen=True)
class Cifar:
    """A data set: its editions, the preferred first; mean and std of its training pixels, on the 0..1 scale."""

    name: str
    title: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    editions: tuple[BinaryEdition | PythonEdition, ...]


CIFAR100 = Cifar(
    name="cifar100",
    title="CIFAR-100",
    classes=100,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    editions=(
        BinaryEdition(
            folder="cifar-100-binary",
            archive="cifar-100-binary.tar.gz",
            md5="03b5dce01913d631647c71ecec9e9cb8",
            train=(File("train.bin", 153_700_000, 50_000),),
            test=File("test.bin", 30_740_000, 10_000),
            names=File("fine_label_names.txt", 725),
            label_bytes=2,  # coarse, fine
        ),
        PythonEdition(
            folder="cifar-100-python",
            archive="cifar-100-python.tar.gz",
            md5="eb9058c3a382ffc7106e4002c42a8d85",
            train=(File("train", 155_249_918, 50_000),),
            test=File("test", 31_049_707, 10_000),
            names=File("meta", 1_473),
            labels_key="fine_labels",
            names_key="fine_label_names",
        ),
    ),
)

CIFAR10 = Cifar(
    name="cifar10",
    title="CIFAR-10",
    classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    editions=(
        BinaryEdition(
            folder="cifar-10-batches-bin",
            archive="cifar-10-binary.tar.gz",
            md5="c32a1d4ab5d03f1284b67883e8d87530",
            train=tuple(File(f"data_batch_{i}.bin", 30_730_000, 10_000) for i in range(1, 6)),
            test=File("test_batch.bin", 30_730_000, 10_000),
            names=File("batches.meta.txt", 61),
            label_bytes=1,
        ),
        PythonEdition(
            folder="cifar-10-batches-py",
            archive="cifar-10-python.tar.gz",
            md5="c58f30108f718f92721af3b95e74349a",
            train=(
                File("data_batch_1", 31_035_704, 10_000),
                File("data_batch_2", 31_035_320, 10_000),
                File("data_batch_3", 31_035_999, 10_000),
                File("data_batch_4", 31_035_696, 10_000),
                File("data_batch_5", 31_035_623, 10_000),
            ),
            test=File("test_batch", 31_035_526, 10_000),
            names=File("batches.meta", 158),
            labels_key="labels",
            names_key="label_names",
        ),
    ),
)


def load(cifar: Cifar, folders: Iterable[str | os.PathLike[str]]) -> tuple[Dataset, Dataset]:
    """The training and the test Dataset of `cifar`, from the first of `folders` that holds an edition of it.

    In a folder it takes, the binary edition before the python edition: unpacked files, in the folder itself or in one
    of the official name; else an official archive. Labels are the fine labels.

    Raises DataError where nothing is found, or where what is found is damaged: the next place is not tried then.
    """
    try:
        return _read(cifar, *_find(cifar, [Path(folder) for folder in folders]))
    except OSError as error:
        raise DataError(f"{cifar.title}: {error}") from error


def _find(cifar: Cifar, folders: list[Path]) -> tuple[BinaryEdition | PythonEdition, _Files]:
    """-> an edition and an iterator over its files, as (where, File, bytes)."""
    for folder in folders:
        for edition in cifar.editions:
            for place in (folder, folder / edition.folder):
                if all((place / file.name).is_file() for file in edition.files):
                    return edition, _unpacked_files(edition, place)
        for edition in cifar.editions:
            if (folder / edition.archive).is_file():
                return edition, _archived_files(edition, folder / edition.archive)
    raise DataError(_not_found(cifar, folders))


def _not_found(cifar: Cifar, folders: list[Path]) -> str:
    unpacked = [f"  {e.folder}/ with {', '.join(file.name for file in e.files)}" for e in cifar.editions]
    archives = [f"  {e.archive}, md5 {e.md5}" for e in cifar.editions]
    states = ["" if f.is_dir() else " (not a folder)" if f.exists() else " (does not exist)" for f in folders]
    return "\n".join(
        [
            f"{cifar.title} was not found in {' or '.join(f'{f}{state}' for f, state in zip(folders, states))}.",
            "It was looked for as one of",
            *unpacked,
            *archives,
            f"Download an archive from {HOMEPAGE} and pass its folder with --data-dir,",
            "or choose the small data set that comes with minidl: --dataset digits",
        ]
    )


def _unpacked_files(edition: Edition, folder: Path) -> _Files:
    for file in edition.files:
        path = folder / file.name
        with open(path, "rb") as stream:
            _check_size(path, os.fstat(stream.fileno()).st_size, edition, file)
            yield path, file, stream.read(file.size)


def _archived_files(edition: Edition, path: Path) -> _Files:
    wanted = {f"{edition.folder}/{file.name}": file for file in edition.files}
    with open(path, "rb") as packed:
        # Any: tarfile's type asks for methods that it calls in other modes only.
        stream: Any = _Unpacked(packed, sum(file.size for file in edition.files) + ARCHIVE_EXTRA)
        try:
            with tarfile.open(fileobj=stream, mode="r|") as tar:  # r|: forwards only, in small blocks
                for member in tar:
                    file = wanted.pop(member.name, None)
                    if file is None:
                        continue
                    where = f"{path}: {member.name}"
                    if not member.isreg() or member.issparse():
                        raise DataError(f"{where}: not a regular file")
                    _check_size(where, member.size, edition, file)
                    content = tar.extractfile(member)
                    assert content is not None  # as it is for a regular file
                    yield where, file, content.read()
            stream.read_to_end()  # where the checksum of the gzip file is
        except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path}: damaged archive: {error}") from error
    for name in wanted:
        raise DataError(f"{path}: {name} is missing")


class _Unpacked:
    """What a gzip file holds, if that is at most `limit` bytes: a small file can hold any amount."""

    def __init__(self, packed: BinaryIO, limit: int) -> None:
        self._stream = gzip.GzipFile(fileobj=packed)
        self._limit = limit
        self._count = 0

    def read(self, size: int) -> bytes:
        chunk = self._next(size)
        if not chunk:  # tarfile, told of a member of 2**60 bytes, would go on reading nothing up to its end
            raise EOFError("it ends too early")
        return chunk

    def read_to_end(self) -> None:
        while self._next(65_536):
            pass

    def _next(self, size: int) -> bytes:
        chunk = self._stream.read(size)
        self._count += len(chunk)
        if self._count > self._limit:
            raise ValueError(f"it holds more than {self._limit:,} bytes")
        return chunk


def _check_size(where: str | Path, size: int, edition: Edition, file: File) -> None:
    if size != file.size:
        raise DataError(f"{where}: {size:,} bytes, expected {file.size:,}{edition.layout(file)}")


def _read(cifar: Cifar, edition: BinaryEdition | PythonEdition, files: _Files) -> tuple[Dataset, Dataset]:
    """files (where, File, bytes), in any order -> the training and the test Dataset"""
    parts: dict[File, tuple[Array, Array]] = {}
    for where, file, raw in files:
        try:
            if file is edition.names:
                names = edition.class_names(raw)
                if len(names) != cifar.classes:
                    raise ValueError(f"{len(names)} class names, expected {cifar.classes}")
            else:
                images, labels = parts[file] = edition.images_and_labels(raw, file.records)
                check_labels(labels, cifar.classes)
        except ValueError as error:  # its text may quote a whole damaged file
            raise DataError(f"{where}: {str(error)[:200]}") from error

    def dataset(files: Sequence[File]) -> Dataset:
        images = np.ascontiguousarray(np.concatenate([parts[file][0] for file in files]))
        labels = np.concatenate([parts[file][1] for file in files]).astype(np.int32)
        return Dataset(cifar.name, images, labels, tuple(names), cifar.mean, cifar.std)

    return dataset(edition.train), dataset([edition.test])
