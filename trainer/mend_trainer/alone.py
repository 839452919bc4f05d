"""A run that no controller looks after: which attempt it is and what it may restore, from the store's listing alone."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

import torch.distributed as dist
from torch._C._distributed_c10d import Store as Counters

from mend.keys import MANIFEST_NAME, QUARANTINE_NAME, parse_folder, split_key
from mend.manifest import Manifest, UnreadableManifest, decode_manifest
from mend.orders import CheckpointPlan, Launch, decode_launch
from mend.protocol import encode
from mend.states import CheckpointRef
from mend.store import Store, open_store
from mend_trainer.checkpoint.signing import key_of

RUN: Final = "alone"
_LAUNCH_KEY: Final = "mend/launch"
_MOST_CANDIDATES: Final = 5


def launch_alone(plan: CheckpointPlan | None, counters: Counters | None) -> Launch:
    """The order that nobody gave: the next attempt of the run at `plan`'s prefix. All ranks get the same one."""
    if counters is None:
        return _make_launch(plan, world_size=1)
    if dist.get_rank() == 0:
        launch = _make_launch(plan, dist.get_world_size())
        counters.set(_LAUNCH_KEY, encode(launch).decode())
        return launch
    return decode_launch(counters.get(_LAUNCH_KEY))


def next_attempt(store: Store) -> tuple[int, tuple[CheckpointRef, ...]]:
    """The number of a new attempt, and what it may restore, newest first: the line of the last attempt that saved."""
    committed: dict[str, CheckpointRef] = {}
    spoilt: set[str] = set()
    for entry in store.list("step-"):
        if place := split_key(entry.key):
            folder, name = place
            if name == QUARANTINE_NAME:
                spoilt.add(folder)
            elif name == MANIFEST_NAME:
                named = parse_folder(folder)
                committed[folder] = CheckpointRef(uri=f"{store.uri}/{folder}", step=named.step, attempt=named.attempt)
    if not committed:
        return 1, ()
    newest_first = sorted(
        committed, key=lambda prefix: (committed[prefix].attempt, committed[prefix].step), reverse=True
    )
    head, manifest = _first_trusted(store, newest_first)
    last_steps = {link.attempt: link.step for link in manifest.lineage}
    last_steps[committed[head].attempt] = committed[head].step
    line = [
        ref for prefix, ref in committed.items() if prefix not in spoilt and ref.step <= last_steps.get(ref.attempt, -1)
    ]
    best_first = sorted(line, key=lambda ref: (ref.step, ref.attempt), reverse=True)
    return committed[newest_first[0]].attempt + 1, tuple(best_first[:_MOST_CANDIDATES])


def _first_trusted(store: Store, prefixes: Sequence[str]) -> tuple[str, Manifest]:
    """The first whose manifest is sound, and signed if it has to be; raises what is wrong with the last if none is."""
    key = key_of(RUN)
    for prefix in prefixes[:-1]:
        with contextlib.suppress(UnreadableManifest):
            return prefix, decode_manifest(store.get(f"{prefix}/{MANIFEST_NAME}"), key)
    return prefixes[-1], decode_manifest(store.get(f"{prefixes[-1]}/{MANIFEST_NAME}"), key)


def _make_launch(plan: CheckpointPlan | None, world_size: int) -> Launch:
    attempt, restore = next_attempt(open_store(plan.uri, plan.endpoint)) if plan else (1, ())
    return Launch(
        attempt=attempt,
        world_size=world_size,
        first_rank=0,
        ranks=world_size,
        workers=1,
        master_addr="",
        master_port=0,
        run=RUN,
        restore=restore,
        checkpoint=plan,
    )
