"""``bench.py step``: the time of one ``step()`` on one device."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_lamb import Lamb

from . import results
from .contenders import BETAS, CONTENDERS, EPS, LR, WEIGHT_DECAY, Contender
from .workloads import WORKLOADS, Shape, numel

#: Largest |x - reference| / max|reference| after GATE_STEPS steps that still counts as LAMB.
GATE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
GATE_STEPS = 3
#: Steps timed in a row, unless they take long: the host's caches are cold in the first.
IN_A_ROW, ENOUGH_MS = 8, 20.0
#: header, column of the rows, format
COLUMNS = (
    ("contender", "contender", ""),
    ("device ms", "device_ms", ".3f"),
    ("p20", "device_ms_p20", ".3f"),
    ("p80", "device_ms_p80", ".3f"),
    ("host ms", "host_ms", ".3f"),
    ("GB/s", "moved_gb_s", ".0f"),
    ("B/param", "effective_bytes", ".1f"),
    ("error", "error", ".0e"),
)


@dataclass
class _Run:
    contender: Contender
    optimizer: Any
    error: float
    device_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)


def _repeats(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: fewer than 2 have no spread")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [c.name for c in CONTENDERS]
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=tuple(WORKLOADS),
        default=["matrices", "bert-large", "resnet-50", "many-small"] if on_gpu else ["bert-30m"],
    )
    parser.add_argument("--contenders", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--clip", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--repeats", type=_repeats, default=20, help="timed steps of each")
    parser.add_argument("--no-save", action="store_true", help="print only")


def main(args: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    bandwidth = copy_bandwidth(args.device)
    print(f"{results.hardware(args.device)}; copy {bandwidth / 1e9:.0f} GB/s (read + written)")
    for workload in args.workloads:
        for dtype_name in args.dtypes:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
            for clip in [{"off": None, "on": 1.0}[c] for c in args.clip]:
                chosen = [c for c in CONTENDERS if c.name in args.contenders]
                runs, skipped = _measure(
                    WORKLOADS[workload](), chosen, args.device, dtype, clip, args.repeats
                )
                failed += [f"{workload} {dtype_name}: {s}" for s in skipped if "GATE" in s]
                title = {"workload": workload, "dtype": dtype_name, "clip": clip or "off"}
                shapes = WORKLOADS[workload]()
                new = [_row(title, shapes, run, bandwidth, dtype, clip) for run in runs]
                results.print_table(
                    ", ".join(f"{key} {value}" for key, value in title.items())
                    + f": {sum(map(numel, shapes)) / 1e6:.1f} M in {len(shapes)} tensors",
                    COLUMNS,
                    sorted(new, key=lambda row: float(row["device_ms"])),
                    skipped,
                )
                rows += new
    if not args.no_save and rows:
        common = results.common(args.device)
        results.append(results.FOLDER / "step.csv", common, rows)
        results.chart(
            results.FOLDER / f"step_{args.device}.png",
            f"{common['hardware']}, torch {common['torch']}",
            rows,
            facets=("workload", "dtype", "clip"),
            value="device_ms",
            ours=("Lamb", "Sharded"),
            log=True,
        )
        print(f"appended {len(rows)} rows to {results.FOLDER / 'step.csv'}")
    for line in failed:
        print(line)
    return 1 if failed else 0


def _fresh(shapes: list[Shape], device: str, dtype: torch.dtype) -> list[Tensor]:
    """Params and gradients drawn anew from one seed: the same for every contender."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        p = torch.randn(shape, generator=generator, device=device) * 0.02
        p = torch.nn.Parameter(p.to(dtype))
        p.grad = (torch.randn(shape, generator=generator, device=device) * 0.01).to(dtype)
        params.append(p)
    return params


def _measure(
    shapes: list[Shape],
    contenders: list[Contender],
    device: str,
    dtype: torch.dtype,
    clip: float | None,
    repeats: int,
) -> tuple[list[_Run], list[str]]:
    runs, skipped = [], []
    expected: list[Tensor] = []
    known = None
    for contender in contenders:
        why = contender.why_not(device, dtype, clip)
        if why is None:
            params = _fresh(shapes, device, dtype)
            try:
                optimizer = contender.make(params, clip)
                _take_gate_steps(optimizer, params)
            except Exception as error:  # a peer that does not run here is not our failure
                why = f"{type(error).__name__}: {error}"
        if why is None:
            if contender.is_lamb and (contender.rule, contender.formats) != known:
                known = contender.rule, contender.formats
                expected = _fresh(shapes, device, dtype)
                reference = Lamb(
                    expected, LR, BETAS, EPS, WEIGHT_DECAY, impl="reference", max_grad_norm=clip,
                    rule=contender.rule, **contender.formats,
                )  # fmt: skip
                _take_gate_steps(reference, expected)
                del reference
            error = _error(params, expected) if contender.is_lamb else float("nan")
            if contender.is_lamb and not error <= GATE[dtype]:
                why = f"FAILED THE GATE: off by {error:.1e}, no speed is shown"
            else:
                runs.append(_Run(contender, optimizer, error))
        if why is not None:
            skipped.append(f"{contender.name}: {why}")
    del expected
    gc.collect()
    # Interleaved, so that a change of the machine's speed affects all contenders.
    for i in range(repeats + 2):
        for run in runs:
            device_ms, host_ms = _time(run.optimizer.step, device)
            if i >= 2:  # the first two warm up
                run.device_ms.append(device_ms)
                run.host_ms += host_ms
    return runs, skipped


def _take_gate_steps(optimizer: Any, params: list[Tensor]) -> None:
    gradients = [p.grad.clone() for p in params if p.grad is not None]
    for _ in range(GATE_STEPS):
        for p, g in zip(params, gradients, strict=True):
            assert p.grad is not None
            p.grad.copy_(g)  # apex leaves its update there
        optimizer.step()


def _error(params: list[Tensor], expected: list[Tensor]) -> float:
    worst = 0.0
    for p, e in zip(params, expected):
        a, b = p.detach().double(), e.detach().double()
        error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
        worst = error if not error <= worst else worst  # keeps NaN
    return worst


def _time(step: Callable[[], Any], device: str) -> tuple[float, list[float]]:
    """(device ms, host wall ms of several in a row) of one call.

    The wall time is from an idle device to an idle device. For the device time the launches queue
    up behind a delay, so that a slow host does not count as a slow kernel.
    """
    host_ms: list[float] = []
    while len(host_ms) < IN_A_ROW and sum(host_ms) < ENOUGH_MS:
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        host_ms.append((time.perf_counter() - begin) * 1e3)
    if device == "cpu":
        return statistics.median(host_ms), host_ms
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(1.5e6 * (max(host_ms) + 1.0)))  # clock cycles, at 1 to 2 GHz
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), host_ms


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a large copy, median of 9."""
    numel = 2**30 if device == "cuda" else 2**27
    a = torch.randn(numel, device=device)
    b = torch.empty_like(a)
    for _ in range(3):
        b.copy_(a)
    ms = [_time(lambda: b.copy_(a), device)[0] for _ in range(9)]
    return 2 * a.nbytes / (statistics.median(ms) * 1e-3)


def _row(
    title: dict[str, Any],
    shapes: list[Shape],
    run: _Run,
    bandwidth: float,
    dtype: torch.dtype,
    clip: float | None,
) -> dict[str, Any]:
    params = sum(map(numel, shapes))
    quantiles = statistics.quantiles(run.device_ms, n=10)
    seconds = statistics.median(run.device_ms) * 1e-3
    floor = run.contender.floor_nbytes(dtype, clip)
    return {
        **title,
        "params": params,
        "tensors": len(shapes),
        "contender": run.contender.name,
        "device_ms": statistics.median(run.device_ms),
        "device_ms_p20": quantiles[1],
        "device_ms_p80": quantiles[7],
        "host_ms": statistics.median(run.host_ms),
        "moved_gb_s": floor * params / seconds / 1e9,
        "effective_bytes": seconds * bandwidth / params,
        "floor_bytes": floor,
        "copy_gb_s": bandwidth / 1e9,
        "error": run.error,
    }
