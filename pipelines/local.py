"""Runs the compiled pipeline on this machine, each task in a process of its own."""

import tempfile
from pathlib import Path

from dpo_train.errors import ConfigError, MissingPackageError
from pipelines.compile import PACKAGE


def run_local(config: str, run_name: str, package: Path = PACKAGE) -> None:
    """Runs dpo.yaml with kfp.local's SubprocessRunner, in this environment.

    Args:
        config: from ``dpo_train.config.to_text``, which writes it so that kfp.local leaves it alone.
        run_name: name of the MLflow run.

    Raises:
        MissingPackageError: kfp is not installed.
        RuntimeError: a task failed; its own events say why.
    """
    try:
        from kfp import components, local
    except ImportError:
        raise MissingPackageError("Kubeflow Pipelines is not installed", fix="pip install 'dpo-train[kfp]'") from None
    # Only small messages between tasks lie here; outputs are in the store.
    with tempfile.TemporaryDirectory(prefix="dpo-kfp-") as root:
        if "python3" in root:
            raise ConfigError(
                "kfp.local rewrites paths that hold the text 'python3'", got=root, fix="set TMPDIR to another folder"
            )
        local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=root, raise_on_error=True)
        pipeline = components.load_component_from_file(str(package))
        pipeline(config=config, run_name=run_name)
