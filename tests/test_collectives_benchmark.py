"""pycoll bench collectives: what it measures, the bars it holds pycoll to, and what it says of bad options."""

import json
from pathlib import Path

import pytest
from pycoll.benchmarks import collectives
from pycoll.benchmarks.collectives import Case, CollectivesBench

pytestmark = pytest.mark.timeout(100)


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ("all_gather", "send_recv", "barrier")
    config = CollectivesBench(sizes=("1KiB", "64KiB"), only=only, seconds=0.01, output=tmp_path)
    assert collectives.main(config) == 0
    said = capsys.readouterr().out
    assert "15 x Gloo" in said and "FAILED" not in said
    report = json.loads((tmp_path / "collectives-2-ranks.json").read_text())
    measured = {(row["who"], row["algorithm"], row["memory"], row["call"], row["size"]) for row in report["rows"]}
    for size, name in ((1024, "all_gather"), (65536, "send_recv"), (1024, "barrier")):
        for who, memory, call in (
            ("pycoll", "private", "native"),
            ("pycoll", "symmetric", "native"),
            ("pycoll", "private", "torch.distributed"),
            ("Gloo", "private", "torch.distributed"),
        ):
            assert (who, name, memory, call, size) in measured
        assert ("ceiling", "pipelined memcpy", "private", name, size) in measured
    assert not [row for row in report["rows"] if row["algorithm"] == "barrier" and row["size"] > 1024]
    assert (tmp_path / "collectives-2-ranks.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("case", "passed"),
    [
        (Case("barrier", 1024, 1e-6, None, None, 15e-6, None, None), True),
        (Case("barrier", 1024, 1e-6, None, None, 14e-6, None, None), False),
        (Case("all_to_all", 1 << 22, 1e-3, None, None, 9e-3, None, None), False),
        (Case("broadcast", 1 << 22, 1e-3, None, None, 1e-3, None, 0.81e-3), True),
        (Case("send_recv", 1 << 22, 1e-3, None, None, 9e-3, None, 0.79e-3), False),
        (Case("reduce", 1 << 22, 1e-3, None, None, 1.1e-3, None, None), True),
        (Case("reduce", 1 << 22, 1e-3, None, None, None, None, None), None),
    ],
)
def test_bars(case: Case, passed: bool | None) -> None:
    assert case.passed is passed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ranks": 3}, "even number"),
        ({"only": ("all_gather", "gossip")}, "no collective is called gossip"),
        ({"sizes": ("many",)}, "'many' is no size"),
        ({"sizes": ("100GiB",)}, "smaller --sizes"),
    ],
)
def test_bad_options(options: dict[str, object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert collectives.main(CollectivesBench(output=tmp_path, **options)) == 2  # type: ignore[arg-type]
    assert said in capsys.readouterr().err.replace("\n", " ")
