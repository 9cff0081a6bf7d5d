"""Kubeflow components, one file each: decode, call the stage, log.

A component hands on an artifact whose ``uri`` is the stage's output in the store and whose metadata holds its address
(``<stage>/<digest>``). The next component finds it by that address: kfp.local rewrites paths that hold "python3".
"""

import os

IMAGE = os.environ.get("DPO_IMAGE", "dpo-train:0.1.0")
"""The image that has ``dpo`` installed; set DPO_IMAGE when compiling to pin your own by digest."""
