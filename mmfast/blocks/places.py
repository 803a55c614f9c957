"""Losses that come by name, for rules that know them by their places only: the same loss has the same place at every call."""

from weakref import WeakKeyDictionary

from mmfast.resolvers.base import Resolver

_first: WeakKeyDictionary[Resolver, tuple[str, ...]] = WeakKeyDictionary()  # the names of a rule's first call, in order


def in_order(names: tuple[str, ...], resolver: Resolver) -> tuple[str, ...]:
    """The names in the order of the rule's first call: what it keeps, prefers and draws goes by places.

    Raises:
        ValueError: other names than those that the rule keeps something of.
    """
    first = _first.setdefault(resolver, names)
    if first == names:
        return names
    if set(first) == set(names):
        return first
    if any(not name.endswith("rng") for name, _ in resolver.named_buffers()):
        raise ValueError(
            f"losses has the names {', '.join(names)}, but {resolver!r} keeps what it saw of {', '.join(first)}; expected these, None for a loss that is "
            "missing; or call reset() on the rule to begin anew"
        )
    _first[resolver] = names
    return names
