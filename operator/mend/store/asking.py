"""How a service is asked: within the budget, counted, its errors translated, and again where that can help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from mend.store.budget import RequestBudget
from mend.store.retry import until
from mend.store.s3_errors import translate
from mend.store.usage import Kind, Meter

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """Shared by everything that asks the same store."""

    deadline_seconds: float
    budget: RequestBudget
    meter: Meter = field(default_factory=Meter)

    def __call__(
        self, kind: Kind, where: str, ask: Callable[[], Answer], *, sent: int = 0, received: int = 0
    ) -> Answer:
        """The answer; raises the `StoreError` that the last try met. `sent` and `received` are bytes of content."""
        tries = 0

        def translated() -> Answer:
            nonlocal tries
            tries += 1
            waited_seconds = self.budget.take()
            self.meter.count(kind, again=tries > 1, sent=sent, received=received, waited_seconds=waited_seconds)
            try:
                return ask()
            except (ClientError, BotoCoreError, HTTPError, FileNotFoundError, PermissionError) as error:
                raise translate(error, where) from error

        return until(self.deadline_seconds, translated)
