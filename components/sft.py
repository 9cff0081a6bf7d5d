"""pairs -> the model that is aligned"""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def sft(config: str, run_id: str, pairs: dsl.Input[dsl.Dataset], model: dsl.Output[dsl.Model]) -> None:
    """Fine-tunes the model on the chosen answers (Ray Train); without sft.enabled the config's model stays as it is.

    Args:
        config: the whole run config as YAML or JSON.
        run_id: MLflow's parent run.
        pairs: from prepare.
        model: what every later task starts from.
    """
    from dpo_train import launch

    settings = launch.parse_config(config)
    inputs = {"prepare": launch.stored(settings, pairs.metadata["address"])}
    artifact = launch.run_stage("sft", settings, inputs, run_id=run_id)
    launch.hand_on(artifact, model)
