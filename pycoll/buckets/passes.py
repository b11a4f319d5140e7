"""A backward pass as autograd runs it: when gradients come, when it ends, and when it ends without an end."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pycoll.buckets.bucket import Waitable
from pycoll.errors import UsageError

Watcher = TypeVar("Watcher")


@dataclass(eq=False)
class Pass:
    """A backward pass under way."""

    synchronizes: bool
    """Whether gradients are averaged at its end."""
    waiting: list[int]
    """Of each bucket, parameters without a gradient yet."""
    ready: set[Tensor] = field(default_factory=set)
    """Parameters that had theirs."""
    launched: int = 0
    """Buckets, in order."""
    works: list[Waitable] = field(default_factory=list)
    """Their calls."""
    grads: list[list[Tensor | None]] = field(default_factory=list)
    """Their gradients, which the parameters get back at the end."""
    begun: bool = False
    """A gradient has come: `torch.autograd.grad` makes passes without any."""
    over: bool = False
    """It has ended, or failed."""

    def wait(self) -> None:
        """Until no call of it is under way."""
        for work in self.works:
            work.wait()
        self.works.clear()


class _End:
    """What autograd calls at the end of the pass in which this was made, or drops where the pass raises."""

    def __init__(self, current: Pass, end: Callable[[Pass], None]) -> None:
        self._pass, self._end = current, end

    def __call__(self) -> None:
        try:
            self._end(self._pass)
        finally:
            self._pass.over = True

    def __del__(self) -> None:
        self._pass.over = True


class Passes:
    """Those over some buckets, one after the other.

    Attributes:
        last: the pass under way, or the one before; at first one that is over.
        number: how many have begun.
    """

    def __init__(self, params: Sequence[int]) -> None:
        """`params`: how many a bucket has."""
        self.last = Pass(False, [], over=True)
        self.number = 0
        self._params = params
        self._failed: list[Pass] = []  # whose calls may be under way

    def follow(self, synchronizes: bool, end: Callable[[Pass], None]) -> Pass:
        """The pass that autograd has begun in this thread, the innermost one, of which nothing is known yet.

        When it ends it is over, after `end` was called with it; where it raises it is over without.
        """
        current = self.add(Pass(synchronizes, [*self._params]))
        torch.autograd.Variable._execution_engine.queue_callback(_End(current, end))
        return current

    def add(self, current: Pass) -> Pass:
        """`current` comes next."""
        if self.last.works:
            self._failed.append(self.last)
        self.last = current
        return current

    def begin(self, current: Pass) -> None:
        """A gradient has come, the first of the pass.

        Raises:
            UsageError: nobody will tell when it ends.
        """
        current.begun = True
        for failed in self._failed:  # (B8)
            failed.wait()
        self._failed.clear()
        # Who compiles backward passes has imported it; to import it here would double the time of `import pycoll`.
        compiled_autograd = sys.modules.get("torch._dynamo.compiled_autograd")
        if compiled_autograd is not None and compiled_autograd.in_compiled_autograd_region:
            raise UsageError(
                "pycoll: compiled autograd ends its passes untold: compile the model, not its backward pass"
            )
        self.number += 1


def watch(
    watcher: Watcher, params: Sequence[Tensor], on_gradient: Callable[[Watcher, Tensor], None]
) -> Callable[[], object]:
    """Calls `on_gradient(watcher, param)` whenever a parameter's gradient is there, until `watcher` is dropped.

    Returns:
        What ends it before.
    """
    reference = weakref.ref(watcher)  # autograd keeps no watcher alive

    def hook(param: Tensor) -> None:
        if (alive := reference()) is not None:
            on_gradient(alive, param)

    handles = [param.register_post_accumulate_grad_hook(hook) for param in params]
    return weakref.finalize(watcher, _remove, handles)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
