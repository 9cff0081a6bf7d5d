"""The ``dpo`` command: parse, build, run.

main -> parser -> commands.<name>(arguments) -> exit code
console: what a person sees;   garbage: outputs that no run refers to;   templates: dpo init
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dpo_train.cli.parser import build_parser
from dpo_train.errors import DpoError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 success, 1 failed run, 2 user's mistake, 3 refused by the gate."""
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    # argparse takes overrides only before the first option; people write them anywhere.
    strangers = [text for text in rest if text.startswith("-") or "=" not in text]
    if strangers or (rest and not hasattr(parsed, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strangers or rest)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    try:
        return int(parsed.command(parsed))
    except DpoError as error:
        print(f"dpo: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 1
    except OSError as error:
        print(f"dpo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dpo: interrupted", file=sys.stderr)
        return 130
