"""Feed damaged and hostile files to a reader: `python tests/fuzz.py READER EXAMPLES [SEED]`. Hypothesis makes them.

An example begins as a genuine file, or as a part of one that a checksum protects, which is then packed again; or as nothing
but random bytes. A reader may return, or raise a UserError of one short text. Whatever else it does ends this program with
a traceback and the smallest example found: another exception, more than a few seconds, more memory than MEMORY_LIMIT beyond
what it started with, a program or code that it executes, a file that it writes.
"""

import contextlib
import gzip
import io
import json
import os
import resource
import sys
import tempfile
import zipfile
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, seed, settings, strategies as st

from minidl import checkpoint, images, weights
from minidl.data import cifar
from minidl.data.cifar import CIFAR100
from minidl.errors import CheckpointError, UserError
from minidl.settings import read_toml, resolve
from models import recipes
from test_data import Copy

MEMORY_LIMIT = 700_000_000  # bytes
SECONDS = 5
LONGEST_MESSAGE = 2000  # characters
EXECUTES = ("exec", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "ctypes.dlopen",
            "socket.connect", "shutil.rmtree", "os.rename", "os.remove", "os.mkdir")

EDITS = st.lists(st.tuples(st.sampled_from(["set", "flip", "insert", "delete", "repeat", "cut", "splice"]),
                           st.floats(0, 1, exclude_max=True), st.integers(0, 255), st.integers(1, 64)), min_size=1, max_size=6)


def edited(raw, edits):
    """The bytes with some of them changed: an edit is (kind, where in 0..1, value, length)."""
    for kind, where, value, length in edits:
        at = int(where * len(raw))
        if kind == "set":
            raw = raw[:at] + bytes([value]) * min(length, 4) + raw[at + min(length, 4):]
        elif kind == "flip":
            raw = raw[:at] + bytes([raw[at] ^ (1 << value % 8)]) + raw[at + 1:] if raw else raw
        elif kind == "insert":
            raw = raw[:at] + bytes([value]) * length + raw[at:]
        elif kind == "delete":
            raw = raw[:at] + raw[at + length:]
        elif kind == "repeat":
            raw = raw[:at] + raw[at:at + length] * (1 + value) + raw[at + length:]
        elif kind == "cut":
            raw = raw[:at]
        else:
            raw = raw[:at] + raw[value * len(raw) // 256:]
    return raw


# ---- readers: a list of (genuine bytes, how they are packed), and what reads a file --------------------------------


def same(raw):
    return raw


def npz_seeds():
    """Checkpoints and plain weights, whole; and their members, which are packed again with right checksums."""
    state = {"conv.weight": np.arange(54, dtype=np.float32).reshape(2, 3, 3, 3), "n": np.array(3, np.int64),
             "big": np.arange(6, dtype=">f8").reshape(2, 3), "half": np.ones(4, np.float16)}
    metadata = weights.describe("wrn-10-1", 10, {"dropout": 0.3})
    progress = {"settings": {"arch": "wrn-10-1", "dataset": "digits"}, "epoch": 1, "step": 2, "history": [], "best": None}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        weights.save(path / "weights.npz", state, metadata)
        checkpoint.save(path, checkpoint.Checkpoint(state, {"velocity": np.zeros(9, np.float32)}, metadata, progress))
        files = [(path / name).read_bytes() for name in ("weights.npz", checkpoint.LAST)]

    def packed_again(archive, name):
        with zipfile.ZipFile(io.BytesIO(archive)) as source:
            members = {member: source.read(member) for member in source.namelist()}

        def pack(raw):
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as target:
                for member, content in members.items():
                    target.writestr(member, raw if member == name else content)
            return file.getvalue()

        return members[name], pack

    def sealed(raw):
        """The metadata in JSON with a hash that fits them."""
        try:
            metadata = json.loads(raw)
            metadata.pop("sha256", None)
            text = json.dumps({**metadata, "sha256": weights._digest(metadata)})
        except (ValueError, TypeError, AttributeError, RecursionError):
            text = raw.decode("latin-1")
        member = io.BytesIO()
        np.lib.format.write_array(member, np.array(text or " "), allow_pickle=False)
        return packed_again(files[1], "metadata.npy")[1](member.getvalue())

    with np.load(io.BytesIO(files[1])) as file:
        text = str(file["metadata"]).encode()
    return [*((file, same) for file in files), packed_again(files[0], "conv.weight.npy"), packed_again(files[1], "metadata.npy"),
            (text, sealed)]


def read_checkpoint(path):
    weights.load(path)
    with contextlib.suppress(CheckpointError):  # of weights alone
        checkpoint.load(path)


def safetensors_seeds():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "it.safetensors"
        weights.save_safetensors(path, {"a": np.ones((3, 4), np.float32), "b": np.arange(5)},
                                 weights.describe("wrn-10-1", 10, {}))
        raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return [(raw, same), (raw[8:8 + length], lambda header: len(header).to_bytes(8, "little") + header + raw[8 + length:])]


COPY = Copy(CIFAR100)


def cifar_seeds():
    """Files of both editions, in which only so many bytes change that their size stays: another one is refused at once."""
    return [(raw, (lambda changed, name=name, folder=folder, size=len(raw): (folder, name, (changed + bytes(size))[:size])))
            for folder, files in COPY.files.items() for name, raw in files.items()]


def read_cifar(path):
    """path: holds what `cifar_seeds` packs."""
    folder, name, raw = path
    edition = next(edition for edition in CIFAR_SMALL.editions if edition.folder == folder)
    place = SCRATCH / folder
    (place / name).write_bytes(raw)
    try:
        cifar.load(CIFAR_SMALL, [place])
    finally:
        (place / name).write_bytes(COPY.files[edition.folder][name])


def archive_seeds():
    archives = []
    with tempfile.TemporaryDirectory() as folder:
        for edition in CIFAR100.editions:
            raw = COPY.pack(Path(folder), edition).read_bytes()
            archives += [(raw, same), (gzip.decompress(raw), lambda tar: gzip.compress(tar, 1))]
    return archives


def read_archive(path):
    """As an archive of each edition, one of which it may be."""
    refusals = []
    for edition in CIFAR_SMALL.editions:
        try:
            for _ in cifar._archived_files(edition, path):
                pass
        except UserError as error:
            refusals.append(error)
    if len(refusals) == len(CIFAR_SMALL.editions):
        raise refusals[0]


def toml_seeds():
    chosen = resolve({"arch": "simplenet-5m", "dataset": "cifar100"}, recipes.recipe("paper", "simplenet-5m", "cifar100"))
    return [(raw, same) for raw in (chosen.as_toml().encode(), b'arch = "wrn-10-1"\n[model_kwargs]\ndropout = 0.3\ngamma = "one"\n')]


def image_seeds():
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8))
    seeds = []
    for form, mode in (("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("GIF", "P"), ("BMP", "RGB"),
                       ("TIFF", "RGB"), ("WEBP", "RGB"), ("PPM", "RGB")):
        file = io.BytesIO()
        picture.convert(mode).save(file, form)
        seeds.append((file.getvalue(), png_with_right_checksums if form == "PNG" else same))
    return seeds


def png_with_right_checksums(raw):
    """The chunks of a PNG with CRCs that fit them, as far as it can be parsed."""
    parts, at = [raw[:8]], 8
    while at + 12 <= len(raw):
        length = int.from_bytes(raw[at:at + 4], "big")
        end = at + 8 + length
        if end + 4 > len(raw):
            break
        parts += [raw[at:end], zlib.crc32(raw[at + 4:end]).to_bytes(4, "big")]
        at = end + 4
    return b"".join([*parts, raw[at:]])


READERS = {"checkpoint": (npz_seeds, read_checkpoint), "safetensors": (safetensors_seeds, weights.load),
           "cifar": (cifar_seeds, read_cifar), "archive": (archive_seeds, read_archive), "toml": (toml_seeds, read_toml),
           "image": (image_seeds, lambda path: images.read(path, 32))}


# ---- the hunt ----------------------------------------------------------------------------------------------------


def forbid_execution():
    """From now on what executes something, or writes a file that the fuzzer does not, raises an AssertionError."""
    def audit(event, arguments):
        if watching and event in EXECUTES:
            raise AssertionError(f"the reader calls {event}{arguments!r}"[:300])
        if watching and event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            raise AssertionError(f"the reader writes {arguments[0]!r}")

    watching: list[int] = []
    sys.addaudithook(audit)
    return watching


def fuzz(reader, examples, number):
    seeds_of, read = READERS[reader]
    genuine = seeds_of()
    path = SCRATCH / "example"
    watching = forbid_execution()
    warm_up(genuine, read, path)
    before = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (before + MEMORY_LIMIT, resource.RLIM_INFINITY))
    outcomes = {"read": 0, "refused": 0}

    def attempt(content):
        target = content
        if isinstance(content, bytes):
            path.write_bytes(content)
            target = path
        try:
            if read is not read_cifar:  # which writes its example itself
                watching.append(1)
            read(target)
            outcomes["read"] += 1
        except UserError as error:
            assert 0 < len(str(error)) < LONGEST_MESSAGE, f"a message of {len(str(error))} characters"
            outcomes["refused"] += 1
        finally:
            watching.clear()

    @seed(number)
    @settings(max_examples=examples, deadline=timedelta(seconds=SECONDS), database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(st.tuples(st.integers(0, len(genuine) - 1), EDITS), st.binary(max_size=300)))
    def hunt(example):
        if isinstance(example, bytes):
            attempt(example if read is not read_cifar else (genuine[0][1])(example))
        else:
            raw, pack = genuine[example[0]]
            attempt(pack(edited(raw, example[1])))

    hunt()
    return outcomes


def warm_up(genuine, read, path):
    """What a reader imports or compiles at its first call is not the example's doing; and genuine files can be read."""
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401
    for raw, pack in genuine:
        content = pack(raw)
        if isinstance(content, bytes):
            path.write_bytes(content)
            content = path
        read(content)


if __name__ == "__main__":
    name, count, *more = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        SCRATCH = Path(scratch)
        for edition_of_100 in CIFAR100.editions:
            COPY.unpack(SCRATCH, edition_of_100)
            COPY.pack(SCRATCH, edition_of_100)
        CIFAR_SMALL = COPY.cifar
        for archive in CIFAR100.editions:
            (SCRATCH / archive.archive.name).unlink()
        found = fuzz(name, int(count), int(more[0]) if more else 0)
    print(f"{name}: {sum(found.values()):,} examples, {found['read']:,} read, {found['refused']:,} refused")
