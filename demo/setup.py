"""What the platform team and the user do once: the chart, the namespace with its Secret, and the job."""

import json
import os
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import testbed
from demo.assets import CHECKOUT
from testbed import binaries, host
from testbed.processes import run

OPERATOR_IMAGE = os.environ.get("FINETUNE_OPERATOR_IMAGE", "localhost/finetune-operator:dev")
TRAINER_IMAGE = os.environ.get("FINETUNE_TRAINER_IMAGE", "localhost/finetune-trainer:dev")
SYSTEM_NAMESPACE = "finetune-system"
RELEASE = "finetune-operator"
NAMESPACE = "finetune-demo"
JOB = "quickstart"
QUICKSTART = CHECKOUT / "examples" / "quickstart.yaml"
_S3_PORT = 7070  # as in examples/quickstart.yaml


def _namespace(name: str) -> dict[str, object]:
    """A namespace under the restricted Pod Security Standard."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/warn": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def install_operator(cluster: testbed.Cluster) -> None:
    """`helm upgrade --install` with our images, watching the demo, and data pods that fit a node of two cores."""
    cluster.apply(_namespace(SYSTEM_NAMESPACE), _namespace(NAMESPACE))
    values = {
        "image": _image(OPERATOR_IMAGE),
        "trainerImage": _image(TRAINER_IMAGE),
        "watchNamespaces": [NAMESPACE],
        "runtimes": {"default": {"prepare": {"cpu": 1, "memory": "3Gi", "ephemeralStorage": "4Gi"}}},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "values.json"
        path.write_text(json.dumps(values))
        chart = str(CHECKOUT / "charts" / "finetune-operator")
        helm = [binaries.binary("helm"), f"--kubeconfig={cluster.kubeconfig}", f"--namespace={SYSTEM_NAMESPACE}"]
        # The CRD is one for the whole cluster and may belong to another release, such as the tests'.
        run([*helm, "upgrade", "--install", "--take-ownership", RELEASE, chart, f"--values={path}"], timeout_s=120)
    # An image built anew under the same tag changes nothing in the Deployment, so the pod would stay the old one.
    cluster.kubectl("rollout", "restart", f"deployment/{RELEASE}", "-n", SYSTEM_NAMESPACE)
    cluster.kubectl(
        "rollout", "status", f"deployment/{RELEASE}", "-n", SYSTEM_NAMESPACE, "--timeout=180s", timeout_s=200
    )
    print(cluster.kubectl("get", "pods", "-n", SYSTEM_NAMESPACE).rstrip())


def _image(name: str) -> dict[str, str]:
    repository, _, tag = name.rpartition(":")
    return {"repository": repository, "tag": tag}


def make_secret(cluster: testbed.Cluster) -> None:
    """What the job needs in the user's namespace: the Secret, and a name for the S3 server."""
    metadata = {"name": "s3", "namespace": NAMESPACE}
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "s3-credentials", "namespace": NAMESPACE},
            "stringData": {
                "AWS_ACCESS_KEY_ID": cluster.s3_access_key,
                "AWS_SECRET_ACCESS_KEY": cluster.s3_secret_key,
            },
        },
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"ports": [{"port": _S3_PORT}]}},
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": metadata | {"labels": {"kubernetes.io/service-name": "s3"}},
            "addressType": "IPv4",
            "ports": [{"port": urlsplit(cluster.s3_endpoint_host).port}],
            "endpoints": [{"addresses": [host.NODE_IP]}],
        },
    )


def apply_quickstart(cluster: testbed.Cluster) -> None:
    """Apply examples/quickstart.yaml as it is; a job of an earlier demo is removed first, its adapter stays."""
    cluster.kubectl(
        "delete", "ftj", JOB, "-n", NAMESPACE, "--ignore-not-found", "--wait=true", "--timeout=180s", timeout_s=200
    )
    print(f"$ kubectl apply -f {QUICKSTART.relative_to(CHECKOUT)}")
    print(cluster.kubectl("apply", "-n", NAMESPACE, "-f", str(QUICKSTART)).rstrip())
