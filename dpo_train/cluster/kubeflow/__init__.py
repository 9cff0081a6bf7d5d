"""Kubeflow Pipelines, seen from outside: what ``dpo submit``, ``runs --kfp``, ``cancel`` and ``logs`` ask it.

    config -> reach (what the cluster cannot see) -> package (compiled pipeline, its version's name, typed arguments)
           -> submission (pipeline, version, experiment, run) -> following (until it ends) -> logs (of a step)

login: address and credentials, from the environment;  client: requests and what refusals mean;  runs: found and shown

The generated client ``kfp_server_api`` speaks with the server. ``kfp.Client`` around it keeps a file in the user's
home, prints, tries a health check five times and follows redirects to login pages; none of that is wanted here.
"""
