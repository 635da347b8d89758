"""What a run measures about itself: a JSONL log, TensorBoard, and the machine's matrix peak.

``metrics.jsonl`` has one JSON object a line with an ``event``: start, step, validation, checkpoint, resume or
end. Lines are appended and handed to the system one by one; a killed process can leave half a line, which a
resumed run cuts off together with everything after the step it goes on from.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from cofire.model.linear import linear
from cofire.model.memory import available_memory_bytes as available_memory_bytes
from cofire.train.atomic import replace_file

_PEAK_SIZE = 2048
_PEAK_REPEATS = 7


class MetricsLog:
    """Appends events to ``metrics.jsonl`` and numbers to TensorBoard.

    Args:
        run_folder: Where both live.
        keep_until: Events of later steps are removed first; none: the file starts empty.
    """

    def __init__(self, run_folder: Path, keep_until: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = run_folder / "metrics.jsonl"
        kept = _kept_lines(path, keep_until) if keep_until is not None and path.exists() else []
        with replace_file(path) as file:
            file.write(b"".join(kept))
        self._file = path.open("a", encoding="utf-8")
        purge = None if keep_until is None else keep_until + 1
        self._board = SummaryWriter(str(run_folder / "tensorboard"), purge_step=purge)

    def write(self, event: str, **values: Any) -> None:
        """Append one event; a value that is not a finite number is written as null."""
        record = {"event": event, **{key: _finite(value) for key, value in values.items()}}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        step = values.get("step")
        if step is None or event not in ("step", "validation", "precision"):
            return
        for key, value in values.items():
            if isinstance(value, int | float) and key not in ("step", "time_s"):
                self._board.add_scalar(f"{event}/{key}", value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def _kept_lines(path: Path, keep_until: int) -> list[bytes]:
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the half line of a killed process
        if line.endswith(b"\n") and record.get("event") != "end" and record.get("step", 0) <= keep_until:
            kept.append(line)
    return kept


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def measure_matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the rate of a large square matrix product, FLOP/s, in the form that the model uses.

    The best of several is taken: it is the machine's peak that is asked for, not its mood.
    """
    a = torch.randn(_PEAK_SIZE, _PEAK_SIZE, device=device, dtype=dtype)
    seconds = []
    for _ in range(_PEAK_REPEATS + 2):
        _synchronize(device)
        start = time.perf_counter()
        linear(a, a)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2.0 * _PEAK_SIZE**3 / min(seconds[2:])


def choose_recipe(device: torch.device) -> str:
    """Return ``bf16`` or ``fp32``, whichever multiplies matrices faster here."""
    rates = {"bf16": torch.bfloat16, "fp32": torch.float32}
    return max(rates, key=lambda name: measure_matrix_peak(device, rates[name]))


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has used: on the device, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def recent_rate(tokens_per_step: int, seconds: list[float]) -> float:
    """Return tokens/s from the median of the last step times."""
    return tokens_per_step / statistics.median(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
