"""What the real API server accepts and refuses, and in which words."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config

import spec_cases
import testbed
from finetune_api.names import GROUP, PLURAL, VERSION

pytestmark = pytest.mark.control_plane


@pytest.fixture(scope="module")
def api(control_plane: testbed.Cluster) -> client.CustomObjectsApi:
    return client.CustomObjectsApi(config.new_client_from_config(str(control_plane.kubeconfig)))


@pytest.fixture(scope="module")
def existing(api: client.CustomObjectsApi) -> Iterator[str]:
    """Resource version of an object like the table's base."""
    created: Any = api.create_namespaced_custom_object(GROUP, VERSION, "default", PLURAL, spec_cases.base())
    yield created["metadata"]["resourceVersion"]
    api.delete_namespaced_custom_object(GROUP, VERSION, "default", PLURAL, created["metadata"]["name"])


def create(api: client.CustomObjectsApi, body: dict[str, Any]) -> None:
    """As `kubectl create --dry-run=server` does, with its strict handling of unknown fields."""
    api.create_namespaced_custom_object(
        GROUP, VERSION, "default", PLURAL, body, dry_run="All", field_validation="Strict"
    )


def replace(api: client.CustomObjectsApi, body: dict[str, Any], resource_version: str) -> None:
    body["metadata"] |= {"resourceVersion": resource_version}
    api.replace_namespaced_custom_object(
        GROUP, VERSION, "default", PLURAL, "bot", body, dry_run="All", field_validation="Strict"
    )


def message(refusal: pytest.ExceptionInfo[client.ApiException]) -> str:
    return json.loads(refusal.value.body or "{}")["message"]


@pytest.mark.parametrize("path", spec_cases.EXAMPLES, ids=lambda path: path.name)
def test_the_api_server_accepts_every_example(control_plane: testbed.Cluster, path: Path):
    control_plane.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", str(path))


@pytest.mark.parametrize(("name", "body"), spec_cases.accepted())
def test_the_api_server_accepts(api: client.CustomObjectsApi, name: str, body: dict[str, Any]):
    create(api, body | {"metadata": {"generateName": "x-"} if body["metadata"]["name"] == "bot" else body["metadata"]})


@pytest.mark.parametrize(("name", "body", "says"), spec_cases.refused())
def test_the_api_server_refuses_and_says_what_to_write(
    api: client.CustomObjectsApi, name: str, body: dict[str, Any], says: str
):
    with pytest.raises(client.ApiException) as refusal:
        create(api, body)
    assert says in message(refusal)


@pytest.mark.parametrize(("name", "body", "says"), spec_cases.refused_changes())
def test_the_api_server_refuses_to_change(
    api: client.CustomObjectsApi, existing: str, name: str, body: dict[str, Any], says: str
):
    with pytest.raises(client.ApiException) as refusal:
        replace(api, body, existing)
    assert says in message(refusal)


@pytest.mark.parametrize(("name", "body"), spec_cases.allowed_changes())
def test_the_api_server_allows_to_change(api: client.CustomObjectsApi, existing: str, name: str, body: dict[str, Any]):
    replace(api, body, existing)


def test_kubectl_reads_an_unquoted_2e_4_as_a_number(control_plane: testbed.Cluster):
    text = json.dumps(spec_cases.base() | {"metadata": {"name": "number"}}).replace("0.0002", "2e-4")
    assert "2e-4" in text
    seen = control_plane.kubectl("apply", "--dry-run=server", "-o", "json", "-f", "-", stdin=text)
    assert json.loads(seen)["spec"]["hyperparameters"]["learningRate"] == 2e-4


def test_kubectl_explain_tells_what_an_absent_field_means(control_plane: testbed.Cluster):
    words = " ".join(control_plane.kubectl("explain", "ftj.spec.hyperparameters.learningRate").split())
    assert "<number>" in words
    assert "Absent: by the model's family and width" in words
