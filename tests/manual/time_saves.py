"""How long a checkpoint of the quickstart's model holds up training, written at once or beside it.

python tests/manual/time_saves.py --folder /tmp/saves
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "launch"), str(ROOT / "tests"), str(ROOT)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from pretraining.config import load_config  # noqa: E402
from pretraining.engines import build_engine  # noqa: E402
from pretraining.model import build_model  # noqa: E402
from ranks import run_ranks  # noqa: E402

from dist_lamb import checkpoint  # noqa: E402


def measure(rank: int, world: int, folder: str, config: str, rounds: int, device: str) -> Any:
    """Median seconds of (save, save_async until training goes on, the rest of it)."""
    of = load_config(config)
    home = torch.device(device, rank) if device == "cuda" else torch.device(device)
    model = build_model(of.model, of.data, 0, home)
    engine = build_engine(model, of, 1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    engine.step()
    found: list[tuple[float, float, float]] = []
    for number in range(rounds + 1):
        times = []
        for beside in (False, True):
            if home.type == "cuda":
                torch.cuda.synchronize()
            dist.barrier()
            began = time.perf_counter()
            step, run = 2 * number + beside, f"{folder}/{beside}"
            if beside:
                pending = checkpoint.save_async(run, step, model, engine.optimizer, keep=2)
                times.append(time.perf_counter() - began)
                pending.wait()
            else:
                checkpoint.save(run, step, model, engine.optimizer, keep=2)
            times.append(time.perf_counter() - began)
        found.append((times[0], times[1], times[2] - times[1]))
    # The first makes the second process group and the buffer.
    return [statistics.median(column) for column in zip(*found[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.toml"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    options = (str(given.folder / "run"), given.config, given.rounds, given.device)
    for rank, (save, blocked, rest) in enumerate(
        run_ranks(given.ranks, given.folder, measure, *options, timeout=600)
    ):
        print(
            f"rank {rank}: save {1e3 * save:.1f} ms; save_async {1e3 * blocked:.1f} ms "
            f"({100 * blocked / save:.1f} %), then {1e3 * rest:.1f} ms beside the training"
        )


if __name__ == "__main__":
    main()
