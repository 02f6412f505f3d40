"""A module made of params, and files that were tampered with: shared by tests of checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_lamb.checkpoint import files


def module_of(params: dict[str, Tensor]) -> nn.Module:
    """A module with these params under these names, and a buffer."""
    root = nn.Module()
    for name, p in params.items():
        *path, last = name.split(".")
        home = root
        for part in path:
            if not hasattr(home, part):
                home.add_module(part, nn.Module())
            home = getattr(home, part)
        home.register_parameter(last, p)  # type: ignore[arg-type]
    root.register_buffer("seen", torch.tensor(7))
    return root


def rewrite(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file, and make the manifest agree: what an attacker would do."""
    path = folder / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    sign(folder)


def sign(folder: Path) -> None:
    """Make the manifest agree with the files that it names, and with itself."""
    manifest = json.loads((folder / files.MANIFEST).read_text())
    manifest.pop("sha256", None)
    for name in manifest["files"]:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            sums = {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            manifest["files"][name] = sums
    manifest["sha256"] = files.manifest_digest(manifest)
    (folder / files.MANIFEST).write_text(json.dumps(manifest))
