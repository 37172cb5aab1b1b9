"""Downloads from servers that fail in every way known, provoked with real sockets and processes."""

import contextlib
import http.server
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from minidl import data
from minidl import process_lock
from minidl.data import cifar, download
from minidl.data.cifar import CIFAR10, CIFAR100
from minidl.errors import DataError
from test_data import BINARY, PYTHON, Copy, assert_holds, md5, needs_posix, stranger
from test_train import Started

SECONDS = 60  # that nothing here needs, on the busiest machine
LOAD = "import pickle, sys; from minidl.data import cifar; cifar.load(pickle.load(open(sys.argv[1], 'rb')), sys.argv[2:])"


# Servers


class Mirror:
    """A server on this machine. Each request gets the next of `answers`, the last one again and again.

    An answer is a function of (handler, content, first byte asked for). `ranges` lists the Range header of each request.
    """

    def __init__(self, content, *answers):
        self.ranges = []
        self.over = threading.Event()  # what a silent answer waits for
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                mirror.ranges.append(asked)
                self.over = mirror.over
                answer = answers[min(len(mirror.ranges), len(answers)) - 1]
                with contextlib.suppress(ConnectionError):  # who asked may leave at any time
                    answer(self, content, int(asked.split("=")[1].rstrip("-")) if asked else 0)

            def log_message(self, *_):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.host = f"127.0.0.1:{self.server.server_port}"

    def close(self):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


def head(handler, status, **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()


def serve(handler, content, begin):
    """As a good server does."""
    if begin:
        head(handler, 206, Content_Length=len(content) - begin,
             Content_Range=f"bytes {begin}-{len(content) - 1}/{len(content)}")
    else:
        head(handler, 200, Content_Length=len(content))
    handler.wfile.write(content[begin:])


def ignore_range(handler, content, begin):
    serve(handler, content, 0)


def refuse_range(handler, content, begin):
    if begin:
        head(handler, 416, Content_Range=f"bytes */{len(content)}")
    else:
        serve(handler, content, 0)


def shift_range(handler, content, begin):
    head(handler, 206, Content_Range=f"bytes {begin + 1}-{len(content) - 1}/{len(content)}")
    handler.wfile.write(content[begin + 1 :])


def without_length(handler, content, begin):
    head(handler, 200)
    handler.wfile.write(content)


def not_found(handler, content, begin):
    handler.send_error(404)


def page(handler, content, begin):
    """Of those networks that want a login first."""
    serve(handler, b"<html>Welcome to our hotel</html>", 0)


def too_much(handler, content, begin):
    without_length(handler, content + b"!", begin)


def flipped(handler, content, begin):
    """All of the right size, one bit wrong."""
    serve(handler, content[:1000] + bytes([content[1000] ^ 1]) + content[1001:], begin)


def cut_after(count):
    """Promise all and send `count` bytes."""

    def answer(handler, content, begin):
        head(handler, 206 if begin else 200, Content_Length=len(content) - begin,
             Content_Range=f"bytes {begin}-{len(content) - 1}/{len(content)}")
        handler.wfile.write(content[begin : begin + count])

    return answer


def stall_after(count):
    """Send `count` bytes, then nothing."""

    def answer(handler, content, begin):
        cut_after(count)(handler, content, begin)
        handler.wfile.flush()
        handler.over.wait(SECONDS)

    return answer


def silent(handler, content, begin):
    handler.over.wait(SECONDS)


def trickle(handler, content, begin):
    head(handler, 200, Content_Length=len(content))
    for byte in content:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        if handler.over.wait(0.01):
            return


def redirect_to(url):
    return lambda handler, content, begin: head(handler, 302, Location=url)


def free_port():
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


# The data


@pytest.fixture
def copy(tmp_path_factory):
    """A copy of CIFAR-100 whose archives, in both editions, are as attributes `binary` and `python`."""
    it = Copy(CIFAR100)
    folder = tmp_path_factory.mktemp("server")
    it.binary, it.python = (it.pack(folder, edition).read_bytes() for edition in (BINARY, PYTHON))
    return it


@pytest.fixture
def mirrors(copy):
    """mirrors(answer, ...) -> (the Cifar with such mirrors of its binary edition, [Mirror]). An answer may be a tuple."""
    made = []

    def make(*mirrors):
        for answers in mirrors:
            made.append(Mirror(copy.binary, *(answers if isinstance(answers, tuple) else (answers,))))
        urls = [f"http://{it.host}/some/where/{BINARY.archive.name}" for it in made]
        return replace(copy.cifar, mirrors=tuple(urls)), made

    yield make
    for it in made:
        it.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Online, without the proxies of this machine, and with a patience that tests can wait for."""
    for variable in "MINIDL_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY":
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(download, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(download, "ANSWER_SECONDS", 2.0)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def refusal(it, folder):
    with pytest.raises(DataError) as caught:
        cifar.load(it, [folder])
    assert caught.value.exit_code == 3
    return str(caught.value)


ARCHIVE, PART, BAD = (f"{BINARY.archive.name}{end}" for end in ("", ".part", ".bad"))


# A download that goes well


def test_what_is_missing_is_downloaded_and_said(copy, mirrors, tmp_path, capsys):
    it, [mirror] = mirrors(serve)
    folder = tmp_path / "not" / "yet there – данные 数据"
    assert_holds(copy, cifar.load(it, [folder, tmp_path]))
    assert files(folder) == [ARCHIVE] and (folder / ARCHIVE).read_bytes() == copy.binary
    out, err = capsys.readouterr()
    size = f"{len(copy.binary) / 1e6:.1f} MB"
    assert out == "" and err.splitlines() == [
        f"CIFAR-100: downloading {ARCHIVE} ({size}) from {mirror.host} into {folder}",
        f"CIFAR-100: {folder / ARCHIVE} is complete, its md5 is right",
    ]
    assert_holds(copy, cifar.load(it, [folder]))
    assert mirror.ranges == [None] and capsys.readouterr() == ("", "")


def test_into_which_folder(copy, mirrors, tmp_path, monkeypatch):
    it, _ = mirrors(serve)
    monkeypatch.setitem(data.CIFARS, "cifar100", it)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MINIDL_DATA", raising=False)
    data.load("cifar100", tmp_path / "asked")
    data.load("cifar100")
    monkeypatch.setenv("MINIDL_DATA", str(tmp_path / "named"))
    data.load("cifar100")  # finds that in the cache
    (tmp_path / "cache" / "minidl" / "data" / ARCHIVE).unlink()
    data.load("cifar100")
    assert [(tmp_path / name / ARCHIVE).exists() for name in ("asked", "named", "cache/minidl/data")] == [True, True, False]


def test_server_that_does_not_say_the_length(copy, mirrors, tmp_path):
    it, _ = mirrors(without_length)
    assert_holds(copy, cifar.load(it, [tmp_path]))


def test_redirection(copy, mirrors, tmp_path):
    """The official host redirects. What is asked for is asked for again."""
    _, [target] = mirrors(serve)
    it, [_, first] = mirrors(redirect_to(f"http://{target.host}/elsewhere"))
    (tmp_path / PART).write_bytes(copy.binary[:5000])
    assert_holds(copy, cifar.load(replace(it, mirrors=it.mirrors[1:]), [tmp_path]))
    assert first.ranges == target.ranges == ["bytes=5000-"]


def test_other_edition(copy, tmp_path):
    mirror = Mirror(copy.python, serve)
    it = replace(copy.cifar, mirrors=(f"http://{mirror.host}/{PYTHON.archive.name}",))
    assert_holds(copy, cifar.load(it, [tmp_path]))
    assert files(tmp_path) == [PYTHON.archive.name]
    mirror.close()


@pytest.mark.parametrize("original", [CIFAR100, CIFAR10], ids=lambda original: original.name)
def test_list_of_mirrors(original):
    archives = {edition.archive.name for edition in original.editions}
    hosts = [url.split("/")[2] for url in original.mirrors]
    assert all(url.startswith("https://") and url.rpartition("/")[2] in archives for url in original.mirrors)
    assert len(set(hosts)) == len(hosts) >= 3 and hosts[-1] == "www.cs.toronto.edu"


# Offline


def test_nobody_can_be_reached(copy, mirrors, tmp_path):
    """One refuses, two say nothing, as behind a firewall: each has its share of the time, and all is said."""
    it, servers = mirrors(silent, silent)
    closed = f"http://127.0.0.1:{free_port()}/{ARCHIVE}"
    it = replace(it, mirrors=(closed, *it.mirrors))
    start = time.monotonic()
    text = refusal(it, tmp_path)
    assert 1.9 < time.monotonic() - start < 8
    assert re.sub(r"0\.\d s", "1.0 s", text).splitlines() == [
        f"CIFAR-100 was not found in {tmp_path},",
        f"nor could it be downloaded into {tmp_path}:",
        f"  {closed}: Connection refused",
        f"  {it.mirrors[1]}: no answer within 1.0 s",
        f"  {it.mirrors[2]}: no answer within 1.0 s",
        f"Put one of these into {tmp_path}, or name another folder with --data-dir; they are at {cifar.HOMEPAGE}:",
        f"  {ARCHIVE}, md5 {md5(copy.binary)}",
        f"  {PYTHON.archive.name}, md5 {md5(copy.python)}",
        "  cifar-100-binary/ with train.bin, test.bin, fine_label_names.txt, coarse_label_names.txt",
        "  cifar-100-python/ with train, test, meta",
        "Or choose the small data set that comes with minidl: --dataset digits",
    ]
    assert files(tmp_path) == [PART] and (tmp_path / PART).stat().st_size == 0


def test_name_server_that_does_not_answer(mirrors, tmp_path, monkeypatch):
    """The system asks it for up to a minute, in a call that nothing interrupts."""
    it, _ = mirrors(serve)
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(SECONDS))
    start = time.monotonic()
    assert "no answer within 2.0 s" in refusal(it, tmp_path)
    assert time.monotonic() - start < 8
    over.set()


def command(*arguments, **variables):
    """`python -m minidl data` in a process of its own."""
    return Started([sys.executable, "-m", "minidl", "data", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                   env={**os.environ, **variables})


def test_command_offline(tmp_path):
    """With the true mirrors, behind a proxy that is not there."""
    start = time.monotonic()
    process = command("--data-dir", tmp_path, https_proxy=f"http://127.0.0.1:{free_port()}")
    out, err = process.communicate(timeout=SECONDS)
    assert time.monotonic() - start < 10 and process.returncode == 3
    assert out == "" and "Traceback" not in err and err.count("error: ") == 1
    error = err.partition("error: ")[2]
    for url in CIFAR100.mirrors:
        assert f"  {url}: Connection refused\n" in error
    for text in (ARCHIVE, BINARY.archive.md5, str(tmp_path), "--dataset digits"):
        assert text in error


@needs_posix
def test_ctrl_c_is_obeyed_while_nobody_answers(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as proxy:  # accepts, and says nothing
        process = command("--data-dir", tmp_path, https_proxy=f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert process.stderr.readline().startswith("CIFAR-100: downloading")
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 130 and err == "error: interrupted\n"
        assert time.monotonic() - start < 2.5  # of the 3 s that the first mirror has


def test_nothing_is_asked_where_the_network_is_forbidden(copy, mirrors, tmp_path, monkeypatch):
    it, [mirror] = mirrors(serve)
    for value, allowed in ("1", False), ("yes", False), ("0", True), ("", True):
        monkeypatch.setenv("MINIDL_OFFLINE", value)
        if allowed:
            cifar.load(it, [tmp_path / f"x{value}"])
        else:
            assert "  MINIDL_OFFLINE is set, which forbids the network" in refusal(it, tmp_path / "nowhere")
    assert len(mirror.ranges) == 2 and not (tmp_path / "nowhere").exists()


# Mirrors that fail


@pytest.mark.parametrize(
    "bad, reason",
    [
        (not_found, "HTTP 404 Not Found"),
        (page, "has a file of 33 bytes, expected {size:,}"),
        (too_much, "sends more than {size:,} bytes"),
        (stall_after(5000), "stalled: less than 20 kB/s over 1 s"),
        (trickle, "stalled: less than 20 kB/s over 1 s"),
        (silent, "no answer within 1.0 s"),
        (cut_after(0), "ended the connection after 0 of {size:,} bytes"),
        (lambda handler, content, begin: head(handler, 206), "HTTP 206 without a Content-Range"),
        (lambda handler, content, begin: handler.wfile.write(b"what?"), "what?"),
        (lambda handler, content, begin: None, "Remote end closed connection without response"),
    ],
    ids=["404", "page", "too much", "stalls", "trickles", "silent", "cut", "no range", "no HTTP", "hangs up"],
)
def test_next_mirror(bad, reason, copy, mirrors, tmp_path, capsys):
    it, [first, second] = mirrors(bad, serve)
    assert_holds(copy, cifar.load(it, [tmp_path]))
    assert files(tmp_path) == [ARCHIVE] and (tmp_path / ARCHIVE).read_bytes() == copy.binary
    assert len(second.ranges) == 1
    said = re.sub(r"0\.\d s", "1.0 s", capsys.readouterr().err).splitlines()
    assert said[1] == f"{first.host}: {reason.format(size=len(copy.binary))}; trying the next mirror" and len(said) == 4


def test_mirror_that_refuses_connections(copy, mirrors, tmp_path, capsys):
    it, _ = mirrors(serve)
    host = f"127.0.0.1:{free_port()}"
    assert_holds(copy, cifar.load(replace(it, mirrors=(f"http://{host}/{ARCHIVE}", *it.mirrors)), [tmp_path]))
    assert capsys.readouterr().err.splitlines()[1] == f"{host}: Connection refused; trying the next mirror"


def test_rest_from_the_next_mirror(copy, mirrors, tmp_path):
    """What the first one sent before it stalled is not asked for again."""
    it, [first, second] = mirrors(stall_after(5000), serve)
    assert_holds(copy, cifar.load(it, [tmp_path]))
    assert (first.ranges, second.ranges) == ([None], ["bytes=5000-"])


def test_mirror_that_cuts_off_is_asked_for_the_rest(copy, mirrors, tmp_path):
    third = len(copy.binary) // 3
    it, [mirror] = mirrors((cut_after(third), cut_after(third), serve))
    assert_holds(copy, cifar.load(it, [tmp_path]))
    assert mirror.ranges == [None, f"bytes={third}-", f"bytes={2 * third}-"]


def test_mirror_that_cuts_off_at_once_is_not_asked_for_ever(copy, mirrors, tmp_path):
    it, [mirror] = mirrors(cut_after(len(copy.binary) // 200))
    assert f"ended the connection after {len(copy.binary) // 200:,} of" in refusal(it, tmp_path)
    assert len(mirror.ranges) == 1


def test_mirror_that_cuts_off_and_knows_no_ranges(copy, mirrors, tmp_path):
    def half(handler, content, begin):
        head(handler, 200, Content_Length=len(content))
        handler.wfile.write(content[: len(content) // 2])

    it, [mirror] = mirrors(half)
    refusal(it, tmp_path)
    assert len(mirror.ranges) == 2


# Damaged archives


DAMAGES = {
    "empty": lambda raw: b"",
    "half": lambda raw: raw[: len(raw) // 2],
    "one byte short": lambda raw: raw[:-1],
    "one bit flipped": lambda raw: raw[:5000] + bytes([raw[5000] ^ 16]) + raw[5001:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_archive_of_the_user(damage, copy, mirrors, tmp_path, capsys):
    """It is named with its hash, set aside, and downloaded anew to where it was."""
    it, [mirror] = mirrors(serve)
    damaged = DAMAGES[damage](copy.binary)
    (tmp_path / "its place").mkdir()
    path = tmp_path / "its place" / ARCHIVE
    path.write_bytes(damaged)
    assert_holds(copy, cifar.load(it, [tmp_path, path.parent]))
    assert files(path.parent) == [ARCHIVE, BAD] and (path.parent / BAD).read_bytes() == damaged
    sizes = f" ({len(damaged):,} bytes instead of {len(copy.binary):,})" if len(damaged) != len(copy.binary) else ""
    first = f"{path}: md5 {md5(damaged)}, expected {md5(copy.binary)}{sizes}; renamed to {BAD}"
    assert capsys.readouterr().err.splitlines()[0] == first


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_archive_of_the_user_and_nothing_better(damage, copy, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIDL_OFFLINE", "1")
    damaged = DAMAGES[damage](copy.binary)
    (tmp_path / ARCHIVE).write_bytes(damaged)
    text = refusal(copy.cifar, tmp_path)
    assert f"  {tmp_path / ARCHIVE}: md5 {md5(damaged)}, expected {md5(copy.binary)}" in text
    assert "MINIDL_OFFLINE is set" in text and files(tmp_path) == [BAD]


def test_good_archive_beside_a_damaged_one(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIDL_OFFLINE", "1")
    copy.pack(tmp_path, PYTHON)
    (tmp_path / ARCHIVE).write_bytes(copy.binary[:-1])
    it = replace(copy.cifar, mirrors=tuple(f"http://x/{edition.archive.name}" for edition in (BINARY, PYTHON)))
    assert_holds(copy, cifar.load(it, [tmp_path]))


def test_mirror_with_a_wrong_bit_is_asked_once_more(copy, mirrors, tmp_path):
    it, [mirror] = mirrors((flipped, serve))
    assert_holds(copy, cifar.load(it, [tmp_path]))
    assert len(mirror.ranges) == 2 and files(tmp_path) == [ARCHIVE, BAD]


def test_mirrors_with_a_wrong_bit(copy, mirrors, tmp_path):
    """Two wrong downloads are enough: somebody between all mirrors and here changes them."""
    it, servers = mirrors(flipped, flipped, flipped)
    text = refusal(it, tmp_path)
    wrong = (tmp_path / BAD).read_bytes()
    assert text.count(f"md5 {md5(wrong)}, expected {md5(copy.binary)}; renamed to {BAD}") == 2
    assert [len(server.ranges) for server in servers] == [1, 1, 0] and files(tmp_path) == [BAD]


# What is left of an earlier download


@pytest.mark.parametrize("answer", [serve, ignore_range, refuse_range, (shift_range, serve)],
                         ids=["serves ranges", "ignores them", "refuses them", "serves others"])
def test_part_is_resumed_or_dropped(answer, copy, mirrors, tmp_path):
    (tmp_path / PART).write_bytes(copy.binary[:5000])
    it, [mirror, _] = mirrors(answer, serve)
    assert_holds(copy, cifar.load(it, [tmp_path]))
    assert mirror.ranges[0] == "bytes=5000-" and files(tmp_path) == [ARCHIVE]
    assert (tmp_path / ARCHIVE).read_bytes() == copy.binary


def test_whole_part_needs_no_server(copy, mirrors, tmp_path):
    (tmp_path / PART).write_bytes(copy.binary)
    it, [mirror] = mirrors(serve)
    assert_holds(copy, cifar.load(it, [tmp_path]))
    assert mirror.ranges == [] and files(tmp_path) == [ARCHIVE]


@pytest.mark.parametrize("part", [bytes(5000), b"", lambda raw: raw[:-1] + b"?", lambda raw: raw + b"?"],
                         ids=["zeros", "empty", "last byte", "too long"])
def test_part_of_wrong_content(part, copy, mirrors, tmp_path):
    """Only the md5 of the whole tells: then all is downloaded anew."""
    (tmp_path / PART).write_bytes(part(copy.binary) if callable(part) else part)
    it, [mirror] = mirrors(serve)
    assert_holds(copy, cifar.load(it, [tmp_path]))
    assert (tmp_path / ARCHIVE).read_bytes() == copy.binary


def in_a_process(it, folder, stderr):
    """cifar.load(it, [folder]) in a process of its own."""
    (folder.parent / "it.pickle").write_bytes(pickle.dumps(it))
    return subprocess.Popen([sys.executable, "-c", LOAD, folder.parent / "it.pickle", folder], stderr=stderr)


def wait_until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_kill_during_a_download(copy, mirrors, tmp_path):
    """What has come is never read as data, and is not asked for again."""
    it, [mirror] = mirrors((stall_after(5000), serve))
    folder = tmp_path / "data"
    process = in_a_process(it, folder, None)
    wait_until(lambda: (folder / PART).exists() and (folder / PART).stat().st_size == 5000)
    process.kill()
    process.wait()
    assert files(folder) == [f"{ARCHIVE}.lock", PART] and cifar.find(it, [folder]) is None
    assert_holds(copy, cifar.load(it, [folder]))
    assert mirror.ranges == [None, "bytes=5000-"] and files(folder) == [ARCHIVE]


# Several processes


def test_two_processes_start_cold(copy, mirrors, tmp_path):
    asked = threading.Event()

    def late(handler, content, begin):
        asked.wait(SECONDS)
        serve(handler, content, begin)

    it, [mirror] = mirrors(late)
    folder, logs = tmp_path / "data", [tmp_path / "0.log", tmp_path / "1.log"]
    with contextlib.ExitStack() as stack:
        processes = [in_a_process(it, folder, stack.enter_context(log.open("w"))) for log in logs]
        waiting = f"CIFAR-100: waiting for another process that downloads into {folder}\n"
        wait_until(lambda: any(log.read_text() == waiting for log in logs))
        asked.set()
        assert [process.wait(SECONDS) for process in processes] == [0, 0]
    assert mirror.ranges == [None] and files(folder) == [ARCHIVE]
    assert sorted(log.read_text().count("\n") for log in logs) == [1, 2]  # waiting; downloading, complete


def test_process_that_waits_goes_on_where_a_killed_one_was(copy, mirrors, tmp_path):
    it, [mirror] = mirrors((stall_after(5000), serve))
    folder, log = tmp_path / "data", tmp_path / "log"
    first = in_a_process(it, folder, None)
    wait_until(lambda: (folder / PART).exists() and (folder / PART).stat().st_size == 5000)
    with log.open("w") as file:
        second = in_a_process(it, folder, file)
        wait_until(lambda: "waiting" in log.read_text())
        first.kill()
        first.wait()
        assert second.wait(SECONDS) == 0
    assert mirror.ranges == [None, "bytes=5000-"] and files(folder) == [ARCHIVE]


def test_lock_is_held_by_one_at_a_time(tmp_path, monkeypatch):
    """Threads that open the file each by themselves are to the kernel as processes are."""
    path, inside, most, waited = tmp_path / "lock", [], [], []
    monkeypatch.setattr(process_lock, "POLL_SECONDS", 0)

    def work():
        for _ in range(50):
            with process_lock.hold(path, lambda: waited.append(1)):
                inside.append(1)
                time.sleep(0.0005)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 200 and waited and not path.exists()


# Awkward folders


@needs_posix
def test_folder_that_cannot_be_written(mirrors):
    it, [mirror] = mirrors(serve)
    with tempfile.TemporaryDirectory() as name:  # tmp_path lies in a folder that only its owner can enter
        folder = Path(name)
        folder.chmod(0o555)
        with stranger():
            assert refusal(it, folder) == f"CIFAR-100 cannot be downloaded into {folder}: Permission denied"
            assert refusal(it, folder / "new") == f"CIFAR-100 cannot be downloaded into {folder}/new: Permission denied"
    assert mirror.ranges == []


@needs_posix
def test_damaged_archive_that_cannot_be_set_aside(copy, mirrors):
    it, _ = mirrors(serve)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / ARCHIVE).write_bytes(copy.binary[:-1])
        folder.chmod(0o555)
        with stranger():
            text = refusal(it, folder)
            assert f"md5 {md5(copy.binary[:-1])}, expected {md5(copy.binary)}" in text and "Permission denied" in text
        folder.chmod(0o755)


def test_folder_that_is_a_file(mirrors, tmp_path):
    it, _ = mirrors(serve)
    (tmp_path / "file").touch()
    assert refusal(it, tmp_path / "file") == f"CIFAR-100 cannot be downloaded into {tmp_path / 'file'}: it is not a folder"


@needs_posix
def test_full_disk(mirrors, tmp_path):
    """Or rather a limit of the size of files: to a process they are the same."""
    it, _ = mirrors(serve)
    folder = tmp_path / "data"
    (tmp_path / "it.pickle").write_bytes(pickle.dumps(it))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "  # Python ignores SIGXFSZ
    child = [sys.executable, "-c", limit + LOAD, tmp_path / "it.pickle", folder]
    result = subprocess.run(child, stderr=subprocess.PIPE, text=True, timeout=SECONDS)
    assert f"DataError: CIFAR-100 cannot be downloaded into {folder}: File too large" in result.stderr
    assert files(folder) == [PART]


@needs_posix
def test_without_home_no_folder_is_made_up(tmp_path, monkeypatch):
    for variable in "MINIDL_DATA", "XDG_CACHE_HOME", "HOME":
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    with stranger():
        if os.path.expanduser("~") != "~":
            pytest.skip("this user has a home without HOME")
        with pytest.raises(DataError, match="there is no home folder, so name one with --data-dir or MINIDL_DATA"):
            data.load("cifar10")
    assert files(tmp_path) == []
