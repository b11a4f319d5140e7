"""pycoll.FusedAdam beside torch.optim.AdamW and Adam: updates, state, scaling, clipping, rounding, errors."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycoll
from pycoll import _C, FusedAdam
from pycoll.adam_state import FLOAT_STATE

SHAPES = ((), (0,), (1,), (33, 7), (5000,))
LOW = (torch.bfloat16, torch.float16)


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(*models: Iterable[Tensor], seed: int, scale: float = 1.0) -> None:
    """The same to the parameters of all models, in their own dtypes."""
    for model in models:
        generator = torch.Generator().manual_seed(seed)
        for param in model:
            param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)


def assert_close(ours: Iterable[Tensor], theirs: Iterable[Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.detach().double(), other.detach().double(), rtol=rtol, atol=atol)


def states(optimizer: torch.optim.Optimizer, name: str) -> list[Tensor]:
    return [optimizer.state[param][name] for group in optimizer.param_groups for param in group["params"]]


def bits(tensors: Iterable[Tensor]) -> list[bytes]:
    return [
        tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors if tensor.dim()
    ]


def their_optimizer(decoupled: bool) -> Callable[..., torch.optim.Optimizer]:
    return torch.optim.AdamW if decoupled else torch.optim.Adam


@pytest.mark.parametrize("weight_decay", (0.0, 0.1))
@pytest.mark.parametrize(("amsgrad", "maximize", "decoupled"), list(itertools.product((False, True), repeat=3)))
def test_follows_torch_step_by_step(amsgrad: bool, maximize: bool, decoupled: bool, weight_decay: float) -> None:
    ours, theirs = make_params(), make_params()
    rules = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": weight_decay, "amsgrad": amsgrad, "maximize": maximize}
    mine = FusedAdam(ours, decoupled_weight_decay=decoupled, **rules)
    other = their_optimizer(decoupled)(theirs, **rules)
    for step in range(20):
        give_gradients(ours, theirs, seed=step)
        mine.step()
        other.step()
        assert_close(ours, theirs)
    for name in ("step", "exp_avg", "exp_avg_sq") + ("max_exp_avg_sq",) * amsgrad:
        assert_close(states(mine, name), states(other, name))


@pytest.mark.parametrize("dtype", LOW)
def test_16_bits_follow_a_master_in_fp32(dtype: torch.dtype) -> None:
    ours = make_params(dtype)
    masters = [nn.Parameter(param.detach().float()) for param in ours]
    mine, other = FusedAdam(ours, lr=1e-2), torch.optim.AdamW(masters, lr=1e-2)
    for step in range(20):
        give_gradients(ours, seed=step)
        for master, param in zip(masters, ours, strict=True):
            master.grad = param.grad.float()  # type: ignore[union-attr]
        mine.step()
        other.step()
    assert_close(states(mine, "master_param"), masters)
    assert all(torch.equal(p, m.to(dtype)) for p, m in zip(ours, states(mine, "master_param"), strict=True))
    assert all(m.dtype == torch.float32 for name in ("exp_avg", "exp_avg_sq") for m in states(mine, name))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_step_that_no_cache_holds_has_the_bits_of_small_ones(dtype: torch.dtype) -> None:
    size = next(1 << k for k in itertools.count(16) if _C.is_large_step(1 << k))
    whole = nn.Parameter(torch.randn(size).to(dtype))
    pieces = [nn.Parameter(piece.clone()) for piece in whole.detach().split(size // 8 + 3)]
    large, small = FusedAdam([whole]), [FusedAdam([piece]) for piece in pieces]
    for _ in range(2):
        whole.grad = torch.randn(size).to(dtype)
        for piece, grad in zip(pieces, whole.grad.split(size // 8 + 3), strict=True):
            piece.grad = grad
        for optimizer in (large, *small):
            optimizer.step()
    assert torch.equal(whole, torch.cat([*pieces]))
    for name, state in large.state[whole].items():
        if state.dim():
            assert torch.equal(state, torch.cat([o.state[p][name] for o, p in zip(small, pieces, strict=True)]))


def test_without_master_small_steps_are_lost_unless_rounded_at_random() -> None:
    def run(**rules: Any) -> tuple[Tensor, FusedAdam]:
        param = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
        optimizer = FusedAdam([param], lr=1e-4, weight_decay=0, **rules)
        for _ in range(30):
            param.grad = torch.ones_like(param)
            optimizer.step()
        return param.detach().float(), optimizer

    lost, optimizer = run(master_weights=False)
    assert torch.equal(lost, torch.ones(20_000)), "1e-4 is less than half a step of bfloat16 at 1"
    assert "master_param" not in optimizer.state[optimizer.param_groups[0]["params"][0]]
    random, _ = run(master_weights=False, stochastic_rounding=True)
    spread = 2**-8 * math.sqrt(30) / math.sqrt(20_000)
    assert random.mean().item() == pytest.approx(1 - 30 * 1e-4, abs=4 * spread)
    again, _ = run(master_weights=False, stochastic_rounding=True)
    assert torch.equal(random, again), "the same in every run"
    kept, optimizer = run(stochastic_rounding=True)
    master = optimizer.state[optimizer.param_groups[0]["params"][0]]["master_param"]
    assert torch.allclose(master, torch.full_like(master, 1 - 30 * 1e-4), atol=1e-5)
    assert (kept != kept[0]).any()


@pytest.mark.parametrize("scale", (1.0, 1024.0))
def test_gradients_of_another_dtype(scale: float) -> None:
    """fp32 parameters whose gradients are rounded to 16 bits, which torch's Parameter does not allow by itself."""
    param, exp_avg, exp_avg_sq = torch.ones(3000), torch.zeros(3000), torch.zeros(3000)
    grad = torch.full((3000,), 0.5 * scale, dtype=torch.bfloat16)
    step = torch.zeros(())
    pycoll._C.adam_step(
        [param], [grad], [None], [exp_avg], [exp_avg_sq], [None], [step], [0], None, 1e-3, 0.9, 0.999, 1e-8, 0.0, True,
        False, False, torch.tensor(scale), None, None,
    )  # fmt: skip
    assert step.item() == 1
    torch.testing.assert_close(exp_avg, torch.full((3000,), 0.05))
    torch.testing.assert_close(param, torch.full((3000,), 1 - 1e-3))


@pytest.mark.parametrize("decoupled", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, *LOW))
def test_state_goes_to_torch_and_comes_from_there(decoupled: bool, dtype: torch.dtype) -> None:
    rules = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True, "eps": 1e-4}  # float16 has no 1e-8
    theirs = make_params(dtype)
    other = their_optimizer(decoupled)(theirs, **rules)
    for step in range(3):
        give_gradients(theirs, seed=step)
        other.step()
    ours = [nn.Parameter(param.detach().clone()) for param in theirs]
    mine = FusedAdam(ours, lr=1.0, decoupled_weight_decay=decoupled, stochastic_rounding=dtype is torch.float16)
    mine.load_state_dict(other.state_dict())
    assert mine.param_groups[0]["lr"] == 1e-2 and mine.param_groups[0]["amsgrad"]
    assert mine.param_groups[0]["stochastic_rounding"] == (dtype is torch.float16), "what the dict lacks stays"
    assert mine.param_groups[0]["fused"], "and is itself when saved again"
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for step in range(3, 6):
        give_gradients(ours, theirs, seed=step)
        mine.step()
        other.step()
        assert_close(ours, theirs, tolerance, tolerance)
    assert all(moment.dtype == torch.float32 for moment in states(mine, "exp_avg"))
    if dtype is not torch.float32:
        assert all(master.dtype == torch.float32 for master in states(mine, "master_param"))
    third = [nn.Parameter(param.detach().clone()) for param in ours]
    back = their_optimizer(decoupled)(third, lr=1.0)
    back.load_state_dict(copy.deepcopy(mine.state_dict()))  # torch keeps the tensors that it is given
    for step in range(6, 9):
        give_gradients(ours, third, seed=step)
        mine.step()
        back.step()
        assert_close(third, ours, tolerance, tolerance)


def test_own_state_loads_bit_for_bit() -> None:
    ours = make_params(torch.bfloat16)
    mine = FusedAdam(ours, amsgrad=True)
    for step in range(3):
        give_gradients(ours, seed=step)
        mine.step()
    file = io.BytesIO()
    torch.save(mine.state_dict(), file)
    file.seek(0)
    saved = torch.load(file)
    copies = [nn.Parameter(param.detach().clone()) for param in ours]
    loaded = FusedAdam(copies, lr=1.0)
    loaded.load_state_dict(saved)
    for name in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param"):
        assert all(torch.equal(a, b) for a, b in zip(states(loaded, name), states(mine, name), strict=True))
    give_gradients(ours, copies, seed=9)
    mine.step()
    loaded.step()
    assert bits(ours) == bits(copies)
    assert isinstance(saved["state"][0]["exp_avg"], Tensor), "the dict that was given is as it was"


def test_load_state_dict_hooks_see_tensors() -> None:
    ours = make_params()
    mine = FusedAdam(ours)
    give_gradients(ours, seed=0)
    mine.step()

    def double(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        for values in state_dict["state"].values():
            values["exp_avg"] = values["exp_avg"] * 2

    other = FusedAdam(make_params())
    other.register_load_state_dict_pre_hook(double)
    other.load_state_dict(copy.deepcopy(mine.state_dict()))
    assert_close(states(other, "exp_avg"), [moment * 2 for moment in states(mine, "exp_avg")])


def test_copies_and_pickles_go_on_alike() -> None:
    model = nn.Linear(30, 20)
    optimizer = FusedAdam(model.parameters())
    give_gradients(model.parameters(), seed=0)
    optimizer.step()
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    for other_model, other in (copy.deepcopy((model, optimizer)), torch.load(file, weights_only=False)):
        assert other.param_groups[0]["params"][0] is next(iter(other_model.parameters()))
        give_gradients(other_model.parameters(), seed=1)
        other.clip_grad_norm(1.0)
        other.step()
    give_gradients(model.parameters(), seed=1)
    optimizer.clip_grad_norm(1.0)
    optimizer.step()
    assert bits(model.parameters()) == bits(other_model.parameters())


def test_groups_missing_gradients_and_later_parameters() -> None:
    ours, theirs = make_params(), make_params()
    groups = [{"params": ours[:3], "lr": 1e-2}, {"params": ours[3:4], "weight_decay": 0.5}]
    their_groups = [{"params": theirs[:3], "lr": 1e-2}, {"params": theirs[3:4], "weight_decay": 0.5}]
    mine, other = FusedAdam(groups), torch.optim.AdamW(their_groups)
    for step in range(6):
        give_gradients(ours, theirs, seed=step)
        if step % 2:
            ours[2].grad = theirs[2].grad = None
        if step == 3:
            mine.add_param_group({"params": ours[4:], "betas": (0.5, 0.6)})
            other.add_param_group({"params": theirs[4:], "betas": (0.5, 0.6)})
        mine.step()
        other.step()
    assert_close(ours, theirs)
    assert [mine.state[p]["step"].item() for p in ours] == [6, 6, 3, 6, 3]
    nothing = FusedAdam(make_params())
    nothing.step()
    assert not nothing.state


def test_schedulers_closures_and_tensor_rates() -> None:
    ours, theirs, thirds = make_params(), make_params(), make_params()
    mine, other = FusedAdam(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    with_tensor = FusedAdam(thirds, lr=torch.tensor(1e-2))
    rates = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (mine, other, with_tensor)]
    for step in range(5):
        give_gradients(ours, theirs, thirds, seed=step)
        assert mine.step(lambda: 7.5) == 7.5
        other.step()
        with_tensor.step()
        for rate in rates:
            rate.step()
        assert_close(ours, theirs)
        assert_close(thirds, theirs)
    assert mine.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**5)


def test_closure_computes_gradients() -> None:
    param = nn.Parameter(torch.tensor([3.0]))
    optimizer = FusedAdam([param], lr=0.1, weight_decay=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(50)]
    assert losses[0] == 9 and losses[-1] < 0.5


def test_layouts() -> None:
    transposed = torch.randn(40, 30).t()
    channels_last = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    ours = [nn.Parameter(t.clone(memory_format=torch.preserve_format)) for t in (transposed, channels_last)]
    theirs = [nn.Parameter(t.clone(memory_format=torch.preserve_format)) for t in (transposed, channels_last)]
    assert not ours[0].is_contiguous()
    mine, other = FusedAdam(ours), torch.optim.AdamW(theirs)
    for step in range(3):
        give_gradients(ours, theirs, seed=step)  # of other strides than the parameters
        if step == 1:
            for model in (ours, theirs):
                model[0].grad = torch.ones(30, 1).expand(30, 40)
            theirs[0].grad = torch.ones(30, 40)
        norm = mine.clip_grad_norm(0.1)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, 0.1), rtol=1e-5, atol=0)
        mine.step()
        other.step()
        assert_close(ours, theirs)
    wide = FusedAdam([nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in ours])
    saved = mine.state_dict()
    for values in saved["state"].values():
        values["exp_avg"] = values["exp_avg"].contiguous()  # as a checkpoint may bring them
    wide.load_state_dict(saved)
    assert states(wide, "exp_avg")[0].stride() == ours[0].stride()
    assert_close(states(wide, "exp_avg"), states(mine, "exp_avg"))


@pytest.mark.parametrize("max_norm", (0.5, 1e4, math.inf))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_clipping(max_norm: float, dtype: torch.dtype) -> None:
    ours = make_params(dtype)
    theirs = [nn.Parameter(param.detach().float()) for param in ours]
    mine, other = FusedAdam(ours), torch.optim.AdamW(theirs)
    for step in range(3):
        give_gradients(ours, seed=step)
        for param, their in zip(ours, theirs, strict=True):
            their.grad = param.grad.float().clone()  # type: ignore[union-attr]
        before = bits(param.grad for param in ours)  # type: ignore[misc]
        norm = mine.clip_grad_norm(max_norm)
        assert norm.shape == () and norm.dtype == torch.float32
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, max_norm), rtol=1e-5, atol=0)
        mine.step()
        other.step()
        assert bits(param.grad for param in ours) == before, "nothing is written"  # type: ignore[misc]
    assert_close(states(mine, "exp_avg"), states(other, "exp_avg"))
    weights = ours if dtype is torch.float32 else states(mine, "master_param")
    assert_close(weights, theirs)


def test_clipping_holds_for_one_step() -> None:
    ours, theirs = make_params(), make_params()
    mine, other = FusedAdam(ours), torch.optim.AdamW(theirs)
    give_gradients(ours, theirs, seed=0)
    mine.clip_grad_norm(1e-3)
    nn.utils.clip_grad_norm_(theirs, 1e-3)
    for seed in (0, 1):
        mine.step()
        other.step()
        give_gradients(ours, theirs, seed=seed + 1)
    mine.clip_grad_norm(1e-3)
    mine.zero_grad()
    other.zero_grad()
    give_gradients(ours, theirs, seed=5)
    mine.step()
    other.step()
    assert_close(states(mine, "exp_avg"), states(other, "exp_avg"))


def test_norm_does_not_depend_on_threads() -> None:
    params = [nn.Parameter(torch.randn(n)) for n in (3, 100_000, 5000, 1)]
    optimizer = FusedAdam(params)
    give_gradients(params, seed=0)
    before = torch.get_num_threads()
    try:
        norms, results = set(), []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            norms.add(optimizer.clip_grad_norm(1.0).item())
            copied_params, copied = copy.deepcopy((params, optimizer))
            give_gradients(copied_params, seed=0)
            copied.step()
            results.append(bits(copied_params))
    finally:
        torch.set_num_threads(before)
    assert len(norms) == 1 and all(result == results[0] for result in results)


def test_norm_of_nothing_and_of_what_is_not_finite() -> None:
    params = make_params()
    optimizer = FusedAdam(params)
    assert optimizer.clip_grad_norm(1.0).item() == 0
    give_gradients(params, seed=0)
    params[3].grad[2, 2] = math.inf  # type: ignore[index]
    assert optimizer.clip_grad_norm(1.0).item() == math.inf
    params[4].grad[77] = math.nan  # type: ignore[index]
    assert math.isnan(optimizer.clip_grad_norm(1.0).item())
    optimizer.step()
    assert all(param.isnan().all() for param in params), "as after torch's clip_grad_norm_"
    assert optimizer.clip_grad_norm(1.0).shape == ()


@pytest.mark.parametrize("fast", (True, False))
@pytest.mark.parametrize("clip", (True, False))
def test_grad_scaler(fast: bool, clip: bool) -> None:
    """`fast`: clip_grad_norm is given the scaler; otherwise torch's own ways are gone."""
    ours, theirs = make_params(), make_params()
    mine, other = FusedAdam(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    my_scaler, their_scaler = (torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2))
    max_norm = 0.5 if clip else math.inf
    for step in range(8):
        for scaler, model in ((my_scaler, ours), (their_scaler, theirs)):
            scale = scaler.scale(torch.ones(())).item()
            give_gradients(model, seed=step, scale=scale)
            if step in (2, 5):
                model[4].grad[99] = math.inf if step == 2 else math.nan  # type: ignore[index]
        their_scaler.unscale_(other)
        expected = nn.utils.clip_grad_norm_(theirs, max_norm) if clip else None
        norm = None
        if fast:
            norm = mine.clip_grad_norm(max_norm, scaler=my_scaler)
        elif clip:
            my_scaler.unscale_(mine)
            norm = mine.clip_grad_norm(max_norm, scaler=my_scaler if step % 2 else None)
        if norm is not None and expected is not None:
            torch.testing.assert_close(norm, expected, equal_nan=True, rtol=1e-5, atol=0)
        before = bits(ours)
        my_scaler.step(mine)
        their_scaler.step(other)
        assert (bits(ours) == before) == (step in (2, 5)), "skipped where a gradient is not finite"
        my_scaler.update()
        their_scaler.update()
        assert my_scaler.get_scale() == their_scaler.get_scale()
        assert_close(ours, theirs)
    assert [state.item() for state in states(mine, "step")] == [6.0] * len(SHAPES)


def test_a_scaler_that_is_off_or_has_stepped() -> None:
    ours, theirs = make_params(), make_params()
    mine, other = FusedAdam(ours), FusedAdam(theirs)
    give_gradients(ours, theirs, seed=0)
    off = torch.amp.GradScaler("cpu", enabled=False)
    assert mine.clip_grad_norm(0.5, scaler=off) == other.clip_grad_norm(0.5)
    off.step(mine)
    other.step()
    assert bits(ours) == bits(theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    mine.clip_grad_norm(0.5)
    with pytest.raises(pycoll.UsageError, match="needs the scaler"):
        scaler.step(mine)
    mine.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    give_gradients(ours, seed=1, scale=8.0)
    scaler.scale(torch.ones(()))
    mine.clip_grad_norm(0.5, scaler=scaler)
    scaler.step(mine)
    with pytest.raises(pycoll.UsageError, match=r"scaler\.update"):
        mine.clip_grad_norm(0.5, scaler=scaler)


def test_float16_gradients_are_unscaled_within_the_step() -> None:
    """Where torch refuses: unscaled they would underflow."""
    param = nn.Parameter(torch.ones(100, dtype=torch.float16))
    optimizer = FusedAdam([param], weight_decay=0, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.ones(()))
    param.grad = torch.full_like(param, 2.0**-10)
    norm = optimizer.clip_grad_norm(math.inf, scaler=scaler)
    assert norm.item() == 10 * 2.0**-26
    scaler.step(optimizer)
    assert optimizer.state[param]["exp_avg"][0].item() == pytest.approx(0.1 * 2.0**-26)


def test_autograd_sees_the_change() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = FusedAdam([param])
    product = (param * param).sum()
    param.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"lr": math.nan}, "lr must be"),
        ({"lr": torch.ones(2)}, "lr must have one element"),
        ({"eps": -1e-8}, "eps must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"betas": (1.0, 0.9)}, "betas must be"),
    ],
)
def test_bad_numbers(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(pycoll.UsageError, match=said):
        FusedAdam(make_params(), **arguments)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.ones(3, dtype=torch.float64), "Double"),
        (torch.ones(3, dtype=torch.complex64), "ComplexFloat"),
        (torch.ones(4, 4)[:, ::2], "gaps or overlaps"),
        (torch.ones(1).expand(3), "gaps or overlaps"),
        (torch.ones(3, device="meta"), "on meta"),
    ],
)
def test_parameters_that_it_cannot_do(tensor: Tensor, said: str) -> None:
    param = nn.Parameter(tensor)
    param.grad = torch.ones_like(param)
    with pytest.raises(pycoll.UnsupportedError, match=said):
        FusedAdam([param]).step()


def test_gradients_and_states_that_do_not_fit() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    optimizer = FusedAdam(embedding.parameters())
    with pytest.raises(pycoll.UnsupportedError, match=r"sparse.*to_dense"):
        optimizer.step()
    with pytest.raises(pycoll.UnsupportedError, match="sparse"):
        optimizer.clip_grad_norm(1.0)
    param = nn.Parameter(torch.ones(10))
    optimizer = FusedAdam([param])
    param.grad = torch.ones(10)
    optimizer.step()
    with pytest.raises(pycoll.UsageError, match="max_norm"):
        optimizer.clip_grad_norm(0.0)
    for name, bad in (("exp_avg", torch.ones(10).double()), ("exp_avg_sq", torch.ones(9)), ("step", torch.ones(2))):
        kept = optimizer.state[param][name]
        optimizer.state[param][name] = bad
        with pytest.raises(pycoll.UsageError, match=name):
            optimizer.step()
        optimizer.state[param][name] = kept
    optimizer.step()


def test_large_states_begin_at_places_of_their_own_in_a_page() -> None:
    param = torch.nn.Parameter(torch.randn(300, 400).t().to(torch.bfloat16))
    param.grad = torch.randn_like(param)
    optimizer = pycoll.FusedAdam([param], amsgrad=True)
    others = [torch.zeros(5000 * k) for k in range(1, 20)]  # so that memory begins anywhere
    del others[::2]
    optimizer.step()

    def check() -> None:
        states = {name: value for name, value in optimizer.state[param].items() if name != "step"}
        assert [states[name].data_ptr() % 4096 for name in FLOAT_STATE] == [832, 1664, 2496, 3328]
        assert all(state.stride() == param.stride() for state in states.values())

    check()
    optimizer.load_state_dict(optimizer.state_dict())
    check()


@pytest.mark.parametrize("size", (20, 200))
def test_states_lie_where_parameters_do_whatever_the_default_device_is(size: int) -> None:
    param = torch.nn.Parameter(torch.randn(size, size))
    param.grad = torch.randn_like(param)
    optimizer = pycoll.FusedAdam([param])
    with torch.device("meta"):
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    assert optimizer.state[param]["exp_avg"].device == param.device
    assert optimizer.state[param]["exp_avg"].abs().sum() > 0
