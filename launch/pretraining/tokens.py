"""Text to tokens: a WordPiece vocabulary trained on the corpus, and the tokens it gives, cached.

A cache entry is a folder named by a digest of all that decides its content. It is built under
another name, synced to disk and renamed, so an entry that exists was whole:

    tokenizer.json    the tokenizer, as ``tokenizers`` and ``transformers`` read it
    train.bin         token ids of the training documents, each followed by [SEP]
    held_out.bin      likewise
    meta.json         sizes and digests of these, and where the text came from

Every start compares the sizes; the digests are compared once a machine and version of the files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import string
import time
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import WordPieceTrainer

from pretraining.config import DataConfig, expanded
from pretraining.disk import known_versions, locked, note_versions, sync_folder, write_synced
from pretraining.sources import Corpus, CorpusError, Document, read_corpus

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD_ID, UNK_ID, CLS_ID, SEP_ID, MASK_ID = range(len(SPECIAL_TOKENS))

# Part of every key: raise it when the same text would give other tokens, or an entry other files.
_FORMAT = 2
_FILES = ("tokenizer.json", "train.bin", "held_out.bin")
_DOCUMENTS_AT_A_TIME = 256


@dataclass(frozen=True)
class TokenCache:
    """One whole cache entry. ``train`` and ``held_out`` are 1-D arrays of token ids on disk."""

    directory: Path
    meta: dict[str, Any]

    @classmethod
    def open(cls, directory: Path) -> TokenCache:
        """
        Raises:
            CorpusError: ``meta.json`` is not as it was written.
        """
        path = directory / "meta.json"
        try:
            meta = json.loads(path.read_bytes())
            written = meta.pop("meta_sha256")
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise _damaged(path, "cannot be read") from None
        if written != _digest_of(meta):
            raise _damaged(path, "was changed")
        return cls(directory, meta)

    def checked(self, say: Callable[[str], None]) -> TokenCache:
        """Itself, after the files' sizes, and on this machine once their digests, were compared.

        Raises:
            CorpusError: a file is not as it was written.
        """
        for name, (size, _) in self.meta["written"].items():
            path = self.directory / name
            found = path.stat().st_size if path.is_file() else 0
            if found != size:
                raise _damaged(path, f"has {found:,} bytes, {size:,} were written")
        if known_versions(self.directory) != self.versions():
            began = time.monotonic()
            for name, (_, digest) in self.meta["written"].items():
                with (self.directory / name).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        raise _damaged(self.directory / name, "was changed")
            note_versions(self.directory, self.versions())
            nbytes = sum(size for size, _ in self.meta["written"].values())
            say(
                f"compared {nbytes:,} bytes of tokens with their digests in "
                f"{time.monotonic() - began:.1f} s, once on this machine"
            )
        return self

    def versions(self) -> dict[str, list[int]]:
        """What changes with every write to a file. ctime cannot be set back."""
        stats = {name: (self.directory / name).stat() for name in self.meta["written"]}
        return {n: [s.st_dev, s.st_ino, s.st_size, s.st_ctime_ns] for n, s in stats.items()}

    def exists(self) -> bool:
        """Whether the entry is on this machine's disk too."""
        return (self.directory / "meta.json").exists()

    @property
    def digest(self) -> str:
        """Of the token ids: ranks that differ here would train on different text."""
        return str(self.meta["tokens_sha256"])

    @property
    def vocabulary(self) -> int:
        """Tokens the tokenizer really has; at most ``data.vocab_size``."""
        return int(self.meta["vocabulary"])

    @property
    def train(self) -> npt.NDArray[np.integer]:
        return self._tokens("train")

    @property
    def held_out(self) -> npt.NDArray[np.integer]:
        return self._tokens("held_out")

    def _tokens(self, part: str) -> npt.NDArray[np.integer]:
        count, dtype = self.meta[f"{part}_tokens"], self.meta["dtype"]
        # An empty file cannot be mapped into memory.
        if not count:
            return np.empty(0, dtype=dtype)
        return np.memmap(self.directory / f"{part}.bin", dtype=dtype, mode="r", shape=(count,))

    def describe(self) -> str:
        meta = self.meta
        return (
            f"corpus: {meta['source']}: {meta['files']} files, {meta['nbytes']:,} bytes, "
            f"sha256 {meta['sha256'][:16]}; left out {meta['duplicates']} duplicate documents, "
            f"{meta['binary_files']} binary files\n"
            f"tokens: {meta['train_tokens']:,} to train on ({meta['train_documents']} documents), "
            f"{meta['held_out_tokens']:,} held out ({meta['held_out_documents']}), "
            f"vocabulary {meta['vocabulary']:,}, cached in {self.directory}"
        )


def cache_key(corpus: Corpus, data: DataConfig) -> str:
    """The name of the cache entry for this text and these settings."""
    decides = {
        "format": _FORMAT,
        "tokenizers": tokenizers.__version__,
        "corpus": corpus.sha256,
        "document_bytes": data.document_bytes,
        "vocab_size": data.vocab_size,
        "held_out_fraction": data.held_out_fraction,
        "tokenizer_bytes": data.tokenizer_bytes,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def prepare_tokens(data: DataConfig, say: Callable[[str], None]) -> TokenCache:
    """The tokens of ``data.path``: from the cache, or made now and cached.

    Args:
        say: takes a line for the user before each long piece of work.

    Raises:
        CorpusError: no text, or too little of it; a damaged cache.
    """
    try:
        corpus = read_corpus(data.path, data.document_bytes)
        directory = expanded(data.cache_dir) / cache_key(corpus, data)
        if not directory.exists():
            _build(directory, corpus, data, say)
        return TokenCache.open(directory).checked(say)
    except OSError as error:
        raise CorpusError(f"{error.filename or data.cache_dir}: {error.strerror}") from error


def _build(directory: Path, corpus: Corpus, data: DataConfig, say: Callable[[str], None]) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with locked(directory.with_name(f".{directory.name}.lock"), say) as alone:
        if directory.exists():
            return  # made by another process meanwhile
        for left in directory.parent.glob(f".{directory.name}.*.new") if alone else ():
            # Its process is gone, or it would hold the lock.
            shutil.rmtree(left, ignore_errors=True)
        building = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.new")
        building.mkdir()
        try:
            _write_entry(building, corpus, data, say)
            try:
                building.rename(directory)
            except OSError:
                # Without locks another process may have been faster.
                if not directory.exists():
                    raise
            sync_folder(directory.parent)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        # What was just written need not be compared with its digests.
        made = TokenCache.open(directory)
        note_versions(directory, made.versions())


def _write_entry(
    building: Path, corpus: Corpus, data: DataConfig, say: Callable[[str], None]
) -> None:
    train, held_out = corpus.split(data.held_out_fraction)
    say(f"training a tokenizer of {data.vocab_size:,} tokens on {corpus.source}")
    tokenizer = train_tokenizer(_sample(train, data.tokenizer_bytes), data.vocab_size)
    if tokenizer.get_vocab_size() > data.vocab_size:
        raise CorpusError(
            f"data.vocab_size = {data.vocab_size} is less than the alphabet of "
            f"{corpus.source} needs ({tokenizer.get_vocab_size()})"
        )
    written = [write_synced(building / "tokenizer.json", [tokenizer.to_str(pretty=True).encode()])]
    say(f"tokenizing {corpus.nbytes:,} bytes")
    dtype = "uint16" if data.vocab_size <= 2**16 else "uint32"
    digest = hashlib.sha256()
    for name, documents in (("train.bin", train), ("held_out.bin", held_out)):
        written.append(write_synced(building / name, _encoded(tokenizer, documents, dtype), digest))
    itemsize = np.dtype(dtype).itemsize
    meta = {
        "source": corpus.source,
        "files": corpus.files,
        "nbytes": corpus.nbytes,
        "sha256": corpus.sha256,
        "duplicates": corpus.duplicates,
        "binary_files": corpus.binary_files,
        "vocabulary": tokenizer.get_vocab_size(),
        "dtype": dtype,
        "train_documents": len(train),
        "train_tokens": written[1][0] // itemsize,
        "held_out_documents": len(held_out),
        "held_out_tokens": written[2][0] // itemsize,
        "tokens_sha256": digest.hexdigest(),
        "written": dict(zip(_FILES, written, strict=True)),
    }
    text = json.dumps({**meta, "meta_sha256": _digest_of(meta)}, indent=1) + "\n"
    write_synced(building / "meta.json", [text.encode()])
    sync_folder(building)


def _damaged(path: Path, problem: str) -> CorpusError:
    return CorpusError(
        f"{path} {problem}; to have these tokens made again remove the folder {path.parent}"
    )


def _digest_of(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _sample(documents: Sequence[Document], nbytes: int) -> list[Document]:
    """About ``nbytes`` of the documents, those with the greatest hash."""
    total = sum(d.stop - d.start for d in documents)
    if total <= nbytes:
        return list(documents)
    chosen: list[Document] = []
    for document in sorted(documents, key=lambda d: d.position, reverse=True):
        chosen.append(document)
        nbytes -= document.stop - document.start
        if nbytes <= 0:
            break
    return chosen


def train_tokenizer(documents: Sequence[Document], vocab_size: int) -> Tokenizer:
    """A cased BERT WordPiece tokenizer. The same documents give the same vocabulary."""
    alphabet = _alphabet(documents, limit=max(64, vocab_size // 32))
    # The trainer numbers the "##c" pieces in the order of a randomly seeded hash map and breaks
    # ties between merges by number: without numbers given here every run has other merges.
    pieces = [f"##{character}" for character in alphabet if not _is_punctuation(character)]
    tokenizer = _untrained()
    tokenizer.train_from_iterator(
        (document.text() for document in documents),
        WordPieceTrainer(
            vocab_size=vocab_size,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            special_tokens=[*SPECIAL_TOKENS, *pieces],
            show_progress=False,
        ),
    )
    # Built anew so that only the real special tokens are special.
    trained = _untrained(tokenizer.get_vocab(with_added_tokens=False))
    trained.add_special_tokens(list(SPECIAL_TOKENS))
    trained.decoder = decoders.WordPiece()
    trained.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS_ID), ("[SEP]", SEP_ID)],
    )
    return trained


def _untrained(vocabulary: dict[str, int] | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _alphabet(documents: Sequence[Document], limit: int) -> list[str]:
    """The ``limit`` most frequent characters, in the order of their code points."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(document.text())
    visible = [character for character in counts if character.isprintable() and character != " "]
    return sorted(sorted(visible, key=lambda c: (-counts[c], c))[:limit])


def _is_punctuation(character: str) -> bool:
    """What BertPreTokenizer splits off as a word, so that no piece continues with it."""
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _encoded(tokenizer: Tokenizer, documents: Sequence[Document], dtype: str) -> Iterator[bytes]:
    """The tokens of each document."""
    for group in _groups(documents, _DOCUMENTS_AT_A_TIME):
        texts = [document.text() for document in group]
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield np.asarray([*encoding.ids, SEP_ID], dtype=dtype).tobytes()


def _groups(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while group := list(islice(iterator, size)):
        yield group
