"""Learning-rate schedules: the paper's numbers, and what torch's schedulers promise."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dist_lamb import Lamb, schedules

#: arXiv 1904.00962 v5, BERT: (batch, lr, share of the steps that is warm-up).
PAPER = [
    (512, 5 / (2**3.0 * 1e3), 1 / 320),
    (1024, 5 / (2**2.5 * 1e3), 1 / 160),
    (2048, 5 / (2**2.0 * 1e3), 1 / 80),
    (4096, 5 / (2**1.5 * 1e3), 1 / 40),
    (8192, 5 / (2**1.0 * 1e3), 1 / 20),
    (16384, 5 / (2**0.5 * 1e3), 1 / 10),
    (32768, 5 / (2**0.0 * 1e3), 1 / 5),
]
SAMPLES = 512 * 1_000_000


def optimizer(lr: float | torch.Tensor = 1.0) -> Lamb:
    return Lamb([nn.Parameter(torch.zeros(1))], lr=lr)


def lrs(opt: Lamb, scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    """The lr of each of the next steps."""
    found = []
    for _ in range(steps):
        found.append(float(opt.param_groups[0]["lr"]))
        opt.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("batch", "lr", "share"), PAPER)
def test_the_paper_s_lr(batch: int, lr: float, share: float) -> None:
    assert schedules.sqrt_scaled_lr(6.25e-4, 512, batch) == pytest.approx(lr, rel=1e-12)
    assert schedules.sqrt_scaled_lr(5e-3, 32768, batch) == pytest.approx(lr, rel=1e-12)


def test_the_ends_of_the_paper_s_range() -> None:
    assert schedules.sqrt_scaled_lr(6.25e-4, 512, 32768) == 5e-3
    assert schedules.sqrt_scaled_lr(6.25e-4, 512, 512) == 6.25e-4


@pytest.mark.parametrize("epochs", [1, 40])
@pytest.mark.parametrize(("batch", "lr", "share"), PAPER)
def test_the_paper_s_warm_up(batch: int, lr: float, share: float, epochs: int) -> None:
    """A number of epochs that grows with the batch: a fixed number of 3125 steps."""
    warmup_epochs = epochs / 320 * (batch / 512)
    steps = schedules.linear_epoch_warmup_steps(warmup_epochs, SAMPLES // epochs, batch)
    assert steps / (SAMPLES / batch) == pytest.approx(share, rel=1e-12)
    assert steps == 3125


def test_warm_up_steps_are_rounded() -> None:
    assert schedules.linear_epoch_warmup_steps(1, 100, 30) == 3
    assert schedules.linear_epoch_warmup_steps(1, 110, 30) == 4
    assert schedules.linear_epoch_warmup_steps(0, 110, 30) == 0
    assert schedules.linear_epoch_warmup_steps(0.5, 110, 30) == 2


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_warm_up_and_decay(tensor_lr: bool) -> None:
    lr = torch.tensor(2.0) if tensor_lr else 2.0
    opt = optimizer(lr)
    got = lrs(opt, schedules.warmup_linear_decay(opt, 4, 10), 13)
    want = [0.5, 1.0, 1.5, 2.0, 2.0, 10 / 6, 8 / 6, 1.0, 4 / 6, 2 / 6, 0.0, 0.0, 0.0]
    assert got == pytest.approx(want)
    assert (opt.param_groups[0]["lr"] is lr) == tensor_lr


@pytest.mark.parametrize(
    ("warmup", "total", "end", "want"),
    [
        (0, 4, 0.0, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        (0, 4, 0.5, [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]),
        (0, 4, 1.0, [1.0] * 6),
        (4, 4, 0.25, [0.25, 0.5, 0.75, 1.0, 0.25, 0.25]),
        (1, 3, 0.0, [1.0, 1.0, 0.5, 0.0, 0.0]),
        (1, 1, 0.0, [1.0, 0.0, 0.0]),
        # fractions, as 0.06 * total is one: both lines as they are, met at whole steps
        (2.5, 10, 0.0, [0.4, 0.8, 1.0, 7 / 7.5, 6 / 7.5, 5 / 7.5]),
        (0.5, 4, 0.0, [1.0, 3 / 3.5, 2 / 3.5, 1 / 3.5, 0.0, 0.0]),
        (3.5, 4, 0.5, [1 / 3.5, 2 / 3.5, 3 / 3.5, 1.0, 0.5, 0.5]),
        (1.8, 2.5, 0.0, [1 / 1.8, 1.0, 0.5 / 0.7, 0.0]),
        (2.5, 2.5, 0.0, [0.4, 0.8, 1.0, 0.0]),
    ],
)
def test_edges(warmup: float, total: float, end: float, want: list[float]) -> None:
    opt = optimizer()
    got = lrs(opt, schedules.warmup_linear_decay(opt, warmup, total, end), len(want))
    assert got == pytest.approx(want)


def test_groups_keep_their_ratio() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    opt = Lamb([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.25}])
    scheduler = schedules.warmup_linear_decay(opt, 2, 6)
    for _ in range(6):
        assert opt.param_groups[0]["lr"] == 4 * opt.param_groups[1]["lr"] > 0
        opt.step()
        scheduler.step()


def test_resuming() -> None:
    opt = optimizer()
    whole = lrs(opt, schedules.warmup_linear_decay(opt, 3, 9, 0.1), 9)
    opt = optimizer()
    scheduler = schedules.warmup_linear_decay(opt, 3, 9, 0.1)
    assert lrs(opt, scheduler, 5) == whole[:5]
    resumed = optimizer(7.0)
    again = schedules.warmup_linear_decay(resumed, 3, 9, 0.1)
    resumed.load_state_dict(opt.state_dict())
    again.load_state_dict(scheduler.state_dict())
    assert lrs(resumed, again, 4) == whole[5:]


def test_a_second_phase_warms_up_from_zero_again() -> None:
    """BERT's phase of sequence length 512 starts where the first one has ended: at lr 0."""
    opt = optimizer(2.0)
    lrs(opt, schedules.warmup_linear_decay(opt, 2, 4), 4)
    assert opt.param_groups[0]["lr"] == 0.0
    second = lrs(opt, schedules.warmup_linear_decay(opt, 4, 6), 6)
    assert second == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 1.0])


@given(
    total=st.integers(1, 60),
    share=st.floats(0, 1),
    end=st.floats(0, 1),
)
def test_up_then_down(total: int, share: float, end: float) -> None:
    warmup = round(total * share)
    opt = optimizer()
    got = lrs(opt, schedules.warmup_linear_decay(opt, warmup, total, end), total + 2)
    assert all(a < b for a, b in itertools.pairwise(got[:warmup]))
    assert all(a >= b for a, b in itertools.pairwise(got[warmup:]))
    assert max(got) == 1.0
    assert got[0] > 0
    assert got[total:] == pytest.approx([end, end])


@given(total=st.floats(1, 60), share=st.floats(0, 1), end=st.floats(0, 1))
def test_fractions_never_pass_the_peak(total: float, share: float, end: float) -> None:
    """And whole numbers give the same bits, whatever their type."""
    opt = optimizer()
    got = lrs(opt, schedules.warmup_linear_decay(opt, total * share, total, end), 63)
    assert 0 <= min(got) <= max(got) <= 1.0
    peak = got.index(max(got))
    assert got[:peak] == sorted(got[:peak])
    assert got[peak:] == sorted(got[peak:], reverse=True)
    whole, warmup = round(total), round(round(total) * share)
    opt, other = optimizer(), optimizer()
    same = lrs(opt, schedules.warmup_linear_decay(opt, warmup, whole, end), 63)
    assert same == lrs(other, schedules.warmup_linear_decay(other, float(warmup), whole, end), 63)
    for done, lr in enumerate(same):
        left = max(0.0, (whole - done) / max(1, whole - warmup))
        line = end + (1.0 - end) * min(1.0, left)
        assert lr == ((done + 1) / warmup if done < warmup else line)
