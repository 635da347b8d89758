"""Writing and restoring the whole state of a run; the layout is described in ``cofire.model.weights``.

A checkpoint is written into a hidden folder, flushed file by file, sealed by its manifest and renamed: a
process killed at any moment leaves either a whole checkpoint or a hidden folder that the next start removes.
Asynchronous writing copies the tensors and writes the copy in a thread while training goes on; at most one
write is under way.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from cofire.errors import TrainError
from cofire.model.weights import (
    CHECKPOINTS,
    MANIFEST,
    MODEL_FILE,
    STATE_FILE,
    TENSORS,
    checkpoints,
    file_hash,
    newest_checkpoint,
    read_tensors,
)
from cofire.spec import ModelSpec, diff, dump, load_as
from cofire.train.atomic import flush_folder

_HIDDEN = ".partial-"


class CheckpointStore:
    """The checkpoints of one run folder.

    Args:
        run_folder: Holds ``checkpoints/``.
        model: Saved with every checkpoint, and compared when one is restored.
        keep: How many are kept; older ones are removed once a newer one is whole.
    """

    def __init__(self, run_folder: Path, model: ModelSpec, keep: int) -> None:
        self.run_folder = run_folder
        self.model = model
        self.keep = keep
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._last: Path | None = None
        folder = run_folder / CHECKPOINTS
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{_HIDDEN}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, tensors: Mapping[str, Any], rest: Mapping[str, Any], asynchronous: bool = False) -> None:
        """Write a checkpoint.

        Args:
            step: The optimiser step it stands after.
            tensors: Nested dicts of tensors.
            rest: What JSON can hold.
            asynchronous: Copy the tensors and return; the next call waits for this one.

        Raises:
            TrainError: This or the last asynchronous write failed, for example on a full disk.
        """
        self.wait()
        if not asynchronous:
            self._write(step, tensors, rest)
            return
        frozen = _copy_to_cpu(tensors), copy.deepcopy(dict(rest))
        self._writer = threading.Thread(target=self._write_quietly, args=(step, *frozen), name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Wait for the write under way, if any; raise what it raised."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def newest(self) -> Path | None:
        """Return the newest whole checkpoint."""
        return newest_checkpoint(self.run_folder)

    def restore(self, folder: Path, tensors: dict[str, Any]) -> dict[str, Any]:
        """Fill ``tensors`` in place from a checkpoint and return the rest of its state.

        Raises:
            TrainError: The checkpoint is of another model, or does not hold what is asked for.
        """
        saved = load_as(ModelSpec, folder / MODEL_FILE)
        different = [row for row in diff(saved, self.model) if row[0] not in ("name", "description")]
        if different:
            path, theirs, ours = different[0]
            raise TrainError(
                f"checkpoint {folder.name} is of another model: model.{path} = {theirs!r} there, {ours!r} here; "
                "name another --out"
            )
        try:
            read_tensors(folder, tensors)
            return json.loads((folder / STATE_FILE).read_text("utf-8"))
        except (OSError, ValueError, RuntimeError, dcp.CheckpointException) as error:
            raise TrainError(f"checkpoint {folder} cannot be restored: {str(error).splitlines()[0]}") from None

    def _write_quietly(self, step: int, tensors: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
        try:
            self._write(step, tensors, rest)
        except BaseException as error:
            self._failure = error

    def _write(self, step: int, tensors: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
        final = self.run_folder / CHECKPOINTS / f"step-{step:08d}"
        hidden = final.with_name(f"{_HIDDEN}{final.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        try:
            self._fill(hidden, tensors, rest)
            if final.exists():
                shutil.rmtree(final)
            os.replace(hidden, final)
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            shutil.rmtree(hidden, ignore_errors=True)
            raise TrainError(
                f"cannot write checkpoint {final}: {_reason(error)}; earlier checkpoints are whole, free some space "
                "and resume"
            ) from None
        flush_folder(final.parent)
        for old in checkpoints(self.run_folder)[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def _fill(self, folder: Path, tensors: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True)
        (folder / MODEL_FILE).write_text(dump(self.model), "utf-8")
        (folder / STATE_FILE).write_text(json.dumps(rest), "utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns that no process group is up; none is needed
            dcp.save(
                dict(tensors), storage_writer=FileSystemWriter(str(folder / TENSORS), sync_files=True), no_dist=True
            )
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        entries = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "blake2b": file_hash(path)} for path in files
        }
        (folder / MANIFEST).write_text(json.dumps({"version": 1, "files": entries}, indent=1), "utf-8")
        for path in [*files, folder / MANIFEST]:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        flush_folder(folder / TENSORS)
        flush_folder(folder)


def _copy_to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    return {key: _copy_to_cpu(inner) for key, inner in value.items()}


def _reason(error: BaseException) -> str:
    """Return the operating system's own word for a failure, however deeply PyTorch has wrapped it."""
    if isinstance(error, dcp.CheckpointException):
        wrapped = next(iter(error.failures.values()))
        inner = wrapped[0] if isinstance(wrapped, tuple) else wrapped
        return _reason(inner)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
