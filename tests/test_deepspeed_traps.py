"""DeepSpeed's silent traps: each is an error or a warning here, and a LAMB that knows nothing of
DeepSpeed goes into it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed_runs import (
    DTYPES,
    OPTIONS,
    Case,
    Given,
    Run,
    launched,
    start_values,
    worst_error,
)
from ranks import run_ranks
from torch import Tensor, nn

from dist_lamb import Lamb, ShardedLamb
from dist_lamb.deepspeed_adapter import DeepSpeedLamb, register

pytestmark = [
    pytest.mark.xdist_group("programs"),
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

BF16_OPTIMIZER = Case(1, "bf16", config={"data_types": {"grad_accum_dtype": "fp32"}})


def _traps(rank: int, world: int, folder: str) -> None:
    """Many small checks in one spawn; each raises where it fails."""
    _imported_without_an_engine(rank, world)  # before there is DeepSpeed's process group
    launched(rank, world)
    for check in (
        _names_that_are_taken,
        _plain_optimizers_are_refused,
        _experts_and_a_norm_of_ones_own,
        _loaded_weights,
        _loaded_by_deepspeed,
        _another_optimizer_trains,
        _gradients_of_a_skipped_step,
        _a_state_dict_before_there_is_an_engine,
        _nothing_to_warn_of,
    ):
        check(rank, world)
        dist.barrier()
    _lrs_through_a_universal_checkpoint(rank, world, folder)
    _a_checkpoint_of_adamw(rank, world, folder)
    # at the end: DeepSpeed keeps a pipeline's groups for whatever is made after it
    _pipeline_and_a_norm_of_ones_own(rank, world)


def test_traps(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    run_ranks(2, tmp_path, _traps, str(tmp_path / "saved"), timeout=280)


def _imported_without_an_engine(rank: int, world: int) -> None:
    """Trainer with use_cpu, or DDP: as Lamb."""
    import deepspeed

    assert not deepspeed.comm.is_initialized()
    params = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    for kind, p in zip((DeepSpeedLamb, Lamb), params):
        p.grad = torch.full_like(p, 0.5)
        kind([p], **OPTIONS).step()
    assert torch.equal(*params)


def _names_that_are_taken(rank: int, world: int) -> None:
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    register()
    register()
    assert ZERO_SUPPORTED_OPTIMIZERS.count(DeepSpeedLamb) == 1
    for name in ("Lamb", "lamb", "MuonLamb", "Adam", "AdamW"):
        with pytest.raises(ValueError, match="is an optimizer of DeepSpeed's own"):
            register(name)
    with pytest.raises(ValueError, match=r"torch.optim.SGD is something else"):
        register("SGD")
    with pytest.raises(ValueError, match="Invalid name: 'my lamb'"):
        register("my lamb")
    assert type(torch.optim.SGD([torch.zeros(1, requires_grad=True)])).__name__ == "SGD"
    # what DeepSpeed refuses by itself, in its own words
    with pytest.raises(ValueError, match="switch to using the deepspeed parameter 'gradient_clip"):
        Run(Case(2, by_name=True, options={"max_grad_norm": 1.0}), rank, world)


def one_step(make: Callable[[Any], Any], case: Case, rank: int, world: int) -> Any:
    import deepspeed

    model = Given(start_values(DTYPES[case.dtype]))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=make(model.named_parameters()), config=case.make_config()
    )
    engine.backward(engine(case.gradients(start_values(DTYPES[case.dtype]), 0, rank, world)))
    engine.step()
    return engine


def _plain_optimizers_are_refused(rank: int, world: int) -> None:
    kinds: list[Callable[[Any], Any]] = [
        lambda params: Lamb(params, **OPTIONS),
        lambda params: ShardedLamb(params, **OPTIONS),
        lambda params: ShardedLamb(params, **OPTIONS, reduce_gradients=False),
    ]
    for case in (Case(1), Case(2), Case(3), Case(2, offload=True), BF16_OPTIMIZER):
        for make in kinds:
            with pytest.raises(RuntimeError, match=r"Lamb was given to DeepSpeed.*DeepSpeedLamb"):
                one_step(make, case, rank, world)
    for case in (Case(0), Case(0, "bf16")):
        start = start_values(DTYPES[case.dtype])
        engine = one_step(kinds[0], case, rank, world)
        got = {n: p.detach().float() for n, p in engine.module.params().items()}
        assert any(not torch.equal(got[n], start[n].float()) for n in start)


def _gradients_of_a_skipped_step(rank: int, world: int) -> None:
    """A param that had one there alone is left alone: it was stepped with zeros."""
    import deepspeed

    config = {"bf16": {"enabled": True, "check_grad_overflow": True}}
    for case in (Case(1, "bf16", config=config), Case(2, "bf16", config=config)):
        start = start_values(DTYPES["bf16"])
        model = Given(start)
        optimizer = DeepSpeedLamb(model.named_parameters(), **OPTIONS)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=case.make_config()
        )
        gradients = case.gradients(start, 0, rank, world)
        *others, last = gradients
        for _ in range(2):
            before = {n: p.detach().clone() for n, p in model.params().items()}
            engine.backward(engine(gradients))
            optimizer.bind(engine)  # later than usual: what has come before counts
            engine.step()
            moved = {n for n, p in model.params().items() if not torch.equal(before[n], p)}
            assert moved >= {n for n in gradients if start[n].any()}
        seen = []
        for names, scale in ((gradients, 1.0), (gradients, float("inf")), (others, 1.0)):
            engine.backward(engine({n: gradients[n] for n in names}) * scale)
            engine.step()
            seen.append({n: p.detach().clone() for n, p in model.params().items()})
        assert engine.skipped_steps == optimizer.skipped_steps() == 1
        assert all(torch.equal(seen[0][n], seen[1][n]) for n in start)
        assert torch.equal(seen[1][last], seen[2][last]), case
        assert not any(torch.equal(seen[1][n], seen[2][n]) for n in others if start[n].any()), case


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


def experts_engine(**options: Any) -> Any:
    """One expert a rank, with a dense layer that the ranks must have alike."""
    import deepspeed
    from deepspeed.moe.layer import MoE

    torch.manual_seed(0)
    model = nn.Module()
    model.dense = nn.Linear(6, 6)
    model.moe = MoE(6, Expert(), num_experts=2, ep_size=2, k=1, min_capacity=4)

    def forward(x: Tensor) -> Tensor:
        return model.moe(model.dense(x))[0].square().mean()

    model.forward = forward
    clipping = options.pop("gradient_clipping", 0.0)
    config = Case(0, clip=clipping).make_config()
    optimizer = DeepSpeedLamb(model.named_parameters(), lr=0.02, eps=1e-3, **options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def drift(engine: Any, rank: int) -> float:
    """How far the ranks' dense layers part in a few steps, in which their gradients differ."""
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        engine.backward(engine(torch.randn(16, 6, generator=generator) * (1 + 5 * rank)))
        engine.step()
    return parted(engine.module.dense.weight)


def parted(p: Tensor) -> float:
    """How far what ranks should have alike differs between them."""
    first = p.detach().clone()
    dist.broadcast(first, 0)
    worst = (p.detach() - first).abs().max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def _experts_and_a_norm_of_ones_own(rank: int, world: int) -> None:
    from dist_lamb.deepspeed_adapter import clipping

    for options in ({"max_grad_norm": 0.01}, {"nonfinite": "skip"}):
        engine = experts_engine(**options)
        engine.basic_optimizer.bind(engine)
        with pytest.raises(RuntimeError, match=r"with experts \(moe.*Set gradient_clipping"):
            drift(engine, rank)
    assert drift(experts_engine(), rank) == 0
    assert drift(experts_engine(gradient_clipping=0.01), rank) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clipping, "_refuse_own_norm", lambda _: None)
        patch.setattr(DeepSpeedLamb, "_stage_0_group", lambda *_: None)  # experts as the rest
        assert drift(experts_engine(max_grad_norm=0.01), rank) > 1e-7


class Ends(nn.Module):
    """First and last layer of a pipeline, which share a weight: both stages have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(6) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T)


def pipeline_engine(**options: Any) -> Any:
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    inner = [LayerSpec(nn.Linear, 6, 6, bias=False) for _ in range(2)]
    ends = TiedLayerSpec("ends", Ends)
    torch.manual_seed(0)
    model = PipelineModule(
        [ends, *inner, ends], num_stages=2, loss_fn=squared, partition_method="uniform"
    )
    config = Case(0, clip=options.pop("gradient_clipping", 0.0)).make_config()
    optimizer = DeepSpeedLamb(model.named_parameters(), lr=0.02, eps=1e-3, **options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def squared(y: Tensor, wanted: Tensor) -> Tensor:
    return (y - wanted).square().mean()


def pipelined(engine: Any) -> float:
    """How far the stages' copies of the weight they share part in a few steps."""
    for x in inputs():
        engine.train_batch(iter([(x, x * 3)]))
    return parted(engine.module.tied_modules["ends"].weight)


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 6, generator=generator) for _ in range(3)]


def _pipeline_and_a_norm_of_ones_own(rank: int, world: int) -> None:
    from dist_lamb.deepspeed_adapter import clipping

    for options in ({"max_grad_norm": 0.01}, {"nonfinite": "skip"}):
        engine = pipeline_engine(**options)
        engine.basic_optimizer.bind(engine)
        with pytest.raises(
            RuntimeError, match=r"with pipeline stages \(tied.*Set gradient_clipping"
        ):
            pipelined(engine)
    engine = pipeline_engine()
    start = [p.detach().clone() for p in gathered(engine, world)]
    assert pipelined(engine) == 0
    # the same without stages
    params = [nn.Parameter(p) for p in start]
    optimizer = Lamb(params, lr=0.02, eps=1e-3)
    for x in inputs():
        y = torch.tanh(x @ params[0].T) @ params[1].T @ params[2].T
        squared(torch.tanh(y @ params[0].T), x * 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    got, want = gathered(engine, world), [p.detach() for p in params]
    assert worst_error(dict(enumerate(got)), dict(enumerate(want))) < 1e-5  # type: ignore[arg-type]
    assert pipelined(pipeline_engine(gradient_clipping=0.01)) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clipping, "_refuse_own_norm", lambda _: None)
        assert pipelined(pipeline_engine(max_grad_norm=0.01)) > 1e-3


def gathered(engine: Any, world: int) -> list[Tensor]:
    """The shared weight of a pipeline, and each stage's own."""
    (own,) = (p for n, p in engine.module.named_parameters() if "tied" not in n)
    each = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(each, own.detach())
    return [engine.module.tied_modules["ends"].weight.detach(), *each]


STALE = r"call engine.optimizer.refresh_fp32_params\(\)"


def _loaded_weights(rank: int, world: int) -> None:
    """Before the first step, and after it, with and without telling DeepSpeed."""
    cases = (Case(0, "bf16"), Case(1), Case(2, offload=True), Case(2, "bf16"), BF16_OPTIMIZER)
    for case in cases:
        for steps in (0, 2):
            for told in (False, True):
                run = Run(case, rank, world).train(range(steps))
                other = {n: v * 1.5 for n, v in run.model_state_dict().items()}
                run.engine.module.load_state_dict(other)
                if not told:
                    with pytest.raises(RuntimeError, match=STALE):
                        run.train(range(steps, steps + 1))
                    continue  # DeepSpeed does not go on after an error in its step
                run.engine.optimizer.refresh_fp32_params()
                run.train(range(steps, steps + 2))
                for n, v in run.model_state_dict().items():
                    moved = (v - other[n]).float().norm() / other[n].float().norm()
                    assert moved < 0.2 or not other[n].any(), (case, n, moved)
                run.engine.destroy()
    # Without that, what was loaded is gone after a step.
    run = Run(Case(1, naive=True), rank, world).train(range(2))
    before = run.params()
    run.engine.module.load_state_dict({n: v * 9 for n, v in run.model_state_dict().items()})
    run.train(range(2, 3))
    after = run.params()
    assert float((after["wide.weight"] / before["wide.weight"]).median()) < 4
    # At ZeRO-3 before the first step.
    run = Run(Case(3), rank, world)
    run.engine.module.held["emb_weight"].weight.ds_tensor.data.mul_(1.5)
    with pytest.raises(RuntimeError, match=STALE):
        run.train(range(1))


def _loaded_by_deepspeed(rank: int, world: int) -> None:
    """Its own load between steps is no reason to complain; see also test_resumes_exactly."""
    looked: list[int] = []
    for case in (Case(1), Case(2, "bf16")):
        run = Run(case, rank, world).train(range(3))
        parts = [part for of in run.optimizer._steps_of.values() for part in of]
        assert parts
        with pytest.MonkeyPatch.context() as patch:
            from dist_lamb.deepspeed_adapter import partition_step

            patch.setattr(
                partition_step, "problem_with", lambda *_: looked.append(1)
            )  # reads all weights: only after somebody wrote
            run.train(range(3, 5))
        run.engine.destroy()
    assert not looked


def _another_optimizer_trains(rank: int, world: int) -> None:
    import deepspeed

    for stage in (1, 2, 3):
        model = Given(start_values())
        DeepSpeedLamb(model.named_parameters(), **OPTIONS)
        made = torch.optim.AdamW(model.parameters(), lr=1e-3)
        case = Case(stage)
        engine, *_ = deepspeed.initialize(model=model, optimizer=made, config=case.make_config())
        for t in range(2):
            gradients = case.gradients(start_values(), t, rank, world)
            loss = engine(gradients)
            if t:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", UserWarning)
                    engine.backward(loss)
            else:
                with pytest.warns(UserWarning, match=r"step\(\) is never called.*optimizer_cls_an"):
                    engine.backward(loss)
            engine.step()
        engine.destroy()


def _nothing_to_warn_of(rank: int, world: int) -> None:
    """An optimizer that was replaced by a newer one, and one that is simply used."""
    model = Given(start_values())
    DeepSpeedLamb(model.named_parameters(), **OPTIONS)
    case = Case(2)
    import deepspeed

    made = DeepSpeedLamb(model.named_parameters(), **OPTIONS)
    engine, *_ = deepspeed.initialize(model=model, optimizer=made, config=case.make_config())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for t in range(2):
            engine.backward(engine(case.gradients(start_values(), t, rank, world)))
            engine.step()
    # At stage 0 nothing on the params tells: after very many backward passes.
    p = nn.Parameter(torch.ones(2))
    DeepSpeedLamb([p])
    for _ in range(999):
        p.sum().backward()
    with pytest.warns(UserWarning, match=r"step\(\) is never called"):
        p.sum().backward()


def _a_state_dict_before_there_is_an_engine(rank: int, world: int) -> None:
    """DeepSpeed drops groups without params; here they are."""
    p = nn.Parameter(torch.ones(3, 2))
    groups = [{"params": []}, {"params": [p]}]
    made = DeepSpeedLamb(copy.deepcopy(groups), lr=0.02)
    made.load_state_dict(torch.optim.AdamW(groups, lr=0.5).state_dict())
    assert [(g["group_index"], g["lr"]) for g in made.param_groups] == [(0, 0.5), (1, 0.5)]


def _a_checkpoint_of_adamw(rank: int, world: int, folder: str) -> None:
    """ZeRO-1 and 2 show a step one group alone, which is then not known by its place."""
    import deepspeed

    start = start_values()
    for stage in (1, 3):
        case = Case(stage, absent=(), absent_at={})
        gradients = case.gradients(start, 0, rank, world)
        params: Any = None
        for kind in (torch.optim.AdamW, DeepSpeedLamb):
            model = Given(start)
            matrices = [p for p in model.parameters() if p.ndim > 1]
            others = [p for p in model.parameters() if p.ndim < 2]
            groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=kind(groups, lr=0.02), config=case.make_config()
            )
            if kind is DeepSpeedLamb:
                engine.load_checkpoint(folder, tag=f"adamw{stage}")
            engine.backward(engine(gradients))
            engine.step()
            if kind is torch.optim.AdamW:
                engine.save_checkpoint(folder, tag=f"adamw{stage}")
        params = engine.basic_optimizer.full_optimizer_state_dict()
        assert {float(entry["step"]) for entry in params["state"].values()} == {2.0}
        assert [group["weight_decay"] for group in params["param_groups"]] == [0.01, 0.0]


def _lrs_through_a_universal_checkpoint(rank: int, world: int, folder: str) -> None:
    """At ZeRO-3 DeepSpeed's loader gives all groups the options of the first one."""
    from deepspeed.checkpoint.ds_to_universal import main as to_universal

    def make(scale: float, config: dict[str, Any]) -> Run:
        run = Run(Case(3, absent=(), absent_at={}, clip=0.0, config=config), rank, world, scale)
        return run

    def set_lrs(run: Run, factor: float = 1.0) -> None:
        for group, lr in zip(run.optimizer.param_groups, (0.02, 0.005)):
            group["lr"] = lr * factor

    first = make(1.0, {})
    set_lrs(first, factor=4.0)
    first.train(range(3))
    set_lrs(first)  # as a schedule does, after the last step
    first.engine.save_checkpoint(folder, tag="three")
    if rank == 0:
        import argparse

        arguments = argparse.Namespace(
            input_folder=f"{folder}/three",
            output_folder=f"{folder}/universal",
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
        to_universal(arguments)
        Path(folder, "latest_universal").write_text("universal")
    dist.barrier()
    second = make(1.5, {"checkpoint": {"load_universal": True}})
    set_lrs(second, factor=3.0)
    second.engine.load_checkpoint(folder, tag="universal")
    first.train(range(3, 6))
    second.train(range(3, 6))
    assert [group["lr"] for group in second.optimizer.param_groups] == [0.02, 0.005]
    assert [group["weight_decay"] for group in second.optimizer.param_groups] == [0.05, 0.0]
    error = worst_error(second.params(), first.params())
    print(f"universal checkpoint, groups of two lrs: {error:.1e}")
    assert error < 1e-5
