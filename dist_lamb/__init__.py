"""LAMB for PyTorch that stays LAMB however the model is sharded.

::

    from dist_lamb import Lamb, param_groups

    opt = Lamb(param_groups(model, weight_decay=0.01), lr=1e-3)    # a torch.optim.Optimizer
    model(x).loss.backward()
    opt.step()
    opt.zero_grad()

Lamb
    One GPU or CPU, DistributedDataParallel, FSDP2, HSDP, tensor parallel: tensors and DTensors.
ShardedLamb
    ZeRO-1/2 in a loop of one's own: it averages gradients itself, no DDP around the model.
dist_lamb.deepspeed_adapter.DeepSpeedLamb
    DeepSpeed's ZeRO 0-3, by instance or by its name in the JSON config.
param_groups, preset
    Groups by name (what decays, what gets a trust ratio); options of known recipes.
schedules
    Warm-up and decay as in the paper, and the lr of another batch size.
dist_lamb.checkpoint
    Saves and loads at any number of ranks, by any of these but DeepSpeed; the command ``dist-lamb``
    inspects, verifies, exports and imports.
dist_lamb.integrations
    Saves a ``ShardedLamb`` under Hugging Face's Trainer and Accelerate.
GradientNoiseScale, gradient_noise_scale
    How large a batch still pays (arXiv 1812.06162).

``help(dist_lamb.Lamb)`` has every option with its meaning. Norms are L2 norms of whole tensors; the
equations are those of arXiv 1904.00962 v5, in ``dist_lamb/rules/lamb.py`` beside the paper's names.
"""

from . import schedules
from .lamb import Lamb
from .noise_scale import GradientNoiseScale, gradient_noise_scale
from .options import preset
from .param_groups import param_groups
from .sharded import ShardedLamb

__all__ = [
    "GradientNoiseScale",
    "Lamb",
    "ShardedLamb",
    "gradient_noise_scale",
    "param_groups",
    "preset",
    "schedules",
]
__version__ = "0.1.0"
