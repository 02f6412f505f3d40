"""DeepSpeedLamb: the optimizer that DeepSpeed is given."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .. import foreign, options, rules
from ..base import SKIPPED, Closure, LambBase, ParamsT
from ..deepspeed_marks import taken_by_zero
from ..kernels.segments import GRAD_SQ
from ..last_step import Read
from ..param_groups import without_decay_1d
from ..sharding.comm import Comm
from ..state import TENSOR_STATES, Formats, scalar_of
from .arrivals import Arrivals
from .clipping import BOTH_CLIP, grad_norm_of
from .layouts import Original, find_layouts, logical_shape
from .loaded_groups import ALL_LRS, restore_groups
from .partition_step import PartitionStep

#: Backward passes without a step: more than anyone accumulates.
MANY = 1000


class DeepSpeedLamb(LambBase):
    """:class:`dist_lamb.Lamb` for ``deepspeed.initialize(optimizer=...)``.

    Takes the same arguments, ``master`` as ``"float32"`` only, and ``no_decay_1d``. It finds
    DeepSpeed's layout by itself at each ``step()``, and checks it against the values of the model's
    params; :meth:`bind` is to be called for ``max_grad_norm``, names and skipped steps. The config
    must allow an instance (see :func:`recommended_config`), or name the class (:func:`register`).

    Args:
        no_decay_1d: params of fewer than two dims, which are the biases and normalisation weights,
            do not decay, unless they came in a group with a ``weight_decay`` of its own.

    A param without gradient on every rank is left alone, though DeepSpeed fills in zeros for it.
    The state lies where DeepSpeed keeps it: ``state[t]`` of the tensors in its param groups has
    the rule's states, like ``t``, and one ``step``; the params' own step counts are
    ``param_groups[i]["param_steps"]``, float32 [params of the group]. DeepSpeed's universal
    checkpoints take ``exp_avg`` and ``exp_avg_sq`` only; :meth:`full_optimizer_state_dict` has all.

    Clip with DeepSpeed's ``gradient_clipping``, or with ``max_grad_norm``, not with both.

    After loading weights into an engine's model call ``engine.optimizer.refresh_fp32_params()``:
    otherwise DeepSpeed overwrites them with its float32 masters of the old ones. Before the first
    step that is an error on every rank. Later it is one at stages 0-2, on ranks whose slice
    differs, unless the weights were written through ``p.data``; ZeRO-3 moves memory all the time,
    and there it is not noticed.

    Raises:
        UnknownLayout: from ``step()``, on every rank: tensors whose relation to the params is not
            known, or tensor parallelism. RuntimeError: ``max_grad_norm`` that cannot be exact,
            weights that were loaded without their masters.
    """

    def __init__(
        self, params: nn.Module | ParamsT, *args: Any, no_decay_1d: bool = False, **more: Any
    ) -> None:
        if not isinstance(no_decay_1d, bool):
            raise ValueError(f"Invalid no_decay_1d value: {no_decay_1d!r}; True or False expected")
        named = params.named_parameters() if isinstance(params, nn.Module) else params
        super().__init__(without_decay_1d(named) if no_decay_1d else named, *args, **more)

    def _prepare_fields(self) -> None:
        super()._prepare_fields()
        self._originals: list[Original] = []
        #: by group, the first of its originals; and their end
        self._starts = [0]
        self._arrivals = Arrivals(self._not_stepped)
        #: by group, options as last seen
        self._options_of: dict[int, dict[str, Any]] = {}
        self._engine: Any = None
        self._steps_of: dict[tuple[int, ...], list[PartitionStep]] = {}
        #: by original, where its last step was made
        self._stepped_by: dict[int, tuple[PartitionStep, int]] = {}
        self._steps_taken: Tensor | None = None
        #: the counters last put into each group: others there have been loaded
        self._shown: dict[int, tuple[Tensor, Tensor]] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if {**self.defaults, **param_group}["master"] != "float32":
            raise ValueError(
                "DeepSpeed keeps the float32 masters itself: DeepSpeedLamb takes master='float32' "
                "only; state_format='bfloat16' narrows the moments"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        i = len(self._starts) - 1
        for name, p in self.named_groups()[-1]:
            original = Original(len(self._originals), name, p, i)
            self._originals.append(original)
            self._arrivals.expect(p)
        self._starts.append(len(self._originals))
        # Saved with the group: DeepSpeed's loaders mix groups up, or change the ranks.
        group["group_index"] = i
        group["param_steps"] = torch.zeros(len(group["params"]), dtype=torch.float32, device="cpu")
        self._options_of[i] = options.owned(group)
        self._steps_taken = None
        self._steps_of.clear()

    def bind(self, engine: Any) -> DeepSpeedLamb:
        """Tell the engine that ``deepspeed.initialize`` returned; returns the optimizer.

        Needed for ``max_grad_norm``, whose norm is DeepSpeed's own: it steps one part of the model
        after the other, and a part does not know the others' gradients. Names params that were
        given without. Tells gradients of a step that DeepSpeed skipped (overflow) from those of the
        next: else a param that has one in the former alone is stepped with zeros.

        Raises:
            ValueError: ``max_grad_norm`` and DeepSpeed's ``gradient_clipping`` together.
        """
        if engine.gradient_clipping() and any(map(options.clips, self.param_groups)):
            raise ValueError(BOTH_CLIP.format(engine.gradient_clipping()))
        self._engine = engine
        self._arrivals.bind(engine)
        named = {id(p): name for name, p in engine.module.named_parameters()}
        self._originals[:] = [
            o._replace(name=named[id(o.param)])
            if o.name == f"param_{o.number}" and id(o.param) in named
            else o
            for o in self._originals
        ]
        return self

    # --- training --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One update of what DeepSpeed put into the param groups; every rank must call it.

        DeepSpeed calls this, once per step of the engine or once per group or sub-group.
        """
        loss = self._reevaluated(closure)
        self._arrivals.unused = None
        self._restore_groups()
        self._begin()
        groups = [group for group in self.param_groups if group["params"]]
        parts = self._find_steps([(g["group_index"], g["params"]) for g in groups])
        live = {group["group_index"]: group for group in groups}
        if not parts:
            return loss
        steps = self._load_steps(groups, parts)
        for part in parts:
            part.refuse_stale_masters(self._originals)
            self._unfinished = True
            overflow = part.update(
                live,
                self.state,
                steps,
                self._arrivals,
                grad_norm_of(part, live, self._engine, self._originals),
                self.track_grad_norm,
                self._loss_scaling(part.device),
            )
            self._unfinished = False
            for k, o in enumerate(part.originals):
                self._stepped_by[o.number] = (part, k)
            if overflow is not None:
                self._count_skipped(part, live, overflow)
        for i, group in live.items():
            self._options_of[i] = options.owned(group)
        self._show_steps(groups, parts)
        return loss

    def _not_stepped(self, backwards: int) -> None:
        """Warn if nobody will call ``step()``: from backward, until it was called."""
        if not self._another_trains() and backwards < MANY:
            return
        self._arrivals.unused = None
        warnings.warn(
            "DeepSpeed trains the params of this DeepSpeedLamb, but with another optimizer: its "
            "step() is never called. HF Trainer ignores optimizers=(optimizer, None) under "
            "DeepSpeed: pass optimizer_cls_and_kwargs, or name it in the config (register()). "
            "Accelerate replaces it when offloading: set zero_force_ds_cpu_optimizer = false, or "
            "name it in the config",
            stacklevel=2,
        )

    def _another_trains(self) -> bool:
        """Whether DeepSpeed has given the params to another optimizer, as far as can be told."""
        for _, _, p, _ in self._originals:
            # ZeRO-1 and 2 leave it on what this rank has a part of. Param groups tell nothing:
            # Accelerate puts ours into the optimizer that it takes instead.
            zero: Any = getattr(p, "_z3_optimizer", None) or getattr(p, "_zero_optimizer", None)
            if zero is not None:
                return zero.optimizer is not self
        # BF16_Optimizer leaves none.
        held = {id(t) for group in self.param_groups for t in group["params"]}
        return any(id(p) in held and taken_by_zero(p) for _, _, p, _ in self._originals)

    def _count_skipped(
        self, part: PartitionStep, live: Mapping[int, dict[str, Any]], overflow: Tensor
    ) -> None:
        """Once a group and step of the engine: it may call for several parts of a group."""
        first = {o.number for o in part.originals}
        for i, group in live.items():
            if self._starts[i] in first:
                count = scalar_of(group.get(SKIPPED, 0), torch.int64)
                group[SKIPPED] = count.to(overflow.device) + (overflow > 0).view(())

    def skipped_steps(self) -> Tensor:
        """As :meth:`dist_lamb.Lamb.skipped_steps`; those that DeepSpeed skips by itself (overflow,
        infinite gradients) count too once :meth:`bind` was called."""
        by_engine = 0 if self._engine is None else self._engine.skipped_steps
        counts = [scalar_of(g[SKIPPED], torch.int64) for g in self.param_groups if SKIPPED in g]
        if not counts:
            return torch.tensor(by_engine, dtype=torch.int64, device="cpu")
        return torch.stack([c.to(counts[0].device) for c in counts]).amax() + by_engine

    def _find_steps(self, held: Sequence[tuple[int, Sequence[Tensor]]]) -> list[PartitionStep]:
        """What is stepped together: these tensors of these groups, by process group."""
        partitions = [t for _, tensors in held for t in tensors]
        key = tuple(map(id, partitions))
        if key not in self._steps_of:
            layouts = []
            for i, tensors in held:
                candidates = self._originals[self._starts[i] : self._starts[i + 1]]
                layouts += find_layouts(tensors, candidates, self._originals, self._stage_0_group)
            by_ranks: dict[int, list[int]] = {}
            for j, layout in enumerate(layouts):
                by_ranks.setdefault(id(layout.process_group), []).append(j)
            self._steps_of[key] = [
                PartitionStep(
                    self.impl,
                    {i: rules.of(of) for i, of in self._options_of.items()},
                    {i: Formats.of(of) for i, of in self._options_of.items()},
                    self._originals,
                    [layouts[j] for j in chosen],
                    [partitions[j] for j in chosen],
                )
                for chosen in by_ranks.values()
            ]
        return self._steps_of[key]

    def _all_steps(self) -> list[PartitionStep]:
        """For everything, not only what is in the groups at this moment."""
        self._restore_groups()
        parts: list[PartitionStep] = []
        zero = next(
            (o.param._z3_optimizer for o in self._originals if hasattr(o.param, "_z3_optimizer")),
            None,
        )
        if zero is None:
            held = [(group["group_index"], group["params"]) for group in self.param_groups]
        else:
            # Its groups are empty between steps.
            group_of = {id(o.param): o.group for o in self._originals}
            flats = zero.fp32_partitioned_groups_flat
            held = [(group_of[id(ps[0])], [t]) for ps, t in zip(zero.fp16_groups, flats)]
        for one in held:
            parts += self._find_steps([one])
        self._load_steps(self.param_groups, parts)
        return parts

    def _stage_0_group(self, p: Tensor) -> Any:
        """The ranks that have the same ``p``, which DeepSpeed does not note on it at stage 0."""
        deepspeed: Any = sys.modules.get("deepspeed")
        # It may be imported, and another engine train: Trainer with use_cpu, under DDP.
        if deepspeed is None or Comm().world_size == 1 or not deepspeed.comm.is_initialized():
            return None
        groups = deepspeed.utils.groups
        if not getattr(p, "allreduce", True):
            return groups._get_expert_data_parallel_group(p.group_name)  # type: ignore[attr-defined]
        if self._engine is not None:
            return self._engine.seq_data_parallel_group
        return groups._get_sequence_data_parallel_group()

    # --- step counters ---------------------------------------------------------------------------

    def state_loaded(self) -> None:
        super().state_loaded()
        self._restore_groups()  # where all are here: ZeRO-1 and 2 step with one at a time

    def _restore_groups(self) -> None:
        restore_groups(self.param_groups, self._starts, self._options_of)

    def _load_steps(
        self, groups: Sequence[dict[str, Any]], parts: Sequence[PartitionStep]
    ) -> Tensor:
        """float32 [originals], the params' step counts; taken over from what was loaded."""
        device = parts[0].device
        if self._steps_taken is None or self._steps_taken.device != device:
            self._steps_taken = torch.zeros(
                len(self._originals), dtype=torch.float32, device=device
            )
            self._shown = {}
        for group in groups:
            i = group["group_index"]
            shown = self._shown.get(i, (None, None))
            saved = group.get("param_steps")
            if saved is shown[0] and group.get("step") is shown[1] and saved is not None:
                continue
            lo, hi = self._starts[i : i + 2]
            counts = self._steps_taken[lo:hi]
            if saved is not shown[0] and torch.is_tensor(saved) and saved.shape == counts.shape:
                counts.copy_(saved)
            else:
                # A plain optimizer's state dict, or DeepSpeed's elastic and universal checkpoints,
                # which have one step for all.
                for layout, partition in (pair for part in parts for pair in part.held(i)):
                    if "step" in self.state.get(partition, ()):
                        of = slice(None) if layout.cut else layout.originals[0] - lo
                        counts[of] = float(self.state[partition]["step"])
            group["param_steps"], group["step"] = counts, counts.new_zeros(())
            self._shown[i] = (counts, group["step"])
            for layout, partition in (pair for part in parts for pair in part.held(i)):
                if not layout.cut:
                    self.state[partition]["step"] = counts[layout.originals[0] - lo]
        return self._steps_taken

    def _show_steps(self, groups: Sequence[dict[str, Any]], parts: Sequence[PartitionStep]) -> None:
        """One step for a whole partition, as DeepSpeed's checkpoints know it: the largest."""
        for group in groups:
            group["step"].copy_(group["param_steps"].amax())
            for layout, partition in (p for part in parts for p in part.held(group["group_index"])):
                if layout.cut:
                    # A tensor of its own: DeepSpeed's loaders write into it.
                    self.state[partition]["step"] = group["step"].clone()

    # --- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        # Here, since a schedule sets lrs after a step.
        lrs = {i: of["lr"] for i, of in self._options_of.items()}
        lrs |= {g["group_index"]: g["lr"] for g in self.param_groups if "group_index" in g}
        for group in self.param_groups:
            group[ALL_LRS] = list(lrs.values())
        return super().state_dict()

    def _per_param(self, read: Read) -> dict[str, Tensor]:
        found, of = {}, {}
        for o in self._originals:
            part, k = self._stepped_by.get(o.number, (None, 0))
            if part is None or part.last is None:
                found[o.name] = torch.tensor(torch.nan, dtype=torch.float32, device="cpu")
                continue
            if part not in of:
                of[part] = read(*part.last)
            found[o.name] = of[part][k]
        return found

    def _rule_of_each(self) -> list[rules.Rule]:
        return [rules.of(self._options_of[o.group]) for o in self._originals]

    def grad_norm(self) -> Tensor:
        """Global L2 norm of the gradients as DeepSpeed handed them over, after its own clipping.

        Raises ``RuntimeError`` without ``track_grad_norm=True``.
        """
        if not self.track_grad_norm:
            raise RuntimeError("grad_norm() of a DeepSpeedLamb needs track_grad_norm=True")
        parts = {id(part): part for part, _ in self._stepped_by.values()}.values()
        squares: list[Tensor] = []
        for part in parts:
            if part.last is not None:
                _, sums, scalars = part.last
                inverse = scalars.inverse_scale(part.device)
                square = sums[:, GRAD_SQ].sum()
                square = square if inverse is None else square * inverse * inverse
                squares.append(square.to(squares[0].device if squares else square.device))
        if not squares:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        return torch.stack(squares).sum().sqrt().float()

    def full_optimizer_state_dict(self) -> dict[str, Any]:
        """A torch.optim state dict with whole tensors on the CPU, on every rank; a collective.

        It loads into a DeepSpeedLamb at any stage and number of ranks, and into the other
        optimizers of this package.
        """
        parts = self._all_steps()
        state: dict[int, dict[str, Any]] = {o.number: {} for o in self._originals}
        for part in parts:
            state |= part.whole_state(self.state)
            for o in part.originals:
                assert self._steps_taken is not None
                state[o.number]["step"] = self._steps_taken[o.number].to("cpu", copy=True)
        groups = []
        for group in self.param_groups:
            lo, hi = self._starts[group["group_index"] : group["group_index"] + 2]
            kept = options.owned(group)
            names = [o.name for o in self._originals[lo:hi]]
            groups.append({**kept, "params": list(range(lo, hi)), "param_names": names})
        return {"state": state, "param_groups": groups}

    def load_full_optimizer_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load whole tensors into DeepSpeed's partitions; every rank must load the same.

        Call it after ``deepspeed.initialize`` and after the model's values are in place. What is in
        ``master`` of params in half precision replaces DeepSpeed's float32 values.
        Raises ``ValueError`` naming what does not fit; nothing is changed then.
        """
        given = foreign.understood(state_dict, self.param_groups)
        groups, saved = given["param_groups"], given["state"]
        sizes = [hi - lo for lo, hi in pairwise(self._starts) if lo < hi]
        if (theirs := [len(group["params"]) for group in groups]) != sizes:
            text = f"loaded groups of {theirs} params, this optimizer has groups of {sizes}"
            raise ValueError(text)
        for i, (group, own) in enumerate(zip(groups, self.param_groups)):
            options.check_group(options.completed(group, self.defaults))
            other, rule = rules.of(group), rules.of(own)
            if other is not rule:
                raise ValueError(
                    f"loaded param group {i} is of rule {other.name!r} with {list(other.states)}, "
                    f"this optimizer's is of {rule.name!r} with {list(rule.states)}"
                )
        own_groups = [{**own, "params": g["params"]} for own, g in zip(self.param_groups, groups)]
        foreign.refuse_other_states(state_dict, own_groups, [o.name for o in self._originals])
        ids = [i for group in groups for i in group["params"]]
        whole = {o.number: saved.get(i, {}) for o, i in zip(self._originals, ids)}
        for o in self._originals:
            for name in TENSOR_STATES:
                value = whole[o.number].get(name)
                if value is not None and tuple(value.shape) != tuple(logical_shape(o.param)):
                    raise ValueError(
                        f"loaded {name} of {o.name} has shape {tuple(value.shape)}, "
                        f"the param has {tuple(logical_shape(o.param))}"
                    )
        steps = [float(entry.get("step", 0.0)) for entry in whole.values()]
        parts = self._all_steps()
        assert self._steps_taken is not None
        for part in parts:
            part.load_whole_state(whole, self.state)
        self._steps_taken.copy_(torch.tensor(steps, dtype=torch.float32, device="cpu"))
        for group, loaded in zip(self.param_groups, groups):
            group.update(copy.deepcopy({**options.owned(loaded), **options.formats(group)}))
        self._show_steps(self.param_groups, parts)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a DeepSpeedLamb cannot be copied or pickled; save its state dict instead")
