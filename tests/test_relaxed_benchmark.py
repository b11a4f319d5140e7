"""pycoll bench relaxed: a short run of every way, what it says of them, and bad options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pycoll.benchmarks import relaxed
from pycoll.benchmarks.relaxed_ranks import REFERENCE, RelaxedBench, cases

pytestmark = pytest.mark.timeout(100)


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RelaxedBench(steps=200, every=2, batch_size=2, output=tmp_path, quick=True)
    assert relaxed.main(config) == 0
    runs = {run["case"]: run for run in json.loads((tmp_path / "relaxed-2-ranks.json").read_text())["runs"]}
    said = capsys.readouterr().out
    assert [*runs] == [*cases(2)] and all(case in said for case in runs)
    for run in runs.values():
        assert run["tokens"] == [2 * 2 * 64 * (step + 1) for step in range(10)]
        assert 4 < run["final"] < 5.6 and abs(run["losses"][0] - runs[REFERENCE]["losses"][0]) < 1e-4
    sent = {case: run["sent"] for case, run in runs.items()}
    fp32 = sent["DiLoCo, every 2"]
    assert sent["local SGD, every 2"] == fp32 == pytest.approx(sent[REFERENCE] / 2, rel=0.05)
    assert sent["DiLoCo, every 2, int8"] == pytest.approx(fp32 / 4, rel=0.05)
    assert runs["asynchronous, staleness 0"]["ahead"] == 0
    assert (tmp_path / "relaxed-2-ranks.png").stat().st_size > 1000


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert relaxed.main(RelaxedBench(every=0, output=tmp_path)) == 2
    assert "at least 1" in capsys.readouterr().err
