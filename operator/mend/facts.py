"""Facts: what thinking works on, frozen and alike in Python, in the CR and in the journal.

A fact turns into JSON and back, so that a line of the journal holds a whole decision.
`now` and every `..._at` are seconds since the epoch by the controller's clock; ages are in seconds.
"""

from __future__ import annotations

import msgspec


class Fact(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """Base of all facts: immutable, keyword-only, written in the API's camelCase with defaults left out."""
