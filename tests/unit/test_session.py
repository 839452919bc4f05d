"""The session in one process: it resumes, saves when due, tells how it goes, and stays out of the way."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mend.environment import ENV_PAGE, ENV_REPORT_FD
from mend.exitcodes import ExitCode
from mend.heartbeats import Phase
from mend.orders import CheckpointPlan
from mend.reports import Committed, Measured, Report, Restored, SaveFailed, Stepped, decode_report
from mend.store import open_store
from mend_trainer.alone import next_attempt
from mend_trainer.checkpoint import MisfitError
from mend_trainer.curve import Curve
from mend_trainer.progress import PageReader, ProgressPage, create_page
from mend_trainer.session import FinalSaveFailed, Session

STEPS = 10


class Numbers:
    """Batches 0, 1, 2... in epochs of four, and how many were drawn."""

    def __init__(self) -> None:
        self.drawn = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(4 - self.drawn % 4):
            self.drawn += 1
            yield torch.full((2, 3), float(self.drawn))

    def state_dict(self) -> dict[str, Any]:
        """How many."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after so many."""
        self.drawn = state["drawn"]


class Loop:
    """A training loop that a user might have."""

    def __init__(self, plan: CheckpointPlan | None, width: int = 4, final_save_seconds: float = 900.0) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.5), nn.Linear(width, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3)
        self.loader = Numbers()
        self.plan = plan
        self.final_save_seconds = final_save_seconds
        self.losses: dict[int, float] = {}

    def session(self) -> Session[torch.Tensor]:
        """Opens as a user would."""
        return Session(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            loader=self.loader,
            checkpoint=self.plan,
            final_save_seconds=self.final_save_seconds,
        )

    def run(self, steps: int = STEPS, stop_before: int = -1) -> dict[int, float]:
        """Losses by step; raises in the middle of `stop_before`, once anything is committed."""
        with self.session() as session:
            for step, batch in session.batches(steps):
                loss = self.model(batch).pow(2).mean()
                if step == stop_before:
                    until(lambda: saved_steps(self.plan))
                    raise ZeroDivisionError("as users do")
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.scheduler.step()
                session.completed(loss, tokens=len(batch))
                self.losses[step] = session.loss
            assert session.tokens == 2 * (session.step + 1)
        return self.losses


@pytest.fixture
def plan(tmp_path: Path) -> CheckpointPlan:
    """Every third step, into a folder."""
    return CheckpointPlan(uri=f"file://{tmp_path}/run", interval_steps=3)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PageReader:
    """The agent's side of the page of every session opened in this test."""
    create_page(tmp_path / "page")
    monkeypatch.setenv(ENV_PAGE, str(tmp_path / "page"))
    return PageReader(tmp_path / "page")


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file in the place of the agent's pipe."""
    descriptor = os.open(tmp_path / "reports", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    monkeypatch.setenv(ENV_REPORT_FD, str(descriptor))
    yield tmp_path / "reports"
    os.close(descriptor)


def told(reports: Path) -> list[Any]:
    """What was reported."""
    return [decode_report(line) for line in reports.read_bytes().splitlines()]


def until(condition: Callable[[], object]) -> None:
    """Wait for something that happens in the background."""
    give_up_at = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.005)


def saved_steps(plan: CheckpointPlan) -> list[int]:
    """Steps of committed checkpoints, newest first."""
    return [ref.step for ref in next_attempt(open_store(plan.uri))[1]]


def test_without_plan_and_agent_a_loop_runs_as_it_always_did() -> None:
    """No checkpoint, no page, no pipe: nothing is asked for and nothing is written."""
    assert list(Loop(None).run()) == list(range(STEPS))


def test_an_interrupted_loop_goes_on_exactly(plan: CheckpointPlan, tmp_path: Path) -> None:
    """Weights, moments, schedule, dropout and data: every loss after the restart equals that of an unbroken loop."""
    unbroken = Loop(CheckpointPlan(uri=f"file://{tmp_path}/calm", interval_steps=3)).run()
    with pytest.raises(ZeroDivisionError):
        Loop(plan).run(stop_before=7)
    resumed = Loop(plan).run()
    assert resumed
    assert resumed == {step: unbroken[step] for step in range(min(resumed), STEPS)}
    assert min(resumed) in (3, 6)


def test_an_exception_saves_nothing_and_comes_through(plan: CheckpointPlan, page: PageReader) -> None:
    """The state in the middle of a step is not sound."""
    with pytest.raises(ZeroDivisionError, match="as users do"):
        Loop(plan).run(stop_before=5)
    assert saved_steps(plan) == [2]
    assert page.read().phase is Phase.EXITING


def test_the_last_step_is_committed_before_the_end(plan: CheckpointPlan, page: PageReader) -> None:
    """Whether or not the interval falls on it; a run that is started once more has nothing left to do."""
    Loop(plan).run()
    assert saved_steps(plan)[0] == STEPS - 1
    assert page.read().committed_step == STEPS - 1
    assert Loop(plan).run() == {}
    assert saved_steps(plan).count(STEPS - 1) == 1


def test_a_loop_that_is_left_early_keeps_what_it_has(plan: CheckpointPlan) -> None:
    """`break` ends a run cleanly, with its last completed step saved."""
    loop = Loop(plan)
    with loop.session() as session:
        for _, batch in session.batches(STEPS):
            session.completed(loop.model(batch).mean())
            if session.step == 4:
                break
    assert saved_steps(plan)[0] == 4


def test_progress_is_told(plan: CheckpointPlan, page: PageReader, reports: Path) -> None:
    """Steps, tokens, losses and phases on the page; the curve, the restore and the commits through the pipe."""
    losses = Loop(plan).run(steps=4)
    seen = page.read()
    assert (seen.step, seen.steps_done, seen.tokens, seen.loss) == (3, 4, 8, losses[3])
    said = told(reports)
    assert [each.checkpoint.step for each in said if isinstance(each, Restored)] == [-1]
    assert {each.point.step: each.point.loss for each in said if isinstance(each, Measured)} == losses
    assert [each.checkpoint.step for each in said if isinstance(each, Committed)] == [2, 3]
    Loop(plan).run(steps=5)
    assert [each.checkpoint.step for each in told(reports) if isinstance(each, Restored)] == [-1, 3]


def test_phases_follow_the_loop(page: PageReader) -> None:
    """Loading, data, step, evaluating, and exiting at the end."""
    loop = Loop(None)
    seen = []
    loop.loader.__class__ = type("Spy", (Numbers,), {"__iter__": lambda self: spy(Numbers.__iter__(self))})

    def spy(batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        for batch in batches:
            seen.append(page.read().phase)
            yield batch

    with loop.session() as session:
        for _, batch in session.batches(1):
            seen.append(page.read().phase)
            with session.evaluating():
                session.alive()
                seen.append(page.read().phase)
            seen.append(page.read().phase)
            session.completed(loop.model(batch).mean())
    seen.append(page.read().phase)
    assert seen == [Phase.DATA, Phase.STEP, Phase.EVALUATING, Phase.STEP, Phase.EXITING]


def test_a_loss_that_is_no_number_is_told_as_such(page: PageReader, reports: Path) -> None:
    """NaN shows as `nonfinite` on the page, and as a gap in the curve, since JSON has no NaN."""
    loop = Loop(None)
    with loop.session() as session:
        for step, _ in session.batches(2):
            session.completed(torch.tensor(math.nan if step else 1.0))
            assert page.read().nonfinite is bool(step)
    assert [each.point.loss for each in told(reports) if isinstance(each, Measured)] == [1.0, None]


def test_a_wish_of_the_agent_is_granted(page: PageReader, tmp_path: Path) -> None:
    """The step in which it came is the step that is saved."""
    plan = CheckpointPlan(uri=f"file://{tmp_path}/run")
    loop = Loop(plan)
    with loop.session() as session:
        for step, batch in session.batches(STEPS):
            if step == 4:
                page.request_save()
            session.completed(loop.model(batch).mean())
            if step == 4:
                until(lambda: saved_steps(plan) == [4])
    assert saved_steps(plan) == [STEPS - 1, 4]


def lose_the_store(loop: Loop, folder: Path) -> None:
    """Train to the end, where there is a file in the place of the folder."""
    with loop.session() as session:
        for _, batch in session.batches(STEPS):
            session.completed(loop.model(batch).mean())
        folder.write_text("in the way")


def forgetful(loop: Loop) -> None:
    """Never says that a step is done."""
    with loop.session() as session:
        for _ in session.steps(2):
            pass


def test_a_step_without_completed_is_a_clear_error() -> None:
    """Else the run would seem to hang."""
    with pytest.raises(RuntimeError, match=r"step 0: the loop went on without session\.completed"):
        forgetful(Loop(None))


def test_another_model_is_refused_tensor_by_tensor(plan: CheckpointPlan) -> None:
    """The checkpoint does not fit: no retry can help, and nothing of it is loaded."""
    Loop(plan).run()
    with pytest.raises(MisfitError, match=r"model\.0\.weight") as caught:
        Loop(plan, width=5).run()
    assert caught.value.mend_fatal


def test_a_final_save_that_fails_is_no_success(tmp_path: Path, reports: Path) -> None:
    """The store is gone at the end: each failure is reported, and the exit code says whose fault it was."""
    plan = CheckpointPlan(uri=f"file://{tmp_path}/run", interval_steps=100)
    loop = Loop(plan, final_save_seconds=1.0)
    with pytest.raises(FinalSaveFailed, match="step 9, the last, could not be saved") as caught:
        lose_the_store(loop, tmp_path / "run")
    assert caught.value.code == ExitCode.UNSAVED
    assert [each.step for each in told(reports) if isinstance(each, SaveFailed)] == [STEPS - 1] * 2


def test_a_final_save_waits_for_the_store(tmp_path: Path, reports: Path) -> None:
    """Room that is made after the last step was trained comes in time: nothing of it is lost."""
    plan = CheckpointPlan(uri=f"file://{tmp_path}/run", interval_steps=100)

    def make_room() -> None:
        until(lambda: any(isinstance(each, SaveFailed) for each in told(reports)))
        (tmp_path / "run").unlink()

    helper = threading.Thread(target=make_room)
    helper.start()
    lose_the_store(Loop(plan), tmp_path / "run")
    helper.join()
    assert saved_steps(plan) == [STEPS - 1]


def test_a_loader_without_position_is_refused_by_name() -> None:
    """An ordinary DataLoader cannot say where it is: silently starting it over would repeat data."""
    model = nn.Linear(1, 1)
    with pytest.raises(TypeError, match="loader: DataLoader has no state_dict"):
        Session(
            model=model,
            optimizer=torch.optim.SGD(model.parameters()),
            loader=torch.utils.data.DataLoader([1, 2]),  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("name", ["model", "ranks", "scheduler", "ema.decay"])
def test_a_name_that_the_session_uses_is_refused(name: str) -> None:
    """Under it a part would take the place of the model's weights, or of another part, in every checkpoint."""
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="expected a name without dots"):
        Session(model=model, optimizer=torch.optim.SGD(model.parameters()), others={name: model})


def test_a_gang_that_was_not_joined_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes that each believe to be alone would commit four different states as the same step."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="init_process_group before Session"):
        Session(model=model, optimizer=torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize("drawn", [False, True])
def test_every_rank_tells_of_its_first_step_once_in_each_attempt(drawn: bool) -> None:
    """The controller closes a recovery by it: ranks that draw no curve tell it too, and after a rejoin once more."""
    told: list[Report] = []
    page = ProgressPage.detached()
    curve = Curve(page, told.append, drawn=drawn)
    for step in (4, 5):
        curve.add(step, 0.5, tokens=0, seconds=1.0)
    page.begin_anew()
    curve.add(6, 0.5, tokens=0, seconds=1.0)
    assert sum(isinstance(each, Stepped) for each in told) == 2
    assert sum(isinstance(each, Measured) for each in told) == (3 if drawn else 0)
