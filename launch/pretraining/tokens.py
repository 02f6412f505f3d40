"""Text to tokens: a WordPiece vocabulary trained on the corpus, and the tokens it gives, cached.

A cache entry is a folder named by a digest of all that decides its content. It is built under
another name and renamed, so an entry that exists is whole:

    tokenizer.json    the tokenizer, as ``tokenizers`` and ``transformers`` read it
    train.bin         token ids of the training documents, each followed by [SEP]
    held_out.bin      likewise
    meta.json         sizes, and where the text came from
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import string
import unicodedata
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

from pretraining.config import DataConfig
from pretraining.sources import Corpus, CorpusError, Document, read_corpus

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD_ID, UNK_ID, CLS_ID, SEP_ID, MASK_ID = range(len(SPECIAL_TOKENS))

# Part of every digest: raise it when the same text would give other tokens.
_FORMAT = 1
_DOCUMENTS_AT_A_TIME = 256


@dataclass(frozen=True)
class TokenCache:
    """One whole cache entry. ``train`` and ``held_out`` are 1-D arrays of token ids on disk."""

    directory: Path
    meta: dict[str, Any]

    @classmethod
    def open(cls, directory: Path) -> TokenCache:
        return cls(directory, json.loads((directory / "meta.json").read_text(encoding="utf-8")))

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
        # An empty file cannot be mapped into memory.
        if not self.meta[f"{part}_tokens"]:
            return np.empty(0, dtype=self.meta["dtype"])
        return np.memmap(self.directory / f"{part}.bin", dtype=self.meta["dtype"], mode="r")

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
        CorpusError: no text, or too little of it.
    """
    corpus = read_corpus(data.path, data.document_bytes)
    directory = Path(data.cache_dir) / cache_key(corpus, data)
    if not (directory / "meta.json").exists():
        _build(directory, corpus, data, say)
    return TokenCache.open(directory)


def _build(directory: Path, corpus: Corpus, data: DataConfig, say: Callable[[str], None]) -> None:
    train, held_out = corpus.split(data.held_out_fraction)
    building = directory.with_name(f".{directory.name}.{os.getpid()}")
    building.mkdir(parents=True)
    try:
        say(f"training a tokenizer of {data.vocab_size:,} tokens on {corpus.source}")
        tokenizer = train_tokenizer(_sample(train, data.tokenizer_bytes), data.vocab_size)
        if tokenizer.get_vocab_size() > data.vocab_size:
            raise CorpusError(
                f"data.vocab_size = {data.vocab_size} is less than the alphabet of "
                f"{corpus.source} needs ({tokenizer.get_vocab_size()})"
            )
        tokenizer.save(str(building / "tokenizer.json"))
        say(f"tokenizing {corpus.nbytes:,} bytes")
        dtype = "uint16" if data.vocab_size <= 2**16 else "uint32"
        digest = hashlib.sha256()
        train_tokens = _encode(tokenizer, train, building / "train.bin", dtype, digest)
        held_out_tokens = _encode(tokenizer, held_out, building / "held_out.bin", dtype, digest)
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
            "train_tokens": train_tokens,
            "held_out_documents": len(held_out),
            "held_out_tokens": held_out_tokens,
            "tokens_sha256": digest.hexdigest(),
        }
        (building / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        try:
            building.rename(directory)
        except OSError:
            # Another run made the same entry first; after a real failure there is none.
            if not (directory / "meta.json").exists():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


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


def _encode(
    tokenizer: Tokenizer, documents: Sequence[Document], path: Path, dtype: str, digest: Any
) -> int:
    """Write the documents' tokens to ``path``, add them to ``digest``, return their number."""
    count = 0
    with path.open("wb") as file:
        for group in _groups(documents, _DOCUMENTS_AT_A_TIME):
            texts = [document.text() for document in group]
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                tokens = np.asarray([*encoding.ids, SEP_ID], dtype=dtype).tobytes()
                file.write(tokens)
                digest.update(tokens)
                count += len(encoding.ids) + 1
    return count


def _groups(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while group := list(islice(iterator, size)):
        yield group
