"""Which communication runs under which computation: a profiler trace, measured and drawn."""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

#: Names of the ``record_function`` ranges of a training step.
PHASES = ("forward", "backward", "step")
WARMUP, STEPS = 2, 3

COLORS = {
    "compute": "#b8c4d0",
    "optimizer": "#6a51a3",
    "reduce-scatter": "#c8442d",
    "all-gather": "#2b8c4e",
    "all-reduce": "#e08a1e",
    "other collective": "#8c6d4f",
    "copy": "#dddddd",
}
_COLLECTIVES = ("reduce-scatter", "all-gather", "all-reduce")
#: What each collective should run under.
_COVERS = {"reduce-scatter": "backward", "all-gather": "forward", "all-reduce": "backward"}

Interval = tuple[float, float]


@dataclass(frozen=True)
class Span:
    """A kernel, or on a CPU an outermost operator; times in ms."""

    lane: str
    begin: float
    end: float
    kind: str  # a key of COLORS
    phase: int | None  # position in Timeline.phases of the range that launched it


@dataclass(frozen=True)
class Timeline:
    """Spans and the ranges that launched them: (name, begin, end on the device)."""

    spans: Sequence[Span]
    phases: Sequence[tuple[str, float, float]]

    def of(self, kinds: Iterable[str], phase: str | None = None) -> list[Interval]:
        """When anything of ``kinds``, launched in ``phase``, ran: disjoint and in order."""
        wanted = set(kinds)
        return union(
            (span.begin, span.end)
            for span in self.spans
            if span.kind in wanted
            and (phase is None or (span.phase is not None and self.phases[span.phase][0] == phase))
        )


# --- recording -----------------------------------------------------------------------------------


@contextmanager
def recorded(path: Path | None, device: str) -> Iterator[Callable[[], None]]:
    """Profile STEPS steps after WARMUP others into ``path``; the yielded function ends a step.

    Without a path the function does nothing.
    """
    if path is None:
        yield lambda: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(
        activities=activities,
        # The profiler's own start would lie in the first step.
        schedule=schedule(wait=0, warmup=WARMUP, active=STEPS, repeat=1),
        on_trace_ready=lambda p: p.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler.step


# --- reading -------------------------------------------------------------------------------------


def read(path: Path) -> Timeline:
    """The timeline of a trace written by :func:`recorded`.

    Raises:
        ValueError: it has none of the ranges PHASES.
    """
    with gzip.open(path, "rt") as f:
        events = [e for e in json.load(f)["traceEvents"] if e.get("ph") == "X"]
    ranges = sorted(
        (float(e["ts"]), float(e["ts"]) + float(e["dur"]), str(e["name"]), e["tid"])
        for e in events
        if e.get("cat") == "user_annotation" and e["name"] in PHASES
    )
    if not ranges:
        raise ValueError(f"{path} has no ranges named {', '.join(PHASES)}")
    origin = ranges[0][0]
    begins = [begin for begin, *_ in ranges]

    def phase_at(ts: float) -> int | None:
        i = bisect_right(begins, ts) - 1
        return i if i >= 0 and ts <= ranges[i][1] else None

    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if kernels:
        # A kernel belongs to the range in which the host launched it, on whichever thread:
        # autograd launches from its own.
        launched = {
            e["args"]["correlation"]: float(e["ts"])
            for e in events
            if e.get("cat") in ("cuda_runtime", "cuda_driver")
            and "correlation" in e.get("args", {})
        }
        found = [
            (f"stream {e['args'].get('stream')}", e, launched.get(e["args"].get("correlation")))
            for e in kernels
        ]
    else:
        found = [(lane, e, float(e["ts"])) for lane, e in _outermost(events, ranges[0][3])]

    spans = []
    for lane, event, launch in found:
        if launch is not None and launch > ranges[-1][1]:
            continue  # of waiting for the other ranks at the end
        phase = None if launch is None else phase_at(launch)
        begin = (float(event["ts"]) - origin) / 1e3
        kind = _kind(event, phase is not None and ranges[phase][2] == "step")
        spans.append(Span(lane, begin, begin + float(event["dur"]) / 1e3, kind, phase))

    extents: list[tuple[str, float, float]] = []
    for i, (begin, end, name, _) in enumerate(ranges):
        # when its kernels ran: the host may have launched them long before
        own = [s for s in spans if s.phase == i and s.kind in ("compute", "optimizer")]
        extents.append(
            (
                name,
                min((s.begin for s in own), default=(begin - origin) / 1e3),
                max((s.end for s in own), default=(end - origin) / 1e3),
            )
        )
    return Timeline(spans, extents)


def _outermost(events: Sequence[dict[str, Any]], main: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(lane, event) of operators in no other operator, and of collectives in their threads."""
    until: dict[Any, float] = {}
    for e in sorted(events, key=lambda e: (float(e["ts"]), -float(e["dur"]))):
        collective = str(e["name"]).startswith(("gloo:", "nccl:"))
        if collective or e.get("cat") == "cpu_op":
            end = float(e["ts"]) + float(e["dur"])
            if end > until.get(e["tid"], 0.0):
                until[e["tid"]] = end
                yield "main thread" if e["tid"] == main else f"thread {e['tid']}", e


def _kind(event: dict[str, Any], in_step: bool) -> str:
    collective = event.get("args", {}).get("Collective name") or ""
    name = f"{event['name']} {collective}".lower().replace("_", "")
    if collective or name.startswith(("nccl", "gloo:", "c10d::")):
        for kind in _COLLECTIVES:
            if kind.replace("-", "") in name:
                return kind
        return "other collective"
    if event.get("cat") in ("gpu_memcpy", "gpu_memset"):
        return "copy"
    return "optimizer" if in_step else "compute"


# --- measuring -----------------------------------------------------------------------------------


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def common(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """The points in both of two lists of disjoint intervals in order."""
    found, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        begin, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if begin < end:
            found.append((begin, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


@dataclass(frozen=True)
class Overlap:
    """``total_ms`` of a collective, and the shares of it that other kernels ran beside."""

    kind: str
    total_ms: float
    under: str
    under_share: float
    """Under computation of the phase ``under``."""
    any_share: float
    """Under any computation, the optimizer's included."""


def overlaps(timeline: Timeline) -> list[Overlap]:
    """One for each kind of collective that occurs."""
    found = []
    for kind, under in _COVERS.items():
        spans = timeline.of([kind])
        total = length(spans)
        if total > 0:
            beside = length(common(spans, timeline.of(["compute"], under))) / total
            anything = length(common(spans, timeline.of(["compute", "optimizer"]))) / total
            found.append(Overlap(kind, total, under, beside, anything))
    return found


def describe(timeline: Timeline) -> list[str]:
    """The overlaps in words, a line each."""
    return [
        f"{o.kind}: {o.total_ms:.2f} ms in all, {100 * o.under_share:.0f} % of it under "
        f"{o.under} compute, {100 * o.any_share:.0f} % under any compute"
        for o in overlaps(timeline)
    ] or ["no collectives"]


# --- drawing -------------------------------------------------------------------------------------


def draw(timeline: Timeline, path: Path, title: str) -> None:
    """One lane a stream (or thread), the busiest on top; the phases behind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    busy: dict[str, float] = {}
    for span in timeline.spans:
        busy[span.lane] = busy.get(span.lane, 0.0) + span.end - span.begin
    lanes = sorted(busy, key=lambda lane: -busy[lane])
    figure, ax = plt.subplots(figsize=(16, 1.8 + 0.55 * len(lanes)), layout="constrained")
    for name, begin, end in timeline.phases:
        shade = {"forward": "#eef4fb", "backward": "#fbf3ee", "step": "#f1eefb"}[name]
        ax.axvspan(begin, end, color=shade, zorder=0)
        ax.text((begin + end) / 2, -0.62, name, ha="center", va="bottom", fontsize=7)
    for row, lane in enumerate(lanes):
        for kind, color in COLORS.items():
            bars = union(
                (s.begin, s.end) for s in timeline.spans if (s.lane, s.kind) == (lane, kind)
            )
            ax.broken_barh([(b, e - b) for b, e in bars], (row - 0.35, 0.7), facecolors=color)
    ax.set_yticks(range(len(lanes)), lanes)
    ax.set_ylim(len(lanes) - 0.4, -0.75)
    ax.margins(x=0.005)
    ax.set_xlabel("ms")
    present = [kind for kind in COLORS if any(s.kind == kind for s in timeline.spans)]
    ax.legend(
        handles=[Patch(color=COLORS[kind], label=kind) for kind in present],
        ncols=len(present),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12 - 0.25 / len(lanes)),
        frameon=False,
    )
    ax.set_title("\n".join([title, *describe(timeline)]), fontsize=9, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
