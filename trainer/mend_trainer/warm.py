"""The zygote: imports once what every rank needs, then forks processes that can become a rank within milliseconds.

It stays single-threaded and never touches CUDA, so that its forks are as good as new processes. Each fork is made by
way of a child that exits at once: the agent, which adopts orphans, thereby becomes the parent that learns how it ended.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from mend.environment import ENV_RUN_UID
from mend.exitcodes import ExitCode
from mend.protocol import Message
from mend.store.s3_client import prepare
from mend_trainer.command import Command, Module, Program, Script
from mend_trainer.kernel import die_with, name_process
from mend_trainer.polling import readable
from mend_trainer.rank import become_rank, decode_post, leave, set_import_path
from mend_trainer.storekeeper import keep_stores

# The first optimizer or DDP step would import dynamo (seconds of CPU), the first save or load DCP.
FIRST_IMPORTS: Final = ("torch", "torch.distributed")
IMPORTS: Final = (
    "numpy",
    "torch.nn.parallel",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "torch.profiler._cupti_monitor",
)
_MESSAGE_BYTES: Final = 1 << 20
_ADOPTION_SECONDS: Final = 10.0


class Nursery(Message, frozen=True, kw_only=True):
    """What a zygote is started with."""

    agent_pid: int
    channel: int  # file descriptor of the socket to the agent
    host: str  # where the keeper of stores listens
    command: Command
    preload: tuple[str, ...] = ()
    polite: bool = False  # import at idle priority, since ranks are training


class Birth(Message, frozen=True, kw_only=True):
    """The agent asks for one process; beside it goes the child's own channel, and for a saver where it listens."""

    role: Literal["standby", "keeper", "saver"]
    arenas: tuple[str, ...] = ()  # a saver's: where the snapshots of this worker's ranks are
    copies: tuple[str, ...] = ()  # and those of the worker whose buddy this one is


class Hello(Message, frozen=True, kw_only=True):
    """A new process is adopted and ready. `port`: of the keeper's directory."""

    pid: int
    port: int = 0


class Imported(Message, frozen=True, kw_only=True):
    """Everything is imported. Unless `usable`, what was preloaded spoils forks, and ranks have to start cold."""

    seconds: float
    usable: bool = True
    problems: tuple[str, ...] = ()


decode_birth = msgspec.json.Decoder(Birth).decode
decode_hello = msgspec.json.Decoder(Hello).decode
decode_imported = msgspec.json.Decoder(Imported).decode
_decode_nursery = msgspec.json.Decoder(Nursery).decode


def preloads_of(command: Command) -> tuple[str, ...]:
    """What mend's own trainer imports; the modules of others may do things when imported, so they must be named."""
    match command:
        case Module(name=name) if name.startswith("mend_trainer."):
            return (name, "transformers.models.llama.modeling_llama")
        case Script(path=path) if Path(path).name == "mend-train":
            return ("mend_trainer.train", "transformers.models.llama.modeling_llama")
        case _:
            return ()


def main() -> None:
    """Entry of the zygote; in a forked child this goes on as that child's whole life."""
    nursery = _decode_nursery(sys.argv[1])
    die_with(nursery.agent_pid)
    name_process("mend-zygote")
    set_import_path(nursery.command)  # modules to preload are found where ranks will find them
    live = _serve(nursery, socket.socket(fileno=nursery.channel))
    leave(live())


def _serve(nursery: Nursery, channel: socket.socket) -> Callable[[], int]:
    """Import and fork on request. Returns only in a forked child, with what it is to do."""
    began = time.monotonic()
    idle = nursery.polite and _may_idle()
    if idle:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    _import(FIRST_IMPORTS)
    while readable([channel], 0.0):  # the keeper need not wait for all the rest
        if life := _give_birth(nursery, channel):
            return life
    warm = () if isinstance(nursery.command, Program) else (*IMPORTS, *preloads_of(nursery.command), *nursery.preload)
    problems = _import(warm)
    prepare()
    if idle:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    if (threads := len(os.listdir("/proc/self/task"))) > 1:  # noqa: PTH208 - names are enough
        problems += (f"it left {threads - 1} threads running; locks they hold stay locked for ever in ranks",)
    usable = _forks_may_use_cuda()
    if not usable:
        problems += ("it initialised CUDA, which no fork can use: ranks start cold (mend's preloads do not do that)",)
    gc.collect()
    gc.freeze()  # collections in the children would copy every page they share with us
    seconds = time.monotonic() - began
    channel.send(msgspec.json.encode(Imported(seconds=seconds, usable=usable, problems=problems)))
    while True:
        if life := _give_birth(nursery, channel):
            return life


def _import(names: Sequence[str]) -> tuple[str, ...]:
    problems = []
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - a user's module may raise anything; ranks will show it in full
            problems.append(f"{name} failed, as it may in ranks: {type(error).__name__}: {error}")
    return tuple(problems)


def _may_idle() -> bool:
    """Whether this process could come back from idle priority: without privileges it may not, and ranks would crawl."""

    def there_and_back() -> bool:
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        except OSError:
            return False
        return True

    return _holds_in_a_fork(there_and_back)


def _forks_may_use_cuda() -> bool:
    """A module that was preloaded may have initialised CUDA, which torch notices only in a child."""
    import torch

    return _holds_in_a_fork(lambda: not torch.cuda._is_in_bad_fork())


def _holds_in_a_fork(holds: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        os._exit(0 if holds() else 1)
    return os.waitpid(child, 0)[1] == 0


def _give_birth(nursery: Nursery, channel: socket.socket) -> Callable[[], int] | None:
    """Serve one request: None in the zygote, the child's life in the child."""
    message, descriptors, _, _ = socket.recv_fds(channel, _MESSAGE_BYTES, 2)
    if not message:
        os._exit(0)  # the agent is gone
    own, *others = (socket.socket(fileno=descriptor) for descriptor in descriptors)
    if not _fork_orphan():
        for each in (own, *others):
            each.close()
        return None
    channel.close()
    _await_adoption(nursery.agent_pid)
    birth = decode_birth(message)
    match birth.role:
        case "standby":
            return lambda: _stand_by(nursery, own)
        case "keeper":
            return lambda: _keep(nursery.host, own)
        case "saver":
            return lambda: _save(birth, own, *others)


def _fork_orphan() -> bool:
    """Fork a process whose parent is gone; True in it."""
    middle = os.fork()
    if middle:
        os.waitpid(middle, 0)
        return False
    if os.fork():
        os._exit(0)
    return True


def _await_adoption(agent: int) -> None:
    """The agent is our parent once the process between us has exited, which takes it no time."""
    deadline = time.monotonic() + _ADOPTION_SECONDS
    while os.getppid() != agent:
        if time.monotonic() > deadline:
            os._exit(ExitCode.AGENT_FAILED)
        time.sleep(0.0005)
    die_with(agent)
    os.setsid()  # a process group of its own, to be killed with all that it starts


def _stand_by(nursery: Nursery, channel: socket.socket) -> int:
    name_process("mend-standby")
    _warm_up(nursery)
    _say(channel, Hello(pid=os.getpid()))
    message, descriptors, _, _ = socket.recv_fds(channel, _MESSAGE_BYTES, 3)
    channel.close()
    if not message:
        os._exit(0)  # not needed any more
    return become_rank(decode_post(message), *descriptors)


def _warm_up(nursery: Nursery) -> None:
    """Let a preloaded module make ready what is slow at the first time, out of the way of ranks that train."""
    names = (*preloads_of(nursery.command), *nursery.preload)
    hook = next((found for name in names if (found := getattr(sys.modules.get(name), "mend_warm", None))), None)
    if hook is None or isinstance(nursery.command, Program):
        return
    from mend_trainer.rng import rng_state, set_rng_state

    generators = {name: state.clone() for name, state in rng_state().items()}
    with _idly():
        try:
            hook(nursery.command.arguments)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - may raise anything; ranks will show it in full
            print(f"warming up failed, as it may in ranks: {type(error).__name__}: {error}", file=sys.stderr)
    set_rng_state(generators)


@contextlib.contextmanager
def _idly() -> Iterator[None]:
    """At idle priority, if this process could come back from there."""
    may = _may_idle()
    if may:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    yield
    if may:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _say(channel: socket.socket, hello: Hello) -> None:
    try:
        channel.send(msgspec.json.encode(hello))
    except OSError:
        os._exit(0)  # not needed any more


def _keep(host: str, channel: socket.socket) -> int:
    name_process("mend-stores")

    def announce(port: int) -> None:
        _say(channel, Hello(pid=os.getpid(), port=port))

    keep_stores(host, announce)
    return ExitCode.SUCCEEDED


def _save(birth: Birth, channel: socket.socket, listener: socket.socket | None = None) -> int:
    name_process("mend-saver")
    from mend_trainer.checkpoint.arena import Arena
    from mend_trainer.checkpoint.saver import serve
    from mend_trainer.copies.credentials import read_credentials
    from mend_trainer.copies.exchange import Exchange

    logging.basicConfig(level=logging.INFO, format="saver: %(message)s", force=True)
    try:
        arenas, copies = ([Arena.attach(path) for path in paths] for paths in (birth.arenas, birth.copies))
    except OSError:
        os._exit(0)  # the agent is gone
    _say(channel, Hello(pid=os.getpid()))
    exchange = None
    if listener is not None and (credentials := read_credentials()):
        exchange = Exchange(arenas, copies, listener, credentials, os.environ.get(ENV_RUN_UID, ""))
    serve(channel, arenas, exchange)
    return ExitCode.SUCCEEDED


if __name__ == "__main__":
    main()
