"""Figures, tables and the part of the text that numbers write, from the CSV files alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from studying import calibrate, figures, identity, probe, tables
from studying.config import StudyConfig
from studying.results import FILE, ResultsError, read, read_table

TEXT = "study.md"
HEADING = "## Results"


def write(
    config: StudyConfig, source: Path, to: Path, *, text: bool, say: Callable[[str], None] = print
) -> None:
    """Draw the figures into ``to``; with ``text`` also write what follows "## Results" in its
    ``study.md``. What stands above that heading stays.

    Raises:
        ResultsError: no rows can be read. ConfigError: they are another study's.
    """
    if not (source / FILE).exists():
        raise ResultsError(f"no {source / FILE}: --out must be a folder where runs are done")
    results = read(source / FILE)
    identity.compare(identity.of(config, None, config.rules), config, source, results)
    cells = tables.everything(config, results)
    drawn = figures.draw(
        config, results, cells, source / probe.NOISE_FILE, source / probe.TRUST_FILE, to
    )
    for path in drawn:
        say(f"drew {path}")
    if not text:
        return
    path = to / TEXT
    above = path.read_text(encoding="utf-8").split(HEADING)[0] if path.exists() else ""
    parts = [above + HEADING + "\n", _hardware(results)]
    several = len(config.batches) > 1
    four = f"The cell of four times the base batch ({4 * config.base_batch})"
    # In the order that a reader asks: transfer, tuned, what else was varied, what it saves.
    sections: list[tuple[str, str]] = [
        ("What the numbers say of the hypotheses", "\n".join(tables.verdicts(config, cells))),
        (four, tables.four_times_table(config, cells) if several else ""),
        ("All cells: best and transferred lr", _LEGEND + tables.cells_table(config, cells)),
        ("Tuned: the difference to the first rule", tables.difference_table(config, cells)),
        ("Warm-up at the largest batch", tables.warmups_table(config, results) if several else ""),
        ("Runs that diverged + runs that got stuck", tables.failures_table(config, results)),
        ("Steps", _steps(config, results) if several else ""),
        ("Wall clock", _wall_clock(source / calibrate.FILE)),
        ("Figures", "\n\n".join(f"![]({p.name})" for p in drawn)),
        ("Not run", "\n".join(tables.missing_lines(config, results) or ["Nothing is missing."])),
    ]
    parts += [f"### {title}\n\n{body.strip()}\n" for title, body in sections if body.strip()]
    path.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    say(f"wrote {path}")


_LEGEND = (
    "Mean ± standard deviation over seeds (number of seeds). Cost: transferred minus the base "
    "batch's best. Regret: transferred minus this batch's best. lrs: how many were tried, and the "
    "side on which the loss had not risen yet.\n\n"
)


def _hardware(results: tables.Results) -> str:
    rows = list(results.values())
    if not rows:
        return "No runs yet.\n"
    seconds = {(row.seconds, row.run.architecture, row.run.batch, row.pack_runs) for row in rows}

    def all_of(values: set[str]) -> str:
        return ", ".join(sorted(values))

    return (
        f"{len(rows)} runs of {rows[0].tokens / 1e6:.1f} M tokens; "
        f"{sum(s[0] for s in seconds) / 60:.1f} minutes of training on "
        f"{all_of({row.hardware for row in rows})}, torch {all_of({row.torch for row in rows})}, "
        f"{all_of({row.date for row in rows})}; {rows[0].parameters / 1e6:.2f} M params; tokens "
        f"{all_of({row.data_sha256 for row in rows})} (sha256).\n"
    )


def _steps(config: StudyConfig, results: tables.Results) -> str:
    lines = []
    for architecture in config.architectures:
        for rule in config.rules:
            target, fewest = tables.fewest_steps(config, results, architecture, rule)
            # A half-life rule that was not run has its base's row at the base batch alone.
            if len(fewest) > 1:
                counts = [f"{fewest[b]:.0f}" if b in fewest else "" for b in config.batches]
                lines.append([architecture, rule, f"{target:.2f}", *counts])
    header = ["model", "rule", "loss", *(f"batch {b}" for b in config.batches)]
    return "Fewest steps to a held-out loss that every batch reaches, over all lrs.\n\n" + (
        tables.table(header, lines)
    )


def _wall_clock(path: Path) -> str:
    """One run alone at each batch, and how many runs together use the device."""
    rows = read_table(path, ("tokens_per_s",))
    if not rows:
        return ""
    header = ["model", "batch", "runs together", "mode", "ms a step", "M tokens/s", "device"]
    return tables.table(
        header,
        [
            [
                row["architecture"],
                row["batch"],
                row["runs"],
                row["mode"],
                row["step_ms"],
                f"{float(row['tokens_per_s']) / 1e6:.2f}",
                row["hardware"],
            ]
            for row in rows
        ],
    )
