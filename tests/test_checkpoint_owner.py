"""One writer of a folder at a time: who is refused, who takes over, and what the old one may do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import rank_context
from torch import nn

from dist_lamb import Lamb, checkpoint
from dist_lamb.checkpoint import CheckpointError, owner, storage


@contextmanager
def process(fn: Callable[..., None], *args: Any) -> Iterator[Any]:
    """Another process that runs ``fn(pipe, *args)``: (process, pipe), after its first message."""
    context = rank_context()
    ours, theirs = context.Pipe()
    child = context.Process(target=fn, args=(theirs, *args), daemon=True)
    child.start()
    theirs.close()
    try:
        assert ours.poll(120)
        assert ours.recv() == "ready"
        yield child, ours
    finally:
        child.kill()
        child.join()


@pytest.fixture(autouse=True)
def claims(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Looks that take no time; and what a test claimed is free again."""
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.01)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    yield
    for claimed in list(owner._owned.values()):
        claimed.release()


def owners(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".owner"))


def small(value: float = 0.0) -> tuple[nn.Module, Lamb]:
    net = nn.Linear(3, 2)
    nn.init.constant_(net.weight, value)
    return net, Lamb(net.parameters())


def _owns(pipe: Any, folder: str, beat: float, error_file: str = "", restarts: str = "0") -> None:
    owner.BEAT_SECONDS = beat
    os.environ["TORCHELASTIC_MAX_RESTARTS"] = restarts
    os.environ["TORCHELASTIC_ERROR_FILE"] = error_file
    checkpoint.claim(folder)
    pipe.send("ready")
    pipe.recv()


def test_the_second_of_two_is_refused_until_the_first_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "PATIENCE", 10**9)  # it is refused because it sees the beat
    net, optimizer = small()
    with process(_owns, str(tmp_path / "run"), 0.001) as (first, pipe):
        for name in ("run", "link"):  # one folder under two names
            if name == "link":
                (tmp_path / "link").symlink_to(tmp_path / "run")
            with pytest.raises(CheckpointError, match=rf"process {first.pid} on .* writes here"):
                checkpoint.save(tmp_path / name, 1, net, optimizer)
        assert owners(tmp_path / "run") == [".owner-1"]
        assert checkpoint.checkpoints(tmp_path / "run") == []
        pipe.send("end")
        first.join(60)
        assert owners(tmp_path / "run") == []  # at once, with the process
    checkpoint.save(tmp_path / "run", 1, net, optimizer)
    checkpoint.save(tmp_path / "link", 2, net, optimizer)  # the same process goes on
    assert owners(tmp_path / "run") == [".owner-1"]


def test_the_place_of_a_killed_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine at once, on another one when its beat is seen to stand still."""
    with process(_owns, str(tmp_path), 0.001) as (first, _):
        os.kill(first.pid, signal.SIGKILL)
        first.join()
        monkeypatch.setattr(owner, "PATIENCE", 10**9)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checkpoint.claim(tmp_path).release()
    monkeypatch.setattr(owner, "PATIENCE", 3)
    for restarts in ("3", "0"):  # by its own torchrun, which has the next word
        with process(_owns, str(tmp_path), 0.001, "", restarts) as (first, _):
            os.kill(first.pid, signal.SIGKILL)
            first.join()
            if restarts == "0":
                monkeypatch.setattr(owner, "_kernel", lambda: "another")
            with pytest.warns(UserWarning, match=rf"a sign of life from process {first.pid}"):
                claimed = checkpoint.claim(tmp_path)
        assert owners(tmp_path) == [".owner-2"]
        if restarts == "3":
            claimed.release()
    assert claimed.problem() is None
    claimed.release()
    assert owners(tmp_path) == []


def test_a_restart_of_the_same_job_takes_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "PATIENCE", 10**9)
    job = str(tmp_path / "logs" / "none_abc")
    folder = tmp_path / "run"
    with process(_owns, str(folder), 0.001, f"{job}/attempt_0/0/error.json") as (first, _):
        # another job of the same name, on the same machine
        other = f"{tmp_path}/logs/none_xyz/attempt_0/0/error.json"
        for error_file in (other, "", "nonsense/attempt_0"):
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", error_file)
            with pytest.raises(CheckpointError, match=rf"process {first.pid}"):
                checkpoint.claim(folder)
        os.kill(first.pid, signal.SIGKILL)
        first.join()
        monkeypatch.setattr(owner, "_kernel", lambda: None)  # no locks
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"{job}/attempt_1/3/error.json")
        checkpoint.claim(folder)
    assert owners(folder) == [".owner-2"]


ENDS_WITH_AN_ERROR = """
import sys
from dist_lamb import checkpoint
checkpoint.claim(sys.argv[1])
raise RuntimeError("connection reset by peer")
"""


def test_an_attempt_that_ends_with_an_error_leaves_the_folder_to_the_next(
    tmp_path: Path,
) -> None:
    """A job started by mistake between two attempts would shut the second out."""
    job, folder = str(tmp_path / "logs" / "none_abc"), tmp_path / "run"

    def end(attempt: int, most: str) -> None:
        torchrun = {
            "TORCHELASTIC_MAX_RESTARTS": most,
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
            "TORCHELASTIC_ERROR_FILE": f"{job}/attempt_{attempt}/0/error.json",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        command = [sys.executable, "-c", ENDS_WITH_AN_ERROR, str(folder)]
        done = subprocess.run(command, env={**os.environ, **torchrun}, stderr=subprocess.PIPE)
        assert b"RuntimeError: connection reset" in done.stderr

    end(0, "1")
    assert owners(folder) == [".owner-1"]
    end(1, "1")  # takes over at once, and is the last one
    assert owners(folder) == []


def _saves_slowly(pipe: Any, folder: str) -> None:
    """Gives no sign of life while it saves, as a process that is stopped."""
    owner.BEAT_SECONDS = 1e6
    net, optimizer = small(1.0)
    written = storage.write_manifest

    def slow(*args: Any) -> None:
        written(*args)
        pipe.send("ready")
        pipe.recv()

    storage.write_manifest = slow
    try:
        checkpoint.save(folder, 1, net, optimizer)
        pipe.send("saved")
    except CheckpointError as error:
        pipe.send(str(error))
    # it wants to go on, and is refused by the one that has taken over
    owner.BEAT_SECONDS, owner.PATIENCE = 0.01, 10**9
    try:
        checkpoint.save(folder, 2, net, optimizer)
        pipe.send("saved")
    except CheckpointError as error:
        pipe.send(str(error))


def test_who_has_lost_the_folder_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both with and without the files that it was writing: they go at the next one's first save."""
    monkeypatch.setattr(owner, "PATIENCE", 3)
    for saves in (True, False):
        folder = tmp_path / f"run-{saves}"
        with process(_saves_slowly, str(folder)) as (_, pipe):
            net, optimizer = small(2.0)
            with pytest.warns(UserWarning, match="a sign of life"):
                checkpoint.claim(folder)
            if saves:
                checkpoint.save(folder, 1, net, optimizer)
            pipe.send("go on")
            assert pipe.poll(60)
            assert f"process {os.getpid()} on" in (text := pipe.recv())
            assert "has taken over, since this process gave no sign of life" in text
            assert pipe.poll(60)
            assert f"process {os.getpid()} on" in (text := pipe.recv())
            assert "writes here; stop it, or choose another folder" in text
        assert [path.name for path in checkpoint.checkpoints(folder)] == ["step-1"] * saves
        if saves:
            fresh, _ = small()
            checkpoint.load(folder, fresh)
            assert torch.equal(fresh.weight, torch.full((2, 3), 2.0))


def test_a_claim_on_a_folder_covers_what_is_below(tmp_path: Path) -> None:
    """Who has lost the run's folder saves nothing in ``checkpoints``, which nobody else claimed."""
    net, optimizer = small()
    checkpoint.claim(tmp_path)
    checkpoint.save(tmp_path / "checkpoints", 1, net, optimizer)
    (tmp_path / ".owner-2").write_bytes(b"0" * 20 + b'{"who": "another \\u001b[2Jjob"}')
    with pytest.raises(CheckpointError, match=r"another \\x1b\[2Jjob has taken over"):
        checkpoint.save(tmp_path / "checkpoints", 2, net, optimizer)
    (tmp_path / ".owner-2").unlink()
    checkpoint.save(tmp_path / "checkpoints", 2, net, optimizer)
    (tmp_path / ".owner-1").unlink()
    with pytest.raises(CheckpointError, match=r"\.owner-1 of this process is gone"):
        checkpoint.save(tmp_path / "checkpoints", 3, net, optimizer)
    checkpoint.claim(tmp_path)
    checkpoint.save(tmp_path / "checkpoints", 3, net, optimizer)


@pytest.mark.parametrize("freed", [False, True])
def test_of_two_newcomers_one_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, freed: bool
) -> None:
    """The other one was faster, or even was followed by a third whose number is higher still."""
    monkeypatch.setattr(owner, "PATIENCE", 3)
    (tmp_path / ".owner-1").write_bytes(b"0" * 20 + b"{}")
    faster = tmp_path / (".owner-3" if freed else ".owner-2")
    beats = iter(range(1, 10**6))
    original_open, original_sleep = os.open, owner.time.sleep

    def late(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_EXCL and not faster.exists():
            (tmp_path / ".owner-1").unlink()
            faster.write_bytes(b"0" * 20 + json.dumps({"who": "the faster one"}).encode())
        return original_open(path, flags, mode)

    def sleep(seconds: float) -> None:
        original_sleep(seconds)
        if faster.exists():
            with faster.open("r+b") as file:
                file.write(b"%020d" % next(beats))

    monkeypatch.setattr(owner.os, "open", late)
    monkeypatch.setattr(owner.time, "sleep", sleep)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError, match="the faster one writes"):
            checkpoint.claim(tmp_path)
    assert owners(tmp_path) == [faster.name]


def _forks(pipe: Any, folder: str) -> None:
    claimed = checkpoint.claim(folder)
    pid = os.fork()
    if not pid:
        # as a worker of a DataLoader ends
        from multiprocessing.util import _exit_function

        owned = len(owner._owned)
        _exit_function()
        os._exit(owned)
    assert os.waitpid(pid, 0)[1] == 0
    assert claimed.problem() is None
    pipe.send("ready")


def test_forked_processes_own_nothing(tmp_path: Path) -> None:
    with process(_forks, str(tmp_path)) as (child, _):
        child.join(60)
    assert owners(tmp_path) == []


def test_what_is_no_owner_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "PATIENCE", 2)
    for i, content in enumerate((b"", b"\xff" * 9000, b"0" * 20 + b"[" * 4000, b"0" * 20 + b"[]")):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / ".owner-7").write_bytes(content)
        checkpoint.claim(folder)
        assert owners(folder) == [".owner-8"]
    (tmp_path / ".owner-1").symlink_to(tmp_path / "0")
    with pytest.raises(CheckpointError, match=r"\.owner-1: is a link"):
        checkpoint.claim(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"link: a link to .*absent, which is not there"):
        checkpoint.claim(tmp_path / "link")
