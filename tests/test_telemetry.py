"""What a run tells of every weight matrix, batches made ahead, and compiled layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pretrain_runs import STEPS, run_here
from pretraining import telemetry
from pretraining.batches import PackedSequences, TrainBatches
from pretraining.config import ConfigError, load_config
from pretraining.masking import Masking
from pretraining.model import train_flops
from pretraining.report import TENSORS_LOG_NAME, read_tensors_log
from torch import nn

pytestmark = pytest.mark.usefixtures("no_process_group_left")


def test_tensors_are_logged_and_drawn(config: Path, tmp_path: Path) -> None:
    """At log steps 3, 6, 9, 12 every second one; the picture is one of these rows."""
    log = run_here(config, tmp_path / "run", "train.tensors_every=2", "train.noise_every=2")
    rows = read_tensors_log(tmp_path / "run" / TENSORS_LOG_NAME)
    assert [row["step"] for row in rows] == [6, STEPS]
    trust = {row["step"]: row["trust"] for row in log if row["kind"] == "train" and row["trust"]}
    total = {row["step"]: row["grad_norm"] for row in log if row["kind"] == "train"}
    for row in rows:
        ratios = [ratio for ratio, *_ in row["tensors"].values()]
        assert max(ratios) == pytest.approx(trust[row["step"]]["max"])
        for ratio, norm, update, gradient in row["tensors"].values():
            assert ratio == pytest.approx(norm / update, rel=1e-5)
            assert 0 < gradient < total[row["step"]]
    picture = (tmp_path / "run" / telemetry.PICTURE_NAME).read_bytes()
    assert picture.startswith(b"\x89PNG")
    events = list((tmp_path / "run" / "tensorboard").glob("events*"))
    written = b"".join(event.read_bytes() for event in events)
    for tag in (
        b"tensors/update_norm",
        b"tensors/grad_norm",
        b"train/grad_norm",
        b"train/skipped_steps",
    ):
        assert tag in written
    train = [row for row in log if row["kind"] == "train"]
    assert len({row["grad_norm"] for row in train}) == STEPS
    assert all(row["grad_norm"] > 0 for row in train)
    settings = load_config(config, [])
    per_token = train_flops(settings.model, settings.data)
    # log rows 3, 6, 9 and 12 read the means of steps 2, 4, .. so far
    measured = {row["step"]: row["noise_scale"] for row in train if row["trust"]}
    assert all(value is not None for value in measured.values())
    assert len(set(measured.values())) > 2
    for row in train:
        assert row["model_flops_per_s"] == pytest.approx(row["tokens_per_s"] * per_token)


def test_flops_of_bert_large() -> None:
    """6 operations a weight of the layers, 302 M of them, and some for attention and head."""
    path = Path(__file__).parent.parent / "configs" / "bert_large_32k.toml"
    settings = load_config(path, [])
    assert train_flops(settings.model, settings.data) == pytest.approx(6 * 302e6, rel=0.06)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (["optim.engine=fsdp2"], "engines sharded and ddp"),
        (["train.micro_batch=16"], "two batch sizes"),
    ],
)
def test_noise_that_cannot_be_measured(config: Path, wrong: list[str], text: str) -> None:
    settings = load_config(config, ["train.noise_every=2", *wrong])
    with pytest.raises(ConfigError, match=text):
        telemetry.noise_scale_of(settings, nn.Linear(2, 2), settings.train.micro_batch)


def batches(ahead: bool) -> TrainBatches:
    made = TrainBatches(
        PackedSequences(np.arange(10, 10 + 14 * 23) % 250, 16, "training"),
        Masking(fraction=0.2, vocabulary=260),
        seed=3,
        global_batch=8,
        micro_batch=2,
        rank=1,
        world_size=2,
    )
    if not ahead:
        made._take = lambda start, _: made._masked(np.arange(start, start + 2))  # type: ignore[method-assign]
    return made


def test_batches_made_ahead_are_the_same() -> None:
    """Over the end of an epoch, after a jump of the position, and if a step is left out."""
    ahead, plain = batches(True), batches(False)
    for step in range(12):
        if step == 7:
            state = ahead.state_dict()
            for one in (ahead, plain):
                one.load_state_dict({**state, "index": 2, "epoch": 5})
        if step == 9:
            ahead.next_batch()
            plain.next_batch()
        for got, want in zip(ahead.next_batch(), plain.next_batch(), strict=True):
            for a, b in zip(got, want, strict=True):
                assert np.array_equal(a, b)
        assert ahead.position == plain.position


def test_an_error_while_a_batch_is_made_ahead_is_raised() -> None:
    made = batches(True)
    list(made.next_batch())
    made.masking = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        [list(made.next_batch()) for _ in range(3)]


@pytest.mark.slow
def test_compiled_layers_follow_the_others(config: Path, tmp_path: Path) -> None:
    plain = run_here(config, tmp_path / "plain", "train.steps=3")
    made = run_here(config, tmp_path / "compiled", "train.steps=3", "train.compile=true")
    losses = [[r["loss"] for r in log if r["kind"] == "train"] for log in (plain, made)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
