"""Jobs on the node from `kubectl create` to their end: good ones, wrong ones, and ones that wait for somebody."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import boto3
import pytest

from e2e_assets import BAD_FILE, BAD_ROW, chat_rows, jsonl, model_files
from e2e_lab import PATIENCE_S, Lab, Submitted, until
from e2e_site import LONG_RUN_S, allow
from finetune_api.names import CA_BUNDLE_KEY, Stage
from versitygw import ACCESS_KEY, SECRET_KEY, Certificate, certificate, versitygw

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]


def assert_adapter_is_whole(lab: Lab, job: Submitted) -> None:
    """The committed adapter is what the status says, byte for byte, and is what `latest.json` names."""
    (artifact,) = job.status()["artifacts"]
    content = lab.read(artifact["manifestUri"])
    assert artifact["digest"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
    files = {file["path"]: file for file in json.loads(content)["files"]}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "eval.json"} <= set(
        files
    )
    folder = artifact["manifestUri"].rpartition("/")[0]
    for path, file in files.items():
        data = lab.read(f"{folder}/{path}")
        assert (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}") == (file["size_bytes"], file["sha256"]), path
    committed = json.loads(lab.read(f"{job.run_uri()}/_COMMITTED.json"))
    assert committed["artifact"]["digest"] == artifact["digest"]
    assert json.loads(lab.read(f"{job.body()['spec']['output']['uri']}/latest.json")) == committed


def test_an_sft_job_ends_with_a_whole_adapter_that_beats_the_base(lab: Lab, undisturbed: Submitted):
    status = undisturbed.until_succeeded(LONG_RUN_S)
    data, metrics = status["data"], status["metrics"]
    assert data["rowsIn"] == data["rowsUsed"] + data["rowsHeldOut"] + sum(d["rows"] for d in data["dropped"]) == 240
    assert metrics["evalLoss"] < metrics["baseEvalLoss"]
    assert [(e["stage"], e["number"], e["class"], e["exitCode"]) for e in status["attempts"]] == [
        ("prepare", 1, "Succeeded", 0),
        ("train", 1, "Succeeded", 0),
    ]
    assert_adapter_is_whole(lab, undisturbed)
    lab.kubectl("wait", "--for=condition=Succeeded", "ftj/undisturbed", "--timeout=60s")
    logs = lab.keys(f"{undisturbed.run_uri()}/.job/logs/")
    assert [uri.rpartition("/")[2] for uri in logs] == ["prepare-1.jsonl", "train-1.jsonl"]
    assert lab.keys(f"{undisturbed.run_uri()}/.job/checkpoints/")  # the last one is kept


def test_a_manual_cpt_job_waits_at_its_plan_and_ends_with_a_whole_adapter_that_beats_the_base(lab: Lab):
    job = lab.submit(
        "texts",
        startPolicy="Manual",
        method={"type": "CPT"},
        datasets=[{"uri": "s3://e2e-data/texts/"}],
        hyperparameters={"maxSteps": 30, "globalBatchSize": 4, "learningRate": 5e-3},
    )
    job.until(lambda: job.condition("Running").get("reason") == "AwaitingApproval", "the plan waits for approval")
    assert (job.status()["phase"], job.status()["plan"]["steps"]) == ("Waiting", 30)
    assert job.pods(Stage.TRAIN) == []
    lab.kubectl("patch", "ftj/texts", "--type=merge", "-p", '{"spec":{"startPolicy":"Automatic"}}')
    status = job.until_succeeded()
    assert status["metrics"]["evalLoss"] < status["metrics"]["baseEvalLoss"]
    assert_adapter_is_whole(lab, job)


def test_a_job_that_is_only_planned_ends_with_plan_and_report_and_no_training_pod(lab: Lab):
    job = lab.submit("planned", startPolicy="PlanOnly")
    status = job.until_finished()
    assert (status["phase"], job.condition("Finished")["reason"]) == ("Planned", "Planned"), job.explain()
    assert json.loads(lab.read(status["plan"]["uri"]))["hyperparameters"]["total_steps"] == 20
    assert json.loads(lab.read(status["data"]["reportUri"]))["state"] == "prepared"
    assert [(e["stage"], e["class"]) for e in status["attempts"]] == [("prepare", "Succeeded")]
    assert job.pods(Stage.TRAIN) == []
    assert {event["type"] for event in job.events()} == {"Normal"}


def _going_on_after(lab: Lab, name: str, earlier: str) -> Submitted:
    model = {"uri": "s3://e2e-models/tiny", "adapterFrom": {"jobName": earlier}}
    return lab.submit(name, model=model, peft={"type": "LoRA"})


def test_a_broken_row_fails_the_job_before_any_training_pod_and_is_named_and_so_do_those_that_waited_for_it(lab: Lab):
    waiting, last = _going_on_after(lab, "after-broken", "broken"), _going_on_after(lab, "after-both", "after-broken")
    for each in (waiting, last):
        until(lambda name=each.name: "WaitingForJob" in lab.shown(name), f"{each.name} waits", PATIENCE_S, each.explain)
    job = lab.submit("broken", datasets=[{"uri": "s3://e2e-data/broken/"}])
    status = job.until_finished()
    assert status["phase"] == "Failed", job.explain()
    verdict = job.condition("Succeeded")
    assert (verdict["status"], verdict["reason"]) == ("False", "DataInvalid")
    assert f"s3://e2e-data/broken/{BAD_FILE} row {BAD_ROW}" in verdict["message"]
    assert [(e["stage"], e["class"], e["exitCode"]) for e in status["attempts"]] == [("prepare", "Failure", 11)]
    assert job.pods(Stage.TRAIN) == []
    event = until(lambda: _event(job, "DataInvalid"), "the event about the broken row", PATIENCE_S, job.explain)
    assert f"{BAD_FILE} row {BAD_ROW}" in event["message"]
    assert event["type"] == "Warning"
    lab.kubectl("wait", "--for=condition=Finished", "ftj/broken", "--timeout=60s")

    for each in (waiting, last):
        assert each.until_finished()["phase"] == "Failed", each.explain()
        verdict = each.condition("Succeeded")
        assert (verdict["reason"], each.pods()) == ("NoAdapterToCome", [])
        assert BAD_FILE in verdict["message"], "it says why the job that it waited for ended"
        assert verdict["message"] in each.describe()


def _event(job: Submitted, reason: str) -> dict[str, Any] | None:
    return next((event for event in job.events() if event["reason"] == reason), None)


def test_a_denied_bucket_reads_clearly_in_describe_and_the_job_recovers_when_it_is_allowed(lab: Lab):
    storage = {"endpoint": lab.cluster.s3_endpoint_pod, "secretRef": {"name": "guest-credentials"}}
    job = lab.submit("denied", datasets=[{"uri": "s3://e2e-private/chat/"}], storage=storage)
    job.until(lambda: job.condition("Degraded").get("status") == "True", "the job is degraded")
    degraded = job.condition("Degraded")
    assert "may not" in degraded["message"], degraded
    assert "s3://e2e-private/chat/" in degraded["message"]
    assert "storage.secretRef" in degraded["message"]
    assert degraded["message"] in job.describe()
    assert job.condition("Finished")["status"] == "False"

    allow(lab, "e2e-private")
    status = job.until_succeeded()
    assert job.condition("Degraded")["status"] == "False"
    classes = [(e["class"], e["exitCode"]) for e in job.attempts(Stage.PREPARE)]
    assert classes == [("Waiting", 13)] * (len(classes) - 1) + [("Succeeded", 0)]
    assert status.get("failures", 0) == 0


def test_a_store_with_a_private_certificate_is_trusted_by_its_authority_and_named_without_it(lab: Lab, tmp_path: Path):
    """Model, rows and adapter through real TLS. The ConfigMap holds another authority first, and is then mended."""
    host = str(urlparse(lab.cluster.api_server).hostname)  # pods can reach it
    (tmp_path / "other").mkdir()
    tls, other = certificate(tmp_path, host), certificate(tmp_path / "other", host)
    with versitygw(tmp_path, host, tls) as endpoint:
        s3 = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            verify=str(tls.file),
        )
        for name, content in model_files().items():
            s3.put_object(Bucket="bucket", Key=f"tiny/{name}", Body=content)
        s3.put_object(Bucket="bucket", Key="chat/rows.jsonl", Body=jsonl(chat_rows(120)))
        lab.cluster.apply(lab.secret("tls-credentials", ACCESS_KEY, SECRET_KEY), _authority(lab, other))
        job = lab.submit(
            "private-tls",
            model={"uri": "s3://bucket/tiny"},
            datasets=[{"uri": "s3://bucket/chat/"}],
            output={"uri": "s3://bucket/adapters"},
            storage={
                "endpoint": endpoint,
                "secretRef": {"name": "tls-credentials"},
                "caBundle": {"configMapRef": {"name": "tls-authority"}},
            },
        )
        job.until(lambda: job.condition("Degraded").get("status") == "True", "the job is degraded")
        message = job.condition("Degraded")["message"]
        assert f"the TLS certificate of {endpoint} is not trusted" in message
        assert "storage.caBundle" in message

        lab.cluster.apply(_authority(lab, tls))
        status = job.until_succeeded()
        assert status.get("failures", 0) == 0
        assert s3.head_object(Bucket="bucket", Key="adapters/latest.json")["ContentLength"] > 0


def _authority(lab: Lab, certificate: Certificate) -> dict[str, Any]:
    metadata = {"name": "tls-authority", "namespace": lab.namespace}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": {CA_BUNDLE_KEY: certificate.file.read_text()},
    }


def test_a_missing_secret_reads_clearly_in_describe_and_the_job_recovers_when_it_is_made(lab: Lab):
    lab.kubectl("delete", "secret", "late-credentials", "--ignore-not-found")
    storage = {"endpoint": lab.cluster.s3_endpoint_pod, "secretRef": {"name": "late-credentials"}}
    job = lab.submit("secretless", storage=storage)
    job.until(lambda: "late-credentials" in job.condition("Running").get("message", ""), "the Secret is missed")
    running = job.condition("Running")
    assert (running["status"], running["reason"]) == ("False", "MissingRef")
    assert "Secret finetune-e2e/late-credentials does not exist" in running["message"]
    assert running["message"] in job.describe()
    assert job.condition("Degraded")["status"] == "True"

    lab.cluster.apply(lab.secret("late-credentials", lab.cluster.s3_access_key, lab.cluster.s3_secret_key))
    status = job.until_succeeded()
    assert job.condition("Degraded")["status"] == "False"
    assert [(e["stage"], e["class"]) for e in status["attempts"]] == [("prepare", "Succeeded"), ("train", "Succeeded")]


def test_a_gpu_job_waits_for_a_gpu_and_is_placed_on_the_tainted_node_that_offers_one(lab: Lab):
    node = str(lab.cluster.node_name)
    lab.cluster.advertise_gpus(0)
    job = lab.submit("gpu", resources={"gpusPerNode": 1, "memory": "4Gi"})
    try:
        job.until(lambda: job.condition("Admitted").get("reason") == "Unschedulable", "the job waits for a GPU")
        assert "nvidia.com/gpu" in job.condition("Admitted")["message"]
        assert job.condition("Planned")["status"] == "True"  # the data was prepared without one

        lab.cluster.kubectl("taint", "node", node, "nvidia.com/gpu=present:NoSchedule", "--overwrite")
        lab.cluster.advertise_gpus(1)
        pod = job.until(lambda: _placed(job), "the training pod is placed")
    finally:
        lab.cluster.kubectl("taint", "node", node, "nvidia.com/gpu-", check=False)
        lab.cluster.advertise_gpus(0)
        job.delete()
    spec = pod["spec"]
    resources = spec["containers"][0]["resources"]
    assert spec["nodeName"] == node
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "1"
    assert resources["limits"] == resources["requests"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]
    (shm,) = [volume for volume in spec["volumes"] if volume["name"] == "shm"]
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Mi"}
    mounts = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
    assert mounts["shm"] == "/dev/shm"


def _placed(job: Submitted) -> dict[str, Any] | None:
    return next((pod for pod in job.pods(Stage.TRAIN) if pod["spec"].get("nodeName")), None)


def test_a_deleted_job_leaves_no_pod_and_keeps_what_is_in_the_bucket(lab: Lab, in_training: Submitted):
    job, checkpoints = in_training, f"{in_training.run_uri()}/.job/checkpoints/"
    began_s = time.monotonic()
    job.delete()
    until(lambda: not job.pods() and not job.jobs(), "nothing is left of the job", PATIENCE_S, job.explain)
    print(f"gone after {time.monotonic() - began_s:.1f} s")
    configs = lab.api.items(f"/api/v1/namespaces/{lab.namespace}/configmaps", labelSelector="finetune.dev/job-name")
    assert [c["metadata"]["name"] for c in configs if c["metadata"]["name"].startswith("in-training")] == []
    assert lab.keys(checkpoints)
