"""What an agent is told to do, what it answers at once, and what it tells its ranks in turn."""

from __future__ import annotations

from typing import Final

import msgspec

from mend.exitcodes import ExitCode
from mend.protocol import Message
from mend.states import CheckpointRef, Holder

WAY_FIGURE: Final = "way to a neighbour"  # among the figures of a check: the better of two


class CheckpointPlan(Message, frozen=True, kw_only=True):
    """How an attempt saves. Credentials are not here: they reach the rank as environment of the pod."""

    uri: str  # prefix of the run: s3://bucket/prefix or file:///path
    endpoint: str | None = None
    interval_steps: int | None = None
    interval_seconds: float | None = None
    keep_last: int = 3
    keep_every: int | None = None
    memory_interval_steps: int | None = None  # snapshots beside those that are saved: every so many steps
    peer_bytes_per_second: int = 0  # how fast snapshots are copied to the buddy at most; 0: as fast as it goes
    verify: bool = False  # read each checkpoint back, once it is committed


class Launch(Message, frozen=True, kw_only=True, tag_field="type", tag="launch"):
    """Start the ranks of `attempt`; ranks of older attempts are killed first. Repeating it changes nothing.

    The processes of the ranks in `keep` are not killed but told to go on in this attempt, if they are of the attempt
    `follows` and can; the others are replaced, as one is that does not come within a few seconds.
    """

    attempt: int
    world_size: int
    first_rank: int
    ranks: int
    workers: int
    master_addr: str
    master_port: int
    run: str = ""  # "namespace/name"
    run_uid: str = ""
    restore: tuple[CheckpointRef, ...] = ()  # candidates, best first; empty: a fresh start
    checkpoint: CheckpointPlan | None = None
    holders: tuple[Holder, ...] = ()  # of the candidates that lie in memory
    buddy: str = ""  # https://HOST:PORT of the saver to which this worker's snapshots are copied; "": none
    keep: tuple[int, ...] = ()
    follows: int = 0  # the attempt of the ranks to keep: what is left of older ones may be off the lineage
    env: dict[str, str] = {}


class Gather(Message, frozen=True, kw_only=True, tag_field="type", tag="gather"):
    """Collect evidence about the ranks of `attempt` within `seconds`; kills nothing."""

    attempt: int
    seconds: float = 2.0


class Stop(Message, frozen=True, kw_only=True, tag_field="type", tag="stop"):
    """End all ranks up to and including `attempt`. With `exit`, the agent then exits too, with `exit_code`."""

    attempt: int
    reason: str = ""
    grace_seconds: float = 0.0  # 0: SIGKILL at once; else SIGTERM first and save if time allows
    exit: bool = False
    exit_code: int = ExitCode.STOPPED


class SaveNow(Message, frozen=True, kw_only=True, tag_field="type", tag="save-now"):
    """Save at the end of the current step."""

    attempt: int


class Check(Message, frozen=True, kw_only=True, tag_field="type", tag="check"):
    """Measure the machine, within `seconds`, while no ranks run here; `attempt` is the one that waits for it."""

    attempt: int
    round: int = 1  # what looks bad is measured again
    seconds: float = 20.0
    neighbours: tuple[str, ...] = ()  # http://HOST:PORT of agents to which the way is measured


Order = Launch | Gather | Stop | SaveNow | Check


class Ack(Message, frozen=True, kw_only=True):
    """An agent's answer to an order: whether it took it, at which attempt it is, and why not."""

    accepted: bool
    attempt: int
    reason: str = ""


class Checked(Message, frozen=True, kw_only=True, tag_field="type", tag="checked"):
    """What a machine can do, in answer to a `Check`: to be compared with its peers, never with fixed figures."""

    attempt: int
    worker: int
    round: int = 1
    figures: dict[str, float] = {}  # by what was measured ("cuda:0 matrix product"): so much a second
    problem: str = ""  # the check died, did not end in time, or gave wrong numbers
    seconds: float = 0.0


class Rejoin(Message, frozen=True, kw_only=True):
    """Break off, keep model and process, and go on in the attempt that `env` describes as it would to a new rank."""

    attempt: int
    env: dict[str, str]


decode_order = msgspec.json.Decoder(Order).decode
decode_ack = msgspec.json.Decoder(Ack).decode
decode_checked = msgspec.json.Decoder(Checked).decode
decode_launch = msgspec.json.Decoder(Launch).decode
decode_rejoin = msgspec.json.Decoder(Rejoin).decode
