"""BERT masked-language-model pretraining with LAMB.

    torchrun --standalone --nproc-per-node 2 launch/pretrain.py configs/quickstart.toml
    python launch/pretrain.py configs/quickstart.toml --optim.lr 1e-2 --train.steps 100
    python launch/pretrain.py --help

The run directory receives ``run.json``, ``log.jsonl``, TensorBoard events, ``tokenizer.json``,
``checkpoints/step-<n>`` and ``curves.png``; with ``train.tensors_every`` also ``tensors.jsonl`` and
``trust_ratios.png``.

A run that is started again goes on from its latest checkpoint, with as many ranks as it now has::

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --standalone --nproc-per-node 8 --max-restarts 100 launch/pretrain.py CONFIG

Ctrl-C, SIGTERM, and SIGUSR1 to any rank, end it after the current step, with a checkpoint and
status 0; a second Ctrl-C ends it at once. (torchrun itself reports such a signal as an error of its
own, and kills ranks that take longer than its 30 seconds. ``launch/torchrun.py`` is torchrun
without that report.)
"""

from __future__ import annotations

import io
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any

if __name__ == "__main__":
    # Until there is something to save, Ctrl-C ends the program without a traceback, wherever it is.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        import pretraining  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(f"pretrain: error: {error}")

import torch
from pretraining import checkpoint, command_line, curves, telemetry
from pretraining.batches import HeldOutBatches, PackedSequences, TrainBatches, to_device
from pretraining.config import ConfigError, PretrainConfig, load_config
from pretraining.engine_base import Engine
from pretraining.engines import build_engine
from pretraining.jsonlines import LogError, Unwritten
from pretraining.masking import Masking, stream_key
from pretraining.model import build_model, compile_layers, train_flops
from pretraining.ranks import Ranks, StopRequest, check_restarts, started
from pretraining.report import (
    LOG_NAME,
    TENSORS_LOG_NAME,
    HeldOutRow,
    Report,
    TrainRow,
    open_report,
    read_log,
    read_tensors_log,
    summarize_trust,
)
from pretraining.schedule import scaled_lr, warmup_steps
from pretraining.skips import SkippedSteps
from pretraining.sources import CorpusError
from pretraining.summary import describe, summarize
from pretraining.tokens import TokenCache, prepare_tokens
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler, record

from dist_lamb import GradientNoiseScale, schedules
from dist_lamb.checkpoint import CheckpointError, wait


class Diverged(RuntimeError):
    """The loss is not finite, or the gradients of too many steps in a row are not."""


def train(config: PretrainConfig, ranks: Ranks) -> None:
    """The whole run, from the text to the chart. Every rank calls it."""
    began = time.monotonic()
    hint = check_restarts(config.train)
    tokens = _shared_tokens(config, ranks)
    masking = Masking(fraction=config.data.mask_fraction, vocabulary=tokens.vocabulary)
    batches, held_out = _batches(config, tokens, masking, ranks)

    saved = ranks.together(lambda: checkpoint.find(config))
    if not ranks.same(str(saved)):
        raise ConfigError(
            f"{config.run_dir / checkpoint.FOLDER} is not the same for all ranks; train.run_dir "
            "must be on a disk they share"
        )
    model = build_model(config.model, config.data, config.train.seed, ranks.device)
    if config.init_from is not None and not saved:
        checkpoint.load_weights(config.init_from, model)
    if config.train.compile:
        compile_layers(model)  # before an engine wraps the layers
    engine = build_engine(model, config, scaled_lr(config))
    scheduler = schedules.warmup_linear_decay(
        engine.optimizer, warmup_steps(config, len(batches.sequences)), config.train.steps
    )
    noise = telemetry.noise_scale_of(config, engine.model, batches.micro_batch)
    unwritten = Unwritten()
    parts: dict[str, Any] = {"schedule": scheduler, "batches": batches, "unwritten": unwritten}
    if noise:
        parts["noise"] = noise
    first_step, changes = 0, []
    if saved:
        first_step, changes = checkpoint.resume(saved, config, tokens.digest, engine, parts)

    with _report(config, tokens, ranks, first_step, unwritten) as report, StopRequest() as request:
        if not saved:
            # Only now: what was wrong until here has left the checkpoints of an earlier run alone.
            ranks.together(lambda: checkpoint.start_over(config), of=ranks.rank == 0)
        report.say(tokens.describe())
        report.say(describe(config, model, batches, ranks))
        if hint:
            report.say(hint)
        if first_step:
            report.say(f"resumed at step {first_step}, sample {batches.position}, from {saved}")
        for change in changes:
            report.say(f"changed since: {change}")
        stop, step = False, first_step
        loop = _Loop(config, ranks, engine, scheduler, batches, held_out, noise, report, request)
        if not first_step:
            loop.evaluate(0)
        elif first_step >= config.train.steps:
            report.say(f"nothing left to do: train.steps = {config.train.steps}")
        for step in range(first_step + 1, config.train.steps + 1):
            stop = loop.step(step)
            if _is_due(step, config.train.eval_every, config.train.steps):
                loop.evaluate(step)
            if stop or _is_due(step, config.train.save_every, config.train.steps):
                loop.flush()
                beside = config.train.save_async and not stop
                checkpoint.save(step, config, tokens.digest, engine, parts, beside)
                loop.restart_clock()
            if stop:
                break
        wait()
        if stop and step < config.train.steps:
            why = request.signal or (report.problem and "an error") or "a signal to another rank"
            report.say(f"stopped after step {step} by {why}; start again to go on from there")
        elif ranks.rank == 0 and not report.problem:
            with report.writing(str(config.run_dir)):
                report.say(summarize(config, first_step, time.monotonic() - began))
    ranks.together(report.check)


class _Loop:
    """Steps and evaluations. Losses and counts stay on the device until they are reported."""

    def __init__(
        self,
        config: PretrainConfig,
        ranks: Ranks,
        engine: Engine,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        batches: TrainBatches,
        held_out: HeldOutBatches,
        noise: GradientNoiseScale | None,
        report: Report,
        request: StopRequest,
    ) -> None:
        self._config = config
        self._request = request
        self._ranks = ranks
        self._engine = engine
        self._scheduler = scheduler
        self._batches = batches
        self._held_out = held_out
        self._report = report
        self._shapes = {name: p.shape for name, p in engine.model.named_parameters()}
        self._flops = train_flops(config.model, config.data)
        self._noise = noise
        self._pending: list[tuple[int, Tensor, Tensor | None, float, int]] = []
        self._skipped = SkippedSteps(config.train.max_skipped_in_a_row, engine.skipped_steps())
        self.restart_clock()

    def restart_clock(self) -> None:
        """Evaluations and checkpoints are no part of tokens/s."""
        self._clock = time.monotonic()

    def step(self, step: int) -> bool:
        """Make a step; whether any rank was asked to stop after it, the same on all."""
        config, engine, batches = self._config.train, self._engine, self._batches
        torch.manual_seed(stream_key("dropout", config.seed, step, self._ranks.rank))
        engine.model.train()
        total = torch.zeros((), device=self._ranks.device)
        noise = self._noise if _is_due(step, config.noise_every, 0) else None
        for index, micro_batch in enumerate(batches.next_batch(), start=1):
            watched = noise.watch(1 / batches.micro_batches) if noise and index == 1 else None
            with engine.micro_batch(last=index == batches.micro_batches), watched or nullcontext():
                with self._autocast():
                    losses, _ = engine.model(*to_device(micro_batch, self._ranks.device))
                loss = losses.mean() / batches.micro_batches
                engine.backward(loss)
            total += loss.detach()
        # Read before the schedule moves on: this is the lr the step is made with.
        lr = float(self._scheduler.get_last_lr()[0])
        # Its all-reduce runs while the optimizer works.
        asked = bool(self._request.signal or self._report.problem)
        flag, agreement = self._ranks.stopping(asked)
        engine.step()
        norm = engine.grad_norm()
        if noise:
            noise.update(norm)
        self._scheduler.step()
        self._pending.append((step, total, norm, lr, batches.position))
        self._skipped.add(step, engine.skipped_steps())
        if step % config.log_every == 0 or step == config.steps or self._skipped.too_many():
            self.flush()
        agreement.wait()
        return bool(flag)

    def flush(self) -> None:
        """Report the steps since the last time: one all-reduce and one wait for the device.

        Raises:
            Diverged: on every rank alike, since all of them see the same mean and counts.
        """
        if not self._pending:
            return
        losses = self._ranks.mean(torch.stack([loss for _, loss, *_ in self._pending]))
        nan = losses.new_full((), torch.nan)
        norms = torch.stack([nan if norm is None else norm for _, _, norm, *_ in self._pending])
        counted = self._skipped.take()
        seconds = time.monotonic() - self._clock
        tokens = len(self._pending) * self._config.train.global_batch * self._config.data.seq_len
        rows = [
            TrainRow(
                step,
                loss,
                lr,
                tokens / seconds,
                samples,
                skipped_steps=count.total,
                grad_norm=norm if math.isfinite(norm) else None,
                model_flops_per_s=tokens / seconds * self._flops,
            )
            for (step, _, _, lr, samples), loss, norm, count in zip(
                self._pending, losses.tolist(), norms.tolist(), counted, strict=True
            )
        ]
        trust = self._engine.trust_ratios()
        # A skipped step has no trust ratios.
        if self._ranks.rank == 0 and not counted[-1].skipped:
            rows[-1] = replace(rows[-1], trust=summarize_trust(trust, self._shapes))
            if self._noise:
                scale = float(self._noise.mean().scale)
                rows[-1] = replace(rows[-1], noise_scale=scale if math.isfinite(scale) else None)
            self._add_tensors(rows[-1].step)
        self._report.train(rows)
        self._pending = []
        self.restart_clock()
        self._check(rows, [count.skipped for count in counted])

    def _add_tensors(self, step: int) -> None:
        config = self._config.train
        every = config.log_every * config.tensors_every
        if not every or not _is_due(step, every, config.steps):
            return
        row = telemetry.read_tensors(step, self._engine.optimizer, self._shapes)
        if row is not None:
            self._report.tensors(row)

    def _check(self, rows: Sequence[TrainRow], skipped: Sequence[bool]) -> None:
        """Raise ``Diverged`` for a loss that is not finite or too many skipped steps in a row."""
        # The loss of a step that was skipped may be anything: the next one may be finite again.
        skips = self._config.optim.nonfinite == "skip"
        for row, was_skipped in zip(rows, skipped, strict=True):
            if not math.isfinite(row.loss) and not (skips and was_skipped):
                raise Diverged(
                    f"the loss is {row.loss} at step {row.step} (lr {row.lr:.2e}); "
                    "lower optim.lr or lengthen the warm-up"
                )
        if self._skipped.too_many():
            length, step = self._skipped.longest
            raise Diverged(
                f"{length} steps in a row up to step {step} were skipped, since their gradients "
                f"were not finite ({rows[-1].skipped_steps} skipped steps in all, lr "
                f"{rows[-1].lr:.2e}); lower optim.lr or lengthen the warm-up, or raise "
                f"train.max_skipped_in_a_row (now {self._config.train.max_skipped_in_a_row})"
            )

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        """Loss and accuracy on the held-out sequences, reported as of after ``step``.

        Raises:
            Diverged: on every rank alike.
        """
        self.flush()
        device = self._ranks.device
        self._engine.model.eval()
        # loss, hits, sequences; float64 so that the split over ranks does not matter
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for sequences, weights in self._held_out:
            input_ids, positions, labels = to_device(sequences, device)
            with self._autocast():
                losses, logits = self._engine.model(input_ids, positions, labels)
            hits = (logits.argmax(dim=-1) == labels).double().mean(dim=1)
            each = torch.stack([losses.double().mean(dim=1), hits, torch.ones_like(hits)])
            sums += each @ torch.from_numpy(weights).to(device)
        loss, hits, count = self._ranks.sum(sums).tolist()
        self._report.held_out(HeldOutRow(step, loss / count, hits / count))
        self.restart_clock()
        if not math.isfinite(loss):
            # Skipped steps would hide it until the end of a short run.
            raise Diverged(
                f"the held-out loss is {loss} after step {step}; "
                "lower optim.lr or lengthen the warm-up"
            )

    def _autocast(self) -> AbstractContextManager[object]:
        if self._config.train.autocast == "none":
            return nullcontext()
        return torch.autocast(self._ranks.device.type, dtype=torch.bfloat16)


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _shared_tokens(config: PretrainConfig, ranks: Ranks) -> TokenCache:
    """The token cache, made by rank 0 while the others wait, and once more on every machine that
    does not see rank 0's disk; checked on every machine.

    Raises:
        CorpusError: on every rank: no text, too little, a damaged cache, or another text on
            another machine.
    """

    def say(text: str) -> None:
        print(text, flush=True)

    def here() -> TokenCache:
        return first.checked(say) if first.exists() else prepare_tokens(config.data, say)

    first = ranks.from_first(
        ranks.together(lambda: prepare_tokens(config.data, say), of=ranks.rank == 0)
    )
    assert first is not None
    ranks.together(here, of=ranks.local_rank == 0 and ranks.rank > 0)
    if not ranks.same(TokenCache.open(first.directory).digest if first.exists() else ""):
        raise CorpusError(
            f"data.path = {config.data.path!r}: the machines of this job have different text"
        )
    return first


def _batches(
    config: PretrainConfig, tokens: TokenCache, masking: Masking, ranks: Ranks
) -> tuple[TrainBatches, HeldOutBatches]:
    seq_len, of = config.data.seq_len, config.train
    try:
        train = TrainBatches(
            PackedSequences(tokens.train, seq_len, "training"),
            masking,
            seed=of.seed,
            global_batch=of.global_batch,
            micro_batch=of.micro_batch,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
    except CorpusError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    held_out = HeldOutBatches(
        sequences=PackedSequences(tokens.held_out, seq_len, "held-out"),
        masking=masking,
        count=of.eval_sequences,
        batch=train.micro_batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    return train, held_out


def _report(
    config: PretrainConfig,
    tokens: TokenCache,
    ranks: Ranks,
    first_step: int,
    unwritten: Unwritten,
) -> Report:
    """The report of this rank: rank 0's writes into the run directory, others' do nothing.

    Raises:
        ConfigError: on every rank: the run directory cannot be written to.
        LogError: on every rank: the log that is there cannot be continued.
    """

    def opened() -> Report:
        run_dir = config.run_dir
        about = {
            "config": config.as_dict(),
            "corpus": tokens.meta,
            "ranks": ranks.world_size,
            "device": str(ranks.device.type),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            if first_step:
                # Refuses damaged ones before anything is changed.
                read_log(run_dir / LOG_NAME)
                read_tensors_log(run_dir / TENSORS_LOG_NAME)
            (run_dir / "run.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            shutil.copyfile(tokens.directory / "tokenizer.json", run_dir / "tokenizer.json")
            if not first_step:
                for name in (curves.FILE_NAME, telemetry.PICTURE_NAME, TENSORS_LOG_NAME):
                    (run_dir / name).unlink(missing_ok=True)
            tensors = bool(config.train.tensors_every)
            return open_report(run_dir, first_step, config.train.steps, unwritten, tensors)
        except OSError as error:
            name = error.filename2 or error.filename
            raise ConfigError(f"train.run_dir: {name}: {error.strerror}") from error

    return ranks.together(opened, of=ranks.rank == 0) or Report([])


@record
def main(argv: Sequence[str] | None = None) -> None:
    about = "BERT pretraining with LAMB, on as many ranks as torchrun starts."
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal does not have must not end one rank.
            stream.reconfigure(errors="backslashreplace")
    try:
        config = load_config(*command_line.parse(argv, about))
        with started(config.train) as ranks, checkpoint.claimed(config.run_dir, ranks):
            train(config, ranks)
    except (ConfigError, CorpusError, Diverged, CheckpointError, LogError) as error:
        # Errors that the user can correct: one line a machine is clearer than a traceback a rank.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"pretrain: error: {error}", file=sys.stderr, flush=True)
        # torchrun ends its own report with what is recorded: the message instead of "exitcode 2".
        error.__cause__ = error.__context__ = None
        get_error_handler().record_exception(error.with_traceback(None))
        raise SystemExit(2) from None


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if end.code != 2:
            raise
        with suppress(Exception):  # of ranks that are gone, too
            wait()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # it is where a shell has closed it
                stream.flush()
        # Python does not end here: the process group is still there, and a thread of gloo that lets
        # go of a tensor meanwhile would abort, with pages on the terminal.
        os._exit(2)
