"""Parameter shapes of well-known models: what a step of an optimizer has to work through."""

from __future__ import annotations

import math

Shape = tuple[int, ...]


def bert(hidden: int, layers: int, vocab: int, positions: int = 512) -> list[Shape]:
    """BertForPreTraining: embeddings, encoder, pooler, MLM transform and NSP head."""
    h, norm = hidden, [(hidden,), (hidden,)]
    shapes: list[Shape] = [(vocab, h), (positions, h), (2, h), *norm]
    for _ in range(layers):
        shapes += [(h, h), (h,)] * 4 + norm
        shapes += [(4 * h, h), (4 * h,), (h, 4 * h), (h,)] + norm
    return shapes + [(h, h), (h,)] + [(h, h), (h,)] + norm + [(vocab,), (2, h), (2,)]


def bert_large() -> list[Shape]:
    return bert(1024, 24, 30522)


def resnet50() -> list[Shape]:
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for out, inp, k in (
                (width, channels, 1),
                (width, width, 3),
                (4 * width, width, 1),
            ):
                shapes += [(out, inp, k, k), (out,), (out,)]
            if block == 0:  # the shortcut's projection
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return shapes + [(1000, 2048), (1000,)]


def many_small() -> list[Shape]:
    """1,000 tensors of 1 to 4,096 elements."""
    return [(1 + (37 * i * i) % 4096,) for i in range(1000)]


WORKLOADS = {
    "matrices": lambda: [(1024, 1024)] * 100,
    "bert-large": bert_large,
    "bert-30m": lambda: bert(512, 8, 8192),
    "resnet-50": resnet50,
    "many-small": many_small,
}


def numel(shape: Shape) -> int:
    return math.prod(shape)
