"""Several rules in one optimizer; what a rule's states may be exchanged with; bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from ranks import WORLDS, each_world, run_ranks
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from dist_lamb import Lamb, ShardedLamb, preset, rules

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


def _train(rank: int, group: Any) -> tuple[str, int]:
    params = make()
    optimizer = ShardedLamb(
        groups(params, lr=0.02, max_grad_norm=1e3), process_group=group, bucket_numel=2**12
    )
    for step in range(3):
        gradients(params, step)
        with CommDebugMode() as counted:
            optimizer.step()
        optimizer.zero_grad()
    reductions = sum(n for op, n in counted.get_comm_counts().items() if "allreduce_" in str(op))
    full = optimizer.full_optimizer_state_dict()["state"]
    found = {n: p.detach() for n, p in params.items()}
    found |= {f"{i} {n}": t for i, state in full.items() for n, t in state.items()}
    return models.digest(found), reductions


def test_rules_together_at_every_world_size(tmp_path: Path) -> None:
    """The same bits; and two all-reduces, whatever the number of rules and params."""
    ranks = run_ranks(max(WORLDS), tmp_path, each_world, _train)
    bits, _ = ranks[0][1]
    for worlds in ranks:
        for world, (digest, reductions) in worlds.items():
            assert digest == bits, world
            assert reductions == (0 if world == 1 else 2), world


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


@pytest.mark.parametrize("name", ["lans", "lars", "lars_optax", "adamh", "mlperf"])
def test_presets(name: str) -> None:
    before = torch.ones(3, 4)
    optimizer = stepped(**preset(name))
    (p,) = optimizer.state
    assert not torch.equal(p.detach(), before)
    if name == "adamh":
        torch.testing.assert_close(p.detach().norm(), before.norm())
