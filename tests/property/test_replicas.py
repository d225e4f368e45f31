"""Who keeps whose copies: everybody the same number, never their own, in other domains where that can be."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ray_dr.recovery.replicas import replicas

NODES = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4),
    st.tuples(st.sampled_from(["", "r1", "r2"]), st.sampled_from(["", "z1", "z2", "z3"])),
    min_size=1,
    max_size=12,
)


@given(NODES, st.integers(1, 5))
def test_everybody_has_as_many_copies_as_it_keeps(domains: dict[str, tuple[str, ...]], copies: int) -> None:
    found = replicas(domains, copies)
    wanted = min(copies, len(domains)) - 1
    assert found.keys() == domains.keys()
    for node, keepers in found.items():
        assert len(set(keepers)) == len(keepers) == wanted
        assert node not in keepers
    kept = Counter(keeper for keepers in found.values() for keeper in keepers)
    assert all(kept[node] == wanted for node in domains)
    assert found == replicas(dict(reversed(domains.items())), copies)


@given(st.integers(2, 4), st.integers(1, 4), st.integers(2, 4))
def test_with_domains_of_equal_size_no_two_copies_share_one(zones: int, each: int, copies: int) -> None:
    domains = {f"n{zone}{number}": ("r", f"z{zone}") for zone in range(zones) for number in range(each)}
    for node, keepers in replicas(domains, copies).items():
        seen = [domains[name] for name in (node, *keepers)]
        assert len(set(seen)) >= min(copies, zones)


@given(NODES, st.integers(1, 5))
def test_no_other_shift_puts_fewer_copies_together(domains: dict[str, tuple[str, ...]], copies: int) -> None:
    ring = sorted(domains, key=lambda node: (domains[node], node))
    found = replicas(domains, copies)
    chosen = [(ring.index(keeper) - ring.index(ring[0])) % len(ring) for keeper in found[ring[0]]]
    for number, shift in enumerate(chosen):
        others = (0, *chosen[:number])

        def together(candidate: int, others: tuple[int, ...] = others) -> int:
            pairs = [(at + candidate, at + other) for at in range(len(ring)) for other in others]
            return sum(common(domains[ring[a % len(ring)]], domains[ring[b % len(ring)]]) for a, b in pairs)

        free = [other for other in range(1, len(ring)) if other not in chosen[:number]]
        assert shift == min(free, key=lambda candidate: (together(candidate), candidate))


def common(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """Levels with a name that two domains share, from the largest on."""
    shared = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        shared += mine != ""
    return shared


def test_a_rack_is_shared_rather_than_a_zone() -> None:
    domains = {"a1": ("r", "a", "k1"), "a2": ("r", "a", "k2"), "b1": ("r", "b", "k1"), "b2": ("r", "b", "k2")}
    assert all(domains[node][1] != domains[keepers[0]][1] for node, keepers in replicas(domains, 2).items())


def test_one_node_keeps_no_copies() -> None:
    assert replicas({"only": ()}, 3) == {"only": ()}
