"""Types of the extension module; csrc/torch defines it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

simd: str

def available_cores() -> int: ...
def physical_memory() -> int: ...
def close_backends() -> None: ...
def ceiling_symmetric(tensors: Sequence[Tensor], rank: int) -> None: ...
def ceiling_pipelined(x: Tensor, pipe: Tensor, sends: bool) -> None: ...
def ceiling_adam(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor]
) -> None: ...
def ceiling_packing(to: Sequence[Tensor], gradients: Sequence[Tensor]) -> None: ...
def ceiling_staged(x: Tensor, slots: Sequence[Tensor], rank: int) -> None: ...
def adam_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    masters: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    firsts: Sequence[int],
    lr_tensor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    stochastic: bool,
    grad_scale: Tensor | None,
    clip: Tensor | None,
    found_inf: Tensor | None,
) -> None: ...
def sum_of_squares(grads: Sequence[Tensor]) -> Tensor: ...
def sample(grads: Sequence[Tensor | None]) -> int: ...
def pack(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    firsts: Sequence[int],
    wire: str,
    memory: Tensor,
    residual: Tensor | None,
    factor: Tensor | None = None,
    found_inf: Tensor | None = None,
    streams: bool = False,
) -> None: ...
def is_large_step(elements: int) -> bool: ...
def average_int8(wires: Tensor, to: Tensor) -> None: ...
def clip_to_norm(sums: Tensor, scale: Tensor | None, max_norm: float) -> tuple[Tensor, Tensor, Tensor]: ...

class Config:
    channels: int
    link_slots: int
    slot_bytes: int
    link_bytes: int
    heap_bytes: int
    one_shot_max_bytes: int
    channel_min_bytes: int
    word_bytes: int
    one_shot_ll_max_bytes: int
    two_shot_ll_max_bytes: int

class Names:
    def __init__(self, group: str, global_ranks: Sequence[int]) -> None: ...

class Communicator:
    closed: bool
    channels: int
    footprint: int
    device_footprint: int
    device: str

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        key: str,
        names: Names,
        config: Config,
        cuda_config: Config,
        timeout: float,
    ) -> None: ...
    def all_reduce(self, x: Tensor, out: Tensor | None, op: str, algorithm: str, async_op: bool) -> dist.Work: ...
    def reduce(self, x: Tensor, out: Tensor | None, op: str, root: int, async_op: bool) -> dist.Work: ...
    def broadcast(self, x: Tensor, root: int, async_op: bool) -> dist.Work: ...
    def all_gather(self, x: Tensor, out: Tensor, async_op: bool) -> dist.Work: ...
    def gather(self, x: Tensor, out: Tensor | None, root: int, async_op: bool) -> dist.Work: ...
    def reduce_scatter(self, x: Tensor, out: Tensor, op: str, async_op: bool) -> dist.Work: ...
    def scatter(self, x: Tensor | None, out: Tensor, root: int, async_op: bool) -> dist.Work: ...
    def all_to_all(
        self, x: Tensor, out: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int], async_op: bool
    ) -> dist.Work: ...
    def barrier(self, async_op: bool) -> dist.Work: ...
    def send(self, x: Tensor, peer: int, tag: int, async_op: bool) -> Any: ...
    def recv(self, x: Tensor, peer: int, tag: int, async_op: bool) -> Any: ...
    def reduce_bucket(
        self, wire: str, memory: Tensor, grads: Tensor | None, squares: Tensor, tag: int, streams: bool, async_op: bool
    ) -> dist.Work: ...
    def update_bucket(
        self,
        wire: str,
        memory: Tensor,
        tag: int,
        streams: bool,
        params: Tensor,
        master: Tensor | None,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        max_exp_avg_sq: Tensor | None,
        segments: Tensor,
        steps: Tensor,
        used: Tensor,
        groups: Sequence[tuple[float, float, float, float, float, bool, bool, bool, bool, bool]],
        factor: float,
    ) -> None: ...
    def empty(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor: ...
    def mem_allocator(self, device: torch.device) -> Any: ...
    def rank_name(self, rank: int) -> str: ...
    def close(self) -> None: ...
    def abort(self, reason: str) -> None: ...
    def trace(self) -> bytes: ...

class LocalGroup:
    channels: int
    footprint: int

    def __init__(self, world_size: int, device: int, config: Config, timeout: float) -> None: ...
    def all_reduce(self, tensors: Sequence[Tensor], op: str, algorithm: str) -> None: ...
    def broadcast(self, tensors: Sequence[Tensor], root: int) -> None: ...
    def all_gather(self, tensors: Sequence[Tensor], out: Sequence[Tensor]) -> None: ...
    def reduce_scatter(self, tensors: Sequence[Tensor], out: Sequence[Tensor], op: str) -> None: ...
    def abort(self) -> None: ...

class BackendOptions: ...

class Backend(dist.ProcessGroup):
    options: BackendOptions

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        names: Names,
        config: Config,
        cuda_config: Config,
        timeout: float,
    ) -> None: ...
    def trace(self) -> bytes: ...
    def perform_nocolor_split(self, device: torch.device) -> None: ...
