"""What a run shows: a bar on stderr while it works, where that is a terminal, and a line per epoch on stdout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from tqdm import tqdm

from minidl.training import Metrics


class Progress:
    """epochs: of the run; validates: there are held-out images; quiet: no bar, and no line either."""

    def __init__(self, epochs: int, validates: bool, quiet: bool = False) -> None:
        self.epochs, self.validates, self.quiet = epochs, validates, quiet
        self._headed = False

    @contextlib.contextmanager
    def bar(self, epoch: int, steps: int, done: int) -> Iterator[Callable[[Metrics | None], None]]:
        """A bar for the steps of an epoch (0, 1, ...), `done` of which are done. Yields what to call after each step."""
        with tqdm(total=steps, initial=done, desc=f"epoch {epoch + 1}/{self.epochs}", unit="step", leave=False,
                  disable=True if self.quiet else None, dynamic_ncols=True) as bar:

            def show(metrics: Metrics | None) -> None:
                if metrics:
                    bar.set_postfix(loss=f"{metrics.loss:.3f}", top1=f"{metrics.top1:.1%}", refresh=False)
                bar.update()

            yield show
            bar.refresh()  # the last step may have come too soon after the one before to be drawn

    def row(self, row: Mapping[str, str]) -> None:
        """The line of an epoch, from its row in metrics.csv. All lines fit into 80 columns."""
        if self.quiet:
            return
        if not self._headed:
            print(self._line("epoch", "lr", "loss", "top-1", "val", "test", "top-1", "top-5", "img/s", "time"))
            self._headed = True
        print(self._line(
            f"{row['epoch']}/{self.epochs}", f"{float(row['lr']):.3g}", f"{float(row['train_loss']):.3f}",
            percent(row["train_top1"]), percent(row.get("val_top1", "0")), f"{float(row['test_loss']):.3f}",
            percent(row["test_top1"]), percent(row["test_top5"]), f"{float(row['images_per_second']):,.0f}",
            brief(float(row["seconds"]))), flush=True)

    def _line(self, epoch: str, lr: str, loss: str, top1: str, val: str, test: str, test_top1: str, top5: str, speed: str,
              time: str) -> str:
        validation = f"  val {val:>7}" if self.validates and val != "val" else f"  {val:>11}" if self.validates else ""
        return (f"{epoch:>7} {lr:>8} {loss:>6} {top1:>7}{validation}  {test:>6} {test_top1:>7} {top5:>7}  {speed:>6} {time:>7}")


def percent(share: str | float) -> str:
    """0.4512 -> "45.12%"."""
    return f"{float(share):.2%}"


def brief(seconds: float) -> str:
    """"0.4s", "12s", "4m05s", "1h02m"."""
    if seconds < 59.5:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"
