"""The supervisor's ear at one node agent: a thread that reads its reports and notices at once when they end."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from typing import Any

from ray_dr.errors import StoreError
from ray_dr.stores.wire import Connection, connect

Message = dict[str, Any]


WAIT_SHARE = 0.1
"""Of a recovery point objective, what a save may wait so that training is not slowed."""


class Watch:
    """Calls `heard(node, messages, last)` for every report and `lost(node, how)` once, when the agent is gone or silent.

    overhead, rpo_s   the job's: by them the agent's background work gives way to training
    """

    def __init__(self, node: str, address: str, token: bytes, *, silent_s: float, overhead: float, rpo_s: float,
                 heard: Callable[[str, list[Message], int], None], lost: Callable[[str, str], None]) -> None:  # fmt: skip
        self.node, self._heard, self._lost = node, heard, lost
        self._silent_s = silent_s
        self._closed = False
        self._connection: Connection = connect(address, token)
        self._connection.timeout(silent_s)
        wait_most_s = rpo_s * WAIT_SHARE if rpo_s < math.inf else None
        self._connection.send({"op": "watch", "overhead": overhead, "wait_most_s": wait_most_s})
        threading.Thread(target=self._listen, name=f"watch-{node[:8]}", daemon=True).start()

    def ack(self, last: int) -> None:
        """The journal has everything up to message `last`: the agent may forget it."""
        with contextlib.suppress(StoreError):  # the listening thread tells of it
            self._connection.send({"ack": last})

    def close(self) -> None:
        """Stop listening; `lost` is not called."""
        self._closed = True
        self._connection.close()

    def _listen(self) -> None:
        how = "connection closed"
        try:
            while True:
                header, _ = self._connection.receive()
                self._heard(self.node, header["messages"], header["last"])
        except StoreError as error:
            if "timed out" in str(error):
                how = f"silent for {self._silent_s:g} s"
        if not self._closed:
            self._lost(self.node, how)
