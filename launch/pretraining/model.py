"""The models: Hugging Face BERT, with the vocabulary projection on the masked positions alone, and
a pre-norm decoder of the same size for launch/study.py."""

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


class PretrainDecoder(nn.Module):
    """A causal transformer with normalisation before each block (GPT-2's shape, Radford et al.
    2019), without dropout, and with the input embedding as its vocabulary projection."""

    def __init__(self, model: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        width = model.hidden_size
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.empty(model.max_position_embeddings, width))
        self.blocks = nn.ModuleList(_Block(model) for _ in range(model.num_hidden_layers))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Each block adds twice to the residual stream; its variance would grow with depth.
                outer = name.endswith("out.weight")
                scale = (2 * model.num_hidden_layers) ** -0.5 if outer else 1.0
                nn.init.normal_(parameter, std=model.initializer_range * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Cross-entropy, in nats, of each token of ``input_ids`` [B, S] but the first, given those
        before it: [B, S - 1] float32."""
        x = self.tokens(input_ids) + self.positions[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)[:, :-1]
        labels = input_ids[:, 1:]
        losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        return losses.view_as(labels)


class _Block(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width = model.hidden_size
        self.heads = model.num_attention_heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, model.intermediate_size)
        self.mlp_out = nn.Linear(model.intermediate_size, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))


def build_decoder(
    model: ModelConfig, data: DataConfig, seed: int, device: torch.device
) -> nn.Module:
    """``PretrainDecoder`` with random weights that depend on ``seed`` alone, not on the device."""
    torch.manual_seed(seed)
    return PretrainDecoder(model, data.vocab_size).to(device)
