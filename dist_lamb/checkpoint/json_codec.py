"""Encoding of Python values as JSON and back, with their types.

No code can be stored, so loading runs none.
"""

from __future__ import annotations

import base64
import ctypes
import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError

#: Larger tensors belong among the checkpoint's tensors, not in a JSON file.
MAX_TENSOR_NBYTES = 2**24
#: Lists in lists in lists. Python itself gives up at some hundred.
MAX_DEPTH = 100

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


def parse(data: bytes) -> Any:
    """JSON. Raises ``ValueError`` if it is none, also for Infinity and NaN, which are not in it."""
    return json.loads(data, parse_constant=_no_constant)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def text_of(value: Any) -> str:
    """``value``, if it is text that can be written down, without lone surrogates."""
    if type(value) is not str:
        raise ValueError(f"text expected, not a {type(value).__name__}")
    value.encode()
    return value


def encode(value: Any, where: str, depth: int = 0) -> Any:
    """``value`` in JSON's types; other types become an object with one key, ``$<type>``.

    Raises ``CheckpointError`` for a value that is neither a number, text, bytes, a small tensor,
    nor a list, tuple, dict or Counter of such. It names the path to the value, from ``where`` on.
    """
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{where[:200]}... is nested more than {MAX_DEPTH} times")
    if isinstance(value, str):
        try:
            return text_of(str(value))
        except ValueError:
            raise CheckpointError(f"{where} is text with lone surrogates, {value!r}") from None
    if value is None or isinstance(value, bool):
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
        items = [encode(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        simple = all(isinstance(key, str) and not key.startswith("$") for key in value)
        if simple and not isinstance(value, Counter):
            return {
                encode(key, f"{where}: a key"): encode(item, f"{where}.{key}", depth + 1)
                for key, item in value.items()
            }
        pairs = [
            [
                encode(key, f"{where}: a key", depth + 1),
                encode(item, f"{where}[{key!r}]", depth + 1),
            ]
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


def decode(value: Any, depth: int = 0) -> Any:
    """The inverse of :func:`encode`. Tensors are on the CPU.

    Raises ``CheckpointError`` if ``value`` is no result of ``encode``.
    """
    if depth > MAX_DEPTH:
        raise CheckpointError(f"nested more than {MAX_DEPTH} times")
    try:
        if isinstance(value, list):
            return [decode(item, depth + 1) for item in value]
        if isinstance(value, str):
            return text_of(value)
        if not isinstance(value, dict):
            return value
        tagged = [key for key in value if key.startswith("$")]
        if not tagged:
            return {text_of(key): decode(item, depth + 1) for key, item in value.items()}
        if len(value) != 1 or tagged[0] not in _DECODERS:
            raise CheckpointError(f"unknown type {tagged[0]!r}")
        return _DECODERS[tagged[0]](value[tagged[0]], depth + 1)
    except (TypeError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"not understood: {error}") from None


def _decode_float(text: str, _: int) -> float:
    value = float(text_of(text))
    if math.isfinite(value):
        raise ValueError(f"{text!r} is not written so")
    return value


def _decode_bytes(text: str, _: int = 0) -> bytes:
    return base64.b64decode(text_of(text), validate=True)


def _decode_tensor(value: Any, _: int) -> Tensor:
    name, shape, text = value
    dtype, data = DTYPES[text_of(name)], _decode_bytes(text)
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise ValueError("a tensor's shape expected")
    # Before there is memory for it. Sizes other than 0 count even if another one is 0.
    numel, most = math.prod(shape), math.prod(max(1, n) for n in shape)
    if numel * dtype.itemsize != len(data) or len(data) > MAX_TENSOR_NBYTES:
        raise ValueError(f"a tensor with {len(data)} bytes, of shape {shape}")
    if len(shape) > 64 or most >= 2**62:
        raise ValueError("no tensor can have its shape")
    t = torch.empty(shape, dtype=dtype, device="cpu")
    memory_of(t)[:] = data
    return t


def _decode_pairs(pairs: Any, depth: int) -> list[tuple[Any, Any]]:
    return [(decode(key, depth), decode(item, depth)) for key, item in pairs]


def _decode_counter(pairs: Any, depth: int) -> Counter[Any]:
    counts = dict(_decode_pairs(pairs, depth))
    if not all(type(count) is int for count in counts.values()):
        raise ValueError("counts expected")
    return Counter(counts)


_DECODERS: dict[str, Callable[[Any, int], Any]] = {
    "$float": _decode_float,
    "$bytes": _decode_bytes,
    "$tensor": _decode_tensor,
    "$tuple": lambda items, depth: tuple(decode([*items], depth - 1)),
    "$dict": lambda pairs, depth: dict(_decode_pairs(pairs, depth)),
    "$counter": _decode_counter,
}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def memory_of(t: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy (and without numpy)."""
    array = (ctypes.c_char * t.nbytes).from_address(t.data_ptr() if t.nbytes else 0)
    array._tensor = t  # type: ignore[attr-defined]  # keeps the memory alive
    return memoryview(array).cast("B")
