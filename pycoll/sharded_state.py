"""The state of pycoll.ShardedAdam for a bucket: each rank keeps a shard of it, and a state_dict has it whole.

It is FusedAdam's, but of elements: a shard begins and ends anywhere in a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pycoll.adam_state import FLOAT_STATE, empty_state
from pycoll.buckets import Bucket


class Shard:
    """This rank's part of a bucket: its state, and the parameters of all of it in the heap.

    Attributes:
        bucket: whose.
        memory: all its parameters side by side, in the heap, where peers write them; shape (bucket.size,).
        views: of `memory`, what each parameter is from now on.
        steps: that each parameter has made, fp32, shape (parameters,).
        state: of this rank's elements, by name, as far as it has been needed.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.memory = bucket.communicator.empty(bucket.size, bucket.params[0].dtype, bucket.device).zero_()
        self.views = bucket.views(self.memory)
        with torch.no_grad():
            for param, view in zip(bucket.params, self.views, strict=True):
                view.copy_(param)
                param.data = view
        self.steps = torch.zeros(len(bucket.params), dtype=torch.float32, device=bucket.device)
        self._settled: set[int] = set()  # parameters, by their place, whose masters are what they must be
        self.state: dict[str, Tensor] = {}

    def need(self, name: str) -> Tensor:
        """The state `name`, fp32, of the shard's elements; new moments are zero, new masters the parameters."""
        if name not in self.state:
            own = self.memory[self.bucket.own]
            state = empty_state(name, own)
            self.state[name] = state.copy_(own) if name == "master_param" else state.zero_()
        return self.state[name]

    def masters(self, used: Tensor) -> Tensor:
        """The masters; those of parameters whose first step this is are what the parameters are now."""
        masters, own = self.need("master_param"), self.bucket.own
        for place in {*used.nonzero().flatten().tolist()} - self._settled:
            self._settled.add(place)
            first = self.bucket.firsts[place]
            begin, end = max(first, own.start), min(first + self.bucket.params[place].numel(), own.stop)
            if begin < end:
                masters[begin - own.start : end - own.start] = self.memory[begin:end]
        return masters

    def gathered(self) -> list[dict[str, Tensor]]:
        """The state of each parameter, whole, in new memory; {} before its first step. A collective call."""
        states: list[dict[str, Tensor]] = [{} for _ in self.bucket.params]
        for name in [name for name in FLOAT_STATE if name in self.state]:
            whole = torch.empty(self.bucket.size, dtype=torch.float32, device=self.bucket.device)
            self.bucket.communicator.all_gather(self.state[name], out=whole)
            for state, view in zip(states, self.bucket.views(whole), strict=True):
                state[name] = view.clone()
        return [{**state, "step": step.clone()} if step else {} for state, step in zip(states, self.steps, strict=True)]

    def load(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes this rank's part of the state of each parameter, {} for those that have none."""
        self.state.clear()
        self._settled.clear()
        self.steps.zero_()
        for name in FLOAT_STATE:
            values = {place: state[name] for place, state in enumerate(states) if name in state}
            if values:
                self._take(name, values)
        for place, state in enumerate(states):
            if "step" in state:
                self.steps[place] = float(state["step"])

    def _take(self, name: str, values: Mapping[int, Tensor]) -> None:
        """This rank's part of the state of parameters, by their place in the bucket; the others' stays as it is."""
        whole = torch.zeros(self.bucket.size, dtype=torch.float32, device=self.bucket.device)
        whole[self.bucket.own] = self.need(name)
        if name == "master_param":
            self._settled |= values.keys()
        views = self.bucket.views(whole)
        for place, value in values.items():
            views[place].copy_(value)
        self.state[name].copy_(whole[self.bucket.own])
