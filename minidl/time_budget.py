"""How many epochs fit into a time: measured before training, so that the learning rate can end where it should."""

from __future__ import annotations

import time

from minidl import signals
from minidl.errors import UsageError
from minidl.run import Run
from minidl.wording import brief, counted

WARMUP_STEPS, STEPS, FEWEST_STEPS = 20, 100, 2
# Steps are measured for a SHARE of the budget, but for LEAST_SECONDS unless that is more than LARGEST_SHARE of it; evaluation
# likewise.
SHARE, LEAST_SECONDS, LARGEST_SHARE = 0.04, 1.0, 0.1


def measure(run: Run, budget: float) -> tuple[float, float]:
    """Seconds of a training step and of an evaluation after each epoch. The run stands where it stood before.

    budget: seconds that there are.
    """
    share = max(SHARE * budget, min(LEAST_SECONDS, LARGEST_SHARE * budget))
    with run.rehearsal():
        run.network.train()
        batches = run.batches(0)

        def steps(count: int) -> float:
            """Seconds of each of `count` steps."""
            run.place.synchronize()
            begin = time.perf_counter()
            for number in range(count):
                run.trainer.step(batches[number % len(batches)])
                if run.team.size == 1:
                    signals.obey()
            run.place.synchronize()
            return run.team.of_first((time.perf_counter() - begin) / count)

        # In the first ones kernels are compiled and memory is taken.
        begin, warm = time.perf_counter(), 0
        while warm < FEWEST_STEPS or warm < WARMUP_STEPS and run.team.of_first(time.perf_counter() - begin) < share / 4:
            step, warm = steps(1), warm + 1
        step = steps(max(FEWEST_STEPS, min(STEPS, int(share / step))))

        evaluation = 0.0
        for held_out in (run.test_batches, run.val_batches):
            if held_out:
                count = len(held_out.all())
                limit = max(1, min(count, int(share / step)))  # a batch costs less than half of a training step
                run.trainer.evaluate(held_out, 1)
                begin = time.perf_counter()
                run.trainer.evaluate(held_out, limit)
                evaluation += (time.perf_counter() - begin) * count / limit
    return step, evaluation


def epochs_within(run: Run, budget: float, spent: float) -> int:
    """The number of epochs that fit into what `spent` leaves of `budget`, both in seconds. Says so.

    Raises UsageError where not even one does.
    """
    begin = time.perf_counter()
    step, evaluation = measure(run, budget - spent)
    spent += time.perf_counter() - begin
    epoch = run.steps_per_epoch * step + evaluation
    epochs = int(run.team.of_first((budget - spent) / epoch))
    if epochs < 1:
        raise UsageError(f"time_budget {brief(budget)}: one epoch takes {brief(epoch)}, and {brief(spent)} have passed")
    count = counted(epochs, "epoch")
    print(f"time budget {brief(budget)}: {count} of {brief(epoch)}, {run.steps_per_epoch} steps of {1000 * step:.1f} ms and "
          f"evaluation of {brief(evaluation)}; estimated end after {brief(spent + epochs * epoch)}", flush=True)
    return epochs
