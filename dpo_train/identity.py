"""What names an output: its stage, config and inputs, and the code that made it; never time or place."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# What only shows or moves results is not part of what computes them.
_PRESENTATION = {
    "cli", "cluster", "planning", "progress.py", "tracking", "launch.py", "launching.py", "resolving.py", "retrain.py",
    "notify.py", "describe.py", "runs.py", "storage", "recipes",
}  # fmt: skip


@functools.cache
def code_version() -> str:
    """Package version and a digest of every source file that can change a result."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if relative.parts[0] not in _PRESENTATION:
            digest.update(f"{relative}\0".encode() + path.read_bytes() + b"\0")
    return f"{importlib.metadata.version('dpo-train')}+{digest.hexdigest()[:12]}"


def identity(stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The digest that names an output: content and config only, never time or place."""
    content = {"stage": stage, "config": config, "inputs": inputs, "code": code_version()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def library_versions() -> dict[str, str]:
    """Versions of the libraries that take part in the numbers. They are recorded, not part of the identity."""
    found = {}
    for name in ("torch", "transformers", "peft", "ray", "pyarrow", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What differs between two nested mappings, each as a sentence."""
    for key in sorted(set(found) | set(wanted)):
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{prefix}{key}.")
        elif old != new and key != "digest":
            yield f"{prefix}{key} was {old!r}, is now {new!r}"
