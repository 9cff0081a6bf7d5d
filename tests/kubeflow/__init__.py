"""The commands against a Kubeflow Pipelines of our own: a real HTTP server whose messages are checked by the models of
``kfp_server_api`` and whose pipelines by Kubeflow's own ``PipelineSpec``.

No Kubeflow runs in a test: it needs a cluster with Argo and MySQL. What the server does was read in Kubeflow's source
(release 2.17) and is named where it is not plain.

server: HTTP, logins, faults;  state: what it holds;  pipelines, runs, recurring: its routes;  messages: checks;
argo: runs that advance;  scenes: ... while they are waited for;  commands: the command line against it
"""
