"""From a failed validation to one line: the offending value, the rule it broke, the nearest fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cofire.spec.spec_type import Spec

_SHOWN_LENGTH_MAX = 60


def nearest(word: object, known: Iterable[str]) -> str:
    """Return ``"; nearest: x"`` for the known word closest to ``word``, or nothing if none is close."""
    match = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.4)
    return f"; nearest: {match[0]}" if match else ""


def describe(spec_type: type[Spec], error: ValidationError) -> str:
    """Return one line for the first mistake of a validation; unknown keys come before what they leave missing."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    text = _describe_one(spec_type, details[0])
    return f"{text} (and {len(details) - 1} more)" if len(details) > 1 else text


def _describe_one(spec_type: type[Spec], detail: ErrorDetails) -> str:
    owner, keys = _owner(spec_type, [str(part) for part in detail["loc"]])
    path, value, context = ".".join(keys), detail.get("input"), detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key {path!r}{_nearest_key(spec_type, owner, keys)}"
        case "missing":
            return f"missing key {path!r}"
        case "union_tag_not_found":
            return f"missing key '{path}.kind'; known kinds: {_kinds(spec_type, keys)}"
        case "union_tag_invalid":
            known = _kinds(spec_type, keys)
            tag = context.get("tag")
            return f"{path}.kind = {tag!r} is not one of {known}{nearest(tag, known.split(', '))}"
        case "literal_error":
            known = [word.strip(" '") for word in context["expected"].replace(" or ", ", ").split(", ")]
            return f"{path} = {_shown(value)} is not one of {', '.join(known)}{nearest(value, known)}"
        case _:
            return _describe_value(path, value, detail["msg"])


def _describe_value(path: str, value: Any, message: str) -> str:
    rule = message.removeprefix("Value error, ").split(", unable to")[0].split(" or an object to")[0]
    rule = rule.replace("Input should be", "must be")
    shown = "" if isinstance(value, dict | BaseModel) else f" = {_shown(value)}"
    if not path:
        return rule
    if isinstance(value, dict | BaseModel) and not rule.startswith("must"):
        return f"{path}.{rule}"  # a rule between the fields of one table: it starts with a field's name
    return f"{path}{shown} {rule}" if rule.startswith("must") else f"{path}{shown}: {rule}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_LENGTH_MAX else f"{text[:_SHOWN_LENGTH_MAX]}..."


def _nearest_key(spec_type: type[Spec], owner: type[Spec] | None, keys: list[str]) -> str:
    """Name the closest key: one beside the unknown key if equally close, else one anywhere in the spec."""
    prefix = ".".join(keys[:-1]) + "." if keys[:-1] else ""
    known = list(owner.model_fields) if owner else []
    paths = {name: prefix + name for name in known}
    for path in known_paths(spec_type):
        if path != prefix + keys[-1]:
            paths.setdefault(path.rsplit(".", 1)[-1], path)
    match = difflib.get_close_matches(keys[-1], list(paths), n=1, cutoff=0.5)
    if match:
        return f"; nearest: {paths[match[0]]}"
    return f"; known: {', '.join(known)}" if known else ""


def known_paths(spec_type: type[Spec], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every field of a spec, those of all alternatives included."""
    for name, field in spec_type.model_fields.items():
        yield prefix + name
        for inner in _spec_types(field.annotation):
            yield from known_paths(inner, f"{prefix}{name}.")


def _kinds(spec_type: type[Spec], keys: list[str]) -> str:
    """Return the kinds that the field at ``keys`` can have."""
    owner, _ = _owner(spec_type, keys)
    field = owner.model_fields.get(keys[-1]) if owner else None
    specs = _spec_types(field.annotation) if field else []
    return ", ".join(str(spec.model_fields["kind"].default) for spec in specs)


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
