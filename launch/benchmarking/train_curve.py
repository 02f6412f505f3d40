"""Loss curves side by side: ``bench.py train --curve``."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from pathlib import Path


def compare(
    curves: Mapping[str, list[float]],
    tolerance: float,
    path: Path | None,
    say: Callable[[str], None],
) -> int:
    """Print the largest difference of each curve from the first; 1 if one exceeds ``tolerance``.

    ``path`` gets a row a step with the losses of all.
    """
    if len(curves) < 2:
        say("--curve compares at least two contenders that run")
        return 1
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerow(["step", *curves])
            for step, losses in enumerate(zip(*curves.values()), start=1):
                writer.writerow([step, *(f"{loss:.8g}" for loss in losses)])
        say(f"losses of {len(curves)} contenders: {path}")
    (first, expected), *others = curves.items()
    say(f"{first}: loss {expected[0]:.4f} -> {expected[-1]:.4f} in {len(expected)} steps")
    far = False
    for name, losses in others:
        differences = [abs(a - b) for a, b in zip(losses, expected, strict=True)]
        # max() would ignore a NaN
        differences = [math.inf if math.isnan(d) else d for d in differences]
        worst = max(differences)
        say(
            f"{name}: loss {losses[-1]:.4f}; largest difference {worst:.2e} at step "
            f"{differences.index(worst) + 1}, "
            f"{'within' if worst <= tolerance else 'NOT WITHIN'} {tolerance:g}"
        )
        far |= worst > tolerance
    return 1 if far else 0
