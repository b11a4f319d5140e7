"""Bad arguments to pycoll.Communicator: a typed error at once that says what to do; the communicator stays usable."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import pycoll
from pycoll import Communicator, Config
from pycoll.testing import run_threads

pytestmark = [pytest.mark.usefixtures("leaves_nothing"), pytest.mark.timeout(60)]


def _read_only() -> np.ndarray:
    x = np.ones(4, np.float32)
    x.flags.writeable = False
    return x


def _overlapping(c: Communicator) -> torch.Tensor:
    x = torch.zeros(9)
    return c.all_reduce(x[:8], out=x[1:])


def _half_of_output(c: Communicator) -> torch.Tensor:
    out = torch.zeros(8)
    return c.all_gather(out[2:6], out=out)


def _half_of_input(c: Communicator) -> torch.Tensor:
    x = torch.zeros(8)
    return c.reduce_scatter(x, out=x[2:6])


ones = torch.ones
CASES: dict[str, tuple[Callable[[Communicator], Any], type[pycoll.Error], str]] = {
    "meta device": (lambda c: c.all_reduce(ones(4, device="meta")), pycoll.UnsupportedError, "meta.*cpu"),
    "meta device, out": (lambda c: c.all_reduce(ones(4), out=ones(4, device="meta")), pycoll.UnsupportedError, "meta"),
    "meta device, broadcast": (lambda c: c.broadcast(ones(4, device="meta")), pycoll.UnsupportedError, "meta"),
    "meta device, gather": (lambda c: c.all_gather(ones(4, device="meta")), pycoll.UnsupportedError, "meta"),
    "meta device, scatter": (lambda c: c.reduce_scatter(ones(4, device="meta")), pycoll.UnsupportedError, "meta"),
    "sparse": (lambda c: c.all_reduce(ones(4).to_sparse()), pycoll.UnsupportedError, "Sparse.*to_dense"),
    "sparse rows": (lambda c: c.all_reduce(ones(4, 4).to_sparse_csr()), pycoll.UnsupportedError, "SparseCsr.*to_dense"),
    "sparse, broadcast": (lambda c: c.broadcast(ones(4).to_sparse()), pycoll.UnsupportedError, "Sparse.*to_dense"),
    "lazily conjugated": (
        lambda c: c.broadcast(ones(4, dtype=torch.complex64).conj()),
        pycoll.UnsupportedError,
        "resolve_conj",
    ),
    "complex": (
        lambda c: c.all_reduce(ones(4, dtype=torch.complex64), "max"),
        pycoll.UnsupportedError,
        "has no max of ComplexFloat tensors",
    ),
    "float8": (lambda c: c.all_reduce(ones(4).to(torch.float8_e5m2)), pycoll.UnsupportedError, "cannot reduce Float8"),
    "uint16": (lambda c: c.all_reduce(ones(4).to(torch.uint16)), pycoll.UnsupportedError, "cannot reduce UInt16"),
    "complex, scatter": (
        lambda c: c.reduce_scatter(ones(4).cfloat(), "product"),
        pycoll.UnsupportedError,
        "has no product of ComplexFloat tensors",
    ),
    "a list": (lambda c: c.all_reduce([1.0, 2.0]), pycoll.UnsupportedError, "NumPy and CuPy arrays, not list"),
    "a NumPy scalar": (lambda c: c.all_reduce(np.float32(1)), pycoll.UnsupportedError, "CuPy arrays, not float32"),
    "none": (lambda c: c.broadcast(None), pycoll.UnsupportedError, "not NoneType"),
    "NumPy, big-endian": (lambda c: c.all_reduce(np.ones(4, ">f4")), pycoll.UnsupportedError, "byte order"),
    "NumPy, text": (lambda c: c.all_reduce(np.array(["a"])), pycoll.UnsupportedError, "NumPy array"),
    "NumPy, backwards": (lambda c: c.all_reduce(np.ones(4)[::-1]), pycoll.UnsupportedError, "ascontiguousarray"),
    "NumPy, read-only": (lambda c: c.all_reduce(_read_only()), pycoll.UsageError, "read-only.*copy"),
    "NumPy, read-only out": (
        lambda c: c.all_reduce(np.ones(4, "f4"), out=_read_only()),
        pycoll.UsageError,
        "read-only",
    ),
    "expanded": (lambda c: c.all_reduce(ones(1).expand(4)), pycoll.UsageError, "expanded.*clone"),
    "expanded, out": (lambda c: c.all_reduce(ones(4), out=ones(1).expand(4)), pycoll.UsageError, "expanded.*clone"),
    "expanded, broadcast": (lambda c: c.broadcast(ones(1).expand(4)), pycoll.UsageError, "expanded"),
    "requires grad": (lambda c: c.all_reduce(ones(4, requires_grad=True)), pycoll.UsageError, "no_grad.*detach"),
    "overlap": (_overlapping, pycoll.UsageError, "overlaps"),
    "overlap, gather": (_half_of_output, pycoll.UsageError, "overlap"),
    "overlap, scatter": (_half_of_input, pycoll.UsageError, "overlap"),
    "out of another shape": (lambda c: c.all_reduce(ones(4), out=ones(2, 2)), pycoll.UsageError, r"shape \[4\]"),
    "out of another dtype": (lambda c: c.all_reduce(ones(4), out=ones(4).double()), pycoll.UsageError, "Float.*Double"),
    "out too small": (lambda c: c.all_gather(ones(4), out=ones(7)), pycoll.UsageError, "2 blocks of 4"),
    "out too large": (lambda c: c.reduce_scatter(ones(4), out=ones(3)), pycoll.UsageError, "2 blocks of 3"),
    "out of another dtype, gather": (lambda c: c.all_gather(ones(4), out=ones(8).int()), pycoll.UsageError, "Int"),
    "not divisible": (lambda c: c.reduce_scatter(ones(5)), pycoll.UsageError, r"2 ranks divide, not shape \(5,\)"),
    "scalar to scatter": (lambda c: c.reduce_scatter(torch.tensor(1.0)), pycoll.UsageError, "first dimension"),
    "unknown op": (lambda c: c.all_reduce(ones(4), "mean"), pycoll.UsageError, "'mean': sum, avg"),
    "unknown op, scatter": (lambda c: c.reduce_scatter(ones(4), "nand"), pycoll.UsageError, "'nand': sum, avg"),
    "unknown algorithm": (
        lambda c: c.all_reduce(ones(4), algorithm="star"),
        pycoll.UsageError,
        "'star': auto, one_shot",
    ),
    "algorithm for GPUs": (
        lambda c: c.all_reduce(ones(4), algorithm="one_shot_ll"),
        pycoll.UnsupportedError,
        "one_shot_ll is for ranks whose GPUs",
    ),
    "multimem on the CPU": (
        lambda c: c.all_reduce(ones(4), algorithm="multimem"),
        pycoll.UnsupportedError,
        "multimem is for",
    ),
    "root too large": (lambda c: c.broadcast(ones(4), 2), pycoll.UsageError, "root 2 is not in a group of 2"),
    "root below zero": (lambda c: c.broadcast(ones(4), -1), pycoll.UsageError, "root -1"),
    "negative size": (lambda c: c.empty((2, -1)), pycoll.UsageError, r"\(2, -1\)"),
    "two negative sizes": (lambda c: c.empty((-2, -1)), pycoll.UsageError, "zero or more"),
    "huge": (lambda c: c.empty(1 << 60), pycoll.Error, "no room"),
    "beyond 64 bits": (lambda c: c.empty((1 << 40, 1 << 40)), pycoll.Error, "no room|too large"),
}


def test_bad_arguments() -> None:
    """One rank's bad argument is no business of the others: each rank sees its own, and the next calls work."""

    def rank_main(comm: Communicator) -> None:
        for name, (call, kind, text) in CASES.items():
            with pytest.raises(kind, match=text) as caught:
                call(comm)
            assert type(caught.value) is kind, name
            if comm.rank == 1:
                with pytest.raises(kind):
                    call(comm)
            assert comm.all_reduce(ones(3)).tolist() == [2.0] * 3, name

    run_threads(rank_main, 2)


def test_errors_are_also_pythons() -> None:
    assert issubclass(pycoll.UsageError, ValueError)
    assert issubclass(pycoll.UnsupportedError, NotImplementedError)
    assert issubclass(pycoll.TimeoutError, TimeoutError)
    assert issubclass(pycoll.PeerLostError, ConnectionError)
    for kind in (
        pycoll.UsageError,
        pycoll.UnsupportedError,
        pycoll.TimeoutError,
        pycoll.PeerLostError,
        pycoll.MismatchError,
    ):
        assert issubclass(kind, pycoll.Error) and issubclass(kind, RuntimeError) and kind.__doc__


def test_a_gradient_is_not_lost_silently() -> None:
    """A tensor that requires grad is refused, but goes under no_grad, detached, and as an input."""

    def rank_main(comm: Communicator) -> None:
        x = ones(3, requires_grad=True)
        with torch.no_grad():
            comm.all_reduce(x)
        comm.all_reduce(x.detach())
        assert comm.all_gather(x.detach())[0].item() == 4.0
        assert comm.all_reduce(x, out=torch.empty(3)).tolist() == [8.0] * 3

    run_threads(rank_main, 2)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (Config(channels=-1), "channels must be between 0 and 64, not -1"),
        (Config(channels=65), "channels"),
        (Config(slot_bytes=1), "slot_bytes must be between 64"),
        (Config(link_bytes=0), "link_bytes must be between 64"),
        (Config(link_slots=1), "link_slots must be between 2"),
        (Config(heap_bytes=-1), "heap_bytes must be between 0"),
        (Config(channel_min_bytes=0), "channel_min_bytes must be between 1"),
        (Config(one_shot_max_bytes=-1), "one_shot_max_bytes must be between 0"),
    ],
    ids=lambda value: None if isinstance(value, Config) else value.split()[0],
)
def test_bad_configuration(config: Config, text: str) -> None:
    with pytest.raises(pycoll.UsageError, match=text):
        Communicator(dist.HashStore(), 0, 1, config=config)


@pytest.mark.parametrize(("rank", "world_size"), ((0, 0), (1, 1), (-1, 2), (0, -1)))
def test_a_rank_that_is_not_in_the_world(rank: int, world_size: int) -> None:
    with pytest.raises(pycoll.UsageError, match=f"rank {rank} is not in a world of {world_size}"):
        Communicator(dist.HashStore(), rank, world_size)


@pytest.mark.parametrize("timeout", (0, -1.0, float("nan")))
def test_a_timeout_must_be_positive(timeout: float) -> None:
    with pytest.raises(pycoll.UsageError, match="timeout must be positive"):
        Communicator(dist.HashStore(), 0, 1, timeout=timeout)


def test_an_endless_timeout_is_fine() -> None:
    with Communicator(dist.HashStore(), 0, 1, timeout=float("inf")) as comm:
        comm.barrier()


def test_a_heap_of_nothing() -> None:
    def rank_main(comm: Communicator) -> None:
        with pytest.raises(pycoll.Error, match=r"raise Config\.heap_bytes"):
            comm.empty(1)
        assert comm.all_reduce(ones(2)).tolist() == [2.0, 2.0]

    run_threads(rank_main, 2, config=Config(heap_bytes=0))


def test_local_group_needs_a_gpu() -> None:
    with pytest.raises(pycoll.UnsupportedError, match="lives on a CUDA GPU, not on cpu"):
        pycoll.LocalGroup(2, "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(pycoll.UnsupportedError, match=r"built without CUDA|no CUDA GPU"):
            pycoll.LocalGroup(2)


def test_an_abort_says_why_in_any_language() -> None:
    """Also in more words than there is room for."""

    def rank_main(comm: pycoll.Communicator) -> None:
        if comm.rank == 1:
            comm.abort("grün, " + "ü" * 600)
        with pytest.raises(pycoll.Error, match=r"grün, ü+$"):
            comm.barrier()

    run_threads(rank_main, 2)
