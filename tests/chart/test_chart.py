"""The chart, as Helm renders it."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.crd import custom_resource_definition
from finetune_api.job import QUANTITY_PATTERN
from testbed import binaries
from waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/finetune-operator"

RUNTIME: dict[str, Any] = {
    "image": "registry.example/trainer@sha256:" + "a" * 64,
    "imagePullPolicy": "Always",
    "imagePullSecrets": ["pull"],
    "nodeSelector": {"pool": "train"},
    "tolerations": [{"key": "train", "operator": "Exists", "effect": "NoSchedule"}],
    "priorityClassName": "low",
    "podLabels": {"team": "ml"},
    "podAnnotations": {"note": "x"},
    "env": {"HTTPS_PROXY": "http://proxy:3128"},
    "nodeIdentity": False,
    "terminationGracePeriodSeconds": 60,
    "gpu": {"resourceName": "amd.com/gpu", "nodeSelector": {"gpu": "yes"}, "tolerations": []},
    "defaults": {"cpu": "4", "memory": "16Gi", "gpusPerNode": 0, "ephemeralStorage": "20Gi", "sharedMemory": "1Gi"},
    "prepare": {"cpu": "500m", "memory": "4Gi", "ephemeralStorage": "20Gi"},
    "policy": {
        "contact": "legal@example.com",
        "requiredFields": ["license"],
        "allowedLicenses": ["MIT"],
        "highestConfidentiality": [{"prefix": "s3://adapters/", "highest": "Internal"}],
    },
}


@pytest.fixture(scope="module")
def helm() -> str:
    built = Path(binaries.binary("helm"))
    found = str(built) if built.exists() else shutil.which("helm")
    if found is None:
        pytest.skip("no helm; run: make testbed")
    return found


def run(helm: str, *arguments: str, values: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    given = ["--values", "-"] if values else []
    return subprocess.run(
        [helm, *arguments, *given],
        input=json.dumps(values) if values else None,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def render(helm: str, values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    done = run(helm, "template", "finetune-operator", str(CHART), "--namespace", "finetune-system", values=values)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def by_kind(objects: list[dict[str, Any]], kind: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (item["metadata"].get("namespace", ""), item["metadata"]["name"]): item
        for item in objects
        if item["kind"] == kind
    }


def only(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = by_kind(objects, kind).values()
    return found


def all_rules(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for item in objects:
        if item["kind"] in ("Role", "ClusterRole"):
            yield from item["rules"]


def test_lint_is_clean(helm: str):
    done = run(helm, "lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout


def test_a_second_render_is_the_same_to_the_byte(helm: str):
    values = {"watchNamespaces": ["b", "a"], "runtimes": {"default": RUNTIME, "gpu": {}}, "env": {"B": "1", "A": "2"}}
    arguments = ("template", "x", str(CHART), "--namespace", "ns")
    assert run(helm, *arguments, values=values).stdout == run(helm, *arguments, values=values).stdout


def test_the_whole_cluster_is_watched_with_one_cluster_role(helm: str):
    objects = render(helm)
    assert by_kind(objects, "Role").keys() == {("finetune-system", "finetune-operator-lease")}
    assert ("", "finetune-operator") in by_kind(objects, "ClusterRole")
    binding = only(objects, "ClusterRoleBinding")
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": "finetune-operator", "namespace": "finetune-system"}
    ]
    assert environment(objects)["FINETUNE_WATCH_NAMESPACES"] == ""


def test_chosen_namespaces_are_watched_with_roles_in_those_only(helm: str):
    objects = render(helm, {"watchNamespaces": ["team-b", "team-a", "team-b"], "rbac": {"aggregate": False}})
    assert not by_kind(objects, "ClusterRole")
    assert not by_kind(objects, "ClusterRoleBinding")
    own = {("finetune-system", "finetune-operator-lease")}
    watched = {("team-a", "finetune-operator"), ("team-b", "finetune-operator")}
    assert by_kind(objects, "Role").keys() == by_kind(objects, "RoleBinding").keys() == own | watched
    assert environment(objects)["FINETUNE_WATCH_NAMESPACES"] == "team-a,team-b"


@pytest.mark.parametrize("namespaces", [[], ["a"]])
def test_no_right_is_more_than_needed(helm: str, namespaces: list[str]):
    for rule in all_rules(render(helm, {"watchNamespaces": namespaces})):
        assert "*" not in json.dumps(rule)
        assert not {"secrets", "nodes", "namespaces", "customresourcedefinitions"} & set(rule["resources"])


def test_the_lease_is_the_releases_and_no_other_may_be_read_or_changed(helm: str):
    done = run(helm, "template", "second", str(CHART), "--namespace", "ns")
    objects = [document for document in yaml.safe_load_all(done.stdout) if document]
    assert environment(objects)["FINETUNE_LEASE_NAME"] == "second-finetune-operator"
    rules = by_kind(objects, "Role")["ns", "second-finetune-operator-lease"]["rules"]
    assert {tuple(rule["verbs"]): rule.get("resourceNames") for rule in rules} == {
        ("get", "update"): ["second-finetune-operator"],
        ("create",): None,
    }


def environment(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (container,) = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    return {item["name"]: item.get("value") for item in container["env"]}


def test_the_pod_is_restricted_and_single(helm: str):
    deployment = only(render(helm), "Deployment")
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["livenessProbe"]["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/healthz"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 300  # a slow start is no reason to be killed
    assert container["resources"]["limits"]["memory"]


def test_labels_of_the_service_and_the_deployment_select_the_pod(helm: str):
    objects = render(helm, {"podLabels": {"team": "ml"}})
    deployment, service = only(objects, "Deployment"), only(objects, "Service")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels
    assert service["spec"]["selector"].items() <= labels


def runtimes(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return yaml.safe_load(only(objects, "ConfigMap")["data"]["runtimes.yaml"])["runtimes"]


def test_a_runtime_is_handed_over_as_written_and_has_an_image(helm: str):
    given = {"trainerImage": {"digest": "sha256:" + "b" * 64}, "runtimes": {"default": {}, "gpu": RUNTIME}}
    found = runtimes(render(helm, given))
    assert found == {"default": {"image": "finetune-trainer@sha256:" + "b" * 64}, "gpu": RUNTIME}


def test_the_operator_reads_the_runtimes_of_the_chart(helm: str):
    runtimes = pytest.importorskip("finetune_operator.runtimes")
    text = only(render(helm, {"runtimes": {"default": {}, "gpu": RUNTIME}}), "ConfigMap")["data"]["runtimes.yaml"]
    assert runtimes.parse_runtimes(text)["gpu"].image == RUNTIME["image"]


def test_images_are_of_the_release_unless_told_otherwise(helm: str):
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]

    def image(values: dict[str, Any] | None = None) -> str:
        (container,) = only(render(helm, values), "Deployment")["spec"]["template"]["spec"]["containers"]
        return container["image"]

    assert image() == f"finetune-operator:{version}"
    assert image({"image": {"tag": "1.2"}}) == "finetune-operator:1.2"
    digest = "sha256:" + "c" * 64
    assert image({"image": {"tag": "1.2", "digest": digest}}) == f"finetune-operator@{digest}"


def test_the_crd_is_the_generated_one_and_stays_when_the_release_goes(helm: str):
    crd = only(render(helm), "CustomResourceDefinition")
    assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert crd == custom_resource_definition()
    assert "annotations" not in only(render(helm, {"crds": {"keep": False}}), "CustomResourceDefinition")["metadata"]
    assert not by_kind(render(helm, {"crds": {"enabled": False}}), "CustomResourceDefinition")


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"replicas": 2}, "replicas"),
        ({"image": {"name": "x"}}, "name"),
        ({"image": {"tag": "latest"}}, "/image/tag"),
        ({"image": {"digest": "sha256:1"}}, "/image/digest"),
        ({"watchNamespaces": "team-a"}, "/watchNamespaces"),
        ({"watchNamespaces": ["*"]}, "/watchNamespaces/0"),
        ({"runtimes": {"default": {"gpus": 1}}}, "gpus"),
        ({"runtimes": {"default": {"image": "trainer:latest"}}}, "/runtimes/default/image"),
        ({"runtimes": {"default": {"image": "registry:5000/trainer"}}}, "/runtimes/default/image"),
        ({"runtimes": {"default": {"defaults": {"memory": "16GB"}}}}, "/runtimes/default/defaults/memory"),
        ({"runtimes": {"default": {"env": {"A": 1}}}}, "/runtimes/default/env/A"),
        ({"runtimes": {"default": {"env": {"HOME": "/root"}}}}, "HOME"),
        ({"runtimes": {"default": {"podLabels": {"team": "a b"}}}}, "/runtimes/default/podLabels/team"),
        ({"runtimes": {"GPU": {}}}, "GPU"),
        ({"runtimes": {"default": {"policy": {}}}}, "contact"),
        ({"runtimes": {"default": {"policy": {"contact": "x", "allowedLicenses": ["a b"]}}}}, "allowedLicenses/0"),
        ({"runtimes": {"default": {"nodeIdentity": "yes"}}}, "/runtimes/default/nodeIdentity"),
        ({"logLevel": "verbose"}, "/logLevel"),
        ({"rbac": {"cluster": True}}, "cluster"),
    ],
)
def test_a_wrong_value_is_refused_by_its_place(helm: str, values: dict[str, Any], place: str):
    done = run(helm, "template", "x", str(CHART), values=values)
    assert done.returncode != 0
    assert place in done.stderr


def test_every_value_is_explained_and_in_the_schema():
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    lines = (CHART / "values.yaml").read_text().splitlines()
    assert set(schema["properties"]) - {"global"} == set(values)
    for name in values:
        above = lines[next(i for i, line in enumerate(lines) if line.startswith(f"{name}:")) - 1]
        nested = isinstance(schema["properties"][name].get("properties"), dict) and not above.startswith("#")
        assert nested or above.startswith("#"), name


def walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("properties", {}).values():
        yield from walk(child)
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            yield from walk(node[key])


def test_the_schema_takes_the_quantities_that_the_operator_takes():
    schema = json.loads((CHART / "values.schema.json").read_text())
    patterns = [node["pattern"] for node in walk(schema) if "Gi" in node.get("pattern", "")]
    assert len(patterns) == 5
    assert set(patterns) == {QUANTITY_PATTERN}


def test_no_object_of_the_schema_is_open():
    schema = json.loads((CHART / "values.schema.json").read_text())
    for node in walk(schema):
        if "properties" in node:
            assert node["additionalProperties"] is False


def test_the_notes_name_three_next_commands(helm: str):
    # Client-side only: nothing is asked of a cluster.
    done = run(helm, "install", "x", str(CHART), "--dry-run=client", "--namespace", "ns")
    notes = done.stdout.partition("NOTES:")[2]
    assert notes.count("kubectl") == 3
    assert "deployment/x-finetune-operator" in notes
