"""What a state that does not belong to this program is answered with: what differs, and what to do."""

from __future__ import annotations


class StateMisfit(ValueError):
    """A restored state is of something else than what this program holds. Trying again cannot help."""

    mend_fatal = True
