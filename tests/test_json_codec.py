"""dist_lamb/checkpoint/json_codec.py: plain data as JSON."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from dist_lamb.checkpoint import CheckpointError
from dist_lamb.checkpoint.json_codec import decode, encode


def test_plain_data_comes_back_as_it_was() -> None:
    value = {
        "a": [1, 2.5, None, True, "text", b"\0\xff", (1, (2,))],
        "$odd": {3: "x", (1, 2): [float("inf")]},
        "counter": Counter({4: 1}),
        "small": torch.tensor([[1.5, -0.0]], dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "tiny": 5e-324,
    }
    found = decode(json.loads(json.dumps(encode(value, "v"))))
    for key in ("small", "scalar", "empty"):
        one, other = value.pop(key), found.pop(key)
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)
    assert found == value
    assert type(found["counter"]) is Counter
    assert type(found["a"][-1]) is tuple
    nan = decode(encode(float("nan"), ""))
    assert nan != nan
    with pytest.raises(CheckpointError, match=r"v.a\[0\] is a function"):
        encode({"a": [lambda: 0]}, "v")
    with pytest.raises(CheckpointError, match="too large to save here"):
        encode(torch.zeros(2**23), "v")
    for bad in (
        {"$tensor": ["float32", [2], "AAAA"]},
        {"$dict": 3},
        {"$new": 1},
        {"$a": 1, "b": 2},
    ):
        with pytest.raises(CheckpointError):
            decode(bad)
