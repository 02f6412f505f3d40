"""Process group, device and threads of this rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pretraining.config import ConfigError, TrainConfig

T = TypeVar("T")
#: A flag in an all-reduce, and what to wait for before reading it.
Work: TypeAlias = tuple[Tensor, Any]


@dataclass(frozen=True)
class Ranks:
    """Rank and device of this process, and the number of ranks."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    def mean(self, values: Tensor) -> Tensor:
        """``values`` averaged over ranks, elementwise; on the host of every rank."""
        return self.sum(values) / self.world_size

    def sum(self, values: Tensor) -> Tensor:
        """``values`` added over ranks, elementwise; on the host of every rank."""
        dist.all_reduce(values)
        return values.cpu()

    def barrier(self) -> None:
        """Wait for every rank, on the host."""
        # On the host's memory, so through gloo: dist.barrier() would use the GPU.
        dist.all_reduce(torch.zeros(1))

    def stopping(self, asked: bool) -> Work:
        """Begin to find out whether any rank was ``asked`` to stop."""
        flag = torch.tensor([float(asked)])
        return flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)

    def from_first(self, value: T) -> T:
        """What rank 0 gave as ``value``, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def same(self, value: str) -> bool:
        """Whether every rank gave the same ``value``."""
        return len(set(self._from_each(value))) == 1

    def together(self, work: Callable[[], T], of: bool = True) -> T | None:
        """What ``work`` returns on the ranks that it is ``of``, None on others. An error of one is
        raised on all: raised there alone, it would leave the others waiting in a collective."""
        result, own = None, None
        if of:
            try:
                result = work()
            except Exception as error:
                own = error
        for error in [own, *self._from_each(own)]:
            if error is not None:
                raise error
        return result

    def _from_each(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


class StopRequest:
    """Whether this process got SIGTERM (preemption, ``kill``), SIGINT (Ctrl-C) or SIGUSR1 (a
    warning before SIGTERM).

    As a context: the signals do nothing else meanwhile, but after SIGINT the next one ends the
    process at once. torchrun passes SIGTERM and SIGINT on to every rank, a second SIGINT as
    SIGTERM; SIGUSR1 may be sent to any one of them.
    """

    def __init__(self) -> None:
        self.signal = ""

    def __enter__(self) -> StopRequest:
        self._before = {
            number: signal.signal(number, self._asked)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        }
        return self

    def _asked(self, number: int, _: object) -> None:
        self.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            # The system's own action also ends a process that waits inside a collective.
            for again in (signal.SIGINT, signal.SIGTERM):
                signal.signal(again, signal.SIG_DFL)
            if os.environ.get("LOCAL_RANK", "0") == "0":
                # Not print(): its buffer may be in use. The first part shows the cursor again,
                # which a live bar has hidden and a process that ends at once cannot.
                cursor = b"\x1b[?25h" if os.isatty(2) else b""
                os.write(2, cursor + b"\nending after this step; again to end at once\n")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def check_restarts(train: TrainConfig) -> str:
    """A hint for the user of a job that torchrun restarts (``--max-restarts``); mostly empty.

    Raises:
        ConfigError: every restart would start the run over.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) < 1:
        return ""
    if train.resume == "never":
        raise ConfigError(
            "train.resume = 'never' with torchrun --max-restarts: every restart would start over; "
            "set train.resume=auto"
        )
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return (
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun: without it restarted "
            "ranks may read the keys of those before them, and hang"
        )
    return ""


@contextmanager
def started(train: TrainConfig) -> Iterator[Ranks]:
    """The process group, for as long as the context lasts: what torchrun describes in the
    environment, or a job of one where it describes none.

    Raises:
        ConfigError: ``train.device`` is not available on this machine.
    """
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = _device(train.device, local_rank, local_world_size)
    # torchrun sets OMP_NUM_THREADS=1, which leaves most of the machine idle.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        # Python objects and host tensors go through gloo on a GPU machine as well.
        backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        timeout=timedelta(minutes=train.timeout_minutes),
        device_id=device if on_gpu else None,
        **({} if "RANK" in os.environ else _alone()),
    )
    yield Ranks(rank, local_rank, world_size, device)
    # Not after an error: the other ranks may be in a collective, and NCCL would wait for them.
    dist.destroy_process_group()


def _alone() -> dict[str, Any]:
    return {"store": dist.HashStore(), "rank": 0, "world_size": 1}


def _device(wanted: str, local_rank: int, local_world_size: int) -> torch.device:
    gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        return torch.device("cpu")
    if gpus < local_world_size:
        raise ConfigError(
            f"train.device = {wanted!r}: {local_world_size} ranks on this machine need as many "
            f"GPUs, it has {gpus}; lower --nproc-per-node or set train.device=cpu"
        )
    return torch.device("cuda", local_rank)
