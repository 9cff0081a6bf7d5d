"""scored pairs -> beta"""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def sweep(
    config: str,
    run_id: str,
    model: dsl.Input[dsl.Model],
    scored: dsl.Input[dsl.Dataset],
    choice: dsl.Output[dsl.Artifact],
) -> None:
    """Chooses beta on validation pairs (Ray Tune); without sweep.betas it hands on train.beta.

    Args:
        config: the whole run config as YAML or JSON.
        run_id: MLflow's parent run.
        model: from sft.
        scored: from score_reference.
        choice: the trials and the chosen beta.
    """
    from dpo_train import launch

    settings = launch.parse_config(config)
    given = {"sft": model, "score_reference": scored}
    inputs = {name: launch.stored(settings, artifact.metadata["address"]) for name, artifact in given.items()}
    artifact = launch.run_stage("sweep", settings, inputs, run_id=run_id)
    choice.uri, choice.metadata = launch.uri(artifact), launch.metadata(artifact)
