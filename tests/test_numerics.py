"""The numerical promises: how far from the exact result, in which order, and where the bits are the same."""

import functools
import hashlib
import itertools
import operator
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import reference
import torch
from reference import ALGORITHMS, DTYPES, FLOATS, INTEGERS, OPS
from torch import Tensor

from pycoll import Communicator, Config
from pycoll.testing import run_threads
from pycoll.tuning import MiB

pytestmark = [pytest.mark.usefixtures("leaves_nothing"), pytest.mark.timeout(60)]

WORLDS = (2, 3, 4, 7)
HALVES = (torch.bfloat16, torch.float16)
DIRECT = ("one_shot", "two_shot")
SMALL = Config(channels=1, slot_bytes=4096, link_bytes=1024, link_slots=2, heap_bytes=64 * MiB)
MANY = Config(channels=3, slot_bytes=1024, link_bytes=512, link_slots=3, heap_bytes=64 * MiB, channel_min_bytes=1024)


def wide(world_size: int, count: int, dtype: torch.dtype, seed: int = 1) -> list[Tensor]:
    """Floats of many magnitudes and both signs, such that fp64 adds those of 16 bits exactly."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for _ in range(world_size):
        mantissa = torch.randn(count, generator=generator, dtype=torch.float64)
        exponent = torch.randint(-8, 9, (count,), generator=generator)
        tensors.append(torch.ldexp(mantissa, exponent).to(dtype))
    return tensors


def all_reduce(
    tensors: Sequence[Tensor], op: str, algorithm: str, config: Config = SMALL, symmetric: bool = False
) -> list[Tensor]:
    """Every rank's result."""

    def rank_main(comm: Communicator) -> Tensor:
        x = tensors[comm.rank]
        mine = comm.empty(x.numel(), x.dtype).copy_(x) if symmetric else x.clone()
        return comm.all_reduce(mine, op, algorithm=algorithm).clone()

    return run_threads(rank_main, len(tensors), config=config)


def in_rank_order(tensors: Sequence[Tensor], op: str) -> Tensor:
    """What adding in the order of the ranks, in fp32 for 16 bits, and rounding once gives, bit by bit."""
    dtype = tensors[0].dtype
    wider = [x.float() if dtype in HALVES else x for x in tensors]
    if op in ("min", "max"):
        return functools.reduce(torch.minimum if op == "min" else torch.maximum, wider).to(dtype)
    total = functools.reduce(operator.mul if op == "product" else operator.add, wider)
    return (total / len(tensors) if op == "avg" else total).to(dtype)


def within_bound(result: Tensor, tensors: Sequence[Tensor]) -> bool:
    """0.5 ulp of the result + (W-1) 2^-24 sum|x|."""
    exact = reference.reduced(tensors, "sum")
    accumulated = torch.stack(list(tensors)).double().abs().sum(0) * ((len(tensors) - 1) * 2.0**-24)
    bound = reference.half_ulp(exact, result.dtype) + accumulated
    return bool(((result.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bits_accumulate_in_fp32_and_round_once(dtype: torch.dtype, algorithm: str) -> None:
    for world_size in WORLDS:
        tensors = wide(world_size, 3001, dtype)
        for result in all_reduce(tensors, "sum", algorithm):
            assert within_bound(result, tensors), (world_size, algorithm)
        if world_size > 2:
            rounded_each_time = functools.reduce(operator.add, tensors)
            assert not within_bound(rounded_each_time, tensors), "the bound would not notice"


@pytest.mark.parametrize("world_size", WORLDS)
def test_direct_algorithms_add_in_rank_order(world_size: int) -> None:
    """Bit by bit what a loop over the ranks gives; averages are divided in fp32, then rounded."""
    cases = list(itertools.product(FLOATS, OPS, DIRECT))
    given = [wide(world_size, 700, dtype) for dtype, _, _ in cases]

    def rank_main(comm: Communicator) -> list[Tensor]:
        return [
            comm.all_reduce(tensors[comm.rank].clone(), op, algorithm=algorithm)
            for (_, op, algorithm), tensors in zip(cases, given, strict=True)
        ]

    results = run_threads(rank_main, world_size, config=SMALL)
    for i, (case, tensors) in enumerate(zip(cases, given, strict=True)):
        expected = reference.bits(in_rank_order(tensors, case[1]))
        assert all(reference.bits(result[i]) == expected for result in results), case


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_direct_bits_depend_on_nothing_else(dtype: torch.dtype) -> None:
    """One-shot or two-shot, staged or symmetric, one channel or three, any size and offset, any rank and run."""
    tensors = wide(3, 4099, dtype)
    expected = in_rank_order(tensors, "sum")
    spans = [(0, 4099), (0, 1), (1, 2), (3, 68), (17, 81), (64, 129), (1000, 1777), (5, 4099), (4098, 4099)]

    def rank_main(comm: Communicator) -> None:
        heap = comm.empty(4200, dtype)
        private = torch.empty(4200, dtype=dtype)
        for (begin, end), algorithm, memory, shift in itertools.product(spans, DIRECT, (heap, private), (0, 1, 7)):
            x = memory[shift : shift + end - begin]
            x.copy_(tensors[comm.rank][begin:end])
            comm.all_reduce(x, algorithm=algorithm)
            assert reference.bits(x) == reference.bits(expected[begin:end]), (begin, end, algorithm, shift)
        block = comm.reduce_scatter(tensors[comm.rank][:4098])
        mine = expected[comm.rank * 1366 : (comm.rank + 1) * 1366]
        assert reference.bits(block) == reference.bits(mine), "reduce_scatter adds in rank order, too"

    for config in (SMALL, SMALL, MANY):
        run_threads(rank_main, 3, config=config)


@pytest.mark.parametrize("algorithm", ("ring", "tree"))
@pytest.mark.parametrize("world_size", WORLDS)
def test_ring_and_tree_bits(world_size: int, algorithm: str) -> None:
    """The same on all ranks, in all runs, and wherever the tensors lie. (At another size the order may be another.)"""
    for dtype, config in itertools.product((torch.float32, torch.float16), (SMALL, MANY)):
        tensors = wide(world_size, 5003, dtype)
        seen = {
            reference.bits(result)
            for symmetric in (False, True, False)
            for result in all_reduce(tensors, "sum", algorithm, config, symmetric)
        }
        assert len(seen) == 1, (dtype, config)


def test_avg_divides_before_it_rounds() -> None:
    """Where the sum leaves the range of float16, or its last bit would be lost, the average does not."""
    tensors = [torch.tensor([60000.0, 65504.0, 2.0**-24, 1.0], dtype=torch.float16) for _ in range(3)]
    tensors[1][2], tensors[2][3] = 5 * 2.0**-24, 1.0 + 2.0**-10
    expected = reference.reduced(tensors, "avg").to(torch.float16)
    for algorithm in ALGORITHMS:
        for result in all_reduce(tensors, "avg", algorithm):
            assert result[0] == 60000 and result[1] == 65504
            assert torch.equal(result, expected), algorithm
        assert all_reduce(tensors, "sum", algorithm)[0][0] == torch.inf


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_integers_wrap(algorithm: str) -> None:
    """Sums and products modulo 2^n, as torch's; averages of the wrapped sum truncate towards zero."""

    def rank_main(comm: Communicator) -> None:
        for dtype in INTEGERS:
            info = torch.iinfo(dtype)
            low = 249 if dtype == torch.uint8 else -7
            rows = [[info.max, info.min, 3, low], [info.max, info.min, 5, 0], [1, 1, low, 0]]
            tensors = [torch.tensor(row, dtype=dtype) for row in rows]
            for op in OPS:
                result = comm.all_reduce(tensors[comm.rank].clone(), op, algorithm=algorithm)
                assert torch.equal(result, reference.reduced(tensors, op)), (dtype, op)

    run_threads(rank_main, 3, config=SMALL)


def test_integer_references() -> None:
    """What the wrapped results are, in numbers."""
    tensors = [torch.tensor([127, -128, -7], dtype=torch.int8), torch.tensor([127, -128, 0], dtype=torch.int8)]
    for algorithm in ALGORITHMS:
        assert all_reduce(tensors, "sum", algorithm)[1].tolist() == [-2, 0, -7]
        assert all_reduce(tensors, "product", algorithm)[1].tolist() == [1, 0, 0]
        assert all_reduce(tensors, "avg", algorithm)[1].tolist() == [-1, 0, -3]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_infinity_propagate(dtype: torch.dtype, algorithm: str) -> None:
    """Whichever rank has them; minimum and maximum of a NaN are NaN, as torch's; opposite infinities add to NaN."""
    specials = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.5)
    combinations = torch.tensor(list(itertools.product(specials, repeat=3)), dtype=dtype)  # (216, 3)
    tensors = [combinations[:, rank].repeat(3) for rank in range(3)]  # 648 elements: vectors and their tails

    def rank_main(comm: Communicator) -> list[Tensor]:
        return [comm.all_reduce(tensors[comm.rank].clone(), op, algorithm=algorithm) for op in OPS]

    for results in run_threads(rank_main, 3, config=SMALL):
        for op, result in zip(OPS, results, strict=True):
            expected = reference.reduced(tensors, op).to(dtype)
            assert torch.equal(result.isnan(), expected.isnan()), op
            assert torch.equal(result.nan_to_num(), expected.nan_to_num()), op


def test_values_at_the_edges_of_the_formats() -> None:
    """Subnormal numbers, ties, and results that overflow: every 16-bit pattern plus zero, and plus its half."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for dtype in HALVES:
        x = patterns.view(dtype)
        zero = torch.full_like(x, -0.0)  # x + -0 is x, its sign included
        for algorithm in ALGORITHMS:
            result = all_reduce([x, zero], "sum", algorithm, Config(heap_bytes=0))[0]
            same = result.view(torch.int16) == x.view(torch.int16)
            assert bool((same | x.isnan()).all()) and bool(result.isnan()[x.isnan()].all()), (dtype, algorithm)
        half = torch.where(x.isfinite(), x, 0) * 0.5
        result = all_reduce([x, half], "sum", "two_shot", Config(heap_bytes=0))[1]
        expected = (x.float() + half.float()).to(dtype)
        assert bool(((result == expected) | expected.isnan()).all()), dtype


SIMD_SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import test_numerics
print(test_numerics.digest())
"""
SIMD_LEVELS = {"baseline": set(), "avx2": {"avx2", "f16c"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}


def digest() -> str:
    """The instruction set in use, and a hash of reductions: every dtype, op and algorithm, many lengths and offsets."""
    from pycoll import _C

    cases = list(itertools.product(DTYPES, OPS, ALGORITHMS))
    counts = (1, 7, 31, 64, 100, 513)

    def rank_main(comm: Communicator) -> str:
        sha = hashlib.sha256()
        for (dtype, op, algorithm), count in itertools.product(cases, counts):
            x = reference.inputs(3, count + 3, dtype, seed=count)[comm.rank]
            if dtype.is_floating_point:
                x[:: 1 + comm.rank * 7] *= 2.0 ** (comm.rank * 9 - 9)
                x[comm.rank] = (torch.inf, -torch.inf, torch.nan)[comm.rank] if count > 7 else -0.0
            for shift in (0, 1, 3):
                out = torch.zeros(count + 3, dtype=dtype)[shift : shift + count]
                comm.all_reduce(x[shift : shift + count], op, out=out, algorithm=algorithm)
                if dtype.is_floating_point:  # which NaN it is has no meaning
                    out[out.isnan()] = torch.nan
                sha.update(reference.bits(out))
        return sha.hexdigest()

    first, *others = run_threads(rank_main, 3, config=SMALL)
    assert others == [first, first]
    return f"{_C.simd} {first}"


def has_simd(level: str) -> bool:
    """Whether this CPU has the instructions."""
    info = Path("/proc/cpuinfo").read_text()
    flags = next((line.split(":")[1].split() for line in info.splitlines() if line.startswith("flags")), [])
    return SIMD_LEVELS[level] <= set(flags)


@pytest.mark.timeout(110)
def test_bits_do_not_depend_on_simd() -> None:
    """Each instruction set that this CPU has, in a process of its own."""
    script = SIMD_SCRIPT.format(tests=str(Path(__file__).parent))
    levels = [level for level in SIMD_LEVELS if has_simd(level)]
    processes = {
        level: subprocess.Popen(
            [sys.executable, "-c", script], env={**os.environ, "PYCOLL_SIMD": level}, stdout=subprocess.PIPE, text=True
        )
        for level in levels
    }
    digests = {}
    for level, process in processes.items():
        level_in_use, digests[level] = process.communicate(timeout=100)[0].split()
        assert level_in_use == level
    assert len(set(digests.values())) == 1, digests


def test_an_unknown_simd_level_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import pycoll"],
        env={**os.environ, "PYCOLL_SIMD": "sse9"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 1 and "PYCOLL_SIMD" in done.stderr and "sse9" in done.stderr, done.stderr


def test_the_reference_itself() -> None:
    """Half a unit in the last place, and a bound that a result one unit off breaks."""
    for dtype in FLOATS:
        one = torch.tensor([1.0, 1.5, 2.0**-20, 3.0e4], dtype=torch.float64)
        spacing = torch.nextafter(one.to(dtype), torch.tensor(torch.inf, dtype=dtype)).double() - one.to(dtype).double()
        assert torch.equal(reference.half_ulp(one, dtype) * 2, spacing), dtype
    tensors = [torch.ones(3), torch.ones(3)]
    off_by_one = torch.nextafter(torch.full((3,), 2.0), torch.tensor(3.0))
    off_by_one = torch.nextafter(off_by_one, torch.tensor(3.0))
    with pytest.raises(AssertionError, match="off by"):
        reference.check(off_by_one, tensors, "sum", "nudged")
