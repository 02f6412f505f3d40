"""What decides the numbers of a study's runs besides the fields of ``Run``. It stands in
``study.json`` beside the rows, so that no other study takes them for its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretraining.config import ConfigError

from studying import results
from studying.config import StudyConfig
from studying.grid import Results

FILE = "study.json"
Identity = dict[str, dict[str, Any]]

#: keys of [study] that choose which runs are made, and which of them together: no run's numbers
#: follow from them. Any other key, also one that is added to StudyConfig, counts.
_CHOOSING = {
    "name", "architectures", "batches", "seeds", "base_warmup", "more_warmups", "rise", "max_lrs",
    "pack_sequences", "pack_seconds", "tokens_per_s",
}  # fmt: skip
#: likewise of [rules.NAME]
_RULE_CHOOSING = {"lrs", "base", "late", "batches"}
_WAY_OUT = "give this study another --out"


def of(config: StudyConfig, data_sha256: str | None, rules: Iterable[str]) -> Identity:
    """The identity of a study's runs of ``rules``, as JSON gives it back; None: of any data."""
    study = {k: v for k, v in asdict(config).items() if k not in _CHOOSING}
    model, all_rules = study.pop("model"), study.pop("rules")
    decides = {}
    for name in rules:
        decides[name] = {k: v for k, v in all_rules[name].items() if k not in _RULE_CHOOSING}
        if config.rules[name].half_life:
            # Its beta2 is that of the base batch, moved to the run's.
            decides[name]["base_batch"] = config.base_batch
    found = {"study": study, "model": model, "rules": decides}
    if data_sha256 is not None:
        found["data"] = {"sha256": data_sha256}
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def claim(
    config: StudyConfig,
    data_sha256: str,
    out: Path,
    rows: Results,
    say: Callable[[str], None],
) -> None:
    """Compare ``out`` with this study, and note in it what this study is. Rows without a
    ``study.json`` count as this study's, unless they say themselves that they are not.

    Raises:
        ConfigError: it is another study's.
    """
    path, csv = out / FILE, out / results.FILE
    here = of(config, data_sha256, config.rules)
    there = compare(here, config, out, rows)
    known = there["rules"].keys() if there else set()
    new = {run.rule for run in rows} & here["rules"].keys() - known
    if there is not None and new:
        say(f"{path} has no {', '.join(sorted(new))}: their rows in {csv} count as this study's")
    if there is None and rows:
        others = {row.data_sha256 for row in rows.values()} - {data_sha256[:16]}
        also = f", though trained on other data: {', '.join(sorted(others))}" if others else ""
        say(f"{path} is missing: the {len(rows)} rows of {csv} count as this study's{also}")
    noted = {**here, "rules": {**(there or here)["rules"], **here["rules"]}}
    if noted != there:
        out.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")
        part.replace(path)


def compare(here: Identity, config: StudyConfig, out: Path, rows: Results) -> Identity | None:
    """What ``study.json`` says, if it is there.

    Raises:
        ConfigError: it, or a row by itself, is of another study.
    """
    path, csv, there = out / FILE, out / results.FILE, None
    if path.exists():
        there = _read(path)
        # Rules that were added, are gone, or were never run may be anything.
        alike = {run.rule for run in rows} & here["rules"].keys() & there["rules"].keys()
        pairs = [(n, there[n], here[n]) for n in ("study", "model", "data") if n in here]
        pairs += [(f"rules.{n}", there["rules"][n], here["rules"][n]) for n in sorted(alike)]
        differ = [
            f"{section}.{key}: {old.get(key)!r} there, {new.get(key)!r} here"
            for section, old, new in pairs
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]
        if differ:
            raise ConfigError(f"{path} is of another study: {'; '.join(differ)}; {_WAY_OUT}")
    for run, row in rows.items():
        known = [
            ("samples", row.samples, config.samples),
            ("samples times seq_len", row.tokens, config.samples * config.seq_len),
        ]
        if run.rule in config.rules:
            beta2 = float(f"{config.betas(run.rule, run.batch)[1]:.6g}")
            known.append(("beta2", float(f"{row.beta2:.6g}"), beta2))
        for name, old, new in known:
            if old != new:
                raise ConfigError(
                    f"{csv} is of another study: {run} has {name} {old}, here {new}; {_WAY_OUT}"
                )
    return there


def _read(path: Path) -> Identity:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: dict(found[name]) for name in ("study", "model", "rules", "data")}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path} is damaged; if the rows beside it are this study's, remove it"
        ) from None
