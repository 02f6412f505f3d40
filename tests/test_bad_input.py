"""Wrong inputs, the message each gets, and that nothing has changed after it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_lamb import Lamb, ShardedLamb, kernels, param_groups, preset, schedules

OPTIMIZERS = (Lamb, ShardedLamb)
NAN, INF = float("nan"), float("inf")

#: Options, and the whole of the message.
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"lr": -0.1}, "Invalid learning rate: -0.1"),
    ({"lr": NAN}, "Invalid learning rate: nan"),
    ({"lr": INF}, "Invalid learning rate: inf"),
    ({"lr": "0.1"}, "Invalid learning rate: '0.1'"),
    ({"lr": None}, "Invalid learning rate: None"),
    ({"lr": True}, "Invalid learning rate: True"),
    ({"lr": torch.zeros(2)}, "Tensor lr must be 1-element, got shape (2,)"),
    ({"betas": (-0.1, 0.9)}, "Invalid beta parameter at index 0: -0.1"),
    ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
    ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
    ({"betas": (0.9, NAN)}, "Invalid beta parameter at index 1: nan"),
    ({"betas": (0.9, "0.99")}, "Invalid beta parameter at index 1: '0.99'"),
    ({"betas": 0.9}, "Invalid betas: 0.9; a pair expected"),
    ({"betas": (0.9,)}, "Invalid betas: (0.9,); a pair expected"),
    ({"betas": (0.9, 0.95, 0.99)}, "Invalid betas: (0.9, 0.95, 0.99); a pair expected"),
    ({"eps": -1e-6}, "Invalid eps value: -1e-06"),
    ({"eps": NAN}, "Invalid eps value: nan"),
    ({"eps": "1e-6"}, "Invalid eps value: '1e-6'"),
    ({"weight_decay": -0.01}, "Invalid weight_decay value: -0.01"),
    ({"weight_decay": INF}, "Invalid weight_decay value: inf"),
    ({"weight_decay": None}, "Invalid weight_decay value: None"),
    ({"grad_averaging": 1}, "Invalid grad_averaging value: 1; True or False expected"),
    ({"bias_correction": None}, "Invalid bias_correction value: None; True or False expected"),
    ({"decoupled": "no"}, "Invalid decoupled value: 'no'; True or False expected"),
    ({"maximize": 0.0}, "Invalid maximize value: 0.0; True or False expected"),
    (
        {"max_grad_norm": -1.0},
        "Invalid max_grad_norm value: -1.0; None or a number >= 0 expected",
    ),
    ({"max_grad_norm": NAN}, "Invalid max_grad_norm value: nan; None or a number >= 0 expected"),
    ({"max_grad_norm": True}, "Invalid max_grad_norm value: True; None or a number >= 0 expected"),
    ({"adapt": "none"}, "Invalid adapt value: 'none'; 'all', 'decayed', True or False expected"),
    ({"adapt": None}, "Invalid adapt value: None; 'all', 'decayed', True or False expected"),
    *(
        (
            {name: value},
            f"Invalid {name} value: {value!r}; None or (lo, hi) with 0 <= lo <= hi expected",
        )
        for name in ("trust_clip", "phi")
        for value in (10.0, True, (1.0,), (2.0, 1.0), (-1.0, 1.0), (0.0, NAN), (NAN, 1.0), ("0", 1))
    ),
]
#: Those of the optimizer, not of a group.
CONSTRUCTION: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"impl": "fast"},
        ValueError,
        "Invalid impl: 'fast'; known: .*reference.*foreach.*compiled",
    ),
    ({"impl": None}, ValueError, "Invalid impl: None; known: "),
    ({"foreach": True, "impl": "compiled"}, ValueError, "foreach=True contradicts impl='compiled'"),
    (
        {"foreach": True, "fused": True},
        RuntimeError,
        "`fused` and `foreach` cannot be `True` together",
    ),
    ({"momentum": 0.9}, TypeError, "has no option momentum"),
    ({"caution": True, "wd": 0.1}, TypeError, "has no option caution, wd"),
]


def params() -> list[Tensor]:
    return [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=lambda v: str(v)[:40])
def test_options(optimizer: Any, options: dict[str, Any], message: str) -> None:
    """For the whole optimizer, for one of its groups, and for a group added later."""
    exactly = f"^{re.escape(message)}$"
    with pytest.raises(ValueError, match=exactly):
        optimizer(params(), **options)
    first, second = params()
    with pytest.raises(ValueError, match=exactly):
        optimizer([{"params": [first]}, {"params": [second], **options}])
    opt = optimizer([first])
    with pytest.raises(ValueError, match=exactly):
        opt.add_param_group({"params": [second], **options})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("options", "error", "message"), CONSTRUCTION, ids=str)
def test_construction(
    optimizer: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        optimizer(params(), **options)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_negative_tensor_lr_on_the_cpu(optimizer: Any) -> None:
    """As torch's own: it is there to be read, and would ascend in silence."""
    with pytest.raises(ValueError, match=r"^Invalid learning rate: "):
        optimizer(params(), lr=torch.tensor(-0.1))


NOT_FLOAT = r"optimizes real floating-point tensors; "
BAD_PARAMS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "none": (lambda: [], ValueError, "empty parameter list"),
    "a_tensor": (
        lambda: params()[0],
        TypeError,
        "should be an iterable of Tensors or dicts",
    ),
    "strings": (lambda: ["weight"], TypeError, "can only optimize Tensors"),
    "not_a_leaf": (lambda: [params()[0] * 2], ValueError, "can't optimize a non-leaf Tensor"),
    "twice": (lambda: [{"params": p} for p in params()[:1] * 2], ValueError, "more than one"),
    "half_named": (
        lambda: [{"params": [("a", params()[0])]}, {"params": params()[:1]}],
        ValueError,
        "param groups should be with/without names",
    ),
    "integers": (lambda: [torch.ones(3, dtype=torch.int64)], TypeError, NOT_FLOAT + "param_0 is"),
    "bools": (lambda: [torch.ones(3, dtype=torch.bool)], TypeError, NOT_FLOAT + ".*torch.bool"),
    "complex": (
        lambda: [("w", params()[0]), ("z", nn.Parameter(torch.ones(3, dtype=torch.complex64)))],
        TypeError,
        NOT_FLOAT + "z is torch.complex64",
    ),
    "complex_in_second_group": (
        lambda: [{"params": params()}, {"params": [torch.ones(1, dtype=torch.complex128)]}],
        TypeError,
        NOT_FLOAT + "param_2 is torch.complex128",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)),
        RuntimeError,
        r"1\.weight: it has no shape yet; run the model forward once",
    ),
    "lazy_groups": (
        lambda: param_groups(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))),
        ValueError,
        r"cannot sort 1\.weight: it has no shape yet; run the model forward once",
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("make", "error", "message"), BAD_PARAMS.values(), ids=BAD_PARAMS)
def test_params(
    optimizer: Any, make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        optimizer(make())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_float8_params(optimizer: Any, dtype: torch.dtype) -> None:
    """Refused at construction: there is no arithmetic on them, and a step would fail halfway."""
    p = nn.Parameter(torch.ones(3).to(dtype))
    with pytest.raises(TypeError, match=r"param_1 is torch.float8"):
        optimizer([params()[0], p])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_tied_param_under_both_names(optimizer: Any) -> None:
    p = params()[0]
    message = "cannot optimize params: head.weight shares memory with embed.weight$"
    with pytest.raises(ValueError, match=message):
        optimizer([("embed.weight", p), ("head.weight", p)])
    opt = optimizer([("other", params()[1])])
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [("embed.weight", p), ("head.weight", p)]})
    assert len(opt.param_groups) == 1


# --- ShardedLamb, as far as one process goes -----------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 3}, "^Invalid stage: 3; 1 \\(shard state\\) or 2 \\(and gradients\\)$"),
        ({"stage": 0}, "^Invalid stage: 0;"),
        ({"stage": "2"}, "^Invalid stage: '2';"),
        ({"stage": True}, "^Invalid stage: True;"),
        ({"overlap": "no"}, "^Invalid overlap: 'no'; True or False expected$"),
        ({"reduce_dtype": "bf16"}, "^Invalid reduce_dtype: 'bf16'; e.g. torch.float32 expected$"),
        ({"reduce_dtype": torch.float8_e4m3fn}, "^Invalid reduce_dtype: torch.float8_e4m3fn;"),
        ({"process_group": "world"}, "^Invalid process_group: 'world'; a ProcessGroup, None or"),
        ({"bucket_numel": True}, "^Invalid bucket_numel: True$"),
        ({"bucket_numel": 0}, "^Invalid bucket_numel: 0$"),
        ({"bucket_numel": -5}, "^Invalid bucket_numel: -5$"),
        ({"bucket_numel": 1e6}, "^Invalid bucket_numel: 1000000.0$"),
    ],
)
def test_sharded_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardedLamb(params(), **options)


def test_sharded_meta_params() -> None:
    with torch.device("meta"):
        on_meta = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"^weight is on the meta device; materialize the model"):
        ShardedLamb(on_meta)
    with pytest.raises(RuntimeError, match=r"^param_2 is on the meta device"):
        ShardedLamb([*params(), on_meta.weight])
    opt = ShardedLamb(params())
    with pytest.raises(RuntimeError, match=r"^param_2 is on the meta device"):
        opt.add_param_group({"params": [on_meta.weight]})
    assert len(opt.param_groups) == 1


def test_sharded_module_without_params() -> None:
    with pytest.raises(ValueError, match=r"empty parameter list"):
        ShardedLamb(nn.ReLU())


def test_sharded_without_trainable_params() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    opt = ShardedLamb(frozen)
    with pytest.raises(RuntimeError, match=r"^ShardedLamb has no trainable params$"):
        opt.step()


# --- refused steps -------------------------------------------------------------------------------


def sparse(p: Tensor) -> Tensor:
    return torch.ones_like(p).to_sparse()


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sparse_gradient(optimizer: Any, steps_before: int) -> None:
    """The dense one before it has not been stepped either."""
    own = dict(zip(("first", "second"), params()))
    opt = optimizer(list(own.items()), max_grad_norm=1.0)
    for _ in range(steps_before):
        for p in own.values():
            p.grad = torch.ones_like(p)
        opt.step()
    before = [p.detach().clone() for p in own.values()]
    state = [{k: v.clone() for k, v in opt.state[p].items()} for p in opt.state]
    own["first"].grad = torch.ones(3)
    own["second"].grad = sparse(own["second"])
    name = optimizer.__name__
    with pytest.raises(
        RuntimeError, match=f"^{name} cannot step second: sparse gradients are not supported$"
    ):
        opt.step()
    for p, old in zip(own.values(), before):
        assert torch.equal(p, old)
    assert len(opt.state) == len(state)
    for p, old_state in zip(opt.state, state):
        for key, value in old_state.items():
            assert torch.equal(opt.state[p][key], value)

    own["second"].grad = torch.ones(2, 2)
    opt.step()
    assert opt.state[own["second"]]["step"] == steps_before + 1


def test_sparse_embedding() -> None:
    emb = nn.Embedding(5, 2, sparse=True)
    opt = Lamb(emb.named_parameters())
    emb(torch.tensor([1, 1, 3])).sum().backward()
    with pytest.raises(RuntimeError, match=r"^Lamb cannot step weight: sparse gradients"):
        opt.step()
    assert not opt.state


@pytest.mark.parametrize("impl", ["reference", "foreach"])
def test_state_on_another_device(impl: str) -> None:
    """Moved away and not back."""
    p = nn.Parameter(torch.ones(3))
    opt = Lamb([("w", p)], impl=impl)
    p.grad = torch.ones(3)
    opt.step()
    before = p.detach().clone()
    opt.state[p]["exp_avg_sq"] = opt.state[p]["exp_avg_sq"].to("meta")
    with pytest.raises(
        RuntimeError,
        match=r"^Lamb cannot step w: its state exp_avg_sq is on meta, the param on cpu$",
    ):
        opt.step()
    assert torch.equal(p, before)


def test_meta_params_cannot_be_stepped() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device="meta"))
    opt = Lamb([("here", p), ("nowhere", q)])
    p.grad, q.grad = torch.ones(3), torch.ones(3, device="meta")
    with pytest.raises(
        RuntimeError,
        match=r"^Lamb cannot step nowhere: it is on the meta device and holds no values$",
    ):
        opt.step()
    assert torch.equal(p, torch.ones(3))
    assert not opt.state


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_compiled_without_a_compiler(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_cpp_compiler", lambda: False)
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = optimizer([p], impl="compiled")
    with pytest.raises(
        RuntimeError, match=r"^impl='compiled' on CPU needs a C\+\+ compiler, and none was found$"
    ):
        opt.step()
    assert torch.equal(p, torch.ones(3))

    p.grad = torch.ones(3)
    opt = optimizer([p], impl="auto")
    opt.step()
    assert not torch.equal(p, torch.ones(3))


def test_sharded_param_that_became_another() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = ShardedLamb([("w", p)], stage=1)
    p.grad = torch.ones(3)
    opt.step()
    kept = p.detach().clone()
    p.grad = None
    p.data = p.data.double()
    p.grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"^w was \(3,\) torch.float32 on cpu and is now"):
        opt.step()
    assert torch.equal(p, kept.double())


def test_sharded_param_that_was_frozen() -> None:
    p, q = params()
    q.requires_grad_(False)
    opt = ShardedLamb([("p", p), ("q", q)])
    p.grad = torch.ones(3)
    opt.step()
    q.requires_grad_(True)
    p.grad, q.grad = torch.ones(3), torch.ones(2, 2)
    opt.step()
    assert [float(opt.state[t]["step"]) for t in (p, q)] == [2.0, 1.0]
    assert not torch.equal(q, torch.ones(2, 2))


def test_sharded_cannot_be_copied() -> None:
    import copy

    with pytest.raises(TypeError, match=r"^a ShardedLamb cannot be copied or pickled"):
        copy.deepcopy(ShardedLamb(params()))


# --- functions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: param_groups(m, no_decay=["bias", "nrom"]), "^no_decay: pattern 'nrom' matches"),
        (lambda m: param_groups(m, no_adapt=["^fc$"]), "^no_adapt: pattern '\\^fc\\$' matches no"),
        (
            lambda m: param_groups(m, no_decay="bias"),
            "^no_decay takes a sequence of patterns, got the string 'bias'$",
        ),
        (lambda m: param_groups(m, no_adapt="bias"), "^no_adapt takes a sequence of patterns"),
        (lambda m: param_groups(nn.ReLU()), "^param_groups got no trainable params$"),
        (lambda m: param_groups([]), "^param_groups got no trainable params$"),
        (lambda m: param_groups(m.requires_grad_(False)), "^param_groups got no trainable params$"),
        (
            lambda m: preset("v4"),
            "^Unknown preset: 'v4'; known: v5, v3, nvlamb, apex, timm, lambc",
        ),
        (
            lambda m: schedules.sqrt_scaled_lr(1e-3, 0, 8),
            "^batches must be at least 1, got 0 and 8$",
        ),
        (
            lambda m: schedules.sqrt_scaled_lr(1e-3, 8, -1),
            "^batches must be at least 1, got 8 and -1$",
        ),
        (
            lambda m: schedules.linear_epoch_warmup_steps(-0.5, 100, 8),
            "^warmup_epochs >= 0, samples_per_epoch >= 1 and batch >= 1 expected, got -0.5, 100 ",
        ),
        (lambda m: schedules.linear_epoch_warmup_steps(1, 0, 8), "expected, got 1, 0 and 8$"),
        (lambda m: schedules.linear_epoch_warmup_steps(1, 9, 0), "expected, got 1, 9 and 0$"),
        *(
            (
                lambda m, a=arguments: schedules.warmup_linear_decay(Lamb(m.parameters()), *a),
                "^0 <= warmup_steps <= total_steps, total_steps >= 1 and 0 <= end_factor <= 1 "
                "expected, got " + re.escape(f"{arguments[0]}, {arguments[1]} and "),
            )
            for arguments in ((-1, 10), (11, 10), (0, 0), (1, 10, -0.1), (1, 10, 1.5), (1, 9, NAN))
        ),
    ],
)
def test_functions(make: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)))


def test_a_refused_schedule_leaves_the_lr() -> None:
    opt = Lamb(params(), lr=0.5)
    with pytest.raises(ValueError, match=r"warmup_steps"):
        schedules.warmup_linear_decay(opt, 20, 10)
    assert opt.param_groups[0]["lr"] == 0.5
    assert "initial_lr" not in opt.param_groups[0]
