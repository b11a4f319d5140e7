"""Ranks that step alone and meet every so many steps: local SGD and DiLoCo.

What travels lies side by side in one bucket and is averaged by one call (csrc/README.md, B4), which carries the number
of steps: ranks that meet at different steps are a MismatchError, never a wrong average.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pycoll.buckets import WIRES, Bucket
from pycoll.communicator import Communicator
from pycoll.errors import UsageError
from pycoll.relaxed.weights import Weights, communicator_of


class _Periodic(ABC):
    """Counts steps, and brings the ranks together at every `every`-th.

    Attributes:
        every: steps from one meeting to the next.
        steps: this rank's, so far.
        bytes_sent: of what a rank gives the others in one meeting: of its weights or outer gradients.
        bytes_received: and of the averages that it gets back.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        communicator: Communicator | dist.ProcessGroup | None,
        every: int,
        wire_dtype: torch.dtype,
    ) -> None:
        if every < 1:
            raise UsageError(f"pycoll: every must be at least 1 step, not {every}")
        if wire_dtype not in WIRES:
            raise UsageError(f"pycoll: gradients travel as {', '.join(map(str, WIRES))}, not as {wire_dtype}")
        self.every = every
        self.steps = 0
        self._met = 0  # steps at the last meeting
        self._weights = Weights(optimizer)
        self.communicator = communicator_of(communicator)
        self._weights.begin_equal(self.communicator)
        self._bucket = Bucket(self._layout(), self.communicator, wire_dtype)
        self._squares = torch.zeros(1, dtype=torch.float64, device="cpu")
        away = self.communicator.world_size - 1
        self.bytes_sent = self._bucket.wire.nbytes * away // self.communicator.world_size
        self.bytes_received = self._bucket.gradients.nbytes * away // self.communicator.world_size

    @torch.no_grad()
    def step(self) -> bool:
        """To be called after each step of the optimizer, also one that a GradScaler has skipped.

        Returns:
            Whether the ranks have met, so that their weights are the same now.

        Raises:
            MismatchError, PeerLostError, TimeoutError: terminal, as of any collective.
        """
        self.steps += 1
        if self.steps % self.every:
            return False
        self.synchronize()
        return True

    @torch.no_grad()
    def synchronize(self) -> None:
        """Brings the ranks together now: before the weights are evaluated or saved, and at the end.

        A call that all ranks make after the same number of steps. It does nothing where they have just met.
        """
        if self._met != self.steps:
            self._meet()
            self._met = self.steps

    def state_dict(self) -> dict[str, Any]:
        """What a run goes on from, besides the weights and the optimizer's state; no collective call.

        Returns:
            "steps" and "met" (the steps at the last meeting), and "state": for each parameter, by its place, tensors of
            its shape, fp32. They are the live ones, as in torch's optimizers.
        """
        return {"steps": self.steps, "met": self._met, "state": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state_dict; the weights and the optimizer's state are loaded by whoever saved them.

        Raises:
            UsageError: it is of other parameters.
        """
        self.steps, self._met = int(state_dict["steps"]), int(state_dict["met"])

    @abstractmethod
    def _layout(self) -> list[Tensor]:
        """What the bucket is made of: tensors of the parameters' shapes."""

    @abstractmethod
    def _meet(self) -> None: ...

    def _average(self) -> list[Tensor]:
        """The mean over the ranks of what was packed, in the parameters' shapes."""
        self._bucket.reduce(self._squares, self.steps, async_op=False)
        return self._bucket.gradient_views


class LocalSGD(_Periodic):
    """Ranks train alone, and every `every` steps their weights are averaged.

    Stich, "Local SGD Converges Fast and Communicates Little", 2019. The inner optimizer may be any; its moments stay
    each rank's own. fp32 masters of 16-bit weights, as FusedAdam keeps them, are averaged in their place. Buffers (a
    BatchNorm's averages) are not averaged.

        local = LocalSGD(optimizer, every=8)
        loss.backward()
        optimizer.step()
        local.step()

    The ranks' weights differ between meetings, the moments always: a run goes on bit for bit from each rank's own
    checkpoint, and from one rank's, taken at a meeting, as a run in which all ranks had its moments.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        communicator: Communicator | dist.ProcessGroup | None = None,
        *,
        every: int,
    ) -> None:
        """A call that all ranks make. Their parameters become rank 0's.

        Args:
            optimizer: of the model's parameters, on the CPU: float32, bfloat16 or float16.
            communicator: of the ranks that train together; or a process group, whose ranks make a communicator of their
                own; None: the default group's.
            every: steps from one average to the next.

        Raises:
            UsageError: `every` is less than 1; nothing requires a gradient; or the optimizer is a ShardedAdam.
            UnsupportedError: a parameter of another dtype, device or layout.
            MismatchError: the ranks' parameters differ in size or dtype.
        """
        super().__init__(optimizer, communicator, every, torch.float32)

    def _layout(self) -> list[Tensor]:
        return list(self._weights.params)

    def _meet(self) -> None:
        torch._foreach_copy_(self._bucket.gradient_views, self._weights.exact())  # the wire itself, as it is fp32
        self._weights.put(self._average())


class DiLoCo(_Periodic):
    """Ranks train alone, and every `every` steps an outer optimizer steps by how far they have come.

    Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023. The outer gradient is
    the weights of the last meeting, the anchors, minus a rank's weights now; its mean over the ranks drives SGD with
    Nesterov momentum, and all ranks go on from the new anchors: the same bits on all. With `outer_lr` 1 and no momentum
    it is LocalSGD, but for rounding. As int8, with a scale for each 256 elements, what rounding takes from an outer
    gradient is added to the next one (error feedback). Inner optimizers keep their moments, as with LocalSGD.

    Anchors and outer momentum are the same on all ranks. What int8 has rounded away (the residual), the inner moments
    and, between meetings, the weights are each rank's own: as with LocalSGD a run goes on bit for bit from each rank's
    own checkpoint. One rank's, taken at a meeting, serves all, whose moments and residuals are then its own.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        communicator: Communicator | dist.ProcessGroup | None = None,
        *,
        every: int,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        wire_dtype: torch.dtype = torch.float32,
    ) -> None:
        """A call that all ranks make. Their parameters become rank 0's, and these the first anchors.

        Whoever loads weights later loads a state_dict, too, or the next meeting starts from the old anchors.

        Args:
            optimizer: the inner one, of the model's parameters, on the CPU: float32, bfloat16 or float16.
            communicator: as of `LocalSGD`.
            every: inner steps of one outer step.
            outer_lr: learning rate of the outer SGD.
            outer_momentum: its Nesterov momentum; 0 for none.
            wire_dtype: how outer gradients travel: float32, bfloat16, float16, or int8 with error feedback.

        Raises: as `LocalSGD`.
        """
        if not outer_lr > 0 or not 0 <= outer_momentum < 1:
            raise UsageError(
                "pycoll: DiLoCo: give an outer_lr above 0 and an outer_momentum from 0 to less than 1, not "
                f"{outer_lr} and {outer_momentum}"
            )
        super().__init__(optimizer, communicator, every, wire_dtype)
        anchors = self._bucket.params
        self._outer = torch.optim.SGD(anchors, lr=outer_lr, momentum=outer_momentum, nesterov=outer_momentum > 0)

    def state_dict(self) -> dict[str, Any]:
        """As `LocalSGD.state_dict`; of each parameter "anchor", "momentum" and, with int8, "residual"."""
        residuals = [] if self._bucket.residual is None else self._bucket.views(self._bucket.residual)
        state = {}
        for place, anchor in enumerate(self._bucket.params):
            momentum = self._outer.state.get(anchor, {}).get("momentum_buffer")
            state[place] = {"anchor": anchor}
            if momentum is not None:
                state[place]["momentum"] = momentum
            if residuals:
                state[place]["residual"] = residuals[place]
        return {**super().state_dict(), "state": state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `LocalSGD.load_state_dict`. A residual that is missing is zero; one that has no use is left out."""
        anchors, state = self._bucket.params, state_dict["state"]
        if [state[place]["anchor"].shape for place in sorted(state)] != [anchor.shape for anchor in anchors]:
            raise UsageError("pycoll: DiLoCo: the state_dict is of other parameters: load it with the model it is of")
        super().load_state_dict(state_dict)
        residuals = [] if self._bucket.residual is None else self._bucket.views(self._bucket.residual.zero_())
        self._outer.state.clear()
        for place, anchor in enumerate(anchors):
            anchor.copy_(state[place]["anchor"])
            if "momentum" in state[place]:
                self._outer.state[anchor]["momentum_buffer"] = torch.empty_like(anchor).copy_(state[place]["momentum"])
            if residuals and "residual" in state[place]:
                residuals[place].copy_(state[place]["residual"])

    def _layout(self) -> list[Tensor]:
        return [exact.detach().to(torch.float32, copy=True) for exact in self._weights.exact()]

    def _meet(self) -> None:
        anchors, outer_gradients = self._bucket.params, self._bucket.gradient_views
        for anchor, exact, gradient in zip(anchors, self._weights.exact(), outer_gradients, strict=True):
            anchor.grad = torch.sub(anchor, exact, out=gradient)
        self._bucket.pack()
        for anchor, mean in zip(anchors, self._average(), strict=True):
            anchor.grad = mean
        self._outer.step()
        self._outer.zero_grad()
        self._weights.put(anchors)
