"""pycoll bench buckets: what it measures, the bytes that it counts, its bars, and what it says of bad options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pycoll.benchmarks import buckets, report, timing
from pycoll.benchmarks.bucket_ranks import (
    ALL_REDUCE,
    CASES,
    COMPRESS,
    FOREACH,
    GLOO,
    MEASURE,
    PACKS,
    PYCOLL,
    moved_bytes,
)
from pycoll.benchmarks.buckets import BucketsBench, BucketsReport

pytestmark = pytest.mark.timeout(100)

MACHINE = {"cpu": "a CPU", "cores": 2, "kernel": "6.1", "date": "2026-01-02T03:04:05"}


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert buckets.main(BucketsBench(sizes=("64KiB", "1MiB"), seconds=0.01, quick=True, output=tmp_path)) == 0
    assert "FAILED" not in capsys.readouterr().out
    found = json.loads((tmp_path / "buckets-2-ranks.json").read_text())
    measured = {(row["who"], row["algorithm"]) for row in found["rows"]}
    assert {row["size"] for row in found["rows"]} == {2**16}
    for case in CASES:
        assert {(PYCOLL, case), (report.CEILING, case)} <= measured
        assert ((FOREACH, case) in measured) == (case in PACKS and not case.endswith("int8"))
        assert all(((who, case) in measured) == (case not in PACKS) for who in (GLOO, ALL_REDUCE, MEASURE))
    assert (COMPRESS, "pack float32 as bfloat16") in measured
    assert all(row["rate"] > 0 and row["moved"] > 0 for row in found["rows"])
    assert (tmp_path / "buckets-2-ranks.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("case", "who", "moved"),
    [
        ("pack float32 as float32", PYCOLL, 8 * 1024),
        ("pack bfloat16 as float16", FOREACH, 4 * 1024),
        ("pack float16 as int8", PYCOLL, (2 + 8) * 1024 + 1040),
        ("reduce bfloat16", PYCOLL, 6 * 1024),
        ("reduce bfloat16", MEASURE, 2 * 1024),
        ("reduce int8", PYCOLL, 1040 + 4 * 1024),
    ],
)
def test_bytes_that_must_move(case: str, who: str, moved: int) -> None:
    assert moved_bytes(case, who, 1024) == moved


def judged(seconds: dict[str, float]) -> list[bool | None]:
    rows = [
        report.Row(2**20, who, case, "private", "bucket", timing.summarize([value], 1), None)
        for who, value in seconds.items()
        for case in CASES
    ]
    found = BucketsReport("buckets", 2, "float32", MACHINE, rows=rows)
    return [bar.passed for bar in buckets.bars_of(found)]


def test_bars() -> None:
    fast = {PYCOLL: 1.0, FOREACH: 0.95, COMPRESS: 2.0, GLOO: 4.1}
    assert judged(fast) == [True] * 13
    assert judged({**fast, PYCOLL: 2.1}) == [False] * 13
    assert judged({PYCOLL: 1.0}) == [None] * 13


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ranks": 1}, "2 ranks or more"),
        ({"sizes": ("1000",)}, "multiples of 8 KiB"),
        ({"sizes": ()}, "multiples of 8 KiB"),
        ({"sizes": ("100GiB",)}, "smaller --sizes"),
    ],
)
def test_bad_options(options: dict[str, object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert buckets.main(BucketsBench(output=tmp_path, **options)) == 2  # type: ignore[arg-type]
    assert said in capsys.readouterr().err.replace("\n", " ")
