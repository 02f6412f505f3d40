"""Several runs trained together on one device, each exactly as it would be alone.

Small models at small batches leave a GPU idle: a step is hundreds of launches of microseconds. Here
the weights of R runs are stacked and one ``torch.func.vmap`` of the model computes all of them, so
the launches serve R runs. Every run has its own data, optimizer, lr and clipping, and no number of
one enters another. The whole step (forward, backward, clipping, update, schedule) reads counters
and tables on the device, so it can be captured in a CUDA graph and replayed.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pretraining.masking import stream_key
from pretraining.tokens import MASK_ID, SPECIAL_TOKENS
from torch import Tensor

from studying import identity
from studying.config import StudyConfig
from studying.data import Sequences
from studying.grid import dtype_of, pack_key
from studying.optimizers import OPTIMIZERS, OptimizerOptions
from studying.results import Row, Run
from studying.stacked import build, stacked_loss

Mode = Literal["eager", "graph", "compile"]
_EVAL_SEQUENCES = 2048  # over all runs of a pack, in one forward pass


class Stopped(Exception):
    """The time was over before the pack's end."""


@dataclass(frozen=True)
class Job:
    """What a device needs to know to train a pack. Times are of ``time.time()``."""

    config: StudyConfig
    runs: tuple[Run, ...]
    mode: Mode
    checkpoint: Path | None
    stop_at: float = math.inf
    long: bool = True
    """Whether compiling for it pays."""


def inputs_of(
    architecture: str, sequences: Tensor, stream: str, config: StudyConfig, vocabulary: int
) -> tuple[Tensor, ...]:
    """What the model sees of ``sequences`` [N, S]: themselves, or for BERT what masking leaves of
    them, with the positions and labels to predict. Masks depend on ``stream`` and N alone."""
    if architecture == "decoder":
        return (sequences,)
    generator = torch.Generator(sequences.device).manual_seed(stream_key("study mask", stream))
    # As many in every sequence, so that the mean over a batch is the mean of its sequences.
    chosen = max(1, round(config.mask_fraction * (config.seq_len - 2)))
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for part in sequences.split(65_536):  # int64 and float copies of all would not fit
        tokens = part.long()
        random = torch.rand(tokens.shape, generator=generator, device=tokens.device)
        # [SEP] and [UNK] come last: they are chosen only where nothing else is left.
        random = random.masked_fill(tokens < len(SPECIAL_TOKENS), 2.0)
        positions = random.topk(chosen, largest=False).indices.sort(dim=1).values
        labels = tokens.gather(1, positions)
        action = torch.rand(labels.shape, generator=generator, device=tokens.device)
        other = torch.randint(
            len(SPECIAL_TOKENS),
            vocabulary,
            labels.shape,
            generator=generator,
            device=tokens.device,
        )
        shown = torch.where(action < 0.9, other, labels).masked_fill(action < 0.8, MASK_ID)
        masked = tokens.scatter(1, positions, shown)
        found.append((masked.short(), positions.short(), labels.short()))
    return tuple(torch.cat(parts) for parts in zip(*found))


def lr_table(steps: int, warmup: float, lr: float) -> Tensor:
    """Linear to ``lr`` over the warm-up, then linear to 0: as ``schedules.warmup_linear_decay``.
    [steps] float32."""
    warm = round(warmup * steps)
    done = torch.arange(steps, dtype=torch.float64)
    rising = (done + 1) / max(1, warm)
    falling = (steps - done) / max(1, steps - warm)
    return (lr * torch.where(done < warm, rising, falling)).float()


class Pack:
    """R runs of one architecture and batch, from their first step to their rows."""

    def __init__(
        self,
        config: StudyConfig,
        runs: Sequence[Run],
        data: Sequences,
        mode: Mode,
        say: Callable[[str], None] = print,
    ) -> None:
        architecture, batch = runs[0].architecture, runs[0].batch
        if len({pack_key(config, run) for run in runs}) > 1:
            raise ValueError("the runs of a pack share architecture, batch and dtype of weights")
        self.config, self.runs, self.batch = config, list(runs), batch
        self.architecture, self.vocabulary = architecture, data.vocabulary
        self.steps = config.steps(batch)
        self.device = device = data.train.device
        half = config.bfloat16 and device.type == "cuda"
        self._say, self.mode = say, mode
        self._identity = identity.of(config, data.sha256, sorted({run.rule for run in runs}))

        of = architecture, config.model, config.data(data.vocabulary)
        self._loss = stacked_loss(*of, device, torch.bfloat16 if half else torch.float32)
        cpu, stored = torch.device("cpu"), dtype_of(config, runs[0])
        named = [dict(build(*of, run.seed, cpu).named_parameters()) for run in runs]
        self.params = {
            name: torch.stack([each[name].detach() for each in named])
            .to(device, stored)
            .requires_grad_()
            for name in named[0]
        }
        self.parameters = sum(p[0].numel() for p in self.params.values())
        #: of each run, views of the stacked weights: what its optimizer steps. Of `data`: views
        #: that share a version would have each optimizer look for writes in every step.
        self.own = [
            {name: p.data[r].requires_grad_() for name, p in self.params.items()}
            for r in range(len(runs))
        ]

        tables = [lr_table(self.steps, run.warmup, run.lr) for run in runs]
        self._lrs = torch.stack(tables, dim=1).to(device)
        self._lr = self._lrs[0].clone()
        self._losses = torch.full((self.steps, len(runs)), torch.nan, device=device)
        self._done = torch.zeros(1, dtype=torch.int64, device=device)
        self._columns = torch.arange(batch, device=device)
        self.optimizers = [
            OPTIMIZERS[config.rules[run.rule].optimizer](
                list(own.items()),
                OptimizerOptions(
                    lr=self._lr[r],
                    betas=config.betas(run.rule, batch),
                    eps=config.rules[run.rule].eps,
                    weight_decay=config.weight_decay,
                    max_grad_norm=config.max_grad_norm,
                ),
            )
            for r, (run, own) in enumerate(zip(runs, self.own))
        ]

        seeds = sorted({run.seed for run in runs})
        streams = [
            inputs_of(
                architecture,
                data.train[data.order(seed, config.samples)],
                f"train {seed}",
                config,
                data.vocabulary,
            )
            for seed in seeds
        ]
        self._streams = tuple(torch.stack(parts) for parts in zip(*streams))
        self._stream_of = torch.tensor([seeds.index(run.seed) for run in runs], device=device)
        self.held_out = inputs_of(architecture, data.held_out, "held out", config, data.vocabulary)
        self._forward = self._loss.compiled if mode == "compile" else self._loss.apart
        self._graph: torch.cuda.CUDAGraph | None = None
        self._start()

    def batch_at(self, columns: Tensor) -> tuple[Tensor, ...]:
        """Samples ``columns`` [B] of each run's stream, as the model takes them: [R, B, ...]."""
        where = self._stream_of[:, None], columns[None, :]
        return tuple(part[where].long() for part in self._streams)

    def gradients(
        self, inputs: tuple[Tensor, ...], *, compiled: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss of each run [R], and the gradients of the stacked weights."""
        losses = (self._forward if compiled else self._loss.apart)(self.params, inputs)
        # A run's loss depends on its own weights alone, so the sum gives each its own gradient.
        grads = torch.autograd.grad(losses.sum(), list(self.params.values()))
        # Fused AdamW reads memory in order: of a gradient with other strides (vmap's embedding
        # gives one) it would take other runs' elements.
        return losses.detach(), [g.contiguous() for g in grads]

    def _step(self) -> None:
        self._lr.copy_(self._lrs.index_select(0, self._done)[0])
        inputs = self.batch_at(self._done * self.batch + self._columns)
        losses, grads = self.gradients(inputs, compiled=True)
        for r, (own, optimizer) in enumerate(zip(self.own, self.optimizers)):
            for p, g in zip(own.values(), grads):
                p.grad = g[r]
            optimizer.step()
        self._losses.index_copy_(0, self._done, losses[None].float())
        self._done += 1

    # --- the start: warm up, capture, and undo it ------------------------------------------------

    def _start(self) -> None:
        first = [p.detach().clone() for p in self.params.values()]
        if self.mode == "eager" or self.device.type != "cuda":
            # State is made by the first step, and a checkpoint needs some to load into.
            self._step()
        else:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._step()
        with torch.no_grad():
            for p, value in zip(self.params.values(), first):
                p.copy_(value)
            for _, state in self._states():
                state.zero_()
        self._done.zero_()
        self._losses.fill_(torch.nan)

    def _states(self) -> list[tuple[str, Tensor]]:
        return [
            (f"{r} {name} {key}", value)
            for r, (own, optimizer) in enumerate(zip(self.own, self.optimizers))
            for name, p in own.items()
            for key, value in optimizer.state[p].items()
            if isinstance(value, Tensor)
        ]

    # --- the run ---------------------------------------------------------------------------------

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            if self._graph is not None:
                self._graph.replay()
            else:
                self._step()

    @torch.no_grad()
    def evaluate(self) -> list[float]:
        """Held-out loss of each run."""
        total = torch.zeros(len(self.runs), dtype=torch.float64, device=self.device)
        chunk = max(1, _EVAL_SEQUENCES // len(self.runs))
        count = len(self.held_out[0])
        for start in range(0, count, chunk):
            inputs = tuple(part[start : start + chunk].long() for part in self.held_out)
            losses = self._loss.alike(self.params, inputs)
            total += losses.double() * len(inputs[0])
        return [float(x) for x in total / count]

    def train(
        self,
        checkpoint: Path | None = None,
        stop_at: float = math.inf,
        at_eval: Callable[[int], None] | None = None,
        save_every_s: float = 60.0,
    ) -> tuple[list[list[tuple[int, float]]], float]:
        """Train to the end, or on from ``checkpoint``, which is removed then.

        Returns:
            The (step, held-out loss) of each run, and the seconds that steps took.

        Raises:
            Stopped: it is ``stop_at``; the checkpoint has what was reached.
        """
        points = [round(self.steps * k / self.config.evals) for k in range(self.config.evals + 1)]
        curves: list[list[tuple[int, float]]] = [[] for _ in self.runs]
        done, seconds = 0, 0.0
        saved_before = self._read(checkpoint) if checkpoint and checkpoint.exists() else None
        if saved_before:
            done, seconds, curves = self._load(saved_before)
        saved = time.monotonic()
        for point in points:
            if curves[0] and point <= done:
                continue
            began = time.monotonic()
            self.advance(point - done)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds += time.monotonic() - began
            done = point
            losses = self.evaluate()
            for curve, loss in zip(curves, losses):
                curve.append((point, loss))
            if at_eval:
                at_eval(point)
            if point == self.steps or not any(map(math.isfinite, losses)):
                break
            late = time.time() >= stop_at
            if checkpoint and (late or time.monotonic() - saved > save_every_s):
                self._save(checkpoint, done, seconds, curves)
                saved = time.monotonic()
            if late:
                raise Stopped
        if checkpoint:
            checkpoint.unlink(missing_ok=True)
        return curves, seconds

    def _save(self, path: Path, done: int, seconds: float, curves: Any) -> None:
        tensors = {**self.params, **dict(self._states())}
        part = path.with_suffix(".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "identity": self._identity,
                "done": done,
                "seconds": seconds,
                "curves": curves,
                "losses": self._losses.cpu(),
                "tensors": {name: t.detach().cpu() for name, t in tensors.items()},
            },
            part,
        )
        part.replace(path)

    def _read(self, path: Path) -> dict[str, Any] | None:
        """What :meth:`_save` wrote; None, with a line that says why, where it is of no use."""
        try:
            saved: dict[str, Any] = torch.load(path, weights_only=True)
            alike = saved.get("identity") == self._identity
            if alike:
                # Compared before any is copied: half of a checkpoint would be trained on.
                own = {**self.params, **dict(self._states()), "losses": self._losses}
                found = {**saved["tensors"], "losses": saved["losses"]}
                if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in own.items()}:
                    raise ValueError("other tensors than this pack's")
                if not {"done", "seconds", "curves"} <= saved.keys():
                    raise KeyError("done, seconds or curves")
                return saved
            problem = "is of another study or version"
        except Exception as error:
            # Damaged files fail with errors of many types.
            problem = f"is damaged ({type(error).__name__})"
        self._say(f"{path} {problem}: its {len(self.runs)} runs are trained from the start")
        return None

    def _load(self, saved: dict[str, Any]) -> tuple[int, float, list[list[tuple[int, float]]]]:
        tensors = {**self.params, **dict(self._states())}
        with torch.no_grad():
            for name, t in tensors.items():
                t.copy_(saved["tensors"][name])
        self._losses.copy_(saved["losses"])
        self._done.fill_(saved["done"])
        curves = [[(int(s), float(v)) for s, v in curve] for curve in saved["curves"]]
        return saved["done"], saved["seconds"], curves

    def train_losses(self) -> Tensor:
        """Loss of every batch, [steps, R]; NaN for steps not made."""
        return self._losses.cpu()


#: (architecture, mode) that failed in this process: not tried again for every pack
_failed: set[tuple[str, Mode]] = set()


def make_pack(
    config: StudyConfig,
    runs: Sequence[Run],
    data: Sequences,
    mode: Mode,
    say: Callable[[str], None] = print,
) -> Pack:
    """A pack in ``mode``, or, with a line that says why, in the next plainer one that works."""
    order: list[Mode] = ["compile", "graph", "eager"]
    architecture = runs[0].architecture
    for attempt in order[order.index(mode) :]:
        if (architecture, attempt) in _failed:
            continue
        try:
            return Pack(config, runs, data, attempt, say)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Compilers and captures fail with errors of many types.
            if attempt == "eager":
                raise
            _failed.add((architecture, attempt))
            first = next(iter(str(error).splitlines()), "")
            say(
                f"warning: mode {attempt} failed for {architecture}, trying a plainer one: "
                f"{type(error).__name__}: {first}"
            )
            if data.train.is_cuda:
                with suppress(RuntimeError):
                    torch.cuda.synchronize()
    raise AssertionError("unreachable")


def checkpoint_name(runs: Sequence[Run]) -> str:
    return f"pack-{stream_key(*map(repr, runs)):016x}.pt"


def train_rows(job: Job, data: Sequences, say: Callable[[str], None] = print) -> list[Row]:
    """Train a pack and describe each run.

    Raises:
        Stopped: it is ``job.stop_at``.
    """
    config = job.config
    pack = make_pack(config, job.runs, data, job.mode, say)
    curves, seconds = pack.train(job.checkpoint, job.stop_at)
    losses = pack.train_losses()
    tokens = config.samples * config.seq_len
    device, unigram_loss = pack.device, data.unigram_loss()
    rows = []
    for r, (run, curve) in enumerate(zip(job.runs, curves)):
        bad = (~losses[:, r].isfinite()).nonzero()
        rows.append(
            Row(
                run=run,
                steps=pack.steps,
                samples=config.samples,
                tokens=tokens,
                loss=curve[-1][1] if math.isfinite(curve[-1][1]) else math.nan,
                train_loss=float(losses[-max(1, pack.steps // 20) :, r].mean()),
                curve=tuple(curve),
                unigram_loss=unigram_loss,
                nonfinite_step=int(bad[0]) if len(bad) else -1,
                beta2=config.betas(run.rule, run.batch)[1],
                pack_runs=len(job.runs),
                seconds=seconds,
                tokens_per_s=len(job.runs) * curve[-1][0] * run.batch * config.seq_len / seconds,
                mode=pack.mode if device.type == "cuda" else f"{pack.mode} on CPU",
                parameters=pack.parameters,
                data_sha256=data.sha256[:16],
                hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
                torch=torch.__version__,
                date=datetime.date.today().isoformat(),
            )
        )
    return rows
