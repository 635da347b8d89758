"""Specs in and out of files: TOML and JSON, presets, inheritance and overrides.

A spec file is a table. ``kind`` says which spec it is; ``base = "small"`` starts from a preset (or from
another file, relative to this one) and overrides what follows. Where a field holds a spec, a string
stands for a preset of that name. ``--set a.b=c`` is :func:`override` on the same table.

Every mistake becomes one :class:`~cofire.errors.SpecError` line: value, rule, nearest fix.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import ValidationError

from cofire.errors import SpecError
from cofire.spec.hardware import ClusterSpec
from cofire.spec.kernels import KernelSpec, KernelsSpec
from cofire.spec.messages import describe, nearest
from cofire.spec.model import ModelSpec
from cofire.spec.operator import OperatorSpec
from cofire.spec.parallel import ParallelSpec
from cofire.spec.run import RunSpec
from cofire.spec.search import SearchSpec
from cofire.spec.spec_type import Spec
from cofire.spec.workload import WorkloadSpec

KINDS: dict[str, type[Spec]] = {
    "model": ModelSpec,
    "cluster": ClusterSpec,
    "parallel": ParallelSpec,
    "run": RunSpec,
    "workload": WorkloadSpec,
    "operator": OperatorSpec,
    "search": SearchSpec,
    "kernel": KernelSpec,
    "kernels": KernelsSpec,
}

# The name of the one cluster that is no preset: it is measured where it is used.
THIS_MACHINE = "this-machine"

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
    if found is None:
        raise SpecError(f'{source}: has no kind; add kind = "model", or one of {", ".join(KINDS)}')
    if not isinstance(found, str) or found not in KINDS:
        raise SpecError(f"{source}: kind = {found!r} is not one of {', '.join(KINDS)}{nearest(found, KINDS)}")
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
    return _read_resolved(str(source), Path(), ())


def parse(spec_type: type[SpecT], table: Mapping[str, Any], where: str = "spec") -> SpecT:
    """Validate a table; a mistake becomes one line that names value, rule and nearest fix.

    Raises:
        SpecError: The table breaks a rule.
    """
    try:
        return spec_type.model_validate(table)
    except ValidationError as error:
        raise SpecError(f"{where}: {describe(spec_type, error)}") from None


def override(table: dict[str, Any], item: str) -> None:
    """Apply one ``a.b=value`` to a table in place. The value is read as TOML, else taken as text.

    ``none`` empties a field that may be empty. Where a spec is held, the name of a preset or a file stands for it.

    Raises:
        SpecError: There is no ``=``, or the path runs through something that is not a table.
    """
    path, separator, text = item.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not separator or not all(keys):
        raise SpecError(f"--set {item!r} is not of the form path=value, for example steps=100 or mtp.depth=2")
    here: Any = table
    for key in keys[:-1]:
        if here.get(key) in (None, "none"):
            here[key] = {}
        here = here[key]
        if not isinstance(here, dict):
            raise SpecError(f"--set {item!r}: {key} is not a table; set it as a whole")
    value = _parse_value(text.strip())
    if keys[-1] in KINDS and isinstance(value, str) and value != "none":
        value = _read_resolved(value, Path(), ())
    here[keys[-1]] = value


def dump(spec: Spec, form: str = "toml") -> str:
    """Return a spec as ``toml`` or ``json`` text; ``load`` of the text gives an equal spec."""
    if form == "json":
        return spec.model_dump_json(indent=2)
    if form != "toml":
        raise SpecError(f"form = {form!r} is not one of toml, json")
    return tomli_w.dumps(spec.model_dump(mode="json", exclude_none=True))


def save(spec: Spec, path: str | os.PathLike[str]) -> None:
    """Write a spec to a ``.toml`` or ``.json`` file, whole or not at all.

    The text goes to a temporary file in the same folder, to the disk, and then takes the name.

    Raises:
        SpecError: The file cannot be written, or its name ends otherwise.
    """
    target = Path(path)
    if target.suffix not in (".toml", ".json"):
        raise SpecError(f"cannot write {str(path)!r}: a spec's file ends in .toml or .json")
    write_text(target, dump(spec, target.suffix[1:]))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file whole or not at all, as :func:`save` does.

    Raises:
        SpecError: The file cannot be written.
    """
    target = Path(path)
    try:
        descriptor, partial = tempfile.mkstemp(prefix=f".{target.name}-", suffix=".partial", dir=target.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text + "\n" * (not text.endswith("\n")))
                file.flush()
                os.fsync(file.fileno())
            os.chmod(partial, 0o644)
            os.replace(partial, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            raise
    except OSError as error:
        raise SpecError(f"cannot write {str(path)!r}: {error.strerror}") from None


def load_value(spec_type: type[SpecT], path: str | os.PathLike[str]) -> SpecT:
    """Read back what :func:`save` wrote, for a type that is no kind of its own; no ``base``, no presets.

    Raises:
        SpecError: The file cannot be read, or breaks a rule.
    """
    return parse(spec_type, _read_file(str(path)), str(path))


def user_cache_folder() -> Path:
    """Return where this user's caches are: ``$COFIRE_CACHE``, else ``cofire`` in the platform's cache folder."""
    chosen = os.environ.get("COFIRE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        user = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        user = "~/Library/Caches"
    else:
        user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(user).expanduser() / "cofire"


def this_machine_file() -> Path:
    """Return where ``cofire plan calibrate`` keeps the cluster that ``this-machine`` stands for."""
    return user_cache_folder() / f"{THIS_MACHINE}.toml"


def diff(left: Spec, right: Spec) -> list[tuple[str, Any, Any]]:
    """Return ``(path, left value, right value)`` for every field in which two specs differ."""
    a, b = _flatten(left.model_dump(mode="json")), _flatten(right.model_dump(mode="json"))
    return [(key, a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]


def json_schema(kind: str) -> dict[str, Any]:
    """Return the JSON schema of a kind of spec, as it is after ``base`` and preset names are resolved."""
    return KINDS[known_kind(kind)].model_json_schema()


def known_kind(kind: str) -> str:
    """Return ``kind`` if it is the name of a kind of spec.

    Raises:
        SpecError: It is not.
    """
    if kind not in KINDS:
        raise SpecError(f"kind = {kind!r} is not one of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    return kind


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
    if source == THIS_MACHINE:
        if not this_machine_file().is_file():
            raise SpecError(f"{THIS_MACHINE} is not calibrated here; run cofire plan calibrate once")
        return _read_file(str(this_machine_file()))
    if Path(source).suffix not in (".toml", ".json"):
        raise SpecError(f"{source!r} is neither a preset nor a .toml or .json file{nearest(source, preset_names())}")
    return _read_file(source)


def _read_file(source: str) -> dict[str, Any]:
    path = Path(source)
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SpecError(f"cannot read {source!r}: {reason}") from None
    try:
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise SpecError(f"{source}: not valid {path.suffix[1:].upper()}: {reason}") from None
    if not isinstance(table, dict):
        raise SpecError(f"{source}: holds a {type(table).__name__}, but a spec is a table")
    return table


def _read_resolved(source: str, folder: Path, chain: tuple[str, ...]) -> dict[str, Any]:
    """Read a preset, or a file relative to ``folder``, and all it refers to.

    ``chain`` are the sources that led here; one that comes back to itself is a circle.
    """
    if "\0" in source:
        raise SpecError(f"cannot read {source!r}: a file's name has no zero byte")
    if source not in preset_names() and Path(source).suffix:
        source = str(folder / source)
    name = source if source in preset_names() else os.path.realpath(source)
    if name in chain:
        names = " -> ".join(os.path.basename(link) for link in [*chain[chain.index(name) :], name])
        raise SpecError(f"{source}: refers to itself: {names}; take one of these references out")
    return _resolve(_read_source(source), Path(source).parent, (*chain, name))


def _resolve(table: dict[str, Any], folder: Path, chain: tuple[str, ...]) -> dict[str, Any]:
    """Replace ``base`` and preset names inside a table by what they stand for."""
    table = dict(table)
    for key, value in table.items():
        if key in KINDS and isinstance(value, str) and value != "none":
            table[key] = _read_resolved(value, folder, chain)
        elif isinstance(value, dict):
            table[key] = _resolve(value, folder, chain)
    base = table.pop("base", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise SpecError(f"base = {base!r} must be the name of a preset or a path")
    return _merge(_read_resolved(base, folder, chain), table)


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
    if text == "null":
        return None
    try:
        table = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return table["value"] if len(table) == 1 else text


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flatten(inner, f"{prefix}.{key}" if prefix else key))
    return flat
