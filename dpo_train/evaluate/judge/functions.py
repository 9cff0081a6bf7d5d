"""Finding the Python function that a config names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from dpo_train.errors import ConfigError, first_line

_IMPORTED: dict[str, bytes] = {}
"""What the file of each module held when it was imported here."""

EXPECTED = "evaluate.judge.function=package.module:name"


def module_of(function: str) -> str:
    """The module part of ``package.module:name``, with the current folder on the path, as ``python -m`` has it.

    Raises:
        ConfigError: it is not of that form.
    """
    module, _, name = function.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise ConfigError("The judge's function cannot be read", got=repr(function), expected=EXPECTED)
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
    return module


def _fresh(name: str) -> ModuleType:
    """The module as its file is now: a notebook imports once and edits often, and the file's digest names the judge."""
    module = importlib.import_module(name)
    file = Path(module.__file__) if module.__file__ else None
    content = file.read_bytes() if file is not None and file.is_file() else b""
    if _IMPORTED.setdefault(name, content) != content:
        module = importlib.reload(module)
        _IMPORTED[name] = content
    return module


def find(function: str) -> Callable[..., Any]:
    """The function behind ``package.module:name``.

    Raises:
        ConfigError: the module cannot be imported, or holds no function of that name.
    """
    name = module_of(function)
    try:
        module = _fresh(name)
    except Exception as error:  # whatever a person's module does while it is imported
        raise ConfigError(
            f"The judge's module {name} cannot be imported: {type(error).__name__}: {first_line(error)}",
            got=f"evaluate.judge.function={function}",
            fix=f"install it, or start the command in the folder that holds it (now {Path.cwd()})",
        ) from error
    found: Any = module
    for part in function.partition(":")[2].split("."):
        found = getattr(found, part, None)
    if callable(found):
        return cast(Callable[..., Any], found)
    raise ConfigError(
        f"The judge's module {name} holds no function {function.partition(':')[2]}",
        got=f"evaluate.judge.function={function}, {type(found).__name__}",
        expected=EXPECTED,
    )
