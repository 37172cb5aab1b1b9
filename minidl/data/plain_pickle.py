"""Pickles as data: what a pickle of plain containers and NumPy arrays describes, with none of it carried out.

`pickle.Unpickler` with a strict `find_class` imports nothing, and still a hostile file brings it down. Measured on
CPython 3.11: 9 bytes that put an object at memo index 2**26 fill 1 GB; 3 MB of tuples nested in each other, used as a
dictionary key, overflow the C stack; 69 bytes of tuples that repeat each other take 10 s to hash. Hence this
interpreter. It knows the opcodes that the CIFAR files consist of, imports nothing, calls nothing, hashes nothing but
text and small integers, and takes at most some hundred bytes per opcode beside the text that it returns.
"""

import io
import pickletools
from typing import Any, Literal

import numpy as np

from minidl.device import Array

ARRAY = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")  # NumPy 1 and NumPy 2
DTYPE = "numpy dtype"
PLAIN_GLOBALS = frozenset({*ARRAY, DTYPE, "numpy ndarray"})
MOST_OPCODES = 1_000_000  # the largest official file has 200,362 of them


def describe(raw: bytes) -> Any:
    """The object that the pickle `raw` (bytes) describes, of dict, list, tuple, str, int, bool and None.

    A global is its name, "module attribute". A call is the pair (name, arguments), and an object whose state is set
    afterwards is the pair ((name, arguments), state). Byte strings of Python 2 come as str, one character per byte.

    Raises ValueError where the pickle is malformed, names a global outside PLAIN_GLOBALS, uses an opcode that no CIFAR
    file has, or has more than MOST_OPCODES of them.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def items_since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(io.BytesIO(raw)), start=1):
            if count > MOST_OPCODES:
                raise ValueError(f"more than {MOST_OPCODES:,} pickle opcodes")
            match opcode.name:
                case "BININT" | "BININT1" | "BININT2" | "SHORT_BINSTRING" | "BINSTRING":
                    stack.append(argument)
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "NONE":
                    stack.append(None)
                case "NEWFALSE" | "NEWTRUE":
                    stack.append(opcode.name == "NEWTRUE")
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "MARK":
                    marks.append(len(stack))
                case "APPENDS":
                    items = items_since_mark()
                    stack[-1].extend(items)
                case "SETITEMS":
                    items = items_since_mark()
                    if not all(isinstance(key, str) for key in items[::2]):
                        raise ValueError(f"a dictionary key at byte {position} is not text")
                    stack[-1].update(zip(items[::2], items[1::2], strict=True))
                case "TUPLE":
                    stack.append(tuple(items_since_mark()))
                case "TUPLE1":
                    stack.append((stack.pop(),))
                case "TUPLE2" | "REDUCE" | "BUILD":  # a call and a state stay what the stack holds: a pair
                    second, first = stack.pop(), stack.pop()
                    stack.append((first, second))
                case "TUPLE3":
                    third, second, first = stack.pop(), stack.pop(), stack.pop()
                    stack.append((first, second, third))
                case "GLOBAL" | "INST":
                    stack.append(_plain(argument))
                case "PROTO" | "FRAME" | "MEMOIZE":
                    pass
                # No CIFAR file has these two. They are how today's pickles name a global, and the refusal should too.
                case "SHORT_BINUNICODE":
                    stack.append(argument)
                case "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    stack.append(_plain(module + " " + attribute))
                case "STOP":
                    return stack.pop()
                case name:
                    raise ValueError(f"pickle opcode {name} at byte {position} has no place in plain data")
    except (LookupError, TypeError, AttributeError) as error:  # an empty stack, a memo or a container that is not there
        raise ValueError(f"malformed pickle at byte {position}") from error


def _plain(name: Any) -> str:
    """`name`, where it is one of PLAIN_GLOBALS."""
    if name not in PLAIN_GLOBALS:
        raise ValueError(f"refused: the pickle calls for {ascii(name.replace(' ', '.')[:80])}, which is not plain data")
    return name


def uint8_array(description: Any, shape: tuple[int, ...]) -> Array:
    """The uint8 array of `shape` that `description`, an object from `describe`, stands for; else ValueError."""
    match description:
        case ((array, _), (1, described_shape, ((dtype, ("u1", *_)), _), by_columns, str(text))):
            if array in ARRAY and dtype == DTYPE and described_shape == shape:
                order: Literal["F", "C"] = "F" if by_columns else "C"
                return np.frombuffer(text.encode("latin-1"), np.uint8).reshape(shape, order=order)
    raise ValueError(f"the pickle does not hold a uint8 array {shape}")
