"""The golden trajectories (tests/golden/*.npz): recorded from other programs, of every rule."""

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
ALL = sorted(path.stem for path in FOLDER.glob("*.npz"))

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


#: What the recorded program's rule is called here, and options that it implies.
_RULES: dict[str, dict[str, Any]] = {
    "adagrad_optax": {"rule": "adagrad"},
    "adagrad_torch": {"rule": "adagrad"},
    "adamh": {"rule": "adamw"},  # but for the params that it names
    "adamw": {"rule": "adamw"},
    "lamb_adagrad": {"rule": "lamb_adagrad"},
    "lamb_outside_optax": {"rule": "lamb_outside"},
    "lamb_outside_timm": {"rule": "lamb_outside", "decay_first": True, "adapt": "decayed"},
    "lans": {"rule": "lans"},
    "lars_optax": {"rule": "lars_optax"},
    "lars_timm": {"rule": "lars", "adapt": "decayed"},
    "stableadamw": {"rule": "stable_adamw"},
}
_KWARGS |= {
    name: lambda v, name=name: {name: v}  # type: ignore[misc]
    for name in (
        "initial_accumulator_value",
        "lr_decay",
        "momentum",
        "nesterov",
        "trust_coefficient",
    )
}
_KWARGS["trust_coeff"] = lambda v: {"trust_coefficient": v}
_KWARGS["decoupled_decay"] = lambda v: {}
#: Arguments that are not options of a group, or that gradients hold already.
_ELSEWHERE = ("adamh", "adam_lr", "not_adapted", "lr_schedule", "gradient_factor_by_step", "triton")


@dataclass(frozen=True)
class Trajectory:
    init: dict[str, Tensor]
    grads: list[dict[str, Tensor]]
    params: list[dict[str, Tensor]]  # after each step
    options: dict[str, Any]
    weight_decay: float
    no_decay: list[str]
    #: options of single params, and the lr of each step where it changes
    special: dict[str, dict[str, Any]]
    lrs: list[float] | None

    @staticmethod
    def load(name: str) -> Trajectory:
        with np.load(FOLDER / f"{name}.npz") as data:
            meta = json.loads(bytes(data["meta"]).decode())
            arrays = {key: torch.from_numpy(data[key].copy()) for key in data.files if "/" in key}
        init = {k.removeprefix("init/"): v for k, v in arrays.items() if k.startswith("init/")}
        steps = sum(k.startswith("grad/") for k in arrays) // len(init)
        options = {"lr": meta["lr"], "eps": meta["eps"]}
        if meta["betas"] is not None:
            options["betas"] = tuple(meta["betas"])
        options["max_grad_norm"] = meta.get("max_grad_norm")
        options.update(_RULES[meta["rule"]] if "rule" in meta else {})
        kwargs = meta.get("kwargs", {})
        for key, value in kwargs.items():
            options.update({} if key in _ELSEWHERE else _KWARGS[key](value))
        if options.get("rule") == "lars" and "trust_clip" in options:
            options["larc"] = options.pop("trust_clip") is not None
        special: dict[str, dict[str, Any]] = {
            n: {"adapt": False} for n in kwargs.get("not_adapted", ())
        }
        for n in kwargs.get("adamh", ()):
            special[n] = {"rule": "adamh", "lr": meta["lr"], "weight_decay": 0.0}
        options["lr"] = kwargs.get("adam_lr", options["lr"])
        return Trajectory(
            init=init,
            grads=[{n: arrays[f"grad/{t}/{n}"] for n in init} for t in range(steps)],
            params=[{n: arrays[f"param/{t}/{n}"] for n in init} for t in range(steps)],
            options=options,
            weight_decay=meta["weight_decay"],
            no_decay=meta["no_decay"],
            special=special,
            lrs=kwargs.get("lr_schedule"),
        )

    def groups(self, params: dict[str, Tensor]) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        for n, p in params.items():
            wd = 0.0 if n in self.no_decay else self.weight_decay
            own = {"weight_decay": wd, **self.special.get(n, {})}
            same = [g for g in groups if {**g, "params": None} == {**own, "params": None}]
            if not same:
                groups.append({**own, "params": []})
            (same or groups)[-1]["params"].append((n, p))
        return groups

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
        for t, (grads, expected) in enumerate(zip(self.grads, self.params)):
            for group in optimizer.param_groups if self.lrs else ():
                group["lr"] = self.lrs[t]  # type: ignore[index]
            for n, p in params.items():
                p.grad = grads[n].to(device, copy=True)
            optimizer.step()
            for n, p in params.items():
                got, want = p.detach().cpu(), expected[n]
                error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
                worst = max(worst, error if error == error else float("inf"))  # NaN is no number
        return worst


#: The bound of every execution path against a golden file.
TOLERANCE = 2e-5

#: Files of LAMB as in the paper, and those of FAMILY: other rules.
FAMILY = [name for name in ALL if Trajectory.load(name).options.get("rule", "lamb") != "lamb"]
NAMES = [name for name in ALL if name not in FAMILY]


def all_together() -> Trajectory:
    """All files in one optimizer, but those that clip by a norm over all params or change lr."""
    files = {name: Trajectory.load(name) for name in ALL}
    files = {n: t for n, t in files.items() if not t.options["max_grad_norm"] and not t.lrs}

    def joined(of: Callable[[str, Trajectory], dict[str, Any]]) -> dict[str, Any]:
        return {f"{n}/{key}": v for n, t in files.items() for key, v in of(n, t).items()}

    def options(_: str, t: Trajectory) -> dict[str, Any]:
        decay = {n: 0.0 if n in t.no_decay else t.weight_decay for n in t.init}
        return {n: {**t.options, "weight_decay": decay[n], **t.special.get(n, {})} for n in t.init}

    steps = range(len(next(iter(files.values())).grads))
    return Trajectory(
        init=joined(lambda _, t: t.init),
        grads=[joined(lambda _, t, i=i: t.grads[i]) for i in steps],  # type: ignore[misc]
        params=[joined(lambda _, t, i=i: t.params[i]) for i in steps],  # type: ignore[misc]
        options={},
        weight_decay=0.0,
        no_decay=[],
        special=joined(options),
        lrs=None,
    )
