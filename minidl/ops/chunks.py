"""Parts of a convolution that are computed one after another, so that what is unfolded for one stays in the cache."""

from minidl.device import Array, array_module, workers

# Bytes that one part unfolds (on the CPU, for each core), per array module. A whole layer's would need gigabytes; a part
# that stays in the cache is also the fastest. cupy's is a guess: the second cache of an A100 or H100 has 40 to 50 MB.
WORKSPACE_BYTES = {"numpy": 6 << 20, "cupy": 32 << 20}


def split(units: int, unit_bytes: int, like: Array, fewest: int = 1) -> list[tuple[int, int]]:
    """0 .. units-1 in ranges (begin, end) of nearly equal size that fit the workspace beside `like`.

    unit_bytes: what a unit unfolds. fewest: units that a range has even if they do not fit.
    """
    count = -(-units // max(fewest, fitting(unit_bytes, like)))
    bounds = [units * i // count for i in range(count + 1)]
    return list(zip(bounds, bounds[1:]))


def fitting(unit_bytes: int, like: Array) -> int:
    """How many units fit the workspace beside `like`."""
    return WORKSPACE_BYTES[array_module(like).__name__] * workers(like) // unit_bytes
