"""launch/study.py where a user errs: folders of others, results of another study, bad values."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import study
import torch
from pretraining.config import ConfigError
from studying import results, training
from studying.config import StudyConfig, load_study
from studying.results import Row, Run
from studying.training import Job, Stopped, make_pack, train_rows
from test_study import CONFIG, ROOT, SMALL, made_up, row_of
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


def run(folder: Path, out: Path, *changes: tuple[str, str], minutes: str = "3") -> int:
    """``study.py run`` with ``folder``'s data and its study.toml, changed."""
    text = SMALL
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    config = out.parent / "study.toml"
    config.write_text(text)
    on = ["--data", str(folder / "data"), "--device", "cpu", "--minutes", minutes]
    return study.main(["run", str(config), "--out", str(out), *on])


@pytest.fixture(scope="module")
def trained(made: Path) -> Path:
    """The --out of a study that is done."""
    assert run(made, made / "out") == 0
    return made / "out"


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("samples = 64", "samples = 128", ["study.samples", "64", "128"]),
        ("evals = 4", "weight_decay = 0.1\nevals = 4", ["study.weight_decay", "0.01", "0.1"]),
        ("evals = 4", "max_grad_norm = 2.0\nevals = 4", ["study.max_grad_norm", "1.0", "2.0"]),
        ("hidden_size = 16", "hidden_size = 32", ["model.hidden_size", "16", "32"]),
        ('"adamw"\n', '"adamw"\neps = 1e-8\n', ["rules.adamw.eps", "1e-06", "1e-08"]),
        ('"lamb"\n', '"lamb-bfloat16"\n', ["rules.lamb.optimizer", "'lamb'", "'lamb-bfloat16'"]),
    ],
)
def test_rows_of_another_study_are_not_taken_for_its_own(
    made: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    named: list[str],
) -> None:
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run(made, out, (old, new)) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in [*named, str(out), "another --out"]), error
    # Nor does a report speak of them as this study's.
    for command in ("report", "plot"):
        assert study.main([command, str(out.parent / "study.toml"), "--out", str(out)]) == 2
        assert "is of another study" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_what_only_chooses_runs_may_change(
    made: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More seeds, lrs and rules: the rows that are there stay, and the new ones are added."""
    rows = results.read(out / "study.csv")
    more = '[rules.second]\noptimizer = "lamb"\neps = 1e-4\nlrs = [2e-2]\n\n[rules.lamb]'
    changes = (
        ("seeds = [0]", "seeds = [0, 1]"),
        ("[4e-3]", "[2e-3, 4e-3]"),
        ("1e5", "2e5"),
        ("[rules.lamb]", more),
    )
    assert run(made, out, *changes) == 0
    found = results.read(out / "study.csv")
    assert rows.items() <= found.items()
    assert {r.rule for r in found} == {"adamw", "lamb", "second"}
    # The rule that came later counts from now on, also for a config without it in between.
    assert run(made, out) == 0
    assert run(made, out, *changes[:3], ("[rules.lamb]", more.replace("1e-4", "1e-5"))) == 2
    assert "rules.second.eps: 0.0001 there, 1e-05 here" in capsys.readouterr().err


def test_a_rule_without_rows_may_change(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(made, out, minutes="0") == 0
    assert run(made, out, ('"lamb"\n', '"lamb"\neps = 1e-4\n')) == 0
    assert run(made, out) == 2


def test_a_half_life_at_another_base_batch_is_another_rule(made: Path, tmp_path: Path) -> None:
    """Its beta2 at batch 16 is another one."""
    out = tmp_path / "out"
    half = 'half_life = true\nbase = "lamb"\n'
    rule = ("[rules.lamb]", f'[rules.half]\noptimizer = "lamb"\nlrs = [2e-2]\n{half}\n[rules.lamb]')
    assert run(made, out, rule) == 0
    assert run(made, out, rule, ("[4, 16]", "[2, 4, 16]")) == 2
    assert run(made, out, ("[4, 16]", "[2, 4, 16]")) == 0


def test_rows_of_other_data_are_not_taken_for_its_own(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_data(tmp_path, seed=1) == 0
    capsys.readouterr()
    assert run(tmp_path, out) == 2
    assert "data.sha256" in capsys.readouterr().err


def test_rows_alone_are_gone_on_from(
    made: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As published ones: what they do not say is taken to be as now, and a line says so."""
    (out / "study.json").unlink()
    assert run(made, out) == 0
    said = capsys.readouterr().out
    assert len([x for x in said.splitlines() if "study.json" in x]) == 1
    assert f"6 rows of {out / 'study.csv'}" in said
    assert "0 new rows" in said
    assert run(made, out) == 0
    assert "study.json" not in capsys.readouterr().out
    assert run(made, out, ("samples = 64", "samples = 128")) == 2

    (out / "study.json").unlink()
    assert make_data(tmp_path, seed=1) == 0
    digest = next(iter(results.read(out / "study.csv").values())).data_sha256
    capsys.readouterr()
    assert run(tmp_path, out) == 0
    assert f"trained on other data: {digest}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("samples = 64", "samples = 128", "samples 64, here 128"),
        ("seq_len = 16", "seq_len = 8", "seq_len 1024, here 512"),
        ('"lamb"\n', '"lamb"\nbetas = [0.9, 0.99]\n', "beta2 0.999, here 0.99"),
    ],
)
def test_rows_alone_are_refused_where_they_say_that_they_are_of_another_study(
    made: Path, out: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, named: str
) -> None:
    (out / "study.json").unlink()
    assert run(made, out, (old, new)) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "another --out" in error
    assert not (out / "study.json").exists()


def test_probe_adds_no_rows_to_those_of_another_study(
    made: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "study.toml"
    config.write_text(SMALL.replace("samples = 64", "samples = 128"))
    on = ["--data", str(made / "data"), "--device", "cpu"]
    assert study.main(["probe", str(config), "--out", str(out), *on]) == 2
    assert "study.samples" in capsys.readouterr().err
    assert not (out / "noise.csv").exists()


def test_rows_of_a_rule_that_study_json_does_not_have_are_named(
    made: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They count, as where there is no study.json: not without a word."""
    noted = json.loads((out / "study.json").read_text())
    del noted["rules"]["lamb"]
    (out / "study.json").write_text(json.dumps(noted))
    assert run(made, out) == 0
    assert f"{out / 'study.json'} has no lamb: their rows in" in capsys.readouterr().out
    assert "lamb" in json.loads((out / "study.json").read_text())["rules"]


def test_a_damaged_study_json_is_an_error(
    made: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in ("", "[]", '{"study": {}}', '{"study": 1, "model": 1, "rules": 1, "data": 1}'):
        (out / "study.json").write_text(content)
        assert run(made, out) == 2
        assert f"{out / 'study.json'} is damaged" in capsys.readouterr().err


RUNS = (Run("decoder", "adamw", 4, 0.1, 4e-3, 0), Run("decoder", "lamb", 4, 0.1, 2e-2, 1))


def stopped(config: StudyConfig, path: Path) -> None:
    """An unfinished pack, stopped at the first evaluation after the start."""
    for _ in range(2):
        with pytest.raises(Stopped):
            train_rows(Job(config, RUNS, "eager", path, stop_at=0.0), made_up())


def numbers(rows: list[Row]) -> list[object]:
    return [(row.loss, row.train_loss, row.curve) for row in rows]


@pytest.mark.parametrize(
    "changed",
    [
        {"weight_decay": 0.5},
        {"rules": {**CONFIG.rules, "lamb": replace(CONFIG.rules["lamb"], eps=0.1)}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_an_unfinished_pack_of_another_study_is_not_gone_on_with(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    path, lines = tmp_path / "pack.pt", list[str]()
    config = replace(CONFIG, **changed)
    stopped(CONFIG, path)
    rows = train_rows(Job(config, RUNS, "eager", path), made_up(), lines.append)
    assert numbers(rows) == numbers(train_rows(Job(config, RUNS, "eager", None), made_up()))
    assert len([line for line in lines if str(path) in line and "another study" in line]) == 1


def test_an_unfinished_pack_of_other_data_is_not_gone_on_with(tmp_path: Path) -> None:
    path, lines = tmp_path / "pack.pt", list[str]()
    stopped(CONFIG, path)
    other = replace(made_up(), sha256="other")
    train_rows(Job(CONFIG, RUNS, "eager", path), other, lines.append)
    assert len([line for line in lines if str(path) in line and "another study" in line]) == 1


@pytest.mark.parametrize(
    "damage", ["cut off", "empty", "other bytes", "other content", "no count", "a tensor"]
)
def test_a_damaged_pack_is_trained_from_the_start(tmp_path: Path, damage: str) -> None:
    path, lines = tmp_path / "pack.pt", list[str]()
    stopped(CONFIG, path)
    whole = path.read_bytes()
    saved = torch.load(path, weights_only=True)
    if damage == "cut off":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other bytes":
        path.write_bytes(b"not a checkpoint\n" * 9)
    elif damage == "other content":
        torch.save([1, 2], path)
    elif damage == "no count":
        del saved["done"]
        torch.save(saved, path)
    else:
        # The last one, so that others would have been copied before it is missed.
        del saved["tensors"][list(saved["tensors"])[-1]]
        torch.save(saved, path)
    rows = train_rows(Job(CONFIG, RUNS, "eager", path), made_up(), lines.append)
    assert numbers(rows) == numbers(train_rows(Job(CONFIG, RUNS, "eager", None), made_up()))
    assert len([line for line in lines if str(path) in line and "from the start" in line]) == 1
    assert not path.exists()


def test_an_error_in_a_pack_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch without CUDA has no device to wait for."""

    def fail(*_: Any) -> None:
        raise RuntimeError("what went wrong")

    monkeypatch.setattr(training, "_failed", set())
    monkeypatch.setattr(training.Pack, "_step", fail)
    lines: list[str] = []
    with pytest.raises(RuntimeError, match="what went wrong"):
        make_pack(CONFIG, RUNS, made_up(), "compile", lines.append)
    assert len([line for line in lines if "what went wrong" in line]) == 2  # compile and graph


def refused(folder: Path, old: str, new: str) -> str:
    assert old in SMALL
    path = folder / "bad.toml"
    path.write_text(SMALL.replace(old, new, 1))
    with pytest.raises(ConfigError) as error:
        load_study(path)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("evals = 4", "evals = 0", "study.evals must be an integer >= 1, got 0"),
        ("evals = 4", "evals = 2.0", "study.evals must be an integer >= 1, got 2.0"),
        ("evals = 4", "evals = true", "study.evals must be an integer >= 1, got True"),
        ("held_out = 8", "held_out = 0", "study.held_out must be an integer >= 1, got 0"),
        ("held_out = 8", "held_out = -8", "study.held_out must be an integer >= 1, got -8"),
        ("1e5", "0", "study.tokens_per_s must be a number > 0, got 0"),
        ("1e5", "nan", "study.tokens_per_s must be a number > 0, got nan"),
        ("1e5", '"fast"', "study.tokens_per_s must be a number > 0, got 'fast'"),
        ("seeds = [0]", "seeds = [0.5]", "study.seeds must be a list, each an integer >= 0"),
        ("seeds = [0]", "seeds = [-1]", "study.seeds must be a list, each an integer >= 0"),
        ("seeds = [0]", "seeds = 0", "study.seeds must be a list, each an integer >= 0"),
        ("[4, 16]", "[4, 16.0]", "study.batches must be a list, each an integer >= 1"),
        ("[4, 16]", "[[4], 16]", "study.batches must be a list, each an integer >= 1"),
        ("samples = 64", "samples = -64", "study.samples must be an integer >= 1"),
        ("samples = 64", "samples = 0", "study.samples must be an integer >= 1"),
        ("seq_len = 16", "seq_len = 4", "study.seq_len must be an integer >= 8"),
        ('["decoder"]', '"decoder"', "study.architectures must be a list, each a string"),
        ("rise = 0.0", "rise = nan", "study.rise must be a number >= 0"),
        ("rise = 0.0", "weight_decay = -1", "study.weight_decay must be a number >= 0"),
        ("rise = 0.0", "max_grad_norm = 0", "study.max_grad_norm must be above 0; inf"),
        ("rise = 0.0", "mask_fraction = 1.5", "study.mask_fraction must be a number > 0 and < 1"),
        ("rise = 0.0", "bfloat16 = 1", "study.bfloat16 must be true or false"),
        ("rise = 0.0", "pack_sequences = 0", "study.pack_sequences must be an integer >= 1"),
        ("rise = 0.0", "pack_seconds = -1", "study.pack_seconds must be a number > 0"),
        ("rise = 0.0", "more_warmups = [nan]", "study.more_warmups must be a list, each a number"),
        ("base_warmup = 0.1", "base_warmup = nan", "study.base_warmup must be a number > 0 and <"),
        ("max_lrs = 1", "max_lrs = 0", "study.max_lrs must be an integer >= 1"),
        ("hidden_size = 16", "hidden_size = 1.5", "model.hidden_size must be an integer >= 1"),
        ("hidden_size = 16", "hidden_size = 15", "model.hidden_size (15) must be a multiple"),
        ("[4e-3]", "[nan]", "rules.adamw.lrs must be a list, each a number > 0"),
        ("[4e-3]", "4e-3", "rules.adamw.lrs must be a list, each a number > 0"),
        ("[4e-3]", "[inf]", "rules.adamw.lrs must be a list, each a number > 0"),
        ("[4e-3]", "[4e-3]\neps = -1", "rules.adamw.eps must be a number >= 0"),
        ("[4e-3]", "[4e-3]\nbetas = [0.9]", "rules.adamw.betas must be a list of 2 values, each"),
        ("[4e-3]", "[4e-3]\nbetas = [0.9, 1]", "rules.adamw.betas must be a list of 2 values, "),
        ("[4e-3]", "[4e-3]\nlate = 1", "rules.adamw.late must be true or false"),
        ('"adamw"', "1", "rules.adamw.optimizer must be a string"),
        ("[rules.adamw]", "[rules]\nsecond = 3\n[rules.adamw]", "[rules.second] must be a section"),
    ],
)
def test_values_that_no_run_can_have_are_refused(
    tmp_path: Path, old: str, new: str, wanted: str
) -> None:
    assert wanted in refused(tmp_path, old, new)


def test_a_study_needs_rules_that_are_run_first(tmp_path: Path) -> None:
    """Calibration and probe take theirs from them."""
    rules = SMALL[SMALL.index("[rules.adamw]") :]
    assert "at least one rule" in refused(tmp_path, rules, "[rules]\n")
    assert "at least one rule" in refused(
        tmp_path, rules, f"{rules.split('[rules.lamb]')[0]}late = true\n"
    )
    half = "[4e-3]\nhalf_life = true\nbase = "
    assert "rules.adamw.base" in refused(tmp_path, "[4e-3]", half + '"adamw"\n')


@pytest.mark.parametrize("content", [b"\xff\xfe", b"rules = 3\nstudy = 1\nmodel = 2\n"])
def test_what_is_no_study_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "study.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"study\.toml"):
        load_study(path)


def test_whole_numbers_may_stand_for_others(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(SMALL.replace("1e5", "100000").replace("rise = 0.0", "rise = 0"))
    config = load_study(path)
    assert (config.tokens_per_s, config.rise) == (1e5, 0.0)
    assert all(type(value) is float for value in (config.tokens_per_s, config.rise))


def test_too_few_samples_to_measure(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "study.toml"
    config.write_text(
        SMALL.replace("samples = 64", "samples = 16").replace("evals = 4", "evals = 1")
    )
    on = [str(config), "--out", str(tmp_path / "out"), "--data", str(made / "data")]
    for command, named in (("probe", "study.samples"), ("calibrate", "study.samples")):
        assert study.main([command, *on, "--device", "cpu"]) == 2
        assert named in capsys.readouterr().err


def in_lines(path: Path, number: int, old: str, new: str) -> None:
    lines = path.read_text().splitlines(keepends=True)
    assert old in lines[number - 1]
    lines[number - 1] = lines[number - 1].replace(old, new, 1)
    path.write_text("".join(lines))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (",0.1,", ",", "23 fields, not 24"),
        (",0.1,", ",0.1,0.1,", "25 fields, not 24"),
        (",0.1,", ",ten,", "warmup is 'ten'"),
        (",4,0.1,", ",4.5,0.1,", "batch is '4.5'"),
        ("decoder,", '"decoder,', "1 fields, not 24"),
        (" 16:", " 16;", "curve is '0:"),
        (" 16:", " é:", "curve is '0:"),
    ],
)
def test_a_damaged_row_is_an_error(
    made: Path, out: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, problem: str
) -> None:
    path = out / "study.csv"
    in_lines(path, 3, old, new)
    before = path.read_bytes()
    config = str(made / "study.toml")
    on = ["--data", str(made / "data"), "--device", "cpu"]
    for command in (["run", *on], ["report"], ["plot"], ["probe", *on]):
        assert study.main([command[0], config, "--out", str(out), *command[1:]]) == 2
        error = capsys.readouterr().err
        assert f"error: {path}, line 3: {problem}" in error
        assert "remove" in error
    assert path.read_bytes() == before


def test_rows_in_other_bytes_are_an_error(
    made: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = out / "study.csv"
    path.write_bytes(path.read_bytes().replace(b"decoder", b"\xff\xfe", 1))
    assert run(made, out) == 2
    assert f"error: {path}, line 2: 'utf-8' codec" in capsys.readouterr().err


def test_other_columns_are_an_error(
    made: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = out / "study.csv"
    for content in ("a,b\n1,2\n", "a,b", "\n"):
        path.write_text(content)
        assert run(made, out) == 2
        error = capsys.readouterr().err
        assert f"error: {path} has other columns" in error
        assert "another --out" in error
        assert path.read_text() == content


@pytest.mark.parametrize("kept", [1.5, 1, 0.5, 0])
def test_a_file_cut_off_anywhere_is_gone_on_from(tmp_path: Path, kept: float) -> None:
    """Whatever an interrupted write left: what is added next starts a line of its own."""
    path = tmp_path / "study.csv"
    rows = [row_of(RUNS[0], 3.0), row_of(RUNS[1], 3.5)]
    results.append(path, rows)
    header, *lines = path.read_text().splitlines(keepends=True)
    if kept >= 1:
        path.write_text(header + lines[0][: round((kept - 1) * len(lines[0]))])
    else:
        path.write_text(header[: round(kept * len(header))])
    assert results.read(path) == {}
    results.append(path, rows)
    assert path.read_text() == "".join([header, *lines])


def _appends(path: Path, run: Run) -> None:
    for _ in range(150):
        results.append(path, [row_of(run, 3.0)])


def test_two_processes_append_to_one_file(tmp_path: Path) -> None:
    """What one wrote while the other looked for a line that was cut off was lost."""
    path = tmp_path / "study.csv"
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_appends, args=(path, run)) for run in RUNS[:2]]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_bytes().count(b"\n") == 1 + 2 * 150
    assert set(results.read(path)) == set(RUNS[:2])


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path: Path) -> None:
    """As some editors leave it."""
    path = tmp_path / "study.csv"
    results.append(path, [row_of(RUNS[0], 3.0)])
    path.write_text(path.read_text().rstrip("\n"))
    results.append(path, [row_of(RUNS[1], 3.5)])
    assert list(results.read(path)) == list(RUNS)


@pytest.mark.parametrize("command", ["report", "plot"])
def test_a_report_of_nothing_is_an_error(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """A mistyped --out."""
    missing, to = tmp_path / "missing", tmp_path / "to"
    more = ["--to", str(to)] if command == "report" else []
    assert study.main([command, str(made / "study.toml"), "--out", str(missing), *more]) == 2
    assert f"error: no {missing / 'study.csv'}: --out must be" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["run", "calibrate", "probe"])
@pytest.mark.parametrize("device", ["cpux", "cuda:7", "cuda", "meta", "", "cpu,cuda:7", "cpu:1"])
def test_a_device_that_is_not_there_is_an_error(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, device: str
) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    given = [command, str(made / "study.toml"), "--out", str(tmp_path / "out"), "--device", device]
    assert study.main([*given, "--data", str(made / "data")]) == 2
    wrong = device.split(",")[-1]
    assert f"error: --device {wrong}: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokens.xz", "meta.json"])
def test_damaged_tokens_are_an_error(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    shutil.copytree(made / "data", tmp_path / "data")
    path = tmp_path / "data" / name
    for content in (path.read_bytes()[:100], b"", b"[]"):
        path.write_bytes(content)
        assert run(tmp_path, tmp_path / "out") == 2
        assert f"error: {path} " in capsys.readouterr().err


def test_text_too_short_for_a_sequence_is_an_error(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not only that a worker could not start."""
    changes = ("seq_len = 16", "seq_len = 8192"), ("embeddings = 16", "embeddings = 8192")
    assert run(made, tmp_path / "out", *changes) == 2
    assert "held-out sequences of 8192" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--vocab-size", "100", "256 to 32,768"),
        ("--vocab-size", "40000", "256 to 32,768"),
        ("--vocab-size", "1e3", "256 to 32,768"),
        ("--held-out", "2", "more than 0 and less than 1"),
        ("--held-out", "0", "more than 0 and less than 1"),
        ("--held-out", "nan", "more than 0 and less than 1"),
        ("--minutes", "nan", "0 or more"),
        ("--minutes", "-1", "0 or more"),
    ],
)
def test_options_out_of_range_are_errors(
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    wanted: str,
) -> None:
    config = [str(made / "study.toml"), "--out", str(tmp_path / "out")]
    of_data = [*config[1:], str(made / "texts"), "--work", str(tmp_path / "work")]
    commands = [["data", *of_data]]
    if option == "--minutes":
        commands = [[command, *config] for command in ("run", "calibrate")]
    for command in commands:
        with pytest.raises(SystemExit) as status:
            study.main([*command, f"{option}={value}"])
        assert status.value.code == 2
        error = capsys.readouterr().err
        assert f"error: argument {option}: must be {wanted}, got {value}" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["calibration.csv", "noise.csv", "trust.csv"])
@pytest.mark.parametrize("damage", ["cut", "text", "header"])
def test_damage_in_the_other_tables_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    """A traceback of whatever came across it."""
    for copied in ("study.csv", name):
        shutil.copy(ROOT / "launch" / "results" / copied, tmp_path)
    path = tmp_path / name
    header, first, *rest = path.read_text().splitlines(keepends=True)
    if damage == "cut":
        first = first[: len(first) // 2] + "\n"
    elif damage == "text":
        first = ",".join("?" for _ in first.split(",")) + "\n"
    else:
        header = header.upper()
    path.write_text("".join([header, first, *rest]))
    config = str(ROOT / "configs" / "study_large_batch.toml")
    assert study.main(["report", config, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"error: {path}, line 2: " in error
    assert "put it right, or move the file away" in error
