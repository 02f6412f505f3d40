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
