"""launch/study.py where a user errs: folders of others, results of another study, bad values."""

from __future__ import annotations

from pathlib import Path

import pytest
import study
from test_study import SMALL
from texts import write_texts

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def make_data(folder: Path, *more: str, seed: int = 0) -> int:
    """Tokens of made-up text in ``folder``/data."""
    texts = write_texts(folder / "texts", files=40, lines=30, seed=seed)
    given = ["data", str(texts), "--out", str(folder / "data"), "--work", str(folder / "work")]
    return study.main([*given, "--vocab-size", "300", "--held-out", "0.2", *more])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with study.toml and tokens in data/."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.toml").write_text(SMALL)
    assert make_data(folder) == 0
    return folder


def test_collecting_text_removes_no_folder_of_the_user(tmp_path: Path) -> None:
    """``--work`` may be a folder with a text/ in it that is none of ours."""
    work = tmp_path / "work"
    for mine in (work / "text" / "thesis.txt", work / "text" / "00" / "000000.txt"):
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text("years of work")
    for _ in range(2):
        assert make_data(tmp_path) == 0
        assert {p.name for p in work.iterdir()} == {"text", "cache"}
        assert {p.name for p in (work / "text").rglob("*")} == {"thesis.txt", "00", "000000.txt"}
        assert (work / "text" / "00" / "000000.txt").read_text() == "years of work"
    # Where it was collected decides nothing: one cache entry serves both times.
    assert len([p for p in (work / "cache").iterdir() if not p.name.startswith(".")]) == 1
    meta = (tmp_path / "data" / "meta.json").read_text()
    assert make_data(tmp_path, "--work", str(tmp_path / "other")) == 0
    assert (tmp_path / "data" / "meta.json").read_text() == meta


def test_data_does_not_replace_a_file_of_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = tmp_path / "data" / "meta.json"
    meta.parent.mkdir()
    meta.write_text("mine")
    assert make_data(tmp_path) == 2
    assert str(meta) in capsys.readouterr().err
    assert [p.read_text() for p in meta.parent.iterdir()] == ["mine"]
