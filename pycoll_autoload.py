"""Makes torch know the backend "pycoll" before anybody imports pycoll.

torch calls `register` by its entry points: `torch.distributed.backends` when the backend is first named (torch 2.14 and
later), `torch.backends` at the end of `import torch` (before). So an unmodified program that is told
`--backend=pycoll` runs. A module of its own, which imports neither torch nor the extension until it must: whatever may
be wrong with pycoll, it is no reason for `import torch` to fail, or to take longer.
"""

from typing import Any


def register() -> None:
    """Makes "pycoll" a backend of torch.distributed for CPU and CUDA tensors; importing pycoll does it too."""
    import torch.distributed as dist

    if dist.is_available() and not hasattr(dist.Backend, "PYCOLL"):
        dist.Backend.register_backend("pycoll", _create, extended_api=True, devices=["cpu", "cuda"])


def _create(options: Any, backend_options: Any) -> Any:
    """Called by torch for each group, on each of its ranks."""
    from pycoll import backend

    return backend.create(options, backend_options)
