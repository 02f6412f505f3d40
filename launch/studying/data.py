"""Text of the machine to token ids in one small file, and back on the machine that trains.

The folder that is carried has two files::

    tokens.xz    uint16 token ids of the training documents, then of the held-out ones
    meta.json    sizes, sources and digests

Neither is committed: they hold other people's text.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import re
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pretraining.config import DataConfig
from pretraining.masking import stream_key
from pretraining.tokens import prepare_tokens
from torch import Tensor

TOKENS, META = "tokens.xz", "meta.json"
SUFFIXES = {".py", ".rst", ".txt", ".pod", ".md", ".yaml"}
_SKIPPED_PARTS = {"test", "tests", "idle_test", "encodings", "site-packages", "__pycache__"}
_BLOCK = re.compile(r"\n\s*\n")


class DataError(ValueError):
    """No text, or a folder that holds no tokens; the message says what to do."""


def make_data(
    sources: Sequence[str],
    out: Path,
    *,
    vocab_size: int,
    held_out_fraction: float,
    work: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Collect the text of ``sources``, tokenize it once and write the two files of ``out``.

    Args:
        sources: ``stdlib``, ``package:NAME`` (the ``.py`` files of an installed package) or a
            folder. Files of the kinds in ``SUFFIXES`` count, also with ``.gz``.
        work: where the text is collected, in a folder that is removed at the end, and the tokens
            are cached.
    """
    if (out / META).exists() and not (out / TOKENS).exists():
        # Ours never stands alone: tokens are written first.
        raise DataError(f"{out / META} was not made by study.py data; give another --out")
    work.mkdir(parents=True, exist_ok=True)
    # A folder that nobody else can have: it is removed afterwards.
    with tempfile.TemporaryDirectory(prefix="text-", dir=work) as texts:
        report = _collect(sources, Path(texts), say)
        config = DataConfig(
            path=texts,
            vocab_size=vocab_size,
            seq_len=128,
            held_out_fraction=held_out_fraction,
            # Merges settle long before; the rest of the text would only cost time.
            tokenizer_bytes=2**25,
            cache_dir=str(work / "cache"),
        )
        cache = prepare_tokens(config, say)
    train, held_out = (np.asarray(t, dtype="<u2") for t in (cache.train, cache.held_out))
    raw = np.concatenate([train, held_out]).tobytes()
    out.mkdir(parents=True, exist_ok=True)
    packed = lzma.compress(raw, preset=4)
    (out / TOKENS).write_bytes(packed)
    meta = {
        "sources": report,
        "vocabulary": cache.vocabulary,
        "train_tokens": len(train),
        "held_out_tokens": len(held_out),
        "train_documents": cache.meta["train_documents"],
        "held_out_documents": cache.meta["held_out_documents"],
        "text_bytes": cache.meta["nbytes"],
        "text_sha256": cache.meta["sha256"],
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    (out / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    say(
        f"{len(train):,} tokens to train on, {len(held_out):,} held out, vocabulary "
        f"{cache.vocabulary:,}; {len(packed):,} bytes in {out / TOKENS}\n"
        f"sha256 of the token ids {meta['sha256']}"
    )
    return meta


def _collect(
    sources: Sequence[str], texts: Path, say: Callable[[str], None]
) -> dict[str, dict[str, int]]:
    """Write the text of ``sources`` into ``texts``; files and bytes of each."""
    seen: set[bytes] = set()
    report = {}
    for index, source in enumerate(sources):
        files, kept = 0, 0
        for file in _files(source):
            text = _new_blocks(_read(file), seen)
            if len(text) < 200:
                continue
            target = texts / f"{index:02}" / f"{files:06}.txt"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
            files, kept = files + 1, kept + len(text.encode())
        if not files:
            raise DataError(f"{source}: no text that is not in an earlier source")
        # The folder it lay in says nothing to a reader elsewhere.
        report[Path(source).name] = {"files": files, "bytes": kept}
        say(f"{source}: {files:,} files, {kept:,} bytes after repeated paragraphs went")
    return report


def _files(source: str) -> Iterator[Path]:
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
    elif source.startswith("package:"):
        root = Path(sysconfig.get_paths()["purelib"]) / source.removeprefix("package:")
    else:
        root = Path(source).expanduser()
    if not root.is_dir():
        raise DataError(f"source {source!r}: {root} is not a folder")
    for file in sorted(root.rglob("*")):
        kind = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
        inside = file.relative_to(root).parts[:-1]
        if kind in SUFFIXES and not _SKIPPED_PARTS.intersection(inside) and file.is_file():
            yield file


def _read(file: Path) -> str:
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return content.decode("utf-8", errors="replace")


def _new_blocks(text: str, seen: set[bytes]) -> str:
    """``text`` without the paragraphs of 80 characters or more that came before: licence headers,
    and the many near copies of one file that no hash of a whole document finds."""
    kept = []
    for block in _BLOCK.split(text):
        if len(block) >= 80:
            digest = hashlib.blake2b(" ".join(block.split()).encode(), digest_size=12).digest()
            if digest in seen:
                continue
            seen.add(digest)
        kept.append(block)
    return "\n\n".join(kept)


@dataclass(frozen=True)
class Sequences:
    """The text cut into sequences of equal length, on the device that trains.

    ``train`` and ``held_out`` are [N, S] int16 whose bits are uint16 token ids: indexing of uint16
    is not available on every device, and the ids stay below 2^15.
    """

    train: Tensor
    held_out: Tensor
    vocabulary: int
    sha256: str

    def order(self, seed: int, samples: int) -> Tensor:
        """Rows of ``train`` in the order that ``seed`` gives, int64 [samples]: one permutation
        after the other. It knows no batch, rule or lr, so all runs of a seed see the same text."""
        rows, found = len(self.train), []
        for epoch in range(-(-samples // rows)):
            generator = torch.Generator().manual_seed(stream_key("study", seed, epoch))
            found.append(torch.randperm(rows, generator=generator))
        return torch.cat(found)[:samples].to(self.train.device)

    def unigram_loss(self) -> float:
        """Nats a token of a model that knows the frequencies of the training tokens alone."""
        counts = torch.bincount(self.train.flatten().long(), minlength=self.vocabulary).double() + 1
        logs = (counts / counts.sum()).log()
        return float(-logs[self.held_out.flatten().long()].mean())


def check_data(folder: Path) -> dict[str, Any]:
    """``meta.json`` of ``folder``.

    Raises:
        DataError: the folder lacks one of its files, or this one is damaged.
    """
    for name in (META, TOKENS):
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing; make it with: study.py data")
    try:
        found: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
        whole = {"sha256", "vocabulary", "train_tokens"} <= dict(found).keys()
    except (ValueError, TypeError):
        whole = False
    if not whole:
        raise DataError(f"{folder / META} is damaged; make both files anew")
    return found


def load_data(folder: Path, seq_len: int, held_out: int, device: torch.device) -> Sequences:
    """The tokens of ``folder``, checked against their digest; at most ``held_out`` held-out
    sequences, chosen evenly.

    Raises:
        DataError: no such data, other data than ``meta.json`` says, or too little.
    """
    meta = check_data(folder)
    try:
        raw = lzma.decompress((folder / TOKENS).read_bytes())
    except lzma.LZMAError:
        raw = b""
    if hashlib.sha256(raw).hexdigest() != meta["sha256"]:
        raise DataError(f"{folder / TOKENS} is not what {META} describes; make both anew")
    if meta["vocabulary"] > 2**15:
        raise DataError(f"{folder}: a vocabulary of {meta['vocabulary']} is over 32,768")
    tokens = np.frombuffer(raw, dtype="<u2")
    train = _cut(tokens[: meta["train_tokens"]], seq_len)
    others = _cut(tokens[meta["train_tokens"] :], seq_len)
    if not len(train) or not len(others):
        raise DataError(
            f"{folder}: {len(train)} training and {len(others)} held-out sequences of {seq_len}"
        )
    chosen = np.linspace(0, len(others) - 1, min(held_out, len(others))).astype(int)
    return Sequences(
        torch.from_numpy(train).to(device),
        torch.from_numpy(others[chosen]).to(device),
        meta["vocabulary"],
        meta["sha256"],
    )


def _cut(tokens: npt.NDArray[np.uint16], seq_len: int) -> npt.NDArray[np.int16]:
    rows = len(tokens) // seq_len
    return tokens[: rows * seq_len].reshape(rows, seq_len).astype(np.int16)
