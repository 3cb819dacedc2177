"""Tell when a component serves: each is asked what its users will ask, not if its process exists."""

import http.client
import json
import socket
import ssl
import struct
import urllib.request
from typing import Any

from testbed import components, host, pki
from testbed.images import ctr
from testbed.instance import Instance, State
from testbed.processes import wait_until


def get(instance: Instance, state: State, path: str) -> dict[str, Any] | None:
    """GET from the API server as admin; None when it does not answer or answers with an error."""
    context = ssl.create_default_context(cafile=str(instance.dir / "pki/ca.crt"))
    token = pki.token(instance.dir, "admin")
    request = urllib.request.Request(
        components.api_server_url(state) + path, headers={"Authorization": f"Bearer {token}"}
    )
    # An empty ProxyHandler: the environment's HTTP proxy must not see calls to our own machine.
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as answer:
            body = answer.read()
    except (OSError, http.client.HTTPException):  # URLError and HTTPError are OSErrors
        return None
    return json.loads(body) if body.startswith(b"{") else {}


def serves_api(instance: Instance, state: State) -> bool:
    try:
        return get(instance, state, "/readyz") is not None
    except (OSError, ValueError, KeyError):  # the certificates of a run killed half-way are missing or torn
        return False


def wait_for(instance: Instance, state: State, component: str) -> None:
    """Wait until `component` serves. Raises TestbedError with the end of its log."""

    def default_service_account() -> bool:
        return get(instance, state, "/api/v1/namespaces/default/serviceaccounts/default") is not None

    def node_ready() -> bool:
        if not _connects(
            host.NODE_IP, 10250
        ):  # the condition outlives a killed kubelet by the controller's grace period
            return False
        node = get(instance, state, f"/api/v1/nodes/{pki.NODE_NAME}") or {}
        conditions = node.get("status", {}).get("conditions", [])
        return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)

    def api_by_cluster_ip() -> bool:
        # Local processes are translated like pods, so this proves the table that kube-proxy wrote.
        return _connects(str(host.SERVICE_NETWORK[1]), 443)

    checks = {
        "etcd": (lambda: _connects("127.0.0.1", state.ports["etcd"]), "etcd accepts connections"),
        "s3": (lambda: _connects("127.0.0.1", state.ports["s3"]), "S3 accepts connections"),
        "kube-apiserver": (lambda: serves_api(instance, state), "the API server's /readyz"),
        "kube-controller-manager": (default_service_account, "the default ServiceAccount"),
        "containerd": (_containerd_answers, "containerd answers"),
        "kubelet": (node_ready, "the node is Ready"),
        "kube-proxy": (api_by_cluster_ip, f"{host.SERVICE_NETWORK[1]}:443 leads to the API server"),
        "coredns": (lambda: _resolves(f"kubernetes.default.svc.{components.CLUSTER_DOMAIN}"), "cluster DNS resolves"),
    }
    if component in checks:  # the scheduler has no port; a pod that runs is its proof
        check, what = checks[component]
        wait_until(instance, component, check, timeout_s=90, what=what)


def _connects(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def _containerd_answers() -> bool:
    return ctr("version", check=False, timeout_s=10).returncode == 0


def _resolves(name: str) -> bool:
    """True when cluster DNS has an address for `name`: one question over UDP, as any resolver asks it."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    question = struct.pack(">6H", 0x5EED, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">2H", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(1)
        try:
            client.sendto(question, (host.NODE_IP, 53))
            answer = client.recv(512)
        except OSError:
            return False
    answers = struct.unpack(">H", answer[6:8])[0]
    return answer[:2] == b"\x5e\xed" and answers > 0
