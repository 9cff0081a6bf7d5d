"""The pipeline's first task: looks at data and model, opens the MLflow run."""

from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def resolve(config: str, run_name: str, kubeflow_run: str) -> NamedTuple(
    "Resolved", [("run_id", str), ("data_digest", str)]
):  # type: ignore[valid-type]
    """Checks the inputs and opens the pipeline's MLflow run.

    Args:
        config: the whole run config as YAML or JSON.
        run_name: name of the MLflow run.
        kubeflow_run: id of this run in Kubeflow, noted in MLflow.
    """
    from dpo_train import launch

    settings = launch.parse_config(config)
    data_digest = launch.check_inputs(settings)
    return launch.open_run(settings, run_name, kubeflow_run=kubeflow_run), data_digest
