#!/usr/bin/env python
"""Benchmarks: ``python launch/bench.py step --help``.

Prints a table and appends its rows, with hardware and versions, to launch/results/. An
implementation that is not LAMB to rounding on the same inputs gets no speed.
"""

from __future__ import annotations

import argparse
import sys

from benchmarking import step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("step", help="the time of one step() on one device")
    step.add_arguments(command)
    command.set_defaults(run=step.main)
    args = parser.parse_args()
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
