"""LAMB, arXiv 1904.00962 version 5, Algorithm 2. The only place where an equation is in Python.

For every parameter tensor ``x`` with gradient ``g``, at its own step ``t`` = 1, 2, ...::

    g   <- g * min(1, max_grad_norm / ||g_all||)     gradient()    options max_grad_norm, maximize
    m   <- b1 * m + b3 * g                           moments()     b3 = 1 - b1, or 1
    v   <- b2 * v + (1 - b2) * g^2
    r    = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)         direction()
    u    = r + wd * x
    rho  = phi(||x||) / ||u||                        trust_ratio() 1 where either norm is 0
    x   <- x - lr * rho * u                          apply()

Nothing here knows a rank or where memory lies. ``Array`` is a tensor, or a list of tensors that
behaves as one (``kernels.foreach.TensorList``); coefficients broadcast against it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import options

Array: TypeAlias = Any


class Hyperparameters(NamedTuple):
    """The options as numbers: of one group, or float64 tensors, one number a param.

    The one list of them: tables on devices have their columns by these names.
    """

    lr: Array
    beta1: Array
    beta2: Array
    beta3: Array
    eps: Array
    decay: Array  # weight decay added to the direction (decoupled) ...
    l2: Array  # ... or to the gradient (not decoupled); the other one is 0
    sign: Array  # -1 where the objective is maximized
    corrected: Array  # 1 where the moments are bias-corrected
    max_grad_norm: Array  # inf where gradients are not clipped
    adapt: Array  # 1 where the trust ratio is applied
    trust_lo: Array
    trust_hi: Array
    phi_lo: Array
    phi_hi: Array


class Coefficients(NamedTuple):
    """Per-parameter numbers of one step, in the dtype of the state, [params] or broadcastable.

    ``active``, ``grad_scale`` and ``l2`` are None where the host knows them to change nothing.
    """

    active: Array  # bool; False keeps a gradient out that may not even be finite
    grad_scale: Array  # sign * clip / loss scale
    l2: Array
    beta1: Array
    beta3: Array
    beta2: Array
    beta4: Array  # 1 - beta2
    correction1: Array  # 1 / (1 - beta1^t): a product per element, where a quotient costs more
    correction2: Array  # 1 / (1 - beta2^t)
    eps: Array
    decay: Array

    def to(self, dtype: torch.dtype) -> Coefficients:
        return self._map(lambda t: t if t.dtype == torch.bool else t.to(dtype))

    def of_param(self, k: int) -> Coefficients:
        return self._map(lambda t: t[k])

    def _map(self, f: Callable[[Array], Array]) -> Coefficients:
        return Coefficients(*(None if t is None else f(t) for t in self))


def hyperparameters(group: Mapping[str, Any]) -> Hyperparameters:
    """A parameter group as one row of :class:`Hyperparameters`; a tensor lr on a device is 0."""
    inf = float("inf")
    beta1, beta2 = group["betas"]
    wd, lr = group["weight_decay"], group["lr"]
    trust_lo, trust_hi = group["trust_clip"] or (0.0, inf)
    phi_lo, phi_hi = group["phi"] or (0.0, inf)
    return Hyperparameters(
        lr=0.0 if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr),
        beta1=beta1,
        beta2=beta2,
        beta3=1.0 - beta1 if group["grad_averaging"] else 1.0,
        # 0 / 0 must be 0: padding of a tile has no moments, and its NaN would spread by the norm.
        eps=group["eps"] or 1e-30,
        decay=wd if group["decoupled"] else 0.0,
        l2=0.0 if group["decoupled"] else wd,
        sign=-1.0 if group["maximize"] else 1.0,
        corrected=float(group["bias_correction"]),
        max_grad_norm=group["max_grad_norm"] or inf,
        adapt=float(options.adapts(group)),
        trust_lo=trust_lo,
        trust_hi=trust_hi,
        phi_lo=phi_lo,
        phi_hi=phi_hi,
    )


def clip_coefficient(grad_sq: Tensor, max_grad_norm: Tensor) -> Tensor:
    """min(1, max_grad_norm / ||g_all||) from the squared global norm, a scalar."""
    clip = torch.clamp(max_grad_norm / grad_sq.sqrt(), max=1.0)
    # inf / inf is NaN: an unclipped group must not see a clip coefficient at all.
    return torch.where(max_grad_norm.isinf(), torch.ones_like(clip), clip)


def coefficients(h: Hyperparameters, t: Tensor, scale: Tensor | None, l2: bool) -> Coefficients:
    """The numbers of one step, float64 [params].

    ``t`` is the parameters' step, 1-based; ``scale`` [params] or None multiplies the gradient;
    ``l2`` says whether any group decays by L2.
    """
    one = torch.ones_like(h.beta1)
    return Coefficients(
        active=None,
        grad_scale=scale,
        l2=h.l2 if l2 else None,
        beta1=h.beta1,
        beta3=h.beta3,
        beta2=h.beta2,
        beta4=1.0 - h.beta2,
        correction1=torch.where(h.corrected > 0, 1.0 / (1.0 - h.beta1**t), one),
        correction2=torch.where(h.corrected > 0, 1.0 / (1.0 - h.beta2**t), one),
        eps=h.eps,
        decay=h.decay,
    )


#: Coefficients of a step that changes nothing; those that are not named are 0.
_IDENTITY = dict.fromkeys(
    ("grad_scale", "beta1", "beta3", "beta2", "correction1", "correction2", "eps"), 1.0
)


def only_where(active: Tensor, c: Coefficients, guard: bool) -> Coefficients:
    """Coefficients under which a parameter that is not ``active`` keeps m and v bit for bit.

    With a zero gradient these give m*1 + 0*1 and a finite direction even where eps is 0.
    ``guard`` replaces the gradient of an inactive parameter by zeros: needed where it may be
    anything (an overflow under loss scaling), since 0 * inf is NaN.
    """
    kept = {
        name: None if new is None else torch.where(active, new, _IDENTITY.get(name, 0.0))
        for name, new in c._asdict().items()
    }
    return Coefficients(**{**kept, "active": active if guard else None})


def gradient(g: Array, x: Array, c: Coefficients) -> Array:
    """The gradient that the moments see: clipped, signed, with L2 decay where that is asked."""
    if c.active is not None:
        g = g.where(c.active, 0.0)
    # g <- g * min(1, max_grad_norm / ||g_all||)
    if c.grad_scale is not None:
        g = g * c.grad_scale
    # g <- g + wd * x
    if c.l2 is not None:
        g = g + x * c.l2
    return g


def moments(g: Array, states: Sequence[Array], c: Coefficients) -> tuple[Array, ...]:
    """The new states."""
    m, v = states
    # m <- b1 * m + b3 * g
    m = m * c.beta1 + g * c.beta3
    # v <- b2 * v + (1 - b2) * g^2
    v = v * c.beta2 + g * g * c.beta4
    return m, v


def direction(x: Array, states: Sequence[Array], c: Coefficients) -> Array:
    """u, from the new states."""
    m, v = states
    # r = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    r = (m * c.correction1) / ((v * c.correction2).sqrt() + c.eps)
    # u = r + wd * x
    return r + x * c.decay


def trust_ratio(x_sq: Tensor, u_sq: Tensor, h: Hyperparameters) -> Tensor:
    """rho, float64 [params], from the squared norms of the whole tensors, float64 [params].

    NaN stays NaN: a non-finite update must be seen by every rank that owns a piece.
    """
    x_norm, u_norm = x_sq.sqrt(), u_sq.sqrt()
    # rho = phi(||x||) / ||u||, clamped where trust_clip asks
    phi = torch.clamp(x_norm, min=h.phi_lo, max=h.phi_hi)
    rho = torch.clamp(phi / u_norm, min=h.trust_lo, max=h.trust_hi)
    # 1 where ||x|| = 0, so that zero-initialised tensors move, where ||u|| = 0, or not adapted
    plain = (x_norm == 0) | (u_norm == 0) | (h.adapt == 0)
    return torch.where(plain, torch.ones_like(rho), rho)


def apply(x: Array, u: Array, step_size: Array) -> Array:
    """x <- x - lr * rho * u, with ``step_size`` = lr * rho."""
    return x - u * step_size
