"""Checkpoints of torch.distributed.checkpoint (DCP): written for programs without us, and read.

What is written is what ``dcp.save({"model": model_state, "optim": optimizer_state}, ...)`` writes
with the two results of ``torch.distributed.checkpoint.state_dict.get_state_dict()``: any FSDP2
program loads it. Read are such checkpoints, with either kind of optimizer state (``state.<name>.
<state>`` flattened, or nested), under ``model`` or without, as torchtitan has it.

DCP's ``.metadata`` is a pickle, which may call anything. It is read by an unpickler that knows the
few classes which DCP itself puts there; the tensors by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import shutil
import uuid
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from .. import options as lamb_options
from .. import rules
from ..base import SKIPPED
from ..state import (
    MASTER,
    REMAINDER,
    TENSOR_STATES,
    needs_master,
    scalar_of,
    state_dtype,
    stored_dtype,
)
from .errors import CheckpointError
from .files import open_file, os_errors
from .fragments import are_disjoint
from .json_codec import DTYPE_NAMES, MAX_TENSOR_NBYTES, encode, text_of
from .reading import MAX_JSON_NBYTES, Checkpoint

METADATA = ".metadata"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_OPTIMIZERS = ("optim", "optimizer")

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *(
        (_METADATA_MODULE, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name in DTYPE_NAMES.values()),
    # The folder's path, in the class of either Python
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
    ("collections", "OrderedDict"),
}


# --- writing -------------------------------------------------------------------------------------


def write(checkpoint: Checkpoint, out: Path, weights: bool) -> int:
    """Write a checkpoint, or its model's tensors by their own names alone, as a DCP folder ``out``.

    Returns the number of tensors. Nothing may be at ``out``.
    """
    model = {
        key.removeprefix("model."): checkpoint.tensor(key)
        for key in checkpoint.tensors
        if key.startswith("model.")
    }
    content: dict[str, Any] = dict(model) if weights else {"model": model}
    count = len(model)
    if not weights and checkpoint.state["groups"]:
        state: dict[str, dict[str, Tensor]] = {}
        for key in checkpoint.tensors:
            if key.startswith("optimizer."):
                name, _, kind = key.removeprefix("optimizer.").rpartition(".")
                state.setdefault(name, {})[kind] = checkpoint.tensor(key)
                count += 1
        content["optim"] = {"state": state, "param_groups": checkpoint.state["groups"]}
    part = out.with_name(f".{out.name}.part-{uuid.uuid4().hex}")
    try:
        with warnings.catch_warnings():
            # That torch.distributed is not initialised: correct in one process.
            warnings.filterwarnings("ignore", message="torch.distributed is")
            dcp_save(content, storage_writer=FileSystemWriter(part), no_dist=True)
            part.rename(out)
    except CheckpointException as error:
        (failure,) = error.failures.values()
        raise CheckpointError(f"{out}: {failure[0]}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return count


# --- reading -------------------------------------------------------------------------------------


@dataclass
class Imported:
    """What a DCP checkpoint has of ours: tensors by our keys, and groups; and what it has else."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The highest step count of a param, 0 without an optimizer."""
        steps = [int(t) for key, t in self.tensors.items() if _is_state(key, "step")]
        return max(steps, default=0)


def _is_state(key: str, state: str) -> bool:
    return key.startswith("optimizer.") and key.endswith(f".{state}")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place there")
        return super().find_class(module, name)


def read(folder: Path) -> Imported:
    """The model and the optimizer in a DCP folder, in whole tensors on the CPU.

    Raises ``CheckpointError`` naming the file or the tensor that is damaged, or tries to do harm.
    """
    source = _Source(folder)
    options: dict[str, dict[str, Any]] = {}
    groups: dict[int, dict[str, Any]] = {}
    states: dict[str, dict[str, Any]] = {}
    found, others, model = Imported(), {}, {}
    for key, path in source.paths.items():
        at = next((i for i in (0, 1) if path[i : i + 1] and path[i] in ("model", *_OPTIMIZERS)), -1)
        rest = path[at + 1 :]
        if at >= 0 and path[at] == "model":
            model[".".join(map(str, rest))] = key
        elif at >= 0 and len(rest) == 3 and rest[0] == "state":
            states.setdefault(str(rest[1]), {})[str(rest[2])] = source.value(key)
        elif at >= 0 and len(rest) == 3 and rest[0] == "param_groups" and type(rest[1]) is int:
            groups.setdefault(rest[1], {})[str(rest[2])] = source.value(key)
        elif at >= 0 and len(rest) == 1 and str(rest[0]).startswith(("state.", "param_groups.")):
            kind, _, tail = str(rest[0]).partition(".")
            name, _, last = tail.rpartition(".")
            into = states if kind == "state" else options
            into.setdefault(name, {})[last] = source.value(key)
        else:
            others[key] = path
    bare = not model
    for key, path in others.items():
        if bare and len(path) == 1 and source.is_tensor(key):
            model[key] = key
        else:
            found.left_out.append(key)
    for name, key in model.items():
        if source.is_tensor(key):
            found.tensors[f"model.{name}"] = source.value(key)
        else:
            found.left_out.append(key)
    if not found.tensors:
        raise CheckpointError(f"{folder}: no tensors of a model in it")
    # A flattened optimizer has the options of each param.
    saved = {name: group for group in groups.values() for name in _params_of(group)} | options
    for name, state in states.items():
        _take_state(found, name, state, _rule_of(saved.get(name, {})))
    found.groups = _groups(found, [groups[i] for i in sorted(groups)], options)
    return found


def _params_of(group: Mapping[str, Any]) -> list[str]:
    params = group.get("params")
    return params if isinstance(params, list) and all(isinstance(n, str) for n in params) else []


def _rule_of(group: Mapping[str, Any]) -> rules.Rule:
    return rules.of(group) if group.get("rule", "lamb") in list(rules.RULES) else rules.of({})


def _take_state(found: Imported, name: str, state: Mapping[str, Any], rule: rules.Rule) -> None:
    p = found.tensors.get(f"model.{name}")
    fits = p is not None and all(
        isinstance(state.get(kind), Tensor) and state[kind].shape == p.shape for kind in rule.states
    )
    step = scalar_of(state.get("step", 0.0), torch.float32)
    # load() refuses other counts: all that was imported would be lost with this one.
    counts = step.numel() == 1 and bool(0 <= step < math.inf and step == step.floor())
    if p is None or not fits or not counts:
        found.left_out.append(f"the optimizer's state of {name}")
        return
    found.tensors[f"optimizer.{name}.step"] = step.reshape(())
    exact = False
    for kind, value in state.items():
        ours = kind in TENSOR_STATES and isinstance(value, Tensor) and value.shape == p.shape
        if kind == REMAINDER:
            # Of a param of another dtype it says nothing.
            ours = exact = ours and (p.dtype, value.dtype) == (torch.bfloat16, torch.int16)
        if ours:
            held = stored_dtype(kind, value.dtype, p.dtype)
            found.tensors[f"optimizer.{name}.{kind}"] = value.to(held)
        elif kind != "step":
            found.left_out.append(f"{kind} of {name}")
    if needs_master(p.dtype) and not exact:  # beside a remainder, a rounded one would count
        found.tensors.setdefault(f"optimizer.{name}.{MASTER}", p.to(state_dtype(p.dtype)))


def _groups(
    found: Imported, groups: list[dict[str, Any]], options: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """The param groups with those options that their rule has; a flattened optimizer has none, but
    the options of each param: those with the same ones become a group."""
    names = [key.removeprefix("model.") for key in found.tensors if key.startswith("model.")]
    for name in names:
        if name in options:
            fitting = (g for g in groups if _without_params(g) == options[name])
            group = next(fitting, None)
            if group is None:
                groups.append(group := {**options[name], "params": []})
            group["params"].append(name)
    taken = []
    for group in groups:
        params = group.get("params")
        if isinstance(params, list) and all(name in names for name in params):
            taken.append({"params": params, **_options_of(group)})
    with_state = [name for name in names if f"optimizer.{name}.step" in found.tensors]
    if with_state and not taken:
        taken = [{"params": with_state}]
    encode(taken, "param_groups")  # raises for what cannot be saved
    return taken


def _options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group's rule reads of its entries, and what a schedule and an optimizer keep there."""
    known = {*lamb_options.RULE_DEFAULTS, *_rule_of(group).options, "initial_lr", SKIPPED}
    kept = {k: v for k, v in group.items() if k in known}
    if "rule" not in group and group.get("decoupled_weight_decay") is False:  # torch's Adam
        kept["decoupled"] = False
    return kept


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k != "params"}


class _Source:
    """A DCP folder whose metadata was checked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        path = folder / METADATA
        with open_file(path) as file, os_errors(path):
            nbytes = os.fstat(file.fileno()).st_size
            if nbytes > MAX_JSON_NBYTES:
                raise CheckpointError(f"{path}: larger than {MAX_JSON_NBYTES} bytes")
            data = file.read()
        try:
            metadata = _Unpickler(io.BytesIO(data)).load()
            if type(metadata) is not Metadata:
                raise TypeError("it holds something else")
            self._entries = {text_of(k): v for k, v in metadata.state_dict_metadata.items()}
            self._stored = dict(metadata.storage_data)
            planned = metadata.planner_data or {}
            self.paths: dict[str, tuple[Any, ...]] = {
                key: _path(planned.get(key, (key,))) for key in self._entries
            }
        except Exception as error:  # of any kind: a pickle may be anything
            raise CheckpointError(f"{path}: not the metadata of a checkpoint: {error}") from None

    def is_tensor(self, key: str) -> bool:
        return type(self._entries[key]) is TensorStorageMetadata

    def value(self, key: str) -> Any:
        """A whole tensor, or another value."""
        try:
            if self.is_tensor(key):
                return self._tensor(key)
            if type(self._entries[key]) is BytesStorageMetadata:
                return self._load(self._stored[MetadataIndex(key)], MAX_TENSOR_NBYTES)
            raise TypeError("of a kind that is not known")
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self._folder}: {key}: not understood: {error}") from None

    def _tensor(self, key: str) -> Tensor:
        entry: Any = self._entries[key]
        shape, dtype = _sizes(entry.size), entry.properties.dtype
        if dtype not in DTYPE_NAMES:
            raise TypeError(f"{dtype} is not supported")
        found = [(_sizes(c.offsets), _sizes(c.sizes)) for c in entry.chunks]
        stored = [self._stored[MetadataIndex(key, offsets)] for offsets, _ in found]
        for offsets, sizes in found:
            if not len(offsets) == len(sizes) == len(shape) or any(
                o + n > size for o, n, size in zip(offsets, sizes, shape)
            ):
                raise ValueError(f"no chunk can be {sizes} at {offsets}")
        covered = sum(math.prod(sizes) for _, sizes in found)
        if covered != math.prod(shape) or not are_disjoint(found):
            raise ValueError("its chunks do not cover it, each element once")
        nbytes = math.prod(shape) * dtype.itemsize
        if len(shape) > 64 or nbytes > sum(info.length for info in stored):
            raise ValueError(f"{nbytes} bytes are more than the files hold")
        whole = torch.empty(shape, dtype=dtype, device="cpu")
        for (offsets, sizes), info in zip(found, stored):
            part = self._load(info, None)
            if not isinstance(part, Tensor) or (tuple(part.shape), part.dtype) != (sizes, dtype):
                raise ValueError(f"{info.relative_path}: another tensor")
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes))] = part
        return whole

    def _load(self, info: Any, most: int | None) -> Any:
        name, offset, length = text_of(info.relative_path), info.offset, info.length
        if not _FILE_NAME.fullmatch(name) or not all(
            type(n) is int and n >= 0 for n in (offset, length)
        ):
            raise ValueError(f"{name!r} is no file of a checkpoint")
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{name} is compressed or encrypted: not supported")
        path = self._folder / name
        with open_file(path) as file, os_errors(path):
            if offset + length > os.fstat(file.fileno()).st_size or length > (most or length):
                raise ValueError(f"{path}: it ends before byte {offset + length}")
            file.seek(offset)
            data = io.BytesIO(file.read(length))
        with zipfile.ZipFile(data) as archive:
            # Compressed ones may grow without limit.
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError(f"{path}: compressed")
        data.seek(0)
        return torch.load(data, map_location="cpu", weights_only=True)


def _path(value: Any) -> tuple[Any, ...]:
    path = tuple(value)
    for part in path:
        if type(part) is not int:
            text_of(part)
    return path


def _sizes(value: Any) -> tuple[int, ...]:
    sizes = tuple(value)
    if not all(type(n) is int and 0 <= n < 2**62 for n in sizes):
        raise ValueError(f"{sizes} are no sizes")
    return sizes
