"""What restoring comes to: the state that was restored, or the error that says why none could be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mend.states import Ancestor, CheckpointRef


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredState:
    """What came with the tensors of a restored checkpoint.

    `lineage` is that of the attempt that restored: the checkpoint's own ancestors and the checkpoint itself.
    `absent` names the tensors below `ranks` that the checkpoint does not hold since fewer ranks made it, and states
    of the optimizer that did not exist yet; they keep the values they had.
    """

    ref: CheckpointRef
    step: int
    tokens: int
    world_size: int
    lineage: tuple[Ancestor, ...]
    values: dict[str, Any] = field(default_factory=dict)
    absent: tuple[str, ...] = ()


class CheckpointsUnreadable(RuntimeError):
    """The run has checkpoints, and none of the candidates could be restored (exit code STORAGE)."""


class MisfitError(ValueError):
    """The checkpoint belongs to another model; `problems` has one sentence per tensor. Trying again cannot help."""

    mend_fatal = True

    def __init__(self, uri: str, problems: tuple[str, ...]) -> None:
        shown = "\n  ".join(problems[:50]) + (f"\n  and {len(problems) - 50} more" if len(problems) > 50 else "")
        super().__init__(
            f"{uri} does not fit this model ({len(problems)} tensors):\n  {shown}\n"
            "Restore the model's configuration, or start the new model under another checkpoint prefix."
        )
        self.problems = problems
