"""Compiles the graph to YAML that Kubeflow Pipelines takes."""

from pathlib import Path

PACKAGE = Path(__file__).with_name("dpo.yaml")


def compile_pipeline(target: Path = PACKAGE) -> Path:
    """Writes the compiled pipeline."""
    from kfp import compiler

    from pipelines.dpo import dpo

    compiler.Compiler().compile(dpo, str(target))
    return target


if __name__ == "__main__":
    print(compile_pipeline())
