"""Names of a package that are imported from their modules when they are first used.

Most processes and commands need few of them; to make the classes of all takes a fifth of a short command.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def at_first_use(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's __getattr__.

    Args:
        package: its name.
        homes: each name's module in it; none is called as the module, which takes the name when it is imported.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, found)
        return found

    return find
