"""The pipeline's last task, whatever has happened before: tells how the run ended."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def notify(config: str, run_name: str, overrides: list, kubeflow_run: str, status: dsl.PipelineTaskFinalStatus) -> None:
    """Posts the outcome to the webhook in DPO_WEBHOOK_URL, if there is one.

    Args:
        config: the whole run config as YAML or JSON, as it was given.
        run_name: name of the MLflow run.
        overrides: ``section.key=value``, applied to the config.
        kubeflow_run: id of this run in Kubeflow, by which its run in MLflow is found.
        status: how all tasks before ended.
    """
    from dpo_train import launch

    state, error = status.state, status.error_message
    launch.notify(config, run_name, overrides=overrides, kubeflow_run=kubeflow_run, state=state, error=error)
