"""Lamb and ShardedLamb in Hugging Face's Trainer and in Accelerate, against a loop by hand."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from dist_lamb import Lamb, ShardedLamb, param_groups
from dist_lamb.integrations.accelerate import consolidate_on_save

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
from dist_lamb.integrations.trainer import ConsolidateOnSave  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
OPTIONS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "max_grad_norm": 0.5}


class Tagger(nn.Module):
    """Without an attention: its key bias has no gradient but rounding noise."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(8)
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)
        with torch.no_grad():
            for p in (self.embed.weight, self.head.weight):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
            self.head.bias.zero_()

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.norm(self.embed(ids)))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def batch() -> dict[str, Tensor]:
    ids = torch.arange(24).view(4, 6) * 5 % 11
    return {"ids": ids, "labels": (ids * 3 + 1) % 11}


def train_by_hand(model: nn.Module, opt: Lamb, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(**batch())["loss"]
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def assert_same_params(got: nn.Module, want: nn.Module) -> None:
    for (name, p), q in zip(got.named_parameters(), want.parameters(), strict=True):
        assert torch.equal(p, q), name


# --- transformers --------------------------------------------------------------------------------


def trainer(model: nn.Module, folder: Path, steps: int, **more: Any) -> Any:
    """One dataset item is one batch, so every step sees the same."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        learning_rate=more.pop("learning_rate", 5e-5),
        weight_decay=more.pop("weight_decay", 0.0),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        save_steps=more.pop("save_steps", 1000),
        seed=0,
        **{"save_strategy": "steps", **more.pop("arguments", {})},
    )
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[batch()],
        data_collator=lambda items: items[0],
        **more,
    )


def losses_of(done: Any) -> list[float]:
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def test_trainer_given_an_optimizer(tmp_path: Path) -> None:
    model, control = Tagger(), Tagger()
    opt = Lamb(model.parameters(), **OPTIONS)
    done = trainer(model, tmp_path, 8, optimizers=(opt, None))
    done.train()
    by_hand = train_by_hand(control, Lamb(control.parameters(), **OPTIONS), 8)
    assert_same_params(model, control)
    losses = losses_of(done)
    assert losses == pytest.approx(by_hand, abs=1e-4)
    assert losses[-1] < 0.7 * losses[0]
    assert all(opt.state[p]["step"] == 8 for p in model.parameters())


def test_trainer_given_the_class(tmp_path: Path) -> None:
    """It then makes a decayed and an undecayed group itself, as param_groups() does."""
    model, control = Tagger(), Tagger()
    options = {"lr": 0.05, "adapt": "decayed", "max_grad_norm": 0.5}
    done = trainer(model, tmp_path, 5, weight_decay=0.1, optimizer_cls_and_kwargs=(Lamb, options))
    done.train()
    assert isinstance(getattr(done.optimizer, "optimizer", done.optimizer), Lamb)
    assert [g["weight_decay"] for g in done.optimizer.param_groups] == [0.1, 0.0]
    groups = param_groups(control, 0.1)
    train_by_hand(control, Lamb(groups, **options), 5)
    assert_same_params(model, control)


def test_trainer_resumes(tmp_path: Path) -> None:
    whole = Tagger()
    trainer(
        whole,
        tmp_path / "a",
        6,
        save_steps=3,
        optimizers=(Lamb(whole.parameters(), **OPTIONS), None),
    ).train()
    saved = torch.load(tmp_path / "a" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert all(float(state["step"]) == 3 for state in saved["state"].values())
    resumed = Tagger()
    opt = Lamb(resumed.parameters(), **OPTIONS)
    trainer(resumed, tmp_path / "b", 6, optimizers=(opt, None)).train(
        resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3")
    )
    assert all(opt.state[p]["step"] == 6 for p in resumed.parameters())
    assert_same_params(resumed, whole)


def test_trainer_trains_bert(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=23,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
    )
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config)
    ids = torch.arange(48).view(8, 6) * 7 % 23
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    done = trainer(model, tmp_path, 40, optimizers=(Lamb(model.parameters(), lr=0.03), None))
    done.train_dataset = [{"input_ids": ids, "labels": ids}]
    done.train()
    losses = losses_of(done)
    assert losses[-1] < 0.7 * losses[0]
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        assert not torch.equal(p, before[name]), name


# --- accelerate ----------------------------------------------------------------------------------


@pytest.fixture
def accelerator() -> Iterator[Any]:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerated_steps(accelerator: Any, model: Any, opt: Any, batches: int) -> None:
    for _ in range(batches):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch())["loss"])
            opt.step()
            opt.zero_grad()


def test_accelerate(accelerator: Any) -> None:
    """With two batches to a step: those in between are not steps."""
    model, control = Tagger(), Tagger()
    inner = Lamb(model.parameters(), **OPTIONS)
    prepared, opt = accelerator.prepare(model, inner)
    accelerated_steps(accelerator, prepared, opt, 8)
    assert all(inner.state[p]["step"] == 4 for p in model.parameters())
    by_hand = Lamb(control.parameters(), **OPTIONS)
    for _ in range(4):
        for _ in range(2):
            (control(**batch())["loss"] / 2).backward()
        by_hand.step()
        by_hand.zero_grad()
    assert_same_params(model, control)


def test_accelerate_resumes(accelerator: Any, tmp_path: Path) -> None:
    model, other = Tagger(), Tagger()
    prepared, opt = accelerator.prepare(model, Lamb(model.parameters(), **OPTIONS))
    accelerated_steps(accelerator, prepared, opt, 4)
    accelerator.save_state(str(tmp_path / "state"))
    accelerated_steps(accelerator, prepared, opt, 4)

    accelerator.free_memory()
    fresh = Lamb(other.parameters(), lr=1.0)
    prepared, opt = accelerator.prepare(other, fresh)
    accelerator.load_state(str(tmp_path / "state"))
    assert all(fresh.state[p]["step"] == 2 for p in other.parameters())
    accelerated_steps(accelerator, prepared, opt, 4)
    assert_same_params(other, model)


# --- two ranks -----------------------------------------------------------------------------------


def sharded(model: nn.Module) -> ShardedLamb:
    return ShardedLamb(model, reduce_gradients=False, **OPTIONS)


def params(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run_trainer(folder: Path, steps: int, resume: str | None = None, **more: Any) -> Any:
    """(params, what the optimizer counts) after a run of Trainer."""
    model = Tagger()
    opt = sharded(model)
    done = trainer(model, folder, steps, optimizers=(opt, None), **more)
    done.train(resume_from_checkpoint=resume)
    return params(model), float(opt.full_optimizer_state_dict()["state"][0]["step"])


def two_ranks(rank: int, world: int, folder: Path) -> Any:
    # As torchrun describes the ranks; the process group is there already.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": str(world)}
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}

    callbacks = {"callbacks": [ConsolidateOnSave()]}
    found["whole"] = run_trainer(folder / "whole", 6, save_steps=3, **callbacks)
    found["resumed"] = run_trainer(
        folder / "rest", 6, str(folder / "whole" / "checkpoint-3"), **callbacks
    )
    best = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2}
    best |= {"metric_for_best_model": "loss", "greater_is_better": False}
    run_trainer(folder / "best", 2, eval_dataset=[batch()], arguments=best, **callbacks)
    found["best"] = (folder / "best" / "checkpoint-2" / "optimizer.pt").exists()

    # Accelerate
    accelerator = accelerate.Accelerator(cpu=True)
    model = Tagger()
    prepared, opt = accelerator.prepare(model, sharded(model))
    accelerated_steps(accelerator, prepared, opt, 2)
    with pytest.raises(RuntimeError, match=r"dist_lamb\.integrations"):
        opt.state_dict()  # what both trainers do
    consolidate_on_save(accelerator, opt)
    accelerator.save_state(str(folder / "state"))
    accelerated_steps(accelerator, prepared, opt, 2)
    found["accelerated"] = params(model)
    accelerator.free_memory()
    other = Tagger()
    prepared, opt = accelerator.prepare(other, sharded(other))
    accelerator.load_state(str(folder / "state"))
    accelerated_steps(accelerator, prepared, opt, 2)
    found["loaded"] = params(other)
    return found


@pytest.mark.xdist_group("programs")
def test_sharded_saves_and_resumes_on_two_ranks(tmp_path: Path) -> None:
    one, other = run_ranks(2, tmp_path, two_ranks, tmp_path)
    control = Tagger()
    by_hand = Lamb(control.parameters(), **OPTIONS)
    train_by_hand(control, by_hand, 4)
    four = params(control)
    train_by_hand(control, by_hand, 2)
    for found in (one, other):
        assert found["best"]
        for name, expected in (("whole", params(control)), ("resumed", params(control))):
            got, steps = found[name]
            assert steps == 6
            # Trainer at two ranks scales the gradient, from which LAMB's step hardly depends.
            assert all(torch.allclose(got[k], p, atol=1e-5) for k, p in expected.items())
        assert all(torch.equal(p, found["whole"][0][k]) for k, p in found["resumed"][0].items())
        assert all(torch.allclose(found["accelerated"][k], p, atol=1e-6) for k, p in four.items())
        assert all(torch.equal(p, found["accelerated"][k]) for k, p in found["loaded"].items())
    # The file of two ranks is a plain state dict: it goes on at one, with Lamb.
    saved = tmp_path / "whole" / "checkpoint-3" / "optimizer.pt"
    Lamb(Tagger().parameters()).load_state_dict(torch.load(saved, weights_only=True))
