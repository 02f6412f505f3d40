"""What is shipped: README's first loop, the command, the source distribution."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def project() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return dict(tomllib.load(file)["project"])


def test_readmes_first_loop_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    exec(compile(block[1], "README.md", "exec"), {"__name__": "__main__"})
    losses = re.findall(r"^step (\d+): loss ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert [step for step, _ in losses] == ["50", "100", "150", "200"]
    assert float(losses[-1][1]) < 0.5 * float(losses[0][1])


def test_readmes_extras_are_there() -> None:
    line = re.search(r"^pip install '\.\[(.*)\]'", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert line is not None
    extras = project()["optional-dependencies"]
    assert isinstance(extras, dict)
    assert set(line[1].split(",")) == extras.keys() - {"dev"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scripts = project()["scripts"]
    assert isinstance(scripts, dict)
    main = EntryPoint("dist-lamb", scripts["dist-lamb"], "console_scripts").load()
    assert main(["inspect", str(tmp_path)]) == 1
    assert f"{tmp_path}: no checkpoint here" in capsys.readouterr().err


def test_the_source_distribution_has_what_its_tests_need(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    for folder in ("dist_lamb", "launch", "tests", "configs"):
        shipped = {p.relative_to(unpacked) for p in (unpacked / folder).rglob("*")}
        wanted = {p.relative_to(source) for p in (source / folder).rglob("*")}
        assert not wanted - shipped
    # One that needs launch/ and configs/; all others would take as long as the suite.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/test_pretrain_config.py",
        ],
        cwd=unpacked,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


#: Prints what ShardedLamb did where nothing can be imported but what pyproject.toml asks for.
ALONE = """
import re, sys
from importlib import metadata

needed, left = set(), {needed}
while left:
    name = re.sub("[-_.]+", "-", left.pop()).lower()
    if name in needed:
        continue
    needed.add(name)
    try:
        found = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        continue
    left += [re.match("[\\\\w.-]+", r)[0] for r in found if "extra ==" not in r]
owners = metadata.packages_distributions()


class Without:
    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, path=None, target=None):
        of = {{re.sub("[-_.]+", "-", d).lower() for d in owners.get(name, ())}}
        if of and not of & needed and name != "dist_lamb":
            return None
        return self._finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

import torch
import torch.distributed as dist

from dist_lamb import ShardedLamb

rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
model = torch.nn.Linear(4, 2)
optimizer = ShardedLamb(model, lr=0.1, max_grad_norm=1.0)
model(torch.ones(3, 4)).sum().backward()
optimizer.step()
assert "rich" in owners and "rich" not in sys.modules
print("trained", len(optimizer.trust_ratios()))
dist.destroy_process_group()
"""


def test_what_is_installed_with_it_is_enough(tmp_path: Path) -> None:
    """On a fresh machine: torch brings no NumPy, its collectives of objects need it."""
    required = project()["dependencies"]
    assert isinstance(required, list)
    names = [re.split(r"[<>=!~;\[ ]", r)[0] for r in required]
    script = ALONE.format(needed=names)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for out, err in [rank.communicate() for rank in ranks]:
        assert out == "trained 2\n", err
