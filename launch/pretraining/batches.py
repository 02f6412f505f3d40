"""Sequences, and the global batches made of them.

A batch is defined for the whole job: the samples ``[p, p + global_batch)`` of one infinite row, in
which epoch e is the corpus in an order drawn from (seed, e). Ranks and micro-batches divide it.
The position ``p`` is all there is to save, and it means the same at any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pretraining.masking import Int64, MaskedSequences, Masking, random_bits, stream_key
from pretraining.sources import CorpusError
from pretraining.tokens import CLS_ID, SEP_ID


class PackedSequences:
    """Fixed-length sequences ``[CLS] t_1 .. t_(S-2) [SEP]`` cut from one row of tokens.

    Documents follow one another, so no sequence is padded and no attention mask is needed. The
    tokens left over at the end are dropped.
    """

    def __init__(self, tokens: npt.NDArray[np.integer], seq_len: int, name: str) -> None:
        """
        Raises:
            CorpusError: fewer tokens than one sequence; ``name`` says of what.
        """
        body = seq_len - 2
        self._count = len(tokens) // body
        if not self._count:
            raise CorpusError(
                f"the {name} text is too small: {len(tokens)} tokens do not fill one sequence of "
                f"data.seq_len = {seq_len}; use more text or shorter sequences"
            )
        self._body = tokens[: self._count * body].reshape(self._count, body)
        self.seq_len = seq_len

    def __len__(self) -> int:
        return self._count

    def take(self, indices: Int64) -> Int64:
        """The sequences at ``indices`` [B] as token ids [B, seq_len]."""
        rows = np.empty((len(indices), self.seq_len), dtype=np.int64)
        rows[:, 0] = CLS_ID
        rows[:, 1:-1] = self._body[indices]
        rows[:, -1] = SEP_ID
        return rows


def shuffled(count: int, key: int) -> Int64:
    """A permutation of ``range(count)`` that depends on (count, key) alone."""
    return np.argsort(random_bits(key, np.arange(count), 1)[:, 0], kind="stable")


class TrainBatches:
    """This rank's part of every global batch, from the position on.

    Args:
        sequences: the training sequences.
        masking: how they are masked.
        seed: decides order and masks.
        global_batch: sequences a step over all ranks.
        micro_batch: at most this many sequences at a time on this rank.
        rank, world_size: which part.

    Raises:
        ValueError: the batch cannot be cut into equal parts; the message names the numbers.
    """

    def __init__(
        self,
        sequences: PackedSequences,
        masking: Masking,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        # Unequal parts would make the mean of the ranks' means another number than the mean.
        if global_batch % world_size:
            raise ValueError(
                f"train.global_batch = {global_batch} cannot be split evenly over "
                f"{world_size} ranks"
            )
        local_batch = global_batch // world_size
        micro_batch = min(micro_batch, local_batch)
        if local_batch % micro_batch:
            raise ValueError(
                f"train.micro_batch = {micro_batch} does not divide the {local_batch} sequences "
                f"a rank has of train.global_batch = {global_batch} at {world_size} ranks"
            )
        self.sequences = sequences
        self.masking = masking
        self.seed = seed
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.micro_batches = local_batch // micro_batch
        self.position = 0
        self._first = rank * local_batch
        #: makes the next micro-batch beside the device's work on this one; one at a time
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[MaskedSequences]] | None = None
        self._orders: dict[int, Int64] = {}

    def next_batch(self) -> Iterator[MaskedSequences]:
        """Move on by one global batch; this rank's micro-batches of it, made as they are taken."""
        first = self.position + self._first
        self.position += self.global_batch
        starts = range(first, first + self.micro_batches * self.micro_batch, self.micro_batch)
        following = [*starts[1:], first + self.global_batch]
        return (self._take(start, after) for start, after in zip(starts, following, strict=True))

    def _take(self, start: int, following: int) -> MaskedSequences:
        """The micro-batch from sample ``start`` on; the one from ``following`` on is begun."""
        ahead = self._ahead
        # After load_state_dict() another one was begun. (It is over before this one is made: the
        # orders of epochs are its too.)
        made = ahead[1].result() if ahead else None
        if ahead is None or ahead[0] != start or made is None:
            made = self._masked(np.arange(start, start + self.micro_batch))
        after = np.arange(following, following + self.micro_batch)
        self._ahead = following, self._worker.submit(self._masked, after)
        return made

    def _masked(self, samples: Int64) -> MaskedSequences:
        epochs, indices = np.divmod(samples, len(self.sequences))
        parts = []
        for epoch in np.unique(epochs).tolist():
            rows = self._order(epoch)[indices[epochs == epoch]]
            key = stream_key("mask", self.seed, epoch)
            parts.append(self.masking.apply(self.sequences.take(rows), rows, key))
        return MaskedSequences(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _order(self, epoch: int) -> Int64:
        if epoch not in self._orders:
            # A batch reaches from one epoch into the next, seldom further.
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            key = stream_key("order", self.seed, epoch)
            self._orders[epoch] = shuffled(len(self.sequences), key)
        return self._orders[epoch]

    def state_dict(self) -> dict[str, int]:
        epoch, index = divmod(self.position, len(self.sequences))
        return {
            "epoch": epoch,
            "index": index,
            "sequences": len(self.sequences),
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the state is of other data or another seed, so it has no meaning here.
        """
        own = self.state_dict()
        for name in ("sequences", "seed"):
            if state[name] != own[name]:
                raise ValueError(
                    f"cannot resume the data position: it was saved with {name} = {state[name]}, "
                    f"this run has {name} = {own[name]}"
                )
        self.position = state["epoch"] * len(self.sequences) + state["index"]


class EvalBatch(NamedTuple):
    """Masked sequences and the weight of each: 1.0, or 0.0 for one that only fills the batch."""

    sequences: MaskedSequences
    weights: npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class HeldOutBatches:
    """The same held-out sequences under the same masks at every evaluation.

    Every rank gets the same number of batches of the same shape, so that collectives inside a
    forward pass match; sequences that only fill the last batches have weight 0.
    """

    sequences: PackedSequences
    masking: Masking
    count: int
    batch: int
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[EvalBatch]:
        count = min(self.count, len(self.sequences))
        chosen = np.sort(shuffled(len(self.sequences), stream_key("held-out order"))[:count])
        share = -(-count // self.world_size)
        for start in range(self.rank * share, (self.rank + 1) * share, self.batch):
            wanted = np.arange(start, min(start + self.batch, (self.rank + 1) * share))
            rows = chosen[np.minimum(wanted, count - 1)]
            masked = self.masking.apply(
                self.sequences.take(rows), rows, stream_key("held-out mask")
            )
            yield EvalBatch(masked, (wanted < count).astype(np.float64))


def to_device(arrays: MaskedSequences, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``input_ids`` [B, S], ``positions`` [B, M], ``labels`` [B, M] as int64 tensors."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cuda":
        # From pageable memory the copy would block the host until the device has finished.
        tensors = [tensor.pin_memory() for tensor in tensors]
    input_ids, positions, labels = (t.to(device, non_blocking=True) for t in tensors)
    return input_ids, positions, labels
