"""Import rules that import-linter cannot see: inside function bodies, and of single submodules such as kfp.dsl."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for top in ("dpo_train", "components", "pipelines") for path in (ROOT / top).rglob("*.py"))

ALLOWED = {
    "ray": ("dpo_train/runtime/",),
    "mlflow": ("dpo_train/tracking/", "dpo_train/registry/"),
    "transformers": ("dpo_train/data/tokens.py", "dpo_train/model/", "dpo_train/recipes/"),
    "peft": ("dpo_train/model/",),
    "kfp": ("components/", "pipelines/", "dpo_train/cluster/kubeflow"),
    "kfp_server_api": ("dpo_train/cluster/kubeflow",),
    "s3fs": ("dpo_train/storage/",),
    "botocore": ("dpo_train/storage/",),
    "datasets": ("dpo_train/data/sources/",),
    "kubernetes": ("dpo_train/cluster/",),
}


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("package", ALLOWED)
def test_package_is_imported_only_where_it_belongs(package: str) -> None:
    """Each heavy dependency is known to one layer."""
    users = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(name == package or name.startswith(f"{package}.") for name in imported(path))
    }

    assert [user for user in users if not user.startswith(ALLOWED[package])] == []


def test_components_import_nothing_of_ours_but_launch_and_that_inside_the_body() -> None:
    """Kubeflow compiles a component from its body alone."""
    for path in (ROOT / "components").glob("[a-z]*.py"):
        top_level = {
            node.module for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom) and node.module
        }
        assert top_level <= {"kfp", "components", "typing"}
        assert "dpo_train" in set(imported(path))


@pytest.mark.parametrize("module", ["dpo_train", "dpo_train.cli", "dpo_train.stages"])
def test_heavy_packages_are_not_imported_before_they_are_needed(module: str) -> None:
    """`dpo --help`, a config error and a reused stage do not wait for torch, Ray or MLflow."""
    program = (
        f"import {module}, sys; print(sorted({{'torch', 'ray', 'mlflow', 'transformers', 'kfp'}} & set(sys.modules)))"
    )

    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"
