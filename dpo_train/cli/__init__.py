"""The ``dpo`` command: parse, build, run.

main -> parser -> commands.<name>(arguments) -> exit code
console: what a person sees;   runs: folders of runs, and outputs that nothing refers to;   templates: dpo init
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dpo_train.cli.parser import build_parser
from dpo_train.errors import DpoError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 success, 1 failed run, 2 user's mistake, 3 refused by the gate."""
    parsed = build_parser().parse_args(arguments)
    try:
        return int(parsed.command(parsed))
    except DpoError as error:
        print(f"dpo: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print("dpo: interrupted", file=sys.stderr)
        return 130
