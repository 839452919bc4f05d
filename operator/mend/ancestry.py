"""Pure: whether a checkpoint fits those that it came from, as their manifests tell."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from mend.manifest import Manifest
from mend.states import Ancestor


def chain_doubts(manifest: Manifest, others: Sequence[Manifest]) -> tuple[str, ...]:
    """In what a checkpoint does not fit its ancestors, as far as these are still there.

    An ancestor that is gone proves nothing: retention deletes, and a state may have been handed on in memory.
    """
    doubts: list[str] = []
    here = Ancestor(attempt=manifest.attempt, step=manifest.step, uid=manifest.run_uid)
    for before, after in itertools.pairwise((*manifest.lineage, here)):
        if before.attempt >= after.attempt or before.step > after.step:
            doubts.append(f"its lineage goes from {_named(before)} to {_named(after)}")
    for place, link in enumerate(manifest.lineage):
        kin = [each for each in others if _is(link, each)]
        if kin and not any(_same(each.lineage, manifest.lineage[:place]) for each in kin):
            doubts.append(f"its ancestor {_named(link)} tells of other ancestors than it does")
    return tuple(doubts)


def gone_ancestors(manifest: Manifest, others: Sequence[Manifest]) -> tuple[Ancestor, ...]:
    """Ancestors of which no checkpoint is left."""
    return tuple(link for link in manifest.lineage if not any(_is(link, each) for each in others))


def is_stale(manifest: Manifest, before: Manifest) -> bool:
    """Whether the model of a later step is byte for byte that of an earlier one: then a buffer was saved twice.

    Only checkpoints that are cut into the same chunks can be compared.
    """
    if manifest.step <= before.step:
        return False
    model = _model_digests(manifest)
    return bool(model) and model == _model_digests(before)


def _model_digests(manifest: Manifest) -> dict[tuple[str, tuple[int, ...], tuple[int, ...]], str]:
    return {
        (name, chunk.offsets, chunk.sizes): chunk.digest
        for name, entry in manifest.tensors.items()
        if name.startswith("model.")
        for chunk in entry.chunks
    }


def _is(link: Ancestor, other: Manifest) -> bool:
    return (other.attempt, other.step) == (link.attempt, link.step) and link.uid in ("", other.run_uid)


def _same(one: Sequence[Ancestor], other: Sequence[Ancestor]) -> bool:
    return len(one) == len(other) and all(
        (a.attempt, a.step) == (b.attempt, b.step) and (a.uid == b.uid or "" in (a.uid, b.uid))
        for a, b in zip(one, other, strict=True)
    )


def _named(link: Ancestor) -> str:
    return f"step {link.step} of attempt {link.attempt}"
