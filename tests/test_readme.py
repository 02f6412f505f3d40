"""README: every code block runs as printed, those with ranks on two. DeepSpeed's wants a model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pretraining import command_line
from pretraining.config import load_config
from pretraining.ranks import check_restarts

import dist_lamb
from dist_lamb import checkpoint, deepspeed_adapter, schedules

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
#: run by tests/test_deepspeed_frameworks.py, on a model of its own
DEEPSPEED = [b for b in BLOCKS if "register()" in b]
RANKS = [b for b in BLOCKS if "init_process_group" in b]
ALONE = [b for b in BLOCKS if b not in RANKS and b not in DEEPSPEED]

DRIVER = """
import os, re, sys
import torch.distributed as dist

# One group for all blocks: a start of torchrun for each would take 8 s.
dist.init_process_group()
destroy = dist.destroy_process_group
dist.init_process_group = lambda: None
dist.destroy_process_group = dist.barrier
blocks = re.findall(r"```python\\n(.*?)```", open(sys.argv[1]).read(), re.DOTALL)
for number, block in enumerate(b for b in blocks if "init_process_group" in b):
    exec(compile(block, f"README.md block {number}", "exec"), {"__name__": "__main__"})
    os.write(1, f"block {number} done\\n".encode())
destroy()
"""


def test_the_first_screen() -> None:
    lines = TEXT.splitlines()
    assert len(lines) <= 250
    first = "\n".join(lines[:62])
    for wanted in ("pip install", "What do I use?", "ShardedLamb", "Trainer", "DeepSpeed"):
        assert wanted in first, wanted


def test_there_are_blocks_of_each_kind() -> None:
    assert (len(ALONE), len(RANKS), len(DEEPSPEED)) == (2, 2, 1)


@pytest.mark.parametrize("number", range(len(ALONE)))
def test_block(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(ALONE[number], "README.md", "exec"), {"__name__": "__main__"})
    checkpoint.wait()


@pytest.mark.xdist_group("programs")
def test_blocks_with_ranks(tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(driver), str(ROOT / "README.md")],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"block \d done", done.stdout)) == [
        f"block {i} done" for i in range(len(RANKS)) for _ in range(2)
    ]


def test_what_it_names_is_there() -> None:
    """Paths, and files of examples."""
    for name in re.findall(r"`((?:launch|configs|tests)/[\w./]*)`", TEXT):
        assert (ROOT / name).exists(), name
    examples = re.findall(r"`(\w+\.py)`", TEXT[TEXT.index("What do I use?") :][:2500])
    for name in examples:
        assert (ROOT / "launch" / "examples" / name).exists(), name
    assert len(set(examples)) >= 8


def test_the_command_of_pretraining(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would refuse before anything starts; tests/test_elastic.py runs such commands."""
    (command,) = re.findall(r"^torchrun (.*) launch/pretrain.py (.*)$", TEXT, re.MULTILINE)
    (restarts,) = re.findall(r"--max-restarts (\d+)", command[0])
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.chdir(ROOT)
    assert check_restarts(load_config(*command_line.parse(command[1].split(), "")).train) == ""


def test_links_of_the_results_are_there() -> None:
    folder = ROOT / "launch" / "results"
    text = (folder / "README.md").read_text()
    for name in re.findall(r"\]\(([\w.]+)\)", text):
        assert (folder / name).exists(), name


def test_help_says_what_a_user_needs() -> None:
    """Every public name has a docstring; those of classes and functions name errors or units."""
    assert "checkpoint" in str(dist_lamb.__doc__)
    for module in (dist_lamb, checkpoint, deepspeed_adapter, schedules):
        for name in getattr(module, "__all__", None) or [
            n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__
        ]:
            assert (getattr(module, name).__doc__ or "").strip(), f"{module.__name__}.{name}"
    for name in dist_lamb.__all__:
        assert name in str(dist_lamb.__doc__), name
