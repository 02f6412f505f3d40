#!/usr/bin/env python
"""Benchmarks: ``python launch/bench.py step`` and ``torchrun ... launch/bench.py train``.

Prints a table and appends its rows, with hardware and versions, to launch/results/. An
implementation that is not LAMB to rounding on the same inputs gets no speed.
"""

from __future__ import annotations

import argparse
import sys

import torch
from benchmarking import step, train
from torch.distributed.elastic.multiprocessing.errors import record


@record
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for module, about in (
        (step, "the time of one step() on one device"),
        (train, "whole training steps on the ranks that torchrun starts"),
    ):
        command = commands.add_parser(module.__name__.split(".")[-1], help=about)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no GPU")
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
