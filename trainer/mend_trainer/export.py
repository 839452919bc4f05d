"""A checkpoint as a folder that `transformers` loads: weights streamed from the store, every digest checked on the way.

The folder gets its name when it is complete. Until then it has another, under a lock: a broken-off export leaves
nothing that looks whole, and the next one clears it away.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from mend.keys import MANIFEST_NAME
from mend.manifest import Manifest, UnreadableManifest, decode_manifest, misplacement
from mend.store import NotFound, Store, StoreError
from mend.store.files import sync_folder
from mend_trainer.architecture import UnknownArchitecture, names_to_write
from mend_trainer.blueprint import BadBlueprint, Blueprint, is_of_a_tokenizer, read_blueprint
from mend_trainer.checkpoint.dcp import Corrupt
from mend_trainer.checkpoint.layout import torch_dtype
from mend_trainer.checkpoint.reader import load
from mend_trainer.weights import INDEX_NAME, UnknownType, Weight, WeightFile, batches, index_of, plan_files

FILE_BYTES: Final = 5_000_000_000  # as transformers cuts its own
BATCH_BYTES: Final = 256 << 20  # of tensors in memory at once
_MODEL: Final = "model."  # the session's name for the model's part of the state
_SLACK_BYTES: Final = 64 << 20
_SHOWN_PROBLEMS: Final = 10


class CannotExport(RuntimeError):
    """Why there is no export, and what to do about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be exported: the checkpoint in `folder` of the store, to `target`."""

    folder: str
    target: Path
    key: bytes | None = None  # that its manifest must be signed with
    dtype: str | None = None  # None: as it was saved
    config: Path | None = None  # instead of the checkpoint's own
    tokenizer: Path | None = None
    file_bytes: int = FILE_BYTES


def export(store: Store, wanted: Wanted) -> Manifest:
    """Write the folder; what was exported. Raises `CannotExport`, and then there is no folder."""
    try:
        manifest = decode_manifest(store.get(f"{wanted.folder}/{MANIFEST_NAME}"), wanted.key)
        if misplaced := misplacement(manifest, wanted.folder):
            raise CannotExport(f"{store.uri}/{wanted.folder}: {misplaced}; choose another by --step")
        blueprint = _blueprint(store, manifest, wanted)
        files = _planned(manifest, blueprint, wanted)
        with _made_whole(wanted.target, sum(file.bytes for file in files)) as partial:
            with _shown(files) as advance:
                for file in files:
                    _write_weights(partial / file.name, file, store, manifest, wanted.folder, advance)
            for name, content in _companions(blueprint, files, store, manifest, wanted).items():
                _durable(partial / name, content)
    except (NotFound, UnreadableManifest) as error:
        raise CannotExport(f"{store.uri}/{wanted.folder}: no checkpoint that can be read: {error}") from error
    except Corrupt as error:
        raise CannotExport(
            f"{store.uri}/{wanted.folder} is damaged: {error}; choose an earlier checkpoint by --step"
        ) from error
    except StoreError as error:
        raise CannotExport(str(error)) from error
    except OSError as error:
        raise CannotExport(_of_the_disk(wanted.target, error)) from error
    return manifest


# ---------------------------------------------------------------- what to write
def _blueprint(store: Store, manifest: Manifest, wanted: Wanted) -> Blueprint:
    """Of the checkpoint, with what the user gave in its place."""
    try:
        carried = read_blueprint(manifest.values, store, with_tokenizer=wanted.tokenizer is None)
    except BadBlueprint as error:
        raise CannotExport(f"{error}; give the tokenizer's folder by --tokenizer") from error
    config = _read_config(wanted.config) if wanted.config is not None else carried.config if carried else None
    if config is None:
        raise CannotExport(
            f"{store.uri}/{wanted.folder}: the checkpoint does not say what model it is of: give its config.json by "
            "--config, and have the next ones say it by Session(blueprint=blueprint_of(model, tokenizer))"
        )
    tokenizer = carried.tokenizer if carried else {}
    if wanted.tokenizer is not None:
        tokenizer = _read_tokenizer(wanted.tokenizer)
    if not tokenizer:
        raise CannotExport(
            f"{store.uri}/{wanted.folder}: the checkpoint carries no tokenizer: give the folder of one by --tokenizer"
        )
    return Blueprint(config=config, generation=carried.generation if carried else {}, tokenizer=tokenizer)


def _read_config(path: Path) -> Mapping[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CannotExport(f"--config {file}: {error}; expected a config.json of transformers") from error
    if not isinstance(config, dict):
        raise CannotExport(f"--config {file}: {config!r}, expected an object with model_type and architectures")
    return config


def _read_tokenizer(path: Path) -> dict[str, bytes]:
    try:
        found = {each.name: each.read_bytes() for each in sorted(path.iterdir()) if is_of_a_tokenizer(each.name)}
    except OSError as error:
        raise CannotExport(f"--tokenizer {path}: {error.strerror}; expected a folder with tokenizer files") from error
    if not found:
        raise CannotExport(f"--tokenizer {path}: no tokenizer.json or other tokenizer file in it")
    return found


def _planned(manifest: Manifest, blueprint: Blueprint, wanted: Wanted) -> tuple[WeightFile, ...]:
    """The files of an export that will load, or what stands against it."""
    entries = {name.removeprefix(_MODEL): entry for name, entry in manifest.tensors.items() if name.startswith(_MODEL)}
    try:
        names, problems = names_to_write(blueprint.config, {name: entry.shape for name, entry in entries.items()})
        if problems:
            more = f"\n  and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
            shown = "\n  ".join(problems[:_SHOWN_PROBLEMS])
            raise CannotExport(
                f"the configuration is not that of this model:\n  {shown}{more}\ngive the right config.json by --config"
            )
        return plan_files(
            [
                Weight(name=name, dtype=_written_as(entries[name].dtype, wanted.dtype), shape=entries[name].shape)
                for name in names
            ],
            wanted.file_bytes,
        )
    except UnknownArchitecture as error:
        raise CannotExport(
            f"{error}; give a config.json of an architecture that transformers has by --config, or upgrade transformers"
        ) from error
    except UnknownType as error:
        raise CannotExport(f"{error}; choose another by --dtype") from error


def _written_as(saved: str, asked: str | None) -> str:
    return asked if asked is not None and torch_dtype(saved).is_floating_point else saved


# ---------------------------------------------------------------- writing
def _write_weights(
    path: Path, file: WeightFile, store: Store, manifest: Manifest, folder: str, advance: Callable[[int], None]
) -> None:
    """One file. In memory are one batch of tensors as saved, and one tensor as written."""
    with path.open("wb") as out:
        out.write(file.header)
        for batch in batches(file, BATCH_BYTES):
            entries = {each.name: manifest.tensors[_MODEL + each.name] for each in batch}
            tensors = {
                name: torch.empty(entry.shape, dtype=torch_dtype(entry.dtype)) for name, entry in entries.items()
            }
            load(store, folder, manifest, {_MODEL + name: tensor for name, tensor in tensors.items()}, lambda: None)
            for each in batch:
                tensor = tensors.pop(each.name).to(torch_dtype(each.dtype))
                out.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                advance(each.bytes)
        _to_disk(out)


def _companions(
    blueprint: Blueprint, files: tuple[WeightFile, ...], store: Store, manifest: Manifest, wanted: Wanted
) -> dict[str, bytes]:
    """All but the weights."""
    kinds = {each.dtype for file in files for each in file.weights if torch_dtype(each.dtype).is_floating_point}
    config = {**blueprint.config, **({"dtype": kinds.pop()} if len(kinds) == 1 else {})}
    origin = {
        "checkpoint": f"{store.uri}/{wanted.folder}",
        "run": manifest.run,
        "run_uid": manifest.run_uid,
        "attempt": manifest.attempt,
        "step": manifest.step,
        "tokens": manifest.tokens,
    }
    plain: dict[str, Mapping[str, Any]] = {"config.json": config, "mend.json": origin}
    if blueprint.generation:
        plain["generation_config.json"] = blueprint.generation
    if len(files) > 1:
        plain[INDEX_NAME] = index_of(files)
    told = {name: json.dumps(content, indent=2).encode() + b"\n" for name, content in plain.items()}
    return {**told, **blueprint.tokenizer}


@contextmanager
def _made_whole(target: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder to write into, which becomes `target` if all went well, and is gone if not."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CannotExport(f"--to {target}: there is something already: remove it or name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if needed_bytes + _SLACK_BYTES > free:
        raise CannotExport(
            f"--to {target}: {decimal(needed_bytes)} needed, {decimal(free)} free: make room, name a folder on another "
            "disk, or halve it by --dtype bfloat16"
        )
    partial = target.with_name(f".{target.name}.unfinished")
    with _alone_in(partial):
        try:
            yield partial
            sync_folder(partial)
            partial.rename(target)
            sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """The folder, empty, and nobody else in it; the kernel gives the lock back when its holder dies."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotExport(f"{folder}: another export is writing there: wait for it, or end it") from None
        for left_behind in folder.iterdir():
            left_behind.unlink()
        yield
    finally:
        os.close(descriptor)


def _durable(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        _to_disk(file)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _of_the_disk(target: Path, error: OSError) -> str:
    remedy = (
        "make room or name a folder on another disk"
        if error.errno in (errno.ENOSPC, errno.EDQUOT)
        else ("name a folder that you may write to")
    )
    return f"--to {target}: {error.strerror or error}; {remedy}"


@contextmanager
def _shown(files: tuple[WeightFile, ...]) -> Iterator[Callable[[int], None]]:
    """A bar for people at a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("weights", total=sum(each.bytes for file in files for each in file.weights))
        yield lambda done: progress.advance(task, done)
