"""For all tests: CI tries the same examples each time, so that it judges the change; elsewhere they are drawn anew."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
