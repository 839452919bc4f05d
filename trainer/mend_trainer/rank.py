"""What happens in a rank's process between its birth and the user's first line, and how it tells of its end.

The same for a standby that was forked warm and for a cold start: `python -m mend_trainer.rank COMMAND` by exec.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import importlib.util
import os
import runpy
import sys
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn

import msgspec

from mend.environment import ENV_ORDERS_FD, ENV_PAGE, ENV_REPORT_FD, ENV_STACKS
from mend.exitcodes import ExitCode
from mend.heartbeats import Phase
from mend.protocol import Message
from mend.reports import Raised
from mend_trainer.command import Command, Module, Program, Script, understand
from mend_trainer.kernel import die_with, name_process
from mend_trainer.progress import ProgressPage
from mend_trainer.reporting import Reporter, describe

ENV_WORKER_SERVER: Final = "TORCH_WORKER_SERVER_SOCKET"
ENV_AGENT_PID: Final = "MEND_AGENT_PID"
PYTHON_HANDLER: Final = "mend_python"  # of the worker server: answers once Python code can run
_CODE_OF_NO_SCRIPT: Final = 2  # as Python itself exits when it cannot open the file


class Post(Message, frozen=True, kw_only=True):
    """What a standby is given to become a rank; pipes for log, reports and orders come beside it as descriptors."""

    command: Script | Module
    env: dict[str, str]


decode_post = msgspec.json.Decoder(Post).decode


def become_rank(post: Post, log: int, report: int, orders: int) -> int:
    """In a standby: take the post, run the user's main program and return the exit code."""
    os.environ.update(post.env)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    os.environ |= {ENV_REPORT_FD: str(report), ENV_ORDERS_FD: str(orders)}
    _reseed()
    return run(post.command)


def _reseed() -> None:
    """Forks of one parent would all draw the same numbers from numpy; `random` sees to that itself."""
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()


def run(command: Script | Module) -> int:
    """The user's main program in this very process, watched from outside; returns what to exit with."""
    name_process(f"rank-{os.environ.get('RANK', '?')}")
    _register_stacks()
    _serve_flight_recorder()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # the last lines must survive a SIGKILL
    try:
        try:
            _main_of(command)()
        finally:
            _enter_exiting()
    except SystemExit as leave:
        return _exit_code(leave)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever ends the rank is told, as the interpreter would print it
        own = _strip(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(own), own)
        _tell(error)
        return ExitCode.MISFIT if getattr(error, "mend_fatal", False) else ExitCode.USER_ERROR
    return ExitCode.SUCCEEDED


def leave(code: int) -> NoReturn:
    """Exit as the interpreter does; but after a failure, run what was registered for the exit and tear nothing down.

    Process groups that are destroyed while their peers are gone, or busy, abort the process or hang: SIGABRT would then
    stand in the place of the exit code that the user chose.
    """
    if code == ExitCode.SUCCEEDED:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _enter_exiting() -> None:
    """Tearing an interpreter and its process groups down can hang as well: say that it has begun."""
    if path := os.environ.get(ENV_PAGE):
        page = ProgressPage.open(path)
        page.enter(Phase.EXITING)
        page.close()


def _register_stacks() -> None:
    """On SIGUSR1 every thread's Python stack goes to a file opened now: it works even while the GIL is held."""
    if path := os.environ.get(ENV_STACKS):
        import signal

        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)


def _serve_flight_recorder() -> None:
    """Start torch's worker server: C++ threads that answer on a unix socket whatever Python does."""
    path = os.environ.get(ENV_WORKER_SERVER)
    if not path or importlib.util.find_spec("torch") is None:
        return
    from torch._C._distributed_c10d import _register_handler, _WorkerServer

    _register_handler(PYTHON_HANDLER, _say_that_python_runs)
    with _Muted(2):  # it announces itself by a warning
        server = _WorkerServer(path)
    # Never destroyed: it serves until the process is gone, and its destructor would warn once more.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(server))


def _say_that_python_runs(request: Any, response: Any) -> None:
    """Called in a thread of the worker server: it gets here only once nobody else holds the GIL."""
    response.set_content("running", "text/plain")
    response.set_status(HTTPStatus.OK)


def set_import_path(command: Command) -> None:
    """Put first on `sys.path` what the interpreter would for this command, in place of what `-m` has put there."""
    del sys.path[0]
    match command:
        case Module():
            sys.path.insert(0, str(Path.cwd()))
        case Script(path=path):
            sys.path.insert(0, str(Path(path).resolve().parent))
        case Program():
            pass


class _Muted:
    """Sends what C++ writes to a file descriptor into the void."""

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._kept = os.dup(self._stream)
        void = os.open(os.devnull, os.O_WRONLY)
        os.dup2(void, self._stream)
        os.close(void)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        os.dup2(self._kept, self._stream)
        os.close(self._kept)


def _main_of(command: Script | Module) -> Callable[[], object]:
    """Set argv as the interpreter does, and hand back what runs the program as `__main__`."""
    match command:
        case Script(path=path, arguments=arguments):
            if not Path(path).exists():
                print(f"{sys.executable}: can't open file {path!r}: no such file", file=sys.stderr)
                raise SystemExit(_CODE_OF_NO_SCRIPT)
            sys.argv = [path, *arguments]
            sys.orig_argv = [sys.executable, *sys.argv]
            return lambda: runpy.run_path(path, run_name="__main__")
        case Module(name=name, arguments=arguments):
            sys.argv = [name, *arguments]  # runpy puts the file's path in place of the name
            sys.orig_argv = [sys.executable, "-m", *sys.argv]
            sys.modules.pop(name, None)  # preloaded for what it imports; now it runs as __main__
            return lambda: runpy.run_module(name, run_name="__main__", alter_sys=True)


def _exit_code(leave: SystemExit) -> int:
    """As the interpreter understands `sys.exit(anything)`."""
    match leave.code:
        case None:
            return ExitCode.SUCCEEDED
        case int(code):
            return code
        case text:
            print(text, file=sys.stderr)
            return ExitCode.USER_ERROR


def _strip(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the user's first frame on."""
    while trace is not None and trace.tb_frame.f_code.co_filename in _OWN_FILES:
        trace = trace.tb_next
    return trace


_OWN_FILES: Final = frozenset({__file__, runpy.__file__, runpy.run_path.__code__.co_filename})


def _tell(error: BaseException) -> None:
    """Report the exception now: tearing the interpreter down may hang, for example on a stuck process group."""
    Reporter.from_environment().send(Raised(error=describe(error)))


def _run_cold(command: Command) -> int:
    if not isinstance(command, Program):
        return run(command)
    try:
        os.execvp(command.argv[0], command.argv)
    except FileNotFoundError:
        _complain(command, "no such command; check the container's command and its image")
        return ExitCode.NOT_FOUND
    except OSError as error:
        _complain(command, f"cannot be executed: {error.strerror}; check its mode, format and interpreter line")
        return ExitCode.CANNOT_EXECUTE


def _complain(command: Program, problem: str) -> None:
    print(f"mend-agent: {command.argv[0]}: {problem}", file=sys.stderr)


def main() -> None:
    """A cold start: argv is the command of the pod; environment and pipes are already in place."""
    die_with(int(os.environ[ENV_AGENT_PID]))
    command = understand(sys.argv[1:])
    set_import_path(command)
    leave(_run_cold(command))


if __name__ == "__main__":
    main()
