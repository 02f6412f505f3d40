"""Random models, random options and random edits between steps, against LAMB in float64.

    python tests/fuzz_steps.py --seeds 0:200 --impl foreach             # Lamb
    python tests/fuzz_steps.py --seeds 0:200 --impl foreach --world 2   # ShardedLamb on two ranks

A seed is a model, its groups and a course of steps with edits between them. :class:`Rule` is LAMB
as shared/LAMB.md has it; it is told of every edit and imports nothing of the package. It goes on
from the optimizer's own numbers wherever the course looks at the state ("looks"), so that rounding
does not add up: what is compared is one step, or the few since the last look. In between nothing
but params is read, so that a step which trusts what it kept of the last one is not led to look
again by the test.

A failure names the seed, the step and the edits so far.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import subprocess
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: Of the largest value. One step in float32 is off by some 1e-6; norms, roots and quotients of a
#: few thousand elements leave a margin of ten.
TOLERANCE = {torch.float64: 1e-9}
FLOAT32_TOLERANCE = 2e-5
#: Absolute error of an element of u in float32, of the largest element of r or wd*x.
U_ERROR = 1e-6
STEPS = 14
SHAPES = [
    *[
        (),
        (1,),
        (2,),
        (7,),
        (24,),
        (1025,),
        (2049,),
        (33, 31),
        (16, 24),
        (5, 3, 3, 3),
        (8, 4, 2, 2),
    ],
    (40, 60),
]
OPTIONS: dict[str, tuple[Any, ...]] = {
    "lr": (0.01, 0.03, 0.1),
    "betas": ((0.9, 0.999), (0.83, 0.95), (0.0, 0.9), (0.9, 0.5)),
    # A smaller eps makes the update jump where L2 decay cancels a gradient.
    "eps": (1e-4, 1e-3, 1e-2),
    "weight_decay": (0.01, 0.05, 0.3, 0.0),
    "grad_averaging": (True, True, False),
    "bias_correction": (True, True, False),
    "decoupled": (True, True, False),
    "max_grad_norm": (None, None, 0.0, 0.7, 5.0, 1e6),
    "adapt": ("all", "all", "decayed", True, False),
    "trust_clip": (None, None, (0.0, 1.0), (0.01, 0.3), (0.5, 2.0)),
    "phi": (None, None, (0.0, 0.5), (0.3, 10.0)),
    "maximize": (False, False, False, True),
}
INVALID: list[tuple[str, Any]] = [
    *[("lr", -1.0), ("lr", "0.1"), ("lr", math.nan), ("betas", (1.0, 0.9)), ("betas", 0.9)],
    *[("eps", -1e-6), ("weight_decay", math.inf), ("max_grad_norm", -1.0), ("adapt", "some")],
    *[("trust_clip", (2.0, 1.0)), ("phi", (-1.0, 1.0)), ("maximize", "yes")],
    *[("bias_correction", None), ("nonfinite", "ignore")],
]
FORMS = (
    *("like the param", "in place", "contiguous", "transposed", "gaps", "negative", "expanded"),
    "other dtype",
)
STATES = ("exp_avg", "exp_avg_sq", "master")
HALF = (torch.bfloat16, torch.float16)


class Mismatch(AssertionError):
    pass


# --- the rule, from shared/LAMB.md ---------------------------------------------------------------


@dataclass
class Layer:
    """One tensor in float64, and what the last step made of it."""

    x: Tensor
    m: Tensor
    v: Tensor
    t: int = 0
    ratio: float = math.nan
    x_norm: float = math.nan
    u_norm: float = math.nan
    g_norm: float = math.nan
    #: how far off float32 arithmetic may be: relative of the norm of u, absolute of x
    slack: float = 0.0
    x_slack: float = 0.0
    #: the largest numbers that were added up in x, m and v
    scale: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, p: Tensor) -> Layer:
        x = p.detach().double().clone()
        return cls(x, torch.zeros_like(x), torch.zeros_like(x))

    def forget(self, p: Tensor) -> None:
        fresh = Layer.of(p)
        self.x, self.m, self.v, self.t = fresh.x, fresh.m, fresh.v, 0


def largest(*tensors: Tensor) -> float:
    return max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)


def rule_step(groups: list[tuple[dict[str, Any], list[Layer]]], grads: dict[int, Tensor]) -> float:
    """One step on all layers; ``grads`` by ``id`` of the layer. Returns the norm of all gradients.

    Layers without a gradient are left alone.
    """
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    for o, layers in groups:
        for layer in layers:
            layer.ratio = layer.x_norm = layer.u_norm = layer.g_norm = math.nan
            layer.slack = layer.x_slack = 0.0
            if id(layer) in grads:
                _layer_step(o, layer, grads[id(layer)], norm)
    return norm


def _layer_step(o: dict[str, Any], layer: Layer, g: Tensor, norm: float) -> None:
    lr, wd, (b1, b2) = float(o["lr"]), o["weight_decay"], o["betas"]
    if lr == 0.0 and not largest(g, layer.m, layer.v):
        return  # a dummy step leaves nothing behind
    x, layer.g_norm = layer.x, float(g.norm())
    if o["maximize"]:
        g = -g
    if o["max_grad_norm"] and norm > o["max_grad_norm"]:
        g = g * (o["max_grad_norm"] / norm)
    if not o["decoupled"]:
        g = g + wd * x
    b3 = 1.0 - b1 if o["grad_averaging"] else 1.0
    layer.scale = {"exp_avg": b1 * largest(layer.m) + b3 * largest(g)}
    layer.t += 1
    layer.m = b1 * layer.m + b3 * g
    layer.v = b2 * layer.v + (1.0 - b2) * g * g
    layer.scale["exp_avg_sq"] = largest(layer.v)
    m, v = layer.m, layer.v
    if o["bias_correction"]:
        m, v = m / (1.0 - b1**layer.t), v / (1.0 - b2**layer.t)
    r = m / (v.sqrt() + o["eps"])
    decay = wd * x if o["decoupled"] else torch.zeros_like(x)
    u = r + decay
    layer.x_norm, layer.u_norm = float(x.norm()), float(u.norm())
    rho = 1.0
    adapted = wd != 0 if o["adapt"] == "decayed" else bool(o["adapt"])
    # what m rounds to shows in r where the terms of m cancel
    rounding = U_ERROR * largest(r, decay)
    if m.numel() and largest(m):
        rounding *= max(1.0, layer.scale["exp_avg"] / largest(layer.m))
    if layer.u_norm:
        layer.slack = rounding * math.sqrt(x.numel()) / layer.u_norm
    if adapted and layer.x_norm and layer.u_norm:
        lo, hi = o["phi"] or (0.0, math.inf)
        rho = min(max(layer.x_norm, lo), hi) / layer.u_norm
        lo, hi = o["trust_clip"] or (0.0, math.inf)
        rho = min(max(rho, lo), hi)
    layer.ratio = rho
    d = lr * rho * u
    layer.x = x - d
    layer.scale["x"] = largest(x, layer.x, d)
    layer.x_slack = lr * rho * (rounding + (largest(u) * layer.slack if adapted else 0.0))


# --- a course of steps ---------------------------------------------------------------------------


class Course:
    """The model, the optimizer and the rule of one seed, alike on all ranks.

    Args:
        world: 0 is :class:`dist_lamb.Lamb`; else ShardedLamb over so many ranks.
        new: with what version 0.1.0 did not have: nonfinite="skip", norms, noticed edits.
        without: edits and forms of gradients that are left out, by name.
    """

    def __init__(
        self,
        seed: int,
        impl: str,
        rank: int = 0,
        world: int = 0,
        new: bool = True,
        without: Collection[str] = (),
    ) -> None:
        import dist_lamb

        self.without = without
        self.seed, self.impl, self.rank, self.world, self.new = seed, impl, rank, world, new
        self.cls: Any = dist_lamb.ShardedLamb if world else dist_lamb.Lamb
        self.draw = random.Random(seed)
        self.events: list[str] = []
        self.step_number, self.blind, self.skipped = 0, 0, 0
        self.grad_norm = 0.0
        #: the last form of each gradient, so that most steps find all as it was
        self.forms: dict[int, str] = {}
        self.params: list[nn.Parameter] = []
        self.layers: list[Layer] = []
        #: the mirror of param_groups: options and positions in ``params``
        self.groups: list[dict[str, Any]] = []
        self.out: list[int] = []  # deleted from all groups
        self.pending: set[int] = set()  # half params written to since their last step
        self.half = torch.float16 if impl == "triton" else None  # the interpreter cuts bfloat16 off
        self.dtypes = self.draw.choice(
            [
                [torch.float32],
                [torch.float32],
                [torch.bfloat16],
                [torch.float16],
                [torch.float32, torch.bfloat16, torch.float16],
                [torch.float32, torch.float64, torch.bfloat16],
            ]
        )
        self.named = self.draw.random() < 0.5
        self.dense_only = self.draw.random() < 0.5
        for _ in range(self.draw.randint(2, 12)):
            self._new_param()
        count = self.draw.randint(1, min(3, len(self.params)))
        # at times all groups start alike but for weight decay, as in most programs
        common = self._options()
        for i in range(count):
            options = self._options() if self.draw.random() < 0.5 else dict(common)
            self.groups.append({"k": list(range(i, len(self.params), count)), **options})
        self.more: dict[str, Any] = {}
        if world:
            self.more["stage"] = self.draw.choice([1, 2])
            self.more["overlap"] = self.draw.random() < 0.7
            self.more["bucket_numel"] = self.draw.choice([1024, 4096, 2**20])
        self.opt = self._optimizer(self.params)

    # --- making things -------------------------------------------------------------------------

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.draw.randrange(2**31))

    def _new_param(self) -> int:
        draw, shape = self.draw, self.draw.choice(SHAPES)
        if self.impl == "triton" and math.prod(shape) > 2100:
            shape = (2049,)
        dtype = draw.choice(self.dtypes)
        if dtype in HALF and self.half:
            dtype = self.half
        t = torch.randn(shape, generator=self._generator()) * draw.choice((0.1, 0.5))
        if draw.random() < 0.12:
            t.zero_()
        t = t.to(dtype)
        form = draw.random()
        if len(shape) == 4 and form < 0.5:
            t = t.contiguous(memory_format=torch.channels_last)
        elif len(shape) == 2 and form < 0.3:
            t = t.t().contiguous().t()
        elif len(shape) == 2 and form < 0.5 and not self.dense_only:
            t = torch.cat([t, t], dim=1)[:, : shape[1]]  # with gaps
        elif len(shape) == 1 and form < 0.3:
            t = torch.cat([t[:1], t])[1:]  # not aligned
        self.params.append(nn.Parameter(t, requires_grad=draw.random() > 0.08 or not self.params))
        self.layers.append(Layer.of(t))
        return len(self.params) - 1

    def _options(self) -> dict[str, Any]:
        options = {name: self.draw.choice(values) for name, values in OPTIONS.items()}
        return {**options, "nonfinite": "skip"} if self.new else options

    def _optimizer(self, params: list[nn.Parameter], **other: Any) -> Any:
        groups = []
        for group in self.groups:
            members = [(f"w{k}", params[k]) if self.named else params[k] for k in group["k"]]
            options = {n: v for n, v in group.items() if n != "k"}
            groups.append({"params": members, **options, **other})
        return self.cls(groups, impl=self.impl, **self.more)

    def _members(self) -> list[int]:
        return [k for group in self.groups for k in group["k"]]

    # --- what there is -------------------------------------------------------------------------

    def states(self) -> dict[int, dict[str, Any]]:
        """{position in params: whole state}; a collective of a ShardedLamb."""
        if self.world:
            state = self.opt.full_optimizer_state_dict()["state"]
            return {k: state.get(i, {}) for i, k in enumerate(self._members())}
        state = self.opt.state
        return {k: state.get(self.params[k], {}) for k in self._members()}

    def bits(self) -> dict[str, Tensor]:
        found = {f"param {k}": p.detach().clone() for k, p in enumerate(self.params)}
        for k, state in self.states().items():
            for name, value in state.items():
                found[f"{name} of {k}"] = torch.as_tensor(value).detach().clone()
        return found

    def same_bits(self, what: str, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
        for name in want.keys() | got.keys():
            a, b = got.get(name), want.get(name)
            # State may be made, as zeros, by a step that counts for nothing.
            if b is None and a is not None and (name.startswith("master") or not largest(a)):
                continue
            ok = a is not None and b is not None and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
            self.check(ok, f"{what}: {name} changed")

    def check(self, ok: bool, text: str) -> None:
        if not ok:
            raise Mismatch(text)

    def close(self, what: str, got: Tensor, want: Tensor, bound: float) -> None:
        got = got.detach().double()
        self.check(got.shape == want.shape, f"{what} has shape {tuple(got.shape)}")
        error = largest(got - want)
        if not error <= bound:  # NaN too
            at = int((got - want).abs().nan_to_num(math.inf).reshape(-1).argmax())
            a, b = float(got.reshape(-1)[at]), float(want.reshape(-1)[at])
            raise Mismatch(f"{what} is off by {error:.1e} (bound {bound:.1e}): {a} for {b} at {at}")

    # --- a step --------------------------------------------------------------------------------

    def set_gradients(self, present: list[int]) -> dict[int, Tensor]:
        """This rank's gradients into ``p.grad``, or through backward; the means, by position."""
        means: dict[int, Tensor] = {}
        generator = self._generator()
        backward = self.world > 0 and self.draw.random() < 0.6
        terms = []
        for k, p in enumerate(self.params):
            if k not in present:
                p.grad = None
                continue
            if not self.world:
                size = 1.0 if k % 3 else 0.3
                g = torch.randn(p.shape, generator=generator) * size
                means[k] = self._set_gradient(k, g)
                continue
            mean, mine = self._rank_gradient(p, generator, alone=self.draw.random() < 0.1)
            means[k] = mean.double()
            if mine is None:
                p.grad = None
            elif backward:
                p.grad = None
                terms.append((p * mine).sum().float())
            else:
                p.grad = torch.empty_like(p.detach()).copy_(mine)
        if self.world and backward:
            # every rank runs backward once
            anchor = torch.zeros((), requires_grad=True)
            torch.stack([anchor, *terms]).sum().backward()
        return means

    def _rank_gradient(
        self, p: Tensor, generator: torch.Generator, alone: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(mean over ranks, this rank's part); every sum is exact in the dtype of p."""
        n = 8 if p.dtype in HALF else 1024
        mean = torch.randint(1 - n, n, p.shape, generator=generator) / (2.0 * n)
        noise = torch.randint(-n, n + 1, (self.world, *p.shape), generator=generator) / (2.0 * n)
        noise = noise - noise.roll(1, dims=0)  # adds up to zero
        if alone:
            # one rank has it, for the others it counts as zero
            mine = mean * self.world if self.rank == self.world - 1 else None
            return mean, None if mine is None else mine.to(p.dtype)
        return mean, (mean + noise[self.rank]).to(p.dtype)

    def _set_gradient(self, k: int, g: Tensor) -> Tensor:
        p, draw = self.params[k], self.draw
        form = self.forms.get(k, "like the param")
        if draw.random() < 0.15:
            form = draw.choice([form for form in FORMS if form not in self.without])
            self.forms[k] = form
            self.events.append(f"gradient of {k}: {form}")
        g, dtype = g.to(p.dtype), p.dtype
        if form == "like the param":
            g = torch.empty_like(p.detach()).copy_(g)
        elif form == "in place" and p.grad is not None and p.grad.dtype == dtype:
            if any(stride == 0 for stride in p.grad.stride()) and p.grad.numel() > 1:
                p.grad = p.grad.clone(memory_format=torch.contiguous_format)
            g = p.grad.copy_(g)
        elif form == "transposed" and g.ndim > 1:
            g = g.transpose(0, 1).contiguous().transpose(0, 1)
        elif form == "gaps" and g.ndim:
            g = torch.stack([g, torch.full_like(g, math.nan)], dim=-1)[..., 0]
        elif form == "negative":
            g = torch._neg_view(-g)
        elif form == "expanded":
            g = g.reshape(-1)[0].clone().expand(p.shape)
        elif form == "other dtype" and hasattr(p, "grad_dtype"):
            p.grad_dtype = None
            g = g.to(torch.float32 if dtype != torch.float32 else torch.bfloat16)
        p.grad = g
        return g.resolve_neg().double().clone()

    def present(self) -> list[int]:
        trainable = [k for k in self._members() if self.params[k].requires_grad]
        if self.draw.random() < 0.7:
            return trainable
        chosen = [k for k in trainable if self.draw.random() < 0.6]
        return chosen or trainable[:1]

    def step(self, present: list[int]) -> None:
        means = self.set_gradients(present)
        before = {k: self.params[k].grad for k in means}
        self.opt.step()
        self.tell(means)
        if not self.world:
            for k, g in before.items():
                kept = self.params[k].grad
                self.check(kept is g, f"p.grad of {k} was replaced")
                same = torch.equal(g.resolve_neg().double(), means[k])
                self.check(same, f"p.grad of {k} was written to")
        self.finish()

    def tell(self, means: dict[int, Tensor]) -> None:
        """The same step by the rule."""
        groups = [(group, [self.layers[k] for k in group["k"]]) for group in self.groups]
        grads = {id(self.layers[k]): g for k, g in means.items()}
        self.grad_norm = rule_step(groups, grads)
        self.pending -= means.keys()
        self.blind += 1

    def finish(self) -> None:
        """Compare, and forget the gradients at times."""
        chaotic = any(layer.slack > 1e-3 for layer in self.layers)
        self.compare_norms()
        if self.draw.random() < 0.3 or chaotic:
            self.look()
        else:
            for k in self._members():
                self.compare_param(k)
        if self.draw.random() < 0.5 or self.world:
            self.opt.zero_grad()

    def compare_param(self, k: int) -> None:
        p, layer = self.params[k], self.layers[k]
        if layer.slack > 1e-3:
            return
        bound = self._bound(k)
        if p.dtype in HALF:
            error = (p.detach().double() - layer.x).abs()
            info = torch.finfo(p.dtype)
            allowed = bound + 0.51 * info.eps * layer.x.abs() + info.tiny * info.eps
            bad = ~(error <= allowed)
            if bool(bad.any()):
                at = int(bad.reshape(-1).nonzero()[0])
                a, b = float(p.detach().reshape(-1)[at]), float(layer.x.reshape(-1)[at])
                raise Mismatch(f"param {k} ({p.dtype}) is {a} for {b} at {at}")
        else:
            self.close(f"param {k} {tuple(p.shape)} {p.dtype}", p, layer.x, bound)

    def _bound(self, k: int) -> float:
        layer, p = self.layers[k], self.params[k]
        scale = max(layer.scale.get("x", 0.0), largest(layer.x))
        if p.dtype == torch.float64:
            return TOLERANCE[torch.float64] * scale
        growth = 1.0 + 0.5 * self.blind
        return growth * (FLOAT32_TOLERANCE * scale + layer.x_slack)

    def look(self) -> None:
        """Compare params and all state, and go on from the optimizer's numbers."""
        states = self.states()
        for k in self._members():
            self._look_at(k, states[k])
        self.blind = 0

    def _look_at(self, k: int, state: dict[str, Any]) -> None:
        p, layer = self.params[k], self.layers[k]
        t = float(torch.as_tensor(state.get("step", 0)))
        self.check(t == layer.t, f"step of {k} is {t} for {layer.t}")
        if layer.t == 0 and not ("exp_avg" in state and "exp_avg_sq" in state):
            for name in set(state) & {"exp_avg", "exp_avg_sq"}:
                self.check(not largest(state[name]), f"{name} of {k} is not 0 without a step")
            self.check(torch.equal(p.detach().double(), layer.x), f"param {k} moved without a step")
            return
        want_dtype = torch.promote_types(p.dtype, torch.float32)
        for name in ("exp_avg", "exp_avg_sq", *(["master"] if p.dtype in HALF else [])):
            self.check(name in state, f"{name} of {k} is missing")
            self.check(state[name].dtype == want_dtype, f"{name} of {k} is {state[name].dtype}")
            self.check(state[name].shape == p.shape, f"{name} of {k} has another shape")
        x = state["master"] if p.dtype in HALF else p
        if k in self.pending:
            x = layer.x  # known already: the master follows at the next step
        elif p.dtype in HALF:
            self.check(torch.equal(x.to(p.dtype), p.detach()), f"param {k} is not its master")
        growth = 1.0 + 0.5 * self.blind
        if not layer.slack > 1e-3:
            self.close(f"x of {k} {tuple(p.shape)} {p.dtype}", x, layer.x, self._bound(k))
        relative = TOLERANCE.get(p.dtype, FLOAT32_TOLERANCE) * growth
        for name, want in (("exp_avg", layer.m), ("exp_avg_sq", layer.v)):
            scale = max(layer.scale.get(name, 0.0), largest(want))
            # what was in x is in m and v by L2 decay
            self.close(f"{name} of {k}", state[name], want, relative * scale * 2)
        layer.x = x.detach().double().clone()
        layer.m, layer.v = (state[n].detach().double().clone() for n in ("exp_avg", "exp_avg_sq"))

    def names(self) -> list[str]:
        return [f"w{k}" if self.named else f"param_{i}" for i, k in enumerate(self._members())]

    def compare_norms(self) -> None:
        kinds: list[tuple[str, str]] = [("trust_ratios", "ratio")]
        if self.new:
            kinds += [("param_norms", "x_norm"), ("update_norms", "u_norm")]
        for method, attribute in kinds:
            found = getattr(self.opt, method)()
            self.check(list(found) == self.names(), f"{method}() has other names: {list(found)}")
            for k, value in zip(self._members(), found.values()):
                layer = self.layers[k]
                want = getattr(layer, attribute)
                ok = (
                    isinstance(value, Tensor) and value.shape == () and value.dtype == torch.float32
                )
                self.check(ok, f"{method}() of {k} is {value!r}")
                if layer.slack > 1e-3:
                    continue
                # a half param's norm is its master's; the others' are of x before the step
                relative = FLOAT32_TOLERANCE * (1.0 + 0.5 * self.blind) + 4 * layer.slack
                bound = relative * abs(want) + 1e-30
                ok = math.isnan(value) if math.isnan(want) else abs(float(value) - want) <= bound
                self.check(ok, f"{method}() of {k} is {float(value)} for {want}")
        if self.new:
            norm = self.opt.grad_norm()
            self.check(norm.shape == () and norm.dtype == torch.float32, f"grad_norm() is {norm!r}")
            ok = abs(float(norm) - self.grad_norm) <= 2e-5 * self.grad_norm
            self.check(ok, f"grad_norm() is {float(norm)} for {self.grad_norm}")
            count = int(self.opt.skipped_steps())
            self.check(count == self.skipped, f"skipped_steps() is {count} for {self.skipped}")

    def run(self, steps: int = STEPS) -> Course:
        try:
            for self.step_number in range(steps):
                self.events.append(f"[{self.step_number}]")
                if self.step_number and self.draw.random() < 0.55:
                    for _ in range(self.draw.choice((1, 1, 1, 2, 3))):
                        self.edit()
                if not any(self.params[k].requires_grad for k in self._members()):
                    return self
                self.step(self.present())
            self.look()
        except Exception as error:
            about = [
                f"{k}: {tuple(p.shape)} {p.stride()} {p.dtype}" for k, p in enumerate(self.params)
            ]
            text = (
                f"seed {self.seed}, impl {self.impl}, world {self.world}, step {self.step_number}: "
                f"{type(error).__name__}: {error}\n  params: {'; '.join(about)}\n"
                f"  {self.more} named={self.named}, groups {[g['k'] for g in self.groups]}\n"
                f"  events: {' '.join(self.events)}"
            )
            raise Mismatch(text) from error
        return self

    # --- edits ---------------------------------------------------------------------------------

    def edit(self) -> None:
        edits = {n: edit for n, edit in self.edits().items() if n not in self.without}
        name = self.draw.choices(list(edits), [weight for weight, _ in edits.values()])[0]
        self.events.append(name)
        edits[name][1]()

    def edits(self) -> dict[str, tuple[float, Callable[[], None]]]:
        lamb = not self.world
        found: dict[str, tuple[float, Callable[[], None]]] = {
            "param-memory": (2, self.param_memory),
            "weights": (1, self.weights),
            "option": (3, self.option),
            "lr": (3, self.lr),
            "move": (2, self.move),
            "reverse": (1, self.reverse),
            "reverse-groups": (1, self.reverse_groups),
            "no-gradient": (1, self.no_gradient),
            "round-trip": (1, self.round_trip),
            "same-again": (1, lambda: self.step(self.present())),
        }
        if lamb:
            found |= {
                "state-emptied": (1, self.state_emptied),
                "state-deleted": (2, self.state_deleted),
                "state-replaced": (2, self.state_replaced),
                "state-data": (2, self.state_data),
                "state-moved": (1, self.state_moved),
                "delete": (1, self.delete),
                "insert": (1.5, self.insert),
                "append": (1, self.append),
                "drop-group": (1, self.drop_group),
                "deepcopy": (1, self.deepcopy),
            }
        else:
            found |= {"append": (0.5, self.append)}
        if self.new:
            found |= {
                "invalid": (1.5, self.invalid),
                "nonfinite": (1.5, self.nonfinite),
                "half-weights": (2, self.half_weights),
                "refresh": (1, self.refresh),
            }
        return found

    def _one(self) -> int:
        return self.draw.choice(self._members())

    def _some(self) -> list[int]:
        members = self._members()
        if self.draw.random() < 0.4:
            return members
        return self.draw.sample(members, self.draw.randint(1, min(3, len(members))))

    def param_memory(self) -> None:
        for k in self._some():
            p = self.params[k]
            old = p.data
            if p.ndim == 4 and self.draw.random() < 0.5 and not self.world:
                # other strides
                other = torch.channels_last if old.is_contiguous() else torch.contiguous_format
                p.data = old.clone().contiguous(memory_format=other)
            else:
                p.data = old.clone()
            if p.data.data_ptr() != old.data_ptr():
                old.fill_(math.nan)  # whoever still reads there shows it
            self.events.append(f"of {k}")

    def weights(self) -> None:
        """Full-precision params may be written to in any way."""
        for k in self._some():
            p = self.params[k]
            if p.dtype in HALF:
                continue
            with torch.no_grad():
                if self.draw.random() < 0.5:
                    p.mul_(0.5)
                else:
                    p.data.add_(0.125)
            # before blind steps are made up for, the rule may be off by their rounding
            self.layers[k].x = p.detach().double().clone()
            self.events.append(f"of {k}")

    def half_weights(self) -> None:
        """Elements of half params that are no longer their master's rounding count."""
        self.look()
        states = self.states()
        for k in self._some():
            p, how = self.params[k], self.draw.choice(["copy_", "clamp_", "one", "mul_", "foreach"])
            if p.dtype not in HALF:
                continue
            with torch.no_grad():
                if how == "copy_":
                    p.copy_(torch.randn(p.shape, generator=self._generator()) * 0.2)
                elif how == "clamp_":
                    p.clamp_(-0.05, 0.05)
                elif how == "one":
                    p.view(-1)[-1:].fill_(0.25) if p.is_contiguous() else p.mul_(2.0)
                elif how == "mul_":
                    p.mul_(0.5)
                else:
                    torch._foreach_mul_([p], 0.75)
            self._follow(k, states[k])
            self.events.append(f"{how} of {k}")

    def _follow(self, k: int, state: dict[str, Any]) -> None:
        p = self.params[k].detach()
        master = state.get("master", p.float())
        edited = p != master.to(p.dtype)
        self.pending.add(k)
        self.layers[k].x = torch.where(edited, p.double(), master.detach().double()).clone()

    def refresh(self) -> None:
        """What is written through p.data cannot be noticed, but told."""
        self.look()
        states = {k: {n: torch.as_tensor(v).clone() for n, v in s.items()}
                  for k, s in self.states().items()}  # fmt: skip
        for k in self._some():
            p = self.params[k]
            p.data.mul_(0.75) if self.draw.random() < 0.5 else p.data.clamp_(-0.1, 0.1)
            if p.dtype in HALF:
                self._follow(k, states[k])
            else:
                self.layers[k].x = p.detach().double().clone()
        self.opt.refresh_masters()

    def option(self) -> None:
        g = self.draw.randrange(len(self.groups))
        name = self.draw.choice([n for n in OPTIONS if n != "lr"])
        value = self.draw.choice(OPTIONS[name])
        self.groups[g][name] = self.opt.param_groups[g][name] = value
        self.events.append(f"{name}={value} of group {g}")

    def lr(self) -> None:
        g = self.draw.randrange(len(self.groups))
        group, value = self.opt.param_groups[g], self.draw.choice((*OPTIONS["lr"], 0.0))
        how = self.draw.choice(["number", "tensor", "filled"])
        if isinstance(group["lr"], Tensor) and how == "filled":
            group["lr"].fill_(value)
        elif how == "number":
            group["lr"] = value
        else:
            group["lr"] = torch.tensor(value)
        self.groups[g]["lr"] = float(group["lr"])
        self.events.append(f"= {how} {value} of group {g}")

    def _names_too(self, g: int, order: list[int]) -> None:
        """``param_names`` of a group goes with its params."""
        group = self.opt.param_groups[g]
        if "param_names" in group:
            group["param_names"] = [f"w{k}" for k in order]

    def _set_members(self, g: int, members: list[int]) -> None:
        """In the same list or in another one."""
        self.groups[g]["k"] = members
        group, params = self.opt.param_groups[g], [self.params[k] for k in members]
        if self.draw.random() < 0.5:
            group["params"] = params
        else:
            group["params"][:] = params
        self._names_too(g, members)

    def move(self) -> None:
        source = self.draw.randrange(len(self.groups))
        target = self.draw.randrange(len(self.groups))
        members = list(self.groups[source]["k"])
        if not members:
            return
        k = members.pop(self.draw.randrange(len(members)))
        self._set_members(source, members)
        members = list(self.groups[target]["k"])
        members.insert(self.draw.randint(0, len(members)), k)
        self._set_members(target, members)
        self.events.append(f"{k} from group {source} to {target}")

    def reverse(self) -> None:
        g = self.draw.randrange(len(self.groups))
        if self.draw.random() < 0.5:
            self.groups[g]["k"].reverse()
            self.opt.param_groups[g]["params"].reverse()
            self._names_too(g, self.groups[g]["k"])
        else:
            self._set_members(g, self.groups[g]["k"][::-1])

    def reverse_groups(self) -> None:
        self.groups.reverse()
        if self.draw.random() < 0.5:
            self.opt.param_groups.reverse()
        else:
            self.opt.param_groups = self.opt.param_groups[::-1]

    def delete(self) -> None:
        g = self.draw.randrange(len(self.groups))
        members = list(self.groups[g]["k"])
        if not members or len(self._members()) < 2:
            return
        k = members.pop(self.draw.randrange(len(members)))
        self.out.append(k)
        self.params[k].grad = None
        self._set_members(g, members)
        self.events.append(f"{k} from group {g}")

    def insert(self) -> None:
        """One that was there before, with its state, or a new one."""
        if self.out and self.draw.random() < 0.6:
            k = self.out.pop()
        else:
            k = self._new_param()
        g = self.draw.randrange(len(self.groups))
        members = list(self.groups[g]["k"])
        members.insert(self.draw.randint(0, len(members)), k)
        self._set_members(g, members)
        self.events.append(f"{k} into group {g}")

    def append(self) -> None:
        if len(self.groups) > 4:
            return
        k, options = self._new_param(), self._options()
        self.groups.append({"k": [k], **options})
        member = (f"w{k}", self.params[k]) if self.named else self.params[k]
        self.opt.add_param_group({"params": [member], **options})
        self.events.append(f"{k}")

    def drop_group(self) -> None:
        if len(self.groups) < 2 or not any(g["k"] for g in self.groups[1:]):
            return
        self.out += self.groups[0]["k"]
        for k in self.groups[0]["k"]:
            self.params[k].grad = None
        self.groups = self.groups[1:]
        self.opt.param_groups = self.opt.param_groups[1:]

    def state_emptied(self) -> None:
        for k, p in enumerate(self.params):
            self.layers[k].forget(p)
        self.opt.state = defaultdict(dict)

    def state_deleted(self) -> None:
        k = self._one()
        p, how = self.params[k], self.draw.choice(["del", "pop", "clear"])
        if p not in self.opt.state:
            return
        if how == "del":
            del self.opt.state[p]
        elif how == "pop":
            self.opt.state.pop(p)
        else:
            self.opt.state[p].clear()
        self.layers[k].forget(p)
        self.events.append(f"{how} {k}")

    def _edited_value(self, k: int, name: str, value: Any) -> Any:
        """Half of a moment, another step count, or the same master; the rule is told."""
        layer = self.layers[k]
        if name == "step":
            layer.t = self.draw.randint(1, 30)
            kinds = [torch.tensor(float(layer.t)), float(layer.t), layer.t]
            return kinds[self.draw.randrange(3)]
        if name == "master":
            return value.clone()
        if name == "exp_avg":
            layer.m = layer.m * 0.5
        else:
            layer.v = layer.v * 0.25
        new = value * (0.5 if name == "exp_avg" else 0.25)
        if new.ndim == 2 and self.draw.random() < 0.3:
            new = new.t().contiguous().t()
        return new

    def state_replaced(self) -> None:
        for k in self._some():
            state = self.opt.state.get(self.params[k], {})
            names = sorted(state)
            if not names:
                continue
            name = self.draw.choice(names)
            state[name] = self._edited_value(k, name, state[name])
            self.events.append(f"{name} of {k}")

    def state_data(self) -> None:
        """Other memory behind the same tensor."""
        for k in self._some():
            state = self.opt.state.get(self.params[k], {})
            names = sorted(n for n in state if n in STATES)
            if not names:
                continue
            name = self.draw.choice(names)
            old = state[name].data
            state[name].data = self._edited_value(k, name, old).clone()
            old.fill_(math.nan)
            self.events.append(f"{name} of {k}")

    def state_moved(self) -> None:
        """All state moved away and back, as offloading does it, by ``.data`` or by new tensors."""
        how = self.draw.choice(["data", "tensors", "entries"])
        for p in list(self.opt.state):
            entry = self.opt.state[p]
            for name, value in list(entry.items()):
                if not isinstance(value, Tensor):
                    continue
                old = value.data
                if how == "data":
                    value.data = old.clone()
                else:
                    entry[name] = old.clone()
                if name in STATES:
                    old.fill_(math.nan)
            if how == "entries":
                self.opt.state[p] = dict(entry)
        self.events.append(how)

    def no_gradient(self) -> None:
        self.set_gradients([])
        self.opt.zero_grad()
        before = self.bits()
        self.opt.step()
        self.same_bits("a step without a gradient", self.bits(), before)
        self.tell({})
        self.blind -= 1
        self.compare_norms()

    def round_trip(self) -> None:
        """Another optimizer, on copies of the params, goes on with the same bits."""
        if self.named and not all(group["k"] for group in self.groups):
            return  # an empty group has no names, and torch.optim wants them in all or none
        self.look()
        if not self.world:
            for k in self.out:  # torch.optim cannot name them either
                if self.opt.state.pop(self.params[k], None) is not None:
                    self.layers[k].forget(self.params[k])
        saved = self.opt.full_optimizer_state_dict() if self.world else self.opt.state_dict()
        if self.draw.random() < 0.5:
            saved = copy.deepcopy(saved)
        params = [
            nn.Parameter(_alike(p.detach()), requires_grad=p.requires_grad) for p in self.params
        ]
        others = {"lr": 0.5, "weight_decay": 0.1, "betas": (0.5, 0.5), "max_grad_norm": 3.0}
        fresh = self._optimizer(params, **others)
        if self.draw.random() < 0.3 and not self.world:
            for p in params:  # one that has taken steps
                p.grad = torch.zeros_like(p.detach()) if p.requires_grad else None
            weights = [p.detach().clone() for p in params]
            fresh.step()
            for p, w in zip(params, weights):
                p.data.copy_(w)
                p.grad = None
        fresh.load_state_dict(saved)
        present = self.present()
        state = self.draw.getstate()
        old_params, forms = self.params, dict(self.forms)
        means = self.set_gradients(present)
        self.opt.step()
        want = self.bits()
        for p in self.params:
            p.grad = None
        # the same again on the other
        self.draw.setstate(state)
        self.params, self.opt, self.forms = params, fresh, forms
        for k, p in enumerate(params):
            if getattr(old_params[k], "grad_dtype", 1) is None:
                p.grad_dtype = None
        self.set_gradients(present)
        self.opt.step()
        self.same_bits("after a round trip", self.bits(), want)
        self.tell(means)
        self.finish()

    def deepcopy(self) -> None:
        old = (self.params, self.opt)
        self.params, self.opt = copy.deepcopy(old)
        for p in old[0]:
            p.data.fill_(math.nan)
            for name, value in old[1].state.get(p, {}).items():
                if name in STATES:
                    value.fill_(math.nan)

    def invalid(self) -> None:
        """Refused with ValueError, nothing changed, and the step can be made after all."""
        self.look()
        g = self.draw.randrange(len(self.groups))
        name, value = self.draw.choice(INVALID)
        group = self.opt.param_groups[g]
        self.events.append(f"{name}={value!r} in group {g}")
        means = self.set_gradients(self.present())
        before, kept = self.bits(), group[name]
        group[name] = value
        try:
            self.opt.step()
        except ValueError:
            pass
        else:
            raise Mismatch(f"{name}={value!r} was not refused")
        finally:
            group[name] = kept
        self.same_bits("a refused step", self.bits(), before)
        self.opt.step()
        self.tell(means)
        self.finish()

    def nonfinite(self) -> None:
        """A bad gradient on one rank: the step changes nothing, and is counted."""
        self.look()
        present = self.present()
        if not present:  # every trainable param was deleted
            return
        before = self.bits()
        value = self.draw.choice((math.inf, -math.inf, math.nan))
        k, whose = self.draw.choice(present), self.draw.randrange(max(1, self.world))
        for j in range(len(self.params)):
            self.params[j].grad = None
            if j in present:
                self.params[j].grad = torch.ones_like(self.params[j].detach())
        bad = self.params[k].grad
        if self.rank == whose and bad is not None and bad.numel():
            bad.view(-1)[-1:].fill_(value) if bad.is_contiguous() else bad.fill_(value)
        self.events.append(f"{value} in {k}")
        self.opt.step()
        self.skipped += 1
        self.opt.zero_grad()
        for j in self.pending:  # what was written to them before is no part of the step
            before.pop(f"master of {j}", None)
        self.same_bits("a skipped step", self.bits(), before)
        count = int(self.opt.skipped_steps())
        self.check(count == self.skipped, f"skipped_steps() is {count} for {self.skipped}")


def _alike(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t)


# --- running them --------------------------------------------------------------------------------


def prepare(impl: str) -> None:
    """Small tensors take the way that large ones take."""
    if impl == "compiled":
        import torch._dynamo

        from dist_lamb.kernels import compiled

        torch._dynamo.config.recompile_limit = 64
        for name, value in (("SMALL_NUMEL", 16), ("ROW_NUMEL", 8)):
            if hasattr(compiled, name):
                setattr(compiled, name, value)


def run_seeds(
    seeds: list[int], impl: str, steps: int = STEPS, stop: bool = True, **more: Any
) -> list[str]:
    """Lamb in this process; what failed."""
    prepare(impl)
    failures = []
    for seed in seeds:
        try:
            Course(seed, impl, **more).run(steps)
        except Mismatch as error:
            failures.append(_text(error))
            if stop:
                break
    return failures


def run_rank(
    rank: int, world: int, seeds: list[int], impl: str, steps: int, more: Any, progress: str
) -> tuple[int | None, str]:
    """ShardedLamb on this rank up to the first failure: (seed, text), or (None, "")."""
    prepare(impl)
    for seed in seeds:
        Path(progress).write_text(str(seed))
        try:
            Course(seed, impl, rank, world, **more).run(steps)
        except Mismatch as error:
            return seed, _text(error)
    return None, ""


def run_sharded(
    world: int, seeds: list[int], impl: str, steps: int = STEPS, stop: bool = True, **more: Any
) -> list[str]:
    """ShardedLamb on ``world`` ranks; what failed."""
    from ranks import run_ranks

    failures, left = [], list(seeds)
    while left:
        with tempfile.TemporaryDirectory() as folder:
            progress = Path(tempfile.mkdtemp()) / "seed"
            args = (left, impl, steps, more, str(progress))
            timeout = 60.0 + 20.0 * len(left)
            try:
                found = run_ranks(world, Path(folder), run_rank, *args, timeout=timeout)
                failed = [(seed, text) for seed, text in found if seed is not None]
            except Exception as error:
                at = int(progress.read_text()) if progress.exists() else left[0]
                failed = [(at, f"seed {at}: {type(error).__name__}: {str(error)[-3000:]}")]
        if not failed:
            break
        failures.append(failed[0][1])
        if stop:
            break
        left = left[left.index(failed[0][0]) + 1 :]
    return failures


def _text(error: Mismatch) -> str:
    """With where it was raised, if that was not a comparison."""
    if isinstance(error.__cause__, Mismatch) or error.__cause__ is None:
        return str(error)
    trace = traceback.extract_tb(error.__cause__.__traceback__)[-4:]
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(trace))
    return f"{error}\n  at {where}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0:50", help="first:end")
    parser.add_argument("--impl", default="foreach")
    parser.add_argument("--world", type=int, default=0, help="0 = Lamb, else ShardedLamb")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--old", action="store_true", help="without what version 0.1.0 lacks")
    parser.add_argument("--without", nargs="+", default=[], metavar="EDIT")
    parser.add_argument("--stop", action="store_true", help="at the first failure")
    args = parser.parse_args()
    if args.impl == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        return subprocess.run([sys.executable, *sys.argv], env=environment).returncode
    torch.set_num_threads(1)
    import dist_lamb

    print(f"{dist_lamb.__file__}, torch {torch.__version__}")
    first, end = (int(n) for n in args.seeds.split(":"))
    seeds, more = list(range(first, end)), {"new": not args.old, "without": args.without}
    if args.world:
        failures = run_sharded(args.world, seeds, args.impl, args.steps, args.stop, **more)
    else:
        failures = run_seeds(seeds, args.impl, args.steps, args.stop, **more)
    for text in failures:
        print(text)
    print(f"{len(failures)} of {len(seeds)} seeds failed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
