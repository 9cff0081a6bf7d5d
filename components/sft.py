"""pairs -> the model that is aligned"""

from kfp import dsl

from components import _forms


@_forms.in_own_pod
def sft(
    config: str,
    run_id: str,
    pairs: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    task_config: dsl.TaskConfig,
) -> None:
    """Fine-tunes the model on the chosen answers (Ray Train); without sft.enabled the config's model stays as it is.

    Args:
        config: the whole run config as YAML or JSON.
        run_id: MLflow's parent run.
        pairs: from prepare.
        model: what every later task starts from.
        task_config: what the task sets for its job; Kubeflow's own argument, and empty without a job.
    """
    from dpo_train import launch

    settings = launch.with_task(launch.parse_config(config), "sft", task_config)
    inputs = {"prepare": launch.stored(settings, pairs.metadata["address"])}
    artifact = launch.run_stage("sft", settings, inputs, run_id=run_id)
    launch.hand_on(artifact, model)


sft_job = _forms.as_job(sft)
