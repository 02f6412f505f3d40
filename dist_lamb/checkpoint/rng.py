"""The state of random number generators as a tensor: ``rng``, [ranks, n] bytes, a row a rank."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .fragments import Fragment
from .json_codec import decode, encode, memory_of, parse
from .reading import Checkpoint

_ROW_NBYTES = 2**15


def to_save(rank: int, world_size: int, device: torch.device) -> Fragment:
    """This rank's row of ``rng``: the states of torch's, Python's and NumPy's generators."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if "numpy" in sys.modules:
        algorithm, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [algorithm, keys.tolist(), *rest]
    row = torch.full((_ROW_NBYTES,), ord(" "), dtype=torch.uint8, device="cpu")
    text = json.dumps(encode(state, "rng")).encode()
    memory_of(row)[: len(text)] = text
    return Fragment((world_size, _ROW_NBYTES), (_ROW_NBYTES, 1), rank * _ROW_NBYTES, row)


class Generators:
    """The generators' states in a row that :func:`to_save` returned, checked.

    Raises ``CheckpointError`` if one of them is none.
    """

    def __init__(self, row: Tensor, device: torch.device) -> None:
        self._device = device
        try:
            state = decode(parse(bytes(memory_of(row))))
            self._torch, self._python = state["torch"], state["python"]
            self._cuda = state.get("cuda") if device.type == "cuda" else None
            self._numpy = state.get("numpy") if "numpy" in sys.modules else None
            # Generators nobody uses: theirs raise the same errors.
            torch.Generator().set_state(self._torch)
            random.Random().setstate(self._python)
            if self._cuda is not None:
                torch.Generator(device).set_state(self._cuda)
            if self._numpy is not None:
                self._numpy = self._numpy_state(*self._numpy)
                sys.modules["numpy"].random.RandomState().set_state(self._numpy)
        except CheckpointError:
            raise
        except Exception as error:  # of any kind: the libraries' own
            raise CheckpointError(f"rng: no state of random number generators: {error}") from None

    @staticmethod
    def _numpy_state(algorithm: str, keys: list[int], pos: int, *rest: Any) -> tuple[Any, ...]:
        # NumPy would read beyond the keys.
        if algorithm != "MT19937" or len(keys) != 624 or not 0 <= pos <= 624:
            raise ValueError("not a state of NumPy's MT19937")
        numpy = sys.modules["numpy"]
        return (algorithm, numpy.array(keys, dtype=numpy.uint32), pos, *rest)

    def restore(self) -> None:
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


def fits(checkpoint: Checkpoint, world_size: int) -> bool:
    """Whether there are as many rows as ranks."""
    entry = checkpoint.tensors.get("rng")
    return entry is not None and (entry.shape, entry.dtype) == (
        (world_size, _ROW_NBYTES),
        torch.uint8,
    )


def read(checkpoint: Checkpoint, rank: int, device: torch.device) -> Generators:
    """Those of a rank. Raises ``CheckpointError`` if its row is damaged."""
    row = checkpoint.region("rng", (rank, 0), (1, _ROW_NBYTES)).view(-1)
    try:
        return Generators(row, device)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: row {rank} of {error}") from None
