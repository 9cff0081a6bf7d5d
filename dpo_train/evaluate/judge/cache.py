"""Replies that were paid for once: a small file for each, named by all that decides the reply."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_train.disk import write_atomically
from dpo_train.errors import StoreError


class ReplyCache:
    """``<folder>/<two digits>/<digest>.json``. Several processes may use it: a file is whole or absent."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, request: Mapping[str, Any]) -> str | None:
        """The reply to a request. A file that is damaged, or holds another request, counts as absent."""
        try:
            content = json.loads(self._file(request).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        is_whole = isinstance(content, dict) and content.get("request") == request
        reply = content.get("reply") if is_whole else None
        return reply if isinstance(reply, str) else None

    def put(self, request: Mapping[str, Any], reply: str) -> None:
        """Keeps a reply.

        Raises:
            StoreError: the folder cannot be written.
        """
        file = self._file(request)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps({"request": request, "reply": reply}))
        except OSError as error:
            raise StoreError(
                f"The judge's reply cannot be kept in {self._folder}: {error.strerror}",
                fix="free some space there, or set storage.cache to a folder of yours",
            ) from error

    def _file(self, request: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        return self._folder / digest[:2] / f"{digest}.json"
