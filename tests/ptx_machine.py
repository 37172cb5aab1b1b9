"""What NVRTC makes of a kernel, run without a GPU: an interpreter of PTX, all threads of a launch at a time, by NumPy.

It knows the instructions that occur in minidl's kernels, from the PTX ISA, and refuses others. Threads that diverge go on one
group after the other, the one furthest behind first. Addresses are the host's: what is read or written must lie in an array of
the launch, aligned as a GPU needs it. Where a GPU is free to choose, the latest comes true: asynchronous copies arrive when
they are waited for. What it cannot show is the time, and a race between warps or a barrier that not all of a block come to, for
which there is the emulator.
"""

import functools
import re
from typing import NamedTuple

import numpy as np

import nvrtc
from minidl.host_build import OPS
from minidl.kernels import Kernel, KernelFault, gpu_options, launch_mode

WARP = 32
THREADS_AT_A_TIME = 1 << 15  # of a launch: whole blocks, as they have no common barrier
SHARED_WINDOW = 1 << 60      # where the shared memory of a block begins among generic addresses
DTYPES = {"pred": "?", "u8": "u1", "s8": "i1", "b8": "u1", "u16": "u2", "s16": "i2", "b16": "u2", "f16": "u2", "bf16": "u2",
          "u32": "u4", "s32": "i4", "b32": "u4", "tf32": "u4", "u64": "u8", "s64": "i8", "b64": "u8", "f32": "f4", "f64": "f8"}
DTYPES = {name: np.dtype(code) for name, code in DTYPES.items()}


# ---- the text ----------------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    predicate: str | None  # the register that decides which threads take it
    negated: bool
    name: str              # "add"
    of: list[str]          # what follows it: ["rn", "f32"]
    operands: list[str]


class Function(NamedTuple):
    parameters: list[str]
    results: list[str]
    registers: dict[str, np.dtype]  # by their declaration: %r<58> is "%r"
    shared: dict[str, int]          # addresses of its arrays
    instructions: list[Instruction]
    labels: dict[str, int]
    leaders: set[int]               # where threads may come from elsewhere


def operands_of(text):
    """"{%r1, %r2}, [%rd3+4], 5" -> ["{%r1, %r2}", "[%rd3+4]", "5"]."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\([^)]*\)|\[[^\]]*\]|[^,{(\[])+", text) if part.strip()]


def words_of(operand):
    """"{_, %r1}" -> ["_", "%r1"]; "%r1" -> ["%r1"]."""
    return [word for word in re.split(r"[][{}, ]+", operand) if word]


def place_shared(text, places):
    """Give the declared variables of shared memory their addresses, one behind the other."""
    for align, kind, name, count in re.findall(r"\.shared \.align (\d+) \.(\w+) ([\w$]+)(?:\[(\d+)\])?;", text):
        begin = -(-places.get("", 0) // int(align)) * int(align)
        places[name], places[""] = begin, begin + int(count or 1) * DTYPES[kind].itemsize


def parse(ptx):
    """The text of a module -> {name: Function}."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    bodies = re.findall(r"\.(?:entry|func)\s+(?:\(([^)]*)\)\s*)?(\w+)\s*\(([^)]*)\)[^;{]*\n\{\n(.*?)\n\}\n", ptx, re.DOTALL)
    outside = {}
    place_shared(re.sub(r"\n\{\n.*?\n\}\n", "", ptx, flags=re.DOTALL), outside)
    return {name: parse_function(results, parameters, body, dict(outside)) for results, name, parameters, body in bodies}


def parse_function(results, parameters, body, shared):
    place_shared(body, shared)
    registers, instructions, labels = {}, [], {}
    for statement in body.split(";"):
        statement = re.sub(r"^[\s{}]+", "", statement)
        while label := re.match(r"(\$\w+):[\s{}]*", statement):
            labels[label[1]] = len(instructions)
            statement = statement[label.end():]
        if declared := re.match(r"\.reg \.(\w+)\s+(.*)", statement):
            registers |= {re.sub(r"<\d+>", "", name): DTYPES[declared[1]] for name in declared[2].split(", ")}
        elif statement and not statement.startswith("."):
            predicate, name, rest = re.fullmatch(r"(?:@(!?%p\d+)\s+)?([\w.]+)\s*(.*)", statement, re.DOTALL).groups()
            name, *of = name.split(".")
            instructions.append(Instruction(predicate and predicate.lstrip("!"), bool(predicate) and predicate[0] == "!", name, of,
                                            operands_of(rest)))
    ends = {number + 1 for number, it in enumerate(instructions) if it.name in ("bra", "ret", "bar")}
    names = [re.findall(r"\.param [^,]*?(\w+)(?:,|$)", text.strip()) for text in (parameters, results)]
    return Function(*names, registers, shared, instructions, labels, ends | set(labels.values()))


@functools.cache
def functions(source, precision, arch):
    """Of a file of kernels, compiled."""
    program = (nvrtc.program_of(source.name, precision, arch) if source.parent == OPS
               else nvrtc.compile_to_cubin(source, gpu_options(precision), arch))
    return parse(program.ptx)


# ---- memory ------------------------------------------------------------------------------------------------------------


def address_of(array):
    return array.__array_interface__["data"][0]


class Memory:
    """The arrays of a launch, at the addresses where they are. One may come twice, but none lies within another."""

    def __init__(self, arrays):
        arrays = sorted({address_of(array): array for array in arrays if array.size}.items(), key=lambda item: item[0])
        self.begins = np.array([begin for begin, _ in arrays])
        self.bytes = [array.view(np.uint8).reshape(-1) for _, array in arrays]

    def parts(self, addresses, dtype):
        """-> for each array that they point into: (which of them do, its elements of that type, at which places)."""
        first, last = np.searchsorted(self.begins, (addresses.min(), addresses.max()), "right") - 1
        owners = None if first == last else np.searchsorted(self.begins, addresses, "right") - 1
        for owner in [first] if first == last else np.unique(owners):
            which = slice(None) if first == last else np.flatnonzero(owners == owner)
            if owner < 0:
                raise KernelFault("an address in front of all arrays")
            begin, stored = int(self.begins[owner]), self.bytes[owner]
            past = -begin % dtype.itemsize  # the first address of that alignment
            offsets = addresses[which] - begin
            if offsets.max() + dtype.itemsize > len(stored):
                raise KernelFault(f"{int(offsets.max())} bytes behind the beginning of an array of {len(stored)}")
            count = (len(stored) - past) // dtype.itemsize
            yield which, stored[past:past + count * dtype.itemsize].view(dtype), (offsets - past) // dtype.itemsize

    def load(self, addresses, dtype):
        values = np.empty(len(addresses), dtype)
        for which, stored, places in self.parts(addresses, dtype):
            values[which] = stored[places]
        return values

    def store(self, addresses, values):
        for which, stored, places in self.parts(addresses, values.dtype):
            if not stored.flags.writeable:
                raise KernelFault("writes an array that is read only")
            stored[places] = values[which]


class Shared:
    """The shared memory of all blocks. What nobody wrote is NaN."""

    def __init__(self, blocks, size, block_of_thread):
        self.size, self.bytes = size, np.full(blocks * size, 0xFF, np.uint8)
        self.begins = block_of_thread * size

    def places(self, threads, addresses, dtype):
        if (addresses + dtype.itemsize > self.size).any():
            raise KernelFault(f"byte {int(addresses.max())} of {self.size} of shared memory")
        return (self.begins[threads] + addresses) // dtype.itemsize

    def load(self, threads, addresses, dtype):
        return self.bytes.view(dtype)[self.places(threads, addresses, dtype)]

    def store(self, threads, addresses, values):
        self.bytes.view(values.dtype)[self.places(threads, addresses, values.dtype)] = values


class Copy(NamedTuple):
    """Of 16 bytes each, by several threads, not yet arrived: arrived[i] says otherwise."""

    threads: np.ndarray
    groups: np.ndarray
    targets: np.ndarray
    sources: np.ndarray
    sizes: np.ndarray
    arrived: np.ndarray


# ---- a launch ----------------------------------------------------------------------------------------------------------


class Frame:
    """A function that is being run: the registers of all threads."""

    def __init__(self, function, parameters, count):
        self.function, self.parameters, self.count, self.registers = function, parameters, count, {}
        self.mask, self.of_all = None, False  # the threads that take the current instruction, and whether these are all

    def register(self, name):
        if name not in self.registers:
            dtype = self.function.registers[name if name in self.function.registers else name.rstrip("0123456789")]
            self.registers[name] = np.zeros(self.count, dtype)
        return self.registers[name]

    def set(self, name, values):
        """Wider registers than the values are filled up with their sign, or zeros."""
        if name == "_":
            return
        before = self.register(name)
        if values.dtype.itemsize != before.dtype.itemsize:
            values = values.astype(f"{'i' if values.dtype.kind == 'i' else 'u'}{before.dtype.itemsize}")
        values = values.view(before.dtype) if values.ndim else np.full(self.count, values.view(before.dtype))
        self.registers[name] = values if self.of_all else np.where(self.mask, values, before)

    def set_of_those(self, name, values):
        """The values of the threads that take part alone."""
        if not self.of_all:
            values, of_those = np.zeros(self.count, values.dtype), values
            values[self.mask] = of_those
        self.set(name, values)

    def taking_part(self, values):
        """Of values of all threads, or of one for all, those of the threads that take part."""
        return values if self.of_all and values.ndim else np.broadcast_to(values, self.count)[self.mask]


@functools.cache
def literal(text, dtype):
    """A number of the text, as an array of no dimensions."""
    if text.startswith(("0f", "0d")):
        return np.array(int(text[2:], 16), f"u{dtype.itemsize}").view(dtype)
    return np.array(int(text) != 0) if dtype.kind == "b" else np.array(int(text) % (1 << 8 * dtype.itemsize),
                                                                       f"u{dtype.itemsize}").view(dtype)


class Launch:
    """Some blocks of a launch."""

    def __init__(self, module, memory, grid, threads, blocks):
        self.module, self.memory, self.count = module, memory, len(blocks) * threads
        self.block = np.repeat(np.arange(len(blocks)), threads)  # of a thread, among these
        of_thread = np.asarray(blocks)[self.block]
        self.special = {"%tid.x": np.tile(np.arange(threads), len(blocks)), "%ntid.x": threads, "%nctaid.x": grid[0],
                        "%nctaid.y": grid[1], "%ctaid.x": of_thread % grid[0], "%ctaid.y": of_thread // grid[0]}
        self.special = {name: np.asarray(value, np.uint32) for name, value in self.special.items()}
        self.group, self.copies = np.zeros(self.count, int), []

    def start(self, name, parameters):
        self.shared = Shared(self.block[-1] + 1, -(-self.module[name].shared.get("", 0) // 16) * 16, self.block)
        with np.errstate(all="ignore"):
            self.run(self.module[name], parameters, np.ones(self.count, bool))

    def run(self, function, parameters, mask):
        """-> the Frame at the end. Threads outside of `mask` do not take part."""
        frame = Frame(function, parameters, self.count)
        at, waiting = np.where(mask, 0, len(function.instructions)), np.zeros(self.count, bool)
        while True:
            running = (at < len(function.instructions)) & ~waiting
            if not running.any():
                if not waiting.any():
                    return frame
                waiting[:] = False  # all that are left of each block have come to a barrier
                continue
            number = at[running].min()
            together = running & (at == number)
            of_all, alone = together.all(), np.array_equal(together, running)  # alone: nobody to wait for, or to be met
            while True:
                it, frame.mask, frame.of_all, any_of_them = function.instructions[number], together, of_all, True
                if it.predicate:
                    frame.mask = together & (frame.register(it.predicate) != it.negated)
                    frame.of_all, any_of_them = of_all and frame.mask.all(), frame.mask.any()
                number += 1
                if it.name in ("bra", "ret"):
                    target = function.labels[it.operands[0]] if it.name == "bra" else len(function.instructions)
                    if alone and it.name == "bra" and (not any_of_them or np.array_equal(frame.mask, together)):
                        number = target if any_of_them else number  # all are still together, wherever that is
                        continue
                    at[together] = number
                    at[frame.mask] = target
                    break
                if it.name == "bar":
                    waiting[frame.mask] = True
                    at[together] = number
                    break
                if any_of_them:
                    (getattr(self, f"do_{it.name}", None) or functools.partial(self.do_elementwise, it.name))(
                        frame, it.of, it.operands)
                if number in function.leaders and not alone:
                    at[together] = number
                    break

    # ---- operands ----

    def value(self, frame, operand, dtype):
        """An operand as elements of that type, of which registers may hold more."""
        values = frame.registers.get(operand)
        if values is None:
            if operand in self.special:
                return self.special[operand].view(dtype)
            if operand in frame.function.shared:
                return np.array(frame.function.shared[operand], dtype)
            if operand[0] in "-0123456789":
                return literal(operand, dtype)
            values = frame.register(operand)
        if values.dtype.itemsize > dtype.itemsize:
            values = values.astype(f"u{dtype.itemsize}")
        return values.view(dtype)

    def values(self, frame, of, operands):
        dtype, ftz = DTYPES[of[-1]], "ftz" in of
        return [flushed(self.value(frame, operand, dtype), ftz) for operand in operands]

    def addresses(self, frame, operand):
        """"[%rd1+8]" -> the addresses of the threads that take part."""
        name, _, offset = operand[1:-1].partition("+")
        dtype = DTYPES["u32"] if name in frame.function.shared else frame.register(name).dtype
        return frame.taking_part(self.value(frame, name, dtype)).astype(np.int64) + int(offset or 0)

    # ---- memory ----

    def do_ld(self, frame, of, operands):
        target, source = operands
        dtype = DTYPES[of[-1]]
        if of[0] == "param":
            frame.set(target, frame.parameters[re.match(r"\w+", source[1:])[0]].view(dtype))
            return
        targets = words_of(target)
        addresses = self.aligned(self.addresses(frame, source), len(targets) * dtype.itemsize)
        for k, name in enumerate(targets):
            at = addresses + k * dtype.itemsize
            frame.set_of_those(name, self.memory.load(at, dtype) if of[0] == "global"
                               else self.shared.load(np.flatnonzero(frame.mask), at, dtype))

    def do_st(self, frame, of, operands):
        target, source = operands
        dtype = DTYPES[of[-1]]
        if of[0] == "param":
            frame.parameters[re.match(r"\w+", target[1:])[0]] = self.value(frame, source, dtype)
            return
        sources = words_of(source)
        addresses = self.aligned(self.addresses(frame, target), len(sources) * dtype.itemsize)
        for k, name in enumerate(sources):
            at, values = addresses + k * dtype.itemsize, frame.taking_part(self.value(frame, name, dtype))
            if of[0] == "global":
                self.memory.store(at, values)
            else:
                self.shared.store(np.flatnonzero(frame.mask), at, values)

    @staticmethod
    def aligned(addresses, size):
        if (addresses % size).any():
            raise KernelFault(f"{size} bytes at an address that is not a multiple of that")
        return addresses

    def do_cvta(self, frame, of, operands):
        base = SHARED_WINDOW if of[0] == "shared" else 0
        frame.set(operands[0], self.value(frame, operands[1], DTYPES["u64"]) + np.uint64(base))

    def do_cp(self, frame, of, operands):
        if of[1] == "commit_group":
            self.group[frame.mask] += 1
        elif of[1] == "wait_group":
            for copy in self.copies:
                arrive = (~copy.arrived & frame.mask[copy.threads]
                          & (copy.groups < self.group[copy.threads] - int(operands[0])))
                self.finish(copy, arrive)
            self.copies = [copy for copy in self.copies if not copy.arrived.all()]
        else:
            threads = np.flatnonzero(frame.mask)
            sizes = frame.taking_part(self.value(frame, operands[3], DTYPES["u32"]))
            targets, sources = (self.aligned(self.addresses(frame, operand), 16) for operand in operands[:2])
            assert operands[2] == "16" and np.isin(sizes, (0, 16)).all()
            self.shared.store(threads, targets, np.full(len(threads), 0xFF, np.uint8))  # nobody may read it by now
            self.copies.append(Copy(threads, self.group[threads], targets, sources, sizes, np.zeros(len(threads), bool)))

    def finish(self, copy, arrive):
        read = arrive & (copy.sizes > 0)
        for at in range(0, 16, 4):
            values = np.zeros(len(copy.threads), np.uint32)
            if read.any():
                values[read] = self.memory.load(copy.sources[read] + at, values.dtype)
            self.shared.store(copy.threads[arrive], copy.targets[arrive] + at, values[arrive])
        copy.arrived[arrive] = True

    # ---- arithmetic ----

    def do_elementwise(self, name, frame, of, operands):
        if name not in FUNCTIONS:
            raise NotImplementedError(f"the instruction {name}")
        call = fused_down if "rm" in of else FUNCTIONS[name]
        frame.set(operands[0], flushed(call(*self.values(frame, of, operands[1:])), "ftz" in of))

    def do_mov(self, frame, of, operands):
        target, source = operands
        dtype = DTYPES[of[-1]]
        half = np.dtype(f"u{dtype.itemsize // 2}") if dtype.itemsize > 1 else None
        if target.startswith("{"):
            values = np.broadcast_to(self.value(frame, source, dtype), self.count)
            halves = np.ascontiguousarray(values).view(half).reshape(-1, 2)
            for name, part in zip(words_of(target), halves.T):
                frame.set(name, part)
        elif source.startswith("{"):
            halves = [np.broadcast_to(self.value(frame, part, half), self.count) for part in words_of(source)]
            frame.set(target, np.stack(halves, axis=1).reshape(-1).view(dtype))
        else:
            frame.set(target, self.value(frame, source, dtype))

    def do_selp(self, frame, of, operands):
        a, b = self.values(frame, of, operands[1:3])
        frame.set(operands[0], np.where(self.value(frame, operands[3], DTYPES["pred"]), a, b))

    def do_setp(self, frame, of, operands):
        frame.set(operands[0], COMPARISONS[of[0]](*self.values(frame, of, operands[1:])))

    def do_cvt(self, frame, of, operands):
        into, source = of[-2:]
        values = flushed(self.value(frame, operands[1], DTYPES[source]), "ftz" in of and source == "f32")
        if source == "f16":
            values = values.view(np.float16).astype(np.float32)
        elif source == "bf16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        for name, rounded in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
            values = rounded(values) if name in of else values
        values = np.clip(values, 0, 1) if "sat" in of else values
        if into in NARROWED:
            values = NARROWED[into](values)
        elif values.dtype.kind == "f" and DTYPES[into].kind in "iu":
            limits = np.iinfo(DTYPES[into])
            values = np.nan_to_num(np.clip(values.astype(np.float64), limits.min, limits.max)).astype(DTYPES[into])
        else:
            values = flushed(values.astype(DTYPES[into]), "ftz" in of and into == "f32")
        frame.set(operands[0], values)

    def do_mul(self, frame, of, operands):
        a, b = self.values(frame, of, operands[1:])
        frame.set(operands[0], product(a, b, of))

    def do_mad(self, frame, of, operands):
        a, b = self.values(frame, of, operands[1:3])
        result = product(a, b, of)
        frame.set(operands[0], result + self.value(frame, operands[3], result.dtype))

    def do_shl(self, frame, of, operands, shift=np.left_shift):
        a, count = self.value(frame, operands[1], DTYPES[of[-1]]), self.value(frame, operands[2], DTYPES["u32"])
        bits = 8 * a.dtype.itemsize
        all_out = a.dtype.type(0) if shift is np.left_shift or a.dtype.kind == "u" else a >> a.dtype.type(bits - 1)
        frame.set(operands[0], np.where(count < bits, shift(a, np.minimum(count, bits - 1).astype(a.dtype)), all_out))

    def do_shr(self, frame, of, operands):
        self.do_shl(frame, of, operands, np.right_shift)

    def do_bfi(self, frame, of, operands):
        a, b = self.values(frame, of, operands[1:3])
        begin, count = map(int, operands[3:])
        bits = a.dtype.type(((1 << count) - 1) << begin)
        frame.set(operands[0], (b & ~bits) | (a << a.dtype.type(begin) & bits))

    def do_call(self, frame, of, operands):
        """Of a function of numbers."""
        results, name, arguments = operands
        callee = self.module[name]
        given = dict(zip(callee.parameters, (frame.parameters[word] for word in re.findall(r"\w+", arguments))))
        self.run(callee, given, frame.mask)
        for word, result in zip(re.findall(r"\w+", results), callee.results):
            frame.parameters[word] = given[result]

    def do_trap(self, frame, of, operands):
        raise KernelFault("trap")

    # ---- warps ----

    def by_warps(self, frame, operand, dtype):
        """The registers of an operand -> (warps, lanes, registers). Warps take part as wholes."""
        mask = frame.mask.reshape(-1, WARP)
        if (mask.any(axis=1) != mask.all(axis=1)).any():
            raise KernelFault("divergent operation of a warp")
        values = [np.broadcast_to(self.value(frame, name, dtype), self.count) for name in words_of(operand)]
        return np.stack(values, axis=1).reshape(-1, WARP, len(values))

    def do_ldmatrix(self, frame, of, operands):
        rows = self.by_warps(frame, operands[1], DTYPES["u32"]).reshape(-1, 4, 8)  # of each matrix, their addresses
        warps = np.flatnonzero(frame.mask[::WARP])
        at = rows[warps][..., None] + np.arange(0, 16, 2, dtype=np.uint32)
        threads = np.broadcast_to(warps[:, None, None, None] * WARP, at.shape)
        self.aligned(rows[warps], 16)
        matrices = self.shared.load(threads.ravel(), at.ravel(), DTYPES["u16"]).reshape(-1, 4, 8, 8)
        if "trans" in of:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, 4, WARP)  # word t of row g is lane 4 g + t
        for k, name in enumerate(words_of(operands[0])):
            values = np.zeros((self.count // WARP, WARP), np.uint32)
            values[warps] = words[:, k]
            frame.set(name, values.ravel())

    def do_mma(self, frame, of, operands):
        """With g = lane / 4 and t = lane % 4, registers hold word t of row g, of row g + 8 and of the second half of both."""
        left, right = (self.by_warps(frame, operand, DTYPES["u32"]) for operand in operands[1:3])
        sums = self.by_warps(frame, operands[3], DTYPES["f32"]).astype(np.float64)
        left, right = (factors(words, of[-2]) for words in (left, right))  # (warps, lanes, words, elements of a word)
        warps, _, _, elements = left.shape
        # g, t, half of the depth, half of the rows, element of a word -> rows (half, g) x depth (half, t, element)
        left = left.reshape(warps, 8, 4, 2, 2, elements).transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, -1)
        right = right.reshape(warps, 8, 4, 2, elements).transpose(0, 3, 2, 4, 1).reshape(warps, -1, 8)
        sums += (left @ right).reshape(warps, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(warps, WARP, 4)
        for k, name in enumerate(words_of(operands[0])):
            frame.set(name, sums[..., k].ravel().astype(np.float32))


def factors(words, kind):
    """Words of a fragment -> their elements, as tensor cores read them, in float64."""
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)[..., None]
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)
    return (halves.view(np.float16) if kind == "f16" else (halves.astype(np.uint32) << 16).view(np.float32)).astype(np.float64)


def flushed(values, ftz):
    """Subnormals to zeros of their sign."""
    if not ftz or values.dtype != np.float32:
        return values
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def product(a, b, of):
    if "wide" in of or "hi" in of:
        kind, size = a.dtype.kind, a.dtype.itemsize
        wide = a.astype(f"{kind}{2 * size}") * b.astype(f"{kind}{2 * size}")
        return wide if "wide" in of else (wide >> wide.dtype.type(8 * size)).astype(a.dtype)
    return flushed(a * b, "ftz" in of)


def to_bfloat16(values):
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded >> np.uint32(16)).astype(np.uint16)


def to_tf32(values):
    bits = values.view(np.uint32)
    return np.where(np.isfinite(values), bits + np.uint32(0x1000) & np.uint32(0xFFFFE000), bits)


def divided(a, b):
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a) // np.where(b == 0, 1, np.abs(b))  # towards zero, as C divides
    return (np.where((a < 0) != (b < 0), -quotient, quotient) if a.dtype.kind == "i" else quotient).astype(a.dtype)


def fused(a, b, c):
    """With more digits than the result has: in float64 its last digit may be off, now and then."""
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def permuted(a, b, selector):
    """prmt: each byte of the result is the byte of (a, b) that four bits of the selector name."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(both)
    for i in range(4):
        chosen = selector.astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
        assert (chosen < 8).all(), "none of our kernels repeats a sign"
        result |= (both >> chosen * np.uint64(8) & np.uint64(255)) << np.uint64(8 * i)
    return result.astype(np.uint32)


def fused_down(a, b, c):
    """Rounded towards minus infinity."""
    exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    result = exact.astype(a.dtype)
    return np.where(result.astype(np.float64) > exact, np.nextafter(result, a.dtype.type(-np.inf)), result)


NARROWED = {"f16": lambda values: values.astype(np.float16).view(np.uint16), "bf16": to_bfloat16, "tf32": to_tf32}
COMPARISONS = {"eq": np.equal, "ne": lambda a, b: (a != b) & (a == a) & (b == b), "lt": np.less, "le": np.less_equal,
               "gt": np.greater, "ge": np.greater_equal, "num": lambda a, b: (a == a) & (b == b),
               "nan": lambda a, b: (a != a) | (b != b), "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal,
               "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
               "geu": lambda a, b: ~(a < b)}
FUNCTIONS = {"add": np.add, "sub": np.subtract, "div": divided, "rem": lambda a, b: a - divided(a, b) * b, "neg": np.negative,
             "abs": np.abs, "min": np.fmin, "max": np.fmax, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
             "not": np.invert, "copysign": lambda a, b: np.copysign(b, a), "sqrt": np.sqrt, "rcp": lambda a: 1 / a, "ex2": np.exp2,
             "fma": fused, "prmt": permuted}


# ---- in the loader's place -------------------------------------------------------------------------------------------------


architecture = None  # for which kernels are compiled
on_host = Kernel._launch_on_host


def launch_in_mode(kernel, precision, grid, threads, values):
    """In place of Kernel._launch_on_host, with one more mode, "ptx"."""
    (launch if launch_mode() == "ptx" else on_host)(kernel, precision, grid, threads, values)


def launch(kernel, precision, grid, threads, values):
    module = functions(kernel.kernels.path, precision, architecture)
    arrays = [value for value in values if isinstance(value, np.ndarray)]
    given = [np.array(address_of(value), np.uint64) if isinstance(value, np.ndarray) else np.array(value) for value in values]
    parameters = dict(zip(module[kernel.name].parameters, given))
    blocks, at_a_time = np.arange(grid[0] * grid[1]), max(1, THREADS_AT_A_TIME // threads)
    memory = Memory(arrays)
    try:
        for first in range(0, len(blocks), at_a_time):
            Launch(module, memory, grid, threads, blocks[first:first + at_a_time]).start(kernel.name, dict(parameters))
    except KernelFault as fault:
        raise KernelFault(f"{kernel.name}: {fault}") from None
