"""DeepSpeed's operations in C++, compiled where a process that was killed cannot block others.

torch compiles an extension behind a file ``lock`` in its folder, which says that somebody is
compiling, but not who: a process that is killed there leaves it, and every later one waits for
ever. Here that happens below a lock of the operating system, which ends with the process that
holds it, and in a folder that no other program compiles in: a file ``lock`` found there is stale.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from pretraining.config import ConfigError

#: in an extension's folder: it was once compiled to the end
COMPLETE = "complete"


def extensions_dir() -> Path:
    """Our own folder of extensions; another one for every version of what they are compiled of."""
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    of = (sysconfig.get_config_var("SOABI"), torch.__version__, version("deepspeed"))
    return Path(root) / "dist_lamb" / "-".join(map(str, of))


def load_shared_memory_op() -> None:
    """Load DeepSpeed's collectives in shared memory, compiled if they are not yet, so that
    ``deepspeed.initialize`` finds them loaded. Nothing where it does without them: on GPUs, and
    without a compiler.

    Raises:
        ConfigError: the folder of extensions cannot be written to or locked.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    op = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if op is None or not deepspeed.ops.__compatible_ops__.get(op.NAME, False):
        return
    with exclusive(extensions_dir()) as folder:
        op.load()
        (folder / op.NAME / COMPLETE).touch()


@contextmanager
def exclusive(folder: Path) -> Iterator[Path]:
    """The only process that has ``folder``, which is torch's folder of extensions meanwhile."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The file stays: who waits for a file that is removed has a lock that nobody else sees.
        file = os.open(folder / "owner.lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            os.close(file)
            raise
    except OSError as error:
        raise ConfigError(
            f"DeepSpeed's extensions cannot be compiled in {folder}: {error.strerror}; set "
            "TORCH_EXTENSIONS_DIR to a folder of a local disk that you may write to"
        ) from None
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    try:
        _remove_stale(folder)
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        yield folder
    finally:
        os.environ.pop("TORCH_EXTENSIONS_DIR")
        if before is not None:
            os.environ["TORCH_EXTENSIONS_DIR"] = before
        os.close(file)


def _remove_stale(folder: Path) -> None:
    for baton in folder.glob("*/lock"):
        if (baton.parent / COMPLETE).exists():
            baton.unlink()
            continue
        # The compilers that the killed process started may be at work still. Without their folder
        # they fail, and do not write into what is compiled now.
        gone = folder / f".stale-{secrets.token_hex(8)}"
        baton.parent.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
