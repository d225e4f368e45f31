"""Settings every test shares: property tests draw the same examples each run, and a slow machine fails none."""

from __future__ import annotations

import gc
import signal

from hypothesis import settings

# Started in the background of a script, this process has SIGINT ignored, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """What collecting left stays to the end: the collector of garbage needn't look at it again and again."""
    gc.freeze()
