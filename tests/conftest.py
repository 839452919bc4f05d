"""For all tests: CI tries the same examples each time, so that it judges the change; elsewhere they are drawn anew."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Ranks, savers and arenas of one test after the other live in this process; many systems grant 1,024 files at first.
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65_536) if most != resource.RLIM_INFINITY else 65_536, most))

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(autouse=True)
def no_saver_outlives_its_test() -> Iterator[None]:
    """Savers in threads hold their arenas, of some ten descriptors each; a thousand would use up the process's."""
    yield
    if module := sys.modules.get("saver_thread"):
        module.end_savers()
