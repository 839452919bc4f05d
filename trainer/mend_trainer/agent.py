"""`mend-agent -- COMMAND...`: PID 1 of a worker's pod. Supervises ranks, tells how they are, and obeys orders."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from typing import Final

from mend.exitcodes import ExitCode
from mend_trainer.kernel import adopt_orphans
from mend_trainer.logs import Output, OutputHandler
from mend_trainer.runtime import RuntimeFolder
from mend_trainer.server import make_app, serve
from mend_trainer.settings import BadEnvironment, Settings, read_settings
from mend_trainer.supervisor import Supervisor

log = logging.getLogger(__name__)

_OUTPUT_SECONDS: Final = 1.0


def main(argv: Sequence[str] | None = None) -> None:
    """Console script."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[1:] if words[:1] == ["--"] else words
    try:
        settings = read_settings(command)
    except BadEnvironment as error:
        for problem in error.problems:
            print(f"mend-agent: {problem}", file=sys.stderr)
        sys.exit(ExitCode.BAD_CONFIG)
    sys.exit(_supervise(settings))


def _supervise(settings: Settings) -> int:
    adopt_orphans()
    output = Output(1)
    handler = OutputHandler(output)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s agent worker={settings.worker} %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    folder = RuntimeFolder()
    try:
        return asyncio.run(_work(settings, folder, output))
    except OSError as error:
        log.error("the agent failed: %s", error)
        return ExitCode.AGENT_FAILED
    finally:
        folder.remove()
        output.close(_OUTPUT_SECONDS)


async def _work(settings: Settings, folder: RuntimeFolder, output: Output) -> int:
    """Serve until told to leave; nothing of this agent is left behind."""
    loop = asyncio.get_running_loop()
    supervisor = Supervisor(settings, folder, output)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.terminate)
    server = None
    try:
        app = make_app(supervisor, settings.token, settings.heartbeat_seconds)
        server = await serve(app, settings.host, settings.port)
        log.info("worker %d of run %s listens on %s:%d", settings.worker, settings.run, settings.host, settings.port)
        return await supervisor.exit
    finally:
        await supervisor.clean_up()
        if server is not None:
            await server.cleanup()


if __name__ == "__main__":
    main()
