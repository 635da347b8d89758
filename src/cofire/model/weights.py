"""Reading a trained decoder back: from a run's folder, one checkpoint, or a Hugging Face folder.

A checkpoint folder, ``step-00000050``, holds

    model.toml      the ModelSpec
    state/          tensors, by torch.distributed.checkpoint
    state.json      everything that is not a tensor
    manifest.json   size and BLAKE2b hash of every other file; written last

and is valid only if every file matches the manifest. PyTorch keeps the index of ``state/`` as a pickle; it
is read here by an unpickler that knows the index's own types and nothing else, and tensors are read with
``weights_only``. No checkpoint can run code.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from cofire.errors import ServeError, SpecError
from cofire.model.build import build
from cofire.model.decoder import Decoder
from cofire.spec import ModelSpec, load_as

MANIFEST = "manifest.json"
MODEL_FILE = "model.toml"
STATE_FILE = "state.json"
TENSORS = "state"
CHECKPOINTS = "checkpoints"

_log = logging.getLogger(__name__)
_INDEX_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
}


class _IndexUnpickler(pickle.Unpickler):
    """Loads a checkpoint's index and refuses every type that an index has no need of."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if dtype or global_name in _INDEX_NAMES.get(module_name, ()):
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f"{module_name}.{global_name} has no place in a checkpoint's index")


class SafeReader(FileSystemReader):
    """``FileSystemReader`` whose index cannot name foreign types."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index of the checkpoint."""
        path = Path(self.path) / ".metadata"
        metadata = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"a {type(metadata).__name__} is not a checkpoint's index")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def file_hash(path: Path) -> str:
    """Return the BLAKE2b hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def damage(folder: Path) -> str | None:
    """Say in a few words what is wrong with a checkpoint folder; none if it is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        for name, entry in files.items():
            path = folder / name
            if path.stat().st_size != entry["bytes"] or file_hash(path) != entry["blake2b"]:
                return f"{name} differs from the manifest"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def checkpoints(run_folder: Path) -> list[Path]:
    """Return a run's checkpoint folders, newest first, whole or not."""
    return sorted((run_folder / CHECKPOINTS).glob("step-*"), reverse=True)


def newest_checkpoint(run_folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run; a damaged one is passed over with a warning."""
    for folder in checkpoints(run_folder):
        reason = damage(folder)
        if reason is None:
            return folder
        _log.warning("checkpoint %s is damaged (%s); trying the one before it", folder.name, reason)
    return None


def read_tensors(folder: Path, into: dict[str, Any]) -> None:
    """Fill the tensors of a nested ``into`` in place from a checkpoint folder; other keys are left unread."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that no process group is up; none is needed
        dcp.load(into, storage_reader=SafeReader(str(folder / TENSORS)), no_dist=True)


def load_decoder(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Decoder:
    """Load a decoder for inference.

    Args:
        path: The folder of a run (its newest whole checkpoint counts), of one checkpoint, or of a Hugging
            Face model with ``config.json``.
        dtype: Of the parameters; none: as stored.
        device: Where to put it; none: the CPU.

    Raises:
        ServeError: The folder is none of these, or what it holds is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ServeError(f"{str(path)!r} is not a folder; name a run, a checkpoint or a Hugging Face folder")
    if (folder / CHECKPOINTS).is_dir():
        found = newest_checkpoint(folder)
        if found is None:
            raise ServeError(f"{folder} has no whole checkpoint yet; wait for the first, or resume the run")
        folder = found
    elif (folder / "config.json").is_file():
        from cofire.model.huggingface import load

        return load(folder, dtype=dtype, device=device).eval()
    elif not (folder / MANIFEST).is_file():
        raise ServeError(f"{folder} holds neither checkpoints/, {MANIFEST} nor config.json; it is no model")
    reason = damage(folder)
    if reason is not None:
        raise ServeError(f"checkpoint {folder} is damaged: {reason}")
    try:
        decoder = build(load_as(ModelSpec, folder / MODEL_FILE), seed=0)
        state = decoder.state_dict()
        read_tensors(folder, {"model": state})
        decoder.load_state_dict(state)
    except (SpecError, OSError, RuntimeError, ValueError, pickle.UnpicklingError, dcp.CheckpointException) as error:
        raise ServeError(f"checkpoint {folder} cannot be read: {str(error).splitlines()[0]}") from None
    return decoder.to(device=device, dtype=dtype).eval()


def load_spec(path: str | os.PathLike[str]) -> ModelSpec:
    """Return the spec of the model that :func:`load_decoder` would load, without its weights.

    Raises:
        ServeError: There is no model, or its description cannot be read.
    """
    folder = Path(path)
    found = newest_checkpoint(folder) if (folder / CHECKPOINTS).is_dir() else folder
    try:
        if found is not None and (found / MODEL_FILE).is_file():
            return load_as(ModelSpec, found / MODEL_FILE)
        if (folder / "config.json").is_file():
            from cofire.model.huggingface import spec_from_config

            return spec_from_config(json.loads((folder / "config.json").read_bytes()))
    except (SpecError, OSError, ValueError) as error:
        raise ServeError(f"{folder}: the model's description cannot be read: {str(error).splitlines()[0]}") from None
    raise ServeError(
        f"{folder} holds no model and no whole checkpoint; name a run, a checkpoint or a Hugging Face folder"
    )
