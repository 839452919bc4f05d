"""The gang of tests/programs/injured.py with steps of `STEP_SECONDS`: faults on request, lengths as benchmarks want."""

from __future__ import annotations

import os
import sys
import time

from with_tests import TESTS

from mend.heartbeats import Phase

sys.path.append(str(TESTS / "programs"))

from injured import Injured


class Steady(Injured):
    """A rank whose steps last so long; what goes wrong goes wrong at their beginning."""

    seconds = float(os.environ["STEP_SECONDS"])

    def meet(self, fault: str) -> None:
        super().meet(fault)
        self.page.enter(Phase.STEP)
        time.sleep(self.seconds)


if __name__ == "__main__":
    Steady().train()
