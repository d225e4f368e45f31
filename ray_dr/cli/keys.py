"""`ray-dr keys`."""

from __future__ import annotations

import click


@click.group("keys")
def command() -> None:
    """The keys of an encrypted store (one whose URL says ?key=...)."""


@command.command("rotate")
@click.option("--store", required=True, metavar="URL", help="The store, with the key that opens it now: ...?key=env:OLD")
@click.option("--to", required=True, metavar="SOURCE", help="The new key: env:NAME, file:/path or kms:<id>.")
def rotate(store: str, to: str) -> None:
    """Wrap the store's data keys with another key. Data are neither read nor written; the old key opens nothing then.

    Cut off in the middle, the store opens with one of the two keys; rotating again completes it.
    """
    from ray_dr.stores.open import rotate_key

    count = rotate_key(store, to)
    click.echo(f"{count} data key{'' if count == 1 else 's'} wrapped anew: the store opens with {to} from now on")
