"""The reference trainer: a decoder-only transformer on text, as a plain loop inside a session.

`python -m mend_trainer.train` trains a tiny model on the sources of the standard library, on any laptop;
`--config FILE` and `--set field=value` make it anything from that to Clio.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import torch
import torch.nn.functional as F
import xxhash
from torch import nn

from mend.exitcodes import ExitCode
from mend_trainer.averages import Averages
from mend_trainer.blueprint import Blueprint, blueprint_of
from mend_trainer.bundle import Bundle
from mend_trainer.config import BadConfig, TrainConfig, read_config
from mend_trainer.data.loader import Batch, Loader
from mend_trainer.data.shards import PackedCorpus, pack
from mend_trainer.data.slices import pieces_of
from mend_trainer.data.vocabulary import tokenizer_files
from mend_trainer.optimization import make_optimizer, make_scaler, make_scheduler
from mend_trainer.parallel import Place, accumulating, computing, join_gang, spread_model, warm_model
from mend_trainer.rng import seed_generators
from mend_trainer.session import Session
from mend_trainer.terms import Terms

_VOCABULARY_MULTIPLE: Final = 64  # matrix units like even sizes

_log = logging.getLogger("mend.train")


def train(config: TrainConfig) -> None:
    """Train to the end of the run, wherever it was left."""
    with join_gang(deterministic=config.deterministic) as place:
        pieces = pieces_per_step(config, place.world_size)
        seed_generators(config.seed, place.rank)
        corpus = _pack(config)
        model = spread_model(
            config.model,
            config.parallel,
            place,
            vocabulary_size=_padded(corpus.vocabulary_size),
            seed=config.seed,
        )
        optimizer = make_optimizer(model, config.optimizer)
        scheduler = make_scheduler(optimizer, config)
        scaler = make_scaler(place.device, config.parallel, config.optimizer)
        averages = Averages(place.device)
        work = _Work(config, place, model, corpus, pieces, averages)
        _announce(config, place, model, corpus)
        with Session(
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            loader=work.loader(),
            others={
                "averages": averages,
                "terms": Terms(_terms(config, corpus), config.accept_changes),
                **({"scaler": scaler} if scaler.is_enabled() else {}),
            },
            rehearse=work.rehearse,
            checkpoint=config.checkpoint.plan() if config.checkpoint else None,
            config_digest=_digest(config),
            membership=place.membership,
            blueprint=_blueprint(config, model, corpus),
            # A loss scale that is too large makes the optimizer skip steps.
            weights_may_stand_still=scaler.is_enabled(),
        ) as session:
            progress = _Progress(config, place, averages)

            def train_step(step: int, batch: Batch) -> None:
                work.evaluate_if_due(session, step)
                optimizer.zero_grad(set_to_none=True)
                loss = work.forward_backward(batch, scaler)
                if config.optimizer.clip_norm:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
                rate = float(scheduler.get_last_lr()[0])
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                averages.add(loss)
                session.completed(loss, tokens=work.tokens_per_step)
                progress.show(session, rate)

            session.run(train_step, config.steps)
            work.evaluate_if_due(session, config.steps)


def mend_warm(arguments: Sequence[str]) -> None:
    """In a process that waits to become a rank: builds its model, and does once what is slow at the first time.

    The model's weights stay as they were made: it is the optimizer of a stand-in that steps.
    """
    options = _options(arguments)
    config = read_config(options.config, options.settings)
    model = warm_model(
        config.model, config.parallel, vocabulary_size=_padded(_pack(config).vocabulary_size), seed=config.seed
    )
    if model is None:
        return
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    logits = model(input_ids=tokens).logits
    F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    stand_in = nn.Linear(2, 2)
    optimizer = make_optimizer(stand_in, config.optimizer)
    stand_in(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    bundle = Bundle(rank=0, model=stand_in, optimizer=optimizer)
    bundle.put(bundle.take())


def pieces_per_step(config: TrainConfig, world_size: int) -> int:
    """Into how many micro-batches every rank cuts its slice; raises `BadConfig` if a rank would have nothing to do."""
    if config.global_batch < world_size:
        raise BadConfig(
            f"global_batch: {config.global_batch}, expected at least one sequence for each of the {world_size} ranks: "
            f"raise it in a new run, or give this one {config.global_batch} ranks at most"
        )
    return pieces_of(config.global_batch, world_size, config.micro_batch)


class _Work:
    """What one rank computes in a step and in an evaluation."""

    def __init__(
        self,
        config: TrainConfig,
        place: Place,
        model: nn.Module,
        corpus: PackedCorpus,
        pieces: int,
        averages: Averages,
    ) -> None:
        self._averages = averages
        self._config = config
        self._place = place
        self._model = model
        self._corpus = corpus
        self._pieces = pieces
        self.tokens_per_step = config.global_batch * config.data.sequence_length

    def loader(self, *, held_out: bool = False) -> Loader:
        """This rank's batches, from the beginning."""
        return Loader(
            self._corpus.held_out if held_out else self._corpus.train,
            sequence_length=self._config.data.sequence_length,
            global_batch=self._config.global_batch,
            seed=self._config.seed,
            rank=self._place.rank,
            world_size=self._place.world_size,
            accept=self._config.accept_changes,
        )

    def rehearse(self) -> torch.Tensor:
        """A loss of nothing in particular, as cheap as can be: every start of a rank waits for it."""
        tokens = torch.zeros(1, 2, dtype=torch.int64)
        return self._loss_sum(tokens, tokens)

    def forward_backward(self, batch: Batch, scaler: torch.amp.GradScaler) -> torch.Tensor:
        """Gradients of the mean loss over the whole global batch; returns that mean.

        DDP and FSDP2 average over ranks, which is not the mean when ranks hold unequal slices: so each rank
        contributes its sum over the tokens of all, times the number of ranks.
        """
        scale = self._place.world_size / self.tokens_per_step
        total = torch.zeros((), device=self._place.device)
        parts = list(self._parts(batch))
        for number, (inputs, targets) in enumerate(parts, start=1):
            with accumulating(self._model, last=number == len(parts)):
                loss = self._loss_sum(inputs, targets)
                scaler.scale(loss * scale).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return self._place.sum(total) / self.tokens_per_step

    def evaluate_if_due(self, session: Session[Batch], step: int) -> None:
        """Evaluate the weights with which `step` begins; a resumed run does it again rather than never."""
        every = self._config.evaluation.every_steps
        if every and step and step % every == 0:
            with session.evaluating():
                loss = self._evaluate(session)
                session.measured("eval_loss", loss)
                is_best = self._averages.evaluated(loss, step)
            if self._place.rank == 0:
                _log.info("step %d  evaluation %.4f%s", step, loss, " (the best so far)" if is_best else "")

    @torch.no_grad()
    def _evaluate(self, session: Session[Batch]) -> float:
        self._model.eval()
        try:
            return self._evaluated(session)
        finally:
            self._model.train()  # also if a peer is lost in the middle: this process may go on

    def _evaluated(self, session: Session[Batch]) -> float:
        total = torch.zeros((), device=self._place.device)
        loader = self.loader(held_out=True)
        for _ in range(self._config.evaluation.batches):
            for inputs, targets in self._parts(next(loader)):
                total += self._loss_sum(inputs, targets)
                session.alive()
        return float(self._place.sum(total)) / (self._config.evaluation.batches * self.tokens_per_step)

    def _parts(self, batch: Batch) -> zip[tuple[torch.Tensor, torch.Tensor]]:
        return zip(
            torch.tensor_split(batch.inputs, self._pieces),
            torch.tensor_split(batch.targets, self._pieces),
            strict=True,
        )

    def _loss_sum(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if not len(inputs):  # a piece that only other ranks have: take part in the collectives, and count for nothing
            return 0.0 * self.rehearse()
        device = self._place.device
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with computing(self._config.parallel, self._place):
            logits = self._model(input_ids=inputs).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


class _Progress:
    """A line in the log now and then, from rank 0; only then a number is asked for that the device may not know yet."""

    def __init__(self, config: TrainConfig, place: Place, averages: Averages) -> None:
        self._config = config
        self._averages = averages
        self._every = config.log_every_seconds if place.rank == 0 else float("inf")
        self._shown_at = time.monotonic()
        self._tokens: int | None = None

    def show(self, session: Session[Batch], rate: float) -> None:
        """Show the step just completed, if the last line is old enough or this is the last."""
        now = time.monotonic()
        seconds = now - self._shown_at
        tokens = session.tokens if self._tokens is None else self._tokens
        if self._tokens is None:
            self._tokens = session.tokens
        last = session.step + 1 == self._config.steps and self._every != float("inf")
        if seconds < self._every and not last:
            return
        speed = (session.tokens - tokens) / seconds if seconds else 0.0
        _log.info(
            "step %d  loss %.4f (%.4f smoothed)  %.0f tokens/s  lr %.2e",
            *(session.step, session.loss, self._averages.smoothed, speed, rate),
        )
        self._shown_at, self._tokens = now, session.tokens


def _pack(config: TrainConfig) -> PackedCorpus:
    data = config.data
    cache = Path(data.cache or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache if data.cache else cache / "mend"
    size = data.vocabulary_size if data.vocabulary == "bpe" else 0
    return pack(data.text, folder, vocabulary=data.vocabulary, vocabulary_size=size)


def _padded(vocabulary_size: int) -> int:
    return -(-vocabulary_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def _blueprint(config: TrainConfig, model: nn.Module, corpus: PackedCorpus) -> Blueprint:
    files, end = tokenizer_files(corpus.folder, config.model.context)
    drawn = blueprint_of(model, files)
    ends = {"eos_token_id": end}
    return Blueprint(config={**drawn.config, **ends}, generation={**drawn.generation, **ends}, tokenizer=files)


def _announce(config: TrainConfig, place: Place, model: nn.Module, corpus: PackedCorpus) -> None:
    if place.rank == 0:
        _log.info(
            "%d parameters, %d tokens of text, %d ranks on %s (%s), %d tokens a step, %d steps",
            sum(parameter.numel() for parameter in model.parameters()),
            corpus.train.tokens,
            place.world_size,
            place.device.type,
            config.parallel.strategy if place.world_size > 1 else "alone",
            config.global_batch * config.data.sequence_length,
            config.steps,
        )


def _terms(config: TrainConfig, corpus: PackedCorpus) -> dict[str, object]:
    """What a checkpoint would not show by its tensors, or would override in silence."""
    sections = {"model": config.model, "optimizer": config.optimizer}
    fields = {
        f"{name}.{field}": value
        for name, each in sections.items()
        for field, value in msgspec.to_builtins(each).items()
    }
    del fields["optimizer.clip_norm"]  # it is no part of any state, so a change takes effect as it was meant
    return {**fields, "data.vocabulary": config.data.vocabulary, "vocabulary_size": corpus.vocabulary_size}


def _digest(config: TrainConfig) -> str:
    """Digest of what decides the numbers, not of where they are kept or how often they are shown."""
    return xxhash.xxh3_64_hexdigest(
        msgspec.json.encode(
            (config.seed, config.global_batch, config.model, config.data, config.optimizer, config.schedule)
        )
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `mend-train`."""
    options = _options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells of every client where its keys came from
    try:
        train(read_config(options.config, options.settings))
    except BadConfig as error:
        print(f"mend-train: {error}", file=sys.stderr)
        sys.exit(ExitCode.BAD_CONFIG)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mend-train", description="Train a language model on text.")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML; without it a tiny model trains on Python's sources"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="settings", help="e.g. steps=100"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
