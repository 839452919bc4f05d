"""The question asked of every store before anything relies on it: does it do what mend needs?"""

from __future__ import annotations

import uuid

from mend.store.api import Probe, Store
from mend.store.errors import AlreadyExists, WrongAnswer


def probe(store: Store) -> Probe:
    """List, write, read and remove an object of a name that nobody else uses; see whether conditions are honoured."""
    next(store.list("", delimiter="/"), None)
    key = f".mend-probe-{uuid.uuid4().hex}"
    first, second = b"mend asks whether this store", b"honours conditional writes"
    store.put(key, first)
    try:
        if store.get(key) != first:
            raise WrongAnswer(f"{store.uri}/{key}", "does not return the bytes that were just written")
        try:
            store.put_if_absent(key, second)
        except AlreadyExists:
            return Probe(conditional_writes=True)
        return Probe(conditional_writes=False)
    finally:
        store.delete([key])
