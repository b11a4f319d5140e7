"""What became of each test, as a file, and two backends compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED, HUNG, NOT_RUN, FLAKY = "passed", "failed", "skipped", "hung", "not run", "flaky"
OUTCOMES = (PASSED, FAILED, HUNG, SKIPPED, NOT_RUN, FLAKY)
BASELINES = Path(__file__).resolve().parent / "baselines"

Outcomes = Mapping[int, Mapping[str, str]]
"""World size -> test -> outcome."""


@dataclass(frozen=True)
class Result:
    """One test at one world size.

    Attributes:
        name: as in torch's suite.
        outcome: one of OUTCOMES.
        reason: why it was skipped, in torch's words, or what failed, in a line or two.
        seconds: how long it took.
        details: of a failure: torch's report and the end of what the ranks printed.
    """

    name: str
    outcome: str
    reason: str = ""
    seconds: float = 0.0
    details: str = ""


@dataclass
class Run:
    """All tests of one backend at one world size."""

    backend: str
    world_size: int
    torch: str = ""
    seconds: float = 0.0
    results: dict[str, Result] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Outcome -> how many tests."""
        counted = Counter(result.outcome for result in self.results.values())
        return {outcome: counted[outcome] for outcome in OUTCOMES}

    def names(self, *outcomes: str) -> list[str]:
        """The tests that ended so."""
        return [name for name, result in self.results.items() if result.outcome in outcomes]

    def merge(self, other: Run) -> None:
        """Adds a repetition. A test that passes in one and not in another is flaky, and keeps the reason."""
        self.seconds += other.seconds
        for name, result in other.results.items():
            before = self.results.get(name, result)
            if PASSED in (before.outcome, result.outcome) and before.outcome != result.outcome:
                worse = before if result.outcome == PASSED else result
                self.results[name] = replace(worse, outcome=FLAKY)
            elif before.outcome != FLAKY:
                self.results[name] = result


def outcomes_of(runs: Sequence[Run]) -> dict[int, dict[str, str]]:
    """World size -> test -> outcome."""
    return {run.world_size: {name: result.outcome for name, result in run.results.items()} for run in runs}


def lacking(run: Run, reference: Outcomes) -> list[str]:
    """The tests of `run` that pass in the reference at this world size, be it not every time, and not in `run`."""
    return [name for name in passing(run, reference) if run.results[name].outcome != PASSED]


def passing(run: Run, reference: Outcomes) -> list[str]:
    """The tests of `run` that pass in the reference at this world size, be it not every time."""
    outcomes = reference.get(run.world_size, {})
    return [name for name in run.results if outcomes.get(name) in (PASSED, FLAKY)]


def write_json(path: Path, runs: Sequence[Run], against: str | None, reference: Outcomes) -> None:
    """All results, and what is lacking."""
    content: dict[str, Any] = {"against": against, "runs": []}
    for run in runs:
        facts = {"counts": run.counts(), "passes_there_only": lacking(run, reference)}
        content["runs"].append({**asdict(run), "results": [asdict(r) for r in run.results.values()], **facts})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[int, dict[str, str]]:
    """World size -> test -> outcome, from a file of `write_json` or of `write_baseline`.

    Raises:
        ValueError: it is neither.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    found: dict[int, dict[str, str]] = {}
    if isinstance(content, dict) and "runs" in content:
        for run in content["runs"]:
            found[run["world_size"]] = {result["name"]: result["outcome"] for result in run["results"]}
    elif isinstance(content, dict) and "tests" in content:
        for name, outcomes in content["tests"].items():
            for world_size, outcome in outcomes.items():
                found.setdefault(int(world_size), {})[name] = outcome
    else:
        raise ValueError(f"{path} holds no results of this program")
    return found


def baseline_path(backend: str, torch: str) -> Path:
    """Where the committed outcomes of a backend in a version of torch are, or would be."""
    return BASELINES / f"{backend}-torch-{torch.split('+')[0]}.json"


def write_baseline(runs: Sequence[Run]) -> Path:
    """Writes the outcomes, a test a line, so that two versions can be compared by eye. Returns where."""
    path = baseline_path(runs[0].backend, runs[0].torch)
    outcomes = outcomes_of(runs)
    names = sorted({name for run in runs for name in run.results})
    lines = []
    for name in names:
        of_test = {str(size): outcomes[size][name] for size in sorted(outcomes) if name in outcomes[size]}
        lines.append(f"  {json.dumps(name)}: {json.dumps(of_test)}")
    head = {"backend": runs[0].backend, "torch": runs[0].torch.split("+")[0]}
    opening = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    text = "{\n" + opening + ',\n "tests": {\n' + ",\n".join(lines) + "\n }\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
