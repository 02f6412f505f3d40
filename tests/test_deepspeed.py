"""DeepSpeedLamb on gloo ranks: under every ZeRO stage what Lamb is without shards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import Case, Run, last_norms, launched, plain, plain_state, worst_error
from ranks import run_ranks

from dist_lamb.options import reads
from dist_lamb.rules import RULES as ALL_RULES

pytestmark = [
    pytest.mark.xdist_group("programs"),
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

#: ZeRO-3 leaves the gradient of the step before where none comes, and counts it when clipping.
UNCLIPPED_3: dict[str, Any] = {"stage": 3, "clip": 0.0}
CLIPPED_3: dict[str, Any] = {"stage": 3, "absent_at": {}}

EXACT = {
    "0": Case(0),
    "1": Case(1),
    "2": Case(2),
    "3": Case(**CLIPPED_3),
    "0 by name": Case(0, by_name=True),
    "0 by name, ungrouped": Case(0, by_name=True, ungrouped=True),
    "1 by name, lr schedule": Case(1, by_name=True, decay_lr=True),
    "1 by name, offloaded": Case(1, by_name=True, offload=True),
    "2 by name": Case(2, by_name=True),
    "2 by name, offloaded, ungrouped": Case(2, by_name=True, offload=True, ungrouped=True),
    "3 by name": Case(**CLIPPED_3, by_name=True),
    "3 by name, zero.Init, ungrouped": Case(
        **CLIPPED_3, by_name=True, zero_init=True, ungrouped=True
    ),
    "3 by name, offloaded": Case(**CLIPPED_3, by_name=True, offload=True),
    "3 intermittent": Case(**UNCLIPPED_3),
    "1 round robin": Case(1, zero={"round_robin_gradients": True}),
    "2 round robin": Case(2, zero={"round_robin_gradients": True}),
    "2 overlapping, lr schedule": Case(2, zero={"overlap_comm": True}, decay_lr=True),
    "3 sub-groups": Case(**CLIPPED_3, zero={"sub_group_size": 2000}),
    "3 zero.Init": Case(**CLIPPED_3, zero_init=True),
    "1 offloaded": Case(1, offload=True),
    "2 offloaded": Case(2, offload=True),
    "3 offloaded": Case(**CLIPPED_3, offload=True, zero={"sub_group_size": 2000}),
    "2 accumulated": Case(2, accumulate=2),
    "3 accumulated": Case(**CLIPPED_3, accumulate=2),
    "1 frozen": Case(1, frozen=("wide.weight", "norm.weight")),
    "3 frozen": Case(**CLIPPED_3, frozen=("wide.weight", "norm.weight")),
    "0 max_grad_norm": Case(0, clip=0.0, options={"max_grad_norm": 1.0}),
    "2 max_grad_norm": Case(2, clip=0.0, options={"max_grad_norm": 1.0}),
    "3 max_grad_norm": Case(3, clip=0.0, absent_at={}, options={"max_grad_norm": 1.0}),
}
RULES = ("lans", "adamw", "lars", "stable_adamw")
EXACT |= {
    "0 rules": Case(0, rules=RULES),
    "1 rules": Case(1, rules=RULES),
    "1 rules by name, offloaded": Case(1, rules=RULES, by_name=True, offload=True),
    "2 rules by name": Case(2, rules=RULES, by_name=True, zero={"round_robin_gradients": True}),
    "2 rules, max_grad_norm": Case(2, clip=0.0, rules=RULES, options={"max_grad_norm": 1.0}),
    "3 rules": Case(**UNCLIPPED_3, rules=RULES),
    "3 rules by name, sub-groups": Case(
        **CLIPPED_3, rules=RULES[::-1], by_name=True, zero={"sub_group_size": 2000}
    ),
    "2 lans by name, ungrouped": Case(2, by_name=True, ungrouped=True, options={"rule": "lans"}),
    "3 lars by name": Case(**UNCLIPPED_3, rules=("lars",), by_name=True),
    "2 bfloat16 states": Case(2, clip=0.0, options={"state_format": "bfloat16"}),
    "3 bfloat16 states": Case(**UNCLIPPED_3, options={"state_format": "bfloat16"}),
}
NAIVE = {f"{stage} naive": Case(stage, naive=True, absent_at={}) for stage in (1, 2, 3)}

ON_TWO = (
    *("0 by name, ungrouped", "2 overlapping, lr schedule", "3 intermittent", "1 round robin"),
    *("1 by name, offloaded", "3 by name, zero.Init, ungrouped", "3 offloaded", "2 accumulated"),
    *("3 frozen", "2 max_grad_norm", "3 max_grad_norm", "1 naive", "2 naive"),
    *("1 rules", "2 rules by name", "3 rules by name, sub-groups"),
    *("2 bfloat16 states", "3 bfloat16 states"),
)
ON_THREE = (
    *("1 by name, lr schedule", "2 by name, offloaded, ungrouped", "3 by name, offloaded"),
    *("2", "3 intermittent", "3 sub-groups", "3 naive"),
    *("1 rules by name, offloaded", "2 lans by name, ungrouped", "3 rules"),
)


def _train(rank: int, world: int, cases: dict[str, Case]) -> dict[str, Any]:
    launched(rank, world)
    found = {}
    for name, case in cases.items():
        run = Run(case, rank, world)
        if case.options.get("max_grad_norm"):
            run.optimizer.bind(run.engine)
        run.optimizer.track_grad_norm = case.tracked
        run.train()
        more = run.grad_norms() if case.tracked else {}
        if case.dtype == "bf16":
            more = run.whole_state()
        found[name] = run.params(), {} if case.naive else run.ratios(), more
        run.engine.destroy()
    return found


@pytest.mark.parametrize(
    ("world", "names"),
    [
        (2, ON_TWO),
        (3, ON_THREE),
        pytest.param(2, (*EXACT, *NAIVE), marks=pytest.mark.slow),
        pytest.param(3, (*EXACT, *NAIVE), marks=pytest.mark.slow),
    ],
    ids=["2 ranks", "3 ranks", "2 ranks, all", "3 ranks, all"],
)
def test_equal_to_unsharded(tmp_path: Path, world: int, names: Sequence[str]) -> None:
    """Params and trust ratios after 10 steps; and how wrong a rule for whole tensors is there."""
    cases = {name: (EXACT | NAIVE)[name] for name in names}
    ranks = run_ranks(world, tmp_path, _train, cases, timeout=280)
    for name, case in cases.items():
        want, want_ratios = plain(case, world)
        for rank, found in enumerate(ranks):
            got, ratios, norms = found[name]
            error = worst_error(got, want)
            if rank == 0:
                print(f"{world} ranks, {name}: {error:.1e}")
            for n, norm in last_norms(case, world).items() if case.tracked else ():
                assert norms[n] == pytest.approx(norm, rel=1e-5), (name, rank, n)
            if case.naive:
                assert not error < 1e-2, name
                continue
            assert error < 1e-5, (name, rank)
            assert ratios.keys() == want_ratios.keys()
            for n, ratio in want_ratios.items():
                same = math.isclose(ratios[n], ratio, rel_tol=1e-5)
                assert same or (math.isnan(ratio) and math.isnan(ratios[n])), (name, rank, n)


BF16 = {
    "0": Case(0, "bf16"),
    "1 BF16_Optimizer": Case(
        1, "bf16", config={"data_types": {"grad_accum_dtype": "fp32"}}, by_name=True
    ),
    "2 converted": Case(2, "bf16", convert=True, by_name=True),
    "2 offloaded": Case(2, "bf16", offload=True),
    "3 sub-groups": Case(3, "bf16", absent_at={}, zero={"sub_group_size": 2000}, by_name=True),
}
#: and what the others leave out of dtype x stage x offload, by name
BF16_ALL = BF16 | {
    f"{stage} {'offloaded ' * offload}by name": Case(
        stage, "bf16", by_name=True, offload=offload, absent_at={}
    )
    for stage in range(4)
    for offload in (False, True)
    if stage or not offload
}


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, BF16),
        pytest.param(2, BF16_ALL, marks=pytest.mark.slow),
        pytest.param(3, BF16_ALL, marks=pytest.mark.slow),
    ],
    ids=["2 ranks", "2 ranks, all", "3 ranks, all"],
)
def test_bfloat16(tmp_path: Path, world: int, cases: dict[str, Case]) -> None:
    """Masters and moments are those of Lamb as in float32; the params to bfloat16's rounding."""
    ranks = run_ranks(world, tmp_path, _train, cases, timeout=280)
    for name, case in cases.items():
        want, want_ratios = plain(case, world)
        got, ratios, state = ranks[0][name]
        inner = worst_error(state, plain_state(case, world))
        print(f"bf16 {name}: masters and moments {inner:.1e} from Lamb")
        assert inner < 1e-5, name
        error = worst_error(got, want)
        if case.absent_at and world == 2:  # see Case.mean
            stage_0 = worst_error(got, ranks[0]["0"][0])
            print(f"bf16 {name}: {error:.1e} from Lamb, {stage_0:.1e} from stage 0")
            assert stage_0 < 2**-7, name
        else:
            print(f"bf16 {name}: {error:.1e} from Lamb")
        assert error < 2**-7, name
        assert ranks[1][name][1].keys() == ratios.keys()
        for n, ratio in want_ratios.items():
            same = math.isclose(ratios[n], ratio, rel_tol=1e-2)
            assert same or (math.isnan(ratio) and math.isnan(ratios[n])), (name, n)


RESUMED = {
    "0": Case(0),
    "0 bf16": Case(0, "bf16"),
    "1 BF16_Optimizer": Case(1, "bf16", config={"data_types": {"grad_accum_dtype": "fp32"}}),
    "2": Case(2, decay_lr=True),
    "2 elastic": Case(2, zero={"elastic_checkpoint": True}, absent_at={}),
    "2 offloaded": Case(2, offload=True),
    "3": Case(3, clip=0.0, zero={"sub_group_size": 2000}),
    "2 rules": Case(2, rules=RULES),
    "3 rules": Case(3, clip=0.0, rules=RULES),
}


def _resume(rank: int, world: int, folder: str) -> None:
    launched(rank, world)
    for name, case in RESUMED.items():
        path = f"{folder}/{name}"
        first = Run(case, rank, world).train(range(4))
        first.engine.save_checkpoint(path)
        first.train(range(4, 8))
        # into an engine that knows its layout already, and has other values
        second = Run(case, rank, world, scale=1.5).train(range(1))
        second.engine.load_checkpoint(path)
        second.train(range(4, 8))
        for n, value in first.params().items():
            assert torch.equal(second.params()[n], value), (name, n)
        want, got = first.state(), second.state()
        assert want.keys() == got.keys(), name
        for key, value in want.items():
            # an elastic checkpoint counts the steps of all params together
            if not (case.zero.get("elastic_checkpoint") and key.startswith("steps")):
                assert torch.equal(got[key], value), (name, key)
        assert first.ratios().keys() == second.ratios().keys()
        first.engine.destroy()
        second.engine.destroy()


def test_resumes_exactly(tmp_path: Path) -> None:
    """engine.save_checkpoint, load_checkpoint at the same world size: the same bits."""
    (tmp_path / "saved").mkdir()
    run_ranks(2, tmp_path, _resume, str(tmp_path / "saved"), timeout=280)


#: saved by the first, loaded by the second
MOVED = [
    (Case(2), Case(3, clip=1.0)),
    (Case(3, zero={"sub_group_size": 2000}), Case(1)),
    (Case(2, "bf16", absent_at={}), Case(3, "bf16", absent_at={})),
    (Case(3, "bf16", absent_at={}), Case(0, "bf16", absent_at={})),
    (Case(2, rules=RULES), Case(3, clip=1.0, rules=RULES)),
]


def _move(rank: int, world: int) -> None:
    launched(rank, world)
    for saving, loading in MOVED:
        steps = range(4, 8) if loading.stage < 3 else range(4, 7)
        first = Run(saving, rank, world).train(range(4))
        saved = first.optimizer.full_optimizer_state_dict()
        params = first.model_state_dict()
        names = {i: n for g in saved["param_groups"] for i, n in zip(g["params"], g["param_names"])}
        counted = {names[i]: float(entry["step"]) for i, entry in saved["state"].items()}
        assert counted["tile.weight"] == 0
        assert counted["fc.weight"] == 4 - (1 in saving.absent_at)
        second = Run(loading, rank, world, scale=1.5)
        second.load_model(params)
        # Every group's betas may have been cycled, also where the rule has none.
        groups = [{**g, "betas": (0.85, 0.999)} for g in saved["param_groups"]]
        second.optimizer.load_full_optimizer_state_dict({**saved, "param_groups": groups})
        for group in second.optimizer.param_groups:
            has = reads(ALL_RULES[group["rule"]], "betas")
            assert group["betas"] == ((0.85, 0.999) if has else (0.9, 0.999))
        second.optimizer.load_full_optimizer_state_dict(saved)
        again = second.optimizer.full_optimizer_state_dict()
        for i, entry in saved["state"].items():
            assert entry.keys() == again["state"][i].keys()
            for key, value in entry.items():
                assert torch.equal(value, again["state"][i][key]), (names[i], key)
        first.train(steps)
        second.train(steps)
        error = worst_error(second.params(), first.params())
        assert error < (2**-7 if saving.dtype == "bf16" else 1e-5), (saving, error)
        other = {**saved, "param_groups": [{**g, "rule": "adagrad"} for g in saved["param_groups"]]}
        with pytest.raises(ValueError, match="param group 0 is of rule 'adagrad' with"):
            second.optimizer.load_full_optimizer_state_dict(other)
        assert "adagrad" not in [group["rule"] for group in second.optimizer.param_groups]
        foreign = {i: {**s, "max_exp_avg_sq": torch.ones(1)} for i, s in saved["state"].items()}
        if not loading.rules:
            with pytest.raises(ValueError, match=r"saved max_exp_avg_sq of emb\.weight is of rule"):
                second.optimizer.load_full_optimizer_state_dict({**saved, "state": foreign})
        shapes = saved["state"][0]
        shapes["exp_avg"] = shapes["exp_avg"][:-1]
        with pytest.raises(ValueError, match=r"exp_avg of emb.weight has shape \(96, 64\), the pa"):
            second.optimizer.load_full_optimizer_state_dict(saved)
        if loading.rules:
            second.optimizer.param_groups[0]["rule"] = "adamw"
            with pytest.raises(RuntimeError, match=r"with the rules \['lans'\].*say \['adamw'\]"):
                second.train(range(1))
        first.engine.destroy()
        second.engine.destroy()


def test_whole_state_moves_between_stages(tmp_path: Path) -> None:
    """full_optimizer_state_dict of one stage continues at another."""
    run_ranks(2, tmp_path, _move, timeout=280)
