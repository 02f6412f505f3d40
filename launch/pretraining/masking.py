"""BERT's masking as a pure function.

Randomness is a hash of (stream, row, column), not the state of a generator. What happens to a
sequence therefore depends on nothing but the seed, the epoch and the sequence: not on the number
of ranks, the micro-batch, the order of calls or the version of a library.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pretraining.tokens import MASK_ID, SPECIAL_TOKENS

UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]


def stream_key(*parts: int | str) -> int:
    """A 63-bit number that names a stream of random numbers, e.g. ``("mask", seed, epoch)``."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def random_bits(key: int, rows: Int64, columns: int) -> UInt64:
    """``[rows, columns]`` random 64-bit numbers; element (r, c) depends on (key, rows[r], c)."""
    row_keys = _mix(np.full(len(rows), key, dtype=np.uint64) + _spread(rows))
    return _mix(row_keys[:, None] + _spread(np.arange(columns))[None, :])


def _spread(counters: npt.NDArray[np.integer]) -> UInt64:
    # splitmix64 (Steele, Lea, Flood 2014): counters a golden ratio of 2^64 apart, then `_mix`.
    return (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def _mix(x: UInt64) -> UInt64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class MaskedSequences(NamedTuple):
    """``input_ids`` [B, S] with some tokens hidden; ``positions`` [B, M] of the tokens to predict,
    ascending; ``labels`` [B, M] what stood there. All int64."""

    input_ids: Int64
    positions: Int64
    labels: Int64


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Devlin et al. 2018, section 3.1: of the tokens chosen, 80 % become [MASK], 10 % a random
    token, 10 % stay.

    The number chosen is the same in every sequence. Then the mean of the ranks' mean losses is the
    mean over the global batch, whatever the number of ranks.
    """

    fraction: float
    vocabulary: int

    def chosen(self, seq_len: int) -> int:
        """Tokens to predict in a sequence of ``seq_len``, [CLS] and [SEP] not counted."""
        return max(1, round(self.fraction * (seq_len - 2)))

    def apply(self, tokens: Int64, rows: Int64, key: int) -> MaskedSequences:
        """Mask ``tokens`` [B, S]; row b is masked as ``rows[b]`` of the stream ``key``."""
        seq_len = tokens.shape[1]
        bits = random_bits(key, rows, 3 * seq_len)
        order, action, token = np.split(bits, 3, axis=1)

        # [CLS], [SEP] and [UNK] come last, so they are chosen only where nothing else is left.
        last = np.where(tokens < len(SPECIAL_TOKENS), np.uint64(2**64 - 1), order)
        chosen = np.argsort(last, axis=1, kind="stable")[:, : self.chosen(seq_len)]
        positions = np.sort(chosen, axis=1)
        labels = np.take_along_axis(tokens, positions, axis=1)

        uniform = (np.take_along_axis(action, positions, axis=1) >> np.uint64(11)) * 2.0**-53
        ordinary = np.uint64(self.vocabulary - len(SPECIAL_TOKENS))
        drawn = np.take_along_axis(token, positions, axis=1) % ordinary
        substitute = drawn.astype(np.int64) + len(SPECIAL_TOKENS)
        shown = np.where(uniform < 0.8, MASK_ID, np.where(uniform < 0.9, substitute, labels))

        input_ids = tokens.copy()
        np.put_along_axis(input_ids, positions, shown, axis=1)
        return MaskedSequences(input_ids, positions, labels)
