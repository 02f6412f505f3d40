"""LAMB as a DeepSpeed client optimizer, exact under ZeRO-0, 1, 2 and 3::

    register()  # once, on every rank
    config = recommended_config(stage=2) | {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "DeepSpeedLamb", "params": {"lr": 6e-3, "no_decay_1d": True}}
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)

or with an instance, ``optimizer=DeepSpeedLamb(param_groups(model), lr=6e-3)``, and no "optimizer"
in the config.

DeepSpeed hands an optimizer flat slices of many joined params. A rule that works tensor by tensor
then takes each slice for one tensor: another algorithm, and no error. Here every ``step()`` finds
out which params' pieces it was given (``layouts.py``), and norms are those of
the whole params: one all-reduce per ``step()`` and process group.
"""

from .config import check_config, recommended_config
from .layouts import UnknownLayout
from .optimizer import DeepSpeedLamb
from .registration import register

__all__ = ["DeepSpeedLamb", "UnknownLayout", "check_config", "recommended_config", "register"]
