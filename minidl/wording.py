"""What people read: numbers, names, tables and warnings."""

import contextlib
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence

_warns = True


def warn(text: str) -> None:
    """One line on stderr about what is not as it should be, while the work goes on: even if stderr itself, a log on a full disk or
    a terminal that was closed, takes nothing any more."""
    if _warns:
        with contextlib.suppress(OSError):
            print(f"warning: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """A `with` block in which `warn` says nothing, as another process says it."""
    global _warns
    before, _warns = _warns, False
    try:
        yield
    finally:
        _warns = before


def words(name: str) -> str:
    """A class name as people write it: "aquarium_fish" -> "aquarium fish"."""
    return name.replace("_", " ")


def counted(number: int, what: str) -> str:
    """"1 epoch", "2 epochs"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def listed(names: Sequence[str], most: int = 5) -> str:
    """"a, b, c and 4 more"."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def percent(share: str | float) -> str:
    """0.4512 -> "45.12%"."""
    return f"{float(share):.2%}"


def percents(shares: Sequence[float]) -> str:
    """Of several seeds: [0.44, 0.46] -> "45.00% +- 1.41", mean and standard deviation; of one: "44.00%"."""
    deviation = f" +- {100 * statistics.stdev(shares):.2f}" if len(shares) > 1 else ""
    return percent(statistics.mean(shares)) + deviation


def rate_text(lr: float) -> str:
    """0.00125 -> "0.00125", 0.000125 -> "1.25e-4", 1.51e-10 -> "1.5e-10": a learning rate in at most 7 letters."""
    texts = [format(lr, form).replace("e-0", "e-") for form in (".3g", ".2e", ".1e")]
    return next((text for text in texts if len(text) <= 7), texts[-1])


def loss_text(value: float) -> str:
    """4.605, 1235, 2e+09: in at most 6 letters. One above 99 has other worries than decimals."""
    return f"{value:.3f}" if value < 99 else f"{value:.0f}" if value < 999_999 else f"{value:.0e}"


def brief(seconds: float) -> str:
    """"0.4s", "12s", "4m05s", "1h02m"."""
    if seconds < 59.5:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def megabytes(count: int) -> str:
    """A number of bytes -> "12.3 MB", or "-" for none."""
    return f"{count / 1e6:,.1f} MB" if count else "-"


def aligned(rows: Iterable[Sequence[str]], left: int) -> str:
    """Cells in columns, the first `left` of them flush left, the others flush right -> text."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) if i < left else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows)
