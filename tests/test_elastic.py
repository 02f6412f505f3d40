"""launch/pretrain.py ended by signals and kills, and started again with other numbers of ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pretrain
import pytest
import torch
import torch.distributed as dist
from manual import soak_kill
from pretraining.batches import TrainBatches
from pretraining.config import ConfigError, load_config
from pretraining.masking import MaskedSequences
from pretraining.ranks import check_restarts
from pretraining.report import read_log

from dist_lamb import checkpoint

pytestmark = pytest.mark.xdist_group("distributed")


class _Rows:
    """Sequences that are their own numbers, unmasked: shows which a rank takes."""

    seq_len = 1

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def take(self, indices: Any) -> Any:
        return indices[:, None]

    def apply(self, sequences: Any, rows: Any, key: int) -> MaskedSequences:
        return MaskedSequences(sequences, rows, rows)


def _drawn(world: int, steps: int, state: dict[str, Any] | None) -> tuple[list[Any], Any]:
    """The samples of each step over all ranks, and the position afterwards."""
    rows = _Rows(50)
    ranks = [
        TrainBatches(
            rows,  # type: ignore[arg-type]
            rows,  # type: ignore[arg-type]
            seed=3,
            global_batch=12,
            micro_batch=1,
            rank=rank,
            world_size=world,
        )
        for rank in range(world)
    ]
    for batches in ranks:
        if state is not None:
            batches.load_state_dict(state)
    found = []
    for _ in range(steps):
        parts = [part.input_ids[:, 0] for batches in ranks for part in batches.next_batch()]
        found.append(np.sort(np.concatenate(parts)).tolist())
    states = [batches.state_dict() for batches in ranks]
    assert all(s == states[0] for s in states)
    return found, states[0]


def test_no_sample_is_lost_or_repeated() -> None:
    """Whatever the numbers of ranks: every step has its samples, every epoch each sample once."""
    whole, end = _drawn(1, 25, None)
    found: list[Any] = []
    state = None
    for world, steps in ((4, 3), (2, 5), (3, 1), (6, 7), (1, 4), (12, 5)):
        part, state = _drawn(world, steps, state)
        found += part
    assert found == whole
    assert state == end
    row = [sample for batch in whole for sample in batch]  # 300 samples: 6 epochs of 50
    assert sorted(row) == sorted(list(range(50)) * 6)


def test_a_signal_saves_and_ends_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """SIGUSR1 to one of two ranks: both save after the same step and end with status 0."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    steps = 400
    config = soak_kill.write_config(tmp_path, steps)
    job = soak_kill.Job(config, tmp_path / "run", ranks=2, max_restarts=1)
    assert job.until("^ *10/", timeout=200)
    rank = soak_kill.children(job.process.pid)[1]
    os.kill(rank, signal.SIGUSR1)
    stopped = job.until(r"stopped after step (\d+) by", timeout=60)
    assert stopped, "".join(job.printed)
    assert job.process.wait(60) == 0, "".join(job.printed)
    at = int(stopped[1])
    latest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert latest is not None
    assert latest.name == f"step-{at}"
    assert 10 <= at < steps

    # and on with one rank, which gets SIGTERM this time, and once more to the end of a shorter run
    original = pretrain._Loop.step

    def preempted(self: Any, step: int) -> bool:
        if step == at + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    def run(last: int) -> None:
        here = f"train.run_dir={tmp_path}/run"
        pretrain.main([str(config), "--set", here, f"train.steps={last}"])

    try:
        with monkeypatch.context() as patched:
            patched.setattr(pretrain._Loop, "step", preempted)
            run(steps)
        printed = capsys.readouterr().out
        assert f"resumed at step {at}, sample {at * soak_kill.GLOBAL_BATCH}, from" in printed
        assert f"stopped after step {at + 3} by SIGTERM" in printed
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        run(at + 6)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    rows = [row for row in read_log(tmp_path / "run" / "log.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, at + 7))
    assert [row["samples"] for row in rows] == [
        soak_kill.GLOBAL_BATCH * step for step in range(1, at + 7)
    ]


def test_restarts_that_would_start_over_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = soak_kill.write_config(tmp_path, 3)
    never = load_config(config, ["train.resume=never"]).train
    auto = load_config(config).train
    for name in ("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    assert check_restarts(never) == ""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert check_restarts(auto) == ""
    with pytest.raises(ConfigError, match="every restart would start over"):
        check_restarts(never)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in check_restarts(auto)


def test_a_few_kills(tmp_path: Path) -> None:
    # Of 27 ms on a quiet machine; the kills come up to 3 s after a start.
    counts = soak_kill.soak(tmp_path, kills=2, steps=300, first_saved=True)
    print(counts)
    assert not counts.lost, (tmp_path / "killed.log").read_text()[-4000:]
    assert counts.kills >= 2
    assert counts.restarts >= 1


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_kills(tmp_path: Path) -> None:
    # Steps enough that the run does not end before: on a quiet machine 3000 saw 37 kills.
    counts = soak_kill.soak(tmp_path, kills=100, steps=12_000)
    print(counts)
    assert not counts.lost, (tmp_path / "killed.log").read_text()[-4000:]
    assert counts.kills >= 100
    assert counts.inside_a_save > 0
