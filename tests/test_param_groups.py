"""param_groups(): which tensors decay, and which the trust ratio applies to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_lamb import Lamb, ShardedLamb, param_groups, preset


class Net(nn.Module):
    """A tied head, a frozen table, and a conv: what groups are made for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.conv = nn.Conv1d(4, 4, 1)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))


def described(groups: list[dict[str, Any]]) -> list[tuple[list[str], float, Any]]:
    """(names, weight decay, adapt) of each group."""
    return [([n for n, _ in g["params"]], g["weight_decay"], g.get("adapt")) for g in groups]


MATRICES = ["embed.weight", "conv.weight"]
VECTORS = ["scale", "conv.bias", "norm.weight", "norm.bias", "head.bias"]


def test_vectors_do_not_decay() -> None:
    """Frozen params are left out and the tied one comes once, under its first name."""
    assert described(param_groups(Net())) == [(MATRICES, 0.01, None), (VECTORS, 0.0, None)]
    assert described(param_groups(Net(), 0.3)) == [(MATRICES, 0.3, None), (VECTORS, 0.0, None)]


def test_tensors_are_the_model_s() -> None:
    model = Net()
    named = dict(model.named_parameters())
    for group in param_groups(model):
        for name, p in group["params"]:
            assert p is named[name]


def test_named_parameters_do_as_well() -> None:
    model = Net()
    assert described(param_groups(model.named_parameters())) == described(param_groups(model))


def test_patterns_replace_the_default() -> None:
    groups = param_groups(Net(), no_decay=["bias$", r"^norm\."])
    decayed = ["scale", "embed.weight", "conv.weight"]
    plain = ["conv.bias", "norm.weight", "norm.bias", "head.bias"]
    assert described(groups) == [(decayed, 0.01, None), (plain, 0.0, None)]


def test_nothing_is_spared_where_that_is_asked() -> None:
    ((names, decay, adapt),) = described(param_groups(Net(), no_decay=()))
    assert sorted(names) == sorted(MATRICES + VECTORS)
    assert (decay, adapt) == (0.01, None)


def test_predicates() -> None:
    seen: dict[str, Tensor] = {}

    def large(name: str, p: Tensor) -> bool:
        seen[name] = p
        return p.numel() > 20

    model = Net()
    assert described(param_groups(model, no_decay=large))[1] == (["embed.weight"], 0.0, None)
    assert seen == {n: p for n, p in model.named_parameters() if p.requires_grad}


def test_adaptation_is_apart_from_decay() -> None:
    """All four combinations, in this order; adapt is set only where it was asked to differ."""
    groups = param_groups(Net(), 0.1, no_adapt=["embed", "norm"])
    assert described(groups) == [
        (["conv.weight"], 0.1, None),
        (["embed.weight"], 0.1, False),
        (["scale", "conv.bias", "head.bias"], 0.0, None),
        (["norm.weight", "norm.bias"], 0.0, False),
    ]
    assert all("adapt" not in g for g in (groups[0], groups[2]))


def test_empty_groups_are_left_out() -> None:
    assert described(param_groups(nn.Linear(2, 2, bias=False))) == [(["weight"], 0.01, None)]
    assert described(param_groups(nn.LayerNorm(2))) == [(["weight", "bias"], 0.0, None)]


def test_every_param_is_in_one_group() -> None:
    groups = param_groups(Net(), no_decay=["e"], no_adapt=lambda name, p: "o" in name)
    names = [n for names, _, _ in described(groups) for n in names]
    assert sorted(names) == sorted(MATRICES + VECTORS)


def test_a_shape_carried_beside_the_tensor() -> None:
    """DeepSpeed's zero.Init leaves an empty vector and the shape as ``ds_shape``."""
    weight, bias = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(0))
    weight.ds_shape, bias.ds_shape = torch.Size([3, 4]), torch.Size([3])  # type: ignore[attr-defined]
    groups = param_groups([("weight", weight), ("bias", bias)])
    assert described(groups) == [(["weight"], 0.01, None), (["bias"], 0.0, None)]


@pytest.mark.parametrize("optimizer", [Lamb, ShardedLamb])
def test_optimizers_take_them(optimizer: Any) -> None:
    opt = optimizer(param_groups(Net(), 0.2, no_adapt=["norm"]), lr=0.5)
    assert [g["param_names"] for g in opt.param_groups] == [
        MATRICES,
        ["scale", "conv.bias", "head.bias"],
        ["norm.weight", "norm.bias"],
    ]
    assert [g["weight_decay"] for g in opt.param_groups] == [0.2, 0.0, 0.0]
    assert [g["adapt"] for g in opt.param_groups] == ["all", "all", False]
    assert all(g["lr"] == 0.5 for g in opt.param_groups)


@pytest.mark.parametrize(
    ("options", "vectors_adapted"),
    [(preset("apex"), False), (preset("timm"), False), (preset("nvlamb"), True), ({}, True)],
    ids=["apex", "timm", "nvlamb", "v5"],
)
def test_presets_decide_on_undecayed_tensors(
    options: dict[str, Any], vectors_adapted: bool
) -> None:
    """NVIDIA's BERT recipes: biases and normalisation weights take a plain Adam step."""
    model = Net()
    opt = Lamb(param_groups(model), **options)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    ratios = {n: float(r) for n, r in opt.trust_ratios().items()}
    assert set(ratios) == {*MATRICES, *VECTORS}
    assert all(ratios[n] != 1.0 for n in MATRICES)
    adapted = {n for n in ("conv.bias", "head.bias") if ratios[n] != 1.0}
    assert adapted == ({"conv.bias", "head.bias"} if vectors_adapted else set())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5", {}),
        ("v3", {"bias_correction": False}),
        ("nvlamb", {"max_grad_norm": 1.0}),
        ("apex", {"max_grad_norm": 1.0, "adapt": "decayed"}),
        ("timm", {"max_grad_norm": 1.0, "adapt": "decayed"}),
        ("lambc", {"trust_clip": (0.0, 1.0)}),
    ],
)
def test_presets(name: str, expected: dict[str, Any]) -> None:
    """A copy each time: changing one must not change the preset."""
    found = preset(name)
    assert found == expected
    found["lr"] = 1.0
    assert preset(name) == expected
    p = nn.Parameter(torch.ones(2))
    (group,) = Lamb([p], **preset(name)).param_groups
    plain = Lamb([p]).param_groups[0]
    assert {k for k in plain if k != "params" and group[k] != plain[k]} == set(expected)


WRONG: dict[str, tuple[Any, str]] = {
    "parameters": (lambda: Net().parameters(), "it got Parameter"),
    # rows of a [2, n] weight look like a pair
    "two_rows": (lambda: nn.Linear(4, 2, bias=False).parameters(), "it got Parameter"),
    "a_tensor": (lambda: Net().conv.weight, "it got Parameter"),
    "state_dict": (lambda: Net().state_dict(), "it got .*Dict"),
    "groups": (lambda: param_groups(Net()), "it got groups; give them to the optimizer as they"),
    "none": (lambda: None, "it got None"),
    "names": (lambda: [("a", "b")], r"it got tuple"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_what_has_no_names(make: Any, message: str) -> None:
    expected = r"^param_groups takes a module, or its named_parameters\(\); " + message
    with pytest.raises(TypeError, match=expected):
        param_groups(make())


@pytest.mark.parametrize("option", ["no_decay", "no_adapt"])
def test_a_pattern_that_is_none(option: str) -> None:
    wanted = rf"^{option}: pattern 'bias\(' is no regular expression: missing \)"
    with pytest.raises(ValueError, match=wanted):
        param_groups(Net(), **{option: ["conv", "bias("]})
