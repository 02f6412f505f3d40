"""DTensors made of whole tensors, and whole tensors of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from dist_lamb import Lamb

#: name and tensor -> placements on a mesh, or None: stays a plain tensor
How = Callable[[str, Tensor], Sequence[Any] | None]


def placed(t: Tensor, mesh: DeviceMesh, placements: Sequence[Any] | None) -> Tensor:
    if placements is None:
        return t
    return distribute_tensor(t.detach(), mesh, placements, src_data_rank=None)


def whole(t: Tensor) -> Tensor:
    t = t.detach()
    if isinstance(t, DTensor) and t.device.type != t.device_mesh.device_type:  # offloaded
        here = t.to_local().to(t.device_mesh.device_type)
        there = DTensor.from_local(
            here, t.device_mesh, t.placements, shape=t.shape, stride=t.stride()
        )
        return there.full_tensor().to(t.device)
    # of a replica, full_tensor() is the local tensor itself
    return (t.full_tensor() if isinstance(t, DTensor) else t).clone()


def everything(params: dict[str, Tensor], optimizer: Lamb) -> dict[str, Tensor]:
    """Params, state and trust ratios, whole."""
    found = {n: whole(p) for n, p in params.items()}
    for n, p in params.items():
        found.update({f"{n} {k}": whole(v) for k, v in optimizer.state[p].items()})
    return found | {f"{n} ratio": r.clone() for n, r in optimizer.trust_ratios().items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], case: Any) -> None:
    assert got.keys() == want.keys(), (case, got.keys() ^ want.keys())
    for name, expected in want.items():
        assert torch.equal(got[name].nan_to_num(), expected.nan_to_num()), (case, name)
