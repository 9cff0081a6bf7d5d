"""Kubernetes' pod security standard `restricted`: what a pod violates. The test server does not enforce it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip
SECCOMP = ("RuntimeDefault", "Localhost")
HARMLESS_SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports",
}  # fmt: skip


def pods_of(item: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod spec in an object, wherever it stands, by its path: whatever lies at ``spec`` and has containers."""

    def below(value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(value, Mapping):
            if isinstance(value.get("containers"), list):
                yield path, dict(value)
                return
            for key, more in value.items():
                yield from below(more, f"{path}.{key}")
        elif isinstance(value, list):
            for index, more in enumerate(value):
                yield from below(more, f"{path}[{index}]")

    yield from below(item.get("spec", {}), f"{item['kind']}/{item['metadata']['name']}.spec")


def containers_of(pod: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All kinds of containers of a pod."""
    return [each for kind in ("initContainers", "containers", "ephemeralContainers") for each in pod.get(kind) or []]


def violations(pod: Mapping[str, Any]) -> list[str]:
    """What the standard would refuse, in its own words for the fields; empty for a pod that passes."""
    security = pod.get("securityContext") or {}
    found = [field for field in ("hostNetwork", "hostPID", "hostIPC") if pod.get(field)]
    found += [
        f"volume {volume['name']}: {kind}" for volume in pod.get("volumes") or [] for kind in volume
        if kind not in VOLUMES | {"name"}
    ]  # fmt: skip
    found += [
        f"sysctl {each['name']}" for each in security.get("sysctls") or [] if each["name"] not in HARMLESS_SYSCTLS
    ]
    if security.get("runAsUser") == 0:
        found.append("pod: runAsUser 0")
    for container in containers_of(pod):
        found += [f"{container['name']}: {what}" for what in _of_container(container, security)]
    return found


def _of_container(container: Mapping[str, Any], pod: Mapping[str, Any]) -> Iterator[str]:
    """Violations of a container; what it does not say itself, its pod may say for it."""
    own = container.get("securityContext") or {}
    capabilities = own.get("capabilities") or {}
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot"
    if own.get("runAsUser") == 0:
        yield "runAsUser 0"
    if (own.get("seccompProfile") or pod.get("seccompProfile") or {}).get("type") not in SECCOMP:
        yield "seccompProfile"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    if own.get("privileged"):
        yield "privileged"
    if "ALL" not in capabilities.get("drop", ()):
        yield "capabilities.drop"
    if set(capabilities.get("add") or ()) - {"NET_BIND_SERVICE"}:
        yield "capabilities.add"
    if own.get("procMount", "Default") != "Default":
        yield "procMount"
    if any(port.get("hostPort") for port in container.get("ports") or ()):
        yield "hostPort"
