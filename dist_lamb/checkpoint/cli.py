"""Inspect, verify or export a checkpoint: ``python -m dist_lamb inspect|verify|export DIR``.

DIR is a checkpoint, or a folder of checkpoints for its latest. One process, no GPU; no code from
the checkpoint is executed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .errors import CheckpointError
from .folder import resolve
from .reading import Checkpoint


def inspect(checkpoint: Checkpoint) -> None:
    """Print what a checkpoint holds."""
    about = checkpoint.state["about"]
    stage = f", ZeRO stage {about['stage']}" if "stage" in about else ""
    params = [key for key in checkpoint.tensors if key.startswith("model.")]
    elements = sum(math.prod(checkpoint.tensors[key].shape) for key in params)
    nbytes = sum(info.nbytes for info in checkpoint.files.values())
    print(f"{checkpoint.path}")
    print(f"step {checkpoint.step}, written by {about['engine']}{stage}", end=" ")
    print(f"on {checkpoint.world_size} ranks, torch {checkpoint.torch_version}")
    print(f"{len(params)} tensors of the model, {elements:,} elements; {nbytes:,} bytes in all")
    for i, group in enumerate(checkpoint.state["groups"]):
        options = ", ".join(f"{k}={v}" for k, v in group.items() if k != "params")
        print(f"parameter group {i}: {len(group['params'])} params, {options}")
    for key, value in checkpoint.state["stateful"].items():
        print(f"{key}: {value}")
    if checkpoint.extra is not None:
        print(f"extra: {checkpoint.extra}")
    rows = [("tensor", "shape", "dtype", "2-norm")]
    for key, entry in checkpoint.tensors.items():
        dtype = str(entry.dtype).removeprefix("torch.")
        norm = ""
        if entry.dtype.is_floating_point:
            norm = f"{torch.linalg.vector_norm(checkpoint.tensor(key).double()):.6g}"
        rows.append((key, "x".join(map(str, entry.shape)) or "scalar", dtype, norm))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def verify(checkpoint: Checkpoint) -> None:
    """Compare all files with their checksums; raise ``CheckpointError`` naming one that differs."""
    checkpoint.verify()
    print(f"{checkpoint.path}: {len(checkpoint.files) + 1} files are as they were written")


def export(checkpoint: Checkpoint, out: Path, weights: bool) -> None:
    """Write whole tensors to one safetensors file.

    The names are the checkpoint's, ``model.<name>`` and ``optimizer.<name>.<state>``. With
    ``weights`` only the model's tensors, without ``model.``, as ``load_state_dict()`` takes them.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise CheckpointError("export needs safetensors: pip install 'dist_lamb[export]'") from None
    prefix = "model." if weights else ""
    tensors = {
        key.removeprefix(prefix): checkpoint.tensor(key)
        for key in checkpoint.tensors
        if key.startswith(prefix) and key != "rng"
    }
    state = {"step": checkpoint.step, "groups": checkpoint.state["groups"]}
    part = out.with_name(f".{out.name}.part")
    try:
        save_file(tensors, part, {"format": "pt", "dist_lamb": json.dumps(state, default=str)})
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    print(f"{out}: {len(tensors)} tensors of step {checkpoint.step}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dist_lamb", description="Checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, does in (
        ("inspect", "print step, options, and name, shape, dtype and norm of every tensor"),
        ("verify", "compare every file with its checksum"),
        ("export", "write whole tensors to one safetensors file"),
    ):
        command = commands.add_parser(name, help=does, description=does)
        command.add_argument("dir", type=Path, help="a checkpoint, or a folder for its latest")
        if name == "export":
            command.add_argument("out", type=Path, help="the file to write")
            command.add_argument(
                "--weights", action="store_true", help="the model alone, by its own names"
            )
    arguments = parser.parse_args(argv)
    try:
        checkpoint = Checkpoint(resolve(arguments.dir))
        if arguments.command == "inspect":
            inspect(checkpoint)
        elif arguments.command == "verify":
            verify(checkpoint)
        else:
            export(checkpoint, arguments.out, arguments.weights)
    except (CheckpointError, OSError) as error:
        print(f"dist_lamb: error: {error}", file=sys.stderr)
        return 1
    return 0
