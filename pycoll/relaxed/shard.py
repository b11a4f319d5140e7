"""A server of `pycoll.ParameterServer`: one rank's shard of the weights, and the thread that takes pushes for it.

A1 to A8 are at the head of `parameter_server`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from fractions import Fraction
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pycoll.communicator import Communicator
from pycoll.errors import TimeoutError, UnsupportedError
from pycoll.optim import FusedAdam
from pycoll.relaxed.layout import Layout

PUSH, PULL = 0, 1
"""Tags of messages to a server, and from it."""
ELEMENTWISE = (FusedAdam, torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Optimizers of which a server can make its own, for pieces of parameters."""


class Server:
    """One shard: its weights, its optimizer, and the gradients that have come for it.

    Attributes:
        weights: of the shard, shape (shard_size,), fp32.
        answers: to each rank, the last one: what the weights were.
        clocks: gradients taken from each rank.
    """

    def __init__(
        self, communicator: Communicator, optimizer: torch.optim.Optimizer, layout: Layout, staleness: int
    ) -> None:
        self.communicator, self._layout, self._staleness = communicator, layout, staleness
        self._rank, world = communicator.rank, communicator.world_size
        self._peers = [rank for rank in range(world) if rank != self._rank]
        self.weights = torch.zeros(layout.shard_size, dtype=torch.float32, device="cpu")
        self._mean = torch.zeros_like(self.weights)
        self._own = layout.pieces(self._rank)
        self._pieces = [piece.of(self.weights) for piece in self._own]
        for tensor, piece in zip(self._pieces, self._own, strict=True):
            tensor.grad = piece.of(self._mean)
        self._optimizer = self._of_pieces(optimizer)
        self.clocks = [0] * world
        self._ended: set[int] = set()
        self._taken = 0  # messages of all workers
        self._pushes: dict[int, Tensor] = {}  # messages that have not been applied
        self._waiting: set[int] = set()  # workers, for an answer
        self.answers = [torch.empty_like(self.weights) for _ in range(world)]
        self._sends: dict[int, dist.Work] = {}
        self._inboxes = {peer: layout.new_message() for peer in self._peers}
        self._receives: dict[int, dist.Work] = {}
        self._arrived: SimpleQueue[int] = SimpleQueue()
        self._changed = threading.Condition()  # its lock guards all of this but the thread's receives
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name=f"pycoll server {self._rank}", daemon=True)

    def start(self) -> None:
        """Begins to take pushes."""
        self._thread.start()

    def close(self) -> None:
        """Closes the communicator, which ends the thread."""
        self.communicator.close()
        if self._thread is not threading.current_thread():  # which may collect garbage, too
            self._thread.join()

    @torch.no_grad()
    def take(self, worker: int, message: Tensor) -> None:
        """A push of `worker`, which leaves `message` as it is until it is answered (A2); answers who may go on."""
        with self._changed:
            try:
                self._taken += 1
                if self._layout.is_end(message):
                    self._ended.add(worker)
                else:
                    self.clocks[worker] += 1
                    self._pushes[worker] = message
                    self._waiting.add(worker)
                self._answer()
            finally:
                self._changed.notify_all()

    def await_answers(self, receives: dict[int, dist.Work]) -> None:
        """Until this server has answered its own rank's worker, and all others have (A6)."""
        self._await(lambda: self._rank not in self._waiting)
        deadline = time.monotonic() + self.communicator.timeout
        for peer, receive in receives.items():
            try:
                receive.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
            except TimeoutError:
                if receive.is_completed():  # the communicator's own
                    raise
                self._overdue(peer if self._may_go_on(self._rank) else self._least_far())

    def await_end(self) -> None:
        """Until every worker has ended (A7)."""
        self._await(lambda: len(self._ended) == len(self.clocks))

    def load(self, weights: Tensor, groups: Sequence[dict[str, Any]], states: Sequence[Mapping[str, Any]]) -> None:
        """The shard of new weights, the settings of the groups, and this shard of a state of each whole parameter."""
        with self._changed:
            for own, group in zip(self._optimizer.param_groups, groups, strict=True):
                own.update({name: value for name, value in group.items() if name != "params"})
            self.weights.copy_(weights)
            self._optimizer.state.clear()
            for piece, tensor in zip(self._own, self._pieces, strict=True):
                for name, value in states[piece.place].items():
                    if name == "step":
                        self._optimizer.state[tensor][name] = value.clone()
                    elif isinstance(value, Tensor) and name != "master_param":  # that are the weights themselves
                        self._optimizer.state[tensor][name] = piece.cut(value).float().clone()

    def state_names(self) -> list[str]:
        """Of the optimizer's state, the same for all of its parameters."""
        states = [self._optimizer.state.get(tensor, {}) for tensor in self._pieces[:1]]
        return [name for state in states for name, value in state.items() if isinstance(value, Tensor)]

    def elements_of(self, name: str) -> Tensor:
        """A state as fp32 elements of the shard, shape (shard_size,); a number is repeated for each."""
        elements = torch.zeros_like(self.weights)
        for piece, tensor in zip(self._own, self._pieces, strict=True):
            piece.of(elements).copy_(self._optimizer.state[tensor][name])
        return elements

    def _serve(self) -> None:
        try:
            for peer in self._peers:
                self._listen(peer)
            while not self._ended.issuperset(self._peers):
                peer = self._arrived.get()
                self._receives.pop(peer).wait()  # raises what it has met with, which the other ranks know by then
                self.take(peer, self._inboxes[peer])
                if peer not in self._ended:
                    self._listen(peer)
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _listen(self, peer: int) -> None:
        """A receive for the next push of a worker, which does not come before its last one is answered (A2)."""
        self._receives[peer] = self.communicator.irecv(self._inboxes[peer], peer, tag=PUSH)
        self._receives[peer].get_future().add_done_callback(lambda _: self._arrived.put(peer))

    def _answer(self) -> None:
        """Answers all who may go on, with weights by all that has come (A3, A4)."""
        ready = [worker for worker in sorted(self._waiting) if self._may_go_on(worker)]
        if not ready:
            return
        if self._pushes:
            try:
                self._apply()
            except BaseException as error:
                self.communicator.abort(f"its server failed: {error}")
                raise
        self._waiting.difference_update(ready)
        for worker in ready:
            if worker in self._sends:
                self._sends[worker].wait()  # has ended: it has pushed since
            answer = self.answers[worker].copy_(self.weights)
            if worker != self._rank:
                self._sends[worker] = self.communicator.isend(answer, worker, tag=PULL)

    def _apply(self) -> None:
        """One step by the mean of the gradients that have come (A4)."""
        pushes = [self._pushes[worker] for worker in sorted(self._pushes)]
        self._mean.copy_(self._layout.gradient(pushes[0]))
        for push in pushes[1:]:
            self._mean.add_(self._layout.gradient(push))
        self._mean.div_(len(pushes))
        rates = self._layout.rates(self._pushes[max(self._pushes, key=lambda worker: self.clocks[worker])])
        share = float(sum(Fraction(1, self._workers_at(self.clocks[worker])) for worker in self._pushes))
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        self._optimizer.step()
        self._pushes.clear()

    def _workers_at(self, step: int) -> int:
        """Workers that make a step of this number, as far as one can know."""
        return sum(worker not in self._ended or clock >= step for worker, clock in enumerate(self.clocks))

    def _may_go_on(self, worker: int) -> bool:
        return self.clocks[worker] - self.clocks[self._least_far()] <= self._staleness

    def _least_far(self) -> int:
        """The slowest worker that has not ended."""
        return min(set(range(len(self.clocks))) - self._ended, key=lambda worker: self.clocks[worker])

    def _await(self, holds: Callable[[], bool]) -> None:
        """Until `holds()`, as long as pushes come within the time-out."""
        with self._changed:
            taken = -1
            while not holds():
                if self._failure is not None:
                    raise self._failure
                if self._taken == taken:
                    self._overdue(self._least_far())
                taken = self._taken
                self._changed.wait(self.communicator.timeout)

    def _overdue(self, blamed: int) -> None:
        """Ends the communicator for a rank that did not come in time.

        Raises:
            TimeoutError: it.
        """
        name = self.communicator._impl.rank_name
        waited = f"has waited for {name(blamed)} for {self.communicator.timeout:g} s, after {self.clocks} steps of each"
        self.communicator.abort(waited)
        error = TimeoutError(f"pycoll: {name(self._rank)} {waited}")
        error.rank = blamed
        raise error

    def _of_pieces(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """One like `optimizer`, of this shard's pieces of its parameters."""
        if type(optimizer) not in ELEMENTWISE:
            raise UnsupportedError(
                f"pycoll: ParameterServer: a {type(optimizer).__name__} may not treat each element by itself, as a "
                f"shard needs: give one of {', '.join(each.__name__ for each in ELEMENTWISE)}"
            )
        places = {param: place for place, param in enumerate(self._layout.params)}
        groups = []
        for group in optimizer.param_groups:
            own = {places[param] for param in group["params"] if param in places}
            tensors = [tensor for piece, tensor in zip(self._own, self._pieces, strict=True) if piece.place in own]
            groups.append({**group, "params": tensors})
        kind: Callable[[Sequence[dict[str, Any]]], torch.optim.Optimizer] = type(optimizer)
        return kind(groups)
