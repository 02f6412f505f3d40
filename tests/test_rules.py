"""Several rules in one optimizer; what a rule's states may be exchanged with; bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import module_of
from dtensor_cases import How, assert_same, everything, placed
from ranks import WORLDS, each_world, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

from dist_lamb import Lamb, ShardedLamb, checkpoint, preset, rules
from dist_lamb.checkpoint.cli import main

NAMES = tuple(rules.RULES)


def make() -> dict[str, nn.Parameter]:
    """A matrix for each rule, cut by the shards of 2 and 3 ranks; the last has amsgrad."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(41, 60, generator=generator) * 0.1)
        for name in (*NAMES, "amsgrad")
    }


def groups(params: dict[str, nn.Parameter], **options: Any) -> list[dict[str, Any]]:
    made = []
    for name, p in params.items():
        own = {"rule": "adamw", "amsgrad": True} if name == "amsgrad" else {"rule": name}
        made.append({"params": [(name, p)], **own, **options})
    return made


def gradients(params: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1 + step)
    for p in params.values():
        # sums of three equal ones stay exact
        p.grad = (torch.randn(p.shape, generator=generator) * 64).round() / 64


@pytest.mark.parametrize("impl", ["reference", "foreach"])
def test_rules_in_one_optimizer_are_those_of_their_own(impl: str) -> None:
    together, alone = make(), make()
    one = Lamb(groups(together, lr=0.02), impl=impl)
    many = [Lamb([group], impl=impl) for group in groups(alone, lr=0.02)]
    for step in range(3):
        gradients(together, step)
        gradients(alone, step)
        one.step()
        for optimizer in many:
            optimizer.step()
    for name, p in together.items():
        assert torch.equal(p, alone[name]), name
    ratios = one.trust_ratios()
    for optimizer in many:
        for name, ratio in optimizer.trust_ratios().items():
            assert torch.equal(ratios[name], ratio), name
            if "x.x" in rules.RULES.get(name, rules.RULES["adamw"]).late:
                assert torch.equal(one.param_norms()[name], optimizer.param_norms()[name]), name


def _reductions(optimizer: Any) -> int:
    """All-reduces of one step; CommDebugMode counts calls of the library by name."""
    with CommDebugMode() as counted:
        optimizer.step()
    return sum(n for op, n in counted.get_comm_counts().items() if "allreduce_" in str(op))


def _shard(params: dict[str, nn.Parameter], group: Any, **options: Any) -> ShardedLamb:
    own = groups(params, lr=0.02, max_grad_norm=1e3, **options)
    return ShardedLamb(own, process_group=group, bucket_numel=2**12)


def _bits(params: dict[str, nn.Parameter], optimizer: ShardedLamb) -> str:
    full = optimizer.full_optimizer_state_dict()["state"]
    found = {n: p.detach() for n, p in params.items()}
    found |= {f"{i} {n}": t for i, state in full.items() for n, t in state.items()}
    return models.digest(found)


def _sharded(rank: int, group: Any, folder: str) -> tuple[str, int]:
    """Bits after three steps of ShardedLamb; all-reduces a step."""
    params, world = make(), dist.get_world_size(group)
    optimizer = _shard(params, group)
    for step in range(3):
        gradients(params, step)
        reductions = _reductions(optimizer)
        optimizer.zero_grad()
        if step == 1:
            module = module_of(dict(params))
            checkpoint.save(f"{folder}/{world}", step, module, optimizer, process_group=group)
    bits = _bits(params, optimizer)
    if world > 1:  # what one rank less has saved goes on here
        saved, params = f"{folder}/{world - 1}", make()
        optimizer, module = _shard(params, group), module_of(dict(params))
        for p in params.values():
            p.data.zero_()
        checkpoint.load(saved, module, optimizer, process_group=group)
        gradients(params, 2)
        optimizer.step()
        assert _bits(params, optimizer) == bits
        other = _shard(params, group, rule="stable_adamw", amsgrad=False)
        with pytest.raises(checkpoint.CheckpointError, match=r"group 2 was saved under .*lamb_ada"):
            checkpoint.load(saved, module, other, options="own", process_group=group)
    for value in (0.0, 1.0):  # of rank 0, which counts
        w = nn.Parameter(torch.full((4, 4), value if rank == 0 else 1.0 - value))
        _step_adamh(ShardedLamb([("w", w)], process_group=group, **ADAMH), zero=not value)
    return bits, reductions


def _lamb(
    mesh: DeviceMesh | None = None, how: How = lambda n, t: None
) -> tuple[dict[str, Tensor], int]:
    """Everything after three steps of Lamb, on DTensors if there is a mesh; all-reduces a step."""

    def put(n: str, t: Any) -> Any:
        return t if mesh is None else placed(t, mesh, how(n, t))

    whole = make()
    params = {n: nn.Parameter(put(n, p)) for n, p in whole.items()}
    optimizer = Lamb(groups(params, lr=0.02, max_grad_norm=1e3))
    for step in range(3):
        gradients(whole, step)
        for n, p in whole.items():
            params[n].grad = put(n, p.grad)
        reductions = _reductions(optimizer)
    found = everything(dict(params), optimizer)
    for kind, norms in (("x", optimizer.param_norms()), ("u", optimizer.update_norms())):
        found |= {f"{n} {kind}": t for n, t in norms.items()}
    return found, reductions


ADAMH: dict[str, Any] = {"rule": "adamh", "lr": 0.1}


def _step_adamh(optimizer: Lamb | ShardedLamb, zero: bool) -> None:
    """Zeros are refused at the first step, on all ranks; and nothing is changed."""
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.ones_like(p)
    if not zero:
        optimizer.step()
        return
    with pytest.raises(ValueError, match="w is zero: under this rule"):
        optimizer.step()
    assert not optimizer.state.get(p)


def _on_meshes(world: int, expected: dict[str, Tensor]) -> dict[str, int]:
    """All-reduces a step of Lamb."""
    one = init_device_mesh("cpu", (world,))
    two = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("outer", "inner"))
    cases: dict[str, tuple[DeviceMesh, How]] = {
        "FSDP2": (one, lambda n, t: [Shard(0)]),
        "beside plain tensors": (one, lambda n, t: [Shard(1)] if n in NAMES[::2] else None),
        "HSDP": (two, lambda n, t: [Replicate(), Shard(0)]),
        "FSDP x TP": (two, lambda n, t: [Shard(0), Shard(1)]),
    }
    counts = {}
    for case, (mesh, how) in cases.items():
        found, counts[case] = _lamb(mesh, how)
        assert_same(found, expected, case)
        w = torch.zeros(9, 9)
        for last in (0.0, 1.0):  # an element of the last rank
            w[-1, -1] = last
            p = nn.Parameter(placed(w, mesh, how(NAMES[0], w)))
            _step_adamh(Lamb([("w", p)], **ADAMH), zero=not last)
    return counts


def _engines(rank: int, world: int, expected: dict[str, Tensor], folder: str) -> Any:
    return each_world(rank, world, _sharded, folder), _on_meshes(world, expected)


@pytest.mark.xdist_group("ranks")
def test_rules_together_in_every_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bits at every world size, and on DTensors as on whole tensors; one all-reduce a mesh
    axis for late sums and one for early ones, whatever the number of rules and params. And through
    checkpoints, which name the rules."""
    expected, _ = _lamb()
    ranks = run_ranks(max(WORLDS), tmp_path, _engines, expected, str(tmp_path / "run"))
    bits, _ = ranks[0][0][1]
    for worlds, on_meshes in ranks:
        for world, (digest, reductions) in worlds.items():
            assert digest == bits, world
            assert reductions == (0 if world == 1 else 2), world
        assert on_meshes == {
            "FSDP2": 2, "beside plain tensors": 2, "HSDP": 2, "FSDP x TP": 4,
        }  # fmt: skip
    assert main(["inspect", str(tmp_path / "run" / "3")]) == 0
    told = capsys.readouterr().out
    assert all(f"parameter group {i}: 1 params, rule={n}," in told for i, n in enumerate(NAMES))
    assert "optimizer.amsgrad.max_exp_avg_sq" in told


def _fused(rank: int, world: int) -> None:
    rules: list[dict[str, Any]] = [
        {"rule": "stable_adamw"},
        {"rule": "lamb", "phi": (0.0, 2.0)},
        {"rule": "adamw"},
    ]
    found = []
    for impl in ("triton", "reference"):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(7, 5, generator=generator)) for _ in rules]
        of_rules = [{"params": [p], **of} for p, of in zip(params, rules)]
        optimizer = ShardedLamb(of_rules, lr=0.02, impl=impl, track_grad_norm=True)
        for _ in range(3):
            for p in params:
                p.grad = torch.randint(-7, 8, p.shape, generator=generator) / 16
            optimizer.step()
        reports = (
            optimizer.trust_ratios(),
            optimizer.param_norms(),
            optimizer.update_norms(),
            optimizer.grad_norms(),
            {"": optimizer.grad_norm()},
        )
        found.append([*params, *(value for report in reports for value in report.values())])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.xdist_group("ranks")
def test_fused_rules_together_on_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reduced sums are one tensor for all rules: each wrote the next step's into it, and they
    were added up as often as there are rules."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run_ranks(2, tmp_path, _fused)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_adamw_is_torch_s(amsgrad: bool, decoupled: bool) -> None:
    p, q = nn.Parameter(torch.ones(7, 5)), nn.Parameter(torch.ones(7, 5))
    options: dict[str, Any] = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.1, "amsgrad": amsgrad}
    ours = Lamb([p], rule="adamw", decoupled=decoupled, **options)
    theirs = (torch.optim.AdamW if decoupled else torch.optim.Adam)([q], **options)
    for step in range(6):
        p.grad = torch.randn(7, 5) / (1 + step)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        if step == 2:  # its state goes on here
            ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert ours.state[p].keys() == theirs.state[q].keys()


def stepped(**options: Any) -> Lamb:
    p = nn.Parameter(torch.ones(3, 4))
    optimizer = Lamb([p], **options)
    p.grad = torch.linspace(-0.5, 0.7, 12).view(3, 4)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"rule": "lamb"}, {"rule": "lans"}),  # the same names
        ({"rule": "lars"}, {"rule": "lars_optax"}),
        ({"rule": "adagrad"}, {"rule": "lamb"}),
        ({"amsgrad": True}, {}),
    ],
    ids=str,
)
def test_states_of_another_meaning_are_refused(theirs: Any, ours: Any) -> None:
    optimizer = stepped(**ours)
    before = {n: t.clone() for n, t in next(iter(optimizer.state.values())).items()}
    with pytest.raises(ValueError, match=r"the saved \w+ of param_0 is of rule"):
        optimizer.load_state_dict(stepped(**theirs).state_dict())
    for name, value in next(iter(optimizer.state.values())).items():
        assert torch.equal(value, before[name])


def test_a_state_without_a_rule_is_known_by_its_names() -> None:
    p = nn.Parameter(torch.ones(3, 4))
    sgd = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(3, 4)
    sgd.step()
    lars = Lamb([p], rule="lars")
    lars.load_state_dict(sgd.state_dict())
    assert torch.equal(lars.state[p]["momentum_buffer"], torch.ones(3, 4))
    with pytest.raises(ValueError, match="momentum_buffer of param_0 is of rule 'unknown'"):
        Lamb([p]).load_state_dict(sgd.state_dict())


def test_the_rule_of_a_group_with_state_does_not_change() -> None:
    optimizer = stepped(rule="lamb")
    optimizer.param_groups[0]["rule"] = "lans"
    for p in optimizer.state:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"another rule than 'lans'.*del opt.state"):
        optimizer.step()
    optimizer.state.clear()
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"rule": "lion"}, ValueError, "Unknown rule: 'lion'; known: lamb"),
        ({"momentum": 0.9}, TypeError, "no option momentum"),
        ({"rule": "adamw", "trust_clip": (0.0, 1.0)}, ValueError, "no option trust_clip"),
        ({"rule": "adamh", "weight_decay": 0.1}, ValueError, "no option weight_decay"),
        ({"rule": "lars", "momentum": 1.5}, ValueError, "momentum"),
        ({"rule": "lars", "momentum": 0.0, "nesterov": True}, ValueError, "Nesterov"),
        ({"rule": "adagrad", "lr_decay": -1.0}, ValueError, "lr_decay"),
        ({"rule": "lans", "amsgrad": True}, ValueError, "no option amsgrad"),
    ],
    ids=str,
)
def test_bad_options(options: Any, error: Any, told: str) -> None:
    with pytest.raises(error, match=told):
        Lamb([nn.Parameter(torch.ones(2, 2))], **options)


def test_a_zero_matrix_has_no_norm_to_keep() -> None:
    zero = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"w is zero.*rule='adamw'"):
        Lamb([("w", zero)], rule="adamh")
    optimizer = Lamb([("w", nn.Parameter(torch.ones(3, 3)))], rule="adamh")
    with pytest.raises(ValueError, match="w is zero"):
        optimizer.add_param_group({"params": [("w", zero)]})
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].zero_()
    _step_adamh(optimizer, zero=True)


@pytest.mark.parametrize("name", ["lans", "lars", "lars_optax", "adamh", "mlperf"])
def test_presets(name: str) -> None:
    before = torch.ones(3, 4)
    optimizer = stepped(**preset(name))
    (p,) = optimizer.state
    assert not torch.equal(p.detach(), before)
    if name == "adamh":
        torch.testing.assert_close(p.detach().norm(), before.norm())
