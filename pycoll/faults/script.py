"""What a seed stands for: ranks, groups, threads, calls, and the fault that befalls them. The same on every machine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pycoll.faults.calls import NEVER, Call
from pycoll.faults.operations import draw_call

Front = Literal["native", "c10d"]
Kind = Literal["none", "kill", "vanish", "stop", "delay", "raise", "abort", "close", "exit"]

PATIENT, IMPATIENT = 30.0, 1.5  # time-outs in seconds: none is to come, and one that a fault outlasts
LARGEST_BYTES = 4 << 20
KINDS: dict[Kind, int] = {
    "none": 10, "kill": 40, "vanish": 3, "stop": 12, "delay": 8, "raise": 12, "abort": 6, "close": 6, "exit": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Ranks, ascending, that one thread of each of them makes calls in."""

    ranks: tuple[int, ...]
    thread: int


@dataclass(frozen=True)
class Fault:
    """What goes wrong, where and when.

    Attributes:
        ranks: whom it befalls.
        thread, call: before which call of a thread; `call` is None where it comes at some time instead.
        after: seconds after the rank is ready, or, with `creation`, after the ranks are started.
        creation: it comes while the ranks still meet.
        lasts: seconds that a rank is stopped or delayed.
        group: which group is aborted or closed.
    """

    kind: Kind = "none"
    ranks: tuple[int, ...] = ()
    thread: int = 0
    call: int | None = None
    after: float = 0.0
    creation: bool = False
    lasts: float = 0.0
    group: int = 0

    @property
    def overruns(self) -> bool:
        """Whether somebody's time-out may pass meanwhile."""
        return self.lasts > IMPATIENT or (self.creation and self.kind == "kill")


@dataclass(frozen=True)
class Script:
    """All of one seed.

    Attributes:
        front: pycoll.Communicator, or torch.distributed.
        timeout: of the groups, in seconds.
        groups: numbered as calls name them.
        calls: of each thread, in order. A rank makes those of the groups that it is in.
        crash: a thread that gets an error makes no more calls and leaves its groups; otherwise it goes on.
        interpreter_ends: ranks leave everything open to the end of the interpreter.
        config: of the communicators; torch.distributed's groups have the default one.
    """

    seed: int
    world_size: int
    front: Front
    timeout: float
    groups: tuple[Group, ...]
    calls: tuple[tuple[Call, ...], ...]
    fault: Fault
    crash: bool
    interpreter_ends: bool
    config: tuple[tuple[str, int], ...]

    def calls_of(self, rank: int, thread: int) -> Iterator[Call]:
        """The calls that a rank makes in a thread."""
        for call in self.calls[thread]:
            ranks = self.groups[call.group].ranks
            if rank in ranks and call.takes_part(ranks.index(rank)):
                yield call

    def outcomes_of(self, rank: int) -> int:
        """How many calls of a rank end before its eyes, if all goes well."""
        calls = (call for thread in range(len(self.calls)) for call in self.calls_of(rank, thread))
        return sum(call.wait_of(self.groups[call.group].ranks.index(rank)) != NEVER for call in calls)

    def __str__(self) -> str:
        """For people: one line a group and a call."""
        traits = [f"{self.world_size} ranks", self.front, f"time-out {self.timeout:g} s"]
        traits += ["errors end a thread"] * self.crash + ["the interpreter ends with all open"] * self.interpreter_ends
        lines = [f"seed {self.seed}: {', '.join(traits)}", f"  config {dict(self.config)}", f"  fault: {self.fault}"]
        lines += [f"  group {i}: ranks {g.ranks}, thread {g.thread}" for i, g in enumerate(self.groups)]
        for t, calls in enumerate(self.calls):
            lines += [f"  thread {t} call {i}: {call}" for i, call in enumerate(calls)]
        return "\n".join(lines)


def make_script(seed: int) -> Script:
    """The script of `seed`."""
    rng = random.Random(seed)
    world_size = rng.randint(2, 8)
    front: Front = rng.choice(("native", "c10d"))
    threads = rng.choice((1, 1, 1, 2, 3))
    groups = _groups(rng, front, world_size, threads)
    calls = tuple(_calls(rng, front, groups, t) for t in range(threads))
    fault = _fault(rng, world_size, groups, calls)
    return Script(
        seed=seed,
        world_size=world_size,
        front=front,
        timeout=IMPATIENT if fault.overruns else PATIENT,
        groups=groups,
        calls=calls,
        fault=fault,
        crash=rng.random() < 0.3,
        interpreter_ends=rng.random() < 0.04,
        config=_config(rng) if front == "native" else (),
    )


def _groups(rng: random.Random, front: Front, world_size: int, threads: int) -> tuple[Group, ...]:
    """Every thread has groups of its own, so that the order of calls in each is defined."""
    everyone = tuple(range(world_size))
    groups = []
    for t in range(threads):
        for i in range(rng.choice((1, 1, 2, 3))):
            size = world_size if rng.random() < 0.4 else rng.randint(min(2, world_size), world_size)
            if rng.random() < 0.03:
                size = 1
            if front == "c10d" and t == 0 and i == 0:
                size = world_size  # torch.distributed has a group of all, which belongs to the first thread
            groups.append(Group(tuple(sorted(rng.sample(everyone, size))), t))
    return tuple(groups)


def _calls(rng: random.Random, front: Front, groups: tuple[Group, ...], thread: int) -> tuple[Call, ...]:
    mine = [i for i, group in enumerate(groups) if group.thread == thread]
    count = rng.randint(4, 30)
    calls = []
    for i in range(count):
        group = rng.choice(mine)
        size = len(groups[group].ranks)
        calls.append(draw_call(rng, front, group, size, _message_bytes(rng), i, count))
    return tuple(calls)


def _message_bytes(rng: random.Random) -> int:
    """Mostly small, so that a seed is quick: what matters is the order of events."""
    kind = rng.random()
    if kind < 0.1:
        return 0
    if kind < 0.93:
        return round(2 ** rng.uniform(0, 16))
    return round(2 ** rng.uniform(16, LARGEST_BYTES.bit_length() - 1))


def _config(rng: random.Random) -> tuple[tuple[str, int], ...]:
    """Small slots and buffers make many rounds of a small message, and several channels of it."""
    return (
        ("channels", rng.choice((1, 1, 2, 3))),
        ("slot_bytes", rng.choice((1 << 10, 1 << 14, 1 << 17))),
        ("link_bytes", rng.choice((1 << 9, 1 << 13, 1 << 16))),
        ("link_slots", rng.randint(2, 4)),
        ("heap_bytes", 1 << 28),
        ("one_shot_max_bytes", rng.choice((0, 1 << 10, 1 << 14))),
        ("channel_min_bytes", rng.choice((1 << 10, 1 << 16))),
    )


def _fault(
    rng: random.Random, world_size: int, groups: tuple[Group, ...], calls: tuple[tuple[Call, ...], ...]
) -> Fault:
    kind: Kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    group = rng.randrange(len(groups))
    rank = rng.choice(groups[group].ranks)
    thread = 0 if kind == "exit" else groups[group].thread
    at_a_call = kind in ("vanish", "delay", "exit") or rng.random() < 0.4
    call = rng.randrange(len(calls[thread])) if at_a_call else None
    after = 10 ** rng.uniform(-4.0, -0.7)
    ranks: tuple[int, ...] = (rank,)
    creation = False
    if kind == "none":
        return Fault()
    if kind == "kill" and not at_a_call:
        creation = rng.random() < 0.08
        if rng.random() < 0.15 and world_size > 2:
            ranks = tuple(sorted(rng.sample(range(world_size), 2)))
    if kind == "raise" and not at_a_call:
        thread = 0  # signals come to the main thread
    lasts = 0.0
    if kind in ("stop", "delay"):
        lasts = rng.uniform(1.6, 2.2) * IMPATIENT if rng.random() < 0.25 else 10 ** rng.uniform(-2.5, -0.6)
    return Fault(kind, ranks, thread, call, after, creation, lasts, group)
