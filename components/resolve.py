"""The pipeline's first task: looks at data, model and champion, decides, opens the MLflow run."""

from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def resolve(config: str, run_name: str, overrides: list, kubeflow_run: str) -> NamedTuple(
    "Resolved", [("Output", str), ("run_id", str), ("data_digest", str), ("config", str)]
):  # type: ignore[valid-type]
    """Checks the inputs, decides whether there is anything to do, and opens the pipeline's MLflow run.

    Args:
        config: the whole run config as YAML or JSON.
        run_name: name of the MLflow run.
        overrides: ``section.key=value``, applied to the config.
        kubeflow_run: id of this run in Kubeflow, noted in MLflow.

    Returns:
        Output, "train" or "unchanged" (kfp.local compares an output of no other name); MLflow's parent run; digest of
        the raw data; the config for all later tasks, in which all that could move meanwhile is nailed down.
    """
    from dpo_train import launch

    found = launch.resolve(config, run_name, overrides=overrides, kubeflow_run=kubeflow_run)
    return found.decision, found.run_id, found.data_digest, found.config
