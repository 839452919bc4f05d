"""Pure: the book of strikes that all runs share: who is in it, which nodes to keep away from, when to be lenient.

A strike says that a machine, and not what runs on it, was to blame for a recovery. A single one says little: machines
are rebooted. From `limit` strikes on, or one that is decisive, the node is excluded until enough of them have expired.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from mend.incidents import Strike

BURST_SECONDS = 600.0  # what one run says against a node within this time is one complaint
MAX_EXCLUDED = 64  # nodes: a pod that avoids more than that is beyond what a scheduler should be asked
MAX_BOOK = 1000  # strikes: a ConfigMap holds a megabyte


def counting(book: Iterable[Strike], node: str, now: float) -> tuple[Strike, ...]:
    """The strikes that count against this node now."""
    return tuple(each for each in book if each.node == node and not each.lifted and now < each.expires_at)


def is_excluded(book: Iterable[Strike], node: str, limit: int, now: float) -> bool:
    """Whether this node is to be kept away from."""
    against = counting(book, node, now)
    return len(against) >= limit or any(each.decisive for each in against)


def excluded(book: Sequence[Strike], limit: int, now: float) -> tuple[str, ...]:
    """The nodes to keep away from, those first whose last strike is newest."""
    last = {each.node: each.struck_at for each in sorted(book, key=lambda each: each.struck_at)}
    nodes = [node for node in last if is_excluded(book, node, limit, now)]
    return tuple(sorted(nodes, key=lambda node: (-last[node], node))[:MAX_EXCLUDED])


def struck(book: Sequence[Strike], strike: Strike) -> tuple[Strike, ...]:
    """The book with this strike in it; the same twice, or another of the same burst, counts once."""
    for each in book:
        if each.id == strike.id or _is_of_burst(each, strike):
            is_worse = strike.decisive and not each.decisive
            worse = replace(each, decisive=True, reason=strike.reason) if is_worse else each
            worse = replace(worse, presumed=each.presumed and strike.presumed)
            return tuple(worse if one is each else one for one in book)
    return (*book, strike)


def _is_of_burst(one: Strike, other: Strike) -> bool:
    same = (one.node, one.run) == (other.node, other.run)
    return same and abs(one.struck_at - other.struck_at) < BURST_SECONDS


def merged(book: Sequence[Strike], more: Iterable[Strike]) -> tuple[Strike, ...]:
    """The book with all of these in it."""
    for strike in more:
        book = struck(book, strike)
    return tuple(book)


def lifted(book: Iterable[Strike], ids: Sequence[str]) -> tuple[Strike, ...]:
    """The book in which these count no more. They stay, lest whoever gave them enters them again."""
    return tuple(replace(each, lifted=True) if each.id in ids else each for each in book)


def most_lenient(book: Sequence[Strike], nodes: Sequence[str], now: float) -> tuple[Strike, ...]:
    """The strikes against that one of these nodes whose last strike is oldest: to be lifted when nodes are short."""
    against = {node: found for node in nodes if (found := counting(book, node, now))}
    if not against:
        return ()
    return against[min(against, key=lambda node: (max(each.struck_at for each in against[node]), node))]


def kept(book: Iterable[Strike], now: float, most: int = MAX_BOOK) -> tuple[Strike, ...]:
    """The book without what has expired; the newest `most`."""
    living = sorted((each for each in book if now < each.expires_at), key=lambda each: (each.struck_at, each.id))
    return tuple(living[-most:])


def in_words(strike: Strike, now: float) -> str:
    """One strike for a person: 'node-1: node is not ready (run team/clio, 3 h ago, for another 21 h)'."""
    ago, left = (now - strike.struck_at) / 3600, max(0.0, strike.expires_at - now) / 3600
    word = "lifted" if strike.lifted else f"for another {left:.1f} h"
    return f"{strike.node}: {strike.reason} (run {strike.run}, {ago:.1f} h ago, {word})"
