"""Where `kubectl logs` gets its bytes from: whoever runs the pods gives the API server a `LogSource`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol


class LogSource(Protocol):
    """Reads what the containers of pods have written."""

    def read(
        self,
        namespace: str,
        name: str,
        container: str,
        *,
        follow: bool,
        tail_lines: int | None,
        limit_bytes: int | None,
        previous: bool = False,
    ) -> AsyncIterator[bytes]:
        """The log of one container of one pod, in chunks (an async generator).

        `previous` asks for the container's run before its last restart. With `follow` it goes on until the
        container has ended. Raises LookupError, before the first chunk, with a sentence why there is no such log.
        """
        ...


class NoLogs:
    """A cluster whose pods run nowhere."""

    async def read(
        self,
        namespace: str,
        name: str,
        container: str,
        *,
        follow: bool,
        tail_lines: int | None,
        limit_bytes: int | None,
        previous: bool = False,
    ) -> AsyncIterator[bytes]:
        """There is none."""
        raise LookupError(f'container "{container}" in pod "{name}" is waiting to start: ContainerCreating')
        yield b""
