"""What several rules share: clip coefficient, bias correction, trust ratio. All float64 by param.

NaN stays NaN throughout: a non-finite update must be seen by every rank that owns a piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .ops import Array, power, sqrt, where


def clamp(a: Array, lo: Array, hi: Array) -> Array:
    a = where(a < lo, lo, a)  # comparisons keep a NaN
    return where(a > hi, hi, a)


def clip_coefficient(grad_sq: Array, max_grad_norm: Array) -> Array:
    """min(1, max_grad_norm / ||g_all||) from the squared global norm."""
    clip = max_grad_norm / sqrt(grad_sq)
    clip = where(clip > 1.0, 1.0, clip)
    # inf / inf is NaN: an unclipped group must not see a clip coefficient at all.
    return where(max_grad_norm == float("inf"), 1.0, clip)


def bias_correction(beta: Array, log2_beta: Array, corrected: Array, t: Array) -> Array:
    """1 / (1 - beta^t), or 1; a factor: per element, a product costs less than a quotient."""
    return where(corrected > 0, 1.0 / (1.0 - power(beta, log2_beta, t)), 1.0)


def trust_ratio(x_sq: Array, u_sq: Array, h: Array) -> Array:
    """rho from the squared norms of whole tensors."""
    x_norm, u_norm = sqrt(x_sq), sqrt(u_sq)
    # rho = phi(||x||) / ||u||, clamped where trust_clip asks
    phi = clamp(x_norm, h.phi_lo, h.phi_hi)
    rho = clamp(phi / u_norm, h.trust_lo, h.trust_hi)
    # 1 where ||x|| = 0, so that zero-initialised tensors move, where ||u|| = 0, or not adapted
    plain = (x_norm == 0) | (u_norm == 0) | (h.adapt == 0)
    return where(plain, 1.0, rho)


def adapts(group: Mapping[str, Any]) -> bool:
    """Whether a group's tensors get a trust ratio other than 1."""
    adapt = group["adapt"]
    return group["weight_decay"] != 0 if adapt == "decayed" else bool(adapt)
