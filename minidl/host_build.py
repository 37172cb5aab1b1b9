"""Builds of the kernels for the CPU: the host compiler, its flags, and a cache of libraries shared by processes."""

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from minidl.errors import DeviceError

OPS = Path(__file__).parent / "ops"

# No -ffast-math: it breaks NaN and infinity, and a library built with it switches the whole process to
# flush-to-zero. Products and sums may be contracted to one rounding, as they are on a GPU.
_COMMON = ["-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-ffp-contract=fast"]
FLAGS = {
    "fast": [*_COMMON, "-O3", "-march=native", "-fopenmp-simd", "-DMINIDL_FAST"],
    "emulate": [*_COMMON, "-O1"],
    "sanitize": [*_COMMON, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
_DIGEST_BYTES = hashlib.sha256().digest_size


class CompileError(Exception):
    """A kernel source that a compiler refuses. The text holds file, line and the compiler's first error."""


@functools.cache
def compiler() -> list[str]:
    """The command of the host compiler, as a list: $CXX, g++, clang++, or zig's from the package `ziglang`.

    Raises DeviceError where there is none.
    """
    command = shlex.split(os.environ.get("CXX", ""))
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
    version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout
    cpu = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        pass
    return version + platform.machine() + cpu


@functools.cache
def cache_folder() -> Path:
    """A folder for built libraries that can be written: $MINIDL_CACHE, the user's cache, or a temporary one."""
    folder: Path | str
    candidates = [os.environ.get("MINIDL_CACHE")]
    if os.environ.get("XDG_CACHE_HOME"):
        candidates.append(os.path.join(os.environ["XDG_CACHE_HOME"], "minidl"))
    if os.environ.get("HOME"):
        candidates.append(os.path.join(os.environ["HOME"], ".cache", "minidl"))
    for candidate in filter(None, candidates):
        try:
            folder = Path(candidate) / "kernels"
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    # Private to this process: a predictable name in a folder that all users write could be planted.
    folder = tempfile.mkdtemp(prefix="minidl-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def sources_digest(source: Path) -> str:
    """A digest of a kernel file (Path) and of all headers it may include."""
    digest = hashlib.sha256()
    for path in [source, *sorted(OPS.glob("*.cuh")), *sorted(OPS.glob("*.h"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def library(source: Path, mode: str, defines: Iterable[str] = (), epilogue: str = "") -> ctypes.CDLL:
    """Build the file `source` (Path) in `mode`, or find it built, and load it -> ctypes library.

    `epilogue` is text to compile after it. Raises CompileError, and DeviceError without a compiler or where what it
    builds cannot be loaded.
    """
    command = [*compiler(), *FLAGS[mode], f"-I{OPS}", *(f"-D{define}" for define in defines)]
    key = hashlib.sha256("\0".join([sources_digest(source), epilogue, _machine(), *command]).encode()).hexdigest()
    path = cache_folder() / f"{source.stem}-{mode}-{key[:24]}.so"
    # An emulated block lives in global state: PyDLL keeps the interpreter's lock while it runs.
    load = ctypes.CDLL if mode == "fast" else ctypes.PyDLL
    if not _is_whole(path):
        _compile(command, source, epilogue, path)
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


def _compile(command: list[str], source: Path, epilogue: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="minidl-") as folder:
        unit = Path(folder) / f"{source.stem}.cpp"
        unit.write_text(f'#include "{source}"\n{epilogue}')
        fd, built = tempfile.mkstemp(suffix=".so", dir=path.parent)  # each process its own, renamed when whole
        os.close(fd)
        try:
            # zig keeps its C++ library, built at the first call, in a cache of its own: where ours is, it can write.
            environment = {"ZIG_GLOBAL_CACHE_DIR": str(path.parent / "zig"), **os.environ}
            result = subprocess.run([*command, str(unit), "-o", built], capture_output=True, text=True, env=environment)
            if result.returncode:
                errors = [line for line in result.stderr.splitlines() if "error:" in line] or [result.stderr.strip()]
                raise CompileError(errors[0])
            content = Path(built).read_bytes()
            Path(built).write_bytes(content + hashlib.sha256(content).digest())  # loaders ignore what follows a library
            os.chmod(built, 0o755)
            os.replace(built, path)
        finally:
            Path(built).unlink(missing_ok=True)
