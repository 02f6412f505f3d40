"""Checkpoints from the command line: ``python -m dist_lamb inspect|verify|export|import DIR``.

DIR is a checkpoint, or a folder of checkpoints for its latest; for ``import`` one of
torch.distributed.checkpoint. One process, no GPU; no code from the checkpoint is executed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

from ..sharding.comm import host_comm
from . import dcp, storage
from .errors import CheckpointError, printable
from .files import check_step, os_errors
from .folder import create_temporary, resolve
from .json_codec import encode
from .reading import Checkpoint


def say(text: str, file: TextIO | None = None) -> None:
    """Print text from a checkpoint; what a terminal would obey is shown instead."""
    print(printable(text), file=file)


def inspect(checkpoint: Checkpoint) -> None:
    """Print what a checkpoint holds."""
    checkpoint.check_sizes()
    about = checkpoint.state["about"]
    stage = f", ZeRO stage {about['stage']}" if "stage" in about else ""
    params = [key for key in checkpoint.tensors if key.startswith("model.")]
    elements = sum(math.prod(checkpoint.tensors[key].shape) for key in params)
    nbytes = sum(info.nbytes for info in checkpoint.files.values())
    say(f"{checkpoint.path}")
    say(
        f"step {checkpoint.step}, written by {about['engine']}{stage} "
        f"on {checkpoint.world_size} ranks, torch {checkpoint.torch_version}"
    )
    say(f"{len(params)} tensors of the model, {elements:,} elements; {nbytes:,} bytes in all")
    for i, group in enumerate(checkpoint.state["groups"]):
        options = ", ".join(f"{k}={v}" for k, v in group.items() if k != "params")
        say(f"parameter group {i}: {len(group['params'])} params, {options}")
    for key, value in checkpoint.state["stateful"].items():
        say(f"{key}: {value}")
    if checkpoint.extra is not None:
        say(f"extra: {checkpoint.extra}")
    rows = [("tensor", "shape", "dtype", "2-norm")]
    for key, entry in checkpoint.tensors.items():
        dtype = str(entry.dtype).removeprefix("torch.")
        norm = ""
        if entry.dtype.is_floating_point:
            norm = f"{torch.linalg.vector_norm(checkpoint.tensor(key).double()):.6g}"
        rows.append((key, "x".join(map(str, entry.shape)) or "scalar", dtype, norm))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    say("not checked: the checksums of the tensors' files (python -m dist_lamb verify)")


def verify(checkpoint: Checkpoint) -> None:
    """Compare all files with their checksums; raise ``CheckpointError`` naming one that differs."""
    checkpoint.verify()
    say(f"{checkpoint.path}: {len(checkpoint.files) + 1} files are as they were written")


def export(checkpoint: Checkpoint, out: Path, weights: bool, to: str) -> None:
    """Write whole tensors to one safetensors file, or a folder of torch.distributed.checkpoint.

    The names in the file are the checkpoint's, ``model.<name>`` and ``optimizer.<name>.<state>``.
    With ``weights`` only the model's tensors, without ``model.``, as ``load_state_dict()`` takes
    them. Raises ``CheckpointError`` if there is something at ``out``.
    """
    if os.path.lexists(out):
        raise CheckpointError(f"{out}: is there already; export to another path")
    checkpoint.verify()
    with os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if to == "dcp":
            count = dcp.write(checkpoint, out, weights)
        else:
            count = _export_safetensors(checkpoint, out, weights)
    say(f"{out}: {count} tensors of step {checkpoint.step}")


def _export_safetensors(checkpoint: Checkpoint, out: Path, weights: bool) -> int:
    try:
        from safetensors import SafetensorError
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
    except SafetensorError as error:
        raise CheckpointError(f"{out}: {error}") from None
    except KeyError as error:  # its own table of dtypes
        text = f"{out}: safetensors has no {error.args[0]}: export --format dcp"
        raise CheckpointError(text) from None
    finally:
        part.unlink(missing_ok=True)
    return len(tensors)


def import_dcp(source: Path, directory: Path, step: int | None) -> None:
    """Write ``directory/step-<step>`` from a folder of torch.distributed.checkpoint.

    ``step`` is by default the highest step count in the optimizer's state.
    """
    found = dcp.read(source)
    step = found.step if step is None else step
    check_step(step)
    state = {
        "about": {"engine": "torch.distributed.checkpoint, imported"},
        "groups": found.groups,
        "stateful": {},
        "extra": None,
    }
    text = json.dumps({key: encode(value, key) for key, value in state.items()})
    storage.write(found.tensors, create_temporary(directory, step), step, text, host_comm())
    say(f"{directory / f'step-{step}'}: {len(found.tensors)} tensors")
    for what in found.left_out:
        say(f"left out: {what}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-lamb", description="Inspect, verify, export and import checkpoints of dist_lamb."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, does in (
        ("inspect", "print step, options, and name, shape, dtype and norm of every tensor"),
        ("verify", "compare every file with its checksum"),
        ("export", "write whole tensors for programs without dist_lamb"),
        ("import", "make a checkpoint from one of torch.distributed.checkpoint"),
    ):
        command = commands.add_parser(name, help=does, description=does)
        if name == "import":
            command.add_argument("dir", type=Path, help="the folder with .metadata")
            command.add_argument("out", type=Path, help="the folder of checkpoints to write to")
            command.add_argument("--step", type=int, help="default: that of the optimizer's state")
            continue
        command.add_argument("dir", type=Path, help="a checkpoint, or a folder for its latest")
        if name == "export":
            command.add_argument("out", type=Path, help="the file or, for dcp, the folder to write")
            command.add_argument(
                "--format",
                choices=("safetensors", "dcp"),
                default="safetensors",
                help="one safetensors file, or torch.distributed.checkpoint",
            )
            command.add_argument(
                "--weights", action="store_true", help="the model alone, by its own names"
            )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    try:
        status = _run(_parser().parse_args(argv))
        if sys.stdout is not None:  # it is where a shell has closed it
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough, as head has. Python's own flush as it ends would fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _run(arguments: argparse.Namespace) -> int:
    try:
        if arguments.command == "import":
            import_dcp(arguments.dir, arguments.out, arguments.step)
            return 0
        checkpoint = Checkpoint(resolve(arguments.dir))
        if arguments.command == "inspect":
            inspect(checkpoint)
        elif arguments.command == "verify":
            verify(checkpoint)
        else:
            export(checkpoint, arguments.out, arguments.weights, arguments.format)
    except BrokenPipeError:
        raise
    except (CheckpointError, OSError) as error:
        say(f"dist_lamb: error: {error}", sys.stderr)
        return 1
    return 0
