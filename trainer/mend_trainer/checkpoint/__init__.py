"""Checkpoints of a rank: asynchronous, digested, committed by their manifest, restored only when proven."""

from mend_trainer.checkpoint.checkpointer import Checkpointer
from mend_trainer.checkpoint.outcome import CheckpointsUnreadable, MisfitError, RestoredState

__all__ = ["Checkpointer", "CheckpointsUnreadable", "MisfitError", "RestoredState"]
