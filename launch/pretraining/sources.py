"""Where the text comes from: files, cut into documents, each hashed once.

The hash decides everything that must not depend on the machine: which documents are held out,
which train the tokenizer, which are duplicates, and the digest under which tokens are cached.
No text is kept in memory: a document is a byte range of a file.
"""

from __future__ import annotations

import glob
import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests, installed packages and the character tables of `encodings` are not prose or programs.
_STDLIB_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "idlelib", "encodings", "site-packages", "dist-packages"}
)


class CorpusError(ValueError):
    """Text that cannot be trained on; the message names the path and the remedy."""


@dataclass(frozen=True)
class Document:
    """Bytes ``[start, stop)`` of ``path``; ``position`` in [0, 1) is its hash as a number."""

    path: Path
    start: int
    stop: int
    position: float

    def text(self) -> str:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.stop - self.start).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class Corpus:
    """Every document of a source, in the order of their paths. ``nbytes`` without duplicates,
    ``sha256`` of all files read."""

    source: str
    documents: tuple[Document, ...]
    files: int
    nbytes: int
    sha256: str
    duplicates: int
    binary_files: int

    def split(self, held_out_fraction: float) -> tuple[list[Document], list[Document]]:
        """The training documents and the held-out ones.

        Raises:
            CorpusError: one of the two is empty.
        """
        held_out = [d for d in self.documents if d.position < held_out_fraction]
        train = [d for d in self.documents if d.position >= held_out_fraction]
        if not train or not held_out:
            raise CorpusError(
                f"{self.source}: too little text to hold some out: {len(self.documents)} "
                f"documents ({self.nbytes} bytes) fell into {len(train)} for training and "
                f"{len(held_out)} held out; use more text, raise data.held_out_fraction "
                f"(now {held_out_fraction:g}) or lower data.document_bytes"
            )
        return train, held_out


def read_corpus(path: str, document_bytes: int) -> Corpus:
    """Find, cut and hash the text at ``path``: ``"stdlib"``, a file, a folder or a glob.

    Files longer than ``document_bytes`` are cut at line ends. Files with a NUL byte near their
    start are binary and left out; documents with the same bytes count once.

    Raises:
        CorpusError: no such path, or no text in it.
    """
    source, files = _find_files(path)
    documents: list[Document] = []
    seen: set[bytes] = set()
    whole = hashlib.sha256()
    nbytes = duplicates = binary_files = 0
    for file in files:
        content = file.read_bytes()
        if b"\0" in content[:8192]:
            binary_files += 1
            continue
        # With the length, bytes that move from one file into the next change it too.
        whole.update(len(content).to_bytes(8, "big") + content)
        for start, stop in _cuts(content, document_bytes):
            digest = hashlib.sha256(content[start:stop]).digest()
            if digest in seen:
                duplicates += 1
                continue
            seen.add(digest)
            position = int.from_bytes(digest[:8], "big") / 2**64
            documents.append(Document(file, start, stop, position))
            nbytes += stop - start
    if not documents:
        nul = "; those with NUL bytes are left out: binary files, or UTF-16, to be made UTF-8"
        raise CorpusError(
            f"data.path = {path!r}: no text in its {len(files)} files{nul if binary_files else ''}"
        )
    return Corpus(
        source=source,
        documents=tuple(documents),
        files=len(files) - binary_files,
        nbytes=nbytes,
        sha256=whole.hexdigest(),
        duplicates=duplicates,
        binary_files=binary_files,
    )


def _find_files(path: str) -> tuple[str, list[Path]]:
    """A name for the log and the files, sorted so that every machine sees the same order."""
    if path == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in root.rglob("*.py") if _is_stdlib_source(file, root)]
        if not files:
            raise CorpusError(f"data.path = 'stdlib': no Python sources in {root}")
        return f"standard library of Python {platform.python_version()}, {root}", sorted(files)

    expanded = Path(path).expanduser()
    if expanded.is_dir():
        # Hidden files below the folder are version control and editors' own; the folder's own
        # path may well contain a dot-name.
        found = list(_below(expanded, set()))
    elif expanded.exists():
        found = [expanded]
    else:
        found = [Path(name) for name in glob.glob(str(expanded), recursive=True)]
    files = sorted(file for file in found if file.is_file())
    if not files:
        problem = "has no files" if expanded.is_dir() else "is no file, folder or glob of files"
        raise CorpusError(f"data.path = {path!r}: {problem} (looked from {Path.cwd()})")
    return str(expanded), files


def _below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """What is not hidden in a folder, also behind links to other folders, each folder once."""
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    try:
        # Links last, so that a folder has its own name where it has one.
        inside = sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), path))
    except PermissionError:
        return  # as globs do: lost+found, say
    for path in inside:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _below(path, seen)
        else:
            yield path


def _is_stdlib_source(file: Path, root: Path) -> bool:
    # `_sysconfigdata` holds the build paths of one machine.
    return (
        not _STDLIB_SKIPPED.intersection(file.relative_to(root).parts)
        and not file.name.startswith("_sysconfigdata")
        and file.stat().st_size > 0
    )


def _cuts(content: bytes, limit: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges that cover ``content``, each at most ``limit`` long, cut after a newline
    where there is one."""
    start = 0
    while start < len(content):
        stop = min(start + limit, len(content))
        if stop < len(content):
            stop = content.rfind(b"\n", start, stop) + 1 or stop
        yield start, stop
        start = stop
