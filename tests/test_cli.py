"""The `pycoll` command: what it offers, its exit statuses, and one line for each error."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

import pycoll
from pycoll import cli
from pycoll.errors import PeerLostError


def test_help_offers_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in ("train", "bench", "faults", "trace", "info"))


@pytest.mark.parametrize(
    "arguments",
    [[name, "--help"] for name in ("train", "faults", "trace", "info")]
    + [["bench", name, "--help"] for name in ("adam", "all-reduce", "buckets", "convergence", "relaxed", "step")],
)
def test_each_command_explains_itself(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    assert f"usage: pycoll {' '.join(arguments[:-1])}" in capsys.readouterr().out


def test_bench_names_its_subjects(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in ("adam", "all-reduce", "buckets", "step"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "error: pycoll has no command 'trian': choose one of train, bench, faults, trace, info\n"),
        (
            ["bench", "sort"],
            "error: pycoll bench has no subject 'sort': "
            "choose one of adam, all-reduce, buckets, collectives, convergence, gpu, local-group, relaxed, step, "
            "training\n",
        ),
        (
            ["train", "--data", "/nowhere"],
            "error: /nowhere does not exist: give --data a UTF-8 file or a folder of them\n",
        ),
    ],
)
def test_bad_input_ends_with_2_and_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--steps", "many"],
        ["train", "--steps", "0"],
        ["train", "--backend", "carrier-pigeon"],
        ["train", "--backend", "gloo", "--optimizer", "fused"],
        ["train", "--backend", "gloo", "--wire-dtype", "int8"],
    ],
)
def test_bad_values_end_with_2_and_name_the_option(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert arguments[-2] in capsys.readouterr().err


def test_no_command_ends_with_2_and_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: pycoll COMMAND" in capsys.readouterr().out


def test_other_errors_end_with_1_and_name_the_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> dict[str, str]:
        raise PeerLostError("rank 1 died [/red]")

    monkeypatch.setattr(pycoll, "info", fail)
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == "error (rank 0): rank 1 died [/red]\n"


def test_info_shows_every_fact(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == pycoll.info()["torch"]
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in facts if not isinstance(facts[name], dict))


def test_info_is_readable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pycoll, "info", lambda: {"cuda": {"slot_bytes": 3 << 19}, "levels": ["a", "b"]})
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "cuda.slot_bytes" in shown
    assert "1.5 MiB" in shown
    assert "a, b" in shown


@dataclass
class FakeBench:
    size: int = 1


def test_bench_runs_its_subject_and_passes_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(config: FakeBench) -> int:
        seen.append(config)
        return 7

    monkeypatch.setitem(
        sys.modules, "pycoll.benchmarks.all_reduce", SimpleNamespace(AllReduceBench=FakeBench, main=run)
    )
    assert cli.main(["bench", "all-reduce", "--size", "3"]) == 7
    assert seen == [FakeBench(size=3)]


def test_bench_names_a_missing_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.BENCHMARKS, "all-reduce", ("absent_module", "Settings"))
    assert cli.main(["bench", "all-reduce"]) == 1
    assert capsys.readouterr().err == "error: the benchmark needs the module absent_module: install it with pip\n"


def test_module_is_a_command_too(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "pycoll.train", "--data", str(tmp_path)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert (
        result.stderr
        == f"error: {tmp_path} holds no text: give --data a UTF-8 file that is not empty, or a folder of them\n"
    )
