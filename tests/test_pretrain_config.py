"""The configuration of launch/pretrain.py: what it accepts, and what it says about the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pretraining.config import ConfigError, DataConfig, OptimConfig, load_config

CONFIGS = Path(__file__).parent.parent / "configs"

GOOD = {
    "model": {
        "hidden_size": "64",
        "num_hidden_layers": "2",
        "num_attention_heads": "4",
        "intermediate_size": "128",
        "max_position_embeddings": "64",
    },
    "data": {"path": '"text"', "vocab_size": "512", "seq_len": "32"},
    "optim": {"lr": "1e-2", "base_batch": "64", "warmup_epochs": "0.5"},
    "train": {"steps": "10", "global_batch": "64", "micro_batch": "8"},
}


def toml(**changes: str | None) -> str:
    """GOOD as a file, with ``section__key=value``; None leaves the key out."""
    sections = {name: dict(values) for name, values in GOOD.items()}
    for place, value in changes.items():
        section, key = place.split("__")
        if value is None:
            del sections[section][key]
        else:
            sections.setdefault(section, {})[key] = value
    return "\n".join(
        f"[{name}]\n" + "\n".join(f"{key} = {value}" for key, value in values.items())
        for name, values in sections.items()
    )


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return write


def test_defaults_and_types(write) -> None:
    config = load_config(write(toml(optim__lr="1", optim__betas="[0.8, 0]")))
    assert config.optim.lr == 1.0
    assert type(config.optim.lr) is float
    assert config.optim.betas == (0.8, 0.0)
    assert config.optim.engine == "sharded"
    assert config.optim.nonfinite == config.optim.options()["nonfinite"] == "skip"
    assert config.train.max_skipped_in_a_row == 10
    assert config.run_dir == Path("runs/run")
    assert json.loads(json.dumps(config.as_dict()))["data"]["seq_len"] == 32


# study_*.toml are launch/study.py's.
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("[!s]*.toml")), ids=lambda path: path.stem)
def test_configs_of_the_repository(path: Path) -> None:
    assert load_config(path).run_dir == Path("runs") / path.stem


def test_bert_large_recipes_are_nvidias() -> None:
    recipes = {
        "bert_large_phase1": (6e-3, 65536, 7038, 0.2843, 128),
        "bert_large_phase2": (4e-3, 32768, 1563, 0.128, 512),
    }
    for name, expected in recipes.items():
        c = load_config(CONFIGS / f"{name}.toml")
        assert c.optim.base_batch == c.train.global_batch
        assert expected == (
            c.optim.lr,
            c.train.global_batch,
            c.train.steps,
            c.optim.warmup_fraction,
            c.data.seq_len,
        )


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optim.lr=1e-3", "optim", "lr", 1e-3),
        ("optim.stage=1", "optim", "stage", 1),
        ("optim.betas=[0.5, 0.6]", "optim", "betas", (0.5, 0.6)),
        ("optim.nonfinite=propagate", "optim", "nonfinite", "propagate"),
        ("train.max_skipped_in_a_row=0", "train", "max_skipped_in_a_row", 0),
        ("train.run_dir=2024", "train", "run_dir", "2024"),
        ("train.run_dir='a b'", "train", "run_dir", "a b"),
        ("data.path=/texts/*.txt", "data", "path", "/texts/*.txt"),
        ("train.device=cpu", "train", "device", "cpu"),
        (" train.steps = 7 ", "train", "steps", 7),
    ],
)
def test_overrides(write, override: str, section: str, key: str, value: object) -> None:
    config = load_config(write(toml()), [override])
    assert getattr(getattr(config, section), key) == value


def test_an_optional_key_can_be_unset(write) -> None:
    overrides = ["optim.warmup_epochs=none", "optim.warmup_fraction=0.1"]
    assert load_config(write(toml()), overrides).optim.warmup_epochs is None


BAD_FILES = [
    ("[model", "run.toml: not valid TOML: "),
    (toml() + "\n[optm]\nlr = 1", "run.toml: unknown section optm; sections are [model], [data]"),
    ("steps = 3\n" + toml(), "run.toml: unknown key outside a section: steps"),
    ("train = 3", "run.toml: train must be a section, [train]"),
    (toml(optim__lrr="1"), "run.toml: unknown key optim.lrr; did you mean optim.lr?"),
    (toml(data__zzz="1"), "run.toml: unknown key data.zzz; keys are path, vocab_size"),
    (toml(optim__lr=None), "run.toml: optim.lr is missing"),
    (toml(optim__lr='"fast"'), "run.toml: optim.lr must be a number > 0, got 'fast' (str)"),
    (toml(optim__lr="0"), "optim.lr must be a number > 0, got 0 (int)"),
    (toml(optim__lr="inf"), "optim.lr must be a number > 0, got inf"),
    (toml(optim__lr="nan"), "optim.lr must be a number > 0, got nan"),
    (toml(train__steps="1.5"), "train.steps must be an integer >= 1, got 1.5 (float)"),
    (toml(train__steps="true"), "train.steps must be an integer >= 1, got True (bool)"),
    (toml(optim__stage="4"), "optim.stage must be one of 0, 1, 2, 3, got 4 (int)"),
    (toml(optim__stage="true"), "optim.stage must be one of 0, 1, 2, 3, got True (bool)"),
    (toml(optim__stage="3"), "optim.stage must be 1 or 2 with engine 'sharded'"),
    (toml(optim__deepspeed='"a.json"'), "optim.deepspeed is not for engine 'sharded'"),
    (
        toml(optim__engine='"zero"'),
        "optim.engine must be one of 'sharded', 'fsdp2', 'ddp', 'deepspeed', got 'zero'",
    ),
    (toml(optim__betas="[0.9]"), "optim.betas must be a list of 2 values, each a number >= 0"),
    (toml(optim__betas="[0.9, 1.0]"), "optim.betas must be a list of 2 values, each a number >="),
    (toml(data__mask_fraction="1.0"), "data.mask_fraction must be a number > 0 and < 1, got 1.0"),
    (
        toml(optim__nonfinite='"ignore"'),
        "optim.nonfinite must be one of 'skip', 'propagate', got 'ignore' (str)",
    ),
    (toml(optim__nonfinite="true"), "optim.nonfinite must be one of 'skip', 'propagate', got True"),
    (toml(optim__nonfinit='"skip"'), "unknown key optim.nonfinit; did you mean optim.nonfinite?"),
    (toml(train__max_skipped_in_a_row="-1"), "train.max_skipped_in_a_row must be an integer >= 0"),
    (toml(train__max_skipped_in_a_row="1.5"), "train.max_skipped_in_a_row must be an integer >= 0"),
    (toml(train__max_skipped_in_row="1"), "did you mean train.max_skipped_in_a_row?"),
    (toml(data__path="3"), "data.path must be a string, got 3 (int)"),
    (toml(data__seq_len="65"), "data.seq_len (65) is longer than model.max_position_embeddings"),
    (toml(model__hidden_size="66"), "model.hidden_size (66) must be a multiple of num_attention"),
    (toml(optim__warmup_epochs=None), "optim.warmup_epochs or warmup_fraction must be given"),
    (toml(optim__warmup_fraction="0.1"), "optim.warmup_epochs or warmup_fraction must be given"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_bad_files(write, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    assert message in str(caught.value)
    assert "run.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=-1", "--set optim.lr=-1: optim.lr must be a number > 0, got -1 (int)"),
        ("optim.lr=big", "--set optim.lr=big: optim.lr must be a number > 0, got 'big' (str)"),
        ("optim.lrr=1", "--set optim.lrr=1: unknown key optim.lrr; did you mean optim.lr?"),
        ("optm.lr=1", "--set optm.lr=1: unknown section optm"),
        ("optim.lr", "--set optim.lr: must be section.key=value"),
        ("lr=1", "--set lr=1: must be section.key=value"),
    ],
)
def test_bad_overrides(write, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(toml()), [override])
    assert message in str(caught.value)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot read this file: No such file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.toml: not a text file"):
        load_config(tmp_path / "binary.toml")


def test_sections_check_themselves_without_a_file() -> None:
    with pytest.raises(ValueError, match="seq_len must be an integer >= 8, got 7"):
        DataConfig(vocab_size=512, seq_len=7)
    with pytest.raises(ValueError, match="warmup_epochs or warmup_fraction must be given"):
        OptimConfig(lr=1.0, base_batch=1)
