"""The two forms of a component whose stage may be launched as a job: one function, and two uses of its task's settings.

train        what the task sets (resources, tolerations, volumes, ...) is its own pod's
train_job    for cluster.launcher=rayjob: Kubeflow hands it over to the component, which gives it to the job's pods;
             the task's pod, which only waits, gets the environment and the volumes alone
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kfp import dsl
from kfp.dsl.python_component import PythonComponent

from components import IMAGE

HANDED_OVER = [
    dsl.TaskConfigField.RESOURCES,
    dsl.TaskConfigField.KUBERNETES_NODE_SELECTOR,
    dsl.TaskConfigField.KUBERNETES_TOLERATIONS,
    dsl.TaskConfigField.KUBERNETES_AFFINITY,
    # Who waits reads and writes the store as well: it needs its logins, and its volumes.
    dsl.TaskConfigPassthrough(field=dsl.TaskConfigField.ENV, apply_to_task=True),
    dsl.TaskConfigPassthrough(field=dsl.TaskConfigField.KUBERNETES_VOLUMES, apply_to_task=True),
]


def in_own_pod(function: Callable[..., Any]) -> PythonComponent:
    """The component that works, or waits, in a pod with what the task sets.

    Its ``task_config`` is empty: no input of that name is declared, since Kubeflow before release 2.15 refuses a
    pipeline that has one.
    """
    component = dsl.component(base_image=IMAGE, install_kfp_package=False)(function)
    del component.component_spec.inputs["task_config"]
    return PythonComponent(component_spec=component.component_spec, python_func=function)


def as_job(component: PythonComponent) -> PythonComponent:
    """The same component for a job that gets what the task sets; it needs Kubeflow Pipelines 2.15 or newer."""
    make = dsl.component(base_image=IMAGE, install_kfp_package=False, task_config_passthroughs=HANDED_OVER)
    return make(component.python_func)
