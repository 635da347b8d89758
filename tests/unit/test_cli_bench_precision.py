"""``cofire bench precision`` as a user types it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from cofire.cli.main import main
from cofire.errors import PrecisionError
from cofire.precision.survey import DISTRIBUTIONS, draw, noise_table, signal_to_noise_db


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["bench", "precision", "--rows", "16", "--k", "512", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_json_holds_every_format_and_both_ladders(capsys):
    code, out, _ = run(capsys, "--json")
    found = json.loads(out)
    assert code == 0
    assert {row["distribution"] for row in found["formats"]} == set(DISTRIBUTIONS)
    assert len({row["format"] for row in found["formats"]}) * len(DISTRIBUTIONS) == len(found["formats"])
    assert [row["interval"] for row in found["ladder"]["positive"]] == [None, 2048, 512, 128, 32]
    assert run(capsys, "--json")[1] == out


def test_tables_and_a_plot_are_for_people(capsys, tmp_path):
    code, out, _ = run(capsys, "--plot", str(tmp_path / "p.png"))
    assert code == 0
    assert "logfmt-8" in out
    assert "never" in out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path):
    code, _, err = run(capsys, "--plot", str(tmp_path / "missing" / "p.png"))
    assert code == 2
    assert "name a folder that is there" in err
    assert run(capsys, "--plot", "p.jpg")[0] == 2
    assert run(capsys, "--rows", "0")[0] == 2


def test_formats_come_in_the_order_of_the_paper_on_every_distribution():
    for distribution in DISTRIBUTIONS:
        found = {row.format: row.snr_db for row in noise_table(64) if row.distribution == distribution}
        assert found["logfmt-8"] > found["e4m3"] + 3 > found["e5m2"] + 6
        assert found["bf16"] > found["logfmt-10"] > found["logfmt-8"] > found["logfmt-6"]
        assert (found["e4m3"] > found["e4m3, one scale"] + 6) == (distribution == "outlier")


def test_distributions_have_the_moments_that_their_names_promise():
    gaussian, laplace = draw("gaussian", 512).double(), draw("laplace", 512).double()
    assert gaussian.var().item() == pytest.approx(1.0, rel=0.02)
    assert laplace.var().item() == pytest.approx(2.0, rel=0.03)
    assert laplace.pow(4).mean().item() / laplace.var().item() ** 2 == pytest.approx(6.0, rel=0.1)
    # Half of Student's t with three degrees of freedom lies within 0.7649.
    inside = (draw("student-t3", 512).abs() < 0.7649).double().mean().item()
    assert inside == pytest.approx(0.5, abs=0.005)
    assert signal_to_noise_db(torch.ones(3), torch.ones(3)) == math.inf
    assert signal_to_noise_db(torch.ones(4), torch.full((4,), 0.9)) == pytest.approx(20.0, abs=1e-5)
    with pytest.raises(PrecisionError, match="not one of gaussian"):
        draw("cauchy", 4)
