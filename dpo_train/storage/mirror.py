"""A folder with a local copy: stages and readers work on local files, wherever the folder lives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dpo_train.errors import StoreError
from dpo_train.storage.client import in_threads
from dpo_train.storage.paths import is_remote, join
from dpo_train.storage.transfer import download, upload

_THREADS = 4


@dataclass(frozen=True)
class Mirror:
    """A folder at ``home`` and its local copy at ``path``; both are the same where home is local. Never lists."""

    home: str
    """Where the folder lives: a local folder, or s3://."""
    path: Path
    """The local folder to read and write in."""

    @property
    def is_remote(self) -> bool:
        """Whether there are two folders at all."""
        return is_remote(self.home)

    def publish(self, *names: str) -> None:
        """Brings these files from the local folder home. The order is not kept: what depends on others comes later.

        Raises:
            StoreError: a file is not there, or home cannot be written.
        """
        for name in names:
            if not (self.path / name).is_file():
                raise StoreError(f"There is no file {self.path / name} to publish")
        if self.is_remote:
            in_threads([partial(upload, self.path / name, join(self.home, name)) for name in names], _THREADS)

    def fetch(self, name: str, *, size: int | None = None) -> Path:
        """The local file, downloaded if it is not here yet or has another size than this.

        Args:
            size: in bytes; None takes a file that is here as it is.

        Raises:
            StoreError: it is not at home either, or has another size there too.
        """
        file = self.path / name
        if self._is_here(file, size):
            return file
        if self.is_remote:
            download(join(self.home, name), file)
            if self._is_here(file, size):
                return file
        if not file.is_file():
            raise StoreError(f"There is no file {file}")
        raise StoreError(
            f"{join(self.home, name)} has another size than when it was made",
            got=f"{file.stat().st_size} bytes",
            expected=size,
            fix=f"remove {self.home} and run the stage that makes it again",
        )

    def fetch_all(self, sizes: Mapping[str, int]) -> None:
        """Several files at a time, each by its name with its size in bytes."""
        missing = [name for name, size in sizes.items() if not self._is_here(self.path / name, size)]
        in_threads([partial(self.fetch, name, size=sizes[name]) for name in missing], _THREADS)

    @staticmethod
    def _is_here(file: Path, size: int | None) -> bool:
        return file.is_file() and size in {None, file.stat().st_size}
