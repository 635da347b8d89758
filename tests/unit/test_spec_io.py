"""Specs in and out of files: inheritance, overrides, round trips, and files that are no specs."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings

from cofire.errors import SpecError
from cofire.spec import ClusterSpec, ModelSpec, RunSpec, diff, dump, json_schema, load, load_as, parse, save
from cofire.spec.io import KINDS
from cofire.testing.strategies import model_specs, run_specs


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, "utf-8")
    return str(folder / name)


def error(source: str, *overrides: str, kind: str | None = None) -> str:
    with pytest.raises(SpecError) as caught:
        load(source, overrides, kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@settings(max_examples=60, deadline=None)
@given(model_specs())
def test_a_model_survives_toml_and_json(spec: ModelSpec) -> None:
    assert parse(ModelSpec, tomllib.loads(dump(spec))) == spec
    assert parse(ModelSpec, json.loads(dump(spec, "json"))) == spec


@settings(max_examples=60, deadline=None)
@given(run_specs())
def test_a_run_survives_toml_and_json(spec: RunSpec) -> None:
    assert parse(RunSpec, tomllib.loads(dump(spec))) == spec
    assert parse(RunSpec, json.loads(dump(spec, "json"))) == spec


@settings(max_examples=30, deadline=None)
@given(model_specs(), model_specs())
def test_diff_is_empty_exactly_for_equal_specs(left: ModelSpec, right: ModelSpec) -> None:
    assert diff(left, left) == []
    assert (diff(left, right) == []) == (left == right)


def test_diff_names_each_field_with_both_values() -> None:
    changed = load("small", ["num_layers=8", "mtp=none"])
    assert diff(load("small"), changed) == [
        ("num_layers", 6, 8),
        ("mtp.depth", 1, None),
        ("mtp.loss_weight", 0.3, None),
    ]


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_saved_spec_loads_as_an_equal_one_and_leaves_nothing_beside_it(tmp_path: Path, suffix: str) -> None:
    spec = load("demo")
    path = tmp_path / f"run.{suffix}"
    save(spec, path)
    assert load(path) == spec
    assert os.listdir(tmp_path) == [f"run.{suffix}"]


def test_saving_into_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot write '.*run.toml': No such file or directory"):
        save(load("tiny"), tmp_path / "no" / "run.toml")


def test_a_save_that_fails_half_way_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.toml"
    save(load("tiny"), path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SpecError, match="No space left on device"):
        save(load("small"), path)
    assert load(path) == load("tiny")
    assert os.listdir(tmp_path) == ["model.toml"]


def test_a_file_starts_from_a_preset_and_says_what_differs(tmp_path: Path) -> None:
    path = write(tmp_path, "m.toml", 'base = "small"\nname = "deep"\nnum_layers = 12\n[moe]\nnum_routed_experts = 64\n')
    spec = load_as(ModelSpec, path)
    assert [row[0] for row in diff(load("small"), spec)] == ["name", "num_layers", "moe.num_routed_experts"]


def test_a_base_may_be_a_file_beside_the_file_that_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    write(tmp_path, "a.toml", 'base = "tiny"\nnum_layers = 5\n')
    path = write(folder, "b.toml", 'base = "../a.toml"\nname = "b"\n')
    assert load_as(ModelSpec, path).num_layers == 5


def test_a_run_names_its_model_by_preset_or_file_or_table(tmp_path: Path) -> None:
    write(tmp_path, "m.toml", 'base = "tiny"\nnum_layers = 5\n')
    by_file = load_as(RunSpec, write(tmp_path, "r.toml", 'kind = "run"\nmodel = "m.toml"\n'))
    by_table = load_as(RunSpec, write(tmp_path, "s.toml", 'kind = "run"\n[model]\nbase = "tiny"\nnum_layers = 5\n'))
    assert by_file.model == by_table.model
    assert by_file.model.num_layers == 5


def test_a_file_may_drop_a_part_of_its_base(tmp_path: Path) -> None:
    assert load_as(ModelSpec, write(tmp_path, "m.toml", 'base = "small"\nmtp = "none"\n')).mtp is None


def test_another_kind_of_attention_replaces_that_of_the_base(tmp_path: Path) -> None:
    text = 'base = "small"\n[attention]\nkind = "gqa"\nnum_heads = 4\nnum_key_value_heads = 2\nhead_dim = 64\n'
    assert load_as(ModelSpec, write(tmp_path, "m.toml", text)).attention.kind == "gqa"


def test_a_file_that_is_its_own_base_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", 'base = "a.toml"\n')
    assert "refers to itself: a.toml -> a.toml" in error(path)


def test_a_circle_of_bases_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", 'base = "b.toml"\n')
    write(tmp_path, "b.toml", 'base = "./c.toml"\n')
    write(tmp_path, "c.toml", 'base = "a.toml"\n')
    assert "refers to itself: a.toml -> b.toml -> c.toml -> a.toml" in error(path)


def test_a_model_is_a_run_with_the_defaults_where_a_run_is_asked_for() -> None:
    run = load_as(RunSpec, "small", ["steps=3", "model.num_layers=2"])
    assert (run.name, run.steps, run.model.num_layers) == ("small", 3, 2)


def test_overrides_apply_in_order_and_through_parts_that_are_missing() -> None:
    spec = load_as(ModelSpec, "small", ["num_layers=3", "num_layers=4", "mtp=none", "mtp.depth=2"])
    assert spec.num_layers == 4
    assert spec.mtp is not None
    assert spec.mtp.depth == 2


@pytest.mark.parametrize(
    ("item", "value"),
    [
        ("name=v3", "v3"),
        ('name="a b"', "a b"),
        ("name=a=b", "a=b"),
        ("description=", ""),
        ("name=x # y", "x # y"),
        ("name=1\nnum_layers=9", "1\nnum_layers=9"),
    ],
)
def test_an_override_is_toml_or_else_text(item: str, value: str) -> None:
    spec = load_as(ModelSpec, "tiny", [item])
    assert getattr(spec, item.split("=")[0]) == value
    assert spec.num_layers == 3


@pytest.mark.parametrize("item", ["num_layers", "=3", "a..b=3", ".x=1"])
def test_an_override_without_path_or_value_shows_the_form(item: str) -> None:
    assert "is not of the form path=value" in error("tiny", item)


def test_an_override_through_a_number_is_refused() -> None:
    assert error("tiny", "num_layers.x=3") == "--set 'num_layers.x=3': num_layers is not a table; set it as a whole"


def test_an_override_replaces_the_model_of_a_run_by_name() -> None:
    assert load_as(RunSpec, "demo", ["model=tiny", "data.sequence_length=64"]).model == load("tiny")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("m.toml", "a = ", "not valid TOML"),
        ("m.json", "{", "not valid JSON"),
        ("m.json", "[1]", "holds a list, but a spec is a table"),
        ("m.json", "[" * 100_000, "nested too deeply"),
        ("m.toml", 'name = "x"', 'has no kind; add kind = "model"'),
        (
            "m.toml",
            'kind = "modle"',
            "kind = 'modle' is not one of model, cluster, parallel, run, workload, operator, search, kernel, kernels; "
            "nearest: model",
        ),
        ("m.toml", "kind = []", "kind = [] is not one of"),
        ("m.toml", "base = 3", "base = 3 must be the name of a preset or a path"),
        ("m.toml", 'base = "smal"', "'smal' is neither a preset nor a .toml or .json file; nearest: small"),
        ("m.toml", 'base = "no.toml"', "No such file or directory"),
    ],
)
def test_a_file_that_is_no_spec_says_why(tmp_path: Path, name: str, text: str, reason: str) -> None:
    assert reason in error(write(tmp_path, name, text))


def test_a_file_that_is_not_text_says_so(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in error(str(tmp_path / "m.toml"))


def test_a_folder_a_missing_file_and_a_zero_byte_name_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "d.toml").mkdir()
    assert "Is a directory" in error(str(tmp_path / "d.toml"))
    assert "No such file or directory" in error(str(tmp_path / "no.toml"))
    assert "cannot read" in error("a\0b.toml")


def test_the_wrong_kind_names_presets_of_the_right_one() -> None:
    text = error("small", kind="cluster")
    assert text.startswith("small is a model spec, but a cluster spec is needed here; presets: dgx-a100-512, ")
    with pytest.raises(SpecError, match="cluster spec is needed"):
        load_as(ClusterSpec, "tiny")


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_has_a_json_schema_of_its_fields(kind: str) -> None:
    schema = json_schema(kind)
    assert set(schema["properties"]) == set(KINDS[kind].model_fields)
    assert schema["additionalProperties"] is False


def test_the_schema_of_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(SpecError, match="nearest: model"):
        json_schema("modl")
