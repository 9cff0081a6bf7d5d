"""The files of an evaluation's report: their names, and how to read one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo_train.errors import StoreError

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"

SCHEMA_VERSION = 2
"""Goes up when a key of report.json is renamed, removed or added, or means something else."""


def read_report(folder: Path) -> dict[str, Any]:
    """The report in ``folder``: ``findings``, ``verdict``, ``samples`` and ``identity``, as dpo_train.findings names
    their fields. A null in the place of a number: it is not finite, or there is nothing to measure.

    Raises:
        StoreError: there is no report, it is damaged, or it is of another schema version.
    """
    path = folder / REPORT_JSON
    again = "evaluate the policy again (`dpo evaluate`), with the version of dpo-train that is to read the report"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"The report {path} cannot be read: {error.strerror}", fix=again) from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise StoreError(f"The report {path} is damaged: {error}", fix=again) from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"The report {path} is of another schema version",
            got="none" if version is None else version,
            expected=SCHEMA_VERSION,
            fix=again,
        )
    if missing := {"findings", "verdict", "samples", "identity"} - content.keys():
        raise StoreError(f"The report {path} is damaged: it lacks {', '.join(sorted(missing))}", fix=again)
    return dict(content)
