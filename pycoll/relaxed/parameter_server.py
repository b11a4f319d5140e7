"""A parameter server among the ranks: asynchronous training with bounded staleness.

Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", 2013; Li et al., "Scaling
Distributed Machine Learning with the Parameter Server", 2014. Each rank is a *worker*, the training loop in its own
thread, and a *server* of one part of the weights, in another (`shard`). There is no other process. What holds:

- A1. Who holds what. The weights lie side by side in fp32, in equal shards. Server `r` has shard `r` alone: its
  weights, the optimizer's state for them, and the gradients that have come for them. Nobody else changes these. All
  shards begin as rank 0's weights. A worker has a copy of all weights, its model.
- A2. What travels. A *push* is one message from a worker to a server: the gradient of the shard, and the learning rates
  of its step. An *answer* is the shard's weights. To every push comes one answer, and a worker pushes
  to all servers, then awaits all answers: of a worker a server never has more than one push to answer.
- A3. Clocks. Each server counts the pushes that it has taken from each worker: its clock. Who has ended (A7) is not
  waited for. A server answers a worker when its clock exceeds the least by at most `staleness`. So a worker begins
  its step `c` (the first is 0) only when every server has at least `c - staleness` gradients of every worker.
- A4. What is applied when. Before a server answers it applies all that has come: the mean, in rank order, of the `k`
  gradients, in one step of the optimizer, at the learning rate times `k / n`, for `n` workers that make that step (of
  those who have ended, who has made it). So an answer holds all gradients of the steps before `c - staleness` of
  everybody (Ho et al.'s guarantee of reads), and whatever else the server had; and every gradient counts once. With
  `staleness` 0 these are the gradients of one step and nothing else: the bits of data-parallel training whose
  gradients are averaged in fp32.
- A5. Progress. The worker of the least clock is answered at once, so who waits for whom has no cycle. A server waits
  for nothing but pushes: answers are copies, sent while it goes on. A worker that reads slowly delays itself alone.
- A6. Time. A worker waits for its turn as long as pushes of others come within the communicator's time-out, which can
  be few, and then for the other answers, for one time-out; else it ends the communicator, naming the worker of the
  least clock, or the server. A server has no such limit, since a worker may compute for as long as nobody waits for
  it: its receives end with the loss of a rank, or with the communicator. `close` is what ends it always.
- A7. End. A worker that ends says so in place of a push, to all servers, after its last answer; it may have made fewer
  steps than others. Its server goes on until all workers have ended. Then no gradient is under way anywhere; the
  weights of all shards are gathered on all ranks, which end together with the same bits.
- A8. Loss. The shard of a rank that died, raised or left is lost, so nobody goes on: PeerLostError or what it raised,
  on all ranks. A server has a receive under way from each worker that has not ended, so it learns of a loss while its
  own worker computes; the worker raises it in its next step. Who closes without having ended tells the others.
"""

from __future__ import annotations

import json
import weakref
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from pycoll.communicator import Communicator
from pycoll.errors import UsageError
from pycoll.relaxed.layout import Layout
from pycoll.relaxed.shard import PULL, PUSH, Server
from pycoll.relaxed.weights import Weights, communicator_of


class ParameterServer:
    """Asynchronous training: `server.step()` takes the place of `optimizer.step()`.

    Every rank works, and serves a part of the weights, where the optimizer's updates are made as gradients come. A rank
    that is more than `staleness` steps ahead of the slowest waits. With `staleness` 0 the weights are bit for bit those
    of DataParallel with the same optimizer; else they depend on who came when.

        server = ParameterServer(optimizer, staleness=2)
        with server:
            for inputs, targets in batches:  # ranks may have different numbers of them
                optimizer.zero_grad()
                loss_of(model, inputs, targets).backward()
                server.step()
        # all ranks have the same weights

    The optimizer's own `step` is never called, and its state stays empty: it tells the settings, and at each step the
    learning rates, which a scheduler may change. Gradients are clipped by each rank, before they are averaged; one that
    is None counts as zero. Beside the model a rank keeps about four times its weights in fp32, and its part of the
    optimizer's state. The module's head says what holds in between, and what becomes of lost ranks.

    Attributes:
        steps: of this rank, so far.
        bytes_sent: of gradients, to the other ranks, in one step.
        bytes_received: of weights, from them.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        communicator: Communicator | dist.ProcessGroup | None = None,
        *,
        staleness: int,
    ) -> None:
        """A call that all ranks make. Their parameters become rank 0's.

        Args:
            optimizer: of the model's parameters on the CPU, float32, bfloat16 or float16: a FusedAdam, or
                torch.optim.SGD, Adam or AdamW, which treat each element by itself. Its state, where it has any, is
                where the servers' begins.
            communicator: of the ranks that train together, which is used for nothing else and closed with this; or a
                process group, whose ranks make one of their own; None: the default group's.
            staleness: steps that a rank may be ahead of the slowest.

        Raises:
            UsageError: `staleness` is below 0; nothing requires a gradient; or the optimizer is a ShardedAdam.
            UnsupportedError: a parameter of another dtype, device or layout; another optimizer.
            MismatchError: the ranks' parameters differ in size or dtype.
        """
        if staleness < 0:
            raise UsageError(f"pycoll: staleness must be 0 steps or more, not {staleness}")
        self.optimizer = optimizer
        self._weights = Weights(optimizer)
        self.communicator = communicator_of(communicator)
        self.rank, self.world_size = self.communicator.rank, self.communicator.world_size
        self._weights.begin_equal(self.communicator)
        self._layout = Layout(self._weights.params, self.world_size, len(optimizer.param_groups))
        self._flat = torch.zeros(self.world_size, self._layout.shard_size, dtype=torch.float32, device="cpu")
        self._messages = [self._layout.new_message() for _ in range(self.world_size)]
        self._server = Server(self.communicator, optimizer, self._layout, staleness)
        self._load()
        self._peers = [rank for rank in range(self.world_size) if rank != self.rank]
        self.steps = 0
        self.bytes_sent = sum(self._messages[peer].nbytes for peer in self._peers)
        self.bytes_received = sum(self._flat[peer].nbytes for peer in self._peers)
        self._ended = False
        self._stop = weakref.finalize(self, self._server.close)  # also where it is dropped, or the interpreter ends
        self._server.start()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's, whose "lr" is read at each step."""
        return self.optimizer.param_groups

    @property
    def clocks(self) -> list[int]:
        """Steps of each rank whose gradients this one's server has taken."""
        return list(self._server.clocks)

    @torch.no_grad()
    def step(self) -> None:
        """Pushes the gradients, awaits its turn, and takes new weights.

        Raises:
            UsageError: it has ended or was closed.
            PeerLostError: a rank has died or left. Terminal.
            TimeoutError: a rank did not come so far in time. Terminal.
            UnsupportedError: a gradient is sparse.
        """
        self._require_going()
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._layout.fill(self._messages, [param.grad for param in self._weights.params], rates)
        receives = {peer: self.communicator.irecv(self._flat[peer], peer, tag=PULL) for peer in self._peers}
        sends = self._push()
        self._server.await_answers(receives)
        for send in sends:
            send.wait()
        self.steps += 1
        self._flat[self.rank] = self._server.answers[self.rank]
        self._take()

    def finish(self) -> None:
        """Ends in order: this rank makes no further steps; when no rank does, all have the same weights.

        A call that all ranks make, each after its own last step.

        Raises: as `step`; the time-out is of a while in which no rank has made a step.
        """
        if self._ended:
            return
        self._require_going()
        self._messages = [self._layout.new_message() for _ in self._messages]
        sends = self._push()
        self._server.await_end()
        for send in sends:
            send.wait()
        self._gather()
        self._ended = True

    def synchronize(self) -> None:
        """All ranks get the weights as they are when each has made so many steps: to evaluate, or to save them.

        A call that all ranks make after the same number of steps, or after `finish`.
        """
        if not self._ended:
            self._require_going()
            self._gather()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Synchronizes, and returns the optimizer's whole state_dict, on every rank; it loads at any world size.

        A call that all ranks make after the same number of steps, or after `finish`. A parameter's "step" is what the
        server of its first element has counted: with `staleness` above 0 servers count differently.
        """
        if self.communicator.closed:
            raise UsageError("pycoll: the ParameterServer is closed: save its state before")
        self.synchronize()
        params = self._weights.params
        names = self._server.state_names()
        try:
            for name in self._agreed(names):
                self.communicator.all_gather(self._server.elements_of(name), out=self._flat.view(-1))
                for param, values in zip(params, self._layout.views(self._flat), strict=True):
                    one = name == "step"  # a number, which was repeated for each element
                    self.optimizer.state[param][name] = values.flatten()[:1].sum() if one else values.clone()
            self.communicator.all_gather(self._server.weights, out=self._flat.view(-1))
            for param, values in zip(params, self._layout.views(self._flat), strict=True):
                if param.dtype != torch.float32:
                    self.optimizer.state[param]["master_param"] = values.clone()
            return self.optimizer.state_dict()
        finally:
            self.optimizer.state.clear()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state_dict of its own or of its optimizer's class, and the weights that the model has now.

        A call that all ranks make, before the first step or when they have synchronized, with the same weights.

        Raises:
            ValueError: the groups do not match.
        """
        self._require_going()
        self.optimizer.load_state_dict(state_dict)
        self._load()
        self.communicator.barrier()  # no push comes before all have loaded

    def close(self) -> None:
        """Gives everything back, and closes the communicator. Without `finish` the other ranks get PeerLostError."""
        self._stop()

    def __enter__(self) -> ParameterServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """finish() and close(); after an error close() alone."""
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def _require_going(self) -> None:
        if self._ended or self.communicator.closed:
            raise UsageError("pycoll: the ParameterServer has ended: make a new one")

    def _push(self) -> list[dist.Work]:
        """The messages to all servers, the own one too."""
        sends = [self.communicator.isend(self._messages[peer], peer, tag=PUSH) for peer in self._peers]
        self._server.take(self.rank, self._messages[self.rank])
        return sends

    @torch.no_grad()
    def _load(self) -> None:
        """This rank's shard of the weights, and of the optimizer's state, which the optimizer gives up."""
        torch._foreach_copy_(self._layout.views(self._flat), self._weights.exact())
        states = [self.optimizer.state.get(param, {}) for param in self._weights.params]
        self._server.load(self._flat[self.rank], self.optimizer.param_groups, states)
        self.optimizer.state.clear()

    @torch.no_grad()
    def _gather(self) -> None:
        self.communicator.barrier()  # every push has been answered, so no shard changes any more
        self.communicator.all_gather(self._server.weights, out=self._flat.view(-1))
        self._take()

    def _take(self) -> None:
        self._weights.put(self._layout.views(self._flat))

    def _agreed(self, names: list[str]) -> list[str]:
        """Rank 0's, whose shard is never empty: the others' may be."""
        text = torch.frombuffer(bytearray(json.dumps(names).ljust(1024).encode()), dtype=torch.uint8)
        self.communicator.broadcast(text)
        agreed: list[str] = json.loads(bytes(text.tolist()))
        return agreed
