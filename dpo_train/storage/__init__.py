"""Object storage behind ``s3://``, through s3fs: small, synchronous functions that retry and say what is wrong.

    paths      addresses as text
    failures   pure: what an error of the server or the network means, and how long to wait before the next attempt
    client     options of this process, the one client, and ``ask``, which is the only place that retries
    objects    look at, read, write and delete objects
    transfer   whole files, down and up
    mirror     a folder at s3:// with a local copy

Every function here takes an ``s3://`` address unless it says otherwise. All of them raise

    StoreError                credentials, permission, a missing bucket or object: at once, in one line
    StorageUnavailableError   the same request failed ``attempts`` times in a way that may pass
    MissingPackageError       s3fs is not installed

Objects are whole or absent, and nothing relies on a listing for an object that this process did not find by one.
"""

from __future__ import annotations

from dpo_train.errors import StorageUnavailableError
from dpo_train.storage.client import Options, cache_folder, options, use
from dpo_train.storage.mirror import Mirror
from dpo_train.storage.objects import (
    Entry,
    check_access,
    delete,
    find_bytes,
    glob,
    info,
    list_files,
    open_input,
    read_bytes,
)
from dpo_train.storage.paths import is_remote, join, name_of
from dpo_train.storage.transfer import download, upload, write_bytes

__all__ = [
    "Entry",
    "Mirror",
    "Options",
    "StorageUnavailableError",
    "cache_folder",
    "check_access",
    "delete",
    "download",
    "find_bytes",
    "glob",
    "info",
    "is_remote",
    "join",
    "list_files",
    "name_of",
    "open_input",
    "options",
    "read_bytes",
    "upload",
    "use",
    "write_bytes",
]
