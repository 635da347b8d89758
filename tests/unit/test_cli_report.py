"""``cofire report`` and ``cofire claims`` as a user calls them."""

from __future__ import annotations

import json

from cofire.cli.main import main
from cofire.spec import RunSpec, dump, load_as


def write_short_run(folder):
    folder.mkdir()
    run = load_as(RunSpec, "demo", ["model=tiny", "steps=2"])
    (folder / "run.toml").write_text(dump(run))
    events = [
        {"event": "start", "step": 0, "unigram_entropy_nats": 5.0},
        {"event": "step", "step": 1, "main_loss": 6.0, "tokens_per_s": 100.0},
        {"event": "step", "step": 2, "main_loss": 4.0, "tokens_per_s": 100.0},
        {"event": "validation", "step": 2, "loss": 4.0, "bits_per_byte": 1.5},
        {"event": "end", "step": 2, "reason": "finished"},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_report_prints_the_headline_and_the_page(tmp_path, capsys):
    folder = write_short_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "tiny: trained for 2 steps" in output
    assert str(folder / "report.html") in output
    assert (folder / "report.html").is_file()


def test_report_prints_json(tmp_path, capsys):
    folder = write_short_run(tmp_path / "run")
    assert main(["report", str(folder), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["validation_loss"] == 4.0
    assert row["last_step"] == 2
    assert row["report"] == str(folder / "report.html")


def test_report_of_no_run_is_one_line_and_code_2(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is not a run folder: it has no run.toml" in error


def test_claims_are_listed_with_what_they_claim(capsys):
    assert main(["claims", "list", "--json"]) == 0
    rows = {row["name"]: row["claim"] for row in json.loads(capsys.readouterr().out)}
    assert rows["loss_free_balancing"].startswith("Loss-free balancing keeps expert load even")


def test_unknown_claim_names_the_nearest(capsys):
    assert main(["claims", "run", "loss_fre_balancing"]) == 2
    assert "nearest: loss_free_balancing" in capsys.readouterr().err


def test_exit_code_of_a_claim_is_passed_on(capfd):
    assert main(["claims", "run", "loss_free_balancing", "--steps", "0"]) == 2
    assert "--steps 0" in capfd.readouterr().err
