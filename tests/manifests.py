"""What `kubectl kustomize` builds of k8s/, and who may talk to whom by its network policies."""

from __future__ import annotations

import functools
import ipaddress
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

K8S = Path(__file__).parents[1] / "k8s"
OVERLAYS = ("kind", "gpu")


@functools.cache
def built_text(overlay: str) -> str:
    """The overlay's manifests as one text; skips without kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on the path")
    done = subprocess.run(
        ["kubectl", "kustomize", str(K8S / "overlays" / overlay)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def built(overlay: str) -> list[dict[str, Any]]:
    """The overlay's objects, fresh ones at every call."""
    return [item for item in yaml.safe_load_all(built_text(overlay)) if item]


def of_kind(objects: Iterable[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    """The objects of a kind by their names."""
    return {item["metadata"]["name"]: item for item in objects if item["kind"] == kind}


def may_talk(
    policies: Iterable[dict[str, Any]],
    sender: tuple[str, Mapping[str, str]],
    receiver: tuple[str, Mapping[str, str]] | str,
    port: int,
    protocol: str = "TCP",
) -> bool:
    """Whether policies of the namespace `dpo` let a packet through: out of its sender and into its receiver.

    Args:
        sender: namespace and labels of a pod.
        receiver: the same, or an address outside the cluster.
    """
    policies = list(policies)
    out = _passes(policies, "Egress", sender, receiver, port, protocol)
    return out and (isinstance(receiver, str) or _passes(policies, "Ingress", receiver, sender, port, protocol))


def _passes(
    policies: list[dict[str, Any]],
    direction: str,
    pod: tuple[str, Mapping[str, str]],
    peer: tuple[str, Mapping[str, str]] | str,
    port: int,
    protocol: str,
) -> bool:
    """A pod that no policy selects is open; any rule of any policy that selects it lets through."""
    mine = [
        item["spec"]
        for item in policies
        if item["metadata"]["namespace"] == pod[0]
        and direction in item["spec"]["policyTypes"]
        and _matches(item["spec"]["podSelector"], pod[1])
    ]
    side, other = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    return not mine or any(
        _has_port(rule, port, protocol) and any(_is_peer(each, peer, pod[0]) for each in rule[other])
        for spec in mine
        for rule in spec.get(side) or []
    )


def _has_port(rule: Mapping[str, Any], port: int, protocol: str) -> bool:
    ports = rule.get("ports")
    return not ports or any((each["protocol"], each["port"]) == (protocol, port) for each in ports)


def _is_peer(selector: Mapping[str, Any], peer: tuple[str, Mapping[str, str]] | str, home: str) -> bool:
    if "ipBlock" in selector:
        block, address = selector["ipBlock"], ipaddress.ip_address(peer if isinstance(peer, str) else "10.0.0.1")
        inside = address in ipaddress.ip_network(block["cidr"])
        return inside and not any(address in ipaddress.ip_network(each) for each in block.get("except") or ())
    if isinstance(peer, str):
        return False
    namespace, labels = peer
    in_namespace = namespace == home
    if "namespaceSelector" in selector:
        in_namespace = _matches(selector["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
    return in_namespace and _matches(selector.get("podSelector") or {}, labels)


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """A label selector of matchLabels, In and NotIn: all that k8s/ uses."""
    for rule in selector.get("matchExpressions") or ():
        assert rule["operator"] in {"In", "NotIn"}, rule
        if (labels.get(rule["key"]) in rule["values"]) != (rule["operator"] == "In"):
            return False
    return all(labels.get(key) == value for key, value in (selector.get("matchLabels") or {}).items())
