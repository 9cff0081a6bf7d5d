"""`dpo export`: a trained or registered model as a plain Hugging Face folder."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_train import launch, storage
from dpo_train.artifacts import Artifact, open_artifact
from dpo_train.cli.quiet import quiet
from dpo_train.config import RunConfig, load_config
from dpo_train.errors import ConfigError, UserError

if TYPE_CHECKING:
    from dpo_train.named_models import NamedModel

HELP = "write a trained or registered model as a plain Hugging Face folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What stands between the config and its overrides."""
    parser.add_argument("folder", help="where to: an empty folder or a new one, here or at s3://")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--from",
        dest="policy",
        metavar="DIR",
        help="output folder of train (default: the champion, else the challenger)",
    )
    source.add_argument("--version", type=int, metavar="N", help="number of a registered version instead")
    source.add_argument("--alias", help="alias of a registered version instead")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights, bfloat16 being half as large (default: as stored; what was trained is float32)",
    )
    parser.add_argument("--gguf", action="store_true", help="also a GGUF file, by llama.cpp's converter on the PATH")
    parser.add_argument("--push", metavar="ORG/NAME", help="push the folder to this repository of the Hugging Face hub")
    parser.add_argument("--public", action="store_true", help="make a repository that --push creates a public one")


def export(arguments: argparse.Namespace) -> int:
    """Writes the folder, and says from what."""
    from dpo_train import export as exporting
    from dpo_train.stages.prepare_inputs import chat_template
    from dpo_train.stages.register import answer_ends

    # Terminated, it leaves as little behind as interrupted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = load_config(arguments.config, arguments.overrides)
    launch.use_storage(config)
    if arguments.public and arguments.push is None:
        raise ConfigError("--public is about what --push creates", fix="add --push ORG/NAME, or leave it out")
    hub = None if arguments.push is None else exporting.Hub(repository=arguments.push, public=arguments.public)
    target = _absolute(arguments.folder)
    policy = None if arguments.policy is None else open_artifact(_absolute(arguments.policy), "train")
    with quiet():
        sizes = exporting.export(
            _source(config, policy, arguments),
            target,
            dtype=arguments.dtype,
            gguf=arguments.gguf,
            hub=hub,
            chat_template=chat_template(config),
            end_ids=() if policy is None else answer_ends(config, policy, _tell),
            tell=_tell,
        )
    print(f"wrote {target}: {len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB")
    return 0


def _tell(line: str) -> None:
    print(line, flush=True)


def _source(config: RunConfig, policy: Artifact | None, arguments: argparse.Namespace) -> NamedModel:
    from dpo_train import named_models, registry
    from dpo_train.tracking import TrackingError

    if policy is not None:
        return named_models.of_training(config, policy)
    launch.check_tracking(config)
    if arguments.version is not None or arguments.alias is not None:
        return named_models.registered(config, arguments.alias or str(arguments.version))
    try:
        return named_models.registered(config, registry.CHAMPION)
    except TrackingError:
        raise
    except UserError:  # no champion yet
        return named_models.registered(config, config.register.alias)


def _absolute(path: str) -> str:
    return path if storage.is_remote(path) else str(Path(path).resolve())
