"""The keys of objects in the store, below a run's prefix."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

OWNER_KEY: Final = "owner.json"
MANIFEST_NAME: Final = "manifest.json"
QUARANTINE_NAME: Final = "quarantine.json"
VERIFIED_NAME: Final = "verified.json"  # all that lies in the save's folder was read back and is right
PINNED_NAME: Final = "pinned.json"  # retention leaves the save alone
INCIDENTS_FOLDER: Final = "incidents"
ANNOUNCEMENTS_FOLDER: Final = "newest"
TOKENIZERS_FOLDER: Final = "tokenizers"  # their files, for exports, by the digests of their bytes
DCP_METADATA_NAME: Final = ".metadata"  # a pickle for other tools; never read by mend

SAVE_FOLDER: Final = r"step-(?P<step>\d{12})/(?P<attempt>\d{6,12})-(?P<save_id>[^/]+)"  # of every save, as a pattern
_SAVE_FOLDER: Final = re.compile(SAVE_FOLDER)
_OBJECT: Final = re.compile(rf"(?P<folder>{SAVE_FOLDER})/(?P<name>[^/]+)")
_LAST: Final = 10**12 - 1  # attempt and step that an announcement can tell
_ANNOUNCEMENT: Final = re.compile(rf"{ANNOUNCEMENTS_FOLDER}/(\d{{12}})-(\d{{12}})-([^/]+)")


class SaveName(NamedTuple):
    """What a save's folder is named by."""

    step: int
    attempt: int
    save_id: str


def checkpoint_key(step: int, attempt: int, save_id: str) -> str:
    """Key prefix of one save, relative to the run's prefix. Sorts by step; never reused."""
    return f"step-{step:012d}/{attempt:06d}-{save_id}"


def parse_folder(folder: str) -> SaveName:
    """What a `checkpoint_key` was made of; raises ValueError for anything else."""
    found = _SAVE_FOLDER.fullmatch(folder)
    if found is None:
        raise ValueError(f"{folder!r} is no folder of a save: expected step-STEP/ATTEMPT-SAVE")
    return SaveName(step=int(found["step"]), attempt=int(found["attempt"]), save_id=found["save_id"])


def split_key(key: str) -> tuple[str, str] | None:
    """The folder of the save that an object lies in, and the object's name there; None for what lies elsewhere."""
    found = _OBJECT.fullmatch(key)
    return (found["folder"], found["name"]) if found else None


def announcement_key(folder: str) -> str:
    """Key that announces the save in `folder` (a `checkpoint_key`): the newest attempt's newest step sorts first.

    Written before the manifest. Within a lineage a later attempt is further than the one before was when it was left.
    """
    step, attempt, save_id = parse_folder(folder)
    return f"{ANNOUNCEMENTS_FOLDER}/{_LAST - attempt:012d}-{_LAST - step:012d}-{save_id}"


def announced_folder(key: str) -> str:
    """The folder of the save that `key` announces; "" for a key that announces none."""
    found = _ANNOUNCEMENT.fullmatch(key)
    return checkpoint_key(_LAST - int(found[2]), _LAST - int(found[1]), found[3]) if found else ""


def share_name(rank: int) -> str:
    """Of the object, in a save's folder, that tells what one rank's snapshot has become there."""
    return f"share-{rank:06d}.json"


def incident_key(attempt: int, incident: int, run_uid: str) -> str:
    """Key of an incident's dossier, relative to the run's prefix: no listing of checkpoints finds it.

    The uid keeps apart the runs that have the prefix one after the other, each of which counts from one.
    """
    return f"{INCIDENTS_FOLDER}/{attempt:06d}-{incident:06d}-{run_uid[:8]}.json"
