"""scored pairs and beta -> policy"""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    config: str,
    run_id: str,
    model: dsl.Input[dsl.Model],
    scored: dsl.Input[dsl.Dataset],
    choice: dsl.Input[dsl.Artifact],
    policy: dsl.Output[dsl.Model],
) -> None:
    """Trains the policy with the chosen beta (Ray Train).

    Args:
        config: the whole run config as YAML or JSON.
        run_id: MLflow's parent run.
        model: from sft.
        scored: from score_reference.
        choice: from sweep.
        policy: the trained weights.
    """
    from dpo_train import launch

    settings = launch.parse_config(config)
    given = {"sft": model, "score_reference": scored, "sweep": choice}
    inputs = {name: launch.stored(settings, artifact.metadata["address"]) for name, artifact in given.items()}
    artifact = launch.run_stage("train", settings, inputs, run_id=run_id)
    launch.hand_on(artifact, policy)
