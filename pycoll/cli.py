"""The `pycoll` command. Bad input ends with status 2, another error with 1, each in one line."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pycoll.errors import Error, UnsupportedError, UsageError

BENCHMARKS = {
    "adam": ("pycoll.benchmarks.adam", "AdamBench"),
    "all-reduce": ("pycoll.benchmarks.all_reduce", "AllReduceBench"),
    "buckets": ("pycoll.benchmarks.buckets", "BucketsBench"),
    "collectives": ("pycoll.benchmarks.collectives", "CollectivesBench"),
    "convergence": ("pycoll.benchmarks.convergence", "ConvergenceBench"),
    "gpu": ("pycoll.benchmarks.gpu", "GpuBench"),
    "local-group": ("pycoll.benchmarks.local_group", "LocalGroupBench"),
    "relaxed": ("pycoll.benchmarks.relaxed", "RelaxedBench"),
    "step": ("pycoll.benchmarks.step", "StepBench"),
    "training": ("pycoll.benchmarks.training", "TrainingBench"),
}
"""Subject -> module and the class of its settings; the module's `main` takes them and returns the exit status."""
BENCHMARK_HELP = {
    "adam": "a step of AdamW",
    "buckets": "packing, averaging and measuring gradient buckets, in every wire format",
    "convergence": "what the trainer learns, in each way that it has",
    "relaxed": "local SGD, DiLoCo and asynchronous training beside synchronous, at equal tokens",
    "step": "a step of data-parallel training, from local gradients to new parameters everywhere",
    "training": "a whole step of training a GPT, data parallel and tensor parallel",
}
"""What is measured, where it is not a collective."""


@dataclass(frozen=True)
class Info:
    """Show what was built and what this machine offers."""

    json: bool = False
    """Print JSON instead of a table."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (by default this process's) and returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _choose("pycoll", "command", COMMANDS, arguments)
    except Error as error:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        Console(stderr=True).print(Text(f"error{rank}: {error}", style="red"), soft_wrap=True)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130


def train(arguments: Sequence[str]) -> int:
    """train a GPT on text over pycoll's collectives"""
    from pycoll.train.main import main as train_main  # Costs a second that the other commands need not wait.

    return train_main(arguments)


def bench(arguments: Sequence[str]) -> int:
    """measure collectives, optimizers, whole steps and the trainer beside other libraries and the machine's ceiling"""
    subjects = {name: _benchmark(name) for name in BENCHMARKS}
    return _choose("pycoll bench", "subject", subjects, arguments)


def faults(arguments: Sequence[str]) -> int:
    """play random collectives while ranks are killed, stopped and delayed, and judge what comes of it"""
    from pycoll.faults.campaign import Faults
    from pycoll.faults.campaign import main as faults_main

    return faults_main(tyro.cli(Faults, prog="pycoll faults", args=arguments))


def trace(arguments: Sequence[str]) -> int:
    """show what ranks did last, from what they left when they failed"""
    from pycoll.trace.main import main as trace_main

    return trace_main(arguments)


def info(arguments: Sequence[str]) -> int:
    """show what was built and what this machine offers"""
    import pycoll

    options = tyro.cli(Info, prog="pycoll info", args=arguments)
    facts = pycoll.info()
    if options.json:
        print(json.dumps(facts, indent=2, default=str))
        return 0
    table = Table(show_header=False)
    for name, value in _flatten(facts):
        table.add_row(name, value)
    Console().print(table)
    return 0


COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "bench": bench,
    "faults": faults,
    "trace": trace,
    "info": info,
}


def _choose(
    program: str, what: str, choices: Mapping[str, Callable[[Sequence[str]], int]], arguments: Sequence[str]
) -> int:
    """Calls the choice that the first argument names with the others, or explains what there is to choose."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"usage: {program} {what.upper()} [OPTIONS]", "", f"{what}s (each with --help):"]
        lines += [f"  {name:17}{choice.__doc__}" for name, choice in choices.items()]
        print("\n".join(lines))
        return 0 if arguments else 2
    if arguments[0] not in choices:
        raise UsageError(f"{program} has no {what} {arguments[0]!r}: choose one of {', '.join(choices)}")
    return choices[arguments[0]](arguments[1:])


def _benchmark(subject: str) -> Callable[[Sequence[str]], int]:
    module_name, settings = BENCHMARKS[subject]

    def run(arguments: Sequence[str]) -> int:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UnsupportedError(f"the benchmark needs the module {error.name}: install it with pip") from error
        config = tyro.cli(getattr(module, settings), prog=f"pycoll bench {subject}", args=arguments)
        return int(module.main(config))

    run.__doc__ = BENCHMARK_HELP.get(subject, f"{subject}, at each message size")
    return run


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, _readable(name, value)))
    return rows


def _readable(name: str, value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, int) and name.endswith("_bytes"):
        for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if value >= size:
                return f"{value / size:.4g} {unit}"
    return str(value)
