"""scored pairs -> settings of the training"""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def sweep(
    config: str,
    run_id: str,
    model: dsl.Input[dsl.Model],
    scored: dsl.Input[dsl.Dataset],
    choice: dsl.Output[dsl.Artifact],
    frontier: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
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
    """
    from dpo_train import launch

    settings = launch.parse_config(config)
    given = {"sft": model, "score_reference": scored}
    inputs = {name: launch.stored(settings, artifact.metadata["address"]) for name, artifact in given.items()}
    artifact = launch.run_stage("sweep", settings, inputs, run_id=run_id)
    launch.hand_on(artifact, choice)
    launch.hand_on(artifact, frontier, page="frontier.html")
    for name, value in artifact.record.metrics.items():
        metrics.log_metric(name, value)
