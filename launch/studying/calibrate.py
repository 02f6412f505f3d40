"""What a device makes of packs of several sizes: the numbers a plan needs."""

from __future__ import annotations

import csv
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pretraining.config import ConfigError

from studying.config import StudyConfig
from studying.data import Sequences
from studying.grid import first_lrs
from studying.results import Cell, Run, read_table
from studying.training import Mode, Pack, make_pack

FILE = "calibration.csv"
_FEWEST_STEPS = 4  # two to warm up, two that are timed


def together(config: StudyConfig) -> int:
    """Runs in a typical pack of the base batch: two rules, six lrs each, if so many fit."""
    return max(1, min(12, config.pack_sequences // config.base_batch))


def cases(config: StudyConfig, modes: tuple[Mode, ...]) -> list[tuple[str, int, int, Mode]]:
    """(architecture, batch, runs together, mode), the ones that decide first."""
    first, *others = config.architectures
    small, large = config.batches[0], config.batches[-1]
    most = {b: max(1, config.pack_sequences // b) for b in config.batches}
    ends = [(large, most[large]), (small, together(config))]
    found: list[tuple[str, int, int, Mode]] = []
    if "graph" in modes:
        shapes = [*ends, (small, 1), *((b, most[b]) for b in config.batches[1:-1]), (small, 4)]
        found += [(first, *shape, "graph") for shape in shapes]
        found += [(a, *shape, "graph") for a in others for shape in ends]
        found += [(first, small, most[small], "graph"), (first, large, 2 * most[large], "graph")]
    if "compile" in modes:
        found += [(a, *shape, "compile") for a in config.architectures for shape in ends]
    if "eager" in modes:
        found += [(first, small, 1, "eager"), (first, *ends[0], "eager")]
    return list(dict.fromkeys(found))


def runs_of(config: StudyConfig, architecture: str, batch: int, count: int) -> list[Run]:
    """``count`` runs of all rules in turn."""
    names = [name for name, rule in config.rules.items() if not rule.late]
    found = []
    for k in range(count):
        rule = names[k % len(names)]
        cell = Cell(architecture, rule, batch, config.warmup(batch))
        lrs = first_lrs(config, cell)
        found.append(Run(*vars(cell).values(), lr=lrs[k % len(lrs)], seed=config.seeds[0]))
    return found


def measure(
    config: StudyConfig,
    data: Sequences,
    case: tuple[str, int, int, Mode],
    seconds: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Tokens/s of one case, and how long it took to be ready."""
    architecture, batch, count, mode = case
    cuda = data.train.device.type == "cuda"
    began = time.monotonic()
    pack = make_pack(config, runs_of(config, architecture, batch, count), data, mode, say)
    _advance(pack, 2, cuda)
    ready = time.monotonic() - began
    steps, began = 2, time.monotonic()
    done = 0
    while time.monotonic() - began < seconds and done + steps <= pack.steps - 2:
        _advance(pack, steps, cuda)
        done += steps
        steps *= 2
    took = time.monotonic() - began
    row = {
        "architecture": architecture,
        "batch": batch,
        "runs": count,
        "mode": pack.mode,
        "ready_s": round(ready, 2),
        "step_ms": round(1e3 * took / done, 4),
        "tokens_per_s": round(count * batch * config.seq_len * done / took),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else "",
        "loss": round(float(pack.train_losses()[:done].nanmean()), 4),
        "hardware": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
    }
    del pack
    _free(data)
    return row


def _free(data: Sequences) -> None:
    # A pack refers to itself; its graph's memory would stay until a later collection.
    gc.collect()
    if data.train.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _advance(pack: Pack, steps: int, cuda: bool) -> None:
    pack.advance(steps)
    if cuda:
        torch.cuda.synchronize()


def agreement(config: StudyConfig, data: Sequences, mode: Mode, say: Callable[[str], None]) -> str:
    """The largest difference of training losses between ``mode`` and eager, over some steps."""
    found = []
    for way in (mode, "eager"):
        runs = runs_of(config, config.architectures[0], config.base_batch, together(config))
        pack = make_pack(config, runs, data, way, say)  # type: ignore[arg-type]
        pack.advance(min(20, pack.steps))
        found.append(pack.train_losses()[: min(20, pack.steps)])
    difference = float((found[0] - found[1]).abs().max())
    return f"{mode} against eager, {len(found[0])} steps, largest difference {difference:.2e} nats"


def calibrate(
    config: StudyConfig,
    data: Sequences,
    out: Path,
    *,
    minutes: float,
    modes: tuple[Mode, ...],
    seconds: float = 1.0,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Measure until the time is over; every row is printed and appended to ``calibration.csv``.

    Raises:
        ConfigError: runs are too short to be timed.
    """
    if config.steps(config.batches[-1]) < _FEWEST_STEPS:
        raise ConfigError(
            f"study.samples ({config.samples}): calibration needs {_FEWEST_STEPS} steps of batch "
            f"{config.batches[-1]}"
        )
    deadline = time.monotonic() + 60 * minutes
    rows: list[dict[str, Any]] = []
    path = out / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    for mode in modes:
        if mode != "eager":
            say(agreement(config, data, mode, say))
            _free(data)
    say("  arch    batch  runs  mode      ready s    step ms   M tokens/s   peak GB")
    for case in cases(config, modes):
        if time.monotonic() > deadline:
            say(f"no time left for {case}")
            break
        try:
            row = measure(config, data, case, seconds, say)
        except torch.OutOfMemoryError:
            say(f"{case}: out of memory")
            _free(data)
            continue
        rows.append(row)
        say(
            f"  {row['architecture']:7} {row['batch']:5} {row['runs']:5}  {row['mode']:8} "
            f"{row['ready_s']:8.1f} {row['step_ms']:10.3f} {row['tokens_per_s'] / 1e6:12.2f}   "
            f"{row['peak_gb']}"
        )
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)
    return rows


def best_mode(path: Path) -> Mode:
    """``compile`` where ``calibration.csv`` has it at least 1.2 times as fast as ``graph`` in every
    case that both were measured in, else ``graph``: compiling takes time too."""
    speed: dict[tuple[str, ...], dict[str, float]] = {}
    for row in read_table(path, ("batch", "runs", "tokens_per_s")):
        case = row["architecture"], row["batch"], row["runs"]
        speed.setdefault(case, {})[row["mode"]] = float(row["tokens_per_s"])
    gains = [
        of["compile"] / of["graph"] for of in speed.values() if {"compile", "graph"} <= of.keys()
    ]
    return "compile" if gains and min(gains) >= 1.2 else "graph"
