"""Reads torch's flight recorder in another process, through the C++ worker server on that rank's unix socket."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import aiohttp
import msgspec

from mend.protocol import GroupProgress

# NCCL's recorder has a handler of its own in CUDA builds; the other serves every backend that records, such as gloo.
_HANDLERS: Final = ("fr_trace_json", "dump_nccl_trace_json")
_DUMP_BYTES: Final = 64 << 20


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


async def read_recorder(path: Path, seconds: float) -> tuple[GroupProgress, ...]:
    """Counters of every process group of the rank behind `path`; raises `SilentRecorder`."""
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
            return tuple(groups)
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


def parse_dump(raw: bytes) -> tuple[GroupProgress, ...]:
    """The part of a dump that names a laggard; raises `msgspec.MsgspecError` on anything else.

    Counters are keyed by a process-local number, which the entries translate to the name that all ranks share. A
    process that rejoined has made its groups anew: of one name the youngest counts, those without an entry are over.
    """
    dump = msgspec.json.decode(raw, type=_Dump, strict=False)
    last = {entry.pg_id: entry for entry in dump.entries}  # the newest entry of each group wins
    keys = sorted(dump.pg_status, key=lambda key: int(key) if key.isdigit() else -1)
    known = [key for key in keys if key.isdigit() and int(key) in last] or keys
    groups = (
        _group(key, dump.pg_status[key], last.get(int(key)) if key.isdigit() else None, dump.pg_config) for key in known
    )
    return tuple({group.name: group for group in groups}.values())


def _group(key: str, status: _Status, entry: _Entry | None, configs: Mapping[str, _Config]) -> GroupProgress:
    name = entry.process_group[0] if entry and entry.process_group else key
    described = [part for part in (entry.process_group if entry else ()) if part and part != "undefined"]
    return GroupProgress(
        name=":".join(described) or key,
        ranks=_ranks(configs.get(name, _Config()).ranks),
        last_enqueued=status.last_enqueued_collective,
        last_started=status.last_started_collective,
        last_completed=status.last_completed_collective,
        last_enqueued_name=entry.profiling_name if entry else "",
    )


def _ranks(text: str) -> tuple[int, ...]:
    try:
        return msgspec.json.decode(text, type=tuple[int, ...])
    except msgspec.MsgspecError:
        return ()
