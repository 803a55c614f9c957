"""Rules by their names and classes."""

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from mmfast.resolvers.base import Resolver, Rule

ResolverLike = Resolver | str | type[Resolver]  # what every function that takes a resolver takes

_by_name: dict[str, type[Resolver]] = {}


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def register(rules: Iterable[type[Resolver]]) -> None:
    """Makes the built-in rules known by name; resolvers/__init__.py calls it, for rules of rules ask for others by name themselves."""
    _by_name.update({_plain(rule.__name__): rule for rule in rules})


def resolver(name: str, **kwargs: Any) -> Resolver:
    """Makes a resolver by its name, with its hyper-parameters as keyword arguments; case, dashes and underscores don't matter.

    Raises:
        ValueError: no rule has that name, or one like it.
        TypeError: the rule needs arguments that were not given.

    >>> mf.resolver("imtl-g")
    IMTLG()
    >>> mf.resolver("cagrad", c=0.4)
    CAGrad(c=0.4, rescale=0)
    """
    if not isinstance(name, str):
        raise TypeError(f"name is {_words(name)}, expected a str, such as 'mgda'")
    rule = _by_name.get(_plain(name))
    if rule is None:
        near = [_by_name[match].__name__ for match in difflib.get_close_matches(_plain(name), _by_name)]
        known = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(r.__name__ for r in _by_name.values())}"
        raise ValueError(f"there is no resolver {name!r}; {known}")
    return _make(rule, _words(name), kwargs)


def _make(rule: type[Resolver], what: str, kwargs: dict[str, Any]) -> Resolver:
    """An instance; `what` is how it was asked for."""
    parameters = inspect.signature(rule).parameters.values()
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in kwargs
    ]
    if needed:
        raise TypeError(
            f"resolver is {what}, and {rule.__name__} needs arguments; expected an instance: mf.{rule.__name__}({', '.join(needed)}), "
            f"or, where each block makes its own, lambda: mf.{rule.__name__}({', '.join(needed)})"
        )
    return rule(**kwargs)


def _words(rule: object) -> str:
    """What was given for a resolver, as an error says it."""
    return (
        f"the name {rule!r}"
        if isinstance(rule, str)
        else f"the class {rule.__name__}"
        if isinstance(rule, type)
        else f"a {type(rule).__name__}"
    )


def instance_of(rule: ResolverLike, k: int) -> Resolver:
    """The resolver of one call of k gradients, from an instance, a name or a class."""
    if isinstance(rule, Resolver):
        return rule
    made = made_of(rule)
    if made.keeps_state(k):
        raise ValueError(
            f"resolver is {_words(rule)}, which keeps state from call to call; expected an instance made once, such as "
            f"mf.{type(made).__name__}(), or an ImpartialityBlock"
        )
    return made


def made_of(rule: ResolverLike) -> Resolver:
    """The resolver that a module keeps, from an instance, a name or a class."""
    if isinstance(rule, str):
        return resolver(rule)
    if isinstance(rule, type) and issubclass(rule, Resolver) and rule not in (Resolver, Rule):
        return _make(rule, _words(rule), {})
    if not isinstance(rule, Resolver):
        raise TypeError(f"resolver is {_words(rule)}, expected an instance of mmfast.Resolver, or the name or class of one")
    return rule
