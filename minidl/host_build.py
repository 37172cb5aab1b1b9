"""Builds of the kernels for the CPU: the host compiler, its flags, and a cache of libraries shared by processes."""

import atexit
import ctypes
import functools
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from minidl.errors import DeviceError

OPS = Path(__file__).parent / "ops"


def flag_for_all_instructions(machine: str) -> str:
    """What tells a compiler to use all instructions of the CPU it runs on. On ARM, clang before 15 refuses -march=native."""
    return "-mcpu=native" if machine in ("aarch64", "arm64") else "-march=native"


# No -ffast-math: it breaks NaN and infinity, and a library built with it switches the whole process to
# flush-to-zero. Products and sums may be contracted to one rounding, as they are on a GPU.
_COMMON = ["-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-ffp-contract=fast"]
# On macOS, <ucontext.h> needs the first of these names, before any header, and what that hides needs the second.
_EMULATOR = [*_COMMON, "-O1", "-D_XOPEN_SOURCE=700", "-D_DARWIN_C_SOURCE"]
FLAGS = {
    "fast": [*_COMMON, "-O3", flag_for_all_instructions(platform.machine()), "-fopenmp-simd", "-DMINIDL_FAST"],
    "emulate": _EMULATOR,
    # Reports name lines; to know variables, too, would take a third longer to compile.
    "sanitize": [*_EMULATOR, "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
_UNFINISHED, _ABANDONED_SECONDS = "unfinished-", 3600
_DIGEST_BYTES = hashlib.sha256().digest_size


class CompileError(DeviceError):
    """A kernel source that a compiler refuses. The text holds file, line and the compiler's first error."""


@functools.cache
def compiler() -> list[str]:
    """The command of the host compiler, as a list: $CXX, g++, clang++, or zig's from the package `ziglang`.

    Raises DeviceError where there is none.
    """
    setting = os.environ.get("CXX", "")
    try:
        command = shlex.split(setting)
    except ValueError as error:
        raise DeviceError(f"$CXX is {setting!r}, which is not a command: {error}") from None
    if command:
        if shutil.which(command[0]):
            return command
        raise DeviceError(f"$CXX names the compiler {command[0]!r}, which is not found")
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return [name]
    try:
        import ziglang  # noqa: F401
    except ImportError:
        raise DeviceError("no C++ compiler found to build the kernels for the CPU: "
                          "install g++, or `pip install ziglang`") from None
    return [sys.executable, "-m", "ziglang", "c++"]


@functools.cache
def _machine() -> str:
    """What a library built here depends on besides its sources: the compiler's version and the CPU."""
    version = run([*compiler(), "--version"]).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        cpu = cpu_name()
    return version + platform.machine() + cpu


def cpu_name() -> str:
    """What the CPU is called where no /proc/cpuinfo tells: "Apple M1", or no more than its family."""
    try:
        name = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout.strip()
    except OSError:
        name = ""
    return name or platform.processor() or platform.machine()


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler -> its end. Raises DeviceError where it cannot be run, and as `cache_folder`."""
    # zig keeps its C++ library, built at the first call, in a cache of its own: where ours is, it can write.
    environment = {"ZIG_GLOBAL_CACHE_DIR": str(cache_folder() / "zig"), **os.environ}
    try:
        # A session of its own: Ctrl-C ends a run between two steps, not the compiler in the middle of one.
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="backslashreplace", env=environment,
                              start_new_session=True)
    except OSError as error:
        raise DeviceError(f"the compiler {command[0]} cannot be run: {error.strerror}; set $CXX to another") from None


def lasting_cache_folders() -> list[Path]:
    """Where built libraries may be kept for the next process: below $MINIDL_CACHE, or the user's cache."""
    places = (("MINIDL_CACHE", ""), ("XDG_CACHE_HOME", "minidl"), ("HOME", ".cache/minidl"))
    return [Path(os.environ[name], below, "kernels").expanduser() for name, below in places if os.environ.get(name)]


@functools.cache
def cache_folder() -> Path:
    """A folder for built libraries: the first of `lasting_cache_folders` that can be written, or a temporary one. Raises
    DeviceError where there is none."""
    for folder in lasting_cache_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    # Private to this process: a predictable name in a folder that all users write could be planted.
    try:
        temporary = tempfile.mkdtemp(prefix="minidl-kernels-")
    except OSError:
        raise DeviceError("there is no folder to build the kernels in: set MINIDL_CACHE to one that can be written") from None
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)


def read_source(source: Path) -> str:
    """The text of a kernel file."""
    return source.read_text(encoding="utf-8")


def sources_digest(source: Path, text: str) -> str:
    """A digest of the text of a kernel file, and of all headers that it may include: those beside it, and those of minidl. Taken
    anew each time, as who writes kernels changes them while a process runs."""
    digest = hashlib.sha256(text.encode())
    for folder in dict.fromkeys((source.parent, OPS)):
        for path in sorted([*folder.glob("*.cuh"), *folder.glob("*.h")]):
            digest.update(os.fsencode(path.name) + path.read_bytes())
    return digest.hexdigest()


def library(source: Path, text: str, mode: str, defines: Iterable[str] = (), epilogue: str = "") -> ctypes.CDLL:
    """Build `text`, that of the file `source` when it was read, in `mode`, or find it built, and load it -> ctypes library.

    `epilogue` is text to compile after it. Raises CompileError, and DeviceError without a compiler or where what it
    builds cannot be loaded.
    """
    command = [*compiler(), *FLAGS[mode], f"-I{source.parent}", f"-I{OPS}", *(f"-D{define}" for define in defines)]
    key = hashlib.sha256(os.fsencode("\0".join([sources_digest(source, text), epilogue, _machine(), *command]))).hexdigest()
    if not cache_folder().is_dir():  # removed since, by who made room, or as a temporary one by the end of a forked child
        cache_folder.cache_clear()
    path = cache_folder() / f"{source.stem}-{mode}-{key[:24]}.so"
    # An emulated block lives in global state: PyDLL keeps the interpreter's lock while it runs.
    load = ctypes.CDLL if mode == "fast" else ctypes.PyDLL
    if not _is_whole(path):
        try:
            _compile(command, source, f"{text}\n{epilogue}", path)
        except OSError as error:
            raise DeviceError(f"{path} cannot be written: {error.strerror}; make room there, or set MINIDL_CACHE to another "
                              "folder") from None
    try:
        return load(str(path))
    except OSError as error:
        raise DeviceError(f"the library that {command[0]} built of {source.name} cannot be loaded: {error}; see that it "
                          "builds for this machine, or set MINIDL_CACHE to a folder whose programs may run") from None


def _is_whole(path: Path) -> bool:
    """Whether a library is there and ends with the digest of its content. Loading half of one can kill the process."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return content[-_DIGEST_BYTES:] == hashlib.sha256(content[:-_DIGEST_BYTES]).digest()


def _compile(command: list[str], source: Path, text: str, path: Path) -> None:
    """source: where the text is from, for the compiler's errors."""
    _sweep(path.parent)
    # Each process its own, renamed when whole.
    fd, temporary = tempfile.mkstemp(prefix=_UNFINISHED, suffix=".so", dir=path.parent)
    os.close(fd)
    built, unit = Path(temporary), Path(temporary).with_suffix(".cpp")
    try:
        place = json.dumps(str(source), ensure_ascii=False)  # a text of JSON is one of C++
        unit.write_text(f"#line 1 {place}\n{text}", encoding="utf-8", errors="surrogateescape")
        result = run([*command, str(unit), "-o", temporary])
        if result.returncode:
            first = _first_error(result.stderr) or f"code {result.returncode}"
            raise CompileError(first if source.name in first else f"{source.name}: {command[0]}: {first}")
        content = built.read_bytes()
        built.write_bytes(content + hashlib.sha256(content).digest())  # loaders ignore what follows a library
        built.chmod(0o755)
        built.replace(path)
    finally:
        for file in (built, unit):
            file.unlink(missing_ok=True)


def _first_error(output: str) -> str:
    """The line of a compiler that says what is wrong, or none. GCC and clang end with one that only says that the linker,
    above, has said so."""
    lines = [line for line in output.splitlines() if not re.match(r"collect2: |clang.*: linker command failed", line)]
    return next((line for line in lines if "error:" in line), lines[-1] if lines else "")


def _sweep(folder: Path) -> None:
    """Remove what compilations that were killed have left. Those that still run are younger."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
        except OSError:  # another process was faster, or may and we may not
            continue
