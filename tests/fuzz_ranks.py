"""Random schedules of ranks: every one ends right to the bit, or in one error on all ranks.

``python tests/fuzz_ranks.py 0 500 --world 3`` runs seeds 0 to 499 on three ranks.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import models
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_lamb import Lamb, ShardedLamb

#: A group's timeout: no schedule may take longer.
TIMEOUT = 40.0
SIZES = [(3,), (40, 30), (1,), (0,), (1500,), (7, 5), (2100,)]
STEPS = 4


class Interrupted(Exception):
    """Raised inside a backward."""


class Layers(nn.Module):
    """Losses that are linear in each layer, so that gradients are what they are meant to be."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layers = nn.ParameterList(
            nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES
        )

    def forward(self, x: Tensor, factors: dict[int, float], saved: Sequence[int]) -> Tensor:
        for i, factor in factors.items():
            if i in saved:
                x = checkpoint(self._layer, x, i, factor, use_reentrant=saved[0] % 2 == 0)
            else:
                x = self._layer(x, i, factor)
        return x

    def _layer(self, x: Tensor, i: int, factor: float) -> Tensor:
        return x + (self.layers[i] * factor).sum()


@dataclass
class Micro:
    """One micro-batch of one rank."""

    factors: dict[int, float]  # by layer: what its gradient is filled with
    saved: list[int]  # layers that are checkpointed
    sync: bool = True
    raises: bool = False
    saliency: bool = False  # torch.autograd.grad of the input, after it


@dataclass
class Step:
    micros: list[list[Micro]]  # by rank
    frozen: set[int]
    #: by rank: layers whose gradients are multiplied after backward
    edits: list[dict[int, float]]
    dropped: bool = False  # zero_grad() in the place of step()


@dataclass
class Plan:
    """What all ranks do; made from a seed, the same on every rank."""

    options: dict[str, Any]
    given: str
    steps: list[Step] = field(default_factory=list)
    #: whether all ranks run backward alike: then there must be no error
    alike: bool = True

    @staticmethod
    def of(seed: int, world: int) -> Plan:
        r = random.Random(seed)
        options: dict[str, Any] = {
            "stage": r.choice((1, 2, 2, 2)),
            "overlap": r.random() < 0.8,
            "bucket_numel": r.choice((1, 2**11, 2**20)),
            "max_grad_norm": r.choice((None, 1.0)),
        }
        if options["stage"] == 2 and options["overlap"] and r.random() < 0.3:
            options["accumulate"] = "sharded"
        plan = Plan(options, r.choice(("module", "module", "list")))
        in_backward = options["stage"] == 2 and options["overlap"]
        unlike = r.random() < 0.4
        frozen: set[int] = set()
        for _ in range(STEPS):
            if r.random() < 0.3:
                frozen = {i for i in range(len(SIZES)) if r.random() < 0.3}
            step = Step([], set(frozen), [], r.random() < 0.1)
            shared = [(r.random() < 0.3, r.random()) for _ in range(r.randint(1, 3))]
            for _ in range(world):
                shape = list(shared)
                if unlike and r.random() < 0.2:
                    if len(shape) > 1 and r.random() < 0.5:
                        shape.pop(r.randrange(len(shape)))
                    else:
                        shape.append((r.random() < 0.3, r.random()))
                mine = []
                for local, _ in shape:
                    used = [i for i in range(len(SIZES)) if r.random() < 0.6 and i not in frozen]
                    if not any(SIZES[i] != (0,) for i in used):
                        used += [i for i in range(len(SIZES)) if i not in frozen and i != 3][:1]
                    factors = {i: float(world * r.randint(-3, 3)) for i in used}
                    saved = [i for i in used if r.random() < 0.3]
                    micro = Micro(factors, saved, sync=not local, saliency=r.random() < 0.2)
                    if saved and saved[0] % 2 == 0:
                        micro.saliency = False  # not with reentrant checkpoints
                    if unlike and r.random() < 0.05:
                        micro.raises = True
                    mine.append(micro)
                step.micros.append(mine)
                edited = not in_backward and r.random() < 0.3
                step.edits.append(
                    {r.randrange(len(SIZES)): 0.5 * r.randint(0, 4)} if edited else {}
                )
            plan.steps.append(step)
        plan.steps[-1].dropped = False  # after it a rank that is ahead would have no partner
        plan.alike = not unlike
        return plan


def _mean(grads: list[list[Tensor | None]], world: int) -> list[Tensor | None]:
    means = []
    for ranks in zip(*grads):
        there = [g for g in ranks if g is not None]
        means.append(torch.stack(there).sum(dim=0) / world if there else None)
    return means


def expected(plan: Plan, world: int) -> str:
    """By Lamb on one rank, of gradients that are added up and averaged in the plainest way."""
    model = Layers()
    params = list(model.layers)
    lamb = Lamb(params, lr=0.1, max_grad_norm=plan.options["max_grad_norm"], impl="foreach")
    for step in plan.steps:
        grads: list[list[Tensor | None]] = [[None] * len(params) for _ in range(world)]
        for rank, micros in enumerate(step.micros):
            mine = grads[rank]
            for micro in micros:
                for i, factor in micro.factors.items():
                    one, so_far = torch.full_like(params[i], factor), mine[i]
                    mine[i] = one if so_far is None else so_far + one
            for i, factor in step.edits[rank].items():
                edited = mine[i]
                if edited is not None:
                    mine[i] = edited * factor
        if not step.dropped:
            for p, mean in zip(params, _mean(grads, world)):
                p.grad = mean
            lamb.step()
            lamb.zero_grad()
    return models.digest({str(i): p.detach() for i, p in enumerate(params)})


def _stop(_: Tensor) -> None:
    raise Interrupted


def backward(model: Layers, micro: Micro) -> None:
    x = torch.zeros((), requires_grad=True)
    y = model(x, micro.factors, micro.saved)
    if micro.saliency:
        torch.autograd.grad(y, x, retain_graph=True)
    handle = None
    if micro.raises and micro.factors:
        # Of the layer that is used first, whose gradient comes last or nearly so.
        handle = model.layers[min(micro.factors)].register_hook(_stop)  # type: ignore[no-untyped-call]
    try:
        y.backward()
    except Interrupted:
        pass
    finally:
        if handle is not None:
            handle.remove()


def train(plan: Plan, rank: int, group: Any) -> str:
    model = Layers()
    given = model if plan.given == "module" else list(model.layers)
    optimizer = ShardedLamb(given, lr=0.1, impl="foreach", process_group=group, **plan.options)
    for step in plan.steps:
        for i, p in enumerate(model.layers):
            p.requires_grad_(i not in step.frozen)
        for micro in step.micros[rank]:
            if micro.sync:
                backward(model, micro)
            else:
                with optimizer.no_sync():
                    backward(model, micro)
        for i, factor in step.edits[rank].items():
            if model.layers[i].grad is not None:
                model.layers[i].grad.data.mul_(factor)
        if not step.dropped:
            optimizer.step()
        optimizer.zero_grad()
    return models.digest({str(i): p.detach() for i, p in enumerate(model.layers)})


def outcome(seed: int, rank: int, world: int) -> tuple[str, str, float]:
    """("right" | "wrong" | "error", what it was, seconds) of one rank."""
    plan = Plan.of(seed, world)
    raised = any(m.raises for s in plan.steps for micros in s.micros for m in micros)
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    began = time.monotonic()
    try:
        got = train(plan, rank, group)
    except RuntimeError as error:
        if str(error).startswith("ranks are out of step: rank"):
            return "error", str(error), time.monotonic() - began
        return "wrong", traceback.format_exc(), time.monotonic() - began
    right = raised or got == expected(plan, world)  # what a broken off backward left is not known
    return ("right" if right else "wrong"), got, time.monotonic() - began


def _run(rank: int, world: int, seeds: Sequence[int]) -> list[tuple[str, str, float]]:
    found = []
    for seed in seeds:
        found.append(outcome(seed, rank, world))
        dist.barrier()
    return found


def check(seeds: Sequence[int], world: int, folder: Path, timeout: float = 280.0) -> dict[str, int]:
    """How many seeds ended in which way. Raises AssertionError naming a seed."""
    ranks = run_ranks(world, folder, _run, list(seeds), timeout=timeout)
    ends = {"right": 0, "error": 0}
    for k, seed in enumerate(seeds):
        ways = [rank[k] for rank in ranks]
        said = "\n".join(f"rank {r}: {way}" for r, way in enumerate(ways))
        told = f"seed {seed}, {world} ranks: {Plan.of(seed, world)}\n{said}"
        assert len({way[:2] for way in ways}) == 1, told
        assert ways[0][0] in ends, told
        assert max(way[2] for way in ways) < TIMEOUT, told
        if Plan.of(seed, world).alike:
            assert ways[0][0] == "right", told
        ends[ways[0][0]] += 1
    return ends


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--world", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seeds = range(args.first, args.first + args.count)
        print(check(seeds, args.world, Path(folder), timeout=3600.0))
