"""Download a file whose size and md5 are known, from the first of several mirrors that gives it.

What has come lies in <name>.part: the next run, or the next mirror, is asked for the rest. Only a whole file of the right
md5 gets its name. A mirror that does not answer, stalls or serves something else is left for the next one. One process at a
time downloads into a folder; the others wait, and find the file. Proxies are those of the environment.

This is not left to a library: pooch has no mirrors, does not resume, and stays with a server that stalls.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import queue
import re
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from email.message import Message
from pathlib import Path
from time import monotonic
from typing import BinaryIO, TypeAlias

from tqdm import tqdm

from minidl import __version__, signals
from minidl import process_lock
from minidl.data.checked_file import File
from minidl.errors import DataError

OFFLINE = "MINIDL_OFFLINE"  # the environment variable that forbids the network
STALL_SECONDS, SLOWEST = 20.0, 20_000.0  # a mirror must send this many bytes a second over this time
ANSWER_SECONDS = 9.0  # in which one of all mirrors must have answered: who is offline should know soon
POLL_SECONDS = 0.1  # between two looks for Ctrl-C
CHUNK = 1 << 18  # bytes

Source: TypeAlias = tuple[str, File]  # a URL and what it serves


class DownloadError(DataError):
    """No mirror gave the file. The text has one line for each, with the reason."""


class _Failed(Exception):
    """What a mirror did instead of sending the file, as the end of a sentence."""


class _NoAnswer(_Failed):
    """It did not even answer."""


class _CutOff(_Failed):
    """It stopped in the middle: it may send the rest when asked again."""


def fetch(title: str, sources: Sequence[Source], folder: Path) -> Path:
    """The path of the first file of `sources` that lies whole in `folder`, downloaded if none does.

    title: what the files are, for messages. Files that are there but differ are renamed to <name>.bad; so is a download that
    differs: its mirror is asked again after all others, and a second one that differs is the last. Progress and what is wrong
    with mirrors goes to stderr.

    Raises DownloadError where no mirror gives a file; DataError where the folder cannot be written.
    """
    files = list(dict.fromkeys(file for _, file in sources))
    if forbidden() and not any((folder / file.name).exists() for file in files):
        raise DownloadError(f"  {OFFLINE} is set, which forbids the network")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / f"{files[0].name}.lock"
        with process_lock.hold(lock, lambda: _say(f"{title}: waiting for another process that downloads into {folder}")):
            failures = []
            for file in files:
                path = folder / file.name
                if path.exists():
                    difference = file.difference(path)
                    if not difference:
                        return path
                    failures.append(_set_aside(path, file, difference))
            return _download(title, sources, folder, failures)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"{title} cannot be downloaded into {folder}: it is not a folder") from None
    except OSError as error:
        raise DataError(f"{title} cannot be downloaded into {folder}: {_reason(error)}") from error


def forbidden() -> bool:
    """Whether the environment variable MINIDL_OFFLINE forbids the network: set, and neither empty nor 0."""
    return os.environ.get(OFFLINE, "0") not in ("", "0")


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # beside a progress bar


def _set_aside(path: Path, file: File, difference: str) -> str:
    """Rename what is not `file`, and say so -> a line for the message at the end."""
    bad = path.with_name(f"{file.name}.bad")
    os.replace(path, bad)
    line = f"{path}: {difference}; renamed to {bad.name}"
    _say(line)
    return f"  {line}"


def _download(title: str, sources: Sequence[Source], folder: Path, failures: list[str]) -> Path:
    if forbidden():
        raise DownloadError("\n".join([*failures, f"  {OFFLINE} is set, which forbids the network"]))
    left = deque(sources)
    differing = 0
    answer_by = monotonic() + ANSWER_SECONDS
    while left and differing < 2:
        url, file = left.popleft()
        host = urllib.parse.urlsplit(url).netloc
        part = folder / f"{file.name}.part"
        here = part.stat().st_size if part.exists() else 0
        already = f", {here / 1e6:,.1f} MB of it are here" if here else ""
        _say(f"{title}: downloading {file.name} ({file.size / 1e6:,.1f} MB{already}) from {host} into {folder}")
        try:
            _complete(url, file, part, patience=(answer_by - monotonic()) / (1 + len(left)))
        except _Failed as failure:
            _say(f"{host}: {failure}{'; trying the next mirror' if left else ''}")
            failures.append(f"  {url}: {failure}")
            if not isinstance(failure, _NoAnswer):
                answer_by = monotonic() + ANSWER_SECONDS
            continue
        difference = file.difference(part)
        if not difference:
            path = folder / file.name
            os.replace(part, path)
            _say(f"{title}: {path} is complete, its md5 is right")
            return path
        failures.append(_set_aside(part, file, difference))
        differing += 1
        left.append((url, file))
        answer_by = monotonic() + ANSWER_SECONDS
    raise DownloadError("\n".join(failures))


def _complete(url: str, file: File, path: Path, patience: float) -> None:
    """Bring the file at `path` to the size of `file`. patience: seconds to wait for an answer. Raises _Failed."""
    with open(path, "ab") as part, tqdm(total=file.size, initial=part.tell(), desc=file.name, unit="B", unit_scale=True,
                                        disable=None, leave=False, dynamic_ncols=True) as bar:
        while (before := part.seek(0, os.SEEK_END)) < file.size:
            try:
                _append(url, file, part, patience, show=lambda received: bar.update(received - bar.n))
            except _CutOff:
                if part.seek(0, os.SEEK_END) - before < file.size / 100:  # else a mirror could be asked for ever
                    raise
        part.flush()
        os.fsync(part.fileno())


def _append(url: str, file: File, part: BinaryIO, patience: float, show: Callable[[int], object]) -> None:
    """Append to `part`, whose position is at its end, what the mirror has beyond. Raises _Failed.

    show: called with the bytes received so far.
    """
    received = part.tell()
    with contextlib.closing(_Response(url, received)) as response:
        status, headers = response.answer(patience)
        if status == 416 and received:  # it knows no such range: ask again, for the whole file
            part.truncate(0)
            return
        begin, size = _extent(status, headers)
        if size not in (None, file.size):
            raise _Failed(f"has a file of {size:,} bytes, expected {file.size:,}")
        if begin not in (0, received):
            raise _Failed(f"sends the bytes from {begin:,} on, asked for those from {received:,}")
        if begin != received:  # it ignores ranges
            part.truncate(0)
            received = 0
        stalled_at, enough = monotonic() + STALL_SECONDS, received + STALL_SECONDS * SLOWEST
        while chunk := response.chunk(stalled_at):
            received += len(chunk)
            if received > file.size:
                part.truncate(0)
                raise _Failed(f"sends more than {file.size:,} bytes")
            part.write(chunk)
            show(received)
            if received >= enough:
                stalled_at, enough = monotonic() + STALL_SECONDS, received + STALL_SECONDS * SLOWEST
    if received < file.size:
        raise _CutOff(f"ended the connection after {received:,} of {file.size:,} bytes")


def _extent(status: int, headers: Message) -> tuple[int, int | None]:
    """The first byte that an answer sends, and the size of the whole file where it tells it. Raises _Failed."""
    if status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", "").strip())
        if not match:
            raise _Failed("HTTP 206 without a Content-Range")
        return int(match[1]), None if match[2] == "*" else int(match[2])
    if status == 200:
        length = headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None
    raise _Failed(f"HTTP {status} {http.client.responses.get(status, '')}".rstrip())


class _Response:
    """What a server answers to GET url, from byte `begin` on.

    A thread of its own asks and reads: a look-up of a name can take a minute, and nothing interrupts it, so it can only be
    left alone. The thread waits for each read a little longer than anybody waits for the thread, and ends with the process.
    """

    def __init__(self, url: str, begin: int) -> None:
        headers = {"User-Agent": f"minidl/{__version__}", "Accept-Encoding": "identity"}
        if begin:
            headers["Range"] = f"bytes={begin}-"
        self._request = urllib.request.Request(url, headers=headers)
        self._items: queue.Queue[tuple[int, Message] | bytes | Exception] = queue.Queue(maxsize=16)
        self._closed = False
        threading.Thread(target=self._run, daemon=True).start()

    def answer(self, patience: float) -> tuple[int, Message]:
        """Status and headers. Raises _NoAnswer where none came within `patience` seconds."""
        item = self._next(monotonic() + patience, _NoAnswer(f"no answer within {patience:.1f} s"))
        if isinstance(item, Exception):
            raise _NoAnswer(_reason(item)) from item
        assert isinstance(item, tuple)
        return item

    def chunk(self, by: float) -> bytes:
        """The next bytes, b"" at the end. Raises _Failed at the time `by`, _CutOff where the connection breaks."""
        item = self._next(by, _Failed(f"stalled: less than {SLOWEST / 1000:g} kB/s over {STALL_SECONDS:g} s"))
        if isinstance(item, Exception):
            raise _CutOff(_reason(item)) from item
        assert isinstance(item, bytes)
        return item

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(queue.Empty):
            self._items.get_nowait()  # the thread may be waiting for room

    def _next(self, by: float, late: _Failed) -> tuple[int, Message] | bytes | Exception:
        while (wait := by - monotonic()) > 0:
            signals.obey()
            with contextlib.suppress(queue.Empty):
                return self._items.get(timeout=min(wait, POLL_SECONDS))
        raise late

    def _run(self) -> None:
        try:
            for item in self._receive():
                self._items.put(item)
                if self._closed:
                    return
        except Exception as error:  # whatever it is, the thread has nobody else to tell
            self._items.put(error)

    def _receive(self) -> Iterator[tuple[int, Message] | bytes]:
        try:
            response = urllib.request.urlopen(self._request, timeout=ANSWER_SECONDS + STALL_SECONDS)
        except urllib.error.HTTPError as error:
            response = error  # an answer all the same
        with response:
            yield response.status, response.headers
            while chunk := response.read1(CHUNK):
                yield chunk
            yield b""


def _reason(error: Exception) -> str:
    """What happened, in the words of the system where it has some."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
