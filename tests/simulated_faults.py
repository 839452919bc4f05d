"""What each fault of a simulated rank looks like from outside, as agents of real ranks saw it in test_fault_kinds."""

from __future__ import annotations

from dataclasses import dataclass

from mend.heartbeats import Phase, RankError, RankExit

MAIN = "Current thread 0x1 (most recent call first):\n"
WAITING = MAIN + '  File "/site-packages/torch/distributed/distributed_c10d.py", line 3252 in all_reduce\n'


def _at(where: str) -> str:
    """A stack whose innermost frame is of the user's code: 'train.py:12 in load'."""
    file, _, rest = where.partition(":")
    line, _, function = rest.partition(" in ")
    return f'{MAIN}  File "/app/{file}", line {line} in {function}\n'


@dataclass(frozen=True)
class Sight:
    """How a rank is found. `is_in` says that it has entered the collective that all others wait in, or another."""

    phase: Phase = Phase.STEP
    state: str = "S"
    is_in: bool = False
    collective: str = "gloo:all_reduce"
    stack: str = ""
    python_answers: bool | None = True
    cpu_share: float = 0.0

    @property
    def answers(self) -> bool:
        """A stopped process says nothing."""
        return self.state != "T"


HEALTHY = Sight(Phase.COLLECTIVE, is_in=True, stack=WAITING)
STUCK: dict[str, Sight] = {
    "": HEALTHY,
    "stopped": Sight(Phase.COLLECTIVE, state="T", python_answers=None),
    "stuck": Sight(Phase.DATA, stack=_at("loader.py:64 in next_batch")),
    "held": Sight(Phase.DATA, state="D", python_answers=False),
    "saving": Sight(Phase.SAVING, stack=_at("save.py:20 in upload")),
    "skipping": Sight(Phase.COLLECTIVE, is_in=True, collective="gloo:broadcast", stack=WAITING),
    "holding": Sight(stack=_at("extension.py:7 in call"), python_answers=False),
    "locked": Sight(stack=_at("metrics.py:31 in flush")),
    "spinning": Sight(state="R", stack=_at("sampler.py:18 in draw"), cpu_share=0.98),
    "leaving": Sight(stack=_at("train.py:92 in dump_state")),
}
ENDS: dict[str, tuple[RankExit, RankError | None]] = {
    "kill": (RankExit(signal=9), None),
    "oom": (RankExit(signal=9, oom_killed=True), None),
    "raise": (RankExit(code=1), RankError(type="ValueError", message="bad sample", traceback="Traceback: bad sample")),
    "disk": (RankExit(code=1), RankError(type="OSError", message="[Errno 28] No space left on device")),
}
