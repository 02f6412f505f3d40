"""The data of launch/pretrain.py: sources, tokens, masks, batches and the position in them."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pretraining import tokens as tokens_module
from pretraining.batches import HeldOutBatches, PackedSequences, TrainBatches, shuffled
from pretraining.config import DataConfig
from pretraining.disk import locked
from pretraining.masking import MaskedSequences, Masking, random_bits, stream_key
from pretraining.sources import Corpus, CorpusError, read_corpus
from pretraining.tokens import (
    CLS_ID,
    MASK_ID,
    SEP_ID,
    SPECIAL_TOKENS,
    UNK_ID,
    TokenCache,
    prepare_tokens,
    train_tokenizer,
)
from texts import write_texts
from tokenizers import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "folder", files=40, lines=20)


def data(path: Path, cache: Path, **changes: object) -> DataConfig:
    settings = {"vocab_size": 400, "seq_len": 16, "held_out_fraction": 0.2, "document_bytes": 4096}
    return DataConfig(**{"path": str(path), "cache_dir": str(cache), **settings, **changes})


# --- sources -------------------------------------------------------------------------------------


def test_documents_cover_the_files_and_end_at_lines(folder: Path) -> None:
    corpus = read_corpus(str(folder), document_bytes=500)
    assert corpus.files == 40
    assert all(d.stop - d.start <= 500 for d in corpus.documents)
    for file in sorted(folder.iterdir()):
        parts = [d for d in corpus.documents if d.path == file]
        assert len(parts) > 1
        assert "".join(d.text() for d in parts) == file.read_text(encoding="utf-8")
        assert all(d.text().endswith("\n") for d in parts)


def test_a_line_longer_than_a_document_is_cut(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x" * 1000)
    (tmp_path / "two.txt").write_text("y")
    corpus = read_corpus(str(tmp_path), document_bytes=300)
    sizes = [d.stop - d.start for d in corpus.documents]
    assert (sizes, corpus.duplicates) == ([300, 100, 1], 2)


def test_digest_is_of_the_text_and_not_of_the_place(folder: Path, tmp_path: Path) -> None:
    here, there = read_corpus(str(folder), 500), tmp_path / "elsewhere"
    shutil.copytree(folder, there)
    assert read_corpus(str(there), 500).sha256 == here.sha256
    assert read_corpus(f"{there}/*.txt", 500).sha256 == here.sha256
    (there / "000.txt").write_text("another text\n")
    assert read_corpus(str(there), 500).sha256 != here.sha256


def test_duplicates_binaries_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", files=3, lines=5)
    shutil.copy(folder / "000.txt", folder / "copy.txt")
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden\n")
    corpus = read_corpus(str(folder), 4096)
    assert (corpus.files, corpus.duplicates, corpus.binary_files) == (4, 1, 1)
    assert {d.path.name for d in corpus.documents} == {"000.txt", "001.txt", "002.txt"}


def test_stdlib_has_no_tests_and_no_packages() -> None:
    corpus = read_corpus("stdlib", 65_536)
    parts = {part for d in corpus.documents for part in d.path.parts[-3:]}
    assert not parts & {"test", "tests", "site-packages", "dist-packages", "idlelib"}
    assert {"topics.py", "argparse.py"} <= parts
    assert corpus.nbytes > 4_000_000


def test_split_by_hash_is_stable_when_text_is_added(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", files=400, lines=2)
    _, before = read_corpus(str(folder), 4096).split(0.1)
    assert 20 <= len(before) <= 60
    write_texts(folder / "more", files=50, lines=2, seed=1)
    train, after = read_corpus(str(folder), 4096).split(0.1)
    kept = [d.path for d in after if d.path.parent == folder]
    assert kept == [d.path for d in before]
    assert not {d.path for d in train} & {d.path for d in after}


def test_missing_and_empty_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "void.txt").write_text("")
    cases = {
        f"{tmp_path}/absent": "is no file, folder or glob of files",
        f"{tmp_path}/absent/*.txt": "is no file, folder or glob of files",
        f"{tmp_path}/empty": "has no files",
        f"{tmp_path}/void.txt": "no text in its 1 files",
    }
    for path, message in cases.items():
        with pytest.raises(CorpusError, match=r"data\.path") as caught:
            read_corpus(path, 4096)
        assert path in str(caught.value)
        assert message in str(caught.value)


def test_too_little_text(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", files=1, lines=1)
    with pytest.raises(CorpusError, match=r"too little text to hold some out: 1 documents"):
        read_corpus(str(folder), 4096).split(0.2)
    with pytest.raises(CorpusError, match="the held-out text is too small: 9 tokens"):
        PackedSequences(np.zeros(9, dtype=np.uint16), 16, "held-out")


# --- tokens --------------------------------------------------------------------------------------


def corpus_of(folder: Path) -> Corpus:
    return read_corpus(str(folder), 4096)


def test_the_same_text_gives_the_same_tokenizer() -> None:
    # Real text, in which many merges tie: without a remedy the trainer breaks the ties in the
    # order of a hash map, another one every time.
    documents = read_corpus("stdlib", 65_536).documents[:60]
    first, *others = (train_tokenizer(documents, 2000).to_str() for _ in range(3))
    assert all(other == first for other in others)


def test_tokenizer_is_berts(folder: Path) -> None:
    tokenizer = train_tokenizer(corpus_of(folder).documents, 300)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert len(tokenizer.get_added_tokens_decoder()) == len(SPECIAL_TOKENS)
    assert tokenizer.get_vocab_size() <= 300
    ids = tokenizer.encode("balé gir99").ids
    assert (ids[0], ids[-1]) == (CLS_ID, SEP_ID)
    assert UNK_ID not in ids
    assert tokenizer.decode(ids) == "balé gir99"


def test_tokens_are_made_once_and_whole(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    settings = data(folder, tmp_path)
    cache = prepare_tokens(settings, said.append)
    assert said
    again = prepare_tokens(settings, lambda line: pytest.fail(f"made again: {line}"))
    assert (again.directory, again.digest) == (cache.directory, cache.digest)
    assert left_in(tmp_path) == [cache.directory.name]
    assert (
        prepare_tokens(data(folder, tmp_path, vocab_size=256), said.append).digest != cache.digest
    )
    # The log names the source, its size and its hash.
    assert all(part in cache.describe() for part in (str(folder), "40 files", "sha256"))

    train, held_out = corpus_of(folder).split(0.2)
    tokenizer = Tokenizer.from_file(str(cache.directory / "tokenizer.json"))
    for documents, tokens in ((train, cache.train), (held_out, cache.held_out)):
        expected = [
            token
            for document in documents
            for token in [*tokenizer.encode(document.text(), add_special_tokens=False).ids, SEP_ID]
        ]
        assert tokens.tolist() == expected


def left_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def test_a_kill_while_tokenizing_blocks_nobody(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next process has the same number, as in a container."""
    with monkeypatch.context() as patched:
        patched.setattr(tokens_module, "_encoded", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_tokens(data(folder, tmp_path), print)
        assert left_in(tmp_path) == []
        # A kill leaves what an error cleans up.
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(ZeroDivisionError):
            prepare_tokens(data(folder, tmp_path), print)
        assert len(left_in(tmp_path)) == 1
    cache = prepare_tokens(data(folder, tmp_path), print)
    assert left_in(tmp_path) == [cache.directory.name]


def test_two_processes_make_tokens_one_after_the_other(folder: Path, tmp_path: Path) -> None:
    settings = data(folder, tmp_path)
    key = tokens_module.cache_key(corpus_of(folder), settings)
    waiting, said = threading.Event(), []

    def say(line: str) -> None:
        said.append(line)
        waiting.set()

    (tmp_path / "made").mkdir()
    tokens_module._write_entry(tmp_path / "made", corpus_of(folder), settings, print)
    with ThreadPoolExecutor(1) as pool:
        with locked(tmp_path / f".{key}.lock", pytest.fail):
            other = pool.submit(prepare_tokens, settings, say)
            waiting.wait(60)
            (tmp_path / "made").rename(tmp_path / key)
        assert other.result(60).directory == tmp_path / key
    assert ["waiting for another process" in line for line in said] == [True, False]


@pytest.fixture
def cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenCache:
    """On a machine that has seen no cache yet."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return prepare_tokens(data(folder, tmp_path / "cache"), lambda _: None)


def altered(path: Path) -> None:
    """One bit, and the time of the last change as before."""
    times, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["train.bin", "held_out.bin", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("damage", [altered, halved, Path.unlink])
def test_a_damaged_cache_is_refused(
    cache: TokenCache, folder: Path, name: str, damage: Callable[[Path], None]
) -> None:
    settings = data(folder, cache.directory.parent)
    path = cache.directory / name
    damage(path)
    before = sorted(p.name for p in cache.directory.iterdir())
    with pytest.raises(CorpusError, match="remove the folder") as caught:
        prepare_tokens(settings, pytest.fail)
    assert str(caught.value).startswith(f"{path} ")
    assert sorted(p.name for p in cache.directory.iterdir()) == before
    # The way out is what the message says.
    shutil.rmtree(cache.directory)
    assert prepare_tokens(settings, lambda _: None).digest == cache.digest


def test_digests_are_compared_once_a_machine_and_version(
    cache: TokenCache, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, said = data(folder, cache.directory.parent), []
    prepare_tokens(settings, pytest.fail)  # this machine has made them
    for place in ("another machine", "one without a place for notes"):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / place))
        if place == "another machine":
            (tmp_path / place).mkdir()
        for _ in range(2):
            prepare_tokens(settings, said.append)
    # A file that was written again, with the same content, is another version.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (cache.directory / "train.bin").write_bytes((cache.directory / "train.bin").read_bytes())
    prepare_tokens(settings, said.append)
    assert len(said) == 1 + 2 + 1
    nbytes = sum((cache.directory / name).stat().st_size for name in tokens_module._FILES)
    assert all(f"compared {nbytes:,} bytes of tokens with their digests in 0." in s for s in said)


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match=r"file/?\S*: Not a directory|file: File exists"):
        prepare_tokens(data(folder, tmp_path / "file" / "cache"), print)


# --- masking -------------------------------------------------------------------------------------


def test_random_bits_are_splitmix64() -> None:
    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    bits = random_bits(7, np.array([0, 5]), 3)
    for i, row in enumerate((0, 5)):
        for column in range(3):
            row_key = mix((7 + (row + 1) * golden) % 2**64)
            assert int(bits[i, column]) == mix((row_key + (column + 1) * golden) % 2**64)
    # The published first output of splitmix64 seeded with 0.
    assert mix(golden) == 0xE220A8397B1DCDAF


def test_masking_statistics() -> None:
    vocabulary, seq_len, count = 1000, 130, 4000
    rng = np.random.default_rng(0)
    tokens = rng.integers(len(SPECIAL_TOKENS), vocabulary, (count, seq_len))
    tokens[:, 0], tokens[:, -1] = CLS_ID, SEP_ID
    tokens[:, 40], tokens[:, 41] = SEP_ID, UNK_ID
    masking = Masking(fraction=0.15, vocabulary=vocabulary)
    ids, positions, labels = masking.apply(tokens, np.arange(count), stream_key("test"))

    assert positions.shape == (count, round(0.15 * 128)) == (count, 19)
    assert (np.diff(positions, axis=1) > 0).all()
    assert (labels == np.take_along_axis(tokens, positions, axis=1)).all()
    assert (labels >= len(SPECIAL_TOKENS)).all()
    untouched = np.ones_like(tokens, dtype=bool)
    np.put_along_axis(untouched, positions, False, axis=1)
    assert (ids[untouched] == tokens[untouched]).all()

    shown = np.take_along_axis(ids, positions, axis=1)
    masked, kept = shown == MASK_ID, shown == labels
    changed = shown[~masked & ~kept]
    # 76,000 draws: a standard deviation is below 0.0015.
    assert masked.mean() == pytest.approx(0.8, abs=0.006)
    assert kept.mean() == pytest.approx(0.1 + 0.1 / 995, abs=0.006)
    assert changed.size / shown.size == pytest.approx(0.1 * 994 / 995, abs=0.006)
    assert changed.min() >= len(SPECIAL_TOKENS)
    assert changed.max() < vocabulary
    assert len(np.unique(changed)) > 950
    # Every ordinary position is chosen as often as any other.
    often = np.bincount(positions.ravel(), minlength=seq_len)
    assert often[[0, 40, 41, 129]].sum() == 0
    ordinary = np.delete(often, [0, 40, 41, 129]) / count
    assert ordinary == pytest.approx(19 / 126, abs=0.035)


def test_masks_depend_on_row_and_stream_alone() -> None:
    tokens = np.random.default_rng(0).integers(5, 300, (6, 32))
    masking = Masking(fraction=0.15, vocabulary=300)
    rows, key = np.array([3, 9, 4, 1, 7, 0]), stream_key("mask", 0, 0)
    whole = masking.apply(tokens, rows, key)
    for i in range(6):
        alone = masking.apply(tokens[i : i + 1], rows[i : i + 1], key)
        assert all((a[0] == w[i]).all() for a, w in zip(alone, whole, strict=True))
    other_epoch = masking.apply(tokens, rows, stream_key("mask", 0, 1))
    other_seed = masking.apply(tokens, rows, stream_key("mask", 1, 0))
    assert (other_epoch.positions != whole.positions).any(axis=1).all()
    assert (other_seed.positions != other_epoch.positions).any(axis=1).all()


# --- batches -------------------------------------------------------------------------------------


MASKING = Masking(fraction=0.15, vocabulary=300)
SEQUENCES = PackedSequences(
    np.random.default_rng(1).integers(5, 300, 50 * 14 + 9).astype(np.uint16), 16, "training"
)


def batches(world_size: int = 1, rank: int = 0, micro_batch: int = 3, **changes) -> TrainBatches:
    settings = {"seed": 0, "global_batch": 12, "micro_batch": micro_batch, **changes}
    return TrainBatches(SEQUENCES, MASKING, rank=rank, world_size=world_size, **settings)


def joined(parts: list[MaskedSequences]) -> np.ndarray:
    """All that a step sees, one row a sample."""
    return np.concatenate([np.concatenate(part, axis=1) for part in parts])


def steps(world_size: int, micro_batch: int, count: int, start: dict | None = None) -> np.ndarray:
    """``[count * 12, ...]``: the global batches that ``world_size`` ranks see together."""
    ranks = [batches(world_size, rank, micro_batch) for rank in range(world_size)]
    for rank in ranks:
        if start:
            rank.load_state_dict(start)
    return np.concatenate(
        [joined([m for rank in ranks for m in rank.next_batch()]) for _ in range(count)]
    )


def test_sequences_are_the_tokens_in_order() -> None:
    rows = SEQUENCES.take(np.arange(len(SEQUENCES)))
    assert len(SEQUENCES) == 50
    assert (rows[:, 0] == CLS_ID).all()
    assert (rows[:, -1] == SEP_ID).all()
    source = np.random.default_rng(1).integers(5, 300, 50 * 14 + 9)
    assert (rows[:, 1:-1].ravel() == source[: 50 * 14]).all()


@pytest.mark.parametrize(
    ("world_size", "micro_batch"),
    [(1, 1), (1, 4), (2, 2), (2, 100), (3, 4), (4, 1), (4, 3), (6, 2), (12, 1), (12, 100)],
)
def test_ranks_see_the_same_global_batches(world_size: int, micro_batch: int) -> None:
    # Ten batches of 12 reach into the third epoch of 50 sequences.
    assert (steps(world_size, micro_batch, 10) == steps(1, 12, 10)).all()


def test_an_epoch_has_every_sequence_once_in_a_new_order() -> None:
    one = TrainBatches(SEQUENCES, MASKING, seed=0, global_batch=50, micro_batch=50)
    epochs = []
    for _ in range(2):
        (batch,) = one.next_batch()
        whole = batch.input_ids.copy()
        np.put_along_axis(whole, batch.positions, batch.labels, axis=1)
        epochs.append(whole)
    everything = SEQUENCES.take(np.arange(50))
    for epoch in epochs:
        assert sorted(map(tuple, epoch)) == sorted(map(tuple, everything))
    assert (epochs[0] != epochs[1]).any(axis=1).sum() > 40
    assert (epochs[0] != everything).any(axis=1).sum() > 40


def test_order_is_a_permutation_of_its_key() -> None:
    assert sorted(shuffled(1000, 3)) == list(range(1000))
    assert (shuffled(1000, 3) == shuffled(1000, 3)).all()
    assert (shuffled(1000, 3) != shuffled(1000, 4)).any()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resume_at_any_number_of_ranks(world_size: int) -> None:
    first = batches(world_size=2, rank=1)
    for _ in range(5):
        list(first.next_batch())
    state = first.state_dict()
    assert (state["epoch"], state["index"]) == (1, 10)
    assert (steps(world_size, 3, 4, start=state) == steps(1, 12, 9)[5 * 12 :]).all()


def test_position_moves_on_even_if_nobody_looks() -> None:
    one = batches()
    one.next_batch()
    assert one.state_dict()["index"] == 12


def test_resuming_other_data_is_refused() -> None:
    state = batches().state_dict()
    with pytest.raises(ValueError, match="saved with seed = 0, this run has seed = 1"):
        batches(seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with sequences = 51, this run has sequences = 50"):
        batches().load_state_dict({**state, "sequences": 51})


def test_batches_that_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="global_batch = 12 cannot be split evenly over 5 ranks"):
        batches(world_size=5)
    with pytest.raises(ValueError, match="micro_batch = 4 does not divide the 6 sequences"):
        batches(world_size=2, micro_batch=4)


@pytest.mark.parametrize(("world_size", "count"), [(1, 20), (2, 21), (3, 20), (4, 5), (4, 999)])
def test_held_out_is_the_same_for_any_number_of_ranks(world_size: int, count: int) -> None:
    def seen(world_size: int) -> tuple[np.ndarray, set[tuple[int, ...]]]:
        rows, shapes = [], set()
        for rank in range(world_size):
            held_out = HeldOutBatches(
                sequences=SEQUENCES,
                masking=MASKING,
                count=count,
                batch=4,
                rank=rank,
                world_size=world_size,
            )
            mine = list(held_out)
            shapes.add(tuple(len(batch.weights) for batch in mine))
            rows += [joined([batch.sequences])[batch.weights > 0] for batch in mine]
        return np.concatenate(rows), shapes

    rows, shapes = seen(world_size)
    assert len(rows) == min(count, 50)
    assert (rows == seen(1)[0]).all()
    # Ranks that ran another number of forward passes would wait for each other for ever.
    assert len(shapes) == 1
