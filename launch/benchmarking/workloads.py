"""Parameter shapes of well-known models."""

from __future__ import annotations

import math


def bert(hidden: int, layers: int, vocab: int, positions: int) -> list[tuple[int, ...]]:
    """BertForPreTraining: embeddings, encoder, pooler, MLM transform and NSP head."""
    h, norm = hidden, [(hidden,), (hidden,)]
    shapes: list[tuple[int, ...]] = [(vocab, h), (positions, h), (2, h), *norm]
    for _ in range(layers):
        shapes += [(h, h), (h,)] * 4 + norm
        shapes += [(4 * h, h), (4 * h,), (h, 4 * h), (h,)] + norm
    return shapes + [(h, h), (h,)] + [(h, h), (h,)] + norm + [(vocab,), (2, h), (2,)]


def bert_large() -> list[tuple[int, ...]]:
    return bert(1024, 24, 30522, 512)


def numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
