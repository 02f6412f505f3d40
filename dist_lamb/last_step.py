"""What an optimizer's last step did: trust ratios and norms, read where the step left them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .kernels.segments import GRAD_SQ, UPDATED, Scalars
from .rules import EARLY, Rule


class Members(NamedTuple):
    """The params that a step numbers its results by, and the rule of each."""

    params: list[Tensor]
    rules: list[Rule]


#: device, trust ratios [params], sums [params, columns]
Result: TypeAlias = tuple[torch.device, Tensor, Tensor]
#: Of ratios, sums and scalars of a step, a value a param.
Read: TypeAlias = Callable[[Tensor, Tensor, Scalars], Tensor]


def unscaled(norm: Tensor, scalars: Scalars) -> Tensor:
    inverse = scalars.inverse_scale(norm.device)
    return (norm if inverse is None else norm * inverse).float()


class LastStep:
    """Reports of the last step. None waits for the device; reading the values does."""

    named_groups: Callable[[], list[list[tuple[str, Tensor]]]]
    #: of each Update; whose they are: groups may have been edited since. None before the first step
    _last: tuple[list[Result], Scalars | None, Members] | None

    def trust_ratios(self) -> dict[str, Tensor]:
        """{name: trust ratio of the last step, a float32 0-d tensor on the param's device}.

        Under other rules than LAMB's it is what the direction was scaled by besides lr: LARS's rho,
        1 / max(1, RMS) of ``stable_adamw``, the ratio of the momentum's part under ``lans``.
        NaN for a param that took no part in the last step, one added since among them; ``{}``
        before the first. Reading the values synchronizes with the device; calling this does not.
        The same on every rank.
        """
        return self._per_param(lambda ratios, sums, scalars: ratios)

    def param_norms(self) -> dict[str, Tensor]:
        """{name: ||x|| before the last step's update}; else as :meth:`trust_ratios`.

        NaN too where the param's rule does not look at that norm.
        """
        return self._norms_named("x.x")

    def update_norms(self) -> dict[str, Tensor]:
        """{name: ||u|| of the last step}; else as :meth:`param_norms`."""
        return self._norms_named("u.u")

    def grad_norms(self) -> dict[str, Tensor]:
        """{name: ||g|| of the last step, before clipping, the loss scale taken out}; else as
        :meth:`trust_ratios`.

        Raises ``RuntimeError`` where the last step was made without ``track_grad_norm=True``.
        """

        def read(ratios: Tensor, sums: Tensor, scalars: Scalars) -> Tensor:
            if not scalars.track_grad_norm:
                raise RuntimeError("grad_norms() needs an optimizer with track_grad_norm=True")
            # Not where the ratio is NaN: one bad gradient makes all NaN where they are clipped.
            norms = unscaled(sums[:, GRAD_SQ].sqrt(), scalars)
            return torch.where(sums[:, UPDATED] > 0, norms, torch.nan)

        return self._per_param(read)

    def grad_norm(self) -> Tensor:
        """Global L2 norm of the last step's gradients, before clipping: float32 0-d, on the device.

        Over all params and ranks, the loss scale taken out; 0 where no param had a gradient. Known
        where gradients are clipped or non-finite ones skipped, and with ``track_grad_norm=True``,
        which takes the first pass of a step on a GPU 3 % more time.

        Raises ``RuntimeError`` where the last step did not look at it.
        """
        last, scalars, _ = self._last or ([], None, None)
        if scalars is None or not last:
            here = next((p.device for _, p in chain.from_iterable(self.named_groups())), None)
            return torch.zeros((), dtype=torch.float32, device=here)
        square, home = scalars.grad_sq, last[0][0]
        if square is None and not scalars.track_grad_norm:
            raise RuntimeError(
                "the last step did not add up the norm of the gradients: make the optimizer with "
                "track_grad_norm=True (max_grad_norm and nonfinite='skip' do it too)"
            )
        if square is None:
            square = torch.stack([sums[:, GRAD_SQ].sum().to(home) for _, _, sums in last]).sum()
            if scalars.overflow is not None:
                # A step that loss scaling skips may not have looked at its gradients.
                skipped = (scalars.overflow.to(home) > 0).view(()) & square.isfinite()
                square = torch.where(skipped, torch.inf, square)
        return unscaled(square.sqrt(), scalars)

    def _norms_named(self, squared: str) -> dict[str, Tensor]:
        def early_of(ratios: Tensor, sums: Tensor, scalars: Scalars) -> Tensor:
            return sums if scalars.early is None else scalars.early.to(sums.device)

        late, ratios = self._per_param(lambda ratios, sums, scalars: sums), self.trust_ratios()
        early, found = self._per_param(early_of), {}
        for name, rule in zip(late, self._rule_of_each()):
            norm = torch.full_like(ratios[name], torch.nan)
            of, columns = (late, rule.late) if rule and squared in rule.late else (early, EARLY)
            if rule and squared in (*rule.late, *rule.early) and of[name].dim():
                square = of[name][columns.index(squared)]
                updated = late[name][UPDATED] > 0
                norm = torch.where(updated, square.sqrt().float(), norm)
            found[name] = norm
        return found

    def _rule_of_each(self) -> Sequence[Rule | None]:
        """What the last step went by, in the order in which params are reported."""
        rules = [] if self._last is None else self._last[2].rules
        return [None if i is None else rules[i] for _, _, i in self._reported()]

    def _reported(self) -> list[tuple[str, Tensor, int | None]]:
        """(name, param, its number in the last step: None if it was not there); of params of one
        name, which torch.optim allows, the second is called ``name (2)``."""
        members = [] if self._last is None else self._last[2].params
        numbers = {id(p): i for i, p in enumerate(members)}
        reported, seen = [], Counter[str]()
        for name, p in chain.from_iterable(self.named_groups()):
            seen[name] += 1
            called = name if seen[name] == 1 else f"{name} ({seen[name]})"
            reported.append((called, p, numbers.get(id(p))))
        return reported

    def _per_param(self, read: Read) -> dict[str, Any]:
        if self._last is None:
            return {}
        last, scalars, _ = self._last
        found = {}
        if scalars is not None:
            found = {device: read(ratios, sums, scalars) for device, ratios, sums in last}
        return {
            name: torch.full((), torch.nan, dtype=torch.float32, device=p.device)
            if i is None or p.device not in found
            else found[p.device][i]
            for name, p, i in self._reported()
        }
