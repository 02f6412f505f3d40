"""Encoding of Python values as JSON and back, with their types.

No code can be stored, so loading runs none.
"""

from __future__ import annotations

import base64
import ctypes
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError

#: Larger tensors belong among the checkpoint's tensors, not in a JSON file.
MAX_TENSOR_NBYTES = 2**24

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    )
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def encode(value: Any, where: str) -> Any:
    """``value`` in JSON's types; other types become an object with one key, ``$<type>``.

    Raises ``CheckpointError`` for a value that is neither a number, text, bytes, a small tensor,
    nor a list, tuple, dict or Counter of such. It names the path to the value, from ``where`` on.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, bytes):
        return {"$bytes": _base64(value)}
    if isinstance(value, Tensor):
        return {"$tensor": _encode_tensor(value, where)}
    if isinstance(value, (list, tuple)):
        items = [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        simple = all(isinstance(key, str) and not key.startswith("$") for key in value)
        if simple and not isinstance(value, Counter):
            return {key: encode(item, f"{where}.{key}") for key, item in value.items()}
        pairs = [
            [encode(key, f"{where}: a key"), encode(item, f"{where}[{key!r}]")]
            for key, item in value.items()
        ]
        return {"$counter" if isinstance(value, Counter) else "$dict": pairs}
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which cannot be saved; numbers, text, tensors, "
        "and lists, tuples and dicts of them can"
    )


def _encode_tensor(value: Tensor, where: str) -> list[Any]:
    if value.dtype not in DTYPE_NAMES or value.layout != torch.strided:
        raise CheckpointError(f"{where} is a {value.layout} tensor of {value.dtype}: not supported")
    if value.nbytes > MAX_TENSOR_NBYTES:
        raise CheckpointError(
            f"{where} is a tensor of {value.nbytes} bytes, too large to save here"
        )
    data = bytes(memory_of(value.detach().cpu().contiguous()))
    return [DTYPE_NAMES[value.dtype], list(value.shape), _base64(data)]


def decode(value: Any) -> Any:
    """The inverse of :func:`encode`. Tensors are on the CPU.

    Raises ``CheckpointError`` if ``value`` is no result of ``encode``.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    tagged = [key for key in value if key.startswith("$")]
    if not tagged:
        return {key: decode(item) for key, item in value.items()}
    if len(value) != 1 or tagged[0] not in _DECODERS:
        raise CheckpointError(f"unknown type {tagged[0]!r}")
    try:
        return _DECODERS[tagged[0]](value[tagged[0]])
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"not a {tagged[0]!r}: {error}") from None


def _decode_tensor(value: Any) -> Tensor:
    dtype, shape, data = value
    t = torch.empty([int(size) for size in shape], dtype=DTYPES[dtype])
    memory_of(t)[:] = base64.b64decode(data)
    return t


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$bytes": base64.b64decode,
    "$tensor": _decode_tensor,
    "$tuple": lambda items: tuple(decode(item) for item in items),
    "$dict": lambda pairs: {decode(key): decode(item) for key, item in pairs},
    "$counter": lambda pairs: Counter({decode(key): decode(item) for key, item in pairs}),
}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def memory_of(t: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy (and without numpy)."""
    array = (ctypes.c_char * t.nbytes).from_address(t.data_ptr() if t.nbytes else 0)
    array._tensor = t  # type: ignore[attr-defined]  # keeps the memory alive
    return memoryview(array).cast("B")
