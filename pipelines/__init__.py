"""The Kubeflow pipeline: dpo.py is the graph, dpo.yaml its compiled form, compile.py makes one from the other, local.py
runs dpo.yaml on this machine."""
