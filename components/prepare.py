"""raw data -> pairs"""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prepare(
    config: str,
    run_id: str,
    data_digest: str,
    pairs: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Validates, tokenises and splits the raw preference data (Ray Data).

    Args:
        config: the whole run config as YAML or JSON.
        run_id: MLflow's parent run.
        data_digest: of the raw data, so that a cached task is not taken for data that has changed.
        pairs: the validated pairs.
        report: what came in, what was used, what was not and why.
    """
    from dpo_train import launch

    print("raw data", data_digest)
    artifact = launch.run_stage("prepare", launch.parse_config(config), {}, run_id=run_id)
    launch.hand_on(artifact, pairs)
    launch.hand_on(artifact, report, page="report.html")
