"""LAMB as a DeepSpeed client optimizer, exact under ZeRO-0, 1, 2 and 3.

    optimizer = DeepSpeedLamb(param_groups(model), lr=1e-3)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=recommended_config(stage=2) | {...}
    )

DeepSpeed hands an optimizer flat slices of many joined params. A rule that works tensor by tensor
then takes each slice for one tensor: another algorithm, and no error. Here every ``step()`` finds
out which params' pieces it was given (``layouts.py``), and norms are those of
the whole params: one all-reduce per ``step()`` and process group.
"""

from .config import check_config, recommended_config
from .layouts import UnknownLayout
from .optimizer import DeepSpeedLamb

__all__ = ["DeepSpeedLamb", "UnknownLayout", "check_config", "recommended_config"]
