"""launch/bench.py train: what gets a speed, what the numbers mean, and what a trace says."""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import bench
import pytest
import torch
import torch.distributed as dist
from benchmarking import results, train, train_curve, train_trace
from benchmarking.train_contenders import (
    CONTENDERS,
    Contender,
    ForwardBackward,
    Setting,
    Training,
)
from benchmarking.train_gate import GATE, Gate
from benchmarking.train_trace import Timeline, common, length, overlaps, union
from hypothesis import given
from hypothesis import strategies as st
from pretraining.config import ConfigError
from pretraining.ranks import Ranks
from ranks import run_ranks
from torch import nn

from dist_lamb import Lamb, ShardedLamb

BY_NAME = {c.name: c for c in CONTENDERS}


# pytest's captured stderr is no file; torchrun's workers have a real one.
pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    small = ["--device", "cpu", "--model", "tiny", "--impl", "foreach", "--warmup", "1"]
    return parser.parse_args([*small, *argv])


# --- on ranks ----------------------------------------------------------------------------------


class CutLamb(Training):
    """LAMB that takes the halves of each tensor for tensors, as one unaware of sharding does."""

    def __init__(self, module: nn.Module, setting: Setting) -> None:
        self.pairs = [
            (half, p, i)
            for p in module.parameters()
            for i, half in enumerate(p.detach().view(-1).chunk(2))
        ]
        halves = [half for half, _, _ in self.pairs]
        super().__init__(module, Lamb(halves, **setting.lamb_options()))
        self.model = nn.parallel.DistributedDataParallel(module)

    def step(self) -> None:
        for half, p, i in self.pairs:
            half.grad = p.grad.view(-1).chunk(2)[i]
        self.optimizer.step()
        self.module.zero_grad()


def _sharded(module: nn.Module, setting: Setting) -> Training:
    return Training(module, ShardedLamb(module, **setting.lamb_options(), bucket_numel=20_000))


def _unsynchronized(module: nn.Module, setting: Setting) -> Training:
    """Gradients are not averaged."""
    return Training(module, Lamb(module.parameters(), **setting.lamb_options()))


def _fails_on_one(module: nn.Module, setting: Setting) -> Training:
    if dist.get_rank() == 1:
        raise RuntimeError("out of luck\nsecond line")
    return ForwardBackward(module)


MINE = {
    "sharded": Contender(name="sharded", make=_sharded),
    "cut": Contender(name="cut", make=CutLamb),
    "unsynchronized": Contender(name="unsynchronized", make=_unsynchronized),
    "fails": Contender(name="fails", make=_fails_on_one, is_lamb=False),
    "absent": Contender(name="absent", make=_fails_on_one, needs="no_such_module.below"),
}


def _all_of_it(rank: int, world: int, folder: Path) -> dict[str, Any]:
    ranks = Ranks(rank, rank, world, torch.device("cpu"))
    found: dict[str, Any] = {}

    gate = Gate(ranks)
    lambs = [BY_NAME["DDP + Lamb"], BY_NAME["ZeroRedundancyOptimizer(Lamb)"], *MINE.values()]
    for precision in ("fp32", "autocast", "bf16"):
        setting = Setting(
            device=ranks.device, precision=precision, micro_batch=4, lr=1e-3, impl="foreach"
        )
        for contender in lambs:
            if contender.is_lamb and not contender.needs:
                error, _ = gate.error(contender, setting)
                found["gate", contender.name, precision] = (error, GATE[setting.dtype])

    args = arguments("--steps", "3", "--results", str(folder))
    work = train.work_of(args)
    chosen = [
        BY_NAME["DDP + Lamb"],
        BY_NAME["DDP + AdamW fused"],
        *(MINE[name] for name in ("fails", "cut", "absent", "sharded")),
    ]
    found["measure"] = train.measure(args, work, chosen, ranks)
    args = arguments("--trace", "--results", str(folder), "--trace-dir", str(folder / "trace"))
    found["trace"] = train.run(args, work, [MINE["sharded"]], ranks)
    args = arguments("--curve", "6", "--results", str(folder))
    found["curve"] = train.run(args, work, [BY_NAME["DDP + Lamb"], MINE["sharded"]], ranks)
    args = arguments("--curve", "6", "--no-save")
    other = [BY_NAME["DDP + Lamb"], MINE["fails"], BY_NAME["DDP + AdamW fused"]]
    found["other curve"] = train.run(args, work, other, ranks)
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("programs")
def test_gate_rows_trace_and_curves_on_two_ranks(tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "results"
    one, other = run_ranks(2, tmp_path, _all_of_it, folder, timeout=240)
    assert one == other
    printed = capfd.readouterr().out

    for (kind, name, precision), (error, tolerance) in (
        (k, v) for k, v in one.items() if k[0] == "gate"
    ):
        wrong = name in ("cut", "unsynchronized")
        assert (error > tolerance) == wrong, (kind, name, precision, error)
        if wrong:
            assert error > 1.5 * tolerance, (name, precision, error)

    assert one["measure"] == 1  # a LAMB that is none is a failure of the run
    assert "not measured - fails: rank 1: RuntimeError: out of luck" in printed
    assert "not measured - cut: FAILED THE GATE: off by" in printed
    assert "not measured - absent: no_such_module.below is not installed" in printed
    with (folder / "train.csv").open(newline="") as f:
        rows = {row["contender"]: row for row in csv.DictReader(f)}
    alone = "forward, backward alone"
    assert list(rows) == [
        alone,
        "DDP + Lamb",
        "DDP + AdamW fused",
        "sharded",
        f"{alone}, again",
    ]
    for row in rows.values():
        step, baseline = float(row["step_ms"]), float(rows[alone]["step_ms"])
        assert 0 < float(row["step_ms_p20"]) <= step <= float(row["step_ms_p80"])
        assert float(row["exposed_ms"]) == pytest.approx(step - baseline, rel=1e-3, abs=1e-3)
        assert float(row["ratio"]) == pytest.approx(step / baseline, rel=1e-3)
        assert float(row["tokens_per_s"]) == pytest.approx(2 * 4 * 16 / step * 1e3, rel=1e-3)
        assert (row["ranks"], row["precision"], row["model"]) == ("2", "fp32", "tiny")
        assert 5 < float(row["loss"]) < 8
        assert math.isnan(float(row["optimizer_ms"])) == row["contender"].startswith(alone)
    # the same steps, the same loss; and a baseline that does not train
    assert rows["sharded"]["loss"] == rows["DDP + Lamb"]["loss"] != rows[alone]["loss"]
    assert rows[alone]["loss"] == rows[f"{alone}, again"]["loss"]
    assert (folder / "train_cpu_x2.png").read_bytes().startswith(b"\x89PNG")

    assert one["trace"] == 0
    (trace,) = (folder / "trace").iterdir()
    timeline = train_trace.read(trace)
    assert [name for name, _, _ in timeline.phases] == list(train_trace.PHASES) * train_trace.STEPS
    kinds = {span.kind for span in timeline.spans}
    assert {"compute", "optimizer", "all-reduce", "all-gather"} <= kinds
    assert (folder / "train_trace.png").stat().st_size > 10_000

    assert one["curve"] == 0
    assert "sharded: loss" in printed
    with (folder / "train_curve_cpu_x2.csv").open(newline="") as f:
        header, *lines = csv.reader(f)
    assert header == ["step", "DDP + Lamb", "sharded"]
    assert [int(line[0]) for line in lines] == [1, 2, 3, 4, 5, 6]
    assert float(lines[-1][1]) < float(lines[0][1]) - 0.05  # there is something to learn
    assert one["other curve"] == 1
    assert "DDP + AdamW fused: loss" in printed
    assert "NOT WITHIN 0.001" in printed


def test_alone_without_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    argv = ["--contenders", "DDP + Lamb", "--impl", "foreach", "--device", "cpu", "--model", "tiny"]
    argv += ["--warmup", "1", "--steps", "2", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench.py", "train", *argv])
    assert bench.main() == 0
    assert not dist.is_initialized()
    with (tmp_path / "train.csv").open(newline="") as f:
        assert [row["ranks"] for row in csv.DictReader(f)] == ["1", "1", "1"]

    monkeypatch.setattr(sys, "argv", ["bench.py", "train", "--contenders", "DDP + Lam"])
    assert bench.main() == 2
    error = capsys.readouterr().err
    assert "no contender is named 'DDP + Lam'; there are DDP + Lamb, " in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("step --repeats 1", "argument --repeats: 1: fewer than 2 have no spread"),
        ("step --device cuda", "error: --device cuda: this torch finds no GPU"),
        ("train --device cuda", "error: --device cuda: this torch finds no GPU"),
    ],
)
def test_what_cannot_be_measured(
    argv: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.py", *argv.split()])
    with pytest.raises(SystemExit) as caught:
        bench.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# --- arguments and results -----------------------------------------------------------------------


def test_contenders_by_name_and_pattern() -> None:
    names = [c.name for c in train.choose(["ShardedLamb*", "ZeroRedundancyOptimizer(Lamb)"])]
    assert names == [
        "ZeroRedundancyOptimizer(Lamb)",
        "ShardedLamb 1",
        "ShardedLamb 1 no overlap",
        "ShardedLamb 2",
        "ShardedLamb 2 no overlap",
    ]
    assert train.choose(["*"]) == list(CONTENDERS)
    assert len(BY_NAME) == len(CONTENDERS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--micro-batch", "-1"], "--micro-batch must be at least 1, got -1"),
        (["--warmup", "-2"], "--warmup must be at least 0, got -2"),
        (["--curve", "0"], "--curve must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train.work_of(arguments(*argv))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--trace"], "--trace takes one contender, got 17"),
        (["--curve", "3", "--precisions", "fp32", "bf16"], "take one of --precisions"),
    ],
)
def test_what_does_not_go_together(argv: list[str], message: str, capsys: Any) -> None:
    assert train.main(arguments(*argv)) == 2
    assert message in capsys.readouterr().err


def test_batches_differ_by_rank_and_can_be_learned() -> None:
    work = train.work_of(arguments("--micro-batch", "3", "--seq-len", "20"))
    one, two = ([*work.batches(2, rank, torch.device("cpu"))] for rank in (0, 1))
    again = [*work.batches(2, 0, torch.device("cpu"))]
    assert all(torch.equal(a, b) for x, y in zip(one, again) for a, b in zip(x, y))
    assert not torch.equal(one[0][0], one[1][0])
    assert not torch.equal(one[0][0], two[0][0])
    ids, positions, labels = one[0]
    assert ids.shape == (3, 20)
    assert positions.shape == labels.shape == (3, 3)
    whole = ids.scatter(1, positions, labels)
    assert whole.min() >= 5
    assert whole.max() < work.vocab
    assert ((whole[:, 1::2] - whole[:, 0::2] - 1) % (work.vocab - 5) == 0).all()


def test_rows_of_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    results.append(path, {"date": "d"}, [{"a": 1, "b": 0.123456789}])
    results.append(path, {"date": "d"}, [{"a": 2, "b": 1.0}])
    assert path.read_text() == "date,a,b\nd,1,0.123457\nd,2,1\n"
    with pytest.raises(ValueError, match="other columns"):
        results.append(path, {"date": "d"}, [{"a": 1, "c": 2}])
    assert len(path.read_text().splitlines()) == 3


def test_curves_within_and_not_within(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "curve.csv"
    curves = {"a": [3.0, 2.0, 1.0], "b": [3.0, 2.5, 1.1]}
    assert train_curve.compare(curves, 0.6, path, said.append) == 0
    assert said[-1] == "b: loss 1.1000; largest difference 5.00e-01 at step 2, within 0.6"
    assert path.read_text() == "step,a,b\n1,3,3\n2,2,2.5\n3,1,1.1\n"
    assert train_curve.compare(curves, 0.4, None, said.append) == 1
    assert "NOT WITHIN 0.4" in said[-1]
    curves["b"][1] = math.nan
    assert train_curve.compare(curves, 0.6, None, said.append) == 1
    assert "inf at step 2" in said[-1]
    assert train_curve.compare({"a": [1.0]}, 1.0, None, said.append) == 1


# --- traces ------------------------------------------------------------------------------------

_intervals = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 8)).map(lambda t: (t[0], t[0] + t[1]))
)


def _points(intervals: list[Any]) -> set[int]:
    return {x for begin, end in intervals for x in range(begin, end)}


@given(_intervals, _intervals)
def test_unions_and_intersections_are_those_of_sets(one: list[Any], other: list[Any]) -> None:
    a, b = union(one), union(other)
    assert all(x[1] < y[0] for x, y in pairwise(a))
    assert _points(a) == _points(one)
    assert length(a) == len(_points(one))
    assert _points(common(a, b)) == _points(one) & _points(other)


def _gpu_trace(path: Path) -> None:
    """One step whose host runs ahead: launches at 0-30 us, kernels later, in ms.

    forward 1-3, backward 3-6, optimizer 6.5-7; reduce-scatter 4-7, of which 2 under backward and
    0.5 under the optimizer; all-gather 7-8 under nothing, and 1-2 of the step before under forward.
    """
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name"}]

    def add(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> None:
        events.append(
            {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}
        )

    for i, phase in enumerate(train_trace.PHASES):
        add("user_annotation", phase, 10 * i, 9)
    add("user_annotation", "DistributedDataParallel.forward", 1, 5)
    kernels: list[tuple[str, str, float, int, float, float, dict[str, str]]] = [
        # cat, name, launch in us, stream, begin and end in ms
        ("kernel", "gemm", 2, 7, 1, 3, {}),
        ("kernel", "ncclDevKernel_AllGather_RING_LL", 3, 22, 1, 2, {}),
        ("kernel", "gemm_backward", 12, 7, 3, 6, {}),
        (
            "kernel",
            "ncclDevKernel_Generic",
            13,
            22,
            4,
            7,
            {"Collective name": "_reduce_scatter_base"},
        ),
        ("kernel", "multi_tensor", 22, 7, 6.5, 7, {}),
        ("gpu_memcpy", "Memcpy DtoD", 23, 7, 7, 7.1, {}),
        ("kernel", "ncclDevKernel_AllGather_RING_LL", 24, 22, 7, 8, {}),
        ("kernel", "ncclDevKernel_SendRecv", 25, 22, 8, 8.5, {}),
        ("kernel", "gemm", 40, 7, 9, 10, {}),  # launched after all phases
    ]
    for i, (cat, name, launch, stream, begin, end, args) in enumerate(kernels):
        tid = 2 if 10 <= launch < 20 else 1  # autograd's thread
        add("cuda_runtime", "cudaLaunchKernel", launch, 1, tid, correlation=i)
        ms = 1e3
        add(cat, name, begin * ms, (end - begin) * ms, stream, correlation=i, stream=stream, **args)
    with gzip.open(path, "wt") as f:
        json.dump({"traceEvents": events}, f)


def test_overlaps_of_a_gpu_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    _gpu_trace(path)
    timeline = train_trace.read(path)
    assert [(s.lane, s.kind, s.begin, s.end) for s in timeline.spans] == [
        ("stream 7", "compute", 1, 3),
        ("stream 22", "all-gather", 1, 2),
        ("stream 7", "compute", 3, 6),
        ("stream 22", "reduce-scatter", 4, 7),
        ("stream 7", "optimizer", 6.5, 7),
        ("stream 7", "copy", 7, pytest.approx(7.1)),
        ("stream 22", "all-gather", 7, 8),
        ("stream 22", "other collective", 8, 8.5),
    ]
    # where the kernels ran, not where they were launched
    assert timeline.phases == [("forward", 1, 3), ("backward", 3, 6), ("step", 6.5, 7)]
    scatter, gather = overlaps(timeline)
    assert (scatter.kind, scatter.total_ms, scatter.under) == ("reduce-scatter", 3, "backward")
    assert scatter.under_share == pytest.approx(2 / 3)
    assert scatter.any_share == pytest.approx(2.5 / 3)
    assert (gather.kind, gather.total_ms, gather.under) == ("all-gather", 2, "forward")
    assert gather.under_share == gather.any_share == pytest.approx(0.5)
    assert train_trace.describe(timeline) == [
        "reduce-scatter: 3.00 ms in all, 67 % of it under backward compute, 83 % under any compute",
        "all-gather: 2.00 ms in all, 50 % of it under forward compute, 50 % under any compute",
    ]
    train_trace.draw(timeline, tmp_path / "trace.png", "a title")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
    assert train_trace.describe(Timeline([], [])) == ["no collectives"]


def test_a_trace_without_steps_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as f:
        json.dump({"traceEvents": []}, f)
    with pytest.raises(ValueError, match="no ranges named forward, backward, step"):
        train_trace.read(path)
