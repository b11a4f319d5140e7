"""The method of timing that all benchmarks share: which sizes, how many calls and samples, which statistics.

A *sample* is a number of calls one after another, enough to last 2 ms or more (one call, where it is long by
itself), timed on every rank; the sample's value is the slowest rank's time a call, because a collective is done when
its last rank has the result. Contenders take turns: every round takes one sample of each, in rotating order, so that
whatever else the machine does hits all alike. The time reported is the median over rounds.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SAMPLE_SECONDS = 2e-3
MAX_CALLS = 10_000

_UNITS = {"": 1, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True)
class Timing:
    """Statistics of one contender at one size; times in seconds a call."""

    median: float
    minimum: float
    quartile_1: float
    quartile_3: float
    samples: int
    calls: int  # in each sample


@dataclass(frozen=True)
class Effort:
    """How long to measure one size: for `seconds`, but at least `min_rounds` and at most `max_rounds`."""

    seconds: float
    min_rounds: int
    max_rounds: int

    def part(self, rounds: int, seconds: float) -> float:
        """What part of the work is done after `rounds` and `seconds`."""
        slowest = min(rounds / self.min_rounds, seconds / self.seconds)
        return min(1.0, max(slowest, rounds / self.max_rounds))

    def enough(self, rounds: int, seconds: float) -> bool:
        """Whether to stop after `rounds` and `seconds`."""
        return self.part(rounds, seconds) >= 1.0


def summarize(samples: Sequence[float], calls: int) -> Timing:
    """Statistics of `samples`, in seconds a call."""
    if len(samples) == 1:
        first = third = samples[0]
    else:
        first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(statistics.median(samples), min(samples), first, third, len(samples), calls)


def calls_per_sample(seconds: float) -> int:
    """How many calls of `seconds` each make a sample."""
    return min(MAX_CALLS, max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9))))


def parse_bytes(text: str) -> int:
    """'8', '8B', '1KiB', '256 MiB' or '1GiB' in bytes.

    Raises:
        ValueError: `text` is none of these.
    """
    match = re.fullmatch(r"(\d+)\s*(|KI|MI|GI)B?", text.strip().upper())
    if not match:
        raise ValueError(f"{text!r} is no size: write it like 8, 1KiB or 256MiB")
    return int(match[1]) * _UNITS[match[2]]


def format_bytes(size: int) -> str:
    """`size` in the largest unit that divides it."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size and size % factor == 0:
            return f"{size // factor} {unit}"
    return f"{size} B"


def sizes(smallest: int, largest: int, factor: int, itemsize: int) -> list[int]:
    """From `largest` down by `factor`, then `smallest`; ascending, in whole elements.

    Raises:
        ValueError: the bounds or the factor make no list.
    """
    if factor < 2:
        raise ValueError(f"the factor between sizes must be 2 or more, not {factor}")
    if not itemsize <= smallest <= largest:
        raise ValueError(
            f"sizes must rise from an element's {itemsize} bytes or more, not from {smallest} to {largest}"
        )
    found = {smallest - smallest % itemsize}
    size = largest
    while size > smallest:
        found.add(size - size % itemsize)
        size //= factor
    return sorted(found)
