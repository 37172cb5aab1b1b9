"""What a run shows: a bar on stderr while it works, where that is a terminal, and a line per epoch on stdout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from tqdm import tqdm

from minidl.training import Metrics
from minidl.wording import brief, loss_text, rate_text, warn


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
                    bar.set_postfix(loss=loss_text(metrics.loss), top1=f"{metrics.top1:.1%}", refresh=False)
                bar.update()

            yield show
            bar.refresh()  # the last step may have come too soon after the one before to be drawn

    def row(self, row: Mapping[str, str]) -> None:
        """The line of an epoch, from its row in metrics.csv; before the first one the heading. Accuracies are per cent."""
        if self.quiet:
            return
        lines = []
        if not self._headed:
            lines.append(self._line("", "", "train", "", "val", "test", "", "", "", ""))
            lines.append(self._line("epoch", "lr", "loss", "top-1", "top-1", "loss", "top-1", "top-5", "img/s", "time"))
            self._headed = True

        def share(column: str) -> str:
            return f"{100 * float(row[column]):.2f}"

        lines.append(self._line(
            f"{row['epoch']}/{self.epochs}", rate_text(float(row["lr"])), loss_text(float(row["train_loss"])), share("train_top1"),
            share("val_top1") if self.validates else "", loss_text(float(row["test_loss"])), share("test_top1"), share("test_top5"),
            f"{float(row['images_per_second']):,.0f}", brief(float(row["seconds"]))))
        try:
            print("\n".join(lines), flush=True)
        except BrokenPipeError:  # whoever read has left, and may mean the run
            raise
        except OSError as error:  # the disk is full that a log is on: what the run writes may be elsewhere
            warn(f"the output cannot be written: {error.strerror}; the run goes on without")
            self.quiet = True

    def _line(self, epoch: str, lr: str, train: str, train_top1: str, val: str, test: str, test_top1: str, test_top5: str,
              speed: str, time: str) -> str:
        """At most 80 letters, as many as the widest values take, in a run of 1,000 epochs with validation."""
        validation = f"  {val:>6}" if self.validates else ""
        return (f"{epoch:>{max(5, 2 * len(str(self.epochs)) + 1)}} {lr:>7}  {train:>6} {train_top1:>6}{validation}"
                f"  {test:>6} {test_top1:>6} {test_top5:>6}  {speed:>9} {time:>6}").rstrip()
