"""Every private torch API that this package uses: what it does, and what happens without it.

The names are looked up where they are used, so a torch that lacks one still imports; each was
there in torch 2.11 and 2.13. ``torch._foreach_*`` is used elsewhere: torch.optim rests on it too.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

# --- tensors --------------------------------------------------------------------------------------


def guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """``check(*others)``: the same dtypes, devices, sizes, strides and negative bits, in order?

    ``torch._C._dynamo.guards.TensorGuards`` (since 2.0), torch.compile's own check: 0.1 us a tensor
    and True only if all are the same. Without it: a loop in Python, five times as slow.
    """

    def described(ts: Sequence[Tensor]) -> list[Any]:
        return [(t.dtype, t.device, t.shape, t.stride(), t.is_neg()) for t in ts]

    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes: Any = [list(t.shape) for t in tensors]
        strides: Any = [list(t.stride()) for t in tensors]
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        if guards.check(*tensors):
            check: Callable[..., bool] = guards.check
            return check
    except Exception:  # private: it may change in any way
        pass
    expected = described(tensors)
    return lambda *others: described(others) == expected


#: A tensor's count of in-place changes (``Tensor._version``, since 0.4; torch.autograd's own check
#: of saved tensors rests on it). There is no public way to learn of ``p.copy_()`` between steps.
version: Callable[[Tensor], int] = attrgetter("_version")

#: This rank's piece of a DTensor, without the 5 us of ``to_local()`` (since 2.5).
local_tensor: Callable[[Any], Any] = attrgetter("_local_tensor")

#: Mesh, placements and shape of a DTensor as one object (since 2.5), compared in one go.
spec: Callable[[Any], Any] = attrgetter("_spec")


def wrap_local(whole: Any, local: Tensor) -> Any:
    """Give a DTensor another local tensor (``_local_tensor``, since 2.5).

    ``DTensor.from_local()`` would move what is offloaded to the CPU to the mesh's device.
    """
    whole._local_tensor = local
    return whole


def fsdp_flattened(p: Tensor) -> bool:
    """Whether ``p`` is FSDP1's (``_fsdp_flattened``, since 1.12); without it not refused."""
    return bool(getattr(p, "_fsdp_flattened", False))


# --- profiling ------------------------------------------------------------------------------------


_profiler_enabled = getattr(torch.autograd, "_profiler_enabled", lambda: True)
_NO_LABEL = nullcontext()


def phase(name: str) -> AbstractContextManager[Any]:
    """A label in profiles, ``record_function``, only while something profiles.

    ``torch.autograd._profiler_enabled`` (since 1.8). Without it the label is always made: 5 us.
    """
    if _profiler_enabled():
        return torch.profiler.record_function(f"dist_lamb: {name}")
    return _NO_LABEL


# --- streams --------------------------------------------------------------------------------------


def current_stream_number(device_index: int) -> int:
    """The current stream as a number (``torch._C._cuda_getCurrentRawStream``, since 1.10).

    Without it: of a ``Stream`` object, which takes 10 us to make.
    """
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if raw is None:
        return torch.cuda.current_stream(device_index).cuda_stream
    number: int = raw(device_index)
    return number


# --- autograd -------------------------------------------------------------------------------------


def backward_number() -> int:
    """Which backward is running (``torch._C._current_graph_task_id``, since 1.13), or -1.

    Needed: gradients could not be reduced inside backward without it.
    """
    return torch._C._current_graph_task_id()


def running_node() -> Any:
    """The backward node that is running (``torch._C._current_autograd_node``, since 2.1), or None.

    Needed: a reentrant checkpoint's backward would pass for the end of the outer one.
    """
    return torch._C._current_autograd_node()


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Call once the running backward ends (``_execution_engine.queue_callback``, since 0.4).

    Needed, as in FSDP2 and DistributedDataParallel, which use it for the same purpose.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(call)


def leaves(output: Any) -> list[Any]:
    """What a nested container holds (``torch.utils._pytree.tree_leaves``, since 2.0)."""
    from torch.utils._pytree import tree_leaves

    return tree_leaves(output)


# --- loss scaling ---------------------------------------------------------------------------------


def asked_by_sharded_scaler() -> bool:
    """Whether a ShardedGradScaler has called the caller's caller (``sys._getframe``, since 2.1).

    That is how ``GradScaler.step`` asks an optimizer whether it handles loss scales itself, and it
    gives nothing away of itself. Without it: no, as of a plain GradScaler.
    """
    scaler: Any = None
    if hasattr(sys, "_getframe"):
        scaler = sys._getframe(2).f_locals.get("self")
    return any(cls.__name__ == "ShardedGradScaler" for cls in type(scaler).__mro__)


# --- compiled modules -----------------------------------------------------------------------------


def compiled_call(module: nn.Module) -> Any:
    """What a compiled module runs when called (``_compiled_call_impl``, since 2.2), or None.

    Without it, ``overlap_gather`` would take a compiled module for one that is not.
    """
    return getattr(module, "_compiled_call_impl", None)


def set_compiled_call(module: nn.Module, call: Any) -> None:
    """Set it: a forward pre-hook would be compiled with the module, or break its graph."""
    module._compiled_call_impl = call


def outside_graphs(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step``, which torch.compile leaves out of its graphs: around it they break.

    ``torch._disable_dynamo`` (since 2.1), as torch.optim's own ``add_param_group`` has it; the
    public ``torch.compiler.disable`` would import torch._dynamo with this package. Without it: as
    it is, and a compiled train step fails on what a step keeps.
    """
    disable = getattr(torch, "_disable_dynamo", None)
    return step if disable is None else cast(Callable[..., Any], disable(step))


def is_optimized_module(module: nn.Module) -> bool:
    """Whether ``torch.compile(module)`` returned it (``torch._dynamo.eval_frame``, since 2.0)."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    return eval_frame is not None and isinstance(module, eval_frame.OptimizedModule)


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would call on CPUs (``torch._inductor``, since 2.3).

    Without it: the first of the usual ones that is there.
    """
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        return shutil.which(get_cpp_compiler())
    except Exception:  # its error for "no compiler" is no stable class either
        return next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)


# --- process groups -------------------------------------------------------------------------------


def default_store() -> Any:
    """What all ranks share beside a network (``distributed_c10d._get_default_store``, since 1.7).

    Needed: ranks tell each other there what they are about to do.
    """
    return torch.distributed.distributed_c10d._get_default_store()  # noqa: TID251


def timeout_of(group: Any) -> timedelta:
    """After how long a collective of a group fails (``options._timeout`` of its backends, since
    2.0). Without it: torch's default for all."""
    for device in getattr(group, "_device_types", ()):
        timeout = getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
        if timeout is not None:
            return cast(timedelta, timeout)
    return torch.distributed.constants.default_pg_timeout  # noqa: TID251


def gpu_backend(group: Any) -> str:
    """Name of the backend of a process group for GPU tensors (``_get_backend``, since 2.0)."""
    try:
        return str(group._get_backend(torch.device("cuda")).name())
    except (AttributeError, RuntimeError):
        return ""  # no backend for GPUs
