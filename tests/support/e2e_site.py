"""Putting the operator, the tests' model and rows, buckets and Secrets onto the node, and taking them away again."""

import json
import os
from pathlib import Path
from typing import Any

import boto3

import testbed
from e2e_assets import broken_files, chat_rows, jsonl, model_files, text_rows
from e2e_lab import PATIENCE_S, Lab, until, write_json
from testbed import binaries
from testbed.processes import run

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE, OPERATOR_NAMESPACE = "finetune-e2e", "finetune-e2e-system"
SECOND_NAMESPACE = "finetune-e2e-second"  # watched too, and without a job: a test deletes it
OPERATOR_IMAGE = os.environ.get("FINETUNE_OPERATOR_IMAGE", "localhost/finetune-operator:dev")
TRAINER_IMAGE = os.environ.get("FINETUNE_TRAINER_IMAGE", "localhost/finetune-trainer:dev")
GRACE_S = 20
GOVERNED = "governed"  # a runtime that takes data under MIT alone
GUEST = ("guest", "guest-secret-key")  # an account with rights in no bucket
SCRAPED = {"e2e.finetune.dev/scrape": "true"}
# About half a minute of steps, so that it can be hit in the middle again and again.
LONG_RUN: dict[str, object] = {
    "hyperparameters": {"maxSteps": 1500, "globalBatchSize": 4, "learningRate": 1e-3},
    "recovery": {"maxRetries": 6},
}
LONG_RUN_S = 600.0  # with other work beside it


def set_up(cluster: testbed.Cluster, folder: Path) -> Lab:
    """Images (built before, by `make images`), buckets, namespaces and the chart; `folder` is for Helm's values."""
    for image in (OPERATOR_IMAGE, TRAINER_IMAGE):
        testbed.load_image(image)
    lab = Lab(cluster, _s3(cluster), NAMESPACE, OPERATOR_NAMESPACE)
    _fill_buckets(lab)
    _prepare_namespaces(lab)
    _install_chart(lab, folder)
    return lab


def take_away(cluster: testbed.Cluster) -> None:
    """Only what is ours. Tests of the testbed may have ended the cluster meanwhile."""
    if testbed.find() is None:
        return
    cluster.kubectl("-n", NAMESPACE, "delete", "ftj", "--all", "--wait=true", check=False, timeout_s=PATIENCE_S)
    _helm(cluster, "uninstall", "finetune-operator", check=False)
    cluster.kubectl(
        "delete",
        "namespace",
        NAMESPACE,
        SECOND_NAMESPACE,
        OPERATOR_NAMESPACE,
        "--wait=true",
        check=False,
        timeout_s=PATIENCE_S,
    )


def _s3(cluster: testbed.Cluster) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=cluster.s3_endpoint_host,
        aws_access_key_id=cluster.s3_access_key,
        aws_secret_access_key=cluster.s3_secret_key,
        region_name=cluster.s3_region,
    )


def _fill_buckets(lab: Lab) -> None:
    chat = chat_rows(240)
    objects = {
        "e2e-models": {f"tiny/{name}": content for name, content in model_files().items()},
        "e2e-data": {
            "chat/rows-0.jsonl": jsonl(chat[:120]),
            "chat/rows-1.jsonl": jsonl(chat[120:]),
            "texts/rows.jsonl": jsonl(text_rows(120)),
            **{f"broken/{name}": content for name, content in broken_files().items()},
        },
        "e2e-adapters": {},
        "e2e-private": {"chat/rows.jsonl": jsonl(chat)},
    }
    present = {bucket["Name"] for bucket in lab.s3.list_buckets()["Buckets"]}
    for bucket, contents in objects.items():
        if bucket not in present:
            lab.s3.create_bucket(Bucket=bucket)
        for key, content in contents.items():
            lab.s3.put_object(Bucket=bucket, Key=key, Body=content)
    lab.cluster.add_s3_account(*GUEST)
    lab.s3.delete_bucket_policy(Bucket="e2e-private")
    for bucket in ("e2e-models", "e2e-adapters"):
        allow(lab, bucket)


def allow(lab: Lab, bucket: str) -> None:
    """Give the guest account all rights in the bucket."""
    resources = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    statement = {"Effect": "Allow", "Principal": {"AWS": [GUEST[0]]}, "Action": ["s3:*"], "Resource": resources}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    lab.s3.put_bucket_policy(Bucket=bucket, Policy=policy)


def _prepare_namespaces(lab: Lab) -> None:
    """All under the restricted Pod Security profile; jobs of an earlier session are removed."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    spaces = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
        for name in (NAMESPACE, SECOND_NAMESPACE, OPERATOR_NAMESPACE)
    ]
    lab.cluster.apply(*spaces)
    lab.cluster.apply(
        lab.secret("s3-credentials", lab.cluster.s3_access_key, lab.cluster.s3_secret_key),
        lab.secret("guest-credentials", *GUEST),
    )
    account = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/default"
    until(lambda: lab.api.get(account), "the namespace's ServiceAccount", PATIENCE_S)
    lab.kubectl(
        "delete", "ftj", "--all", "--wait=true", f"--timeout={PATIENCE_S:.0f}s", check=False, timeout_s=PATIENCE_S + 60
    )
    pods = f"/api/v1/namespaces/{NAMESPACE}/pods"
    until(lambda: not lab.api.items(pods), "pods of an earlier session are gone", PATIENCE_S)


def _install_chart(lab: Lab, folder: Path) -> None:
    values = _values()
    # The CRD is one for the whole cluster and may belong to another release, such as the demo's.
    options = [
        "--take-ownership",
        "--wait",
        "--timeout",
        f"{PATIENCE_S:.0f}s",
        "-f",
        str(write_json(folder / "values.json", values)),
    ]
    chart = str(ROOT / "charts/finetune-operator")
    _helm(lab.cluster, "upgrade", "--install", "finetune-operator", chart, *options)
    # The same tag may be another image than the running pod's.
    deployment = ("-n", OPERATOR_NAMESPACE, "rollout")
    lab.cluster.kubectl(*deployment, "restart", "deploy/finetune-operator")
    lab.cluster.kubectl(
        *deployment, "status", "deploy/finetune-operator", f"--timeout={PATIENCE_S:.0f}s", timeout_s=PATIENCE_S + 60
    )


def _helm(cluster: testbed.Cluster, *arguments: str, check: bool = True) -> None:
    command = [binaries.binary("helm"), "--kubeconfig", str(cluster.kubeconfig), "-n", OPERATOR_NAMESPACE]
    run([*command, *arguments], timeout_s=PATIENCE_S + 60, check=check)


def _values() -> dict[str, object]:
    """Pods so small that two and the operator fit on two cores, and short intervals."""

    def split(image: str) -> dict[str, str]:
        repository, _, tag = image.rpartition(":")
        return {"repository": repository, "tag": tag}

    runtime = {
        "imagePullPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_S,
        "defaults": {"cpu": "900m", "memory": "2Gi", "ephemeralStorage": "1Gi", "sharedMemory": "64Mi"},
        "prepare": {"cpu": "900m", "memory": "1Gi", "ephemeralStorage": "1Gi"},
        "podLabels": SCRAPED,
    }
    policy = {"contact": "legal@example.com", "allowedLicenses": ["MIT"]}
    return {
        "image": {**split(OPERATOR_IMAGE), "pullPolicy": "Never"},
        "trainerImage": split(TRAINER_IMAGE),
        "watchNamespaces": [NAMESPACE, SECOND_NAMESPACE],
        "runtimes": {"default": runtime, GOVERNED: {**runtime, "policy": policy}},
        "podLabels": SCRAPED,
        "env": {
            "FINETUNE_PROGRESS_INTERVAL_S": "2",
            "FINETUNE_RESYNC_INTERVAL_S": "10",
            "FINETUNE_LEASE_DURATION_S": "6",
        },
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
    }
