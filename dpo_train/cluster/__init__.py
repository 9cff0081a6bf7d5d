"""Kubernetes, Kubeflow and Ray clusters, seen from outside: nothing here imports ray, torch or a stage.

job         a stage that runs elsewhere: its name, its folder in the store, what it was asked and what it answered
rayjob      pure: a job and the config to a KubeRay RayJob
launcher    starts a job or finds the one that runs, follows it to its end, takes it away if its caller goes
ray_api     the same on a Ray cluster that is there, by its REST API
kubeflow    pipeline versions, runs and schedules of Kubeflow Pipelines
"""
