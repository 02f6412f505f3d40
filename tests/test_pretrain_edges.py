"""launch/pretrain.py where something is wrong or missing: nothing is lost, and one line says it."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pretrain
import pytest
from pretrain_runs import (
    ROOT,
    STEPS,
    broken_run,
    difference,
    refused,
    run_here,
    run_on_ranks,
)
from pretraining import telemetry
from pretraining.config import ConfigError, load_config
from pretraining.engine_deepspeed import read_config
from pretraining.jsonlines import JsonLines, LogError, Unwritten, read_rows
from pretraining.report import Report, read_log, read_tensors_log
from pretraining.sources import CorpusError, read_corpus
from pretraining.summary import summarize

from dist_lamb.checkpoint import checkpoints

pytestmark = pytest.mark.usefixtures("no_process_group_left")


# --- runs that start over ------------------------------------------------------------------------


def test_checkpoints_stay_until_all_that_starts_a_run_is_known(
    config: Path, tmp_path: Path, capsys: Any
) -> None:
    """``train.resume=never`` removed them first: then a typo left nothing."""
    run, anew = tmp_path / "run", ("train.steps=2", "train.resume=never")
    run_here(config, run, "train.steps=2")
    for own in (run, run / "checkpoints", run / "checkpoints" / "step-2"):
        message = refused(config, run, capsys, *anew, f"train.init_from={own}")
        assert "train.init_from is in train.run_dir, whose checkpoints" in message
    for wrong, text in (
        ("train.init_from=absent", "no checkpoint here"),
        ("optim.engine=fsdp2 train.noise_every=2", "train.noise_every is for engines"),
        ("train.noise_every=1 train.micro_batch=16", "train.noise_every compares two"),
    ):
        assert text in refused(config, run, capsys, *anew, *wrong.split())
    # What looks elsewhere, and has this run's checkpoints.
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "checkpoints").symlink_to(run / "checkpoints")
    message = refused(config, run, capsys, *anew, f"train.init_from={tmp_path / 'linked'}")
    assert "train.init_from is in train.run_dir" in message
    (run / "run.json").unlink()
    (run / "run.json").mkdir()
    assert "run.json: Is a directory" in refused(config, run, capsys, *anew)


# --- logs ----------------------------------------------------------------------------------------


def test_rows_of_tensors_are_read_before_training(
    config: Path, tmp_path: Path, capsys: Any
) -> None:
    """A damaged one ended a resumed run at its next row, on rank 0 alone."""
    run, some = tmp_path / "run", ("train.log_every=1", "train.tensors_every=1")
    run_here(config, run, "train.steps=3", *some)
    path = run / "tensors.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    for damaged in (b"{}\n", b'{"step": 1, "tensors": {"a": [null]}}\n', b"\xff\n"):
        path.write_bytes(b"".join([first, damaged, *rest]))
        message = refused(config, run, capsys, "train.steps=5", *some)
        assert f"{path}, line 2: damaged: " in message
    path.write_bytes(b"".join([first, *rest]))
    run_here(config, run, "train.steps=5", *some)
    assert [row["step"] for row in read_tensors_log(path)] == [1, 2, 3, 4, 5]


def test_a_log_that_was_moved_away(config: Path, tmp_path: Path, capsys: Any) -> None:
    """As the message of a damaged one advises; the summary does not speak of a whole run."""
    run = tmp_path / "run"
    run_here(config, run, "train.steps=4")
    (run / "log.jsonl").unlink()
    run_here(config, run, "train.steps=4")
    assert "the log has no evaluation; 0 tokens" in capsys.readouterr().out
    run_here(config, run, "train.steps=8")
    assert "nats since step 8)" in capsys.readouterr().out
    # Lowered afterwards: no negative number of tokens.
    settings = load_config(config, [f"train.run_dir={run}", "train.steps=4"])
    assert "; 0 tokens in 0:01" in summarize(settings, 8, 1.0)


def _full(limit: int, path: Path) -> None:
    """Writes what does not fit, then what does, as the disk has room again."""
    lines = JsonLines(path, 0, lambda _: None, Unwritten())
    lines.add([{"step": 1, "text": "a" * 80}])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    for step in (2, 3):
        with pytest.raises(OSError, match="File too large"):
            lines.add([{"step": step, "text": "b" * 80}])
        assert [row["step"] for row in read_rows(path, lambda _: None)] == [1]
        assert path.read_bytes().endswith(b"\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines.add()


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_full, args=(150, tmp_path / "a"))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert [row["step"] for row in read_rows(tmp_path / "a", lambda _: None)] == [1, 2, 3]


def _no_room_after(rows: int) -> None:
    """Files of rows take no more, once they have so many."""
    opened = Path.open

    def full(self: Path, mode: str = "r", *more: Any, **others: Any) -> Any:
        if mode == "ab" and self.read_bytes().count(b"\n") >= rows:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), None)
        return opened(self, mode, *more, **others)

    Path.open = full  # type: ignore[method-assign,assignment]


@pytest.mark.xdist_group("programs")
@pytest.mark.parametrize("last", [False, True])
def test_a_full_disk_ends_a_run_with_a_checkpoint(config: Path, tmp_path: Path, last: bool) -> None:
    """It was a traceback of rank 0, no checkpoint, and a lost connection on the others. The rows
    are in the checkpoint, which may be on another disk: also those of the last step."""
    run, some = tmp_path / "run", ("train.log_every=1", "train.tensors_every=1")
    whole = run_here(config, tmp_path / "whole", *some)
    rows = 1 + STEPS + 2 if last else 2  # evaluations are at steps 0, 4 and 8
    with pytest.raises(RuntimeError) as caught:
        run_on_ranks(config, run, *some, before=partial(_no_room_after, rows))
    printed = str(caught.value)
    assert "exit codes [2, 2]" in printed
    assert "Traceback" not in printed
    assert ("stopped after step 3 by an error; start again" in printed) == (not last)
    assert "masked accuracy 100" not in printed.splitlines()[-2]
    message = printed.strip().splitlines()[-1]
    assert message.startswith(f"pretrain: error: {run / 'log.jsonl'}: No space left on device; ")
    at = STEPS if last else 3
    assert checkpoints(run / "checkpoints")[-1].name == f"step-{at}"
    assert len(read_log(run / "log.jsonl")) == rows
    again = run_on_ranks(config, run, *some)
    assert f"resumed at step {at}" in again
    assert difference(read_log(run / "log.jsonl"), whole) < 1e-3
    assert [row["step"] for row in read_tensors_log(run / "tensors.jsonl")] == list(
        range(1, STEPS + 1)
    )
    evaluated = [row for row in read_log(run / "log.jsonl") if row["kind"] == "held_out"]
    assert f" -> {evaluated[-1]['loss']:.3f} (" in again


def test_a_name_that_is_no_formula_and_no_ascii(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """matplotlib reads what is between dollars as a formula, which this name is none of; and a
    terminal without umlauts raised an error: on rank 0 alone."""
    run = tmp_path / "Größe $USER_$JOB"
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    run_here(config, run, "train.steps=2", "train.log_every=1", "train.tensors_every=1")
    out.flush()
    assert b"/Gr\\xf6\\xdfe $USER_$JOB/" in out.buffer.getvalue()  # type: ignore[attr-defined]
    assert {"curves.png", "trust_ratios.png"} <= {path.name for path in run.iterdir()}
    with pytest.raises(ConfigError, match=r"train\.run_dir must be a string, got '\\udcff'"):
        load_config(config, ["train.run_dir=\udcff"])


def test_an_error_of_no_known_kind(capsys: Any) -> None:
    """In drawing, say: the checkpoints are there, and the other ranks must not wait."""
    report = Report([])
    with report.writing("the picture"):
        raise KeyError("colour")
    with pytest.raises(LogError, match=r"^the picture: KeyError: 'colour'; correct that"):
        report.check()
    assert "Traceback" in capsys.readouterr().err


def test_the_first_problem_counts() -> None:
    report = Report([])
    report.check()
    for error in (OSError(errno.EIO, "first", "disk"), LogError("second")):
        with report.writing("log"):
            raise error
    with pytest.raises(LogError, match=r"^disk: first; correct that and start again"):
        report.check()


def test_errors_are_recorded_without_what_caused_them(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun prints what is recorded: pages of tracebacks, of causes, hid the message."""
    recorded: list[BaseException] = []

    class Handler:
        def record_exception(self, error: BaseException) -> None:
            recorded.append(error)

    monkeypatch.setattr(pretrain, "get_error_handler", Handler)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").mkdir()
    with pytest.raises(SystemExit):
        run_here(config, tmp_path / "run")
    assert "Is a directory" in str(recorded[0])
    assert (recorded[0].__cause__, recorded[0].__context__) == (None, None)


# --- resuming ------------------------------------------------------------------------------------


def test_the_noise_scale_is_resumed(config: Path, tmp_path: Path) -> None:
    """Its means began anew, at what the first few steps measure."""
    some = ("train.noise_every=2", "train.log_every=1", "optim.stage=1")
    whole = run_here(config, tmp_path / "whole", *some)
    broken_run(config, tmp_path / "broken", *some)
    resumed = run_here(config, tmp_path / "broken", *some)
    scales = [[row.get("noise_scale") for row in rows] for rows in (whole, resumed)]
    assert scales[0] == scales[1]
    assert len(set(scales[0])) > STEPS // 2
    # From a run that did not measure it, and into one that does not.
    plain = run_here(config, tmp_path / "plain", "train.steps=3")
    assert plain[-1]["step"] == 3
    assert run_here(config, tmp_path / "plain", "train.steps=6", *some)[-2]["noise_scale"]
    assert run_here(config, tmp_path / "plain", "train.steps=7")[-1]["step"] == 7


# --- settings and text ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.timeout_minutes=1e13", "train.timeout_minutes must be a number > 0 and <= 525600"),
        (
            "train.seed=99999999999999999999",
            "train.seed must be an integer >= 0 and <= 9223372036854775807",
        ),
        (
            "data.vocab_size=99999999999999999999",
            "data.vocab_size must be an integer >= 256 and <=",
        ),
    ],
)
def test_numbers_that_nothing_can_hold(config: Path, override: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config, [override])
    assert text in str(caught.value)


def test_home_folders(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell has seen ``~`` in a file of settings, or behind ``=``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    short = ("--set", "train.steps=1", "data.cache_dir=~/cache")
    pretrain.main([str(config), *short, "train.run_dir=~/one"])
    pretrain.main([str(config), *short, "train.run_dir=~/two", "train.init_from=~/one"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "one", "two"]
    assert read_log(tmp_path / "two" / "log.jsonl")[0]["loss"] == pytest.approx(
        read_log(tmp_path / "one" / "log.jsonl")[-1]["loss"]
    )


def test_linked_folders_are_text_too(tmp_path: Path) -> None:
    """They were left out without a word, while a glob has them."""
    inner, outer = tmp_path / "text", tmp_path / "elsewhere"
    for folder, text in ((inner, "one"), (outer / "deep", "two"), (outer / ".hidden", "three")):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(text)
    (inner / "linked").symlink_to(outer)
    (outer / "deep" / "up").symlink_to(outer)
    (inner / "self").symlink_to(inner)
    (inner / "nothing").symlink_to(tmp_path / "absent")
    tangle = [outer / "deep" / str(i) for i in range(12)]
    for folder in tangle:
        folder.mkdir()
        for i, other in enumerate(tangle):
            (folder / f"to {i}").symlink_to(other)
    found = read_corpus(str(inner), 1024)
    assert [document.path.read_text() for document in found.documents] == ["one", "two"]
    assert found.files == 2


def test_utf16_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-16")
    with pytest.raises(CorpusError, match=r"in its 1 files; those with NUL bytes .* UTF-16"):
        read_corpus(str(tmp_path), 1024)


# --- DeepSpeed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["[]", "3", '{"zero_optimization": 2}'])
def test_deepspeeds_config_is_an_object(config: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content)
    optim = load_config(config, ["optim.engine=deepspeed", f"optim.deepspeed={path}"]).optim
    with pytest.raises(ConfigError, match="is no JSON object"):
        read_config(optim)


def test_offloading_has_advice_that_can_be_followed(config: Path, tmp_path: Path) -> None:
    """An optimizer in the JSON is refused, so naming one there is no way out."""
    stage = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": stage, "gradient_clipping": 1.0}))
    optim = load_config(config, ["optim.engine=deepspeed", f"optim.deepspeed={path}"]).optim
    with pytest.raises(ConfigError, match="set zero_force_ds_cpu_optimizer = false: ") as caught:
        read_config(optim)
    assert "or name" not in str(caught.value)


@pytest.mark.deepspeed_ops
@pytest.mark.xdist_group("programs")
def test_deepspeed_without_torchrun(config: Path, tmp_path: Path) -> None:
    """A job of one, as with the other engines; DeepSpeed asked for LOCAL_RANK."""
    pytest.importorskip("deepspeed")
    settings = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK")}
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), str(config), "--set"]
    overrides = ["optim.engine=deepspeed", "train.steps=1", f"train.run_dir={tmp_path / 'run'}"]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["step"] == 1


def test_the_heat_map_needs_rows(tmp_path: Path) -> None:
    assert telemetry.draw_heat_map(tmp_path) is None
