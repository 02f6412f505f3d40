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

pytestmark = pytest.mark.xdist_group("programs")


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
    """SIGUSR1 to one of two ranks: both save after the same step and end with status 0. SIGTERM
    and SIGINT, to one rank in this process: the same."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    steps, before = 400, signal.getsignal(signal.SIGINT)
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

    # and on with one rank, which gets the other signals, and once more to the end of a shorter run
    original = pretrain._Loop.step
    signals = {at + 3: signal.SIGTERM, at + 4: signal.SIGINT}

    def preempted(self: Any, step: int) -> bool:
        if step in signals:
            os.kill(os.getpid(), signals[step])
        return original(self, step)

    def run(last: int) -> None:
        here = f"train.run_dir={tmp_path}/run"
        pretrain.main([str(config), "--set", here, f"train.steps={last}"])

    try:
        with monkeypatch.context() as patched:
            patched.setattr(pretrain._Loop, "step", preempted)
            run(steps)
            interrupt = signal.getsignal(signal.SIGINT)
            run(steps)
        printed = capsys.readouterr().out
        assert f"resumed at step {at}, sample {at * soak_kill.GLOBAL_BATCH}, from" in printed
        assert f"stopped after step {at + 3} by SIGTERM" in printed
        assert f"stopped after step {at + 4} by SIGINT" in printed
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == interrupt == before
        run(at + 6)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    rows = [row for row in read_log(tmp_path / "run" / "log.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, at + 7))
    assert [row["samples"] for row in rows] == [
        soak_kill.GLOBAL_BATCH * step for step in range(1, at + 7)
    ]


# The third step takes for ever where the environment says so.
SLOW = """
import os, sys, time
import pretrain

step = pretrain._Loop.step
def slow(self, number):
    if number == 3 + int(os.environ["SLOW_AFTER"]):
        print("a long step", flush=True)
        time.sleep(float(os.environ["SLOW_SECONDS"]))
    return step(self, number)
pretrain._Loop.step = slow
pretrain.main(sys.argv[1:])
"""


def test_ctrl_c_saves_and_a_second_one_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To torchrun, as from a terminal: the ranks are in sessions of their own."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    config = soak_kill.write_config(tmp_path, 400)
    saves = tmp_path / "run" / "checkpoints"

    def interrupted(after: int, seconds: float, ranks: int, again: bool) -> tuple[int, list[str]]:
        """Status, and the lines from the first Ctrl-C on."""
        monkeypatch.setenv("SLOW_AFTER", str(after))
        monkeypatch.setenv("SLOW_SECONDS", str(seconds))
        job = soak_kill.Job(config, tmp_path / "run", ranks, 1, script=script)
        assert job.until("a long step", timeout=200), "".join(job.printed)
        begin = len(job.printed)
        job.process.send_signal(signal.SIGINT)
        assert job.until("ending after this step; again to end at once", timeout=60)
        workers = soak_kill.children(job.process.pid, script.name)
        assert len(workers) == ranks
        if again:
            job.process.send_signal(signal.SIGINT)
        status = job.process.wait(100)
        for worker in workers:
            soak_kill.wait_for_end(worker, seconds=60)
        job.until("no such line", timeout=60)
        return status, job.printed[begin:]

    status, lines = interrupted(0, 1.0, 2, again=False)
    assert status == 130, lines
    assert not any("Traceback" in line for line in lines), lines
    latest = checkpoint.latest(saves)
    assert latest is not None
    at = int(latest.name.removeprefix("step-"))
    assert at >= 3
    assert any(f"stopped after step {at} by SIGINT; start again to go on" in line for line in lines)

    # The step at hand takes an hour: nothing waits for it, and nothing is left running.
    status, lines = interrupted(at, 3600.0, 1, again=True)
    assert status == 130, lines
    assert not any("Traceback" in line for line in lines), lines
    latest = checkpoint.latest(saves)
    assert latest is not None
    assert at <= int(latest.name.removeprefix("step-")) < at + 3


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


def test_a_kill(tmp_path: Path) -> None:
    counts = soak_kill.soak(tmp_path, kills=1, steps=50, within=0.2, first_saved=True)
    print(counts)
    assert not counts.lost, (tmp_path / "killed.log").read_text()[-4000:]
    assert counts.kills >= 1
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
