"""scored pairs -> settings of the training"""

from kfp import dsl

from components import _forms


@_forms.in_own_pod
def sweep(
    config: str,
    run_id: str,
    model: dsl.Input[dsl.Model],
    scored: dsl.Input[dsl.Dataset],
    choice: dsl.Output[dsl.Artifact],
    frontier: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    task_config: dsl.TaskConfig,
) -> None:
    """Chooses beta, and more if asked, on validation pairs (Ray Tune); with nothing to try it hands on train's.

    Args:
        config: the whole run config as YAML or JSON.
        run_id: MLflow's parent run.
        model: from sft.
        scored: from score_reference.
        choice: the trials and the chosen settings.
        frontier: what each trial gains against how far it moves from the reference.
        metrics: validation numbers of the chosen trial.
        task_config: what the task sets for its job; Kubeflow's own argument, and empty without a job.
    """
    from dpo_train import launch

    settings = launch.with_task(launch.parse_config(config), "sweep", task_config)
    given = {"sft": model, "score_reference": scored}
    inputs = {name: launch.stored(settings, artifact.metadata["address"]) for name, artifact in given.items()}
    artifact = launch.run_stage("sweep", settings, inputs, run_id=run_id)
    launch.hand_on(artifact, choice)
    launch.hand_on(artifact, frontier, page="frontier.html")
    for name, value in artifact.record.metrics.items():
        metrics.log_metric(name, value)


sweep_job = _forms.as_job(sweep)
