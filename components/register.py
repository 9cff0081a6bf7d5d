"""report and policy -> model version"""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register(
    config: str,
    run_id: str,
    model: dsl.Input[dsl.Model],
    policy: dsl.Input[dsl.Model],
    report: dsl.Input[dsl.HTML],
    version: dsl.Output[dsl.Artifact],
) -> None:
    """Registers the policy in MLflow if its report passed.

    Args:
        config: the whole run config as YAML or JSON.
        run_id: MLflow's parent run.
        model: from sft.
        policy: from train.
        report: from evaluate.
        version: name and number of the registered version.
    """
    from dpo_train import launch

    settings = launch.parse_config(config)
    given = {"sft": model, "train": policy, "evaluate": report}
    inputs = {name: launch.stored(settings, artifact.metadata["address"]) for name, artifact in given.items()}
    artifact = launch.run_stage("register", settings, inputs, run_id=run_id)
    launch.hand_on(artifact, version)
