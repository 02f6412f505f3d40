"""Made-up text to train on."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = [a + b + c for a in "bdfgklmn" for b in "aeiou" for c in ("", "r", "st", "nd", "lé", "99")]
WEIGHTS = [1 / (1 + index) for index in range(len(WORDS))]


def write_texts(folder: Path, files: int, lines: int, seed: int = 0) -> Path:
    """A folder of made-up text, the same for the same arguments; some words are frequent, so
    there is something to learn."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        rows = [" ".join(rng.choices(WORDS, WEIGHTS, k=12)) + "." for _ in range(lines)]
        (folder / f"{index:03}.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
