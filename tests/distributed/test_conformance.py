"""torch's own distributed test suite over pycoll, and the program that runs it, tests/conformance."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conformance import results
from conformance.main import main
from conformance.results import FAILED, FLAKY, HUNG, PASSED, SKIPPED, Result, Run

pytestmark = pytest.mark.timeout(300)

PROGRAM = Path(__file__).resolve().parent.parent / "conformance"
LIMIT = 200  # seconds for the suite at one world size; two idle cores take 30

# Gloo as what it is not to torch: a backend of a plugin. With DIES, rank 1 ends badly after each test.
RENAMED = """
import os
import torch.distributed as dist
from torch.distributed.distributed_c10d import ProcessGroupGloo

def create(options, _):
    return ProcessGroupGloo(options.store, options.group_rank, options.group_size, options.timeout)

def destroy_or_die(group=None):
    if group is None and dist.get_rank() == 1:
        os._exit(3)
    destroy(group)

dist.Backend.register_backend("renamed", create, extended_api=True, devices=["cpu"])
if "DIES" in os.environ:
    destroy, dist.destroy_process_group = dist.destroy_process_group, destroy_or_die
"""


def conformance(folder: Path, *arguments: str, **environ: str) -> tuple[subprocess.CompletedProcess[str], list[Run]]:
    """The program's end and its results; `folder` may hold a backend's module."""
    report = folder / "results.json"
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--json", str(report), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]), **environ},
        stdout=subprocess.PIPE,
        text=True,
        timeout=LIMIT + 60,
    )
    assert done.returncode in (0, 1), done.stdout
    runs = []
    for run in json.loads(report.read_text(encoding="utf-8"))["runs"]:
        found = {result["name"]: Result(**result) for result in run["results"]}
        runs.append(Run(run["backend"], run["world_size"], run["torch"], run["seconds"], found))
    return done, runs


def outcomes(run: Run) -> dict[str, str]:
    return {name: result.outcome for name, result in run.results.items()}


@pytest.mark.parametrize("world_size", (2, 4))
def test_pycoll_passes_what_gloo_passes(world_size: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--world-size", str(world_size), "--against", "baseline", "--limit", str(LIMIT)]
    done, _ = conformance(tmp_path, *options)
    with capfd.disabled():
        print(f"\n{done.stdout}")
    lacking = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["runs"][0]["passes_there_only"]
    assert done.returncode == 0 and not lacking, lacking


def test_pycoll_passes_what_torch_tests_with_mpi_alone(tmp_path: Path) -> None:
    """all_to_all of CPU tensors: torch's file has it for backends of that name."""
    done, runs = conformance(tmp_path, "--decide-as", "mpi", "--select", "all_to_all")
    assert done.returncode == 0, done.stdout
    assert all(len(run.names(PASSED)) >= 9 for run in runs), done.stdout


# The program


def test_a_test_that_does_not_end_is_hung(tmp_path: Path) -> None:
    """At 4 ranks test_barrier sleeps for 1.6 s."""
    select = "^test_(barrier|DistributedDataParallel)$"
    done, (run,) = conformance(tmp_path, "--backend", "gloo", "--world-size", "4", "--timeout", "1", "--select", select)
    assert done.returncode == 1
    assert outcomes(run) == {"test_barrier": HUNG, "test_DistributedDataParallel": SKIPPED}
    assert "not done after 1 s" in done.stdout
    assert "distributed_test.py" in run.results["test_barrier"].details, "where the ranks were"
    assert run.results["test_DistributedDataParallel"].reason.startswith("https://github.com/pytorch/pytorch/issues")


def test_backends_of_plugins_run_the_tests_of_gloo(tmp_path: Path) -> None:
    """Also those that choose by name, within the test or in torch: they fail for what a backend has to do, no more."""
    (tmp_path / "renamed.py").write_text(RENAMED)
    passing = ["get_backend", "accumulate_gradients_no_sync", "ddp_logging_data_cpu", "monitored_barrier_gloo"]
    names = [f"test_{name}" for name in [*passing, "all_reduce_sum"]]
    reference = {name: {"2": "passed"} for name in [*names, "test_not_selected"]}
    (tmp_path / "reference.json").write_text(json.dumps({"tests": {**reference, "test_get_backend": {"2": "failed"}}}))
    done, (run,) = conformance(
        tmp_path,
        *("--backend", "renamed", "--world-size", "2", "--select", f"^({'|'.join(names)})$"),
        *("--against", str(tmp_path / "reference.json")),
    )
    # Its events are called gloo:all_reduce.
    assert outcomes(run) == {**dict.fromkeys(names, PASSED), "test_all_reduce_sum": FAILED}
    assert "Expected 1 but got 0" in run.results["test_all_reduce_sum"].reason
    assert done.returncode == 1
    said = " ".join(done.stdout.split())  # its lines are wrapped
    assert "of 4 tests that pass with" in said
    assert "3 pass with renamed, and 1 more" in said


def test_ranks_that_die_after_the_test_are_seen(tmp_path: Path) -> None:
    (tmp_path / "renamed.py").write_text(RENAMED)
    _, (run,) = conformance(
        tmp_path, "--backend", "renamed", "--world-size", "2", "--select", "^test_get_backend$", DIES="1"
    )
    result = run.results["test_get_backend"]
    assert (result.outcome, result.reason) == (FAILED, "torch passes it, but ranks ended with exit codes {1: 3}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--select", "("], "no regular expression"),
        (["--world-size", "1"], "2 or more"),
        (["--jobs", "0"], "1 or more"),
        (["--timeout", "0.5"], "1 s or more"),
        (["--against", "none.json"], "No such file"),
        (["--backend", "gloo", "--write-baseline", "--select", "x"], "a baseline is of all tests"),
        (["--backend", "nosuch", "--world-size", "2"], "no module 'nosuch'"),
        (["--backend", "nosuch", "--world-size", "2", "--module", "json"], "torch knows no backend 'nosuch'"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def run_of(**found: str) -> Run:
    return Run("some", 2, "2.13.0+cpu", 1.0, {name: Result(name, outcome, outcome) for name, outcome in found.items()})


def test_repetitions_that_differ_are_flaky() -> None:
    run = run_of(a=PASSED, b=PASSED, c=FAILED, d=FAILED, e=SKIPPED)
    run.merge(run_of(a=PASSED, b=FAILED, c=PASSED, d=HUNG, e=SKIPPED))
    run.merge(run_of(a=PASSED, b=PASSED, c=PASSED, d=FAILED, e=SKIPPED))
    assert outcomes(run) == {"a": PASSED, "b": FLAKY, "c": FLAKY, "d": FAILED, "e": SKIPPED}
    assert run.results["b"].reason == run.results["c"].reason == FAILED
    assert run.seconds == 3


def test_baselines_are_read_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "BASELINES", tmp_path)
    run = run_of(a=PASSED, b=FLAKY, c=FAILED, d=SKIPPED)
    path = results.write_baseline([run])
    assert path.name == "some-torch-2.13.0.json"
    reference = results.read_json(path)
    assert reference == {2: outcomes(run)}
    assert results.lacking(run_of(a=FAILED, b=HUNG, c=FAILED, d=FAILED), reference) == ["a", "b"]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="no results"):
        results.read_json(tmp_path / "other.json")
