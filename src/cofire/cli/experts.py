"""``cofire plan experts``: where the replicas of experts go, from a file with the load of each expert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cofire.cli.option_group import given, option_group
from cofire.cli.options import JsonOption
from cofire.cli.output import console, print_json
from cofire.cli.plan_question import check_suffix

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cofire.plan.expert_placement import Floats, Placement

_WORST_LAYERS = 5

# Of a first plan; with --previous they come from there.
_FIRST_OPTIONS = {
    "num_nodes": Annotated[int | None, typer.Option("--nodes", help="Nodes of equal size; 1 unless said.")],
    "num_groups": Annotated[
        int | None, typer.Option("--groups", help="Groups of experts, as node-limited routing has them; 1 unless said.")
    ],
    "policy": Annotated[
        Literal["auto", "hierarchical", "global"] | None,
        typer.Option("--policy", help="Keep each group on a node, ignore nodes, or (auto) the first where possible."),
    ],
    "distinct": Annotated[
        bool | None,
        typer.Option("--distinct", show_default=False, help="Never put two replicas of an expert on one device."),
    ],
    "greedy": Annotated[
        bool | None,
        typer.Option("--greedy", show_default=False, help="Stop at the greedy plan of the public balancer: no swaps."),
    ],
    "min_gain": Annotated[
        float | None,
        typer.Option("--min-gain", help="With --previous: leave a layer that gains less than this part; 0.05."),
    ],
    "max_moves": Annotated[
        int | None, typer.Option("--max-moves", help="With --previous: most replicas that a layer moves.")
    ],
}
_UPDATE_OPTIONS = {"min_gain": "--min-gain", "max_moves": "--max-moves"}


@option_group(_FIRST_OPTIONS)
def experts(
    source: Annotated[
        Path,
        typer.Argument(metavar="LOAD", help="A .json or .npy file: the load of each expert, layers by experts."),
    ],
    replicas: Annotated[int | None, typer.Option(help="Replicas of a layer, the experts themselves included.")] = None,
    devices: Annotated[int | None, typer.Option(help="Devices that hold them.")] = None,
    previous: Annotated[
        Path | None, typer.Option(metavar="PLAN.json", help="The placement in use; it is changed in few moves.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="PLAN.json", help="Write the placement to this file.")] = None,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Place replicas of experts on devices, so that the fullest device has as little more than the mean as can be.

    A first plan needs --replicas and --devices. With --previous the placement of that file is adapted to the new load,
    and only what gains enough moves.
    """
    check_suffix(out, ".json", "--out")
    check_suffix(previous, ".json", "--previous")
    from cofire.plan.placement_file import read_load, write_placement

    fields = given(options)
    _check_options(previous, replicas, devices, fields)
    load = read_load(source)
    if previous is None:
        assert replicas is not None
        assert devices is not None
        before, after = _place(load, replicas, devices, fields)
    else:
        before, after = _update(load, previous, (replicas, devices), fields)
    if out is not None:
        write_placement(out, after)
    if as_json:
        print_json(_document(before, after, previous is not None))
        return
    shown = console()
    for part in _note(before, after, previous is not None):
        shown.print(part)
    if out is not None:
        shown.print(f"written to {out}", markup=False, highlight=False, soft_wrap=True)


def _check_options(previous: Path | None, replicas: int | None, devices: int | None, fields: dict[str, Any]) -> None:
    """Refuse options that the kind of plan does not take."""
    if previous is None:
        for name, value in (("--replicas", replicas), ("--devices", devices)):
            if value is None:
                raise typer.BadParameter("is needed for a first plan", param_hint=name)
        wrong = next((option for name, option in _UPDATE_OPTIONS.items() if name in fields), None)
        if wrong is not None:
            raise typer.BadParameter("needs --previous, the placement in use", param_hint=wrong)
        return
    names = {"num_nodes": "--nodes", "num_groups": "--groups"}
    wrong = next((name for name in fields if name not in _UPDATE_OPTIONS), None)
    if wrong is not None:
        raise typer.BadParameter(
            "is taken from the placement in --previous; leave it out", param_hint=names.get(wrong, f"--{wrong}")
        )


def _place(load: Floats, replicas: int, devices: int, fields: dict[str, Any]) -> tuple[Floats, Placement]:
    from cofire.plan.expert_placement import place_experts

    settings = dict(fields)
    refine = not settings.pop("greedy", False)
    after = place_experts(load, replicas, devices, **settings, refine=refine)
    return dealt_out(load, devices), after


def _update(
    load: Floats, previous: Path, wanted: tuple[int | None, int | None], fields: dict[str, Any]
) -> tuple[Floats, Placement]:
    from cofire.errors import PlanError
    from cofire.plan.expert_placement import evaluate_placement, update_placement
    from cofire.plan.placement_file import read_placement

    used = read_placement(previous, load.shape[1])
    have = (("--replicas", used.num_replicas), ("--devices", used.num_devices))
    for (name, number), wish in zip(have, wanted, strict=True):
        if wish not in (None, number):
            raise PlanError(f"{name} {wish} differs from the {number} of {previous}; leave it out, or plan anew")
    before = evaluate_placement(used, load).imbalance
    return before, update_placement(used, load, **fields)


def dealt_out(load: Floats, num_devices: int) -> Floats:
    """Return ``[L]``, largest over mean load of a device with one replica of each expert, in order, as even by count.

    This is what a deployment without redundant experts has. Where devices outnumber experts, some have none.
    """
    import numpy as np

    layers, num_experts = load.shape
    size = -(-num_experts // num_devices)
    padded = np.zeros((layers, size * -(-num_experts // size)))
    padded[:, :num_experts] = load
    held = padded.reshape(layers, -1, size).sum(2)
    mean = load.sum(1) / num_devices
    return np.divide(held.max(1), mean, out=np.ones(layers), where=mean > 0)


def _document(before: Floats, after: Placement, updated: bool) -> dict[str, Any]:
    from cofire.plan.placement_file import placement_table

    return {
        "before": {
            "what": "the placement in use" if updated else "one replica of each expert, dealt out in order",
            "imbalance": before.tolist(),
        },
        "imbalance_mean": float(after.imbalance.mean()),
        "imbalance_max": float(after.imbalance.max()),
        "moves": after.moves,
        "placement": placement_table(after),
    }


def _note(before: Floats, after: Placement, updated: bool) -> list[RenderableType]:
    import numpy as np
    from rich.text import Text

    from cofire.plan.training_note import new_table

    layers, num_experts = after.replica_count.shape
    slots, devices = after.num_replicas, after.num_devices
    title = f"{layers} layers of {num_experts} experts: {slots} replicas on {devices} devices, {slots // devices} each"
    if after.num_nodes > 1:
        title += f"; {after.num_groups} groups bound to {after.num_nodes} nodes"
    first = "in use" if updated else "without redundant experts"
    table = new_table("Load of the fullest device over the mean", "layers", first, "planned", "")
    now = after.imbalance
    for name, of in (("mean", np.mean), ("median", np.median), ("worst", np.max)):
        was, planned = float(of(before)), float(of(now))
        table.add_row(name, f"{was:.4f}", f"{planned:.4f}", f"{1 - planned / was:.1%} less" if planned < was else "")
    worst = new_table("The least even layers as planned", "layer", first, "planned", "replicas of one expert", "")
    for layer in np.argsort(-now, kind="stable")[:_WORST_LAYERS]:
        count = after.replica_count[layer]
        span = f"{count.min()} to {count.max()}"
        worst.add_row(str(layer), f"{before[layer]:.4f}", f"{now[layer]:.4f}", span, "")
    parts: list[RenderableType] = [Text(title, style="bold"), table, worst]
    if updated:
        parts.append(Text(f"Moves: {after.moves} of {layers * slots} replicas go to a device that did not hold them."))
    return parts
