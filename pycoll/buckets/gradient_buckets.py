"""GradientBuckets: watches autograd, and averages each bucket when its gradients are there."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from pycoll import _C, tuning
from pycoll.buckets.agreement import agree, divided
from pycoll.buckets.bucket import WIRES, Bucket, is_view
from pycoll.buckets.device_bucket import DeviceBucket
from pycoll.buckets.outcome import Outcome
from pycoll.buckets.parts import ModelParts
from pycoll.buckets.passes import Pass, Passes, watch
from pycoll.communicator import Communicator
from pycoll.errors import UsageError

watching: weakref.WeakSet[GradientBuckets] = weakref.WeakSet()
"""All that there are."""


class GradientBuckets:
    """Averages the gradients of all ranks, bucket by bucket, while the backward pass goes on.

    When `backward()` returns, `grad` of every parameter is the average over the ranks: a view of a bucket, always fp32
    (16-bit parameters too: FusedAdam takes that). A parameter for which no rank had a gradient keeps None. All ranks
    must make the same buckets, and do the same passes; what each rank uses of the model, and in which order its
    gradients come, may differ. A rank whose loss reaches no parameter at all has no pass: the others wait for it.

    Gradients travel as `wire_dtype` and are added in fp32, in rank order: the same bits on all ranks. As int8, with a
    scale for each 256 elements, what rounding takes from a gradient is added to the next one (error feedback).
    Gradients of several passes (`no_sync`) are added in fp32.

    Keep it: when it is dropped it watches no longer. pycoll.DataParallel wraps it in a module, and pycoll.ShardedAdam
    averages where it updates, instead. An error within a pass ends the communicator, so that no rank waits for one that
    failed.

    On GPUs the averages are equal on all ranks, too, but a wire of 16 bits rounds them once more, and ranks that are in
    different passes are not told. The host does not wait for the GPU, unless this rank lacks a gradient and must learn
    whether another has it, or ranks share a GPU.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        communicator: Communicator,
        *,
        wire_dtype: torch.dtype = torch.float32,
        bucket_bytes: int | None = None,
        parts: ModelParts | None = None,
    ) -> None:
        """Makes the buckets on all ranks. Their memory lies in the communicator's heap.

        Args:
            params: float32, bfloat16 or float16, dense, all on the CPU or on one GPU; those that require no gradient
                are left out. Memory is taken in their reverse order: the last ones have their gradients first.
            communicator: of all ranks that train together, for these buckets alone: within a backward pass nobody else
                calls it.
            wire_dtype: float32, bfloat16, float16 or int8.
            bucket_bytes: of fp32 gradients, about, in a bucket; None: as tuning.bucket_bytes has it.
            parts: where these parameters are a part of a model, whose other parts lie on other ranks.

        Raises:
            UsageError: the ranks' parameters differ, or there are none.
            UnsupportedError: a parameter of another dtype, device or layout.
        """
        if wire_dtype not in WIRES:
            raise UsageError(f"pycoll: gradients travel as {', '.join(map(str, WIRES))}, not as {wire_dtype}")
        if bucket_bytes is not None and bucket_bytes <= 0:
            raise UsageError(f"pycoll: bucket_bytes must be positive, not {bucket_bytes}")
        self.params = [param for param in dict.fromkeys(params) if param.requires_grad]
        if not self.params:
            raise UsageError("pycoll: no parameter requires a gradient")
        self.communicator, self.wire_dtype, self.parts = communicator, wire_dtype, parts
        with torch.inference_mode(False), torch.no_grad():
            device = agree(self.params, communicator, wire_dtype, bucket_bytes)
            if bucket_bytes is None:
                bucket_bytes = tuning.bucket_bytes(4 * sum(param.numel() for param in self.params))
            some = divided(list(reversed(self.params)), bucket_bytes, parts.copies if parts else lambda _: 1)
            kind = DeviceBucket if device.type == "cuda" else Bucket
            self.buckets = [kind(params, communicator, wire_dtype) for params in some]
            streams = _C.is_large_step(sum(bucket.size for bucket in self.buckets))
            for bucket in self.buckets:
                bucket.streams = streams
        self._place = {
            param: (index, place)
            for index, bucket in enumerate(self.buckets)
            for place, param in enumerate(bucket.params)
        }
        self.everywhere = True
        """Whether every rank gets the averages; else (ShardedAdam) `grad` remains what this rank computed."""
        self.measures = True
        """Whether a pass measures the sums of squares, where it does not reduce."""
        self.synchronizes = True
        """Whether a pass that begins now averages."""
        self._outcome = Outcome(self.buckets, communicator, parts)
        self._passes = Passes([len(bucket.params) for bucket in self.buckets])
        self._owner: weakref.ref[object] | None = None
        self._lock = threading.RLock()  # autograd has a thread for each device
        for param in self.params:
            if param.dtype != torch.float32:
                param.grad_dtype = None  # any
        self._unwatch = watch(self, self.params, GradientBuckets._on_gradient)
        watching.add(self)

    @property
    def passes(self) -> int:
        """How many there were, with those that failed or did not synchronize."""
        return self._passes.number

    @property
    def squares(self) -> Tensor | None:
        """What the squares of all averages add up to, shape (buckets,), fp64, the same on all ranks: with `parts` those
        of the whole model, else of each bucket.

        None where the last pass has not measured them, or gradients have been changed since.
        """
        return self._outcome.squares

    def __contains__(self, param: Tensor) -> bool:
        return param in self._place

    def hold(self, params: Iterable[Tensor]) -> bool:
        """Whether the gradients of these parameters all lie in the buckets."""
        places = [self._place[param] for param in params]
        grads = [
            (self.buckets[index].gradient_views[place], self.buckets[index].params[place].grad)
            for index, place in places
        ]
        return all(grad is not None and is_view(grad, view) for view, grad in grads)

    def used(self, bucket: int) -> Tensor:
        """Whether some rank had a gradient in the last pass, for each parameter of a bucket; bool, on the CPU.

        On a GPU the host waits for it where this rank lacked one.
        """
        first = sum(len(each.params) for each in self.buckets[:bucket])
        return self._outcome.used[first : first + len(self.buckets[bucket].params)]

    def tag(self, bucket: int) -> int:
        """What tells a call for a bucket from that of another pass (B2)."""
        return self.passes << 16 | bucket

    def measure(self) -> Tensor:
        """The `squares` of what has been packed; collective calls, where the last pass did not measure it.

        Raises:
            UsageError: as `require_packed`.
        """
        return self._outcome.measure(self.tag)

    def require_packed(self) -> None:
        """Nothing has happened to the gradients since they were packed.

        Raises:
            UsageError: passes within no_sync() came after it; or gradients have been replaced, or changed where that
                changes nothing of what travels.
        """
        self._outcome.require_packed()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes that begin within it add up gradients on each rank; the next one averages them all.

        All ranks must do the same passes within it.
        """
        before, self.synchronizes = self.synchronizes, False
        try:
            yield
        finally:
            self.synchronizes = before

    def average(self) -> None:
        """Averages what passes within no_sync() have added up, as a pass of its own would. A collective call.

        For schedules of passes (a pipeline's) whose last one is not the last for all parameters.
        """
        with self._lock, self.telling():
            current = self._passes.add(Pass(True, [0] * len(self.buckets)))
            try:
                self._begin(current)
                self._finish(current)
            finally:
                current.over = True

    def begin_pass(self, synchronizes: bool) -> None:
        """A backward pass begins here, with all that is nested in it; called within it, in its outermost part."""
        with self._lock, self.telling():
            if self._passes.last.over:
                self._passes.follow(synchronizes, self._finish)

    def forget(self) -> None:
        """Drops all gradients, as zero_grad() does."""
        self._outcome.forget()

    def divide(self, owner: object) -> None:
        """From now on passes leave each rank its own gradients: an optimizer averages where it updates.

        Raises:
            UsageError: another optimizer, which is still there, has asked for it before.
        """
        if self._owner is not None and self._owner() is not None:
            raise UsageError("pycoll: these buckets are another ShardedAdam's: one optimizer updates all of them")
        self._owner = weakref.ref(owner)
        self.everywhere = self.measures = False

    def state_dict(self) -> dict[str, Tensor]:
        """What rounding to int8 took from this rank's gradients so far, and the next ones get back; live, no collective
        call.

        Returns:
            "residual.I" of each bucket, shape (size,), fp32; nothing with another wire.
        """
        residuals = enumerate(bucket.residual for bucket in self.buckets)
        return {f"residual.{i}": residual for i, residual in residuals if residual is not None}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Takes over this rank's. A residual that is missing, or of a bucket of another size, counts as zero."""
        for name, residual in self.state_dict().items():
            saved = state_dict.get(name)
            residual.copy_(saved if saved is not None and saved.shape == residual.shape else torch.zeros(()))

    def close(self) -> None:
        """Stops watching. Gradients that lie in the buckets stay usable; the communicator stays open."""
        self._unwatch()

    def __reduce__(self) -> str:
        raise UsageError("pycoll: GradientBuckets cannot be copied or saved: copy the model that they serve (.module)")

    def _begin(self, current: Pass) -> None:
        """A gradient has come, the first of the pass."""
        self._passes.begin(current)
        self._outcome.begin()

    def _on_gradient(self, param: Tensor) -> None:
        with self._lock, self.telling():
            current = self._passes.last
            if current.over:
                current = self._passes.follow(self.synchronizes, self._finish)
            if not current.begun:
                self._begin(current)
            index, place = self._place[param]
            if not current.synchronizes:
                self.buckets[index].add_up(place)
                return
            if index < current.launched:
                raise UsageError(
                    f"pycoll: a parameter of shape {tuple(param.shape)} got another gradient after its bucket was on "
                    "its way: use it once in what is checkpointed with use_reentrant=True, or use_reentrant=False"
                )
            if param in current.ready:
                return
            current.ready.add(param)
            current.waiting[index] -= 1
            while current.launched < len(self.buckets) and current.waiting[current.launched] == 0:
                self._launch(current)

    def _launch(self, current: Pass) -> None:
        """Packs the next bucket and sends it on its way."""
        index = current.launched
        bucket = self.buckets[index]
        current.grads.append(bucket.pack())
        current.launched += 1
        squares = self._outcome.sums[index : index + 1]
        if self.everywhere:
            current.works.append(bucket.reduce(squares, self.tag(index), async_op=True))
        elif self.measures:
            current.works.append(bucket.measure(squares, self.tag(index), async_op=True))

    def _finish(self, current: Pass) -> None:
        """The end of a pass: what has not been launched, and what all ranks must know."""
        with self._lock, self.telling():
            if not current.begun or not current.synchronizes:  # no gradients (torch.autograd.grad), or they stay here
                return
            while current.launched < len(self.buckets):
                self._launch(current)
            current.wait()
            grads = [grad for some in current.grads for grad in some]
            self._outcome.share(grads, everywhere=self.everywhere, measured=self.everywhere or self.measures)
            current.grads.clear()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """What goes wrong within it goes wrong on all ranks, none of which then waits for this one (B8)."""
        try:
            with torch.no_grad():
                yield
        except BaseException as error:
            self.communicator.abort(f"{type(error).__name__}: {error}")
            raise
