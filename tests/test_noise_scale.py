"""The gradient noise scale, against one that is known, and over ranks against one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from dist_lamb import (
    GradientNoiseScale,
    Lamb,
    ShardedLamb,
    gradient_noise_scale,
    param_groups,
)

DIMS, SIGMA = 400, 2.0


class Mean(nn.Module):
    """Its gradient of a batch is 2 * (x - mean of the batch) / 2: known mean and variance."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.full((DIMS,), 0.5))

    def forward(self, samples: Tensor) -> Tensor:
        return 0.5 * (self.x - samples).square().sum(1).mean()


def samples(step: int, count: int) -> Tensor:
    return SIGMA * torch.randn(count, DIMS, generator=torch.Generator().manual_seed(step))


def measure(accumulate: int, steps: int = 30, batch: int = 32) -> tuple[Any, list[Tensor]]:
    model = Mean()
    opt = Lamb(model.parameters(), lr=0.0, track_grad_norm=True)
    noise = GradientNoiseScale(model, small_batch=batch // accumulate, big_batch=batch, decay=0.98)
    found = []
    for step in range(steps):
        for i, part in enumerate(samples(step, batch).chunk(accumulate)):
            if i == 0:
                with noise.watch(1 / accumulate):
                    (model(part) / accumulate).backward()
            else:
                (model(part) / accumulate).backward()
        opt.step()
        opt.zero_grad()
        found.append(noise.update(opt.grad_norm()).scale)
    return noise, found


def test_a_known_noise_scale() -> None:
    """|G|^2 = 400 * 0.25, tr(S) = 400 * 4: 16 samples."""
    noise, found = measure(accumulate=4)
    assert float(noise.mean().noise) == pytest.approx(DIMS * SIGMA**2, rel=0.05)
    assert float(noise.mean().signal) == pytest.approx(DIMS * 0.25, rel=0.15)
    assert float(noise.mean().scale) == pytest.approx(16.0, rel=0.15)
    assert len(found) == 30


def test_formulas() -> None:
    """With the expected norms put in, the exact numbers come out."""
    signal, noise = torch.tensor(3.0), torch.tensor(24.0)
    got = gradient_noise_scale(signal + noise / 4, signal + noise / 32, 4, 32)
    torch.testing.assert_close(got.signal, signal)
    torch.testing.assert_close(got.noise, noise)
    torch.testing.assert_close(got.scale, torch.tensor(8.0))


def _ranks(rank: int, world: int) -> dict[int, list[float]]:
    found = {}
    for stage in (1, 2):
        model = Mean()
        opt = ShardedLamb(model, lr=0.0, stage=stage, track_grad_norm=True)
        noise = GradientNoiseScale(model, small_batch=32 // world, big_batch=32)
        found[stage] = []
        for step in range(4):
            with noise.watch():
                model(samples(step, 32).chunk(world)[rank]).backward()
            opt.step()
            opt.zero_grad()
            found[stage].append(float(noise.update(opt.grad_norm()).noise))
    return found


@pytest.mark.xdist_group("ranks")
def test_over_ranks(tmp_path: Path) -> None:
    """Small batches are the ranks' own: as one process that looks at each half."""
    wanted = []
    for step in range(4):
        halves = [p.grad for part in samples(step, 32).chunk(2) for p in _backward(part)]
        whole = (halves[0] + halves[1]) / 2
        small = sum(h.double().square().sum() for h in halves) / 2
        wanted.append(float(gradient_noise_scale(small, whole.square().sum(), 16, 32).noise))
    for found in run_ranks(2, tmp_path, _ranks):
        assert found[1] == pytest.approx(wanted, rel=1e-5)
        assert found[2] == pytest.approx(wanted, rel=1e-5)


def _backward(part: Tensor) -> list[Any]:
    model = Mean()
    model(part).backward()
    return list(model.parameters())


def test_a_step_that_is_not_finite_is_left_out() -> None:
    noise, _ = measure(accumulate=2, steps=3)
    before = float(noise.mean().scale)
    noise._watched = torch.tensor(float("inf"), dtype=torch.float64)
    noise.update(torch.tensor(1.0))
    assert float(noise.mean().scale) == before


def test_a_state_goes_on() -> None:
    """The means of a training that was resumed are those of one that was not."""
    noise, _ = measure(accumulate=2, steps=3)
    other = GradientNoiseScale(Mean(), small_batch=16, big_batch=32, decay=0.98)
    other.load_state_dict(GradientNoiseScale(Mean(), small_batch=1, big_batch=2).state_dict())
    assert not other.mean().scale.isfinite()
    other.load_state_dict(json.loads(json.dumps(noise.state_dict())))
    for each in (noise, other):
        each._watched = torch.tensor(2.5, dtype=torch.float64)
        each.update(torch.tensor(1.5))
    assert torch.equal(torch.stack(noise.mean()), torch.stack(other.mean()))
    for wrong in ({}, {"sums": [1.0]}, {"sums": 3}, {"sums": "abc"}):
        with pytest.raises(ValueError, match="no state of a GradientNoiseScale"):
            other.load_state_dict(wrong)
    assert torch.equal(torch.stack(noise.mean()), torch.stack(other.mean()))


def test_no_hook_stays() -> None:
    model = Mean()
    noise = GradientNoiseScale(model, small_batch=1, big_batch=2)
    with pytest.raises(ZeroDivisionError), noise.watch():
        raise ZeroDivisionError
    assert not model.x._backward_hooks
    with pytest.raises(RuntimeError, match="watch"):
        noise.update(torch.tensor(1.0))
    assert bool(noise.mean().scale.isnan())


@pytest.mark.parametrize("batches", [(0, 4), (4, 4), (8, 4)])
def test_batches_that_say_nothing(batches: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="small_batch < big_batch"):
        GradientNoiseScale(Mean(), small_batch=batches[0], big_batch=batches[1])
    with pytest.raises(ValueError, match="decay"):
        GradientNoiseScale(Mean(), small_batch=1, big_batch=4, decay=1.0)


def test_what_optimizers_take() -> None:
    """Groups and named params too; frozen ones are left out of all."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).requires_grad_(False))
    given = (
        model,
        model.parameters(),
        model.named_parameters(),
        param_groups(model),
        Lamb(model).param_groups,
        [{"params": model[0].weight}, {"params": model[0].bias}],
    )
    found = []
    for params in given:
        noise = GradientNoiseScale(params, small_batch=2, big_batch=4)
        with noise.watch():
            model(torch.ones(2, 3)).sum().backward()
        found.append(float(noise.update(torch.tensor(3.0)).noise))
    assert found == pytest.approx([found[0]] * len(given))


@pytest.mark.parametrize("params", [torch.ones(3), None, ["weight"], [("weight", 1.0)], {"a": 1}])
def test_what_is_no_params(params: Any) -> None:
    message = r"^GradientNoiseScale takes a module, or what an optimizer takes: tensors, "
    with pytest.raises(TypeError, match=message):
        GradientNoiseScale(params, small_batch=1, big_batch=2)


def test_a_norm_that_is_a_number() -> None:
    """DeepSpeed's and torch's clipping give it as either."""
    model, found = Mean(), []
    noise = GradientNoiseScale(model, small_batch=1, big_batch=2)
    for norm in (torch.tensor(3.0), 3.0, 3):
        with noise.watch():
            model(samples(0, 1)).backward()
        with pytest.raises(TypeError, match=r"^grad_norm is a number or a 0-d tensor; got None"):
            noise.update(None)  # type: ignore[arg-type]
        found.append(float(noise.update(norm).noise))
    assert found == [found[0]] * 3
