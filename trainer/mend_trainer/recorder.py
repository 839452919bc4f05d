"""Asks another process through the C++ worker server on its unix socket: torch's flight recorder, and for the GIL."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Final

import aiohttp
import msgspec

from mend.evidence import GroupProgress
from mend_trainer.rank import PYTHON_HANDLER

# NCCL's recorder has a handler of its own in CUDA builds; the other serves every backend that records, such as gloo.
_HANDLERS: Final = ("fr_trace_json", "dump_nccl_trace_json")
_DUMP_BYTES: Final = 64 << 20
_RECENT: Final = 48  # names of collectives that are kept: some rounds of what a step does

_PYTHON_SECONDS: Final = 0.1  # a thread that wants the GIL gets it within milliseconds, unless it is held


class _Entry(msgspec.Struct, frozen=True):
    pg_id: int = -1
    process_group: tuple[str, ...] = ()  # name, description
    profiling_name: str = ""


class _Status(msgspec.Struct, frozen=True):
    last_enqueued_collective: int = -1
    last_started_collective: int = -1
    last_completed_collective: int = -1


class _Config(msgspec.Struct, frozen=True):
    ranks: str = "[]"


class _Dump(msgspec.Struct, frozen=True):
    entries: tuple[_Entry, ...] = ()
    pg_status: dict[str, _Status] = {}
    pg_config: dict[str, _Config] = {}


class SilentRecorder(ConnectionError):
    """The worker server did not answer with a dump."""


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank's worker server said: counters of its process groups, and whether Python code runs."""

    groups: tuple[GroupProgress, ...] = ()
    python: bool | None = None  # None: the rank has no handler in Python


async def ask(path: Path, seconds: float) -> Answers:
    """Counters of every process group of the rank behind `path`, and of the GIL; raises `SilentRecorder`."""
    timeout = aiohttp.ClientTimeout(total=seconds)
    try:
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path)), timeout=timeout) as session:
            async with session.get("http://rank/handler/") as answer:
                known = msgspec.json.decode(await answer.read(), type=list[str])
            groups: list[GroupProgress] = []
            for handler in _HANDLERS:
                if handler in known:
                    async with session.post(f"http://rank/handler/{handler}") as answer:
                        groups.extend(parse_dump(await _whole(answer)))
            python = await _python_answers(session) if PYTHON_HANDLER in known else None
            return Answers(groups=tuple(groups), python=python)
    except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError) as error:
        raise SilentRecorder(f"{path}: {error or type(error).__name__}") from error


async def _whole(answer: aiohttp.ClientResponse) -> bytes:
    """The body to its end: a full recorder is some megabytes, which come in pieces."""
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > _DUMP_BYTES:
            raise SilentRecorder(f"a dump of more than {_DUMP_BYTES} bytes")
    return bytes(body)


async def _python_answers(session: aiohttp.ClientSession) -> bool:
    """Whether Python code runs in the process, in a thread that is not the main one: not while C code holds the GIL."""
    limit = aiohttp.ClientTimeout(total=_PYTHON_SECONDS)
    try:
        async with session.post(f"http://rank/handler/{PYTHON_HANDLER}", timeout=limit) as answer:
            return answer.status == HTTPStatus.OK
    except TimeoutError:
        return False


def parse_dump(raw: bytes) -> tuple[GroupProgress, ...]:
    """The part of a dump that names a laggard; raises `msgspec.MsgspecError` on anything else.

    Counters are keyed by a process-local number, which the entries translate to the name that all ranks share. A
    process that rejoined has made its groups anew: of one name the youngest counts, those without an entry are over.
    """
    dump = msgspec.json.decode(raw, type=_Dump, strict=False)
    entries: dict[str, list[_Entry]] = defaultdict(list)
    for entry in dump.entries:  # oldest first
        entries[str(entry.pg_id)].append(entry)
    keys = sorted(dump.pg_status, key=lambda key: int(key) if key.isdigit() else -1)
    known = [key for key in keys if key in entries] or keys
    groups = (_group(key, dump.pg_status[key], entries[key], dump.pg_config) for key in known)
    return tuple({group.name: group for group in groups}.values())


def _group(key: str, status: _Status, entries: Sequence[_Entry], configs: Mapping[str, _Config]) -> GroupProgress:
    newest = entries[-1] if entries else _Entry()
    name = newest.process_group[0] if newest.process_group else key
    described = [part for part in newest.process_group if part and part != "undefined"]
    return GroupProgress(
        name=":".join(described) or key,
        ranks=_ranks(configs.get(name, _Config()).ranks),
        last_enqueued=status.last_enqueued_collective,
        last_started=status.last_started_collective,
        last_completed=status.last_completed_collective,
        last_enqueued_name=newest.profiling_name,
        recent_names=tuple(entry.profiling_name for entry in entries[-_RECENT:]),
    )


def _ranks(text: str) -> tuple[int, ...]:
    try:
        return msgspec.json.decode(text, type=tuple[int, ...])
    except msgspec.MsgspecError:
        return ()
