"""Stands in for torchvision, which MultiVae and LibMTL (whose release asks for one of 2021) import for data sets and pictures that nothing here needs."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


class Nothing(ModuleType):
    """A module in which every name is an empty class."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


for name in ("", ".datasets", ".datasets.utils", ".models", ".models.utils", ".transforms", ".utils"):
    module = Nothing(f"torchvision{name}")
    module.__spec__ = ModuleSpec(module.__name__, None)
    sys.modules[module.__name__] = module
