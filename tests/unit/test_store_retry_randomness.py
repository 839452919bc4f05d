"""A store that stutters must not change what a training run draws."""

from __future__ import annotations

import random
from collections.abc import Iterator

from mend.store.errors import Unreachable
from mend.store.retry import until


def test_asking_again_draws_nothing_from_the_global_generator() -> None:
    """A retried request leaves `random` as it was, since its state is part of every checkpoint."""
    answers: Iterator[Exception | int] = iter([Unreachable("s3://b", "once", transient=True), 7])

    def ask() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    before = random.getstate()
    assert until(5.0, ask) == 7
    assert random.getstate() == before
