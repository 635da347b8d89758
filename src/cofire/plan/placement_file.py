"""Loads of experts and their placement in files.

A load is a ``.json`` file, a list of layers that are lists of numbers (one list: one layer; or a table with the key
``load``), or a ``.npy`` array, which is never unpickled. A placement is a JSON table; its ``physical_to_logical`` says
all, and the rest is there for its readers.

Left out: any other format of arrays; a checkpoint of the load over time.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from cofire.errors import PlanError
from cofire.plan.expert_placement import Floats, Ints, Placement
from cofire.spec.io import write_text

_KIND = "placement"


def read_load(path: str | os.PathLike[str]) -> Floats:
    """Read the load of each expert.

    Returns:
        ``[L, E]``, finite and not negative.

    Raises:
        PlanError: The file cannot be read or holds something else.
    """
    source = Path(path)
    if source.suffix not in (".json", ".npy"):
        raise PlanError(f"{str(path)!r} must end in .json or .npy, so that it is known what it holds")
    found = _read_array(source) if source.suffix == ".npy" else _read_rows(source)
    load = np.atleast_2d(found)
    if load.ndim != 2 or not load.size:
        raise PlanError(
            f"{path}: the load has shape {list(found.shape)}; it must be [layers, experts] or [experts], none of them 0"
        )
    wrong = ~(np.isfinite(load) & (load >= 0))
    if wrong.any():
        layer, expert = (int(index) for index in np.argwhere(wrong)[0])
        raise PlanError(
            f"{path}: load[{layer}, {expert}] = {load[layer, expert]:g} must be finite and not negative; "
            "use 0 for no load"
        )
    return load


def _read_array(path: Path) -> Floats:
    try:
        # Mapped, so that a header that lies about its size takes no memory.
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise PlanError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    except (ValueError, EOFError, MemoryError, OverflowError, SyntaxError):
        raise PlanError(f"{path}: not an array of numbers in numpy's .npy format; write it with numpy.save") from None
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iuf":
        kind = found.dtype if isinstance(found, np.ndarray) else "several arrays"
        raise PlanError(f"{path}: holds {kind}, but a load is integers or floating-point numbers")
    return np.array(found, dtype=np.float64)


def _read_rows(path: Path) -> Floats:
    value = _read_json(path)
    if isinstance(value, dict):
        if "load" not in value:
            raise PlanError(f'{path}: has no key "load" with a list of layers by experts')
        value = value["load"]
    if isinstance(value, list) and value and not any(isinstance(row, list) for row in value):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise PlanError(f"{path}: a load is a list of layers, each a list of numbers, one per expert")
    for layer, row in enumerate(value):
        if len(row) != len(value[0]):
            raise PlanError(f"{path}: layer {layer} has {len(row)} experts, but layer 0 has {len(value[0])}")
        for expert, number in enumerate(row):
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise PlanError(f"{path}: load[{layer}, {expert}] = {json.dumps(number)[:40]} is not a number")
    try:
        return np.array(value, dtype=np.float64)
    except OverflowError:
        raise PlanError(f"{path}: a number is too large; the largest is {np.finfo(np.float64).max:g}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise PlanError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise PlanError(f"{path}: not valid JSON: {' '.join(str(reason).split())}") from None


def placement_table(placement: Placement) -> dict[str, Any]:
    """Return a placement as plain values; :func:`read_placement` needs all but ``imbalance`` and ``moves``."""
    return {
        "kind": _KIND,
        "num_devices": placement.num_devices,
        "num_nodes": placement.num_nodes,
        "num_groups": placement.num_groups,
        "distinct": placement.distinct,
        "moves": placement.moves,
        "imbalance": placement.imbalance.tolist(),
        "replica_count": placement.replica_count.tolist(),
        "physical_to_logical": placement.physical_to_logical.tolist(),
    }


def write_placement(path: str | os.PathLike[str], placement: Placement) -> None:
    """Write a placement as JSON, whole or not at all.

    Raises:
        SpecError: The file cannot be written.
    """
    rows = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in placement_table(placement).items()]
    write_text(path, "{\n  " + ",\n  ".join(rows) + "\n}")


def read_placement(path: str | os.PathLike[str], num_experts: int) -> Placement:
    """Read a placement that :func:`write_placement` wrote; its device loads are 0.

    Args:
        path: The file.
        num_experts: Experts of a layer; each must have a slot.

    Raises:
        PlanError: The file cannot be read, or is no placement of so many experts.
    """
    table = _read_json(Path(path))
    if not isinstance(table, dict) or table.get("kind") != _KIND:
        raise PlanError(f'{path}: is no placement of kind "{_KIND}"; give a file that --out wrote')
    devices, nodes, groups = (_positive(table, name, path) for name in ("num_devices", "num_nodes", "num_groups"))
    distinct = table.get("distinct", False)
    if not isinstance(distinct, bool):
        raise PlanError(f"{path}: distinct = {distinct!r} must be true or false")
    placed = _slots(table.get("physical_to_logical"), path, num_experts, devices)
    layers, slots = placed.shape
    count = np.stack([np.bincount(row, minlength=num_experts) for row in placed])
    empty = np.argwhere(count == 0)
    if len(empty):
        raise PlanError(f"{path}: layer {empty[0][0]} has no slot for expert {empty[0][1]} of {num_experts}")
    where = np.full((layers, num_experts, int(count.max())), -1, np.int64)
    order = np.argsort(placed, axis=1, kind="stable")
    first = np.cumsum(count, axis=1) - count
    for layer in range(layers):
        expert = placed[layer, order[layer]]
        where[layer, expert, np.arange(slots) - first[layer, expert]] = order[layer]
    return Placement(
        num_devices=devices,
        num_nodes=nodes,
        num_groups=groups,
        distinct=distinct,
        physical_to_logical=placed,
        logical_to_physical=where,
        replica_count=count,
        device_load=np.zeros((layers, devices)),
    )


def _positive(table: dict[str, Any], name: str, path: str | os.PathLike[str]) -> int:
    value = table.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanError(f"{path}: {name} = {json.dumps(value)[:40]} must be an integer of at least 1")
    return value


def _slots(value: Any, path: str | os.PathLike[str], num_experts: int, num_devices: int) -> Ints:
    """Check ``physical_to_logical`` and return it as ``[L, R]``."""
    rows = value if isinstance(value, list) else []
    if not rows or not all(isinstance(row, list) and row and len(row) == len(rows[0]) for row in rows):
        raise PlanError(f"{path}: physical_to_logical must be a list of layers, each with as many slots")
    for layer, row in enumerate(rows):
        for slot, expert in enumerate(row):
            if not isinstance(expert, int) or isinstance(expert, bool) or not 0 <= expert < num_experts:
                raise PlanError(
                    f"{path}: physical_to_logical[{layer}, {slot}] = {json.dumps(expert)[:40]} must be an expert from "
                    f"0 to {num_experts - 1}"
                )
    if len(rows[0]) % num_devices:
        raise PlanError(f"{path}: num_devices = {num_devices} must divide the {len(rows[0])} slots of a layer")
    return np.array(rows, dtype=np.int64)
