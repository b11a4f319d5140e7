"""Ranks that share a GPU: every algorithm, dtype, operation and size in one cooperative launch; streams and graphs."""

import itertools
from collections.abc import Iterator

import pytest
import reference
import torch
from places import beside_a_capture

import pycoll
from pycoll import LocalGroup
from pycoll.tuning import Config, KiB

pytestmark = pytest.mark.cuda
# Little data runs many rounds, over several channels.
SMALL = Config(
    channels=3,
    slot_bytes=4 * KiB,
    link_bytes=1 * KiB,
    link_slots=3,
    heap_bytes=0,
    channel_min_bytes=2 * KiB,
    word_bytes=1 * KiB,
)
ALGORITHMS = (*reference.ALGORITHMS, "one_shot_ll", "two_shot_ll")
WORLD_SIZES = (1, 2, 3, 4, 7, 8)


@pytest.fixture(params=WORLD_SIZES)
def group(request: pytest.FixtureRequest) -> Iterator[LocalGroup]:
    made = LocalGroup(request.param, config=SMALL)
    yield made
    made.close()


def on_gpu(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.cuda() for t in tensors]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_dtype_and_operation(group: LocalGroup, algorithm: str) -> None:
    for dtype, op in itertools.product(reference.DTYPES, reference.OPS):
        given = reference.inputs(group.world_size, 10_001, dtype)
        tensors = on_gpu(given)
        group.all_reduce(tensors, op, algorithm=algorithm)  # type: ignore[arg-type]
        for t in tensors:
            reference.check(t.cpu(), given, op, (dtype, op, algorithm))
            assert reference.bits(t.cpu()) == reference.bits(tensors[0].cpu()), "the same bits on all ranks"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("count", (0, 1, 3, 255, 4096, 100_003, 3_000_001))
def test_every_size_again_and_again(group: LocalGroup, algorithm: str, count: int, fake_cuda: bool) -> None:
    count = min(count, 300_001) if fake_cuda else count
    given = reference.inputs(group.world_size, count, torch.int32)
    tensors = on_gpu(given)
    expected = [t.clone() for t in given]
    for _ in range(5):
        group.all_reduce(tensors, algorithm=algorithm)  # type: ignore[arg-type]
        expected = [reference.reduced(expected, "sum")] * group.world_size
    for t in tensors:
        assert torch.equal(t.cpu(), expected[0])


def test_other_collectives(group: LocalGroup) -> None:
    world = group.world_size
    given = reference.inputs(world, 1001 * world, torch.bfloat16)
    tensors = on_gpu(given)
    for rank, block in enumerate(group.reduce_scatter(tensors)):
        reference.check(block.cpu(), [t[rank * 1001 : (rank + 1) * 1001] for t in given], "sum", "reduce_scatter")
    for gathered in group.all_gather([t[:100] for t in tensors]):
        assert torch.equal(gathered.cpu(), torch.cat([t[:100] for t in given]))
    group.broadcast(tensors, world - 1)
    for t in tensors:
        assert torch.equal(t.cpu(), given[world - 1])
    with pytest.raises(pycoll.UsageError, match="root 99"):
        group.broadcast(tensors, 99)


def test_direct_algorithms_give_the_same_bits(group: LocalGroup) -> None:
    given = reference.inputs(group.world_size, 100_003, torch.bfloat16)
    results = []
    for algorithm in ("one_shot", "two_shot", "one_shot_ll", "two_shot_ll"):
        tensors = on_gpu(given)
        group.all_reduce(tensors, algorithm=algorithm)  # type: ignore[arg-type]
        results.append(reference.bits(tensors[0].cpu()))
    assert len(set(results)) == 1


def test_strided_and_misaligned_tensors(group: LocalGroup) -> None:
    given = reference.inputs(group.world_size, (64, 65), torch.float32)
    wholes = on_gpu(given)
    group.all_reduce([w[:, 1:].t() for w in wholes])
    expected = reference.reduced(given, "sum").float()
    for rank, w in enumerate(wholes):
        torch.testing.assert_close(w[:, 1:].cpu(), expected[:, 1:], rtol=1e-5, atol=1e-5)
        assert torch.equal(w[:, 0].cpu(), given[rank][:, 0]), "what lies beside is left alone"
    given = reference.inputs(group.world_size, 5001, torch.bfloat16)
    tensors = [torch.cat((torch.zeros(rank % 3 + 1, dtype=t.dtype), t)).cuda() for rank, t in enumerate(given)]
    views = [t[rank % 3 + 1 :] for rank, t in enumerate(tensors)]
    group.all_reduce(views)
    for v in views:
        reference.check(v.cpu(), given, "sum", "misaligned")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_graph_is_replayed(group: LocalGroup, algorithm: str) -> None:
    tensors = [torch.zeros(20_000, device="cuda") for _ in range(group.world_size)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # no warm-up
        group.all_reduce(tensors, "avg", algorithm=algorithm)  # type: ignore[arg-type]
    for turn in range(5):
        for rank, t in enumerate(tensors):
            t.fill_(rank + turn)
        graph.replay()
        torch.cuda.synchronize()
        group.all_reduce(tensors, "avg")  # between replays too
        for t in tensors:
            assert bool((t.cpu() == turn + (group.world_size - 1) / 2).all())


def test_made_while_another_thread_captures() -> None:
    tensors = [torch.ones(1000, device="cuda") for _ in range(2)]
    made: list[LocalGroup] = []

    def make() -> None:
        made.append(LocalGroup(2, config=SMALL))
        made[0].all_reduce(tensors)

    beside_a_capture(make)
    assert all(bool((t.cpu() == 2).all()) for t in tensors)


def test_streams_are_ordered() -> None:
    group = LocalGroup(4, config=SMALL)
    tensors = [torch.ones(1_000_000, device="cuda") for _ in range(4)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    for i in range(12):
        with torch.cuda.stream(streams[i % 3]):
            group.all_reduce(tensors, "max" if i else "sum")
    torch.cuda.synchronize()
    assert all(bool((t.cpu() == 4).all()) for t in tensors)


def test_bad_arguments() -> None:
    group = LocalGroup(2, config=SMALL)
    x, y = torch.ones(10, device="cuda"), torch.ones(10, device="cuda")
    for tensors, kind, text in (
        ([x], pycoll.UsageError, "a tensor for each of the 2 ranks"),
        ([x, y.double()], pycoll.MismatchError, "differ in shape or dtype"),
        ([x, y[:9]], pycoll.MismatchError, "differ in shape or dtype"),
        ([x, y.cpu()], pycoll.UnsupportedError, "on cpu"),
        ([x, x], pycoll.UsageError, "overlap"),
        ([x.cpu().to(torch.float8_e5m2).cuda()] * 2, pycoll.UnsupportedError, "cannot reduce Float8"),
    ):
        with pytest.raises(kind, match=text):
            group.all_reduce(tensors)
    with pytest.raises(pycoll.UsageError, match="1 to 16"):
        LocalGroup(17)
    group.all_reduce([x, y])
    assert bool((x.cpu() == 2).all()) and bool((y.cpu() == 2).all())
    pairs = [torch.full((10,), 1 + 2j * r, dtype=torch.complex64).cuda() for r in range(2)]
    group.all_reduce(pairs)
    assert all(pair.cpu().tolist() == [2 + 2j] * 10 for pair in pairs)
    group.close()
    with pytest.raises(pycoll.Error, match="closed"):
        group.all_reduce([x, y])


def test_abort_is_terminal_and_the_device_stays_usable() -> None:
    group = LocalGroup(2, config=SMALL)
    tensors = [torch.ones(10, device="cuda") for _ in range(2)]
    group.abort()
    with pytest.raises(pycoll.Error, match="aborted"):
        group.all_reduce(tensors)
    torch.cuda.synchronize()
    assert torch.ones(3, device="cuda").cpu().sum().item() == 3


def test_footprint_at_rest() -> None:
    for world_size in (2, 8):
        assert LocalGroup(world_size).footprint() / world_size < 32 * 2**20
