"""The model: Hugging Face BERT, with the vocabulary projection on the masked positions alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from pretraining.config import DataConfig, ModelConfig
from pretraining.tokens import PAD_ID


class PretrainBert(BertForMaskedLM):
    """``BertForMaskedLM`` with another ``forward``; parameters and state dict are its own, so
    ``BertForMaskedLM`` loads what is trained here."""

    def forward(
        self, input_ids: Tensor, positions: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predict ``labels`` [B, M], the tokens hidden at ``positions`` [B, M] of ``input_ids``
        [B, S].

        Returns:
            Cross-entropy of each in nats, [B, M] float32, and the logits [B, M, vocabulary].
        """
        hidden = self.bert(input_ids).last_hidden_state
        batch, seq_len, width = hidden.shape
        starts = torch.arange(0, batch * seq_len, seq_len, device=hidden.device)
        # All S positions would make the head the larger part of a small model's work.
        masked = hidden.reshape(-1, width).index_select(0, (starts[:, None] + positions).flatten())
        logits = self.cls(masked)
        losses = F.cross_entropy(logits.float(), labels.flatten(), reduction="none")
        return losses.view_as(labels), logits.view(*labels.shape, -1)


def build_model(model: ModelConfig, data: DataConfig, seed: int, device: torch.device) -> nn.Module:
    """``PretrainBert`` with random weights that depend on ``seed`` alone, not on the device."""
    torch.manual_seed(seed)
    bert: nn.Module = PretrainBert(
        BertConfig(
            vocab_size=data.vocab_size,
            pad_token_id=PAD_ID,
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            intermediate_size=model.intermediate_size,
            max_position_embeddings=model.max_position_embeddings,
            hidden_dropout_prob=model.hidden_dropout_prob,
            attention_probs_dropout_prob=model.attention_probs_dropout_prob,
            initializer_range=model.initializer_range,
        )
    )
    return bert.to(device)


def train_flops(model: ModelConfig, data: DataConfig) -> float:
    """Floating-point operations of forward and backward for one token, a multiply-add as two.

    Matrix products alone, backward as twice forward: the layers' weights, attention over
    ``seq_len`` positions, and the head at the masked positions.
    """
    width, inner = model.hidden_size, model.intermediate_size
    layer = 4 * width * width + 2 * width * inner + 2 * data.seq_len * width
    head = data.mask_fraction * (width * width + width * data.vocab_size)
    return 6.0 * (model.num_hidden_layers * layer + head)


def compile_layers(model: nn.Module) -> None:
    """Compile every encoder layer in place, by one graph for all: names of params stay, and what
    wraps a layer afterwards (FSDP2, ShardedLamb's waits) stays outside of the graph."""
    for layer in model.get_submodule("bert.encoder.layer").children():
        layer.compile()
