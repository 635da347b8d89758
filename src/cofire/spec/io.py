"""Specs in and out of files: TOML and JSON, presets, inheritance and overrides.

A spec file is a table. ``kind`` says which spec it is; ``base = "small"`` starts from a preset (or from
another file, relative to this one) and overrides what follows. Where a field holds a spec, a string
stands for a preset of that name. ``--set a.b=c`` is :func:`override` on the same table.

Every mistake becomes one :class:`~cofire.errors.SpecError` line: value, rule, nearest fix.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from cofire.errors import SpecError
from cofire.spec.hardware import ClusterSpec
from cofire.spec.model import ModelSpec
from cofire.spec.run import RunSpec
from cofire.spec.spec_type import Spec

KINDS: dict[str, type[Spec]] = {"model": ModelSpec, "cluster": ClusterSpec, "run": RunSpec}
_BASE_DEPTH_MAX = 16

SpecT = TypeVar("SpecT", bound=Spec)


def preset_names(kind: str | None = None) -> list[str]:
    """Return the names of the presets, all of them or those of one kind."""
    names = sorted(f.name.removesuffix(".toml") for f in _preset_folder().iterdir() if f.name.endswith(".toml"))
    return names if kind is None else [name for name in names if _preset_table(name)["kind"] == kind]


def load(source: str | os.PathLike[str], overrides: Iterable[str] = (), kind: str | None = None) -> Spec:
    """Load a spec from a preset name or from a ``.toml`` or ``.json`` file.

    Args:
        source: A preset's name or a path.
        overrides: ``path=value`` strings, applied in order before validation.
        kind: ``model``, ``cluster`` or ``run``; where the source is a model and a run is asked for,
            the run trains that model with the defaults.

    Raises:
        SpecError: The source does not exist, cannot be parsed, or breaks a rule.
    """
    table = read_table(source)
    found = table.get("kind", kind)
    if kind == "run" and found == "model":
        table, found = {"kind": "run", "name": table.get("name", "run"), "model": table}, "run"
    if found not in KINDS:
        raise SpecError(f'{source}: kind = {found!r} is not one of {", ".join(KINDS)}; add kind = "model"')
    if kind is not None and found != kind:
        raise SpecError(f"{source} is a {found} spec, but a {kind} spec is needed here; presets: {_names_text(kind)}")
    for item in overrides:
        override(table, item)
    return parse(KINDS[found], table, str(source))


def load_as(spec_type: type[SpecT], source: str | os.PathLike[str], overrides: Iterable[str] = ()) -> SpecT:
    """Like :func:`load`, for a caller that knows which type of spec it needs."""
    kind = next(name for name, known in KINDS.items() if known is spec_type)
    spec = load(source, overrides, kind)
    assert isinstance(spec, spec_type)
    return spec


def read_table(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the table behind a preset name or a file, with every ``base`` and preset name resolved."""
    return _resolve(_read_source(str(source)), Path(str(source)).parent, 0)


def parse(spec_type: type[SpecT], table: Mapping[str, Any], where: str = "spec") -> SpecT:
    """Validate a table; a mistake becomes one line that names value, rule and nearest fix.

    Raises:
        SpecError: The table breaks a rule.
    """
    try:
        return spec_type.model_validate(table)
    except ValidationError as error:
        raise SpecError(f"{where}: {_describe(spec_type, error)}") from None


def override(table: dict[str, Any], item: str) -> None:
    """Apply one ``a.b=value`` to a table in place. The value is read as TOML, else taken as a string.

    Raises:
        SpecError: There is no ``=``, or the path runs through something that is not a table.
    """
    path, separator, text = item.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not separator or not all(keys):
        raise SpecError(f"--set {item!r} is not of the form path=value, for example model.num_layers=4")
    here: Any = table
    for key in keys[:-1]:
        if here.get(key) is None:
            here[key] = {}
        here = here[key]
        if not isinstance(here, dict):
            raise SpecError(f"--set {item!r}: {key} is not a table; set it as a whole")
    value = _parse_value(text.strip())
    if value is None:
        here[keys[-1]] = None
    elif isinstance(value, str) and keys[-1] in KINDS and value not in ("", None):
        here[keys[-1]] = _resolve(_read_source(value), Path(value).parent, 0)
    else:
        here[keys[-1]] = value


def dump(spec: Spec, form: str = "toml") -> str:
    """Return a spec as ``toml`` or ``json`` text; ``load`` of the text gives an equal spec."""
    if form == "json":
        return spec.model_dump_json(indent=2)
    if form != "toml":
        raise SpecError(f"form = {form!r} is not one of toml, json")
    return tomli_w.dumps(spec.model_dump(mode="json", exclude_none=True))


def diff(left: Spec, right: Spec) -> list[tuple[str, Any, Any]]:
    """Return ``(path, left value, right value)`` for every field in which two specs differ."""
    a, b = _flatten(left.model_dump(mode="json")), _flatten(right.model_dump(mode="json"))
    return [(key, a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]


def json_schema(kind: str) -> dict[str, Any]:
    """Return the JSON schema of a kind of spec."""
    if kind not in KINDS:
        raise SpecError(f"kind = {kind!r} is not one of {', '.join(KINDS)}{_nearest(kind, KINDS)}")
    return KINDS[kind].model_json_schema()


# -- reading ----------------------------------------------------------------------------------------


def _preset_folder() -> Any:
    return resources.files("cofire.spec") / "presets"


def _preset_table(name: str) -> dict[str, Any]:
    return tomllib.loads((_preset_folder() / f"{name}.toml").read_text("utf-8"))


def _names_text(kind: str | None = None) -> str:
    return ", ".join(preset_names(kind))


def _read_source(source: str) -> dict[str, Any]:
    if source in preset_names():
        return _preset_table(source)
    path = Path(source)
    if path.suffix not in (".toml", ".json"):
        raise SpecError(f"{source!r} is neither a preset nor a .toml or .json file{_nearest(source, preset_names())}")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SpecError(f"cannot read {source!r}: {reason}") from None
    try:
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise SpecError(f"{source}: not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(table, dict):
        raise SpecError(f"{source}: holds a {type(table).__name__}, but a spec is a table")
    return table


def _resolve(table: dict[str, Any], folder: Path, depth: int) -> dict[str, Any]:
    """Replace ``base`` and preset names inside a table by what they stand for."""
    if depth > _BASE_DEPTH_MAX:
        raise SpecError(f"base: more than {_BASE_DEPTH_MAX} levels; two files name each other as base?")
    table = dict(table)
    for key in KINDS:
        if isinstance(table.get(key), str):
            table[key] = _read_related(table[key], folder, depth)
    for key, value in table.items():
        if isinstance(value, dict):
            table[key] = _resolve(value, folder, depth + 1)
    base = table.pop("base", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise SpecError(f"base = {base!r} must be the name of a preset or a path")
    return _merge(_read_related(base, folder, depth), table)


def _read_related(source: str, folder: Path, depth: int) -> dict[str, Any]:
    path = Path(source) if source in preset_names() or os.path.isabs(source) else folder / source
    return _resolve(_read_source(str(path) if path.suffix else source), path.parent, depth + 1)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        same_kind = (
            isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind")) == old.get("kind")
        )
        merged[key] = _merge(old, value) if same_kind else value  # type: ignore[arg-type]
    return merged


def _parse_value(text: str) -> Any:
    if text in ("none", "null"):
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flatten(inner, f"{prefix}.{key}" if prefix else key))
    return flat


# -- messages ---------------------------------------------------------------------------------------


def _nearest(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"; nearest: {match[0]}" if match else ""


def _describe(spec_type: type[Spec], error: ValidationError) -> str:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    owner, keys = _owner(spec_type, place)
    path = ".".join(keys)
    if first["type"] == "extra_forbidden":
        known = list(owner.model_fields) if owner else []
        text = f"unknown key {path!r}{_nearest(keys[-1], known)}"
        if not _nearest(keys[-1], known) and known:
            text += f"; known: {', '.join(known)}"
    elif first["type"] == "missing":
        text = f"missing key {path!r}"
    else:
        message = first["msg"].removeprefix("Value error, ")
        value = first.get("input")
        shown = "" if isinstance(value, dict | BaseModel) else f" = {value!r}"
        text = f"{path}{shown}: {message}" if path else message
    more = error.error_count() - 1
    return text + (f" (and {more} more)" if more else "")


def _owner(spec_type: type[Spec], place: list[str]) -> tuple[type[Spec] | None, list[str]]:
    """Return the spec class that should own the last key of ``place``, and ``place`` without union tags."""
    owner: type[Spec] | None = spec_type
    keys: list[str] = []
    choices: list[type[Spec]] = []
    for index, part in enumerate(place):
        tagged = [choice for choice in choices if choice.model_fields["kind"].default == part] if choices else []
        if tagged:
            owner, choices = tagged[0], []
            continue
        keys.append(part)
        if index == len(place) - 1 or owner is None:
            break
        field = owner.model_fields.get(part)
        specs = [] if field is None else _spec_types(field.annotation)
        choices = [spec for spec in specs if "kind" in spec.model_fields] if len(specs) > 1 else []
        owner = specs[0] if specs else None
    return owner, keys


def _spec_types(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [spec for inner in get_args(annotation) for spec in _spec_types(inner)]
