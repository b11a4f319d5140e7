"""`pycoll train --plan`: what each rank of a run will need and send, from the settings alone; no model is made.

planned_memory and planned_calls say what is counted, and what is left out.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.filesize import decimal as in_bytes
from rich.table import Table

from pycoll.train.config import TrainConfig
from pycoll.train.planned_calls import Calls, calls_of
from pycoll.train.planned_memory import memory_of
from pycoll.train.planned_part import Part, make_parts


@dataclass(frozen=True)
class RankPlan:
    """Of the ranks of a pipeline stage, which are all alike; without a pipeline, of all ranks."""

    part: Part
    memory: dict[str, int]
    """Bytes at the peak of a step, by what they are for."""
    calls: list[Calls]
    """Of every step, but for the first one."""

    @property
    def total_memory(self) -> int:
        """Bytes of all."""
        return sum(self.memory.values())

    def totals(self) -> dict[str, tuple[int, int]]:
        """Call -> how many in a step, and their bytes, as totals in traces count them (pycoll.trace.dump)."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for some in self.calls:
            counts[some.call] += some.calls
            sizes[some.call] += some.bytes
        return {call: (counts[call], sizes[call]) for call in counts}


def make_plan(config: TrainConfig) -> list[RankPlan]:
    """Of each pipeline stage's ranks, in order. The settings are such that `config.can_be_planned`."""
    return [RankPlan(part, memory_of(part, config), calls_of(part, config)) for part in make_parts(config)]


def show_plan(config: TrainConfig, console: Console) -> None:
    """Prints it."""
    plans = make_plan(config)
    middle = sorted(plans[1:-1], key=lambda plan: plan.total_memory)[-1:]  # the one that needs most
    shown = [plans[0], *middle, *plans[1:][-1:]]
    ranks, model = config.dp * config.tp * config.pp, config.model
    console.print(
        f"{ranks} ranks: {config.dp} data x {config.tp} tensor x {config.pp} pipeline parallel;"
        f" a step: {config.grad_accum} x {config.batch_size} x {model.context} tokens of each data-parallel rank",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_memory_table(shown))
    console.print(_calls_table(shown))


def _memory_table(plans: Sequence[RankPlan]) -> Table:
    table = _table("memory of", plans)
    for name in plans[0].memory:
        table.add_row(name, *(in_bytes(plan.memory[name]) for plan in plans))
    table.add_section()
    table.add_row("together", *(in_bytes(plan.total_memory) for plan in plans))
    return table


def _calls_table(plans: Sequence[RankPlan]) -> Table:
    """A row for each thing that some rank does."""
    table = _table("calls and bytes a step of", plans)
    for cause in dict.fromkeys(some.cause for plan in plans for some in plan.calls):
        table.add_section()
        table.add_row(cause)
        for call in dict.fromkeys(some.call for plan in plans for some in plan.calls if some.cause == cause):
            table.add_row(f"  {call}", *(_sum(plan, cause, call) for plan in plans))
    table.add_section()
    table.add_row("together", *(_sum(plan) for plan in plans))
    table.add_row("from other ranks", *(in_bytes(sum(some.wire for some in plan.calls)) for plan in plans))
    return table


def _sum(plan: RankPlan, cause: str | None = None, call: str | None = None) -> str:
    """Calls and bytes of one row, or of all."""
    some = [each for each in plan.calls if cause is None or (each.cause, each.call) == (cause, call)]
    return f"{sum(each.calls for each in some):,}  {in_bytes(sum(each.bytes for each in some))}" if some else ""


def _table(title: str, plans: Sequence[RankPlan]) -> Table:
    table = Table()
    table.add_column(title)
    for plan in plans:
        table.add_column(plan.part.name, justify="right")
    return table
