"""What a seed is broken by."""

from __future__ import annotations


class Breach(AssertionError):
    """Something that must hold did not."""


def must(holds: bool, what: str) -> None:
    """Raises Breach, saying what does not hold."""
    if not holds:
        raise Breach(what)
