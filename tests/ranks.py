"""Run a function on several ranks, and get back what each returned."""

from __future__ import annotations

import gc
import io
import multiprocessing as mp
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(
    world: int,
    tmp_path: Path,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = 400.0,
    backend: str = "gloo",
) -> list[Any]:
    """``[fn(rank, world, *args) for each rank]``, each in a process of its own.

    Ranks meet through a file in ``tmp_path``: no ports, so tests may run side by side. A rank's
    exception is raised here with its traceback; a rank still running after ``timeout`` seconds
    is killed. With ``backend="nccl"`` every rank has a GPU of its own, the current device.
    """
    context = rank_context(backend)
    store = tmp_path / f"store-{world}-{len(list(tmp_path.iterdir()))}"
    processes, pipes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_main,
            args=(rank, world, str(store), theirs, backend, fn, args, dict(os.environ)),
            daemon=True,
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    results: list[Any] = []
    try:
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(timeout):
                raise TimeoutError(f"rank {rank} of {world} gave no answer in {timeout} s")
            try:
                ok, payload = pipe.recv()
            except EOFError:
                processes[rank].join()
                raise RuntimeError(f"rank {rank} died: {processes[rank].exitcode}") from None
            if not ok:
                # The others fail too, of a lost connection: whoever was first tells what it was.
                told = [payload, *(p.recv()[1] for p in pipes[rank + 1 :] if p.poll(2.0))]
                said = [str(t) for t in told if isinstance(t, str)]
                first = next((t for t in said if "onnection" not in t), said[0])
                raise RuntimeError(f"a rank of {world} raised:\n{first}")
            results.append(torch.load(io.BytesIO(payload), weights_only=False))
    finally:
        for process in processes:
            if len(results) < world:
                process.kill()
            process.join()
    return results


#: Imported once by the process that ranks are forked from: importing torch takes a rank 3 s.
PRELOADED = [
    "torch",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "pytest",
    "dist_lamb",
    "dist_lamb.checkpoint",
    "transformers.models.bert.modeling_bert",  # 6 s more, for those that run launch/pretrain.py
]


def rank_context(backend: str = "gloo") -> Any:
    """How processes of ranks are started: forked from one that has imported torch already.

    Not where Triton interprets its kernels, which it decides as it is imported, nor on GPUs, which
    a forked process cannot use if the first one has.
    """
    if backend != "gloo" or os.environ.get("TRITON_INTERPRET") == "1":
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


WORLDS = (1, 2, 3, 4)


def each_world(rank: int, _: int, fn: Callable[..., Any], *args: Any) -> dict[int, Any]:
    """``{W: fn(rank, group of ranks 0..W-1, *args)}`` for the W that this rank takes part in.

    As ``run_ranks(4, tmp_path, each_world, fn, ...)``: one spawn serves all world sizes.
    """
    results = {}
    for world in WORLDS:
        group = dist.new_group(list(range(world)))  # a collective, also for those outside
        if rank < world:
            results[world] = fn(rank, group, *args)
        dist.barrier()
    return results


def _main(
    rank: int,
    world: int,
    store: str,
    pipe: Any,
    backend: str,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    # What was imported before the fork: to look at half a million objects copies their memory.
    gc.freeze()
    # A process of the fork server has the environment that the first one had.
    os.environ.clear()
    os.environ.update(environment)
    # Ranks share the cores; more threads than cores make every OpenMP barrier a context switch.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        device = None
        if backend == "nccl":
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            store=dist.FileStore(store, world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=300),
            device_id=device,
        )
        # One compiler process a rank is plenty; a pool of them would outlive the test's timeout.
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        result = fn(rank, world, *args)
        buffer = io.BytesIO()
        torch.save(result, buffer)
        pipe.send((True, buffer.getvalue()))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
