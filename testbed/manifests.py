"""The few objects that every test cluster has: cluster DNS's permissions and the S3 server's Service."""

from testbed import host
from testbed.instance import State

S3_NAMESPACE = "testbed"
S3_SERVICE_PORT = 9000
S3_POD_ENDPOINT = f"http://s3.{S3_NAMESPACE}.svc:{S3_SERVICE_PORT}"


def dns_role() -> list[dict[str, object]]:
    rules: list[dict[str, object]] = [
        {"apiGroups": [""], "resources": ["endpoints", "services", "pods", "namespaces"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    return [
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "system:coredns"},
            "rules": rules,
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "system:coredns"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns"},
            "subjects": [{"kind": "User", "name": "system:coredns", "apiGroup": "rbac.authorization.k8s.io"}],
        },
    ]


def s3_service(state: State) -> list[dict[str, object]]:
    """A Service without selector: one stable name for pods, while the server is a host process on a chosen port."""
    metadata = {"name": "s3", "namespace": S3_NAMESPACE}
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": S3_NAMESPACE}},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"ports": [{"name": "s3", "port": S3_SERVICE_PORT}]},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": metadata | {"labels": {"kubernetes.io/service-name": "s3"}},
            "addressType": "IPv4",
            "ports": [{"name": "s3", "port": state.ports["s3"], "protocol": "TCP"}],
            "endpoints": [{"addresses": [host.NODE_IP], "conditions": {"ready": True}}],
        },
    ]
