"""What Lamb and ShardedLamb share: options in groups, step counters, the order of a step.

The two differ in where a step's tensors lie (``Lamb``: the user's tensors; ``ShardedLamb``: its
own flat buffers) and in what a norm is (:mod:`dist_lamb.norms`); the step itself is written once.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from itertools import chain
from typing import Any, TypeAlias, TypedDict, Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import kernels, options, rule
from .kernels import Work
from .kernels.tables import GroupTable, Segment, Table, capturing
from .norms import Norms
from .sharding.dtensors import local_of, piece_of, refusal, wrapped
from .state import TENSOR_STATES, state_like

ParamsT: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Closure: TypeAlias = Callable[[], Any]


class Options(TypedDict, total=False):
    """Keyword options of the optimizers; the meaning of each is in :class:`dist_lamb.Lamb`."""

    grad_averaging: bool
    bias_correction: bool
    decoupled: bool
    max_grad_norm: float | None
    adapt: str | bool
    trust_clip: tuple[float, float] | None
    phi: tuple[float, float] | None
    maximize: bool
    impl: str
    foreach: bool | None
    capturable: bool
    fused: bool | None


#: Hooks of every optimizer: torch.optim.optimizer.register_optimizer_step_{pre,post}_hook.
_GLOBAL_HOOKS = [
    getattr(import_module("torch.optim.optimizer"), f"_global_optimizer_{when}_hooks", {None: None})
    for when in ("pre", "post")
]


def _plain_unless_watched(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` in torch's wrapper only when that does something: call hooks, tell the profiler.

    The wrapper takes 30 us, a tenth of ResNet-50's whole step on a GPU.
    """
    watched = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: LambBase, *args: Any, **kwargs: Any) -> Any:
        own_hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        profiled = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        if profiled or own_hooks or any(_GLOBAL_HOOKS):
            return watched(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # torch wraps what is not
    return wrapper


def count_here(counters: Tensor, i: int, state: dict[str, Any]) -> None:
    """Go on counting from ``state["step"]``, which becomes a view of counter ``i``."""
    step = state.get("step", 0)
    here = counters.data_ptr() + i * counters.element_size()
    if not isinstance(step, Tensor) or step.data_ptr() != here:
        # Older or foreign state dicts hold plain numbers; offloading puts copies in its place.
        # (A number stays one: made a tensor of the host, it would be waited for by the device.)
        counters[i] = step if isinstance(step, Tensor) else float(step)
        state["step"] = counters[i]


def _copied(value: Any) -> Any:
    """A copy; of a step count not of all that lie in one memory with it, as deepcopy makes it."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


class LambBase(Optimizer):
    """Parameter groups with LAMB's options, per-param step counters, and one step."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "step" in cls.__dict__:
            cls.step = _plain_unless_watched(cls.__dict__["step"])  # type: ignore[method-assign]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        **more: Unpack[Options],
    ) -> None:
        impl = more.pop("impl", "auto")
        defaults: dict[str, Any] = {**options.RULE_DEFAULTS, **options.TORCH_FLAGS}
        unknown = set(more) - set(defaults)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
        defaults.update(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **more)
        self.impl = options.resolve_impl(impl, defaults["foreach"], defaults["fused"])
        options.check_group(defaults)
        # GradScaler then hands over the loss scale and the overflow flag as tensors instead of
        # deciding on the host, rank by rank, whether step() is called at all.
        self._step_supports_amp_scaling = True
        self._captured: list[Any] = []
        self._forget_caches()
        super().__init__(params, defaults)

    # --- parameter groups ------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            options.check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name, p in zip(self._names_of(group), group["params"]):
                self._check_param(name, p)
        except Exception:
            # A refused group must not stay behind half added.
            del self.param_groups[-1]
            raise
        self._forget_caches()

    def _check_param(self, name: str, p: Tensor) -> None:
        reason = refusal(p)
        if reason is not None:
            raise RuntimeError(f"{type(self).__name__} cannot optimize {name}: {reason}")
        # one byte: float8, which has no arithmetic
        if not p.is_floating_point() or p.element_size() < 2:
            raise TypeError(
                f"{type(self).__name__} optimizes real floating-point tensors; {name} is {p.dtype}"
            )

    def _names_of(self, group: Mapping[str, Any]) -> list[str]:
        """Names of a group's params: as given, else by position over all groups."""
        if "param_names" in group:
            return list(group["param_names"])
        first = 0
        for other in self.param_groups:
            if other is group:
                break
            first += len(other["params"])
        return [f"param_{first + i}" for i in range(len(group["params"]))]

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _all_names(self) -> list[str]:
        return [name for group in self.param_groups for name in self._names_of(group)]

    # --- numbers of a step, on the device --------------------------------------------------------

    def _forget_caches(self) -> None:
        """Whatever was derived from groups or state is derived again at the next step."""
        self._tables: dict[torch.device, tuple[Any, Tensor]] = {}
        self._group_of: dict[torch.device, Tensor] = {}
        self._counters: dict[torch.device, Tensor] = {}
        self._ratios: dict[torch.device, Tensor] = {}
        self._fused_groups: dict[torch.device, GroupTable] = {}
        self._fused_works: tuple[Any, Table] | None = None

    def _hyperparameters(self, device: torch.device) -> rule.Hyperparameters:
        """The groups' options, float64, one column each, gathered to [params] on ``device``."""
        rows = tuple(tuple(rule.hyperparameters(group)) for group in self.param_groups)
        cached = self._tables.get(device)
        if cached is None or cached[0] != rows:
            table = torch.tensor(rows, dtype=torch.float64)
            if device.type == "cuda":
                table = table.pin_memory()
            cached = self._tables[device] = (rows, table.to(device, non_blocking=True))
        if device not in self._group_of:
            sizes = torch.tensor([len(group["params"]) for group in self.param_groups])
            self._group_of[device] = torch.arange(len(sizes)).repeat_interleave(sizes).to(device)
        table = cached[1]
        lrs = [(i, g["lr"]) for i, g in enumerate(self.param_groups) if isinstance(g["lr"], Tensor)]
        if lrs:
            table = table.clone()
            for i, lr in lrs:
                table[i, 0] = lr.detach().to(device, torch.float64, non_blocking=True).view(())
        return rule.Hyperparameters(*table[self._group_of[device]].unbind(1))

    def _steps(self, device: torch.device) -> Tensor:
        """float32 [params], the params' step counts; ``state[p]["step"]`` are views of it."""
        if device not in self._counters:
            params = self._all_params()
            counters = torch.zeros(len(params), dtype=torch.float32, device=device)
            for i, p in enumerate(params):
                if p.device == device and p in self.state and "step" in self.state[p]:
                    count_here(counters, i, self.state[p])
            self._counters[device] = counters
        return self._counters[device]

    # --- the step --------------------------------------------------------------------------------

    @staticmethod
    def _reevaluated(closure: Closure | None) -> Any:
        """The loss of ``closure``, with gradients on: step() itself runs without them."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _update(
        self,
        works: Sequence[Work],
        active: Mapping[torch.device, Tensor],
        norms: Norms,
        masked: bool,
        grad_sq: Callable[[], Tensor] | None = None,
        before_apply: Callable[[], None] | None = None,
    ) -> None:
        """Phases 2-6 of a step (DESIGN: clip, moments, norms, trust ratio, apply) on local tensors.

        ``active`` are bool [params], per device; ``masked`` says that rows of inactive params are
        among the works too, with zero gradients. ``grad_sq()`` is the sum of squares of all local
        gradients, where somebody has it already. ``before_apply()`` is work for the host while a
        device is busy with the moments. Nothing here waits for a device.
        """
        table = self._table_of(works)
        if table is not None:
            self._update_fused(table, norms, active[table.device], grad_sq, before_apply)
            return
        backends = [kernels.select(self.impl, w.device, w.numel) for w in works]
        on = {d: [(w, k) for w, k in zip(works, backends) if w.device == d] for d in active}

        # 2. clip coefficient and overflow flag, of all params on all ranks
        scale, overflow = self._gradient_scale(list(zip(works, backends)), norms, grad_sq)

        coefficients, sums = {}, {}
        for device, steps in ((d, self._steps(d)) for d in active):
            h = self._hyperparameters(device)
            if scale is not None:
                scale = scale.to(device)
                s = h.sign * scale[0]
                if any(map(options.clips, self.param_groups)):
                    s = s * rule.clip_coefficient(scale[1], h.max_grad_norm)
            elif any(group["maximize"] for group in self.param_groups):
                s = h.sign
            else:
                s = None
            taking_part = active[device]
            if overflow is not None:
                taking_part = taking_part & ~overflow.to(device)
            l2 = any(not group["decoupled"] for group in self.param_groups)
            t = steps + 1
            c = rule.coefficients(h, t.double(), s, l2)
            if masked or overflow is not None:
                c = rule.only_where(taking_part, c, guard=overflow is not None)

            # 3. moments, and sums of squares of x and u: [x^2, u^2, updated] per param
            local = torch.zeros(len(t), 3, dtype=torch.float64, device=device)
            local[:, 2] = self._counts(h, taking_part, [w for w, _ in on[device]])
            for work, backend in on[device]:
                local[:, :2] += work.rows.sum(backend.moments(work, c.to(work.dtype)))
            coefficients[device] = (h, c, t, taking_part)
            # 4. over ranks: one all-reduce
            sums[device] = norms.per_param(local)

        if before_apply is not None:
            before_apply()
        for device, (h, c, t, taking_part) in coefficients.items():
            # 5. trust ratio
            x_sq, u_sq, updated = sums[device].unbind(1)
            rho = rule.trust_ratio(x_sq, u_sq, h)
            self._counters[device].copy_(torch.where(updated > 0, t, self._counters[device]))
            # Rounded as the params are, so that the order of the ranks leaves no trace here either.
            self._ratios[device] = torch.where(updated > 0, rho, torch.nan).float()
            if self._lr_known_zero():
                self._erase(taking_part & ~(updated > 0), [w for w, _ in on[device]])
                c = rule.only_where(updated > 0, c, guard=False)
            # 6. x <- x - lr * rho * u
            step_size = torch.where(updated > 0, h.lr * rho, 0.0)
            for work, backend in on[device]:
                backend.apply(work, c.to(work.dtype), step_size.to(work.dtype))

    def _update_fused(
        self,
        table: Table,
        norms: Norms,
        active: Tensor | None,
        grad_sq: Callable[[], Tensor] | None = None,
        before_apply: Callable[[], None] | None = None,
    ) -> None:
        """The same in one backend's own launches; ``active`` None: as the table's gradients say."""
        from .kernels import fused_triton

        device = table.device
        if capturing(device) and not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                f"step() of this {type(self).__name__} is being captured in a CUDA graph, which "
                "needs capturable=True"
            )
        if device not in self._fused_groups:
            self._fused_groups[device] = GroupTable(device, self._captured)
        clip = any(map(options.clips, self.param_groups))
        found_inf = getattr(self, "found_inf", None)
        wanted = clip or found_inf is not None
        self._ratios[device] = fused_triton.update(
            table,
            self._fused_groups[device].of(self.param_groups),
            self._steps(device),
            norms,
            clip=clip,
            grad_sq=grad_sq() if grad_sq is not None and wanted else None,
            lr_zero=self._lr_known_zero(),
            active=active,
            loss_scale=getattr(self, "grad_scale", None),
            found_inf=found_inf,
            before_apply=before_apply,
        )

    def _table_of(self, works: Sequence[Work]) -> Table | None:
        """The table of ``works``, a list that stays the same from step to step; None: not fused."""
        if self._fused_works is None or self._fused_works[0] is not works:
            kinds = [(work.device, work.dtype) for work in works]
            if not kinds or kernels.fused(self.impl, kinds) is None:
                return None
            segments = [segment for work in works for segment in work.segments()]
            segments.sort(key=lambda segment: segment.param)
            self._fused_works = (works, self._table(segments, works[0].device))
        return self._fused_works[1]

    def _table(self, segments: Sequence[Segment], device: torch.device) -> Table:
        group_of = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
        return Table(segments, group_of, device, self._captured)

    def _gradient_scale(
        self,
        works: Sequence[tuple[Work, kernels.Kernels]],
        norms: Norms,
        grad_sq: Callable[[], Tensor] | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """([1 / loss scale, squared norm of all unscaled gradients], overflow); None if unused.

        ``grad_scale`` and ``found_inf`` are the attributes torch.amp.GradScaler sets around step().
        """
        loss_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        clip = any(map(options.clips, self.param_groups))
        if not clip and loss_scale is None and found_inf is None:
            return None, None
        home = works[0][0].device if works else next(iter(self._counters))
        kinds = norms.kinds(home)
        # [squares of each kind of params, flag]
        total = torch.zeros(
            2 if kinds is None else len(kinds) + 1, dtype=torch.float64, device=home
        )
        if grad_sq is not None:
            total[0] = grad_sq()
        elif clip:
            for work, backend in works:
                partials, masks = backend.grad_sq(work), norms.kinds(work.device)
                if masks is None:
                    total[0] += partials.sum().to(home)
                else:
                    each = work.rows.sum(partials)
                    sums = [torch.where(mask, each, 0.0).sum() for mask in masks]
                    total[:-1] += torch.stack(sums).to(home)
        if found_inf is not None:
            total[-1] = torch.as_tensor(found_inf, device=home).sum()
        if clip or found_inf is not None:
            total = norms.over_all(total)
        inverse = torch.ones_like(total[0])
        if loss_scale is not None:
            inverse = loss_scale.to(home, torch.float64).reciprocal().view(())
        scale = torch.stack([inverse, total[0] * inverse * inverse])
        if found_inf is None:
            return scale, None
        # Finite half-precision gradients of two ranks may have a sum that is not.
        return scale, (total[1] > 0) | ~total[0].isfinite()

    def _counts(
        self, h: rule.Hyperparameters, taking_part: Tensor, works: Sequence[Work]
    ) -> Tensor:
        """Which params' steps count: those that take part, float64 [params].

        torch.distributed.checkpoint makes optimizers create their state by a step with lr = 0 and
        zero gradients. That must leave no counter behind, or the first real step would be
        bias-corrected as the second; so at lr = 0 a param without history and gradient does not
        count.
        """
        counts = taking_part.double()
        if self._lr_known_zero():
            seen = torch.zeros_like(counts)
            for w in works:
                rows = [
                    torch.stack([(t != 0).any(dim=1) for t in (b.grad, b.exp_avg, b.exp_avg_sq)])
                    .any(dim=0)
                    .double()
                    for b in w.blocks
                ]
                seen += w.rows.sum(torch.cat(rows)) if rows else 0.0
            counts = counts * ((h.lr != 0) | (seen > 0))
        return counts

    @staticmethod
    def _erase(which: Tensor, works: Sequence[Work]) -> None:
        """Zero again the moments of params whose step did not count: L2 decay has entered them."""
        for w in works:
            for b, index in zip(w.blocks, w.rows.indices):
                keep = ~which[index][:, None]
                b.exp_avg.mul_(keep)
                b.exp_avg_sq.mul_(keep)

    def _lr_known_zero(self) -> bool:
        """Whether some group's lr is 0, as far as the host can tell."""
        return any(
            (lr.device.type == "cpu" and not lr.any()) if isinstance(lr, Tensor) else lr == 0
            for lr in (group["lr"] for group in self.param_groups)
        )

    # --- state -----------------------------------------------------------------------------------

    def trust_ratios(self) -> dict[str, Tensor]:
        """{name: trust ratio of the last step, a float32 0-d tensor on the param's device}.

        NaN for a param that took no part in the last step. Reading the values synchronizes with
        the device; calling this does not.
        """
        found = {}
        for i, (name, p) in enumerate(zip(self._all_names(), self._all_params())):
            if p.device in self._ratios:
                found[name] = self._ratios[p.device][i]
        return found

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, "impl": self.impl, "_step_supports_amp_scaling": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in {**options.RULE_DEFAULTS, **options.TORCH_FLAGS}.items():
                group.setdefault(name, value)
        self.__dict__.setdefault("_captured", [])
        self._forget_caches()
        loading = self.__dict__.get("_loading")
        if loading:
            self._load_tensors(loading)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer.load_state_dict, but float32 state of half params stays float32.

        Raises ``ValueError`` naming a param whose saved state has another shape, or an option that
        is not valid; nothing is changed then.
        """

        def keep_tensors(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
            self._loading = self._tensors_by_param(saved)
            # torch casts every floating state tensor to its param's dtype (pytorch#43706), so it
            # gets to see none of them but the step, and of that a copy: it would keep the caller's.
            rest = {
                key: {n: _copied(v) for n, v in entry.items() if n not in TENSOR_STATES}
                for key, entry in saved["state"].items()
            }
            return {**saved, "state": rest}

        # Registered last, so it sees what the user's own hooks made of the state dict.
        handle = self.register_load_state_dict_pre_hook(keep_tensors)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_loading", None)

    def _tensors_by_param(self, saved: Mapping[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
        """The large tensors of a state dict, by param, once all of it is known to fit."""
        for group in saved["param_groups"]:
            options.check_group({**self.defaults, **group})
        found: dict[Tensor, dict[str, Tensor]] = {}
        ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
        for key, name, p in zip(ids, self._all_names(), self._all_params()):
            entry = saved["state"].get(key, {})
            found[p] = {n: entry[n] for n in TENSOR_STATES if n in entry}
            for state, value in found[p].items():
                if value.shape != p.shape:
                    raise ValueError(
                        f"loaded {state} of {name} has shape {tuple(value.shape)}, "
                        f"the param has {tuple(p.shape)}"
                    )
        return found

    def _load_tensors(self, loaded: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Take over the large state tensors by param; called when groups and steps are in place."""
        for p, tensors in loaded.items():
            for name, value in tensors.items():
                local = state_like(local_of(p), piece_of(value, p))
                self.state[p][name] = wrapped(local, p)
