"""The compiled pipeline: fresh, and made of components that do nothing but decode, call and log."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from dpo_train.launch import INPUTS

pytest.importorskip("kfp")

ROOT = Path(__file__).parents[2]


def test_committed_yaml_is_what_the_graph_compiles_to(tmp_path: Path) -> None:
    """`make compile` was run after the last change of the graph or a component."""
    from pipelines.compile import PACKAGE, compile_pipeline

    fresh = compile_pipeline(tmp_path / "dpo.yaml")

    assert PACKAGE.read_text() == fresh.read_text()


def test_every_stage_is_one_task_that_reads_what_the_stage_reads() -> None:
    """The graph's edges are those of launch.INPUTS; caching is off for all."""
    spec = yaml.safe_load((ROOT / "pipelines" / "dpo.yaml").read_text())
    tasks = spec["root"]["dag"]["tasks"]
    names = {name: name.replace("-", "_") for name in tasks}

    assert set(names.values()) == {"resolve", *INPUTS}
    for name, task in tasks.items():
        producers = {
            names[given["taskOutputArtifact"]["producerTask"]] for given in task["inputs"].get("artifacts", {}).values()
        }
        assert producers == set(INPUTS.get(names[name], ()))
        assert not task["cachingOptions"].get("enableCache", False)


@pytest.mark.parametrize("path", sorted((ROOT / "components").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_component_body_is_at_most_ten_statements(path: Path) -> None:
    """A component decodes, calls one stage, and logs."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]

    assert len(functions) == 1
    statements = [node for node in ast.walk(functions[0]) if isinstance(node, ast.stmt)]
    assert 3 <= len(statements) - 2 <= 10  # without the function itself and its docstring
