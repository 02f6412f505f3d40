"""The loss of R models at once: their weights stacked, the model mapped over them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from pretraining.config import DataConfig, ModelConfig
from pretraining.model import build_decoder, build_model
from torch import Tensor, nn
from torch.func import functional_call, vmap

Params = dict[str, Tensor]
Inputs = tuple[Tensor, ...]


def build(
    architecture: str, model: ModelConfig, data: DataConfig, seed: int, device: torch.device
) -> nn.Module:
    return (build_decoder if architecture == "decoder" else build_model)(model, data, seed, device)


class StackedLoss:
    """``(params, inputs) -> losses [R]``, the mean loss of each model in nats.

    ``apart`` gives every model its own inputs [R, B, ...], ``alike`` all of them the same ones
    [B, ...]; ``compiled`` is ``apart`` through torch.compile, once for each shape.
    """

    def __init__(
        self,
        architecture: str,
        model: ModelConfig,
        data: DataConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._skeleton = build(architecture, model, data, 0, device)
        self._buffers = dict(self._skeleton.named_buffers())
        self._dtype = dtype
        self.apart: Callable[[Params, Inputs], Tensor] = vmap(self._loss, randomness="error")
        self.alike: Callable[[Params, Inputs], Tensor] = vmap(
            self._loss, in_dims=(0, None), randomness="error"
        )

    @functools.cached_property
    def compiled(self) -> Callable[[Params, Inputs], Tensor]:
        # One for each shape of a pack, of which there are more than dynamo's limit of 8.
        torch._dynamo.config.recompile_limit = 64
        return torch.compile(self.apart, fullgraph=True, dynamic=False)

    def _loss(self, params: Params, inputs: Inputs) -> Tensor:
        # Not autocast: under vmap a linear layer becomes a product and a sum, and the sum with a
        # float32 bias would make all activations, and attention, float32.
        cast = {name: p.to(self._dtype) for name, p in params.items()}
        out = functional_call(self._skeleton, {**cast, **self._buffers}, inputs)
        return (out[0] if isinstance(out, tuple) else out).mean()


@functools.cache
def stacked_loss(
    architecture: str,
    model: ModelConfig,
    data: DataConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> StackedLoss:
    """One for all packs of a process: another one would be compiled anew."""
    if device.type == "cuda":
        # vmap splits and merges batches for the other kernels; not, in all versions, for cuDNN's.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return StackedLoss(architecture, model, data, device, dtype)
