"""Trains configs/quickstart.toml for 50 steps on two CPU ranks; prints a digest of the result.

    python tests/manual/quickstart_digest.py [ROOT] [--steps 50] [--set optim.stage=1 ...]

ROOT is the repository to run, by default this one; two of them that print the same digest have the
same bits in every parameter and every state of the optimizer. The checkpoint is read without the
package. Runs lie in a temporary folder; the tokens are kept in --cache between calls.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    own = Path(__file__).resolve().parents[2]
    parser.add_argument("root", nargs="?", type=Path, default=own)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--cache", default=str(Path(tempfile.gettempdir(), "quickstart_tokens")))
    args = parser.parse_args()
    root = args.root.resolve()
    env = {
        **os.environ,
        "PYTHONPATH": str(root),  # before the tree that is installed
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    ask = [sys.executable, "-c", "import dist_lamb; print(dist_lamb.__file__)"]
    found = subprocess.check_output(ask, env=env, cwd="/", text=True).strip()
    assert Path(found).is_relative_to(root), f"{found} is not in {root}"

    with tempfile.TemporaryDirectory(prefix="quickstart-") as run_dir:
        sets = [
            *(f"train.steps={args.steps}", f"train.run_dir={run_dir}"),
            *("train.eval_every=0", "train.save_every=0", f"data.cache_dir={args.cache}"),
        ]
        ranks = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        program = [str(root / "launch/pretrain.py"), str(root / "configs/quickstart.toml")]
        command = [sys.executable, "-m", *ranks, *program, "--set", *sets, *args.set]
        begin = time.monotonic()
        subprocess.run(command, env=env, cwd=run_dir, check=True, stdout=sys.stderr)
        seconds = time.monotonic() - begin
        tensors = read(Path(run_dir, "checkpoints", f"step-{args.steps}"))
    digest = hashlib.sha256()
    for name, data in sorted(tensors.items()):
        digest.update(name.encode() + data)
    nbytes = sum(map(len, tensors.values()))
    print(f"{digest.hexdigest()}  {len(tensors)} tensors, {nbytes:,} bytes, {seconds:.0f} s")


def read(folder: Path) -> dict[str, bytes]:
    """{name: dtype, shape and the bytes of all chunks, in order} of params and optimizer state."""
    tensors = {}
    for name, entry in json.loads((folder / "tensors.json").read_text()).items():
        if name.startswith(("model.", "optimizer.")):
            data = f" {entry['dtype']} {entry['shape']} ".encode()
            for chunk in sorted(entry["chunks"], key=lambda chunk: chunk["offsets"]):
                with (folder / chunk["file"]).open("rb") as file:
                    file.seek(chunk["at"])
                    size = {"float64": 8, "float32": 4, "int64": 8}.get(entry["dtype"], 2)
                    for n in chunk["sizes"]:
                        size *= n
                    data += file.read(size)
            tensors[name] = data
    return tensors


if __name__ == "__main__":
    main()
