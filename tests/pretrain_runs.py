"""Runs of launch/pretrain.py for tests: in this process, in two forked ones, or under torchrun."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pretrain
import pytest
import torch.distributed as dist
from manual import soak_kill
from pretraining.report import read_log
from ranks import rank_context
from texts import write_texts

from dist_lamb.checkpoint import wait

ROOT = Path(__file__).parent.parent
STEPS, CRASH_AT = 12, 8
#: For what takes 16 s on two quiet cores.
RUN_SECONDS = 280.0
CONFIG = f"""
[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 64
max_position_embeddings = 16
hidden_dropout_prob = 0.0
attention_probs_dropout_prob = 0.0
initializer_range = 0.1
[data]
path = "PATH"
vocab_size = 400
seq_len = 16
held_out_fraction = 0.2
cache_dir = "CACHE"
[optim]
lr = 5e-2
base_batch = 16
warmup_epochs = 0.02
[train]
steps = {STEPS}
global_batch = 16
micro_batch = 4
device = "cpu"
log_every = 3
eval_every = 4
eval_sequences = 21
save_every = 5
"""


def write_config(folder: Path) -> Path:
    """A config with texts and a cache of its own in ``folder``."""
    texts = write_texts(folder / "texts", files=60, lines=20)
    path = folder / "tiny.toml"
    path.write_text(CONFIG.replace("PATH", str(texts)).replace("CACHE", str(folder / "cache")))
    return path


def run_here(config: Path, run_dir: Path, *overrides: str) -> list[dict[str, Any]]:
    """A run of one rank, in this process; its log."""
    pretrain.main([str(config), "--set", f"train.run_dir={run_dir}", *overrides])
    return read_log(run_dir / "log.jsonl")


def broken_run(config: Path, run_dir: Path, *overrides: str) -> None:
    """A run of one rank, in this process, that raises in step ``CRASH_AT``."""
    step = pretrain._Loop.step

    def raising(self: Any, number: int) -> bool:
        if number == CRASH_AT:
            wait()
            raise ZeroDivisionError
        return step(self, number)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pretrain._Loop, "step", raising)
        with pytest.raises(ZeroDivisionError):
            run_here(config, run_dir, *overrides)
    dist.destroy_process_group()


def everything(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if not path.name.startswith(".owner-")  # its beat is written anew every second
    }


def refused(config: Path, run: Path, capsys: Any, *overrides: str) -> str:
    """The message of a run that must fail and leave its folder as it was."""
    before = everything(run)
    with pytest.raises(SystemExit):
        run_here(config, run, *overrides)
    if dist.is_initialized():
        dist.destroy_process_group()
    assert everything(run) == before
    return capsys.readouterr().err.strip().splitlines()[-1]


def torchrun(script: Path, config: Path, run_dir: Path, *overrides: str, ranks: int = 2) -> str:
    """A run under torchrun, in processes of its own; what it printed. Raises if it failed, of one
    that hangs with what every process was doing.
    """
    command = soak_kill.command(config, run_dir, ranks, 0, *overrides, script=script)
    status, printed = _launched(command, script.name)
    if status != 0:
        raise RuntimeError(printed if status else f"hung for {RUN_SECONDS} s:\n{printed}")
    return printed


def crash() -> None:
    """Have this process die in the step after the log was written further than the checkpoint."""
    step = pretrain._Loop.step

    def crashing(self: Any, number: int) -> bool:
        if number == CRASH_AT:
            wait()
            os._exit(9)
        return step(self, number)

    pretrain._Loop.step = crashing  # type: ignore[method-assign]


def run_on_ranks(
    config: Path, run_dir: Path, *overrides: str, before: Callable[[], None] | None = None
) -> str:
    """A run of two ranks as torchrun would start them, forked from a process that has imported
    all; what it printed. ``before`` is called in each. Raises ``RuntimeError`` if one failed.
    """
    with socket.socket() as free, tempfile.NamedTemporaryFile() as output:
        free.bind(("127.0.0.1", 0))
        settings = {
            **soak_kill.environment(),
            **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
            "MASTER_PORT": str(free.getsockname()[1]),
        }
        argv = [str(config), "--set", f"train.run_dir={run_dir}", *overrides]
        free.close()
        ranks = [
            rank_context().Process(target=_rank, args=(rank, settings, argv, output.name, before))
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(RUN_SECONDS)
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
        printed = Path(output.name).read_text()
    if codes != [0, 0]:
        raise RuntimeError(f"exit codes {codes}\n{printed}")
    return printed


def _rank(
    rank: int,
    settings: dict[str, str],
    argv: list[str],
    output: str,
    before: Callable[[], None] | None,
) -> None:
    gc.freeze()  # as ranks.run_ranks
    os.environ.clear()
    os.environ.update(settings, RANK=str(rank), LOCAL_RANK=str(rank))
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    if before is not None:
        before()
    pretrain.main(argv)


def _launched(command: list[str], program: str) -> tuple[int | None, str]:
    """(exit status of a torchrun of ``program``, what it printed); None: stopped, since it hung."""
    # A file: whoever inherits a pipe and outlives the run would keep it open.
    with tempfile.TemporaryFile("w+") as printed:
        job = subprocess.Popen(
            command,
            env={**soak_kill.environment(), "PYTHONFAULTHANDLER": "1"},
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
        status: int | None = None
        try:
            status = job.wait(RUN_SECONDS)
        except subprocess.TimeoutExpired:
            job.send_signal(signal.SIGSTOP)  # or it would end the others after the first
            for rank in soak_kill.children(job.pid, program):
                os.kill(rank, signal.SIGABRT)  # the fault handler prints its stacks
                time.sleep(1.0)
            job.kill()
            job.wait()
        printed.seek(0)
        return status, printed.read()


def numbers(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What must not depend on time: all but tokens/s."""
    return [
        (row["kind"], row["step"], row["loss"], row.get("lr"), row.get("accuracy"))
        for row in sorted(rows, key=lambda row: (row["step"], row["kind"]))
    ]


def difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """The greatest difference of losses; the rows must be of the same steps and lr."""
    pairs = list(zip(numbers(one), numbers(other), strict=True))
    assert all((a[0], a[1], a[3]) == (b[0], b[1], b[3]) for a, b in pairs)
    return max(abs(a[2] - b[2]) for a, b in pairs)
