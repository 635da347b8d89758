"""``cofire plan layouts`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cofire.cli.main import main
from cofire.plan.formulas import formulas
from cofire.plan.layouts import LayoutRanking, SearchSpec, neighbours, rank_layouts, with_batch
from cofire.plan.step import StepModel
from cofire.spec import ClusterSpec, ModelSpec, WorkloadSpec, load_as

SMALL = load_as(ModelSpec, "small")
NODE = load_as(ClusterSpec, "h100-8")
# Few layouts, so that a test is fast.
FEW = [
    "search.precision=['bf16']",
    "search.ep=[1,8]",
    "search.schedule=['1f1b','dualpipe']",
    "search.zero_stage=[1]",
    "workload.sequence_length=1024",
]
FEW_SPEC = SearchSpec(precision=("bf16",), ep=(1, 8), schedule=("1f1b", "dualpipe"), zero_stage=(1,))
WORK = with_batch(WorkloadSpec(sequence_length=1024), NODE)


def words_of(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["plan", "layouts", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_small(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    return run(capsys, "small", "--cluster", "h100-8", "--workers", "1", *words_of(*FEW), *words)


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    code, out, err = run_small(capsys, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_json_is_the_ranking_that_the_library_gives(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_json(capsys, "--top", "4")
    expected = rank_layouts(SMALL, NODE, WORK, FEW_SPEC, limit=4)
    steps = StepModel(SMALL, NODE, WORK)
    assert LayoutRanking.model_validate(shown["ranking"]) == expected
    assert len(expected.best) == 4
    assert shown["neighbours"] == [row.model_dump() for row in neighbours(steps, expected.best[0])]
    assert shown["formulas"] == [row.model_dump() for row in formulas(steps, expected.best[0])]
    timing = shown["timing"]
    assert timing["layouts_per_s"] * timing["took_s"] == pytest.approx(expected.num_considered)


def test_workers_change_nothing_but_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    many = [change for change in FEW if "ep" not in change.partition("=")[0]]
    words = ["small", "--cluster", "h100-8", *words_of(*many), "--json"]
    shown = []
    for number in ("1", "2"):
        code, out, _ = run(capsys, *words, "--workers", number)
        assert code == 0
        shown.append(json.loads(out))
        assert shown[-1].pop("timing")["workers"] == int(number)
    assert shown[0] == shown[1]
    assert shown[0]["ranking"]["num_considered"] > 256, "more than one task, or processes are not used"


def test_the_note_shows_the_best_and_why_and_what_was_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_small(capsys, "--top", "3")
    ranking = rank_layouts(SMALL, NODE, WORK, FEW_SPEC, limit=3)
    first = ranking.best[0]
    assert (code, err) == (0, "")
    assert f"The best of {ranking.num_considered} layouts, {ranking.num_fitting} of which fit" in out
    assert f"What binds: {first.binds}, {first.part_s(first.binds) / first.step_s:.0%} of a step" in out
    for step in ranking.best:
        assert f"{step.step_s:.4g} s" in out
    for reason, number in ranking.refused.items():
        assert f"{reason}" in out
        assert f"{number}" in out
    for row in neighbours(StepModel(SMALL, NODE, WORK), first):
        assert row.change in out
    assert f"{ranking.num_considered} layouts in " in out
    assert "per second with 1 process(es)" in out


def test_explain_adds_the_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    plain, explained = (run_small(capsys, *words)[1] for words in ([], ["--explain"]))
    assert "Formulas, with the numbers in" not in plain
    assert "Formulas, with the numbers in" in explained
    first = rank_layouts(SMALL, NODE, WORK, FEW_SPEC).best[0]
    for row in formulas(StepModel(SMALL, NODE, WORK), first):
        assert row.result.split()[0] in explained


def test_an_axis_that_is_fixed_stays_and_the_rest_is_searched(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_json(capsys, *words_of("parallel.pp=2", "parallel.dp=4", "parallel.tp=1", "parallel.recompute=full"))
    layouts = [step["layout"] for step in shown["ranking"]["best"]]
    assert len(layouts) > 1
    for layout in layouts:
        assert (layout["pp"], layout["dp"], layout["tp"], layout["recompute"]) == (2, 4, 1, "full")
    assert len({layout["schedule"] for layout in layouts}) > 1


def test_both_objectives_give_one_order_and_cost_needs_a_price(capsys: pytest.CaptureFixture[str]) -> None:
    step, cost = (run_json(capsys, "--objective", name) for name in ("step", "cost"))
    assert step["ranking"] == cost["ranking"]
    usd = [row["usd_per_trillion_tokens"] for row in cost["ranking"]["best"]]
    assert usd == sorted(usd)
    code, out, err = run_small(capsys, "--objective", "cost", *words_of("cluster.device_hour_usd=none"))
    assert (code, out) == (2, "")
    assert "h100-8 has no price to rank by; set cluster.device_hour_usd=2.0" in err


def test_out_writes_the_json_document(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "layouts.json"
    shown = run_json(capsys, "--out", str(path))
    assert json.loads(path.read_text()) == shown


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["search.precision=['fp4']"], "search: precision = 'fp4' is not one of fp32, bf16, fp8"),
        (["search.zero_stage=[2]"], "zero_stage = 2 is not planned"),
        (["search.tp=[]"], "search.tp = [] leaves nothing to try"),
        (["search.tp=[0]"], "search: tp"),
        (["search.schedule=['gpipe']"], "search: schedule"),
        (["search.tpp=[1]"], "search: unknown key 'tpp'; nearest: tp"),
        (["search.tp=[1]", "parallel.tp=1"], "search.tp and parallel.tp exclude each other"),
        (["parallel.pp=3"], "pp = 3 must divide the 8 devices of h100-8; nearest: 2"),
        (["parallel.zero=3"], "parallel: unknown key 'zero'; nearest: zero_stage"),
        (["workload.global_batch_size=63", "parallel.dp=8"], "the batch does not divide"),
        (["cluster.device.memory_bytes=2e9"], "the smallest, pp "),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], changes: list[str], text: str
) -> None:
    code, out, err = run(capsys, "small", "--cluster", "h100-8", "--workers", "1", *words_of(*changes))
    assert (code, out) == (2, "")
    assert text in err
    assert err.startswith("cofire: ")
    assert err.count("\n") == 1


def test_numbers_below_one_and_other_suffixes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--top", "0"], ["--workers", "0"], ["--out", "layouts.txt"], ["--objective", "speed"]):
        code, out, err = run_small(capsys, *words)
        assert (code, out) == (2, "")
        assert words[0] in err
