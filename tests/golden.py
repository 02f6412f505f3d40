"""The golden trajectories (tests/golden/*.npz): recorded from optax, apex and timm."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))

#: What the recorded program's arguments are called here.
_KWARGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "max_grad_norm": lambda v: {"max_grad_norm": v},
    "use_nvlamb": lambda v: {"adapt": "all" if v else "decayed"},
    "always_adapt": lambda v: {"adapt": "all" if v else "decayed"},
    "adam_w_mode": lambda v: {"decoupled": v},
    "grad_averaging": lambda v: {"grad_averaging": v},
    "bias_correction": lambda v: {"bias_correction": v},
    "trust_clip": lambda v: {"trust_clip": (0.0, 1.0) if v else None},
}


@dataclass(frozen=True)
class Trajectory:
    init: dict[str, Tensor]
    grads: list[dict[str, Tensor]]
    params: list[dict[str, Tensor]]  # after each step
    options: dict[str, Any]
    weight_decay: float
    no_decay: list[str]

    @staticmethod
    def load(name: str) -> Trajectory:
        with np.load(FOLDER / f"{name}.npz") as data:
            meta = json.loads(bytes(data["meta"]).decode())
            arrays = {key: torch.from_numpy(data[key].copy()) for key in data.files if "/" in key}
        init = {k.removeprefix("init/"): v for k, v in arrays.items() if k.startswith("init/")}
        steps = sum(k.startswith("grad/") for k in arrays) // len(init)
        options = {"lr": meta["lr"], "betas": tuple(meta["betas"]), "eps": meta["eps"]}
        options["max_grad_norm"] = meta.get("max_grad_norm")
        for key, value in meta.get("kwargs", {}).items():
            options.update(_KWARGS[key](value))
        return Trajectory(
            init=init,
            grads=[{n: arrays[f"grad/{t}/{n}"] for n in init} for t in range(steps)],
            params=[{n: arrays[f"param/{t}/{n}"] for n in init} for t in range(steps)],
            options=options,
            weight_decay=meta["weight_decay"],
            no_decay=meta["no_decay"],
        )

    def groups(self, params: dict[str, Tensor]) -> list[dict[str, Any]]:
        decayed = [(n, p) for n, p in params.items() if n not in self.no_decay]
        plain = [(n, p) for n, p in params.items() if n in self.no_decay]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}]
        return groups + ([{"params": plain, "weight_decay": 0.0}] if plain else [])

    def fresh_params(self, device: str = "cpu") -> dict[str, Tensor]:
        return {n: torch.nn.Parameter(t.to(device, copy=True)) for n, t in self.init.items()}

    def with_spare_bits(self, bits: int) -> Trajectory:
        """The same with the last ``bits`` bits of every gradient cleared: sums stay exact.

        Three equal float32 gradients do not always have them as their float32 mean.
        """
        mask = -(1 << bits)
        cleared = [
            {n: (g.view(torch.int32) & mask).view(torch.float32) for n, g in grads.items()}
            for grads in self.grads
        ]
        return replace(self, grads=cleared)

    def worst_error(
        self, make: Callable[[list[dict[str, Any]]], Any], device: str = "cpu"
    ) -> float:
        """Replay with ``make(groups)``'s optimizer: largest |x - recorded| / max|recorded|."""
        params = self.fresh_params(device)
        optimizer = make(self.groups(params))
        worst = 0.0
        for grads, expected in zip(self.grads, self.params):
            for n, p in params.items():
                p.grad = grads[n].to(device, copy=True)
            optimizer.step()
            for n, p in params.items():
                got, want = p.detach().cpu(), expected[n]
                error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
                # NaN compares false with everything: max() would swallow it.
                worst = error if not error <= worst else worst
        return worst


#: The bound of every execution path against a golden file.
TOLERANCE = 2e-5
