"""Large batches: LAMB beside AdamW, over lrs, batches and seeds; many small runs on few devices.

    python launch/study.py data --out runs/study_data stdlib package:torch FOLDER ...
    python launch/study.py calibrate configs/study_large_batch.toml --out runs/study
    python launch/study.py run configs/study_large_batch.toml --out runs/study --minutes 9
    python launch/study.py probe configs/study_large_batch.toml --out runs/study
    python launch/study.py report configs/study_large_batch.toml --out runs/study

``run`` works through the runs that the results so far ask for, the most important first, until its
time is over; started again with the same ``--out`` it goes on. An ``--out`` with rows of another
study is refused: ``study.json`` in it says what made them. ``report`` needs the CSV alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import get_args

import torch
from pretraining.config import ConfigError
from pretraining.sources import CorpusError
from studying import calibrate
from studying.config import load_study
from studying.data import DataError, load_data, make_data
from studying.results import ResultsError
from studying.training import Mode


def _say(text: str) -> None:
    print(text, flush=True)


def _number(
    kind: Callable[[str], float], wanted: str, fits: Callable[[float], bool]
) -> Callable[[str], float]:
    """An option's type. A comparison with nan is false, so no ``fits`` takes it."""

    def number(given: str) -> float:
        with suppress(ValueError):
            if fits(kind(given)):
                return kind(given)
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {given}")

    return number


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    data = commands.add_parser("data", help="text to one small file of tokens")
    data.add_argument("sources", nargs="+", help="stdlib, package:NAME or a folder")
    data.add_argument("--out", type=Path, default=Path("runs/study_data"))
    data.add_argument("--work", type=Path, default=Path("runs/study_work"))
    # Training keeps token ids in 15 bits.
    vocabulary = _number(int, "256 to 32,768", lambda n: 256 <= n <= 2**15)
    data.add_argument("--vocab-size", type=vocabulary, default=4096)
    share = _number(float, "more than 0 and less than 1", lambda x: 0 < x < 1)
    data.add_argument("--held-out", type=share, default=0.02, help="share of the documents")

    def command(name: str, about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about)
        made.add_argument("config", type=Path)
        made.add_argument("--out", type=Path, default=Path("runs/study"))
        return made

    for name, about, minutes in (
        ("run", "train what is wanted next, until the time is over", 9.0),
        ("calibrate", "tokens/s of packs of several sizes", 1.5),
        ("probe", "noise scale and trust ratios along two runs", None),
    ):
        one = command(name, about)
        one.add_argument("--data", type=Path, default=Path("runs/study_data"))
        if minutes is not None:
            of_time = _number(float, "0 or more", lambda x: x >= 0)
            one.add_argument("--minutes", type=of_time, default=minutes)
        several = ", or several: cuda:0,cuda:1" if name == "run" else ""
        one.add_argument("--device", default="auto", help=f"auto, cpu, cuda:0{several}")
        if name == "calibrate":
            one.add_argument("--modes", nargs="+", choices=get_args(Mode), default=["graph"])
        else:
            one.add_argument(
                "--mode",
                choices=["auto", *get_args(Mode)],
                default="auto",
                help="auto: compile if calibration.csv in --out says that it pays, else graph",
            )
    command("plot", "the figures, from the CSV")
    report = command("report", "the figures, the tables and a draft of the text, from the CSV")
    report.add_argument("--to", type=Path, help="folder of figures and text; default: --out")

    args = parser.parse_args(arguments)
    try:
        return _do(args)
    except (ConfigError, DataError, CorpusError, ResultsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _do(args: argparse.Namespace) -> int:
    if args.command == "data":
        make_data(
            args.sources,
            args.out,
            vocab_size=args.vocab_size,
            held_out_fraction=args.held_out,
            work=args.work,
            say=_say,
        )
        return 0
    config = load_study(args.config)
    if getattr(args, "mode", "") == "auto":
        args.mode = calibrate.best_mode(args.out / calibrate.FILE)
    if args.command == "run":
        from studying.runner import run_study

        run_study(
            config,
            args.data,
            args.out,
            minutes=args.minutes,
            mode=args.mode,
            device=args.device,
            say=_say,
        )
        return 0
    if args.command in ("plot", "report"):
        # Drawing needs matplotlib, which a machine that trains may lack.
        from studying import report

        to = getattr(args, "to", None) or args.out
        report.write(config, args.out, to, text=args.command == "report", say=_say)
        return 0
    from studying.runner import devices

    device = torch.device(devices(args.device)[0])
    sequences = load_data(args.data, config.seq_len, config.held_out, device)
    if args.command == "calibrate":
        calibrate.calibrate(
            config, sequences, args.out, minutes=args.minutes, modes=tuple(args.modes), say=_say
        )
    else:
        from studying.probe import probe

        probe(config, sequences, args.out, mode=args.mode, say=_say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
