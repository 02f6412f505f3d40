"""LAMB written once more in plain float64 numpy: what the tests compare with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

Values = dict[str, npt.NDArray[np.float64]]
DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.01,
    "grad_averaging": True,
    "bias_correction": True,
    "decoupled": True,
    "max_grad_norm": None,
    "adapt": "all",
    "trust_clip": None,
    "phi": None,
    "maximize": False,
}


class NumpyLamb:
    """The equations of the paper's Algorithm 2, one tensor after another, all in float64."""

    def __init__(self, values: Values, groups: Iterable[tuple[list[str], dict[str, Any]]]) -> None:
        self.x = {name: value.copy() for name, value in values.items()}
        self.m = {name: np.zeros_like(value) for name, value in values.items()}
        self.v = {name: np.zeros_like(value) for name, value in values.items()}
        self.t = dict.fromkeys(values, 0)
        self.rho = dict.fromkeys(values, np.nan)
        self.options = {n: {**DEFAULTS, **given} for names, given in groups for n in names}

    def step(self, grads: Values) -> None:
        total = np.sqrt(sum(float(np.sum(g * g)) for g in grads.values()))
        self.rho = dict.fromkeys(self.x, np.nan)
        for name, g in grads.items():
            o, x = self.options[name], self.x[name]
            b1, b2 = o["betas"]
            if o["max_grad_norm"] and total > o["max_grad_norm"]:
                g = g * (o["max_grad_norm"] / total)
            if o["maximize"]:
                g = -g
            if not o["decoupled"]:
                g = g + o["weight_decay"] * x
            self.t[name] += 1
            m = self.m[name] = b1 * self.m[name] + (1 - b1 if o["grad_averaging"] else 1.0) * g
            v = self.v[name] = b2 * self.v[name] + (1 - b2) * g**2
            if o["bias_correction"]:
                m = m / (1 - b1 ** self.t[name])
                v = v / (1 - b2 ** self.t[name])
            u = m / (np.sqrt(v) + o["eps"])
            if o["decoupled"]:
                u = u + o["weight_decay"] * x
            self.rho[name] = rho = self._trust_ratio(x, u, o)
            self.x[name] = x - o["lr"] * rho * u

    @staticmethod
    def _trust_ratio(x: Any, u: Any, o: dict[str, Any]) -> float:
        adapted = o["weight_decay"] > 0 if o["adapt"] == "decayed" else o["adapt"] in ("all", True)
        x_norm, u_norm = np.sqrt(np.sum(x**2)), np.sqrt(np.sum(u**2))
        if not adapted or x_norm == 0 or u_norm == 0:
            return 1.0
        lo, hi = o["phi"] or (0, np.inf)
        rho = min(max(x_norm, lo), hi) / u_norm
        lo, hi = o["trust_clip"] or (0, np.inf)
        return float(min(max(rho, lo), hi))


def to_numpy(tensors: Mapping[str, Tensor]) -> Values:
    return {n: t.detach().double().contiguous().numpy().copy() for n, t in tensors.items()}


def relative_error(got: Tensor, want: npt.NDArray[np.float64]) -> float:
    difference = np.abs(got.detach().double().numpy() - want)
    return float(np.max(difference / max(np.max(np.abs(want), initial=0.0), 1e-30), initial=0.0))
