"""launch/pretrain.py with gradients that are not finite: counted, survived, too many in a row."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pretrain
import pytest
import torch
import torch.distributed as dist
from pretrain_runs import STEPS, numbers, run_here, torchrun
from pretraining.config import PretrainConfig, load_config
from pretraining.ranks import Ranks
from pretraining.report import read_log
from pretraining.skips import Counted, SkippedSteps
from ranks import run_ranks

from dist_lamb.checkpoint import wait

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unable to enable fault handler"),
    pytest.mark.usefixtures("no_process_group_left"),
]

#: Nothing is read for another reason before the end.
QUIET = ("train.log_every=100", "train.eval_every=0", "train.save_every=0")


def spoil(
    patched: pytest.MonkeyPatch, steps: Collection[int], rank: int = 0, loss: bool = False
) -> None:
    """Runs from now on have an infinite gradient on ``rank`` at ``steps``; ``loss``: a NaN loss."""
    number = 0
    original_step, original_build = pretrain._Loop.step, pretrain.build_engine

    def step(self: Any, this: int) -> bool:
        nonlocal number
        number = this
        return original_step(self, this)

    def build(*args: Any) -> Any:
        engine = original_build(*args)
        backward = engine.backward

        def spoiled(value: torch.Tensor) -> None:
            if number not in steps or dist.get_rank() != rank:
                return backward(value)
            if loss:
                with torch.no_grad():
                    value.fill_(math.nan)  # what the loop has is this tensor
            return backward(value * math.inf)

        engine.backward = spoiled
        return engine

    patched.setattr(pretrain._Loop, "step", step)
    patched.setattr(pretrain, "build_engine", build)


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda *args, **more: spoil(monkeypatch, *args, **more)


def counts(rows: Sequence[dict[str, Any]]) -> list[int]:
    return [row["skipped_steps"] for row in rows if row["kind"] == "train"]


def error_of(capsys: Any, run: Callable[[], Any]) -> str:
    """The one line with which a run ends."""
    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == 2
    if dist.is_initialized():
        wait()  # for a checkpoint that is being written in the process group
        dist.destroy_process_group()
    line: str = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("pretrain: error: ")
    return line


# --- counting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_streaks_are_exact_however_counts_are_read(seed: int) -> None:
    draw = random.Random(seed)
    limit, start = draw.randint(1, 6), draw.randint(0, 3)
    skips = [draw.random() < 0.6 for _ in range(60)]
    in_a_row, first_over = 0, None  # the first step after which there are too many
    for step, skipped in enumerate(skips, start=1):
        in_a_row = in_a_row + 1 if skipped else 0
        if in_a_row == limit and first_over is None:
            first_over = step

    total = start
    watched = SkippedSteps(limit, torch.tensor(start))
    taken: list[Counted] = []
    seen = None
    for step, skipped in enumerate(skips, start=1):
        total += skipped
        watched.add(step, torch.tensor(total))
        if watched.too_many() and seen is None:
            seen = step
        if draw.random() < 0.2:
            taken += watched.take()
            if watched.too_many() and seen is None:
                seen = step
    taken += watched.take()
    assert [one.skipped for one in taken] == skips
    assert [one.total for one in taken] == [start + sum(skips[: i + 1]) for i in range(len(skips))]
    assert watched.take() == []
    assert watched.too_many() == (first_over is not None)
    if first_over is not None and seen is not None:
        assert first_over <= seen < first_over + limit


def test_no_limit() -> None:
    watched = SkippedSteps(0, torch.tensor(0.0))  # counts may be floating-point
    for step in range(1, 50):
        watched.add(step, torch.tensor(float(step)))
        assert not watched.too_many()
    assert watched.take()[-1] == (49, True)
    assert watched.longest == (49, 49)
    assert not watched.too_many()


def test_counts_are_read_once_in_limit_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    stack = torch.stack

    def counted(*args: Any) -> torch.Tensor:
        nonlocal reads
        reads += 1
        return stack(*args)

    monkeypatch.setattr(torch, "stack", counted)
    watched = SkippedSteps(10, torch.tensor(0))
    for step in range(1, 101):
        watched.add(step, torch.tensor(0))
        watched.too_many()
    assert reads == 10


# --- runs -----------------------------------------------------------------------------------------


def test_finite_gradients_give_the_same_bits(config: Path, tmp_path: Path, capsys: Any) -> None:
    skip = run_here(config, tmp_path / "skip")
    assert counts(skip) == [0] * STEPS
    assert "skipped" not in capsys.readouterr().out
    propagate = run_here(config, tmp_path / "propagate", "optim.nonfinite=propagate")
    assert numbers(skip) == numbers(propagate)


def test_skipped_steps_are_counted_and_training_goes_on(
    config: Path,
    tmp_path: Path,
    capsys: Any,
    spoiled: Callable[..., None],
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spoiled({3, 4, 7})
    rows = run_here(config, tmp_path / "run")
    assert counts(rows) == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    # step 3 is logged and step 4 evaluated: there are no trust ratios of a skipped step
    train = {row["step"]: row for row in rows if row["kind"] == "train"}
    assert [step for step in (3, 4, 6, 9, 12) if train[step]["trust"]] == [6, 9, 12]

    printed = capsys.readouterr().out.splitlines()
    lines = {int(line.split("/")[0]): line for line in printed if f"/{STEPS}  loss" in line}
    assert "skipped 1 " in lines[3]
    assert "skipped 2 " in lines[6]
    assert "skipped 3 " in lines[12]
    assert "skipped" not in lines.get(2, "")

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("train/skipped_steps")}
    assert shown == dict(enumerate(counts(rows), start=1))


def test_a_loss_that_is_not_finite(
    config: Path,
    tmp_path: Path,
    capsys: Any,
    spoiled: Callable[..., None],
) -> None:
    """In a skipped step it is logged; with "propagate" it ends the run."""
    spoiled({5}, loss=True)
    rows = run_here(config, tmp_path / "skip")
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}
    assert [step for step, loss in losses.items() if not math.isfinite(loss)] == [5]
    assert counts(rows)[-1] == 1
    assert (tmp_path / "skip" / "curves.png").exists()

    line = error_of(
        capsys, lambda: run_here(config, tmp_path / "propagate", "optim.nonfinite=propagate")
    )
    assert "the loss is nan at step 5 " in line
    assert counts(read_log(tmp_path / "propagate" / "log.jsonl")) == [0] * 5


def test_a_held_out_loss_that_is_not_finite_ends_the_run(
    config: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    """A run too short to skip max_skipped_in_a_row steps must not end well with a ruined model."""
    few = ("optim.lr=1e30", "train.steps=6", *QUIET)
    line = error_of(capsys, lambda: run_here(config, tmp_path / "run", *few))
    assert "the held-out loss is " in line
    assert "after step 6; lower optim.lr" in line
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("steps", "limit", "overrides", "length", "last", "total"),
    [
        # read at the log steps 3, 6, ..: steps 5 to 9 are 5 in a row, seen as 5 at step 9
        (range(5, 13), 3, ("train.log_every=3", "train.eval_every=0"), 5, 9, 5),
        # read once in 3 steps
        (range(5, 13), 3, QUIET, 5, 9, 5),
        # over before it is seen at step 6
        ({2, 3, 4}, 3, QUIET, 3, 4, 3),
        ({1, 4, 5, 6, 8}, 3, QUIET, 3, 6, 4),
        ({6}, 1, QUIET, 1, 6, 1),
    ],
)
def test_too_many_in_a_row_end_the_run(
    config: Path,
    tmp_path: Path,
    capsys: Any,
    spoiled: Callable[..., None],
    steps: Collection[int],
    limit: int,
    overrides: tuple[str, ...],
    length: int,
    last: int,
    total: int,
) -> None:
    spoiled(steps)
    settings = (f"train.max_skipped_in_a_row={limit}", *overrides)
    line = error_of(capsys, lambda: run_here(config, tmp_path / "run", *settings))
    assert f"{length} steps in a row up to step {last} were skipped" in line
    assert f"({total} skipped steps in all, lr " in line
    assert "lower optim.lr or lengthen the warm-up, or raise" in line
    assert f"train.max_skipped_in_a_row (now {limit})" in line
    # all that was made is logged
    logged = counts(read_log(tmp_path / "run" / "log.jsonl"))
    assert logged[-1] == total
    assert len(logged) < last + limit


@pytest.mark.parametrize(("steps", "limit"), [({2, 3, 5, 6, 8, 9, 11, 12}, 3), (range(1, 13), 0)])
def test_not_too_many_in_a_row(
    config: Path,
    tmp_path: Path,
    spoiled: Callable[..., None],
    steps: Collection[int],
    limit: int,
) -> None:
    spoiled(steps)
    rows = run_here(config, tmp_path / "run", f"train.max_skipped_in_a_row={limit}")
    assert counts(rows)[-1] == len(steps)
    if len(steps) == STEPS:
        held_out = [row["loss"] for row in rows if row["kind"] == "held_out"]
        assert held_out == [held_out[0]] * len(held_out)


def test_resumed_runs_go_on_counting(
    config: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        spoil(patched, {2, 4, 5, 8})
        whole = run_here(config, tmp_path / "whole")
        run_here(config, tmp_path / "run", "train.steps=5")
        # of a run of 12 steps, so the schedule is another one; the counts are the same
        rows = run_here(config, tmp_path / "run")
    assert counts(rows) == counts(whole) == [0, 1, 1, 2, 3, 3, 3, 4, 4, 4, 4, 4]

    # both settings may change, and are those of the run that goes on
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patched:
        spoil(patched, {13}, loss=True)
        changes = ("optim.nonfinite=propagate", "train.max_skipped_in_a_row=3", "train.steps=14")
        line = error_of(capsys, lambda: run_here(config, tmp_path / "run", *changes))
    assert "the loss is nan at step 13 " in line
    rows = run_here(config, tmp_path / "run", *changes)
    assert counts(rows) == [*counts(whole), 4, 4]
    assert "changed since: optim.nonfinite: 'skip' -> 'propagate'" in capsys.readouterr().out

    # and a checkpoint from before they existed
    as_dict = PretrainConfig.as_dict

    def before(self: PretrainConfig) -> dict[str, dict[str, Any]]:
        settings = as_dict(self)
        del settings["optim"]["nonfinite"], settings["train"]["max_skipped_in_a_row"]
        return settings

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PretrainConfig, "as_dict", before)
        run_here(config, tmp_path / "old", "train.steps=5", "optim.nonfinite=propagate")
    spoil(monkeypatch, {6, 7})
    assert counts(run_here(config, tmp_path / "old")) == [0] * 5 + [1] + [2] * 6


# --- several ranks --------------------------------------------------------------------------------


def _several(rank: int, world: int, config: Path, runs: Path, engine: str) -> list[str]:
    """A run with an infinite gradient on rank 1 alone at times; the error of another one."""
    ranks = Ranks(rank, rank, world, torch.device("cpu"))

    def load(name: str, *overrides: str) -> PretrainConfig:
        settings = (f"train.run_dir={runs / name}", f"optim.engine={engine}", *overrides)
        return load_config(config, settings)

    with pytest.MonkeyPatch.context() as patched:
        spoil(patched, {3, 4, 7}, rank=1)
        pretrain.train(load("some"), ranks)
    with pytest.MonkeyPatch.context() as patched:
        spoil(patched, range(4, 100), rank=1)
        with pytest.raises(pretrain.Diverged) as caught:
            pretrain.train(load("many", "train.max_skipped_in_a_row=4", *QUIET), ranks)
    return [str(caught.value)]


@pytest.mark.xdist_group("programs")
@pytest.mark.parametrize("engine", ["sharded", "ddp", "fsdp2"])
def test_all_ranks_skip_what_one_cannot_use(config: Path, tmp_path: Path, engine: str) -> None:
    errors = run_ranks(2, tmp_path, _several, config, tmp_path / "runs", engine)
    assert errors[0] == errors[1]
    assert "5 steps in a row up to step 8 were skipped" in errors[0][0]
    some = read_log(tmp_path / "runs" / "some" / "log.jsonl")
    assert counts(some) == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert some[-1]["loss"] < some[0]["loss"] - 0.2
    many = read_log(tmp_path / "runs" / "many" / "log.jsonl")
    assert counts(many) == [0, 0, 0, 1, 2, 3, 4, 5]


# `spoil` in the processes of torchrun.
SPOILED = """
import sys
import pretrain
import pytest
from test_pretrain_nonfinite import spoil

spoil(pytest.MonkeyPatch(), STEPS, rank=1)
pretrain.main(sys.argv[1:])
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[[Collection[int]], Path]:
    # torchrun() sets PYTHONPATH to launch/ and the root, so the script adds this folder itself.
    def script(steps: Collection[int]) -> Path:
        path = tmp_path / "spoiled.py"
        text = SPOILED.replace("STEPS", repr(set(steps)))
        path.write_text(f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n{text}")
        return path

    return script


@pytest.mark.xdist_group("programs")
def test_torchrun_ends_with_the_message(
    config: Path,
    tmp_path: Path,
    script: Callable[[Collection[int]], Path],
) -> None:
    with pytest.raises(RuntimeError) as caught:
        torchrun(script(range(5, 13)), config, tmp_path / "run", "train.max_skipped_in_a_row=3")
    printed = str(caught.value)
    assert printed.count("pretrain: error: ") == 1
    assert "steps in a row up to step" in printed
    assert "exitcode  : 2" in printed


@pytest.mark.xdist_group("programs")
@pytest.mark.deepspeed_ops
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeed(
    config: Path,
    tmp_path: Path,
    script: Callable[[Collection[int]], Path],
    stage: int,
) -> None:
    """At stages 2 and 3 it is DeepSpeed that skips, which it does in float32 too."""
    settings = ("optim.engine=deepspeed", f"optim.stage={stage}")
    torchrun(script({3, 4, 7}), config, tmp_path / "run", *settings)
    rows = read_log(tmp_path / "run" / "log.jsonl")
    assert counts(rows) == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
