"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from cofire.spec import ScheduleSpec


def learning_rate(schedule: ScheduleSpec, peak: float, step: int, steps: int) -> float:
    """Return the learning rate of optimiser step ``step``, counted from 1, of ``steps``.

    Warm-up is linear and reaches the peak at ``warmup_steps``. ``cosine`` then falls to
    ``final_ratio * peak`` at the last step; ``wsd`` stays at the peak and falls linearly over the last
    ``decay_fraction`` of all steps; ``constant`` stays.
    """
    warmup = schedule.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    floor = schedule.final_ratio
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "wsd":
        decay_steps = schedule.decay_fraction * steps
        start = max(warmup, steps - decay_steps)
        share = 0.0 if step <= start or steps <= start else min(1.0, (step - start) / (steps - start))
        return peak * (1 - (1 - floor) * share)
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))
