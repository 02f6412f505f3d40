"""kill -9 a rank of launch/pretrain.py at random moments, again and again, and see it come back.

    python tests/manual/soak_kill.py --kills 100 --folder /tmp/soak

Runs the job once undisturbed, then under ``torchrun --max-restarts`` while one rank after another
is killed, and compares the two logs. Half way a second job is started on the same folder, as by
mistake, while the kills go on: it must be refused. The last step waits for that. Prints its counts
and ends with status 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "launch"), str(ROOT / "tests"), str(ROOT)]

from pretraining.report import read_log  # noqa: E402
from texts import write_texts  # noqa: E402

from dist_lamb import checkpoint  # noqa: E402

GLOBAL_BATCH = 8

# A larger lr ends in NaN after some thousand steps: where a gradient has vanished LAMB still moves
# a tensor by lr times its norm.
CONFIG = """
[model]
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 64
max_position_embeddings = 16
initializer_range = 0.1
[data]
path = "{texts}"
vocab_size = 400
seq_len = 16
held_out_fraction = 0.2
cache_dir = "{cache}"
[optim]
lr = 5e-4
base_batch = 8
warmup_fraction = 0.1
[train]
steps = {steps}
global_batch = {batch}
micro_batch = 8
device = "cpu"
log_every = 10
eval_sequences = 16
save_every = 2
"""

# Else a run of few steps may be over before the second job has looked at its folder.
HELD = """
import os, sys, time
import pretrain

step = pretrain._Loop.step
def held(self, number):
    while number == self._config.train.steps and not os.path.exists({go!r}):
        time.sleep(0.05)
    return step(self, number)
pretrain._Loop.step = held
pretrain.main(sys.argv[1:])
"""


@dataclass
class Counts:
    """What happened, and what went wrong."""

    kills: int = 0
    inside_a_save: int = 0
    #: before the rank had got to training
    while_starting: int = 0
    restarts: int = 0
    #: jobs that were started on the same folder, and those of them that ended with the clear error
    intruders: int = 0
    refused: int = 0
    seconds: float = 0.0
    #: restarts that came back from an older checkpoint than was there when the rank was killed
    stepped_back: int = 0
    #: steps whose loss, lr or data position is not that of the undisturbed run
    other_steps: int = 0
    status: int = 0

    @property
    def lost(self) -> bool:
        mixed = self.intruders != self.refused
        return bool(self.stepped_back or self.other_steps or self.status or mixed)


def write_config(folder: Path, steps: int) -> Path:
    texts = write_texts(folder / "texts", files=60, lines=20)
    path = folder / "soak.toml"
    values = {"texts": texts, "cache": folder / "cache", "steps": steps, "batch": GLOBAL_BATCH}
    path.write_text(CONFIG.format(**values))
    return path


def command(
    config: Path,
    run_dir: Path,
    ranks: int,
    max_restarts: int = 0,
    *overrides: str,
    script: Path = ROOT / "launch" / "pretrain.py",
) -> list[str]:
    return [
        *(sys.executable, "-u", str(ROOT / "launch" / "torchrun.py"), "--standalone"),
        *("--nproc-per-node", str(ranks), "--max-restarts", str(max_restarts)),
        *(str(script), str(config), "--set", f"train.run_dir={run_dir}", *overrides),
    ]


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "launch"), str(ROOT)]),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": "1",
    }


def children(pid: int, program: str = "pretrain.py") -> list[int]:
    """Processes whose parent is ``pid`` and that run ``program``."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            # "pid (name) state parent ..."; the name may hold anything
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            line = (entry / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if entry.name.isdigit() and int(parent) == pid and program.encode() in line:
            found.append(int(entry.name))
    return found


def wait_for_end(pid: int, seconds: float) -> None:
    """Wait for a process that is no child of this one."""
    end = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > end:
            raise TimeoutError(f"process {pid} still runs after {seconds} s")
        time.sleep(0.05)


class Job:
    """torchrun, its output line by line, and its ranks."""

    def __init__(
        self,
        config: Path,
        run_dir: Path,
        ranks: int,
        max_restarts: int,
        *overrides: str,
        **how: Any,
    ) -> None:
        self.process = subprocess.Popen(
            command(config, run_dir, ranks, max_restarts, **how),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.printed: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed.append(line)
            self.lines.put(line)
        self.lines.put(None)

    def until(self, pattern: str, timeout: float) -> re.Match[str] | None:
        """The next line that matches; None if the job ended first."""
        end = time.monotonic() + timeout
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                text = "".join(self.printed[-60:])
                raise TimeoutError(
                    f"no line like {pattern} in {timeout} s; last:\n{text}"
                ) from None
            if line is None:
                return None
            match = re.search(pattern, line)
            if match:
                return match


def inside_a_save(checkpoints: Path) -> bool:
    return any(checkpoints.glob(".step-*.new-*"))


def soak(
    folder: Path,
    *,
    kills: int,
    steps: int,
    ranks: int = 2,
    seed: int = 0,
    within: float = 3.0,
    first_saved: bool = False,
    say: Any = print,
) -> Counts:
    """The undisturbed run, then the one with ``kills`` kills, each up to ``within`` seconds after a
    start; ``first_saved``: none before there is a checkpoint.

    Raises ``TimeoutError`` if a job hangs, ``RuntimeError`` if the undisturbed one fails.
    """
    began, rng, counts = time.monotonic(), random.Random(seed), Counts()
    folder.mkdir(parents=True, exist_ok=True)
    config = write_config(folder, steps)
    calm = subprocess.run(
        command(config, folder / "calm", ranks, 0),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    if calm.returncode:
        raise RuntimeError(calm.stdout)
    say(f"undisturbed: {time.monotonic() - began:.0f} s")

    saves, go = folder / "killed" / "checkpoints", folder / "go"
    script = folder / "held_pretrain.py"
    script.write_text(HELD.format(go=str(go)))
    restarts = 2 * kills + 10
    job, intruder = Job(config, folder / "killed", ranks, restarts, script=script), None
    try:
        before = 0  # the checkpoint that was there when a rank was killed
        while counts.kills < kills:
            match = job.until(r"(?:resumed at step (\d+),|^schedule:)", timeout=300)
            if match is None:
                break
            if match[1] is None and before == 0:
                # Every start prints the schedule; a resumed one says so in the line after.
                pass
            elif match[1] is None:
                continue
            else:
                counts.restarts += 1
                counts.stepped_back += int(match[1]) < before
            time.sleep(rng.uniform(0.0, within))
            while first_saved and checkpoint.latest(saves) is None and job.process.poll() is None:
                time.sleep(0.01)
            victims = children(job.process.pid)
            if not victims or job.process.poll() is not None:
                break
            latest = checkpoint.latest(saves)
            before = 0 if latest is None else int(latest.name.removeprefix("step-"))
            os.kill(rng.choice(victims), signal.SIGKILL)
            counts.kills += 1
            counts.inside_a_save += inside_a_save(saves)
            if rng.random() < 0.1 and counts.kills < kills:
                # and once more while the next ones start
                time.sleep(rng.uniform(2.0, 5.0))
                again = set(children(job.process.pid)) - set(victims)
                if again:
                    os.kill(rng.choice(sorted(again)), signal.SIGKILL)
                    counts.kills += 1
                    counts.while_starting += 1
            if intruder is None and 2 * counts.kills >= kills:
                counts.intruders += 1
                intruder = Job(config, folder / "killed", 1, max_restarts=0)
            if counts.kills % 10 < 2:
                say(f"{time.monotonic() - began:.0f} s, at step {before}: {counts}", flush=True)
        if intruder is not None:
            refused = intruder.until(r"train\.run_dir: .* writes here; stop it, or", timeout=300)
            counts.refused += bool(refused) and intruder.process.wait(60) != 0
            (folder / "intruder.log").write_text("".join(intruder.printed))
        go.touch()
        # The last restart counts as well; then on to the end.
        while (match := job.until(r"resumed at step (\d+),", timeout=1800)) is not None:
            counts.restarts += 1
            counts.stepped_back += int(match[1]) < before
        counts.status = job.process.wait(60)
    finally:
        for each in (job, intruder):
            if each is not None:
                rest = children(each.process.pid)
                each.process.kill()
                for pid in rest:
                    os.kill(pid, signal.SIGKILL)
    (folder / "killed.log").write_text("".join(job.printed))
    counts.other_steps = differing(folder / "calm", folder / "killed", steps)
    counts.seconds = round(time.monotonic() - began, 1)
    return counts


def differing(calm: Path, killed: Path, steps: int) -> int:
    """Steps that are missing, there twice, or not bit for bit those of the other run."""

    def rows(run: Path) -> dict[int, list[tuple[Any, ...]]]:
        found: dict[int, list[tuple[Any, ...]]] = {}
        for row in read_log(run / "log.jsonl"):
            if row["kind"] == "train":
                values = (row["loss"], row["lr"], row["samples"])
                found.setdefault(row["step"], []).append(values)
        return found

    one, other = rows(calm), rows(killed)
    assert sorted(one) == list(range(1, steps + 1))
    assert all(values[0][2] == step * GLOBAL_BATCH for step, values in one.items())
    return sum(one[step] != other.get(step) for step in one) + len(other.keys() - one.keys())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    counts = soak(
        given.folder, kills=given.kills, steps=given.steps, ranks=given.ranks, seed=given.seed
    )
    print(dataclasses.asdict(counts))
    return int(counts.lost or counts.kills < given.kills)


if __name__ == "__main__":
    sys.exit(main())
