"""The session: three lines that make any torch training loop a mend run, watched, saved and resumed exactly.

    with Session(model=model, optimizer=optimizer, scheduler=scheduler, loader=loader) as session:
        for step, batch in session.batches(total_steps):
            ...
            session.completed(loss, tokens=batch.numel())

The first restores the newest checkpoint, the second resumes at the right step and batch and says what the rank is
doing, the third tells of progress and saves when due. Without an agent around, the same loop runs as it always did.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Final, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mend.environment import ENV_LAUNCH, ENV_PAGE
from mend.exitcodes import ExitCode
from mend.heartbeats import Phase
from mend.orders import CheckpointPlan, Launch, Rejoin, decode_launch
from mend.reports import Raised, Rejoined, Report, Restored
from mend.states import CheckpointRef
from mend.store import StoreError
from mend_trainer.agreement import SaveAgreement
from mend_trainer.alone import launch_alone
from mend_trainer.blueprint import BLUEPRINT, Blueprint
from mend_trainer.bundle import Bundle, BundleState, Stateful
from mend_trainer.checkpoint import Checkpointer, CheckpointsUnreadable, RestoredState
from mend_trainer.copies.source import connect
from mend_trainer.curve import Curve
from mend_trainer.membership import Membership, outlive
from mend_trainer.need import check, needed_bytes
from mend_trainer.podmemory import pod_memory
from mend_trainer.progress import ProgressPage
from mend_trainer.rejoining import Rejoining
from mend_trainer.reporting import Reporter, describe
from mend_trainer.rng import rng_state, set_rng_state
from mend_trainer.waiting import watch_waiting

_RESERVED_NAMES: Final = ("model", "optimizer", "ranks", "scheduler", "loader", BLUEPRINT)
_COMMIT_SECONDS: Final = 900.0
_LONGEST_PAUSE_SECONDS: Final = 60.0
_SIGN_SECONDS: Final = 0.2
_REHEARSALS: Final = 2
_TRIES_IN_MEMORY: Final = 8  # within an interval, of a snapshot that had to wait

_log = logging.getLogger(__name__)
B = TypeVar("B", covariant=True)


class Loader(Stateful, Protocol[B]):
    """An iterable of batches whose state is its position after the last batch taken, the same on every rank."""

    def __iter__(self) -> Iterator[B]: ...


class FinalSaveFailed(SystemExit):
    """The last step was trained but its state could not be committed: the exit code says that the store is to blame."""

    def __init__(self, step: int) -> None:
        super().__init__(int(ExitCode.UNSAVED))
        self.step = step

    def __str__(self) -> str:
        return f"step {self.step}, the last, could not be saved; see the failed saves reported before"


class Session(Generic[B]):
    """One attempt at a run, seen from one rank. Make it after the process group, use it as a context manager."""

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        scheduler: Stateful | None = None,
        loader: Loader[B] | None = None,
        others: Mapping[str, Stateful] | None = None,
        rehearse: Callable[[], torch.Tensor] | None = None,
        checkpoint: CheckpointPlan | None = None,
        config_digest: str = "",
        membership: Membership | None = None,
        blueprint: Blueprint | None = None,
        final_save_seconds: float = 900.0,
        weights_may_stand_still: bool = False,
    ) -> None:
        """`others` are further things with state: gradient scalers, averaged weights.

        `rehearse` runs the model forward on any batch and returns a loss. A DDP model needs it to resume exactly: DDP
        orders its buckets anew after its first backward pass, which changes the rounding of sums; so two passes
        are rehearsed before the state is put in place, in every attempt alike.
        `checkpoint` says where to save when no agent started this process; with one, the TrainingRun says it.
        `final_save_seconds`: for about how long the last save is tried again while the store takes nothing.
        `weights_may_stand_still`: some saves may find all weights as in the save before (a learning rate of 0 for a
        while). Otherwise such a save is refused: most likely what is saved does not follow what is trained.
        `membership` is what joined the process group (`mend_trainer.parallel.join_gang`). With it, and with the loop
        given to `run`, a rank whose peer is lost keeps its process and its model, and rejoins the gang.
        `blueprint` (`mend_trainer.blueprint.blueprint_of(model, tokenizer)`) goes into every checkpoint, so that
        `mend checkpoint export` needs nothing else.
        """
        self._distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self._distributed else 0
        self.world_size = dist.get_world_size() if self._distributed else 1
        self._model = model
        self._optimizer = optimizer
        self._loader = loader
        self._rehearse = rehearse
        self._plan = checkpoint
        self._config_digest = config_digest
        self._blueprint = blueprint
        self._constant = {BLUEPRINT: blueprint.value()} if blueprint is not None else {}
        self._final_save_seconds = final_save_seconds
        self._weights_may_stand_still = weights_may_stand_still
        if not self._distributed and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RuntimeError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed is not initialized: call "
                "init_process_group before Session(...), or each rank would save as if it were alone"
            )
        for name in others or {}:
            if name in _RESERVED_NAMES or "." in name:
                raise ValueError(
                    f"others[{name!r}]: expected a name without dots other than {', '.join(_RESERVED_NAMES)}, "
                    "under which the session keeps its own"
                )
        parts = {"scheduler": scheduler, "loader": loader, **(others or {})}
        for name, part in parts.items():
            if part is not None and not isinstance(part, Stateful):
                raise TypeError(
                    f"{name}: {type(part).__name__} has no state_dict() and load_state_dict(), so a resumed run could "
                    "not go on where it was: use mend_trainer.data.loader, torchdata's StatefulDataLoader or your own"
                )
        self._bundle = Bundle(
            rank=self.rank,
            model=model,
            optimizer=optimizer,
            parts={name: part for name, part in parts.items() if part is not None},
        )
        self._page = ProgressPage.open(os.environ[ENV_PAGE]) if ENV_PAGE in os.environ else ProgressPage.detached()
        self._reporter = Reporter.from_environment()
        self._curve = Curve(self._page, self._report, drawn=self.rank == 0)
        self._checkpointer: Checkpointer | None = None
        self._agreement = SaveAgreement(None, rank=self.rank)
        self._memory_interval_steps: int | None = None
        self._memory_is_due = False  # a snapshot for memory alone had to wait for the copy of the one before
        self._wishes_seen = 0
        self._step = self._saved_step = -1
        self._tokens = 0
        self._step_began = time.monotonic()
        self._rejoining = Rejoining(self._bundle, membership) if membership is not None else None

    @property
    def step(self) -> int:
        """The last completed step; -1 before the first."""
        return self._step

    @property
    def tokens(self) -> int:
        """Tokens that the whole run has consumed up to `step`."""
        return self._tokens

    @property
    def loss(self) -> float:
        """Loss of the last step that is known to be done; NaN before."""
        return self._curve.loss

    def __enter__(self) -> Session[B]:
        self._wishes_seen = self._page.save_requested
        self._enter_attempt()
        if self._distributed:
            watch_waiting(self._model, self._optimizer, self._page.waited)
        return self

    def _enter_attempt(self) -> None:
        """Meet the other ranks over the model and the store, and take up a state with them."""
        self._page.enter(Phase.LOADING)
        if isinstance(self._model, DistributedDataParallel):
            outlive(self._model.process_group)
            self._rehearse_buckets()
        # torch keeps the rendezvous store to itself; one more connection to it would need what only torchrun knows.
        counters = dist.distributed_c10d._get_default_store() if self._distributed else None
        order = os.environ.get(ENV_LAUNCH)
        launch = decode_launch(order) if order else launch_alone(self._plan, counters)
        if launch.checkpoint is not None:
            self._checkpointer = self._make_checkpointer(launch, launch.checkpoint)
            if self._blueprint is not None and self.rank == 0:
                self._blueprint.keep_soon(self._checkpointer.store)
            self._memory_interval_steps = launch.checkpoint.memory_interval_steps
            self._agreement = SaveAgreement(
                counters,
                rank=self.rank,
                interval_steps=launch.checkpoint.interval_steps,
                interval_seconds=launch.checkpoint.interval_seconds,
            )
        if not self._take_up(launch):
            self._restore(launch)
        if self._checkpointer is not None:
            self._check_memory(self._checkpointer, copies=bool(launch.buddy))
        self._step_began = time.monotonic()

    def _check_memory(self, checkpointer: Checkpointer, *, copies: bool) -> None:
        """Better told now than by the kernel at the first save."""
        optimizers = self._optimizer if isinstance(self._optimizer, Sequence) else [self._optimizer]
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        needed = needed_bytes(self._model, optimizers, world=self.world_size, ranks_here=ranks_here, copies=copies)
        checkpointer.arena.words.needed_bytes = needed
        check(needed, checkpointer.bytes_in_memory, pod_memory())

    def _make_checkpointer(self, launch: Launch, plan: CheckpointPlan) -> Checkpointer:
        before = self._checkpointer
        with self._rejoining.extended() if self._rejoining is not None else nullcontext():
            return Checkpointer(
                plan,
                run=launch.run,
                run_uid=launch.run_uid,
                attempt=launch.attempt,
                report=self._report,
                mark=self._page.mark,
                config_digest=self._config_digest,
                store=before.store if before is not None else None,
                arena=before.agents_arena if before is not None else None,
                connect=connect,
                has_buddy=bool(launch.buddy),
                may_repeat=self._weights_may_stand_still,
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Commit the last step's state before leaving. After an exception nothing is saved: the state is not sound.

        `sys.exit()` is no such exception: a loop that stops early by it has succeeded.
        """
        try:
            if error is None or (isinstance(error, SystemExit) and not error.code):
                self._curve.settle()
                self._save_finally()
        finally:
            self._page.enter(Phase.EXITING)
            if self._checkpointer is not None:
                self._checkpointer.close()

    def run(self, step: Callable[[int, B], object], total: int) -> None:
        """The whole loop as one call: `step(number, batch)` is its body, which ends with `session.completed(...)`.

        As `batches`, but when a peer is lost the ranks that are left break the step off, rejoin with the process that
        takes its place, and go on in here with their model, their compiled code and, if it can be, their state.
        """
        while True:
            if self._rejoining is not None and self._rejoining.offer():
                self._page.offer_to_rejoin()
            try:
                for number, batch in self.batches(total):
                    step(number, batch)
                self._page.offer_to_rejoin(False)
                return
            except Exception as error:
                if (order := self._order_after(error)) is None:
                    raise
            self._rejoin(order)

    def steps(self, total: int) -> Iterator[int]:
        """The numbers of the steps that are still to do, out of range(total), for a loop that draws its own data."""
        while self._step + 1 < total:
            step = self._step + 1
            self._page.enter(Phase.STEP)
            yield step
            if self._step != step:
                raise RuntimeError(
                    f"step {step}: the loop went on without session.completed(...); call it once per step"
                )

    def batches(self, total: int) -> Iterator[tuple[int, B]]:
        """As `steps`, each with the loader's next batch; a loader that ends is started again."""
        if self._loader is None:
            raise ValueError("session.batches(...) needs Session(loader=...); use session.steps(...) without one")
        batches = iter(self._loader)
        for step in self.steps(total):
            self._page.enter(Phase.DATA)
            try:
                batch = next(batches)
            except StopIteration:
                batches = iter(self._loader)
                batch = next(batches)
            self._page.enter(Phase.STEP)
            yield step, batch

    def completed(self, loss: float | torch.Tensor | None = None, tokens: int = 0) -> None:
        """The step is done, optimizer and scheduler included. Saves if it is time to.

        `loss` may stay a tensor: on a GPU it is read a step later, so that nothing waits. Rank 0's is what the curve
        shows, so reduce it over ranks before. `tokens`: how many the whole gang consumed in this step.
        """
        now = time.monotonic()
        seconds, self._step_began = now - self._step_began, now
        self._step += 1
        self._tokens += tokens
        self._curve.add(self._step, loss, self._tokens, seconds)
        if self._rejoining is not None:
            self._rejoining.completed(self._step, self._tokens)
        if self._checkpointer is not None:
            self._page.committed_step = self._checkpointer.committed_step
            wishes = self._page.save_requested
            wished, self._wishes_seen = wishes > self._wishes_seen, wishes
            if self._agreement.is_due(self._step, wished):
                self._curve.settle()
                if not self._save(self._checkpointer):
                    self._agreement.postpone()
                self._step_began = time.monotonic()  # a save is no part of the next step
            elif self._is_kept_in_memory(self._step):
                self._memory_is_due = not self._save(self._checkpointer, owed=False)
                self._step_began = time.monotonic()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation between two steps: it has a time limit of its own, and is not part of any step."""
        began = time.monotonic()
        self._page.enter(Phase.EVALUATING)
        yield
        self._page.enter(Phase.STEP)
        self._step_began += time.monotonic() - began

    def alive(self) -> None:
        """A sign of progress inside something long, such as one batch of an evaluation. Costs less than 1 us."""
        self._page.mark()

    def measured(self, name: str, value: float) -> None:
        """A point of a further curve at the present step, for example an evaluation's loss."""
        self._curve.measured(name, self._step, value, self._tokens, time.monotonic() - self._step_began)

    def _rehearse_buckets(self) -> None:
        if self._rehearse is None:
            _log.warning("a DDP model without Session(rehearse=...): a resumed run may differ in the last bits")
            return
        generators = {name: state.clone() for name, state in rng_state().items()}
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        for _ in range(_REHEARSALS):
            self._rehearse().backward()  # type: ignore[no-untyped-call]
        self._model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        set_rng_state(generators)

    # ------------------------------------------------------------ going on in another attempt
    def _order_after(self, error: Exception) -> Rejoin | None:
        """The order to rejoin, if that is what comes of this error; a lost peer is told of before it is waited for."""
        if self._rejoining is None:
            return None
        self._page.is_cut_off()
        return self._rejoining.order_after(error, lambda: self._report(Raised(error=describe(error))), self._page.mark)

    def _rejoin(self, order: Rejoin) -> None:
        assert self._rejoining is not None
        self._curve.settle()
        self._page.begin_anew()
        self._report(Rejoined(attempt=order.attempt))
        before = self._checkpointer
        self._rejoining.renew(order, before.lineage if before is not None else ())
        self._enter_attempt()

    def _take_up(self, launch: Launch) -> bool:
        """Go on from the state that the ranks of this gang have in memory; False if that cannot be."""
        if self._rejoining is None or self._checkpointer is None or not launch.keep:
            return False
        taken = self._rejoining.take_up(self._checkpointer.agreeing, launch, self._step)
        if taken is None:
            return False
        self._step, self._tokens, self._saved_step = taken.step, taken.tokens, -1
        self._checkpointer.lineage = taken.lineage
        if self.rank == 0:
            self._report(Restored(checkpoint=CheckpointRef(uri="", step=taken.step, attempt=taken.attempt)))
        return True

    # ------------------------------------------------------------ restoring and saving
    def _restore(self, launch: Launch) -> None:
        restored = None
        if self._checkpointer is not None and launch.restore:
            # Only if there is something to restore: it gives the optimizer its states before the first step.
            here = self._bundle.make_room()
            try:
                restored = self._checkpointer.restore(launch.restore, here.tensors, launch.holders)
            except (CheckpointsUnreadable, StoreError) as error:
                # What mend must tell from the user's own errors: the code says that the store is to blame.
                _log.error("%s", error)
                raise SystemExit(ExitCode.STORAGE) from error
            if restored is not None:
                self._continue_from(restored, here)
        if restored is None and self._step >= 0:
            # Its peers would begin at step 0 with fresh weights. Only a new process can.
            _log.error("nothing can be restored, and this rank, which rejoined after step %d, has trained", self._step)
            raise SystemExit(ExitCode.STORAGE)
        if self.rank == 0:
            ref = restored.ref if restored else CheckpointRef(uri="", step=-1, attempt=launch.attempt)
            self._report(Restored(checkpoint=ref))

    def _continue_from(self, restored: RestoredState, here: BundleState) -> None:
        values = {name: value for name, value in restored.values.items() if name != BLUEPRINT}  # nobody's state
        self._bundle.put(BundleState(tensors=here.tensors, values=values, absent=restored.absent))
        self._step = restored.step
        self._saved_step = -1 if restored.ref.save_in_memory else restored.step  # memory ends with the pod
        self._tokens = restored.tokens
        if self.rank == 0:
            _log.info("restored step %d from %s", restored.step, restored.ref.uri)

    def _is_kept_in_memory(self, step: int) -> bool:
        """Every so many steps; sooner again where it could not be."""
        every = self._memory_interval_steps
        if every is None:
            return False
        return (step + 1) % (max(1, every // _TRIES_IN_MEMORY) if self._memory_is_due else every) == 0

    def _save(self, checkpointer: Checkpointer, *, owed: bool = True) -> bool:
        self._page.enter(Phase.SAVING)
        state = self._bundle.take()
        begun = checkpointer.save(
            self._step, self._tokens, state.tensors, {**state.values, **self._constant}, owed=owed
        )
        if begun and owed:
            self._saved_step = self._step
        self._page.enter(Phase.STEP)
        return begun

    def _save_finally(self) -> None:
        if (checkpointer := self._checkpointer) is None:
            return
        self._page.enter(Phase.SAVING)
        committed = self._wait_for(checkpointer)
        checkpointer.save_seconds = self._final_save_seconds
        for pause in (0.0, *_pauses(self._final_save_seconds)):
            if committed and self._saved_step == self._step:
                break
            self._stay_alive(pause)
            self._save(checkpointer)
            self._page.enter(Phase.SAVING)
            committed = self._wait_for(checkpointer)
        if not committed or self._saved_step != self._step:
            failure = FinalSaveFailed(self._step)
            _log.error("%s", failure)
            raise failure
        self._page.committed_step = checkpointer.committed_step

    def _stay_alive(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._page.mark()
            time.sleep(min(left, _SIGN_SECONDS))

    def _wait_for(self, checkpointer: Checkpointer) -> bool:
        """Whether the last save was committed, alike on all ranks; while it is not, the rank shows that it lives."""
        deadline = time.monotonic() + _COMMIT_SECONDS
        while not checkpointer.wait(_SIGN_SECONDS) and checkpointer.in_flight and time.monotonic() < deadline:
            self._page.mark()
        (failed,) = checkpointer.agreeing.maximum([not checkpointer.wait(0.0)], self._page.mark)
        return not failed

    def _report(self, report: Report) -> None:
        self._reporter.send(report)


def _pauses(total_seconds: float) -> Iterator[float]:
    """Seconds between tries, growing; the same on every rank, since clocks would part them in the midst of a save."""
    pause, spent = 1.0, 0.0
    while spent + pause <= total_seconds:
        yield pause
        spent, pause = spent + pause, min(2 * pause, _LONGEST_PAUSE_SECONDS)
