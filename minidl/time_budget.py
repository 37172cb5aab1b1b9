"""How many epochs fit into a time: measured before training, so that the learning rate can end where it should."""

from __future__ import annotations

import time

from minidl.errors import UsageError
from minidl.progress import brief
from minidl.run import Run
from minidl.training import evaluate

WARMUP_STEPS, STEPS = 20, 100
LARGEST_SHARE = 0.04  # of the budget that the measurement may take; then it is content with fewer steps


def measure(run: Run, budget: float) -> tuple[float, float]:
    """Seconds of a training step and of an evaluation after each epoch. The run stands where it stood before.

    budget: seconds that there are.
    """
    sets = [batches for batches in (run.test_batches, run.val_batches) if batches]
    with run.rehearsal():
        batches = run.batches(0)
        run.network.train()
        end = time.perf_counter() + LARGEST_SHARE / 2 * budget

        def steps(most: int) -> float:
            """Seconds of a step, of at most `most`, and at least two."""
            begin = time.perf_counter()
            for done in range(1, most + 1):
                run.trainer.step(batches[done % len(batches)])
                run.place.synchronize()
                if done >= 2 and run.team.of_first(time.perf_counter() > end):
                    break
            return run.team.of_first((time.perf_counter() - begin) / done)

        steps(WARMUP_STEPS)
        step_seconds = steps(STEPS)
        evaluation_seconds = 0.0
        for held_out in sets:
            count = len(held_out.all())
            # A batch costs less than half of a training step.
            limit = max(1, min(count, int(LARGEST_SHARE / 2 * budget / step_seconds)))
            evaluate(run.network, held_out, 1, run.team)
            begin = time.perf_counter()
            evaluate(run.network, held_out, limit, run.team)
            evaluation_seconds += (time.perf_counter() - begin) * count / limit
    return step_seconds, evaluation_seconds


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
    print(f"time budget {brief(budget)}: {epochs} epochs of {brief(epoch)}, {run.steps_per_epoch} steps of {1000 * step:.1f} ms "
          f"and evaluation of {brief(evaluation)}; estimated end after {brief(spent + epochs * epoch)}", flush=True)
    return epochs
