"""How many examples a property test runs: its own number, twenty times as many in the long profile."""

from __future__ import annotations

import os

from hypothesis import settings

SCALE = 20 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 1


def examples(count: int) -> settings:
    return settings(max_examples=count * SCALE)
