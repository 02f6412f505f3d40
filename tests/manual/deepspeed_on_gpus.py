"""DeepSpeedLamb over NCCL, run by torchrun on GPUs; not collected by pytest:

    torchrun --standalone --nproc-per-node 2 tests/manual/deepspeed_on_gpus.py

Float32, bfloat16 and float16 (with overflows) at stages 0-3 against Lamb without shards on the CPU.
"""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from deepspeed_runs import Case, Run, device, plain, worst_error

BOUNDS = {"fp32": 1e-5, "bf16": 2**-6, "fp16": 2**-8}


def cases() -> dict[str, Case]:
    found = {}
    for dtype in BOUNDS:
        for stage in range(4):
            # ZeRO-3 leaves the gradient of the step before where none comes, and clips by it.
            absent = {} if stage == 3 else {1: ("fc.weight",)}
            found[f"{dtype} {stage}"] = Case(stage, dtype, absent_at=absent)
            if stage:
                found[f"{dtype} {stage} offloaded"] = Case(
                    stage, dtype, absent_at=absent, offload=True
                )
    grad_accum = {"data_types": {"grad_accum_dtype": "fp32"}}
    found["bf16 1 BF16_Optimizer"] = Case(1, "bf16", config=grad_accum)
    found["fp32 3 sub-groups"] = Case(3, absent_at={}, zero={"sub_group_size": 2000})
    clip = {"max_grad_norm": 1.0}
    found["fp32 2 max_grad_norm"] = Case(2, clip=0.0, options=clip)
    found["fp32 3 max_grad_norm"] = Case(3, clip=0.0, options=clip, absent_at={})
    return found


def scales_at_stage_0() -> bool:
    """Whether DeepSpeed's fp16 at stage 0 is right with an optimizer that shows it: SGD."""
    p = torch.nn.Parameter(torch.ones(1000, dtype=torch.float16, device=device()))
    model = torch.nn.Module()
    model.p = p
    model.forward = lambda: (p * 0.125).sum()
    config = Case(0, "fp16", clip=0.0).make_config()
    sgd = torch.optim.SGD([p], lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd, config=config)
    moved = 0.0
    for _ in range(30):  # the first ones may overflow
        before = float(engine.module.p[0])
        engine.backward(engine())
        engine.step()
        moved = before - float(engine.module.p[0])
        if moved:
            break
    engine.destroy()
    print(f"SGD, fp16, stage 0: moved by {moved:.3g} where 0.125 is right", flush=True)
    return abs(moved - 0.125) < 1e-3


def main() -> None:
    deepspeed.init_distributed(dist_backend="nccl", verbose=False)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    torch.cuda.set_device(device())
    rank, world = dist.get_rank(), dist.get_world_size()
    failed = []
    for name, case in cases().items():
        if name == "fp16 0" and not scales_at_stage_0():
            continue
        run = Run(case, rank, world)
        if case.options:
            run.optimizer.bind(run.engine)
        run.train()
        want, want_ratios = plain(case, world)
        error = worst_error(run.params(), want)
        ratios = run.ratios()
        off = max(
            (abs(ratios[n] / r - 1) for n, r in want_ratios.items() if not math.isnan(r)), default=0
        )
        skipped = run.engine.skipped_steps
        if rank == 0:
            print(f"{name}: {error:.1e}, trust ratios {off:.1e}, {skipped} skipped", flush=True)
        if not (error < BOUNDS[case.dtype] and off < 100 * BOUNDS[case.dtype]):
            failed.append(name)
        run.engine.destroy()
    dist.destroy_process_group()
    if failed:
        raise SystemExit(f"rank {rank}: {failed}")


if __name__ == "__main__":
    main()
