"""Kubernetes, Kubeflow and Ray clusters, seen from outside: nothing here imports ray, torch or a stage.

job         a stage that runs elsewhere: its name, its folder in the store, what it was asked and what it answered
rayjob      pure: a job and the config to a KubeRay RayJob
            (task_settings: what a Kubeflow task sets for its job, into the config)
launcher    starts a job or finds the one that runs, follows it to its end, takes it away if its caller goes
            (rayjob_state, rayjob_logs, rayjob_pods, rayjob_owner, rayjob_removal, watching, heartbeat)
reaper      removes jobs whose caller has gone without a word, and those that ended long ago
kube        the Kubernetes API: one way to ask, and what its refusals mean (kube_errors)
ray_api     jobs on a Ray cluster that is there, by its REST API (ray_rest)
kubeflow    pipeline versions, runs and schedules of Kubeflow Pipelines
doctor      is everything there that a config needs?
"""
