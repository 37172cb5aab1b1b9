"""Reading data sets: both editions agree; damaged and hostile files end in one message, with nothing run or written."""

import contextlib
import gzip
import hashlib
import itertools
import os
import pickle
import random
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minidl import data
from minidl.data import cifar, digits, plain_pickle
from minidl.data.checked_file import File
from minidl.data.cifar import CIFAR10, CIFAR100, BinaryEdition, Records
from minidl.data.dataset import Dataset
from minidl.errors import DataError, UsageError

BINARY, PYTHON = CIFAR100.editions
needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX users, permissions and commands")


def python2_pickle(contents):
    """A dictionary of text, lists and uint8 arrays as Python 2 and NumPy 1 wrote it: what the python editions are."""
    numbers = itertools.count(1)

    def put():
        number = next(numbers)
        return b"q" + bytes([number]) if number < 256 else b"r" + number.to_bytes(4, "little")

    def encode(value):
        if isinstance(value, str):
            short = len(value) < 256
            length = b"U" + bytes([len(value)]) if short else b"T" + len(value).to_bytes(4, "little")
            return length + value.encode() + put()
        if isinstance(value, int):
            return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + value.to_bytes(4, "little", signed=True)
        if isinstance(value, list):
            return b"]" + put() + b"(" + b"".join(map(encode, value)) + b"e"
        by_columns = not value.flags.c_contiguous
        raw = value.tobytes("A")
        return b"".join(
            [
                b"cnumpy.core.multiarray\n_reconstruct\n" + put() + b"cnumpy\nndarray\n" + put(),
                b"K\x00\x85U\x01b\x87R" + put() + b"(K\x01" + b"".join(map(encode, value.shape)) + b"\x86",
                b"cnumpy\ndtype\n" + put() + b"U\x02u1K\x00K\x01\x87R" + put(),
                b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
                (b"\x88" if by_columns else b"\x89") + b"T" + len(raw).to_bytes(4, "little") + raw + b"tb",
            ]
        )

    items = b"".join(encode(key) + encode(value) for key, value in contents.items())
    return b"\x80\x02}" + put() + b"(" + items + b"u."


def padded_pickle(contents, size):
    """`python2_pickle` of contents and of a text that brings it to `size` bytes."""
    missing = size - len(python2_pickle({**contents, "padding": "." * 256}))
    return python2_pickle({**contents, "padding": "." * (256 + missing)})


TRAIN, TEST = 100, 10  # images of a copy


class Copy:
    """A small data set with the names and formats of `original`, and its files as {folder: {name: bytes}}.

    Each class is in the training set. The tables of sizes and md5s follow the files, so that a test can change them.
    """

    def __init__(self, original):
        self.original = original
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (TRAIN + TEST, 96), np.uint8).repeat(32, axis=1)  # gzip has something to compress
        self.labels = np.r_[rng.permutation(TRAIN), rng.integers(0, TRAIN, TEST)] % original.classes
        self.names = [f"class_{i}" for i in range(original.classes)]
        self.superclass_names = [f"group_{i}" for i in range(original.superclasses)]
        self.archives = {}  # {name: bytes}, of those that were packed
        self.write()

    def write(self):
        """Makes the files anew."""
        self.files = {edition.folder: dict(self._files(edition)) for edition in self.original.editions}

    def superclass_of(self, label):
        return label * self.original.superclasses // self.original.classes

    def _files(self, edition):
        start = 0
        for file in (*edition.train, edition.test):
            chosen = slice(start, start + self._count(edition, file))
            yield file.name, self.encode(edition, self.pixels[chosen], self.labels[chosen].tolist())
            start = chosen.stop
        names = self.names, self.superclass_names
        if isinstance(edition, BinaryEdition):
            for file, level in zip(edition.names, names):
                yield file.name, "".join(f"{name}\n" for name in level).encode()
        else:
            levels = {f"{prefix}label_names": level for prefix, level in zip(edition.prefixes, names)}
            yield edition.names[0].name, python2_pickle(levels)

    @staticmethod
    def _count(edition, file):
        return TEST if file is edition.test else TRAIN // len(edition.train)

    def encode(self, edition, pixels, labels, superclasses=None):
        """The bytes of a file of images; superclasses: those of the labels, unless others are given."""
        if superclasses is None:
            superclasses = [self.superclass_of(label) for label in labels]
        if isinstance(edition, BinaryEdition):
            levels = zip(superclasses, labels) if edition.label_bytes == 2 else zip(labels)
            return b"".join(bytes([*level, *row]) for level, row in zip(levels, pixels, strict=True))
        levels = {f"{prefix}labels": level for prefix, level in zip(edition.prefixes, (labels, superclasses))}
        return python2_pickle({"batch_label": "a batch", **levels, "data": pixels})

    @property
    def cifar(self):
        def changed(edition):
            def of(file):
                raw = self.files[edition.folder][file.name]
                size_and_md5 = file.name, len(raw), md5(raw)
                return Records(*size_and_md5, self._count(edition, file)) if isinstance(file, Records) else File(*size_and_md5)

            packed = self.archives.get(edition.archive.name, b"")
            return replace(edition, archive=File(edition.archive.name, len(packed), md5(packed)), test=of(edition.test),
                           train=tuple(map(of, edition.train)), names=tuple(map(of, edition.names)))

        return replace(self.original, editions=tuple(map(changed, self.original.editions)))

    def unpack(self, folder, edition):
        place = folder / edition.folder
        place.mkdir(parents=True)
        for name, raw in self.files[edition.folder].items():
            (place / name).write_bytes(raw)
        return place

    def pack(self, folder, edition, before=(), after=(), but=None):
        """The archive of `edition`, without the file `but`, and with other members (TarInfo, bytes) at either end."""
        files = [
            (member(f"{edition.folder}/{name}", len(raw)), raw)
            for name, raw in self.files[edition.folder].items()
            if name != but
        ]
        top = member(edition.folder, type=tarfile.DIRTYPE), b""
        packed = gzip.compress(tar_bytes([top, *before, *files, *after]), compresslevel=1, mtime=0)
        self.archives[edition.archive.name] = packed
        path = folder / edition.archive.name
        path.write_bytes(packed)
        return path


def md5(raw):
    return hashlib.md5(raw).hexdigest()


def member(name, size=0, type=tarfile.REGTYPE, linkname=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, type, linkname
    return info


def tar_bytes(members):
    """Members (TarInfo, bytes), whatever sizes they declare, and more zeros at the end than `tarfile` looks at."""
    blocks = [info.tobuf(tarfile.GNU_FORMAT) + raw + bytes(-len(raw) % 512) for info, raw in members]
    return b"".join(blocks) + bytes(200_000)


def tree(folder):
    """Every path below `folder`, with what would change if somebody wrote there."""
    return {path: (path.lstat().st_mode, path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def assert_holds(copy, datasets):
    train, test = datasets
    for dataset, chosen in (train, slice(TRAIN)), (test, slice(TRAIN, TRAIN + TEST)):
        assert dataset.classes == tuple(copy.names) and dataset.superclasses == tuple(copy.superclass_names)
        assert dataset.superclass_of == tuple(map(copy.superclass_of, range(len(copy.names))) if copy.superclass_names else ())
        assert np.array_equal(dataset.images, copy.pixels[chosen].reshape(-1, 3, 32, 32))
        assert np.array_equal(dataset.labels, copy.labels[chosen])


def read(copy, *folders):
    """What lies in `folders`, with no md5 compared: how the files are read, when somebody has made the md5s right."""
    it = copy.cifar
    return cifar.read(it, cifar.find(it, folders))


def refusal(copy, folder):
    """The one-line message with which `copy`, lying in `folder`, is refused when it is read."""
    with pytest.raises(DataError) as caught:
        read(copy, folder)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


@contextlib.contextmanager
def at_most(megabytes, seconds):
    start = time.perf_counter()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 1e6
        assert time.perf_counter() - start < seconds
    finally:
        tracemalloc.stop()


@pytest.fixture(params=[CIFAR100, CIFAR10], ids=lambda original: original.name)
def copy(request):
    return Copy(request.param)


@pytest.fixture
def copy100():
    return Copy(CIFAR100)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("MINIDL_OFFLINE", "1")


# Finding and reading


def test_unpacked_files_that_are_not_the_official_ones_are_named(copy100, tmp_path, capsys):
    """They may be damaged, or changed on purpose."""
    edition = copy100.original.editions[0]
    file = copy100.unpack(tmp_path, edition) / edition.train[0].name
    it = copy100.cifar
    assert_holds(copy100, cifar.load(it, [tmp_path]))
    assert capsys.readouterr().err == ""
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    train, _ = cifar.load(it, [tmp_path])
    assert train.images[-1, -1, -1, -1] == copy100.pixels[TRAIN - 1, -1] ^ 1
    assert capsys.readouterr().err.startswith(f"warning: {file} is not the official file: md5 ")


@pytest.mark.parametrize("number", [0, 1], ids=["binary", "python"])
@pytest.mark.parametrize("form", ["folder", "parent", "archive"])
def test_reads_each_edition_from_each_place(copy, number, form, tmp_path):
    edition = copy.original.editions[number]
    if form == "archive":
        copy.pack(tmp_path, edition)
        place = tmp_path
    else:
        place = copy.unpack(tmp_path, edition)
    before = tree(tmp_path)
    assert_holds(copy, read(copy, tmp_path if form == "parent" else place))
    assert tree(tmp_path) == before


def test_editions_agree_at_official_size(tmp_path):
    """Files of 155 MB with the official names and sizes, through the public entry."""
    names = [f"c{i}" for i in range(100)]
    digests = []
    for edition in CIFAR100.editions:
        place = tmp_path / edition.folder
        place.mkdir()
        for file in edition.train[0], edition.test:
            pixels = np.resize(np.arange(251, dtype=np.uint8), (file.count, 3072))
            labels = np.arange(file.count) * 7 % 100
            if edition is BINARY:
                raw = np.column_stack([*np.uint8([labels // 5, labels]), pixels]).tobytes()
            else:
                raw = padded_pickle({"fine_labels": labels.tolist(), "coarse_labels": (labels // 5).tolist(), "data": pixels},
                                    file.size)
            (place / file.name).write_bytes(raw)
            del raw, pixels
        levels = {"fine_label_names": names, "coarse_label_names": [f"g{i}" for i in range(20)]}
        for file in edition.names:
            lines = "\n".join(levels[file.name.removesuffix(".txt")]) if edition is BINARY else ""
            raw = lines.encode().ljust(file.size, b"\n") if edition is BINARY else padded_pickle(levels, file.size)
            (place / file.name).write_bytes(raw)
        train, test = data.load("cifar100", tmp_path)
        assert len(train.images) == 50_000 and len(test.images) == 10_000
        assert train.classes == test.classes == tuple(names)
        arrays = train.images, train.labels, test.images, test.labels
        digests.append([hashlib.md5(array).hexdigest() for array in arrays])
        for file in place.iterdir():  # 185 MB, and pytest keeps the folders of three runs
            file.unlink()
    assert digests[0] == digests[1]


def test_unpacked_is_preferred_to_packed_and_binary_to_python(copy100, tmp_path):
    """Each place holds different labels, so that what was read tells where it was read."""

    for pack_or_unpack, edition in [
        (copy100.pack, PYTHON),
        (copy100.pack, BINARY),
        (copy100.unpack, PYTHON),
        (copy100.unpack, BINARY),
    ]:
        copy100.labels = (copy100.labels + 1) % 100
        copy100.write()
        pack_or_unpack(tmp_path, edition)
        assert_holds(copy100, read(copy100, tmp_path / "nothing", tmp_path))


def test_half_unpacked_folder_gives_way_to_the_archive(copy100, tmp_path):
    copy100.pack(tmp_path, BINARY)
    (copy100.unpack(tmp_path, BINARY) / "test.bin").unlink()
    assert_holds(copy100, read(copy100, tmp_path))


def test_array_stored_by_columns(copy100, tmp_path):
    superclasses = [copy100.superclass_of(label) for label in copy100.labels[:TRAIN].tolist()]
    by_columns = np.asfortranarray(copy100.pixels[:TRAIN])
    contents = {"fine_labels": copy100.labels[:TRAIN].tolist(), "coarse_labels": superclasses, "data": by_columns}
    copy100.files[PYTHON.folder]["train"] = python2_pickle(contents)
    copy100.unpack(tmp_path, PYTHON)
    assert_holds(copy100, read(copy100, tmp_path))


def test_default_folders(monkeypatch):
    for variable in "MINIDL_DATA", "XDG_CACHE_HOME", "HOME":
        monkeypatch.delenv(variable, raising=False)
    assert data.folders() == [Path("~/.cache/minidl/data").expanduser()]
    monkeypatch.setenv("HOME", "/somebody")
    assert data.folders() == [Path("/somebody/.cache/minidl/data")]
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv("MINIDL_DATA", "/named")
    assert data.folders() == [Path("/named"), Path("/cache/minidl/data")]
    monkeypatch.setenv("MINIDL_DATA", "")
    assert data.folders() == [Path("/cache/minidl/data")]
    assert data.folders("/asked/for") == [Path("/asked/for")]
    assert data.folders("~/asked/for") == [Path("/somebody/asked/for")]


def test_official_sizes():
    for edition in CIFAR100.editions[0], CIFAR10.editions[0]:
        for file in (*edition.train, edition.test):
            assert file.size == file.count * (edition.label_bytes + 3072)
    for dataset in CIFAR100, CIFAR10:
        for edition in dataset.editions:
            assert sum(file.count for file in edition.train) == 50_000 and edition.test.count == 10_000


def test_unknown_name():
    with pytest.raises(UsageError, match="data set 'mnist' is unknown, need one of cifar100, cifar10, digits"):
        data.load("mnist")


def test_import_opens_no_data():
    """minidl.data opens its modules when it is imported, and nothing else below its folder."""
    watch = "import sys; sys.addaudithook(lambda event, args: event == 'open' and print(args[0])); import minidl.data"
    root = Path(data.__file__).parents[2]
    listing = subprocess.run([sys.executable, "-c", watch], cwd=root, capture_output=True, text=True, check=True).stdout
    own = [path for path in listing.splitlines() if os.path.join("minidl", "data", "") in path]
    assert own and all(".py" in Path(path).name for path in own)


# No data, awkward places


def test_missing_data_message(tmp_path):
    """Where the network is forbidden."""
    start = time.perf_counter()
    with pytest.raises(DataError) as caught:
        data.load("cifar100", tmp_path)
    assert time.perf_counter() - start < 1 and caught.value.exit_code == 3
    text = str(caught.value)
    assert text == f"""\
CIFAR-100 was not found in {tmp_path},
nor could it be downloaded into {tmp_path}:
  MINIDL_OFFLINE is set, which forbids the network
Put one of these into {tmp_path}, or name another folder with --data-dir; they are at {cifar.HOMEPAGE}:
  cifar-100-binary.tar.gz, md5 03b5dce01913d631647c71ecec9e9cb8
  cifar-100-python.tar.gz, md5 eb9058c3a382ffc7106e4002c42a8d85
  cifar-100-binary/ with train.bin, test.bin, fine_label_names.txt, coarse_label_names.txt
  cifar-100-python/ with train, test, meta
Or choose the small data set that comes with minidl: --dataset digits"""
    assert not tree(tmp_path)


def test_missing_data_message_names_every_folder(monkeypatch, tmp_path):
    file = tmp_path / "cifar-100-binary.tar.gz"
    file.touch()
    monkeypatch.setenv("MINIDL_DATA", str(file))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError) as caught:
        data.load("cifar10")
    first = f"CIFAR-10 was not found in {file} (not a folder) or {tmp_path}/minidl/data (does not exist),"
    assert str(caught.value).splitlines()[0] == first


def test_path_with_spaces_and_letters_of_all_alphabets(copy, tmp_path):
    folder = tmp_path / "meine Daten – данные 数据 é"
    folder.mkdir()
    copy.pack(folder, copy.original.editions[0])
    assert_holds(copy, cifar.load(copy.cifar, [str(folder)]))


@contextlib.contextmanager
def stranger():
    """Turns root, whom no permission binds, into a user without an entry in the user database."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(54321, 54321, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@needs_posix
def test_no_home_and_no_user(monkeypatch):
    for variable in "MINIDL_DATA", "XDG_CACHE_HOME", "HOME":
        monkeypatch.delenv(variable, raising=False)
    with stranger(), pytest.raises(DataError, match="CIFAR-10 was not found"):
        data.load("cifar10")


@needs_posix
@pytest.mark.parametrize("locked", ["folder", "file", "archive"])
def test_no_permission(copy100, locked):
    with tempfile.TemporaryDirectory() as name:  # tmp_path lies in a folder that only its owner can enter
        folder = Path(name)
        folder.chmod(0o755)
        path = copy100.pack(folder, BINARY) if locked == "archive" else copy100.unpack(folder, BINARY)
        (path / "train.bin" if locked == "file" else path).chmod(0)
        with stranger(), pytest.raises(DataError, match="CIFAR-100: .*Permission denied"):
            cifar.load(copy100.cifar, [folder])


@needs_posix
def test_read_only_folder(copy100):
    with tempfile.TemporaryDirectory() as name:  # as above
        folder = Path(name)
        copy100.pack(folder, BINARY)
        folder.chmod(0o555)
        with stranger():
            assert_holds(copy100, cifar.load(copy100.cifar, [folder]))


# Pickles


class Call:
    """Pickles as a call that unpickling carries out."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def string(value):
    return b"U" + bytes([len(value)]) + value.encode()


def in_the_array(command):
    """A file of the official format in whose array another call stands where the dtype should be made."""
    good = python2_pickle({"fine_labels": [1], "data": np.zeros((1, 3072), np.uint8)})
    start, end = good.index(b"cnumpy\ndtype"), good.index(b"(K\x03U\x01|")
    return good[:start] + b"cos\nsystem\n" + string(command) + b"\x85R" + good[end:]


def expression(command):
    return f"__import__('os').system({command!r})"


def in_a_list(command):
    call = b"cos\nsystem\n" + string(command) + b"\x85R"
    return b"\x80\x02}(" + string("fine_labels") + b"](K\x01((]" + call + b"tteu."


SYSTEM = f"{os.system.__module__}.system"
GADGETS = {  # a pickle that carries out a shell command, and the global that its refusal names
    "protocol 0": (lambda command: pickle.dumps(Call(os.system, command), 0), SYSTEM),
    "protocol 1": (lambda command: pickle.dumps(Call(os.system, command), 1), SYSTEM),
    "protocol 2": (lambda command: pickle.dumps(Call(os.system, command), 2), SYSTEM),
    "protocol 3": (lambda command: pickle.dumps(Call(os.system, command), 3), SYSTEM),
    "protocol 4": (lambda command: pickle.dumps(Call(os.system, command), 4), SYSTEM),
    "protocol 5": (lambda command: pickle.dumps(Call(os.system, command), 5), SYSTEM),
    "eval": (lambda command: pickle.dumps(Call(eval, expression(command))), "builtins.eval"),
    "exec": (lambda command: pickle.dumps(Call(exec, expression(command)), 2), "__builtin__.exec"),
    "instance opcode": (lambda command: b"(" + string(command) + b"ios\nsystem\n.", "os.system"),
    "in a list": (in_a_list, "os.system"),
    "in the array": (in_the_array, "os.system"),
    "in an array of objects": (lambda command: pickle.dumps(np.array([Call(os.system, command)], object)), ""),
}


@needs_posix
@pytest.mark.parametrize("gadget", GADGETS)
def test_pickle_that_calls_is_refused_and_nothing_runs(copy100, gadget, tmp_path):
    write, name = GADGETS[gadget]
    marker = tmp_path / "ran"
    evil = write(f"touch {marker}")

    with contextlib.suppress(Exception):
        pickle.loads(evil, encoding="latin-1")
    assert marker.exists(), "the gadget does not work: this test would prove nothing"
    marker.unlink()

    for file in "meta", "train":  # train is read first
        copy100.files[PYTHON.folder][file] = evil
        place = copy100.unpack(tmp_path / f"evil {file}", PYTHON)
        message = refusal(copy100, tmp_path / f"evil {file}")
        assert message.startswith(f"{place / file}: ") and name in message
        assert not marker.exists()


BOMBS = {
    "memo": b"\x80\x02Nr\xff\xff\xff\xff0.",  # index 2**32 - 1: `pickle` makes room for all below
    "nested": b"\x80\x02}(K\x01" + b"\x85" * 50_000 + b"Nu.",  # a key whose hash is a deep recursion
    "repeated": b"\x80\x02}(K\x01" + b"q\x01h\x01\x86" * 31 + b"Nu.",  # a key whose hash takes 2**31 steps
    "text": b"\x80\x02T\xff\xff\xff\x7f.",  # claims 2 GB
    "integer": b"\x80\x02\x8b\xff\xff\xff\x7f.",  # claims 2 GB
    "bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x3f.",  # claims 2**62 bytes
    "frame": b"\x80\x04\x95" + b"\xff" * 7 + b"\x3f.",  # claims 2**62 bytes
    "integer in digits": b"I" + b"9" * 100_000 + b"\n.",  # slow to convert
    "float in digits": b"F" + b"x" * 100_000 + b"\n.",  # long to quote
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickle_that_would_exhaust_the_machine(copy100, bomb, tmp_path):
    copy100.files[PYTHON.folder]["train"] = BOMBS[bomb]
    copy100.unpack(tmp_path, PYTHON)
    with at_most(megabytes=30, seconds=5):
        refusal(copy100, tmp_path)


def test_pickle_of_too_many_objects(copy100, monkeypatch, tmp_path):
    """A byte of the file for 64 of memory."""
    monkeypatch.setattr(plain_pickle, "MOST_OPCODES", 1000)
    copy100.files[PYTHON.folder]["train"] = b"\x80\x02" + b"}" * 1000 + b"."
    copy100.unpack(tmp_path, PYTHON)
    assert "more than 1,000 pickle opcodes" in refusal(copy100, tmp_path)


@pytest.mark.parametrize(
    "old, new, message",
    [
        (b"u1", b"i4", "does not hold a uint8 array (100, 3072)"),
        (b"u1", b"O8", "does not hold a uint8 array"),
        (b"KdJ\x00\x0c\x00\x00\x86", b"KeJ\x00\x0c\x00\x00\x86", "does not hold a uint8 array"),
        (b"KdJ\x00\x0c\x00\x00\x86", b"J\xff\xff\xff\x7fK\xff\x86", "does not hold a uint8 array"),
        (b"T\x00\xb0\x04\x00", b"T\xff\xff\x7f\x00", "bytes in a string4"),
        (b"numpy\nndarray", b"numpy\nmemmap", "calls for 'numpy.memmap'"),
        (b"numpy.core.multiarray\n_reconstruct", b"numpy\ndtype", "does not hold a uint8 array"),
        (b"numpy\ndtype", b"numpy\nndarray", "does not hold a uint8 array"),
        (b"U\x04data", b"U\x04date", "does not hold a uint8 array"),
        (b"fine_labels", b"fine_fables", "holds no list 'fine_labels' of int"),
        (b"tbu.", b"ttbu.", "malformed pickle"),
        (b"tbu.", b"tbu0.", "pickle opcode POP at byte"),
        (b"tbu.", b"tb.", "holds no list"),
        (b"tbu.", b"tbu", "exhausted before seeing STOP"),
    ],
)
def test_python_file_of_wrong_content(copy100, old, new, message, tmp_path):
    good = copy100.files[PYTHON.folder]["train"]
    copy100.files[PYTHON.folder]["train"] = good.replace(old, new, 1)
    copy100.unpack(tmp_path, PYTHON)
    assert message in refusal(copy100, tmp_path)


@pytest.mark.parametrize(
    "labels, message",
    [
        ([*range(99)], "99 labels, expected 100"),
        (["cat"] * 100, "holds no list 'fine_labels' of int"),
        ([[1]] * 100, "holds no list 'fine_labels' of int"),
        ([*range(99), -1], "record 99: label -1 is not in 0..99"),
        ([*range(99), 2**31 - 1], "record 99: label 2147483647 is not in 0..99"),
    ],
)
def test_python_file_of_wrong_labels(copy100, labels, message, tmp_path):
    copy100.files[PYTHON.folder]["train"] = copy100.encode(PYTHON, copy100.pixels[:TRAIN], labels, superclasses=[0] * TRAIN)
    copy100.unpack(tmp_path, PYTHON)
    assert message in refusal(copy100, tmp_path)


def test_names_of_numpy_2(copy100, tmp_path):
    good = copy100.files[PYTHON.folder]["train"]
    copy100.files[PYTHON.folder]["train"] = good.replace(b"numpy.core", b"numpy._core")
    copy100.unpack(tmp_path, PYTHON)
    assert_holds(copy100, read(copy100, tmp_path))


def test_describe_agrees_with_pickle(copy100):
    """What the own writer and reader make of the format is what `pickle` makes of it."""
    raw = copy100.files[PYTHON.folder]["train"]
    expected, described = pickle.loads(raw, encoding="latin-1"), plain_pickle.describe(raw)
    assert np.array_equal(plain_pickle.uint8_array(described.pop("data"), (TRAIN, 3072)), expected.pop("data"))
    assert described == expected
    twice = (1, 2, 3)
    plain = {"a": [1, -2, 70_000, True, False, None, "b"], "c": [(1,), (1, 2), twice, twice, (1, 2, 3, 4)], "d": {}}
    raw = pickle.dumps(plain, 2).replace(b"X\1\0\0\0", b"U\1")  # text as Python 2 wrote it
    assert plain_pickle.describe(raw) == plain


# Archives


def test_loose_members_are_passed_over(copy100, tmp_path):
    folder, outside = tmp_path / "data", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    evil = [
        (member("../evil", 4), b"evil"),
        (member("cifar-100-binary/../../evil", 4), b"evil"),
        (member(str(outside / "evil"), 4), b"evil"),
        (member("link", type=tarfile.SYMTYPE, linkname=str(outside)), b""),
        (member("link/evil", 4), b"evil"),
        (member("hard", type=tarfile.LNKTYPE, linkname="/etc/passwd"), b""),
        (member("terminal", type=tarfile.CHRTYPE), b""),
        (member("disk", type=tarfile.BLKTYPE), b""),
        (member("fifo", type=tarfile.FIFOTYPE), b""),
    ]
    copy100.pack(folder, BINARY, before=evil, after=[*evil, (member("cifar-100-binary/train.bin", 4), b"evil")])
    before = tree(tmp_path)
    assert_holds(copy100, read(copy100, folder))
    assert tree(tmp_path) == before


TEN_GB = 10 * 2**30


@pytest.mark.parametrize(
    "type, size, message",
    [
        (tarfile.SYMTYPE, 0, "not a regular file"),
        (tarfile.LNKTYPE, 0, "not a regular file"),
        (tarfile.CHRTYPE, 0, "not a regular file"),
        (tarfile.BLKTYPE, 0, "not a regular file"),
        (tarfile.FIFOTYPE, 0, "not a regular file"),
        (tarfile.DIRTYPE, 0, "not a regular file"),
        (tarfile.GNUTYPE_SPARSE, 0, "not a regular file"),
        (tarfile.REGTYPE, TEN_GB, "10,737,418,240 bytes, expected 30,740 (10 records of 3074 bytes)"),
        (tarfile.REGTYPE, 30_741, "30,741 bytes, expected 30,740 (10 records of 3074 bytes)"),
        (tarfile.REGTYPE, 0, "0 bytes, expected 30,740"),
    ],
)
def test_wanted_member_is_no_plain_file(copy100, type, size, message, tmp_path):
    (tmp_path / "secret").write_bytes(copy100.files[BINARY.folder]["test.bin"])
    bad = member("cifar-100-binary/test.bin", size, type, linkname=str(tmp_path / "secret"))
    path = copy100.pack(tmp_path, BINARY, before=[(bad, b"")], but="test.bin")
    before = tree(tmp_path)
    assert refusal(copy100, tmp_path).startswith(f"{path}: cifar-100-binary/test.bin: {message}")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "extra, message",
    [
        ([(member("huge", TEN_GB), b"")], "damaged archive: it ends too early"),
        ([(member("huger", 2**60), b"")], "damaged archive: it ends too early"),
        ([(member("zeros", 3_000_000), bytes(3_000_000))], "damaged archive: it holds more than"),
        ([(member("name", TEN_GB, tarfile.GNUTYPE_LONGNAME), bytes(3_000_000))], "damaged archive: it holds more than"),
        ([(member("name", 4, tarfile.GNUTYPE_LONGNAME), b"name")] * 900, "damaged archive"),
    ],
    ids=["10 GB declared", "2**60 bytes declared", "3 MB", "long name", "long names nested"],
)
def test_archive_that_would_exhaust_the_machine(copy100, extra, message, tmp_path):
    path = copy100.pack(tmp_path, BINARY, before=extra)
    with at_most(megabytes=30, seconds=5):
        assert refusal(copy100, tmp_path).startswith(f"{path}: {message}")


def test_archive_without_a_member(copy100, tmp_path):
    path = copy100.pack(tmp_path, BINARY, but="test.bin")
    assert refusal(copy100, tmp_path) == f"{path}: cifar-100-binary/test.bin is missing"


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", gzip.compress(b"", mtime=0),
                                     gzip.compress(b"<html>404</html>", mtime=0)])
def test_archive_that_is_none(copy100, content, tmp_path):
    (tmp_path / BINARY.archive.name).write_bytes(content)
    assert refusal(copy100, tmp_path).startswith(str(tmp_path / BINARY.archive.name))


def test_archive_cut_anywhere(copy100, tmp_path):
    path = copy100.pack(tmp_path, BINARY)
    whole = path.read_bytes()
    for length in [0, 1, 9, 10, 11, *range(0, len(whole), len(whole) // 20), *range(len(whole) - 9, len(whole))]:
        path.write_bytes(whole[:length])
        refusal(copy100, tmp_path)


@pytest.mark.parametrize("length", [1, 100])
def test_archive_with_damage_inside(copy100, length, tmp_path):
    """Bits flipped, bytes overwritten: refused, unless it makes no difference (a time stamp, a repetition of zeros)."""
    path = copy100.pack(tmp_path, BINARY)
    whole = path.read_bytes()
    it = copy100.cifar
    rng = random.Random(0)
    for position in [*range(10), *range(10, len(whole), len(whole) // 200), *range(len(whole) - 8, len(whole))]:
        damaged = bytearray(whole)
        damaged[position : position + length] = (byte ^ 1 << rng.randrange(8) for byte in whole[position:][:length])
        path.write_bytes(damaged)
        try:
            datasets = cifar.read(it, cifar.find(it, [tmp_path]))
        except DataError as error:
            assert "\n" not in str(error)
        else:
            assert_holds(copy100, datasets)


def scatter(raw, start, stop, rng):
    """`raw` with one to three bytes between start and stop overwritten."""
    damaged = bytearray(raw)
    for _ in range(rng.randrange(1, 4)):
        damaged[rng.randrange(start, stop)] = rng.randrange(256)
    return damaged


def test_random_damage_of_a_pickle_ends_in_a_message(copy100, tmp_path):
    good = copy100.files[PYTHON.folder]["train"]
    place = copy100.unpack(tmp_path, PYTHON)
    it = copy100.cifar
    found = cifar.find(it, [tmp_path])
    rng = random.Random(0)
    for _ in range(300):
        (place / "train").write_bytes(scatter(good, 0, len(good) - TRAIN * 3072, rng))
        with contextlib.suppress(DataError):
            cifar.read(it, found)


def test_random_damage_of_a_tar_ends_in_a_message(copy100, tmp_path):
    """In the headers of members, with the checksums of the header and of the gzip file made right again."""
    path = copy100.pack(tmp_path, BINARY)
    good = gzip.decompress(path.read_bytes())
    it = copy100.cifar
    found = cifar.find(it, [tmp_path])
    rng = random.Random(0)
    for _ in range(300):
        start = good.index(rng.choice([b"cifar-100-binary/train.bin", b"cifar-100-binary/test.bin"]))
        damaged = scatter(good, start, start + 512, rng)
        damaged[start + 148 : start + 156] = b" " * 8
        damaged[start + 148 : start + 156] = b"%06o\0 " % sum(damaged[start : start + 512])
        path.write_bytes(gzip.compress(damaged, 1))
        with contextlib.suppress(DataError):
            cifar.read(it, found)


# Right size, wrong content


@pytest.mark.parametrize("number", [0, 1], ids=["binary", "python"])
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
def test_label_out_of_range(copy, number, packed, tmp_path):
    edition = copy.original.editions[number]
    copy.labels[2] = 250
    copy.write()
    name = edition.train[0].name
    if packed:
        where = f"{copy.pack(tmp_path, edition)}: {edition.folder}/{name}"
    else:
        where = copy.unpack(tmp_path, edition) / name
    assert refusal(copy, tmp_path) == f"{where}: record 2: label 250 is not in 0..{copy.original.classes - 1}"


def test_record_of_one_byte_less(copy100, tmp_path):
    """All later records are shifted, and pixels stand where labels should."""
    raw = copy100.files[BINARY.folder]["train.bin"]
    copy100.files[BINARY.folder]["train.bin"] = raw[:1000] + raw[1001:] + b"\0"
    copy100.unpack(tmp_path, BINARY)
    assert "is not in 0..99" in refusal(copy100, tmp_path)


@pytest.mark.parametrize(
    "edition, size, message",
    [
        (BINARY, 153_700_001, "153,700,001 bytes, expected 153,700,000 (50,000 records of 3074 bytes)"),
        (BINARY, 153_650_000, "153,650,000 bytes, expected 153,700,000 (50,000 records of 3074 bytes)"),
        (PYTHON, 155_249_917, "155,249,917 bytes, expected 155,249,918"),
    ],
)
def test_size_that_is_not_official(edition, size, message, tmp_path):
    place = tmp_path / edition.folder
    place.mkdir()
    for file in edition.files:
        with open(place / file.name, "wb") as sparse:
            sparse.truncate(size if file in edition.train else file.size)
    with pytest.raises(DataError) as caught:
        data.load("cifar100", tmp_path)
    assert str(caught.value) == f"{place / edition.train[0].name}: {message}"


@pytest.mark.parametrize(
    "edition, raw, message",
    [
        (BINARY, b"apple\n" * 99, "99 class names, expected 100"),
        (BINARY, b"\xff\n" * 100, "'ascii' codec can't decode byte 0xff"),
        (
            PYTHON,
            python2_pickle({"fine_label_names": ["apple"] * 101, "coarse_label_names": []}),
            "101 class names, expected 100",
        ),
        (PYTHON, python2_pickle({"fine_label_names": [1] * 100}), "holds no list 'fine_label_names' of str"),
        (PYTHON, python2_pickle({"coarse_label_names": [1] * 100}), "holds no list 'fine_label_names' of str"),
        (PYTHON, b"\x80\x02].", "holds no list 'fine_label_names' of str"),
        (PYTHON, python2_pickle({"fine_label_names": ["apple"] * 100}), "holds no list 'coarse_label_names' of str"),
        (
            PYTHON,
            python2_pickle({"fine_label_names": ["apple"] * 100, "coarse_label_names": ["fruit"] * 19}),
            "19 superclass names, expected 20",
        ),
    ],
)
def test_class_names_of_wrong_content(copy100, edition, raw, message, tmp_path):
    copy100.files[edition.folder][edition.names[0].name] = raw
    place = copy100.unpack(tmp_path, edition)
    assert refusal(copy100, tmp_path).startswith(f"{place / edition.names[0].name}: ")
    assert message in refusal(copy100, tmp_path)


# Superclasses


@pytest.mark.parametrize("edition", [BINARY, PYTHON], ids=["binary", "python"])
@pytest.mark.parametrize(
    "wrong, message",
    [(250, "record 0: superclass 250 is not in 0..19"), (7, "record 0: class 11 in superclass 7, elsewhere in 2")],
)
def test_superclass_of_wrong_content(edition, wrong, message, copy100, tmp_path):
    copy100.labels[TRAIN] = 11
    copy100.write()
    labels = copy100.labels[TRAIN:].tolist()
    superclasses = [wrong, *map(copy100.superclass_of, labels[1:])]
    raw = copy100.encode(edition, copy100.pixels[TRAIN:], labels, superclasses)
    copy100.files[edition.folder][edition.test.name] = raw
    place = copy100.unpack(tmp_path, edition)
    assert refusal(copy100, tmp_path) == f"{place / edition.test.name}: {message}"


def test_class_without_images(copy100, tmp_path):
    copy100.labels[copy100.labels == 7] = 8
    copy100.write()
    place = copy100.unpack(tmp_path, BINARY)
    message = f"{place}: no image of class 7, class_7, says what its superclass is"
    assert refusal(copy100, tmp_path) == message


# Dataset


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": np.zeros((2, 3, 4, 4))}, "images are float64 (2, 3, 4, 4), need uint8 (M, 3, H, W)"),
        ({"images": np.zeros((2, 1, 4, 4), np.uint8)}, "images are uint8 (2, 1, 4, 4), need uint8 (M, 3, H, W)"),
        ({"images": np.zeros((2, 48), np.uint8)}, "images are uint8 (2, 48), need uint8 (M, 3, H, W)"),
        ({"images": np.zeros((2, 3, 4, 8), np.uint8)[..., ::2]}, "strides (96, 32, 8, 2), need a C-contiguous array"),
        ({"labels": np.zeros(2)}, "labels are float64 (2,), need int32 (2,)"),
        ({"labels": np.zeros(3, np.int32)}, "labels are int32 (3,), need int32 (2,)"),
        ({"labels": np.array([0, 2], np.int32)}, "record 1: label 2 is not in 0..1"),
        ({"labels": np.array([-1, 5], np.int32)}, "record 0: label -1 is not in 0..1"),
        ({"mean": (0.5, 0.5)}, "mean is (0.5, 0.5), need 3 numbers"),
        ({"std": (0.5, 0.5)}, "std is (0.5, 0.5), need 3 numbers above 0"),
        ({"std": (0.5, 0.5, 0.0)}, "std is (0.5, 0.5, 0.0), need 3 numbers above 0"),
        ({"superclasses": ("c", "d")}, "superclass_of has 0 numbers, need 2"),
        ({"superclass_of": (0, 0)}, "superclass_of has 2 numbers, need 0"),
        ({"superclasses": ("c",), "superclass_of": (0, 1)}, "class 1: superclass 1 is not in 0..0"),
    ],
)
def test_dataset_refuses(change, message):
    good = {
        "name": "two",
        "images": np.zeros((2, 3, 4, 4), np.uint8),
        "labels": np.array([0, 1], np.int32),
        "classes": ("a", "b"),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
    }
    Dataset(**good)
    with pytest.raises(DataError) as caught:
        Dataset(**{**good, **change})
    assert str(caught.value).startswith("two: ") and message in str(caught.value)


# Digits


def test_digits_are_all_there():
    train, test = data.load("digits")
    assert train.images.shape == (1437, 3, 32, 32) and test.images.shape == (360, 3, 32, 32)
    assert np.bincount(train.labels).tolist() == [136, 154, 151, 135, 143, 143, 151, 153, 138, 133]
    assert np.bincount(test.labels).tolist() == [42, 28, 26, 48, 38, 39, 30, 26, 36, 47]
    assert (train.images.sum(), test.images.sum()) == (343_628_640, 86_153_808)
    assert train.classes == tuple("0123456789")


def test_first_digit():
    """The first of the file, a zero, is the first of the test set."""
    _, test = data.load("digits")
    levels = """
        0 0  5 13  9  1  0 0
        0 0 13 15 10 15  5 0
        0 3 15  2  0 11  8 0
        0 4 12  0  0  8  8 0
        0 5  8  0  0  9  8 0
        0 4 11  0  1 12  7 0
        0 2 14  5 10 12  0 0
        0 0  6 13 10  0  0 0
    """
    expected = np.array([round(int(level) * 255 / 16) for level in levels.split()]).reshape(8, 8)
    assert test.labels[0] == 0
    assert np.array_equal(test.images[0], np.broadcast_to(np.kron(expected, np.ones((4, 4))), (3, 32, 32)))


def test_digits_mean_and_std():
    train, _ = data.load("digits")
    pixels = train.images / 255
    assert tuple(pixels.mean(axis=(0, 2, 3)).round(4)) == digits.MEAN == train.mean
    assert tuple(pixels.std(axis=(0, 2, 3)).round(4)) == digits.STD == train.std
