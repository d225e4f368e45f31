"""What an agent sees beside its workers' beacons, and tells with each sign of life: peers, stores, GPUs, ends of processes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from urllib.parse import unquote, urlsplit

from ray_dr.actors.endings import Endings
from ray_dr.actors.examination import Examination
from ray_dr.actors.gpus import Xids
from ray_dr.actors.peers import Peers
from ray_dr.model import codec
from ray_dr.model.journal import Where
from ray_dr.stores.base import Store
from ray_dr.stores.seen import Seen
from ray_dr.stores.wire import Header


class Witness:
    """Of one agent.

    disk   URL of the node's own directory first, as the agent's; without such a tier empty
    store  the job's
    """

    def __init__(self, node: str, token: bytes, disk: Sequence[str], store: Callable[[], Store]) -> None:
        directory = unquote(urlsplit(disk[0]).path) if disk else tempfile.gettempdir()
        self.peers, self.xids, self.endings = Peers(token), Xids(), Endings()
        self.examination = Examination(node, store, directory, token)
        self.stores: list[Seen] = []

    def seen(self, store: Store, where: Where) -> Store:
        """The store, from now on counted."""
        self.stores.append(counted := Seen(store, str(where)))
        return counted

    def add_to(self, beat: Header) -> Header:
        """A sign of life, with what has been seen since the last one."""
        self.endings.count()
        stores = tuple(seen for each in tuple(self.stores) if (seen := each.take()) is not None)
        found = {"peers": self.peers.heard(), "xids": self.xids.take(), "stores": stores}
        return {**beat, **{name: codec.to_json(said) for name, said in found.items() if said}}

    def close(self) -> None:
        """See nothing any more."""
        self.peers.close()
        self.xids.close()
        self.endings.close()
