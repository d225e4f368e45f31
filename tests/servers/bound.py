"""Server processes that end with whoever started them, in whatever way that ends."""

from __future__ import annotations

import shutil
from collections.abc import Sequence


def bound(command: Sequence[str]) -> list[str]:
    """`command` so that the kernel kills it with the thread that starts it, also when that gets no chance to.

    Where there is no util-linux it stays as it is.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--", *command] if setpriv else [*command]
