"""Parts of a convolution that are computed one after another, so that what is unfolded for one stays in the cache."""

from minidl.device import Array, array_module, workers

# Bytes that one part unfolds (on the CPU, on each core), per array module. A whole layer's would need gigabytes; a part
# that stays in the cache is also the fastest.
WORKSPACE_BYTES = {"numpy": 4 << 20, "cupy": 128 << 20}


def split(units: int, fitting: int, parts: int = 1) -> list[tuple[int, int]]:
    """0 .. units-1 in ranges (begin, end) of nearly equal size, `fitting` at most; where possible, a multiple of `parts`."""
    count = -(-units // fitting)
    count = min(units, -(-count // parts) * parts)
    bounds = [units * i // count for i in range(count + 1)]
    return list(zip(bounds, bounds[1:]))


def tasks(units: int, unit_bytes: int, like: Array, fewest: int = 1, most: int = 1 << 31) -> list[list[tuple[int, int]]]:
    """The ranges of units that fit the workspace beside `like`, dealt out to at most `workers` tasks.

    unit_bytes: what a unit unfolds. fewest: units that a range has even if they do not fit; most: even if more would fit.
    """
    parts = workers(like)
    fitting = min(most, max(fewest, WORKSPACE_BYTES[array_module(like).__name__] // unit_bytes))
    ranges = split(units, fitting, parts)
    return [ranges[begin:end] for begin, end in split(len(ranges), -(-len(ranges) // parts))]
