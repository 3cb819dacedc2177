"""What is created for a job: restricted, deterministic, and with nothing of the user in a place it does not belong."""

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune_api import names
from finetune_api.names import Stage
from finetune_api.platform import Runtime
from finetune_api.run import CONTRACT_VERSION, RunConfig
from finetune_operator.children import prepare, train
from finetune_operator.job_reader import FineTuneJob, read_job
from finetune_operator.observed import observe_k8s_job, observe_pod
from finetune_operator.run_config import RUNTIME_FILE, config_map, new_run, run_config

DIGEST = "sha256:" + "b" * 64
GPU_RUNTIME = Runtime.model_validate(
    {
        "image": "trainer@sha256:1",
        "imagePullSecrets": ["pull"],
        "nodeSelector": {"pool": "train"},
        "priorityClassName": "low",
        "podLabels": {"team": "ml", names.LABEL_JOB_UID: "forged"},
        "env": {"HTTPS_PROXY": "http://proxy:3128"},
        "gpu": {"nodeSelector": {"gpu": "h100"}, "tolerations": [{"key": "spot", "operator": "Exists"}]},
        "defaults": {"cpu": "8", "memory": "64Gi", "gpusPerNode": 1, "sharedMemory": "8Gi", "ephemeralStorage": "50Gi"},
        "prepare": {"cpu": "500m", "memory": "2Gi", "ephemeralStorage": "5Gi"},
    }
)


NO_NODE_IDENTITY = {"name": "AWS_EC2_METADATA_DISABLED", "value": "true"}


def job(**spec: Any) -> FineTuneJob:
    return read_job(
        {
            "metadata": {
                "name": "bot",
                "namespace": "team-a",
                "uid": "1a2b3c4d-5e6f",
                "generation": 1,
                "creationTimestamp": "2026-01-02T03:04:05Z",
            },
            "spec": {
                "model": {"uri": "s3://models/m"},
                "method": {"type": "SFT"},
                "datasets": [{"uri": "s3://data/x"}],
                "output": {"uri": "s3://out/bot/"},
                **spec,
            },
        }
    )


def rendered(stage: Stage, attempt: int = 1, runtime: Runtime = GPU_RUNTIME, **spec: Any) -> dict[str, Any]:
    of = job(**spec)
    assert of.spec is not None
    run = new_run(of, of.spec, runtime)
    (k8s_job,) = prepare.render(run, attempt) if stage == Stage.PREPARE else train.render(run, attempt, DIGEST)
    return k8s_job


def config_digest() -> str | None:
    of = job()
    assert of.spec is not None
    return new_run(of, of.spec, GPU_RUNTIME).config_digest


def container(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["template"]["spec"]["containers"][0]


def test_the_run_configuration_decides_every_default_and_is_the_same_for_all_attempts():
    of = job(storage={"endpoint": "https://minio:9000", "secretRef": {"name": "s3"}})
    assert of.spec is not None
    config = run_config(of, of.spec, GPU_RUNTIME)
    assert config.run_uri == "s3://out/bot/bot-1a2b3"
    assert config.image == GPU_RUNTIME.image == container(rendered(Stage.TRAIN))["image"]
    assert config.storage.path_style is True
    assert config.storage.region == "us-east-1"
    assert config.storage.credentials_dir == names.CREDENTIALS_DIR
    assert config.resources.gpus == 1
    assert config.resources.memory_bytes == 64 * 2**30
    assert config.contract_version == CONTRACT_VERSION
    assert config.job.created_at == of.created_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    made = config_map(new_run(of, of.spec, GPU_RUNTIME))
    assert made["immutable"] is True
    assert RunConfig.model_validate_json(made["data"][names.CONFIG_FILE]) == config
    assert Runtime.model_validate_json(made["data"][RUNTIME_FILE]) == GPU_RUNTIME


def test_the_longest_output_that_may_be_asked_for_can_be_run():
    of = job(output={"uri": "s3://out/" + "x" * 503})
    assert of.spec is not None
    assert len(run_config(of, of.spec, GPU_RUNTIME).run_uri) < 1024 - 200
    assert job(output={"uri": "s3://out/" + "x" * 504}).spec is None


def test_without_an_endpoint_the_host_style_of_aws_is_used():
    of = job()
    assert of.spec is not None
    assert run_config(of, of.spec, GPU_RUNTIME).storage.path_style is False


def test_the_job_is_a_single_indexed_pod_that_kubernetes_replaces_only_after_disruptions():
    spec = rendered(Stage.TRAIN, 2)["spec"]
    assert (spec["completionMode"], spec["completions"], spec["backoffLimit"]) == ("Indexed", 1, 0)
    assert spec["podReplacementPolicy"] == "Failed"
    assert "ttlSecondsAfterFinished" not in spec
    assert "activeDeadlineSeconds" not in spec
    fail, ignore = spec["podFailurePolicy"]["rules"]
    assert fail["action"] == "FailJob"
    assert fail["onExitCodes"]["values"] == list(range(10, 30))
    assert ignore == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def test_the_train_pod_is_told_what_was_prepared_and_which_attempt_it_is():
    assert container(rendered(Stage.TRAIN, 2))["args"] == [
        "train",
        "--config=/etc/finetune/config/run.json",
        "--attempt=2",
        f"--config-digest={config_digest()}",
        f"--plan-digest={DIGEST}",
    ]
    assert container(rendered(Stage.PREPARE))["args"][-2:] == ["--attempt=1", f"--config-digest={config_digest()}"]


def test_the_pod_is_told_the_digest_of_the_file_that_it_reads():
    of = job()
    assert of.spec is not None
    text = config_map(new_run(of, of.spec, GPU_RUNTIME))["data"][names.CONFIG_FILE]
    assert config_digest() == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def test_only_the_keys_of_credentials_are_mounted_whatever_the_secret_holds():
    volumes = rendered(Stage.TRAIN, storage={"secretRef": {"name": "s3"}})["spec"]["template"]["spec"]["volumes"]
    (credentials,) = [volume for volume in volumes if volume["name"] == "credentials"]
    mounted = {
        item["key"]: source["secret"]["optional"]
        for source in credentials["projected"]["sources"]
        for item in source["secret"]["items"]
    }
    assert mounted == {"AWS_ACCESS_KEY_ID": False, "AWS_SECRET_ACCESS_KEY": False, "AWS_SESSION_TOKEN": True}
    assert {source["secret"]["name"] for source in credentials["projected"]["sources"]} == {"s3"}


@pytest.mark.parametrize("stage", list(Stage))
def test_the_pod_meets_the_restricted_profile_and_holds_no_token(stage: Stage):
    spec = rendered(stage)["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    context = spec["containers"][0]["securityContext"]
    assert context == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {next(iter(set(v) - {"name"})) for v in spec["volumes"]} <= {"configMap", "emptyDir", "secret"}
    resources = spec["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]


def test_prepare_never_claims_a_gpu():
    spec = rendered(Stage.PREPARE)["spec"]["template"]["spec"]
    assert spec["containers"][0]["resources"]["limits"] == {
        "cpu": "500m",
        "memory": "2048Mi",
        "ephemeral-storage": "5120Mi",
    }
    assert spec["nodeSelector"] == {"pool": "train"}
    assert "nvidia.com/gpu" not in json.dumps(spec)


def test_train_on_a_gpu_gets_the_device_the_nodes_and_the_shared_memory():
    spec = rendered(Stage.TRAIN)["spec"]["template"]["spec"]
    assert spec["containers"][0]["resources"]["limits"] == {
        "cpu": "8000m",
        "memory": "65536Mi",
        "ephemeral-storage": "51200Mi",
        "nvidia.com/gpu": "1",
    }
    assert spec["nodeSelector"] == {"pool": "train", "gpu": "h100"}
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]
    assert {"key": "spot", "operator": "Exists"} in spec["tolerations"]
    shm = next(v for v in spec["volumes"] if v["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}


def limits_and_scratch(manifest: dict[str, Any]) -> tuple[dict[str, str], str]:
    volumes = manifest["spec"]["template"]["spec"]["volumes"]
    scratch = next(volume for volume in volumes if volume["name"] == "scratch")
    return container(manifest)["resources"]["limits"], scratch["emptyDir"]["sizeLimit"]


def test_what_the_job_asks_for_beats_the_runtime_for_each_pod_alone():
    asked = {"disk": "70Gi", "gpusPerNode": 0, "prepare": {"cpu": 3, "memory": "6Gi", "disk": "9Gi"}}
    train, train_scratch = limits_and_scratch(rendered(Stage.TRAIN, resources=asked))
    assert (train, train_scratch) == (
        {"cpu": "8000m", "memory": "65536Mi", "ephemeral-storage": "71680Mi"}, "71680Mi"
    )  # fmt: skip
    prepare, prepare_scratch = limits_and_scratch(rendered(Stage.PREPARE, resources=asked))
    assert (prepare, prepare_scratch) == (
        {"cpu": "3000m", "memory": "6144Mi", "ephemeral-storage": "9216Mi"}, "9216Mi"
    )  # fmt: skip


def test_the_training_pods_size_is_not_that_of_prepare():
    asked = {"cpu": 2, "memory": "128Gi", "disk": "1Ti"}
    assert limits_and_scratch(rendered(Stage.PREPARE, resources=asked)) == limits_and_scratch(rendered(Stage.PREPARE))


def test_a_configuration_without_resources_of_prepare_is_still_rendered():
    of = job(resources={"prepare": {"disk": "9Gi"}})
    assert of.spec is not None
    run = new_run(of, of.spec, GPU_RUNTIME)
    earlier = replace(run, config=run.config.model_copy(update={"prepare_resources": None}))
    wanted = rendered(Stage.PREPARE, resources={"prepare": {"disk": "9Gi"}})
    assert prepare.render(earlier, 1) == [wanted]


def test_the_job_may_ask_for_the_cpu_instead_and_for_its_own_size():
    spec = rendered(Stage.TRAIN, resources={"gpusPerNode": 0, "cpu": 2, "memory": "3Gi"})["spec"]["template"]["spec"]
    limits = spec["containers"][0]["resources"]["limits"]
    assert (limits["cpu"], limits["memory"]) == ("2000m", "3072Mi")
    assert "nvidia.com/gpu" not in limits
    assert spec["nodeSelector"] == {"pool": "train"}


def test_the_key_of_pseudonyms_is_one_file_in_prepare_alone():
    asked = {"pii": {"action": "Pseudonymise", "keySecretRef": {"name": "pii-key"}}}
    spec = rendered(Stage.PREPARE, preprocessing=asked)["spec"]["template"]["spec"]
    (volume,) = [each for each in spec["volumes"] if each["name"] == names.PII_KEY_VOLUME]
    items = [{"key": "FINETUNE_PII_KEY", "path": "FINETUNE_PII_KEY"}]
    assert volume["secret"] == {"secretName": "pii-key", "items": items}
    (mount,) = [each for each in spec["containers"][0]["volumeMounts"] if each["name"] == names.PII_KEY_VOLUME]
    assert mount == {"name": names.PII_KEY_VOLUME, "mountPath": names.PII_KEY_DIR, "readOnly": True}
    of = job(preprocessing=asked)
    assert of.spec is not None
    assert run_config(of, of.spec, GPU_RUNTIME).pii_key_path == f"{names.PII_KEY_DIR}/FINETUNE_PII_KEY"
    assert names.PII_KEY_VOLUME not in json.dumps(rendered(Stage.TRAIN, preprocessing=asked)["spec"])
    assert run_config(job(), of.spec.model_copy(update={"preprocessing": None}), GPU_RUNTIME).pii_key_path is None


def test_credentials_and_certificates_are_files_and_never_environment():
    storage = {
        "secretRef": {"name": "s3"},
        "caBundle": {"configMapRef": {"name": "ca"}},
        "serviceAccountName": "trainer",
    }
    spec = rendered(Stage.PREPARE, storage=storage)["spec"]["template"]["spec"]
    mounts = {m["name"]: m["mountPath"] for m in spec["containers"][0]["volumeMounts"]}
    assert mounts["credentials"] == names.CREDENTIALS_DIR
    assert mounts["ca"] == names.CA_BUNDLE_DIR
    assert spec["serviceAccountName"] == "trainer"
    assert [e for e in spec["containers"][0]["env"] if "AWS" in e["name"]] == [NO_NODE_IDENTITY]


@pytest.mark.parametrize("stage", list(Stage))
def test_no_pod_takes_the_role_of_its_node_unless_the_runtime_says_so(stage: Stage):
    assert NO_NODE_IDENTITY in container(rendered(stage))["env"]
    with_it = GPU_RUNTIME.model_copy(update={"node_identity": True})
    assert "AWS_EC2_METADATA_DISABLED" not in json.dumps(rendered(stage, runtime=with_it))


def test_caches_go_to_scratch_and_the_hub_stays_offline():
    env = {e["name"]: e.get("value") for e in container(rendered(Stage.TRAIN))["env"]}
    assert env["HOME"] == names.SCRATCH_DIR
    assert env["HF_HOME"].startswith(names.SCRATCH_DIR)
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["HTTPS_PROXY"] == "http://proxy:3128"
    assert "POD_UID" in env


def test_autoscalers_leave_the_pod_alone_and_no_sidecar_is_injected():
    meta = rendered(Stage.TRAIN)["spec"]["template"]["metadata"]
    assert meta["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert meta["annotations"]["karpenter.sh/do-not-disrupt"] == "true"
    assert meta["annotations"]["linkerd.io/inject"] == "disabled"
    assert meta["labels"]["sidecar.istio.io/inject"] == "false"


def test_a_runtime_cannot_change_the_labels_that_the_operator_selects_by():
    labels = rendered(Stage.TRAIN)["spec"]["template"]["metadata"]["labels"]
    assert labels["team"] == "ml"
    assert labels[names.LABEL_JOB_UID] == "1a2b3c4d-5e6f"


def test_what_is_rendered_is_recognised_again():
    manifest = rendered(Stage.TRAIN, 3)
    seen = observe_k8s_job({**manifest, "metadata": {**manifest["metadata"], "uid": "u"}})
    assert seen is not None
    assert (seen.stage, seen.attempt, seen.live) == (Stage.TRAIN, 3, True)
    meta = manifest["spec"]["template"]["metadata"]
    owner = {"kind": "Job", "uid": "u", "controller": True}
    pod = observe_pod({"metadata": {**meta, "name": "p", "uid": "p", "ownerReferences": [owner]}})
    assert pod is not None
    assert (pod.stage, pod.attempt, pod.gpus) == (Stage.TRAIN, 3, 1)


@settings(max_examples=300, deadline=None)
@given(
    st.from_regex(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", fullmatch=True),
    st.uuids(),
    st.integers(1, names.MAX_ATTEMPTS),
    st.sampled_from(list(Stage)),
)
@example("n" * names.MAX_NAME_LENGTH, UUID(int=0), names.MAX_ATTEMPTS, Stage.PREPARE)
def test_names_of_children_and_their_pods_always_fit(name: str, uid: UUID, attempt: int, stage: Stage):
    child = names.child_name(name, str(uid), stage, attempt)
    # The pod's host name. Its own name is that and five letters more, for which Kubernetes shortens what is too long.
    assert len(f"{child}-0") <= 63
