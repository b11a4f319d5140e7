"""A device "gpu" whose tensors' numbers lie on the CPU: all of torch works on it, with the CPU's bits.

What a GPU refuses is refused: an operation on a tensor there and one of the CPU, but for a number that it reads. So
code that runs there puts all that it computes with on one device. It says nothing of a GPU's kernels or streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "gpu"
CROSSES = ("aten::copy_", "aten::_to_copy")
"""What may read one device and write the other."""


class There(Tensor):
    """A tensor of the device; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held.detach()
        return made

    def __repr__(self, *, tensor_contents: str | None = None) -> str:
        return f"There({self.held})"

    def tolist(self) -> Any:
        """torch's own wants memory."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Within it tensors can be made on the device."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of a device's module, besides."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def register() -> torch.device:
    """Makes torch know it, for the rest of this process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    Tensor.pin_memory = lambda self: self  # type: ignore[assignment, method-assign] # its hooks have no memory of their own
    return torch.device(NAME, 0)


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = {id(x.held): x for x in tensors if isinstance(x, There)}
    name = func._schema.name
    if there and name not in CROSSES:
        numbers = {id(x) for x in args[func._schema.is_mutable :] if isinstance(x, Tensor) and not x.dim()}  # only read
        here = [x for x in tensors if not isinstance(x, There) and id(x) not in numbers]
        if here:
            raise RuntimeError(f"{name} of a tensor on {NAME} and one of shape {tuple(here[0].shape)} on the CPU")
    device = kwargs.get("device")
    goes_there = bool(there) if device is None else torch.device(device).type == NAME
    if name == "aten::copy_":
        goes_there = isinstance(args[0], There)
    if device is not None and goes_there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, There) else x, (tuple(args), kwargs))
    found = func(*args, **kwargs)

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or not goes_there:
            return x
        return there[id(x)] if id(x) in there else There(x)

    return tree_map(wrapped, found)
