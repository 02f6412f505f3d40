"""The files of a checkpoint: damage is named, nothing is executed, half of one is none."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from checkpoint_cases import module_of, rewrite
from safetensors.torch import load_file
from torch import nn

from dist_lamb import Lamb, ShardedLamb, checkpoint
from dist_lamb.checkpoint import Checkpoint, CheckpointError, files
from dist_lamb.checkpoint.cli import main


def build(seed: int = 0, cls: Any = Lamb, **options: Any) -> tuple[nn.Module, Any]:
    params = models.make_params(seed=seed)
    return module_of(params), cls(models.groups_of(params), **({"lr": 0.02} | options))


def step(model: nn.Module, optimizer: Any, t: int = 0) -> None:
    params = dict(model.named_parameters())
    for name, g in models.mean_gradients(params, t).items():
        params[name].grad = g
    optimizer.step()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with steps 1 and 2."""
    model, optimizer = build()
    for number in (1, 2):
        step(model, optimizer, number)
        checkpoint.save(tmp_path / "run", number, model, optimizer, extra={"tokens": number})
    return tmp_path / "run"


# --- damage --------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path: Path) -> None:
    path.unlink()


def link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["rank-0.bin", "tensors.json", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", [cut, flip, grow, remove, link, pipe])
def test_damage_is_named_and_the_one_before_loads(
    saved: Path, harm: Callable[[Path], None], name: str
) -> None:
    harm(saved / "step-2" / name)
    model, optimizer = build(seed=1)
    step(model, optimizer)
    before = models.digest(model.state_dict())
    with pytest.raises(CheckpointError, match=rf"step-2.*{name}"):
        checkpoint.load(saved / "step-2", model, optimizer)
    assert models.digest(model.state_dict()) == before
    found = checkpoint.load(saved / "step-1", model, optimizer)
    assert found.extra == {"tokens": 1}
    expected = checkpoint.latest(saved)
    assert expected is not None
    gone = name == "manifest.json" and harm in (remove, pipe)
    assert expected.name == ("step-1" if gone else "step-2")


def test_no_path_leads_out_of_the_folder(saved: Path) -> None:
    secret = saved / "secret.bin"
    secret.write_bytes(b"\0" * 4096)
    for name in ("../secret.bin", str(secret), "step-1/rank-0.bin", "rank-0.bin/../../secret.bin"):

        def elsewhere(content: Any, name: str = name) -> Any:
            content["model.fc.bias"]["chunks"][0]["file"] = name
            return content

        def listed(content: Any, name: str = name) -> Any:
            content["files"][name] = {"nbytes": 4096, "sha256": ""}
            return content

        before = {f: (saved / "step-2" / f).read_bytes() for f in ("tensors.json", "manifest.json")}
        rewrite(saved / "step-2", "tensors.json", elsewhere)
        with pytest.raises(CheckpointError, match=r"tensors.json: model.fc.bias: chunk"):
            Checkpoint(saved / "step-2")
        rewrite(saved / "step-2", "manifest.json", listed)
        with pytest.raises(CheckpointError, match=r"is no file of a checkpoint"):
            Checkpoint(saved / "step-2")
        for f, data in before.items():
            (saved / "step-2" / f).write_bytes(data)
    assert Checkpoint(saved / "step-2").step == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["chunks"].clear(), "do not cover it"),
        (lambda c: c["chunks"][0].update(sizes=[25]), "cannot be"),
        (lambda c: c["chunks"][0].update(offsets=[-1]), "not understood"),
        (lambda c: c["chunks"][0].update(at=10**9), "cannot be"),
        (lambda c: c.update(dtype="object"), "not understood"),
        (lambda c: c.update(shape=[2**70]), "no tensor can have its shape"),
    ],
)
def test_an_index_that_lies(saved: Path, change: Callable[[Any], Any], message: str) -> None:
    def lying(content: Any) -> Any:
        change(content["model.fc.bias"])
        return content

    rewrite(saved / "step-2", "tensors.json", lying)
    with pytest.raises(CheckpointError, match=rf"tensors.json: model.fc.bias: .*{message}"):
        Checkpoint(saved / "step-2")


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def test_a_pickle_does_not_run(saved: Path, tmp_path: Path) -> None:
    """Wherever it lies, and whether or not the sums were made to match."""
    mark = tmp_path / "ran"
    torch_file = tmp_path / "harm.pt"
    torch.save({"a": Malicious(mark)}, torch_file)
    for harm in (pickle.dumps(Malicious(mark)), torch_file.read_bytes()):
        for name in (".metadata", "rank-0.bin", "tensors.json", "state.json", "manifest.json"):
            path = saved / "step-2" / name
            good = path.read_bytes() if path.exists() else None
            path.write_bytes(harm + (good or b"")[len(harm) :])
            manifest = (saved / "step-2" / "manifest.json").read_bytes()
            if name not in (".metadata", "manifest.json"):
                content = json.loads(manifest)
                del content["sha256"]
                data = path.read_bytes()
                content["files"][name]["sha256"] = hashlib.sha256(data).hexdigest()
                content["files"][name]["nbytes"] = len(data)
                content["sha256"] = files.manifest_digest(content)
                (saved / "step-2" / "manifest.json").write_text(json.dumps(content))
            model, optimizer = build()
            if name in (".metadata", "rank-0.bin"):  # not read; read as numbers
                checkpoint.load(saved, model, optimizer)
            else:
                with pytest.raises(CheckpointError, match=name):
                    checkpoint.load(saved, model, optimizer)
            assert main(["inspect", str(saved)]) == (name not in (".metadata", "rank-0.bin"))
            if good is None:
                path.unlink()
            else:
                path.write_bytes(good)
            if name != "manifest.json":
                (saved / "step-2" / "manifest.json").write_bytes(manifest)
    assert not mark.exists()
    # the test can fail: unpickled, it does run
    pickle.loads(pickle.dumps(Malicious(mark)))
    assert mark.exists()


# --- another model, other options ----------------------------------------------------------------


def renamed(model: nn.Module) -> None:
    model.fc.other = model.fc.bias
    del model.fc.bias


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_another_model_is_named(saved: Path, cls: Any) -> None:
    class Wider(nn.Module):
        def __init__(self, params: Any) -> None:
            super().__init__()
            self.inner = module_of(params)

    cases: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda p: p.update(more=nn.Parameter(torch.ones(2))), "has no model.more"),
        (lambda p: p.pop("fc.bias"), "has model.fc.bias, which the model lacks"),
        (
            lambda p: p.update({"emb.weight": nn.Parameter(torch.ones(97, 63))}),
            r"model.emb.weight is \[97, 64\] torch.float32, here it is \[97, 63\]",
        ),
        (
            lambda p: p.update({"fc.bias": nn.Parameter(torch.ones(24, dtype=torch.bfloat16))}),
            r"model.fc.bias is \[24\] torch.float32, here it is \[24\] torch.bfloat16",
        ),
    ]
    for change, message in cases:
        params = models.make_params(seed=1)
        change(params)
        model = module_of(params)
        with pytest.raises(CheckpointError, match=f"step-2: {message}"):
            checkpoint.load(saved, model)
        optimizer = cls(models.groups_of(params), lr=0.02)
        before = models.digest(model.state_dict())
        with pytest.raises(CheckpointError, match="step-2: "):
            checkpoint.load(saved, model, optimizer)
        assert models.digest(model.state_dict()) == before
        assert not optimizer.state


def test_other_groups_and_options_are_named(saved: Path) -> None:
    params = models.make_params(seed=1)
    model = module_of(params)
    groups = models.groups_of(params)
    groups[1]["params"].append(groups[0]["params"].pop())  # "empty" moves
    with pytest.raises(CheckpointError, match="empty is not in parameter group 1"):
        checkpoint.load(saved, model, Lamb(groups, lr=0.02))
    groups = models.groups_of(params)[:1]
    with pytest.raises(CheckpointError, match="is in parameter group 1, and not"):
        checkpoint.load(saved, model, Lamb(groups, lr=0.02))
    with pytest.raises(CheckpointError, match=r"betas of parameter group 0 is \(0.9, 0.999\)"):
        checkpoint.load(saved, model, Lamb(models.groups_of(params), betas=(0.9, 0.98)))
    with pytest.raises(CheckpointError, match="Invalid options: 'other'"):
        checkpoint.load(saved, model, options="other")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="w of the optimizer is no parameter of the model"):
        checkpoint.load(saved, model, Lamb([("w", nn.Parameter(torch.ones(2)))]))
    with pytest.raises(TypeError, match="Lamb or ShardedLamb expected, got SGD"):
        checkpoint.schema.Names(model, torch.optim.SGD(model.parameters(), lr=1.0))  # type: ignore[arg-type]

    own = Lamb(models.groups_of(params), lr=0.5, betas=(0.9, 0.98))
    checkpoint.load(saved, model, own, options="own")
    assert (own.param_groups[0]["lr"], own.param_groups[0]["betas"]) == (0.5, (0.9, 0.98))
    other = Lamb(models.groups_of(params), lr=0.5, betas=(0.9, 0.98))
    checkpoint.load(saved, model, other, options="saved")
    assert (other.param_groups[0]["lr"], other.param_groups[0]["betas"]) == (0.02, (0.9, 0.999))
    same = Lamb(models.groups_of(params), lr=0.5)
    checkpoint.load(saved, model, same)  # lr is the checkpoint's
    assert same.param_groups[1]["lr"] == 0.02


def test_weights_alone_and_tied_and_wrapped(tmp_path: Path) -> None:
    """Tied params are saved once; torch.compile's names are not."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6))
    model[1].weight = model[0].weight
    checkpoint.save(tmp_path, 0, torch.compile(model))
    keys = set(Checkpoint(tmp_path / "step-0").tensors)
    assert {k for k in keys if "weight" in k} == {"model.0.weight", "model.2.weight"}
    other = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6))
    other[1].weight = other[0].weight
    checkpoint.load(tmp_path, other)
    assert torch.equal(other[1].weight, model[0].weight)
    assert other[1].weight is other[0].weight
    with pytest.raises(CheckpointError, match="was saved without an optimizer"):
        checkpoint.load(tmp_path, other, Lamb(other.parameters()))


# --- half of a checkpoint ------------------------------------------------------------------------


def test_what_is_not_complete_does_not_count(saved: Path) -> None:
    (saved / "step-9").mkdir()  # a copy that broke off before the manifest
    (saved / "step-x").mkdir()
    left = saved / (".step-7.new-" + "0" * 32)
    left.mkdir()
    (left / "rank-0.bin").write_bytes(b"half")
    (saved / "mine").mkdir()
    latest = checkpoint.latest(saved)
    assert latest is not None
    assert latest.name == "step-2"
    assert checkpoint.latest(saved / "absent") is None
    model, optimizer = build()
    assert checkpoint.load(saved, model, optimizer).step == 2
    checkpoint.save(saved, 3, model, optimizer, keep=2)
    names = {path.name for path in saved.iterdir()}
    assert names == {"step-2", "step-3", "step-9", "step-x", "mine", ".owner-1"}


@pytest.mark.parametrize("stop", range(9))
def test_stopped_anywhere_inside_a_save(
    saved: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """At every system call that makes something last: either the new one is whole or there is none.

    ``fsync`` and ``rename`` raise from the ``stop``-th on, as if the process had ended there, but
    for what it would have cleaned up.
    """
    calls = []

    def counted(name: str) -> Any:
        original = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) > stop:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    model, optimizer = build()
    checkpoint.load(saved, model, optimizer)
    step(model, optimizer, 3)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", counted("fsync"))
        patched.setattr(os, "rename", counted("rename"))
        try:
            checkpoint.save(saved, 3, model, optimizer)
            ended = True
        except (KeyboardInterrupt, CheckpointError):
            ended = False
    # four files, their folder, the rename, the folder above
    assert calls == (["fsync"] * 5 + ["rename", "fsync"])[: stop + 1]
    latest = checkpoint.latest(saved)
    assert latest is not None
    assert latest.name == ("step-3" if stop >= 6 else "step-2")
    assert ended == (stop >= 7)
    Checkpoint(latest).verify()
    fresh, optimizer = build()
    checkpoint.load(saved, fresh, optimizer)
    assert (models.digest(fresh.state_dict()) == models.digest(model.state_dict())) == (stop >= 6)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    model, optimizer = build()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: "):
        checkpoint.save(tmp_path / "file", 1, model, optimizer)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):  # root may write anywhere but here
        closed = Path("/proc/self").resolve()
    with pytest.raises(CheckpointError, match=rf"{closed}/\.owner-1: "):
        checkpoint.save(closed, 1, model, optimizer)
    for bad in (-1, 1.5, True):
        with pytest.raises(CheckpointError, match="step must be an integer >= 0"):
            checkpoint.save(tmp_path, bad, model, optimizer)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="keep must be None or an integer >= 1"):
        checkpoint.save(tmp_path, 1, model, optimizer, keep=0)


# --- the command line ----------------------------------------------------------------------------


def test_inspect_verify_export(saved: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["inspect", str(saved)]) == 0
    printed = capsys.readouterr().out
    whole = Checkpoint(saved / "step-2")
    assert "step 2, written by Lamb on 1 ranks, torch" in printed
    assert "extra: {'tokens': 2}" in printed
    (group,) = [line for line in printed.splitlines() if line.startswith("parameter group 0: ")]
    assert group.startswith("parameter group 0: 5 params, weight_decay=0.05, ")
    assert {"lr=0.02", "rule=lamb"} <= set(group.split(", "))
    norm = torch.linalg.vector_norm(whole.tensor("model.emb.weight").double())
    line = next(line for line in printed.splitlines() if line.startswith("model.emb.weight "))
    assert line.split() == ["model.emb.weight", "97x64", "float32", f"{norm:.6g}"]
    assert "optimizer.wide.weight.exp_avg_sq" in printed

    assert main(["verify", str(saved / "step-1")]) == 0
    assert "step-1: 4 files are as they were written" in capsys.readouterr().out

    out = tmp_path / "out.safetensors"
    assert main(["export", str(saved), str(out)]) == 0
    found = load_file(out)
    assert sorted(found) == sorted(key for key in whole.tensors if key != "rng")
    assert all(torch.equal(value, whole.tensor(key)) for key, value in found.items())
    weights = tmp_path / "weights.safetensors"
    assert main(["export", "--weights", str(saved), str(weights)]) == 0
    model, _ = build(seed=3)
    model.load_state_dict(load_file(weights))
    assert torch.equal(model.emb.weight, whole.tensor("model.emb.weight"))

    flip(saved / "step-2" / "rank-0.bin")
    capsys.readouterr()
    assert main(["verify", str(saved)]) == 1
    assert "rank-0.bin: damaged: its SHA-256" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "absent")]) == 1
    assert "absent: no checkpoint here" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert "safetensors" in sys.modules


ENDS = """
import sys, torch, torch.distributed as dist
from dist_lamb import ShardedLamb, checkpoint

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = torch.nn.Linear(500, 500)
optimizer = ShardedLamb(model)
model(torch.ones(2, 500)).sum().backward()
optimizer.step()
checkpoint.save_async(sys.argv[1], 1, model, optimizer)
dist.destroy_process_group()
"""


def test_a_script_that_ends_without_waiting(tmp_path: Path) -> None:
    """The last checkpoint is written all the same, or its error is printed."""
    (tmp_path / "file").write_text("")
    done = [
        subprocess.run([sys.executable, "-c", ENDS, path], capture_output=True, text=True)
        for path in (tmp_path / "saved", tmp_path / "file")
    ]
    assert [each.returncode for each in done] == [0, 0]
    assert Checkpoint(tmp_path / "saved" / "step-1").step == 1
    assert "save_async() failed" not in done[0].stderr
    assert f"the last save_async() failed: {tmp_path / 'file'}" in done[1].stderr


def test_an_error_beside_the_training_is_of_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the docstring of wait() promises: of a process group that is gone, say."""

    def gone(*_: object) -> Path:
        raise RuntimeError("the process group was destroyed")

    monkeypatch.setattr(checkpoint.saving, "_write", gone)
    model, optimizer = build()
    pending = checkpoint.save_async(tmp_path, 1, model, optimizer)
    with pytest.raises(CheckpointError, match=r"group was destroyed \(before .* wait\(\) for a"):
        pending.wait()


def test_nowhere_to_print(saved: Path) -> None:
    """``dist-lamb verify RUN >&-``"""
    command = [sys.executable, "-m", "dist_lamb", "verify", str(saved)]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_reader_that_has_seen_enough(saved: Path, command: str) -> None:
    """``dist-lamb inspect RUN | head -1``: no error, also none of Python's flush as it ends."""
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "dist_lamb", command, str(saved)]
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("to", ["safetensors", "dcp"])
def test_where_export_writes(
    to: str, saved: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not over anything, and nothing but an error where nothing can be written."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("kept")
    Path("folder").mkdir()
    Path("link").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))

    def refused(out: str) -> str:
        assert main(["export", "--format", to, str(saved), out]) == 1
        text: str = capsys.readouterr().err
        assert text.startswith("dist_lamb: error: ")
        assert text.count("\n") == 1, text
        return text

    for out in ("file", "folder", "link", ".", "..", "/", ""):
        assert f"{Path(out)}: is there already; export to another path" in refused(out)
    assert "file: " in refused("file/out")
    assert "/proc/" in refused("/proc/out")
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("file").read_text() == "kept"
    assert main(["export", "--format", to, str(saved), "new/folder/out"]) == 0
    assert [path.name for path in Path("new/folder").iterdir()] == ["out"]
