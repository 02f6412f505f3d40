"""Lamb as an entry of PyTorch's own table of optimizers, and the checks that the table is for.

PyTorch tests each of its optimizers by an ``OptimizerInfo`` (torch.testing._internal): what
constructor arguments to try, and what it can do. ``LAMB`` is Lamb's; the checks below are those
that test/test_optim.py runs over the table, by their names there, written anew. ``NOT_APPLICABLE``
has the rest, each with its reason, and where the reason is a refusal a test of it.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest (extra dev)")
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR
from torch.testing._internal import common_optimizers as table

from dist_lamb import Lamb


def lamb_inputs(device: Any, dtype: Any = None) -> list[Any]:
    """Options of the rule and what every optimizer has, without the flags that choose a backend."""
    options: dict[str, dict[str, Any]] = {
        "default": {},
        "non-default lr": {"lr": 0.01},
        "tensor lr": {"lr": torch.tensor(0.01)},
        "nonzero weight_decay": {"weight_decay": 0.1},
        "L2 decay": {"weight_decay": 0.1, "decoupled": False},
        "maximize": {"weight_decay": 0.1, "maximize": True},
        "clipping": {"max_grad_norm": 0.5},
        "no bias correction": {"bias_correction": False, "grad_averaging": False},
        "trust clip": {"trust_clip": (0.1, 1.0), "adapt": "decayed"},
        "skip": {"nonfinite": "skip"},
        "capturable": {"capturable": True},
    }
    return [table.OptimizerInput(params=None, kwargs=o, desc=d) for d, o in options.items()]


def lamb_errors(device: Any, dtype: Any) -> list[Any]:
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
        ({"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1"),
        ({"eps": -1e-3}, ValueError, "Invalid eps value: -0.001"),
        ({"foreach": True, "fused": True}, RuntimeError, "`fused` and `foreach` cannot be `True`"),
    ]
    errors = table.get_error_inputs_for_all_optims(device, dtype)
    for kwargs, kind, text in bad:
        given = table.OptimizerInput(params=None, kwargs=kwargs, desc=text)
        errors.append(table.ErrorOptimizerInput(given, error_type=kind, error_regex=text))
    return errors


LAMB = table.OptimizerInfo(
    Lamb,
    optim_inputs_func=lamb_inputs,
    optim_error_inputs_func=lamb_errors,
    scheduler_inputs=(
        [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
        [lambda opt: ExponentialLR(opt, gamma=0.99), lambda opt: ReduceLROnPlateau(opt)],
    ),
    supported_impls=("foreach", "fused"),
    supports_fused_on=("cpu", "cuda"),
    has_capturable_arg=True,
    supports_complex=False,
    supports_sparse=False,
)

#: Checks of test_optim.py that say nothing of Lamb: name, and why.
NOT_APPLICABLE = {
    "test_complex, test_complex_2d": "complex params are refused: a norm over real and imaginary "
    "parts as one tensor is another rule than one over each",
    "test_rosenbrock_sparse": "sparse gradients are refused: LAMB's norms need every element",
    "TestDifferentiableOptimizer": "no differentiable=True: the step is made in place, outside of "
    "autograd",
    "test_step_is_noop_for_zero_grads with weight decay": "decoupled decay moves params at zero "
    "gradients, as AdamW's does (excluded there too)",
    "test_peak_memory_foreach, test_foreach_large_tensor, test_fused_large_tensor": "need a GPU; "
    "tests/test_gpu.py and tests/test_memory.py count memory",
    "test_defaults_changed_to_foreach": "what 'auto' takes is not torch's choice: Triton, compiled "
    "or foreach, see tests/test_compiled.py",
    "test_mixed_device_dtype": "needs two kinds of devices; dtypes are mixed in tests/test_lamb_*",
    "test_forloop_goes_right_direction_multigpu, test_state_dict_with_cuda_params": "need GPUs; "
    "tests/test_gpu*.py",
    "test_graph_optims, test_grad_scaling_autocast_fused_optimizers": "need a GPU: tests/test_gpu*;"
    " loss scaling on CPUs is in tests/test_lamb_loss_scaling.py",
    "test_lbfgs_*, test_adagrad_*, test_fused_*_found_inf of one class": "are of one optimizer",
    "test_load_nontensor_step on capturable": "Lamb keeps a number a number until the next step",
    "test_duplicate_params_in_one_param_group": "torch warns and steps such a param twice; Lamb "
    "refuses it",
    "test_compiled_optimizer (TestCompiledOptimizers)": "Lamb compiles its own update; "
    "torch.compile around step() is not supported",
}


def options() -> list[Any]:
    found = table._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, LAMB)
    assert len(found) >= 2 * len(lamb_inputs("cpu"))  # foreach is a choice on GPUs only
    return found


every_option = pytest.mark.parametrize("given", options(), ids=lambda given: given.desc)


class Problem:
    """Least squares of a matrix and a vector, convex: every direct optimizer gets down it."""

    def __init__(self, given: Any, contiguous: bool = True) -> None:
        torch.manual_seed(0)
        if contiguous:
            self.weight, self.bias = nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(10))
        else:
            self.weight = nn.Parameter(torch.randn(10, 5, 2)[..., 0])
            self.bias = nn.Parameter(torch.randn(10, 2)[..., 0])
        self.input = torch.randn(5)
        self.params = [self.weight, self.bias]
        self.kwargs = copy.deepcopy(given.kwargs)
        self.optimizer = Lamb(self.params, **self.kwargs)

    def loss(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = (self.weight.mv(self.input) + self.bias).square().sum()
        loss.backward()
        return loss

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.step(self.loss)


def equal(a: Problem, b: Problem) -> None:
    for p, q in zip(a.params, b.params):
        assert torch.equal(p, q)


def test_optim_infos_do_not_specify_global_cliquey_kwargs() -> None:
    for given in lamb_inputs("cpu"):
        assert not {"foreach", "fused", "differentiable"} & set(given.kwargs)


@pytest.mark.parametrize(
    "wrong", lamb_errors("cpu", torch.float32), ids=lambda w: str(w.error_regex)
)
def test_errors(wrong: Any) -> None:
    given = wrong.optimizer_error_input
    params = [nn.Parameter(torch.randn(1))] if given.params is None else given.params
    if issubclass(wrong.error_type, Warning):
        # torch warns of a param that comes twice, and steps it twice: Lamb refuses it besides.
        with (
            pytest.warns(wrong.error_type, match=wrong.error_regex),
            pytest.raises(ValueError, match="shares memory"),
        ):
            Lamb(params, **given.kwargs)
    else:
        with pytest.raises(wrong.error_type, match=wrong.error_regex):
            Lamb(params, **given.kwargs)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedulers", [(), *LAMB.scheduler_inputs], ids=["none", "a", "b"])
@every_option
def test_forloop_goes_right_direction(given: Any, schedulers: Any, contiguous: bool) -> None:
    problem = Problem(given, contiguous)
    made = [make(problem.optimizer) for make in schedulers]
    before = problem.loss().item()
    for _ in range(10):
        loss = problem.optimizer.step(problem.loss).detach()
        for scheduler in made:
            scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    after = problem.loss().item()
    assert after > before if problem.kwargs.get("maximize") else after < before


def test_param_group_with_lrscheduler_goes_right_direction() -> None:
    for make in (pair for pairs in LAMB.scheduler_inputs for pair in pairs):
        weight, bias = nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(10))
        opt = Lamb([{"params": [weight]}, {"params": [bias], "lr": 0.01}], lr=0.001)
        scheduler, x = make(opt), torch.randn(5)
        losses = []
        for _ in range(20):
            opt.zero_grad()
            loss = (weight.mv(x) + bias).square().sum()
            loss.backward()
            opt.step()
            plateau = isinstance(scheduler, ReduceLROnPlateau)
            scheduler.step(loss.detach()) if plateau else scheduler.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@every_option
def test_tensor_lr(given: Any, shape: tuple[int, ...]) -> None:
    plain, by_tensor = Problem(given), Problem(given)
    for group, other in zip(plain.optimizer.param_groups, by_tensor.optimizer.param_groups):
        group["lr"], other["lr"] = 0.0078125, torch.full(shape, 0.0078125)
    plain.train(5)
    by_tensor.train(5)
    equal(plain, by_tensor)
    assert by_tensor.optimizer.param_groups[0]["lr"].shape == shape


def _implementations(given: Any) -> Iterator[Problem]:
    for flags in ({"impl": "reference"}, {"foreach": True}, {"fused": True}):
        kwargs = {k: v for k, v in given.kwargs.items() if k not in ("foreach", "fused")}
        problem = Problem(table.OptimizerInput(None, {**kwargs, **flags}, given.desc))
        problem.train(7)
        yield problem


@pytest.mark.parametrize("given", lamb_inputs("cpu"), ids=lambda given: given.desc)
def test_foreach_and_fused_match_forloop(given: Any) -> None:
    reference, *others = _implementations(given)
    for other in others:
        for p, q in zip(reference.params, other.params):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@every_option
def test_step_is_noop_when_params_have_no_grad(given: Any) -> None:
    problem = Problem(given)
    before = [p.detach().clone() for p in problem.params]
    problem.optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(problem.params, before))
    assert not problem.optimizer.state


@every_option
def test_step_is_noop_for_zero_grads(given: Any) -> None:
    problem = Problem(table.OptimizerInput(None, {**given.kwargs, "weight_decay": 0.0}, given.desc))
    before = [p.detach().clone() for p in problem.params]
    for p in problem.params:
        p.grad = torch.zeros_like(p)
    problem.optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(problem.params, before))


@every_option
def test_optimizer_can_be_printed(given: Any) -> None:
    assert "lr" in repr(Problem(given).optimizer)


@every_option
def test_state_dict_deterministic_and_save_load(given: Any) -> None:
    """Also test_save_load_equality_with_weights_only and test_can_load_older_state_dict."""
    problem, twin = Problem(given), Problem(given)
    problem.train(3)
    with torch.no_grad():
        for p, q in zip(twin.params, problem.params):
            p.copy_(q)
    file = io.BytesIO()
    torch.save(problem.optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    older = copy.deepcopy(saved)
    for group in older["param_groups"]:
        for flag in LAMB.not_og_supported_flags:
            group.pop(flag, None)
    twin.optimizer.load_state_dict(older)
    if problem.kwargs.get("maximize"):
        twin.optimizer.load_state_dict(saved)
    problem.train(3)
    twin.train(3)
    equal(problem, twin)
    a, b = problem.optimizer.state_dict(), twin.optimizer.state_dict()
    assert a["state"].keys() == b["state"].keys()
    assert all(
        torch.equal(a["state"][k][n], b["state"][k][n]) for k in a["state"] for n in a["state"][k]
    )


@pytest.mark.parametrize("named", [(True, False), (False, True), (True, True)])
def test_can_load_from_to_named_state_dict(named: tuple[bool, bool]) -> None:
    def make(names: bool) -> Lamb:
        params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))]
        opt = Lamb([(f"p{i}", p) for i, p in enumerate(params)] if names else params)
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        return opt

    first, second = make(named[0]), make(named[1])
    second.load_state_dict(first.state_dict())
    for state, other in zip(first.state.values(), second.state.values(), strict=True):
        assert all(torch.equal(state[name], other[name]) for name in state)
    second.step()


def test_load_nontensor_step() -> None:
    problem = Problem(table.OptimizerInput(None, {}, ""))
    problem.train(3)
    saved = problem.optimizer.state_dict()
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    problem.optimizer.load_state_dict(saved)
    problem.train(1)
    assert all(float(problem.optimizer.state[p]["step"]) == 4 for p in problem.params)


@every_option
def test_deepcopy_copies_all_public_attrs(given: Any) -> None:
    opt = Problem(given).optimizer
    public = {name for name in vars(opt) if not name.startswith("_")}
    assert public == {name for name in vars(copy.deepcopy(opt)) if not name.startswith("_")}


def test_hooks() -> None:
    """test_step_{pre,post,all}_hook*, test_{state_dict,load_state_dict}_{pre,post}_hook*."""
    problem, seen = Problem(table.OptimizerInput(None, {}, "")), []

    def note(what: str) -> Callable[..., None]:
        return lambda *_: seen.append(what)

    opt = problem.optimizer
    handles = [
        opt.register_step_pre_hook(note("before step")),
        opt.register_step_post_hook(note("after step")),
        opt.register_state_dict_pre_hook(note("before save")),
        opt.register_state_dict_post_hook(note("after save")),
        opt.register_load_state_dict_pre_hook(note("before load")),
        opt.register_load_state_dict_pre_hook(note("first"), prepend=True),
        opt.register_load_state_dict_post_hook(note("after load")),
    ]
    problem.train(1)
    opt.load_state_dict(opt.state_dict())
    wanted = ["before step", "after step", "before save", "after save", "first"]
    assert seen == [*wanted, "before load", "after load"]
    for handle in handles:
        handle.remove()
    problem.train(1)
    opt.load_state_dict(opt.state_dict())
    assert len(seen) == 7


@every_option
def test_non_empty_state(given: Any) -> None:
    problem = Problem(given)
    problem.train(1)
    for state in problem.optimizer.state.values():
        assert any(torch.is_tensor(v) and v.numel() for v in state.values())


def test_param_groups_lr_and_weight_decay() -> None:
    """An lr or a decay of a group counts for that group alone."""
    for option, still in ({"lr": 0.0}, True), ({"lr": 0.05}, False):
        a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        opt = Lamb([{"params": [a], **option}, {"params": [b]}], lr=0.01)
        a.grad = b.grad = torch.ones(4)
        opt.step()
        assert torch.equal(a, torch.ones(4)) is still
        assert not torch.equal(a, b)
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    opt = Lamb([{"params": [a], "weight_decay": 0.5}, {"params": [b]}], lr=0.01, weight_decay=0.0)
    a.grad = b.grad = torch.zeros(4)
    opt.step()
    assert (a < b).all()
    assert torch.equal(b, torch.ones(4))


def test_what_does_not_apply_is_refused() -> None:
    assert all(NOT_APPLICABLE.values())
    with pytest.raises(TypeError, match="real floating-point"):
        Lamb([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    p = nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.zeros(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        Lamb([p]).step()
    with pytest.raises(TypeError, match="differentiable"):
        Lamb([p], differentiable=True)
