"""DeepSpeedLamb: what it refuses, what it costs, and the smaller promises."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from deepspeed_runs import OPTIONS, Case, Given, Run, launched, plain, start_values, worst_error
from ranks import run_ranks

from dist_lamb import Lamb
from dist_lamb.deepspeed_adapter import (
    DeepSpeedLamb,
    UnknownLayout,
    check_config,
    recommended_config,
)
from dist_lamb.sharding.comm import Comm

pytestmark = [
    pytest.mark.xdist_group("programs"),
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


def _features(rank: int, world: int) -> None:
    """Many small checks in one spawn; each raises where it fails."""
    launched(rank, world)
    for check in (
        _one_all_reduce_a_call,
        _fused_kernels,
        _clipping_twice_is_refused,
        _max_grad_norm_wants_the_engine,
        _tensor_parallel_is_refused,
        _foreign_tensors_are_refused,
        _changed_weights_are_refused,
        _changed_weights_of_one_rank_are_refused,
        _half_precision_masters_are_refused,
        _zero_gradients_are_gradients,
        _gradient_on_one_rank,
        _warm_up_leaves_nothing,
        _names_from_the_engine,
        _made_by_a_callable,
        _plain_state_dict,
        _added_group,
        _no_copies,
        _bench_contenders,
    ):
        check(rank, world)
        dist.barrier()


def test_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run_ranks(2, tmp_path, _features, timeout=280)


def _one_all_reduce_a_call(rank: int, world: int) -> None:
    """And one for every call, whatever the number of params; a scalar more for max_grad_norm."""
    clipping: dict[str, Any] = {"options": {"max_grad_norm": 1.0}, "clip": 0.0}
    for case, expected in (
        (Case(0), 1),
        (Case(1), 2),
        (Case(2), 2),
        (Case(3), 2),
        (Case(3, zero={"sub_group_size": 2000}), 4),
        (Case(1, "bf16", config={"data_types": {"grad_accum_dtype": "fp32"}}), 1),
        (Case(0, **clipping), 1),
        (Case(2, **clipping), 4),
    ):
        run = Run(case, rank, world)
        run.optimizer.bind(run.engine)
        run.train(range(2))
        reduced: list[tuple[int, ...]] = []
        original = Comm.all_reduce_sum
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Comm,
                "all_reduce_sum",
                lambda self, t: reduced.append(tuple(t.shape)) or original(self, t),  # noqa: B023
            )
            run.train(range(2, 3))
        assert len(reduced) == expected, (case, reduced)
        run.engine.destroy()


def _fused_kernels(rank: int, world: int) -> None:
    """The table of addresses that GPUs work from, by Triton's interpreter."""
    for case in (
        Case(2, options={"impl": "triton"}, zero={"round_robin_gradients": True}),
        Case(3, options={"impl": "triton", "max_grad_norm": 1.0}, clip=0.0, absent_at={}),
    ):
        run = Run(case, rank, world)
        run.optimizer.bind(run.engine)
        run.train(range(2))
        reference = replace(case, options={**case.options, "impl": "foreach"})
        want, want_ratios = plain(reference, world, 2)
        assert worst_error(run.params(), want) < 1e-5, case
        for name, ratio in run.ratios().items():
            assert math.isclose(ratio, want_ratios[name], rel_tol=1e-5) or math.isnan(ratio), name
        updates = [s._kept[2] for of in run.optimizer._steps_of.values() for s in of if s._kept]
        assert {type(update).__name__ for update in updates} == {"TritonUpdate"}
        run.engine.destroy()


def _clipping_twice_is_refused(rank: int, world: int) -> None:
    run = Run(Case(2, options={"max_grad_norm": 1.0}), rank, world)
    with pytest.raises(ValueError, match=r"gradient_clipping = 1.0 and by max_grad_norm"):
        run.optimizer.bind(run.engine)
    run = Run(Case(3, options={"max_grad_norm": 1.0}), rank, world)
    with pytest.raises(ValueError, match="gradients are clipped twice"):
        run.train(range(1))


def _max_grad_norm_wants_the_engine(rank: int, world: int) -> None:
    run = Run(Case(2, clip=0.0, options={"max_grad_norm": 1.0}), rank, world)
    with pytest.raises(RuntimeError, match=r"needs optimizer.bind\(engine\)"):
        run.train(range(1))


def _tensor_parallel_is_refused(rank: int, world: int) -> None:
    run = Run(Case(2), rank, world)
    run.model.params()["wide.weight"].tensor_model_parallel = True
    with pytest.raises(UnknownLayout, match=r"wide.weight is cut by tensor parallelism"):
        run.train(range(1))


def _foreign_tensors_are_refused(rank: int, world: int) -> None:
    run = Run(Case(1), rank, world)
    stranger = torch.zeros(12, requires_grad=True)
    # a future wrapper: other tensors, and no notes on the params that are known here
    for o in run.optimizer._originals:
        del o.param._hp_mapping
    run.optimizer.param_groups[0]["params"] = [stranger, stranger]
    with pytest.raises(UnknownLayout, match=r"2 tensors of shapes .*deepspeed 0\."):
        run.optimizer.step()
    run = Run(Case(3), rank, world)
    run.optimizer.param_groups[0]["params"] = [stranger]
    with pytest.raises(UnknownLayout, match="no sub-group of ZeRO-3"):
        run.optimizer.step()
    run = Run(Case(2), rank, world)
    run.optimizer.param_groups = [run.optimizer.param_groups[0]]
    run.optimizer.param_groups[0]["params"] = [stranger]
    with pytest.raises(UnknownLayout, match="do not fit in 2 partitions of 12"):
        run.optimizer.step()


def _changed_weights_are_refused(rank: int, world: int) -> None:
    for stage in (2, 3):
        run = Run(Case(stage), rank, world)
        if stage == 3:
            run.engine.optimizer.fp16_groups[0][0].ds_tensor.data = torch.ones(3104)
        else:
            run.model.params()["emb.weight"].data += 1.0
        with pytest.raises(UnknownLayout, match=r"does not hold the values of emb.weight"):
            run.train(range(1))


def _changed_weights_of_one_rank_are_refused(rank: int, world: int) -> None:
    """By every rank: one alone would leave the others waiting in the next all-reduce."""
    run = Run(Case(2), rank, world)
    if rank == 1:
        run.model.params()["wide.weight"].data += 1.0
    with pytest.raises(UnknownLayout, match=r"rank 1 has layout: .* values of wide.weight"):
        run.train(range(1))


def _half_precision_masters_are_refused(rank: int, world: int) -> None:
    run = Run(Case(2, "bf16"), rank, world)
    for group in run.optimizer.param_groups:
        group["params"][0].data = group["params"][0].data.bfloat16()
    with pytest.raises(UnknownLayout, match=r"torch.bfloat16; master weights must be float32"):
        run.optimizer.step()


def _zero_gradients_are_gradients(rank: int, world: int) -> None:
    """Zeros that backward made shrink a tensor; those that DeepSpeed filled in do nothing."""
    for stage in (0, 2, 3):
        run = Run(Case(stage, clip=0.0), rank, world)
        zeros = {n: torch.zeros_like(v) for n, v in run.start.items() if n != "fc.weight"}
        for t in range(2):
            some = zeros if t else {**zeros, "scale": torch.ones(1)}
            run.engine.backward(run.engine(some))
            run.engine.step()
        params = run.params()
        assert torch.equal(params["fc.weight"], run.start["fc.weight"])
        # ||x|| / ||wd * x|| = 1 / wd: by lr a step
        want = run.start["emb.weight"] * (1 - OPTIONS["lr"]) ** 2
        assert torch.allclose(params["emb.weight"], want, rtol=1e-5)
        assert math.isnan(run.ratios()["fc.weight"])
        run.engine.destroy()


def _gradient_on_one_rank(rank: int, world: int) -> None:
    """Zero on the others, and the param is stepped by all alike."""
    run = Run(Case(0, clip=0.0), rank, world)
    g = torch.full_like(run.start["fc.weight"], 2.0)
    some = {"scale": torch.ones(1)} | ({"fc.weight": g} if rank == 1 else {})
    run.engine.backward(run.engine(some))
    run.engine.step()
    param = torch.nn.Parameter(run.start["fc.weight"].clone())
    param.grad = g / 2
    Lamb([param], weight_decay=0.05, **OPTIONS).step()
    assert torch.equal(run.params()["fc.weight"], param.detach())
    # a zero gradient of one rank only: the replicas must not part
    zero = {"emb.weight": torch.zeros(97, 64)} if rank == 1 else {}
    run.engine.backward(run.engine({"scale": torch.ones(1)} | zero))
    run.engine.step()
    mine = run.params()["emb.weight"]
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(mine, first)
    assert not torch.equal(mine, run.start["emb.weight"])
    run.engine.destroy()


def _warm_up_leaves_nothing(rank: int, world: int) -> None:
    """DeepSpeed steps once with zero gradients when it makes its wrapper for bfloat16."""
    run = Run(Case(0, "bf16"), rank, world)
    assert run.optimizer.state, "no warm-up step any more: this test shows nothing"
    for p, entry in run.optimizer.state.items():
        assert not any(t.any() for t in entry.values())
        assert torch.equal(p.bfloat16().float(), p)
    for name, p in run.params().items():
        assert torch.equal(p, run.start[name].float())


def _names_from_the_engine(rank: int, world: int) -> None:
    import deepspeed

    model = Given(start_values())
    optimizer = DeepSpeedLamb(model.parameters())
    config = Case(2).make_config()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    assert set(optimizer.trust_ratios()) == {f"param_{i}" for i in range(len(start_values()))}
    assert optimizer.bind(engine) is optimizer
    engine.backward(engine(Case(2).gradients(start_values(), 0, rank, world)))
    engine.step()
    ratios = {n: float(r) for n, r in optimizer.trust_ratios().items()}
    assert set(ratios) == {n for n, _ in model.named_parameters()}
    assert 0 < ratios["held.emb_weight.weight"] < math.inf


def _made_by_a_callable(rank: int, world: int) -> None:
    import deepspeed

    model = Given(start_values())
    engine, optimizer, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.named_parameters()),
        optimizer=lambda params: DeepSpeedLamb(params, lr=0.1),
        config=Case(2).make_config(),
    )
    engine.backward(engine(Case(2).gradients(start_values(), 0, rank, world)))
    engine.step()
    assert "held.scale.weight" in optimizer.optimizer.trust_ratios()


def _plain_state_dict(rank: int, world: int) -> None:
    """At stage 0 the state of a Lamb goes in, counters too."""
    case = Case(0, absent_at={1: ("fc.weight",)})
    params = {n: torch.nn.Parameter(v) for n, v in start_values().items()}
    lamb = Lamb(models.groups_of(params), max_grad_norm=1.0, **OPTIONS)
    for t in range(4):
        each = [case.gradients(params, t, r, world) for r in range(world)]
        for n, p in params.items():
            p.grad = sum(g[n] for g in each) / world if n in each[0] else None
        lamb.step()
    run = Run(case, rank, world)
    run.engine.module.load_state_dict(
        {f"held.{run.model.short[n]}.weight": p.detach() for n, p in params.items()}
    )
    run.optimizer.load_state_dict(lamb.state_dict())
    for group in run.optimizer.param_groups:
        group["max_grad_norm"] = None
    run.train(range(4, 8))
    assert worst_error(run.params(), plain(case, world, 8)[0]) < 1e-5
    counted = torch.cat([group["param_steps"] for group in run.optimizer.param_groups])
    steps = dict(zip(run.optimizer._all_names(), counted))
    assert (steps["fc.weight"], steps["emb.weight"]) == (7, 8)


def _added_group(rank: int, world: int) -> None:
    """At stage 0, where DeepSpeed does not care."""
    run = Run(Case(0), rank, world).train(range(2))
    extra = torch.nn.Parameter(torch.ones(3))
    run.optimizer.add_param_group({"params": [("extra", extra)], "weight_decay": 0.1})
    extra.grad = torch.ones(3)
    run.train(range(2, 3))
    assert run.optimizer.state[extra]["step"] == 1
    assert extra[0] < 1
    assert run.optimizer.param_groups[0]["param_steps"][0] == 3
    assert "extra" in run.ratios()


def _no_copies(rank: int, world: int) -> None:
    run = Run(Case(2), rank, world)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(run.optimizer)


def _bench_contenders(rank: int, world: int) -> None:
    """Those of bench.py train: they learn, and the stage changes nothing."""
    from benchmarking.train_deepspeed import make_deepspeed

    for optimizer, kind in (("lamb", "DeepSpeedLamb"), ("adam", "AdamW")):
        ends = []
        for stage in (1, 2, 3):
            torch.manual_seed(0)
            model = torch.nn.Sequential(
                torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1)
            )
            engine = make_deepspeed(model, stage, optimizer, 8, lr=0.05)
            x = torch.randn(8, 20, generator=torch.Generator().manual_seed(rank))
            for _ in range(15):
                loss = (engine(x) - x[:, :1]).square().mean()
                engine.backward(loss)
                engine.step()
            ends.append(float(loss.detach()))
            assert type(engine.basic_optimizer).__name__ == kind
        assert ends[0] < 0.8, (optimizer, ends)
        assert ends == pytest.approx(ends[:1] * 3, rel=1e-3)


def test_config_advice() -> None:
    """The recommended configs have nothing in the way; each thing in the way is named."""
    for stage in range(4):
        for dtype in ("fp32", "bf16", "fp16"):
            made = recommended_config(stage, dtype=dtype, offload_optimizer=stage > 0)
            # deepspeed's own fault: see check_config
            known = ["for fp16: at stage 0"] if (stage, dtype) == (0, "fp16") else []
            found = check_config(made)
            assert len(found) == len(known)
            assert all(told in line for told, line in zip(known, found))
    good = recommended_config(2)
    zero = good["zero_optimization"]
    half_offloaded = {"device": "cpu", "ratio": 0.5}
    for wrong, told in [
        ({"optimizer": {"type": "Lamb"}}, "names 'Lamb', which is no DeepSpeedLamb"),
        ({"gradient_clipping": 0.0}, "gradient_clipping"),
        ({"communication_data_type": "bf16"}, "communication_data_type"),
        (
            {"torch_autocast": {"enabled": True, "dtype": torch.float16}},
            "remove gradient_clipping, and give max_grad_norm",
        ),
        (
            {"zero_optimization": {**zero, "offload_optimizer": {"device": "cpu"}}},
            "zero_force_ds_cpu_optimizer = false",
        ),
        (
            {
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {"stage": 3, "offload_optimizer": half_offloaded},
            },
            "stepped by torch's AdamW",
        ),
        (
            {
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {**zero, "offload_optimizer": {"device": "nvme"}},
            },
            "nvme has not been tried",
        ),
    ]:
        assert [line for line in check_config(good | wrong) if told in line], wrong
        assert len(check_config(good | wrong)) == 1
    with pytest.raises(ValueError, match="Invalid stage: 4"):
        recommended_config(4)
    with pytest.raises(ValueError, match="Invalid dtype: 'int8'"):
        recommended_config(1, dtype="int8")
    with pytest.raises(ValueError, match="from stage 1 on"):
        recommended_config(0, offload_optimizer=True)
