"""What is trained in ``bench.py train``: BERT of several sizes, on drawn tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pretraining.config import DataConfig, ModelConfig
from pretraining.engine_fsdp2 import layers_of
from torch import Tensor, nn

from .agreement import agreed
from .train_contenders import Contender, Setting, Training


@dataclass(frozen=True, kw_only=True)
class Work:
    """A model's size and the batch of one rank."""

    hidden: int
    layers: int
    heads: int
    vocab: int
    micro_batch: int
    seq_len: int
    initializer_range: float = 0.02

    def template(self) -> nn.Module:
        """The model on the CPU in float32; the same on every rank. Copies of it are trained."""
        from pretraining.model import build_model  # transformers, which bench.py step goes without

        model = ModelConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden,
            max_position_embeddings=max(512, self.seq_len),
            # Dropout would make every contender's numbers, and its work, its own.
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=self.initializer_range,
        )
        data = DataConfig(vocab_size=self.vocab, seq_len=self.seq_len)
        return build_model(model, data, seed=0, device=torch.device("cpu"))

    def batches(
        self, count: int, rank: int, device: torch.device, seed: int = 0
    ) -> Iterator[tuple[Tensor, ...]]:
        """``count`` batches of this rank: (input ids [B, S], positions and labels [B, M]).

        Small ids are frequent, and every second token is its left neighbour plus one, so there is
        something to learn. 15 % of the tokens are masked.
        """
        from pretraining.tokens import MASK_ID, SPECIAL_TOKENS

        generator = torch.Generator().manual_seed(1_000_003 * seed + rank)
        first = len(SPECIAL_TOKENS)
        kinds, masked = self.vocab - first, max(1, round(0.15 * self.seq_len))
        for _ in range(count):
            shape = (self.micro_batch, self.seq_len)
            ids = (kinds ** torch.rand(shape, generator=generator)).long() - 1
            right = ids[:, 1::2]
            right.copy_((ids[:, 0::2][:, : right.shape[1]] + 1) % kinds)
            ids += first
            positions = torch.rand(shape, generator=generator).argsort(dim=1)[:, :masked]
            labels = ids.gather(1, positions)
            hidden = ids.scatter(1, positions, MASK_ID)
            yield tuple(t.to(device) for t in (hidden, positions, labels))


def placed(template: nn.Module, setting: Setting) -> nn.Module:
    """A copy of ``template`` on the device and in the dtype of ``setting``."""
    module = copy.deepcopy(template).to(setting.device, setting.dtype).train()
    if setting.compiled:
        for layer in layers_of(module):
            layer.compile()
    return module


def prepared(contender: Contender, template: nn.Module, setting: Setting) -> Training:
    """``contender`` around a copy of ``template``; a collective.

    Raises:
        Failed: on every rank, if it cannot be made on any. Here rather than in the first step,
            which the other ranks would begin.
    """
    return agreed(lambda: contender.make(placed(template, setting), setting))


WORKS = {
    # With 0.02 so narrow a model's attention is flat, and the gradients of its queries are noise.
    "tiny": Work(
        hidden=64,
        layers=2,
        heads=2,
        vocab=512,
        micro_batch=4,
        seq_len=16,
        initializer_range=0.1,
    ),
    "base": Work(hidden=768, layers=12, heads=12, vocab=30522, micro_batch=32, seq_len=128),
    "large": Work(hidden=1024, layers=24, heads=16, vocab=30522, micro_batch=32, seq_len=128),
}
