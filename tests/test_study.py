"""launch/study.py: packs of runs, the adaptive grid, the CSV, and what is drawn from it."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import study
import torch
from pretraining.config import ConfigError, ModelConfig
from studying import data as study_data
from studying import grid, results, tables
from studying.calibrate import best_mode
from studying.config import RuleConfig, StudyConfig, load_study
from studying.data import DataError, Sequences
from studying.optimizers import OptimizerOptions
from studying.probe import noise_scale
from studying.results import Cell, Row, Run
from studying.stacked import build
from studying.training import Job, Pack, Stopped, inputs_of, train_rows
from texts import write_texts
from torch.func import functional_call

from dist_lamb import Lamb, param_groups, schedules

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

ROOT = Path(__file__).resolve().parent.parent
CONFIG = StudyConfig(
    name="test",
    architectures=("decoder", "bert"),
    batches=(4, 16),
    samples=160,
    seeds=(0, 1, 2),
    seq_len=16,
    base_warmup=0.1,
    more_warmups=(0.2,),
    evals=5,
    held_out=16,
    pack_sequences=64,
    model=ModelConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    ),
    rules={
        "adamw": RuleConfig(optimizer="adamw", lrs=(1e-3, 2e-3, 4e-3)),
        "lamb": RuleConfig(optimizer="lamb", lrs=(1e-2, 2e-2, 4e-2)),
        "adamw-halflife": RuleConfig(
            optimizer="adamw", lrs=(1e-3, 2e-3, 4e-3), half_life=True, base="adamw"
        ),
        "adamh": RuleConfig(optimizer="adamh", lrs=(1e-2, 2e-2, 4e-2)),
    },
)
NARROW = replace(
    CONFIG,
    rules={
        "lamb": CONFIG.rules["lamb"],
        "lamb-remainder": RuleConfig(optimizer="lamb-remainder", lrs=(1e-2, 2e-2, 4e-2)),
    },
)


def made_up(vocabulary: int = 256) -> Sequences:
    generator = torch.Generator().manual_seed(0)
    # Squared: some tokens are frequent, so there is something to learn.
    ids = 5 + (torch.rand(116, 16, generator=generator) ** 2 * (vocabulary - 5)).short()
    return Sequences(ids[:100], ids[100:], vocabulary, "made up")


def alone(run: Run, data: Sequences) -> torch.Tensor:
    """Losses of a training loop that knows neither vmap nor packs."""
    config, device = CONFIG, torch.device("cpu")
    model = build(run.architecture, config.model, config.data(data.vocabulary), run.seed, device)
    narrow = run.rule == "lamb-remainder"
    if narrow:
        model.bfloat16()
    groups = param_groups(model, config.weight_decay)
    optimizer: torch.optim.Optimizer
    if run.rule.startswith("lamb"):
        formats: Any = {"state_format": "bfloat16", "master": "remainder"} if narrow else {}
        optimizer = Lamb(
            groups, lr=run.lr, max_grad_norm=1.0, adapt="decayed", impl="foreach", **formats
        )
    elif run.rule == "adamh":
        others = [{**g, "rule": "adamw"} for g in groups if not g["weight_decay"]]
        matrices = [{"params": g["params"]} for g in groups if g["weight_decay"]]
        optimizer = Lamb(
            [*matrices, *others], lr=run.lr, max_grad_norm=1.0, rule="adamh", impl="foreach"
        )
    else:
        for group in groups:
            group["params"] = [p for _, p in group["params"]]
        betas = config.betas(run.rule, run.batch)
        optimizer = torch.optim.AdamW(groups, lr=run.lr, betas=betas, eps=1e-6)
    steps = config.steps(run.batch)
    schedule = schedules.warmup_linear_decay(optimizer, round(run.warmup * steps), steps)
    samples = data.train[data.order(run.seed, config.samples)]
    stream = inputs_of(run.architecture, samples, f"train {run.seed}", config, data.vocabulary)
    losses = []
    for step in range(steps):
        rows = slice(step * run.batch, (step + 1) * run.batch)
        params = {name: p.float() for name, p in model.named_parameters()}
        out = functional_call(model, params, tuple(part[rows].long() for part in stream))
        loss = (out[0] if isinstance(out, tuple) else out).mean()
        optimizer.zero_grad()
        loss.backward()
        if run.rule.startswith("adamw"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("architecture", ["decoder", "bert"])
def test_a_run_in_a_pack_is_the_run_alone(architecture: str) -> None:
    """Other rules, lrs, seeds and a run that diverges beside it leave no trace."""
    data = made_up()
    runs = [
        Run(architecture, "adamw", 4, 0.1, 4e-3, 0),
        Run(architecture, "lamb", 4, 0.1, 2e-2, 1),
        Run(architecture, "adamw", 4, 0.2, 1e6, 0),
        Run(architecture, "adamw-halflife", 4, 0.1, 2e-3, 0),
        Run(architecture, "adamh", 4, 0.1, 2e-2, 0),
    ]
    together = Pack(CONFIG, runs, data, "eager")
    together.advance(together.steps)
    losses = together.train_losses()
    assert not losses[-1, 2].isfinite() or losses[-1, 2] > 10
    for r in (0, 1, 3, 4):
        torch.testing.assert_close(losses[:, r], alone(runs[r], data), atol=2e-4, rtol=0)
    # What would be different if a lr, a seed or a rule were mixed up.
    assert (losses[:, 0] - losses[:, 3]).abs().max() > 1e-2


def test_bfloat16_weights_with_remainders_are_trained_as_alone() -> None:
    """The weights of two runs are one tensor, its rest is in two optimizers."""
    data = made_up()
    runs = [Run("decoder", "lamb-remainder", 4, 0.1, 2e-2, seed) for seed in (0, 1)]
    together = Pack(NARROW, runs, data, "eager")
    together.advance(together.steps)
    losses = together.train_losses()
    for r, run in enumerate(runs):
        # Sums in another order may round a moment the other way: by 1/256 of it.
        torch.testing.assert_close(losses[:, r], alone(run, data), atol=2e-3, rtol=0)
    for optimizer in together.optimizers:
        states = [state["remainder"] for state in optimizer.state.values()]
        assert all(t.dtype == torch.int16 for t in states)
        assert sum(int(t.count_nonzero()) for t in states) > 1000


def test_packs_do_not_mix_dtypes_of_weights() -> None:
    queue = [run for run in grid.wanted(NARROW, {}) if run.batch == 4]
    pack = grid.next_pack(NARROW, queue, 1e9, 1e9)
    assert {run.rule for run in pack} == {"lamb"}
    assert {run.rule for run in queue} == {"lamb", "lamb-remainder"}
    with pytest.raises(ValueError, match="dtype of weights"):
        Pack(NARROW, queue, made_up(), "eager")


def test_half_life() -> None:
    first, second = CONFIG.betas("adamw-halflife", 16)
    assert first == 0.9
    assert second**4 == pytest.approx(0.999**16)
    assert CONFIG.betas("adamw", 16) == (0.9, 0.999)


def test_a_pack_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    data = made_up()
    runs = (Run("decoder", "adamw", 4, 0.1, 4e-3, 0), Run("decoder", "lamb", 4, 0.1, 2e-2, 1))
    whole = train_rows(Job(CONFIG, runs, "eager", None), data)
    path = tmp_path / "pack.pt"
    stopped = 0
    for _ in range(9):
        try:
            # Over at once: every start gets to the next evaluation.
            rows = train_rows(Job(CONFIG, runs, "eager", path, stop_at=0.0), data)
            break
        except Stopped:
            stopped += 1
            assert path.exists()
    assert stopped == 5  # at step 0 and at all evaluations but the last
    assert not path.exists()
    for row, other in zip(whole, rows):
        assert (row.loss, row.train_loss, row.curve) == (other.loss, other.train_loss, other.curve)


def row_of(run: Run, loss: float) -> Row:
    return Row(
        run=run,
        steps=10,
        samples=160,
        tokens=2560,
        loss=loss,
        train_loss=loss,
        curve=((0, 4.2), (5, 3.5), (10, loss)),
        unigram_loss=4.0,
        nonfinite_step=-1,
        beta2=0.999,
        pack_runs=1,
        seconds=1.0,
        tokens_per_s=2560.0,
        mode="eager",
        parameters=1000,
        data_sha256="0",
        hardware="none",
        torch="0",
        date="2026-01-01",
    )


def basin_loss(run: Run) -> float:
    """Best at 64e-3 for AdamW and 1e-2 for LAMB at batch 4; NaN from 8 times that on."""
    best = (64e-3 if "adamw" in run.rule else 1e-2) * math.sqrt(run.batch / 4)
    off = math.log2(run.lr / best)
    return math.nan if off > 2.9 else 3.0 + 0.04 * off**2 + 0.001 * run.seed


def finished(config: StudyConfig) -> dict[Run, Row]:
    """All that the queue asks for until it is empty, in packs."""
    found: dict[Run, Row] = {}
    for _ in range(500):
        queue = grid.wanted(config, found)
        assert len(set(queue)) == len(queue)
        pack = grid.next_pack(config, queue, 1e6, 1e9)
        if not pack:
            assert not queue
            return found
        assert len({(run.architecture, run.batch) for run in pack}) == 1
        assert not found.keys() & set(pack)
        found |= {run: row_of(run, basin_loss(run)) for run in pack}
    raise AssertionError("the queue never ends")


def test_a_rule_of_some_batches_and_the_width_of_its_basin() -> None:
    lamb = CONFIG.rules["lamb"]
    with pytest.raises(ConfigError, match=r"rules.adamh.batches: \[8\] are not in study.batches"):
        replace(CONFIG, rules={"lamb": lamb, "adamh": replace(lamb, batches=(16, 8))})
    config = replace(CONFIG, rules={"lamb": lamb, "adamh": replace(lamb, late=True, batches=(16,))})
    found = finished(config)
    assert {run.batch for run in found if run.rule == "adamh"} == {16}

    def verdicts() -> set[str]:
        lines = tables.verdicts(config, tables.everything(config, found))
        return {line.split(": ", 2)[2] for line in lines if line.startswith("* H4")}

    # 0.04 nats a factor of 2 away from the best one, 0.16 a factor of 4.
    assert verdicts() == {"AdamH 3, LAMB 3; held"}
    for run, row in found.items():
        if run.rule == "adamh" and run.lr == 4e-2:
            found[run] = replace(row, loss=3.2)
    assert verdicts() == {"AdamH 2, LAMB 3; refuted"}
    for run in [run for run in found if run.rule == "lamb" and run.lr > 4e-2]:
        del found[run]
    assert verdicts() == {"AdamH 2, LAMB 3; open"}


def test_the_grid_shows_both_sides_of_every_basin_and_then_adds_seeds() -> None:
    found = finished(CONFIG)
    for architecture in CONFIG.architectures:
        for rule in CONFIG.rules:
            for batch in CONFIG.batches[1 if rule == "adamw-halflife" else 0 :]:
                cell = Cell(architecture, rule, batch, CONFIG.warmup(batch))
                rows = grid.basin(cell, found, 0)
                best = grid.best_lr(rows)
                assert best is not None
                assert all(grid.sides(CONFIG, rows))
                assert min(rows) < best < max(rows)
                moved = grid.transferred(CONFIG, cell, found)
                assert moved is not None
                for lr in (best, moved.lr):
                    assert {run.seed for run in found if (run.cell, run.lr) == (cell, lr)} == {
                        0,
                        1,
                        2,
                    }
    other = [run for run in found if run.warmup == 0.2]
    assert {run.batch for run in other} == {16}
    assert {run.rule for run in other} == set(CONFIG.rules)
    # AdamW with its half-life is AdamW at the base batch: not run twice.
    assert not [run for run in found if run.rule == "adamw-halflife" and run.batch == 4]


def test_the_decoder_comes_first_and_its_two_ends_before_the_rest() -> None:
    config = replace(CONFIG, batches=(4, 8, 16))
    queue = grid.wanted(config, {})
    assert [run.architecture for run in queue] == ["decoder"] * 33 + ["bert"] * 33
    assert [run.batch for run in queue[:33]] == [4] * 9 + [16] * 12 + [8] * 12
    running = queue[:3]
    assert not set(running) & set(grid.wanted(config, {}, running))


def test_a_basin_that_never_rises_ends() -> None:
    config = replace(CONFIG, architectures=("decoder",), max_lrs=5)
    found: dict[Run, Row] = {}
    while queue := grid.wanted(config, found):
        found |= {run: row_of(run, 3.0) for run in queue}
    for cell in {run.cell for run in found if run.warmup != 0.2}:
        # One more on each side at a time, so one over is possible; and what transfer asks for.
        assert 5 <= len(grid.basin(cell, found, 0)) <= 7


def test_packs_fit_the_time() -> None:
    queue = grid.wanted(CONFIG, {})
    tokens = CONFIG.samples * CONFIG.seq_len
    assert len(grid.next_pack(CONFIG, queue, tokens, 3.5)) == 3
    assert grid.next_pack(CONFIG, queue, tokens, 0.5) == []
    assert len(grid.next_pack(CONFIG, queue, tokens, 1e9)) == 9


def test_rows_survive_the_file_and_a_cut_off_line(tmp_path: Path) -> None:
    path = tmp_path / "study.csv"
    runs = [Run("decoder", "lamb", 4, 0.1, 1e-2 * 2**k, 0) for k in range(3)]
    rows = [row_of(runs[0], 3.25), replace(row_of(runs[1], math.nan), curve=((0, math.nan),))]
    results.append(path, rows)
    found = results.read(path)
    assert found[runs[0]] == rows[0]
    assert found[runs[1]].diverged
    assert math.isnan(found[runs[1]].loss)
    whole = path.read_text()
    path.write_text(whole[: -len(whole.splitlines()[-1]) // 2])
    assert list(results.read(path)) == runs[:1]
    results.append(path, [row_of(runs[2], 3.0)])
    assert list(results.read(path)) == [runs[0], runs[2]]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        results.read(path)


def test_what_counts_as_diverged_or_stuck() -> None:
    run = Run("decoder", "lamb", 4, 0.1, 1e-2, 0)
    assert not row_of(run, 3.4).diverged
    assert row_of(run, 4.01).diverged  # 3.5 was seen
    assert row_of(run, math.inf).diverged
    assert row_of(run, 3.9).stuck
    assert not row_of(run, 3.7).stuck


def test_noise_scale() -> None:
    """Gradients G + e with known |G|^2 and tr(Sigma)."""
    torch.manual_seed(0)
    mean = torch.randn(400, dtype=torch.float64)
    each = mean + 5 * torch.randn(64 * 512, 400, dtype=torch.float64)
    small = each.view(-1, 8, 400).mean(1).square().sum(1).mean()
    large = each.view(-1, 512, 400).mean(1).square().sum(1).mean()
    trace, square = noise_scale(small, large, 8, 512)
    assert float(trace) == pytest.approx(25 * 400, rel=0.02)
    assert float(square) == pytest.approx(float(mean.square().sum()), rel=0.05)


SMALL = """
[study]
architectures = ["decoder"]
batches = [4, 16]
samples = 64
seeds = [0]
seq_len = 16
base_warmup = 0.1
evals = 4
held_out = 8
rise = 0.0
max_lrs = 1
tokens_per_s = 1e5

[model]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 32
max_position_embeddings = 16
hidden_dropout_prob = 0.0
attention_probs_dropout_prob = 0.0

[rules.adamw]
optimizer = "adamw"
lrs = [4e-3]

[rules.lamb]
optimizer = "lamb"
lrs = [2e-2]
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with study.toml and the tokens of made-up text in data/."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.toml").write_text(SMALL)
    texts = write_texts(folder / "texts", files=40, lines=30)
    given = ["data", str(texts), "--out", str(folder / "data"), "--work", str(folder / "work")]
    assert study.main([*given, "--vocab-size", "300", "--held-out", "0.2"]) == 0
    return folder


def test_the_commands(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs, a second start that goes on, calibration, probe, and figures from the CSV alone."""
    of = [str(small / "study.toml"), "--out", str(small / "out")]
    on = ["--data", str(small / "data"), "--device", "cpu"]
    assert study.main(["run", *of, *on, "--minutes", "0.0"]) == 0
    assert "0 new rows" in capsys.readouterr().out
    assert study.main(["run", *of, *on, "--minutes", "3"]) == 0
    rows = results.read(small / "out" / "study.csv")
    assert {(run.rule, run.batch) for run in rows} == {
        (rule, batch) for rule in ("adamw", "lamb") for batch in (4, 16)
    }
    assert all(math.isfinite(row.loss) and len(row.curve) == 5 for row in rows.values())
    capsys.readouterr()
    assert study.main(["run", *of, *on, "--minutes", "3"]) == 0
    assert "0 new rows" in capsys.readouterr().out
    assert study.main(["calibrate", *of, *on, "--modes", "graph", "--minutes", "0.001"]) == 0
    assert "largest difference 0.00e+00" in capsys.readouterr().out
    assert study.main(["probe", *of, *on]) == 0
    assert study.main(["report", *of, "--to", str(small / "report")]) == 0
    written = {path.name for path in (small / "report").iterdir()}
    assert {"study.md", "study_basins_decoder.png", "study_trust.png"} <= written
    text = (small / "report" / "study.md").read_text()
    assert "| lamb | 16 |" in text


def test_bad_input_is_refused(small: Path, tmp_path: Path) -> None:
    def refused(old: str, new: str) -> str:
        path = tmp_path / "bad.toml"
        path.write_text(SMALL.replace(old, new, 1))
        with pytest.raises(ConfigError) as error:
            load_study(path)
        return str(error.value)

    assert "batch 16" in refused("samples = 64", "samples = 68")
    assert "sample" in refused("samples = 64", "sample = 64")
    assert "rules.adamw.optimizer = 'adam'" in refused('"adamw"', '"adam"')
    assert "factors of 2" in refused("[4e-3]", "[4e-3, 5e-3]")
    assert "dropout" in refused("hidden_dropout_prob = 0.0", "hidden_dropout_prob = 0.1")
    with pytest.raises(DataError, match="make it with"):
        study_data.load_data(tmp_path, 16, 8, torch.device("cpu"))
    with pytest.raises(DataError, match="no/such/folder"):
        study_data.make_data(
            ["no/such/folder"], tmp_path, vocab_size=300, held_out_fraction=0.1, work=tmp_path,
            say=print,
        )  # fmt: skip
    assert study.main(["run", str(tmp_path / "none.toml")]) == 2
    config = str(small / "study.toml")
    assert study.main(["run", config, "--data", str(tmp_path), "--out", str(tmp_path)]) == 2


def test_data_is_what_was_carried(small: Path, tmp_path: Path) -> None:
    """The same text twice gives the same tokens; a damaged file is refused."""
    first = (small / "data" / "meta.json").read_text()
    texts = str(small / "texts")
    given = ["data", texts, "--out", str(tmp_path / "data"), "--work", str(tmp_path / "work")]
    assert study.main([*given, "--vocab-size", "300", "--held-out", "0.2"]) == 0
    assert (tmp_path / "data" / "meta.json").read_text() == first
    meta = tmp_path / "data" / "meta.json"
    meta.write_text(first.replace('"sha256": "', '"sha256": "0'))
    with pytest.raises(DataError, match="not what"):
        study_data.load_data(tmp_path / "data", 16, 8, torch.device("cpu"))


def test_the_mode_is_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "calibration.csv"
    assert best_mode(path) == "graph"
    lines = ["architecture,batch,runs,mode,tokens_per_s", "decoder,16,4,graph,100"]
    path.write_text("\n".join([*lines, "decoder,16,4,compile,150", ""]))
    assert best_mode(path) == "compile"
    more = ["decoder,64,1,graph,100", "decoder,64,1,compile,110", ""]
    path.write_text("\n".join([*lines, "decoder,16,4,compile,150", *more]))
    assert best_mode(path) == "graph"


def test_a_report_before_any_sweep_is_done(tmp_path: Path) -> None:
    """The first rows of a run that was stopped: no basin says yet how far up to draw."""
    rows = (ROOT / "launch" / "results" / "study.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "study.csv").write_text("\n".join([*rows[:4], ""]), encoding="utf-8")
    config = str(ROOT / "configs" / "study_large_batch.toml")
    assert study.main(["report", config, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "study_basins_decoder.png").exists()


@pytest.mark.parametrize(
    ("config", "folder"), [("study_large_batch", "."), ("study_narrow", "narrow")]
)
def test_what_is_published_comes_from_its_rows(tmp_path: Path, config: str, folder: str) -> None:
    """One command makes the published text and figures again, and keeps what a hand wrote."""
    published = ROOT / "launch" / "results" / folder
    shutil.copy(published / "study.md", tmp_path)
    of = [str(ROOT / "configs" / f"{config}.toml"), "--out", str(published)]
    assert study.main(["report", *of, "--to", str(tmp_path)]) == 0
    text = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert text == (published / "study.md").read_text(encoding="utf-8")
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {path.name for path in published.glob("study_*.png")}
    assert all(f"({name})" in text for name in figures)


def test_every_configuration_of_the_repository_loads() -> None:
    for path in sorted((ROOT / "configs").glob("study_*.toml")):
        config = load_study(path)
        assert grid.wanted(config, {})


def test_options_reach_the_optimizers() -> None:
    from studying.optimizers import OPTIMIZERS

    lr = torch.tensor(0.5)
    options = OptimizerOptions(lr, (0.8, 0.9), 1e-3, 0.1, 1.0)
    for name, make in OPTIMIZERS.items():
        named = [("w", torch.ones(2, 2).requires_grad_()), ("b", torch.ones(2).requires_grad_())]
        optimizer = make(named, options)
        found = {float(g["params"][0].ndim): g["weight_decay"] for g in optimizer.param_groups}
        # AdamH, whose matrices keep their norm, has no decay.
        assert found == {2: 0.0 if name == "adamh" else 0.1, 1: 0.0}
        for group in optimizer.param_groups:
            assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-3)
            assert group["lr"] is lr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_study_on_a_cpu(tmp_path: Path) -> None:
    """configs/study_smoke.toml, on the text that every machine has: every run is finite or counted,
    and the best lrs train."""
    data = ["--out", str(tmp_path / "data"), "--work", str(tmp_path / "work")]
    assert study.main(["data", "stdlib", *data, "--vocab-size", "1024"]) == 0
    path = ROOT / "configs" / "study_smoke.toml"
    of = [str(path), "--out", str(tmp_path / "out")]
    on = ["--data", str(tmp_path / "data"), "--device", "cpu", "--minutes", "5"]
    assert study.main(["run", *of, *on]) == 0
    rows = results.read(tmp_path / "out" / "study.csv")
    config = load_study(path)
    for rule in config.rules:
        for batch in config.batches[:2]:
            cell = Cell("decoder", rule, batch, config.warmup(batch))
            of_cell = grid.basin(cell, rows, 0)
            best = grid.best_lr(of_cell)
            assert best is not None
            assert of_cell[best].loss < of_cell[best].unigram_loss
    assert study.main(["report", *of, "--to", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "study_steps.png").exists()
