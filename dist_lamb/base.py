"""What the optimizers share: options in groups, step counts, what a step reports, loading."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from . import foreign, options, rules, step
from .kernels import Update
from .kernels.device import capturing
from .kernels.groups import GroupOptions
from .kernels.segments import Scalars
from .last_step import LastStep, Members
from .norms import Norms
from .overlaps import first_overlap
from .param_notes import ParamNotes
from .sharding.dtensors import local_of, piece_of, refusal, wrapped
from .state import TENSOR_STATES, Formats, scalar_of, to_be_held

ParamsT: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Closure: TypeAlias = Callable[[], Any]

#: Entry of a param group: how many steps were skipped, int64 0-d.
SKIPPED = "skipped_steps"


def count_here(counters: Tensor, i: int, state: dict[str, Any]) -> None:
    """Go on counting from ``state["step"]``, which becomes a view of counter ``i``."""
    count = state.get("step", 0)
    here = counters.data_ptr() + i * counters.element_size()
    if not isinstance(count, Tensor) or count.data_ptr() != here:
        # Older or foreign state dicts hold plain numbers; offloading puts copies in its place.
        # (A number stays one: made a tensor of the host, it would be waited for by the device.)
        counters[i] = count if isinstance(count, Tensor) else float(count)
        state["step"] = counters[i]


def _copied(value: Any) -> Any:
    """A copy; of a step count not of all that lie in one memory with it, as deepcopy makes it."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _scalar(value: Any, device: torch.device) -> Tensor | None:
    """One floating-point number on ``device``; as it is where it is that already."""
    if value is None:
        return None
    scalar = scalar_of(value, None if isinstance(value, Tensor) else torch.float64).to(device)
    return scalar if scalar.numel() == 1 and scalar.is_floating_point() else scalar.sum().double()


class LambBase(LastStep, Optimizer):
    """Parameter groups with LAMB's options, one step, and what it reports."""

    #: False where rank 0's values will take the place of what params hold when they are given
    _own_values_count: ClassVar[bool] = True

    def __init__(
        self,
        params: nn.Module | ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        grad_averaging: bool = True,
        bias_correction: bool = True,
        decoupled: bool = True,
        max_grad_norm: float | None = None,
        adapt: options.Adapt | bool = "all",
        trust_clip: tuple[float, float] | None = None,
        phi: tuple[float, float] | None = None,
        maximize: bool = False,
        rule: str = "lamb",
        amsgrad: bool = False,
        nonfinite: options.Nonfinite = "propagate",
        state_format: options.StateFormat = "float32",
        master: options.Master = "float32",
        track_grad_norm: bool = False,
        impl: options.Impl = "auto",
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
        **of_rule: Any,
    ) -> None:
        defaults = {
            name: value
            for name, value in locals().items()
            if name in options.RULE_DEFAULTS or name in options.TORCH_FLAGS
        }
        known = options.rule_named(rule).options
        own = list(dict.fromkeys([*defaults, *known, "impl", "track_grad_norm"]))
        foreign.refuse_unknown(type(self).__name__, of_rule.keys() - known.keys(), own)
        self.impl = options.resolve_impl(impl, foreach, fused)
        self.track_grad_norm = track_grad_norm
        # What is as the signature has it was not asked for, so that no rule need have it.
        plain = {**options.RULE_DEFAULTS, **options.TORCH_FLAGS}
        given = {n: v for n, v in defaults.items() if n != "lr" and v != plain[n]}
        options.check_group(options.completed({**given, **of_rule}, {**defaults, **of_rule}))
        # GradScaler then hands over the loss scale and the overflow flag as tensors instead of
        # deciding on the host, rank by rank, whether step() is called at all.
        self._step_supports_amp_scaling = True
        self._prepare_fields()
        named = params.named_parameters() if isinstance(params, nn.Module) else params
        self._ready = False
        super().__init__(named, options.of_optimizer({**defaults, **of_rule}))
        self._check_groups(self.param_groups)
        self._ready = True

    def _prepare_fields(self) -> None:
        """Everything that is neither group nor state, as in a new optimizer."""
        #: whether the groups of the constructor are all there, and checked
        self._ready = True
        self._options = GroupOptions()
        #: what captured CUDA graphs go on reading
        self._captured: list[Any] = []
        self._last = None
        self._unfinished = False
        #: the params that it was given, whatever was put in their place since, and their names
        self._given: ParamNotes[str | None] = ParamNotes()

    # --- parameter groups ------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            param_group = {**param_group, **options.completed(param_group, self.defaults)}
            options.check_group(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in set(rules.OPTIONS) - set(options.RULE_DEFAULTS):
            if not options.reads(rules.of(group), name):
                group.pop(name, None)  # another rule's, from the optimizer's defaults
        group.setdefault(SKIPPED, 0)
        self._remember_names(group)
        if self._ready:
            try:
                self._check_groups([group])
            except Exception:
                # A refused group must not stay behind half added.
                del self.param_groups[-1]
                raise

    def _check_groups(self, new: Sequence[Mapping[str, Any]]) -> None:
        """Raise where params of the last groups, ``new``, cannot be optimized."""
        named = self.named_groups()
        for name, p in chain.from_iterable(named[-len(new) :]):
            self._check_param(name, p)
        for i in range(-len(new), 0) if self._own_values_count else ():
            self.refuse_zeros(i)
        for i, group in enumerate(new, start=len(named) - len(new)):
            # Every name that was given, where a tied param came under two.
            given = group.get("param_names", ())
            if len(given) == len(group["params"]):
                named[i] = list(zip(given, group["params"]))
        overlap = first_overlap([(n, local_of(p)) for n, p in chain.from_iterable(named)])
        if overlap:
            raise ValueError(f"{type(self).__name__} cannot optimize params: {overlap}")

    def _remember_names(self, group: Mapping[str, Any]) -> None:
        names = group.get("param_names", ())
        for p, name in zip_longest(group["params"], names[: len(group["params"])]):
            self._given[p] = self._given.get(p, None) if name is None else name

    def _check_param(self, name: str, p: Tensor) -> None:
        if is_lazy(p):
            raise RuntimeError(
                f"{type(self).__name__} cannot optimize {name}: it has no shape yet; run the model "
                "forward once before making the optimizer"
            )
        reason = refusal(p)
        if reason is not None:
            raise RuntimeError(f"{type(self).__name__} cannot optimize {name}: {reason}")
        # one byte: float8, which has no arithmetic
        if not p.is_floating_point() or p.element_size() < 2:
            raise TypeError(
                f"{type(self).__name__} optimizes real floating-point tensors; {name} is {p.dtype}"
            )

    def refuse_zeros(self, group: int) -> None:
        """Raise ``ValueError`` naming a tensor that is zero where the rule cannot have that, as far
        as this rank alone can see."""
        problem = rules.of(self.param_groups[group]).zeros
        for name, p in self.named_groups()[group] if problem else ():
            # an empty one may stand for a param of DeepSpeed's zero.Init
            if local_of(p) is p and p.numel() and p.device.type != "meta" and not p.any():
                raise ValueError(f"{name} is zero: {problem}")

    def named_groups(self) -> list[list[tuple[str, Tensor]]]:
        """(name, param) of every param, group by group.

        A param that was given with a name keeps it wherever it is moved; others have the name of
        their position.
        """
        given = [[self._given.get(p, None) for p in group["params"]] for group in self.param_groups]
        taken, count = set(chain(*given)), 0
        named: list[list[tuple[str, Tensor]]] = []
        for group, own in zip(self.param_groups, given):
            # Frameworks put others in a param's place: DTensors, for one.
            by_position = group.get("param_names", ())
            aligned = len(by_position) == len(own)
            named.append([])
            for k, (name, p) in enumerate(zip(own, group["params"])):
                if name is None and aligned and by_position[k] not in taken:
                    name = by_position[k]
                named[-1].append((f"param_{count}" if name is None else name, p))
                count += 1
        return named

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def rule_of(self) -> dict[Tensor, rules.Rule]:
        """The rule of each param."""
        return {p: rules.of(group) for group in self.param_groups for p in group["params"]}

    def formats_of(self) -> dict[Tensor, Formats]:
        """How each param's states are stored."""
        return {p: Formats.of(group) for group in self.param_groups for p in group["params"]}

    def _all_names(self) -> list[str]:
        return [name for group in self.named_groups() for name, _ in group]

    # --- the step --------------------------------------------------------------------------------

    @staticmethod
    def _reevaluated(closure: Closure | None) -> Any:
        """The loss of ``closure``, with gradients on: step() itself runs without them."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def refuse_broken(self) -> None:
        """Raise ``RuntimeError`` where state and weights do not belong together."""
        if self._unfinished:
            raise RuntimeError(
                f"an error broke off the last step() of this {type(self).__name__}, or the loading "
                "of a checkpoint: moments or params have changed in part. Load a state dict, and "
                "the weights saved with it, to go on"
            )

    def _begin(self) -> None:
        """At the start of ``step()``: raise if it must not be made. Nothing is changed then."""
        self.refuse_broken()
        self._options.read(self.param_groups)

    def _loss_scaling(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Loss scale and overflow flag that torch.amp.GradScaler has set for this step."""
        scale, flag = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return _scalar(scale, device), _scalar(flag, device)

    def _update(
        self,
        updates: Sequence[Update],
        norms: Norms,
        members: Members,
        grad_sq: Callable[[], Tensor] | None = None,
    ) -> None:
        """Phases 2-6 on params numbered as ``members``; see :func:`dist_lamb.step.prepare`."""
        home = updates[0].device
        if capturing(home) and not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                f"step() of this {type(self).__name__} is being captured in a CUDA graph, which "
                "needs capturable=True"
            )
        scalars = Scalars(self._options, self.track_grad_norm, *self._loss_scaling(home))
        step.prepare(updates, norms, scalars, grad_sq)
        self._unfinished = True
        step.update(updates, norms, scalars)
        if self._options.skip and scalars.overflow is not None:
            self._skip_count(home).add_(scalars.overflow > 0)
        self._last = ([(u.device, u.ratios, u.sums) for u in updates], scalars, members)
        self._unfinished = False

    # --- what the last step did ------------------------------------------------------------------

    def skipped_steps(self) -> Tensor:
        """How many steps ``nonfinite="skip"`` has skipped: int64 0-d, on the device.

        It is kept in the param groups and saved with them. Loss scaling's overflows count too.
        """
        return scalar_of(self.param_groups[0].get(SKIPPED, 0), torch.int64).clone()

    def _skip_count(self, device: torch.device) -> Tensor:
        """The count, one tensor in all groups."""
        counts = [group.get(SKIPPED) for group in self.param_groups]
        first = counts[0]
        if isinstance(first, Tensor) and first.device == device and len(set(map(id, counts))) == 1:
            return first
        total = torch.zeros((), dtype=torch.int64, device=device)
        for count in counts:
            # To bring a 0 to the device would be a copy from the host, which no CUDA graph takes.
            if isinstance(count, Tensor) or count:
                count = scalar_of(count, torch.int64).to(device).view(())
                total = torch.maximum(total, count)
        for group in self.param_groups:
            group[SKIPPED] = total
        return total

    # --- state -----------------------------------------------------------------------------------

    def state_loaded(self) -> None:
        """Tell that state and weights were replaced by such as belong together."""
        self._unfinished = False

    def state_broken(self) -> None:
        """Tell that they were replaced in part: ``step()`` raises until they are whole."""
        self._unfinished = True

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        names = ("impl", "track_grad_norm", "_step_supports_amp_scaling", "_unfinished")
        return {**state, **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            of_rule = options.rule_named(group.get("rule", "lamb")).options
            known = {**of_rule, **options.RULE_DEFAULTS, **options.TORCH_FLAGS, SKIPPED: 0}
            for name, value in known.items():
                group.setdefault(name, value)
        if "_options" not in self.__dict__:  # unpickled
            self._prepare_fields()
            self._unfinished = state.get("_unfinished", False)
            self.__dict__.setdefault("track_grad_norm", False)
            for group in self.param_groups:
                self._remember_names(group)
        loading = self.__dict__.get("_loading")
        if loading:
            self._load_tensors(loading)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer.load_state_dict, but float32 state of half params stays float32.

        Masters of a half-precision run that is continued in full precision give params back the
        bits they were rounded off. State dicts of torch's AdamW, apex's FusedLAMB and timm's Lamb
        load too; options that one has not are kept as they are here.

        Raises ``ValueError`` naming a param whose saved state has another shape, or an option that
        is not valid or has no equal here; nothing is changed then.
        """

        def keep_tensors(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            foreign.refuse_other_states(given, self.param_groups, self._all_names())
            saved = foreign.understood(given, self.param_groups)
            self._loading = self._tensors_by_param(saved)
            # torch casts every floating state tensor to its param's dtype (pytorch#43706), so it
            # gets to see none of them but the step, and of that a copy: it would keep the caller's.
            of_params = set(chain.from_iterable(group["params"] for group in saved["param_groups"]))
            rest = {
                key: {n: _copied(v) for n, v in entry.items() if n not in TENSOR_STATES}
                if key in of_params
                else entry
                for key, entry in saved["state"].items()
            }
            return {**saved, "state": rest}

        # Registered last, so it sees what the user's own hooks made of the state dict.
        handle = self.register_load_state_dict_pre_hook(keep_tensors)
        try:
            super().load_state_dict(state_dict)
            self.state_loaded()
        finally:
            handle.remove()
            self.__dict__.pop("_loading", None)

    def _tensors_by_param(self, saved: Mapping[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
        """The large tensors of a state dict, by param, once all of it is known to fit."""
        for group in saved["param_groups"]:
            options.check_group(options.completed(group, self.defaults))
        found: dict[Tensor, dict[str, Tensor]] = {}
        ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
        for key, (name, p) in zip(ids, chain.from_iterable(self.named_groups())):
            entry = saved["state"].get(key, {})
            found[p] = {n: entry[n] for n in TENSOR_STATES if n in entry}
            for state, value in found[p].items():
                if value.shape != p.shape:
                    raise ValueError(
                        f"loaded {state} of {name} has shape {tuple(value.shape)}, "
                        f"the param has {tuple(p.shape)}"
                    )
        return found

    @torch.no_grad()
    def _load_tensors(self, loaded: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Take over the large state tensors by param; called when groups and steps are in place."""
        for p, tensors in loaded.items():
            for name, value in tensors.items():
                local = to_be_held(name, piece_of(value, p), local_of(p))
                if local is not None:
                    self.state[p][name] = wrapped(local, p)
