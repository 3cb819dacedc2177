"""What a runtime may say: Helm refuses by the chart's schema whatever the operator would refuse when it starts."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from finetune_api.platform import RESERVED_ENV, Runtime
from finetune_operator.runtimes import parse_runtimes
from finetune_operator.settings import SettingsError

SCHEMA = json.loads((Path(__file__).parents[2] / "charts/finetune-operator/values.schema.json").read_text())
IMAGE = {"image": "registry.example/trainer:1"}

REFUSED: dict[str, dict[str, Any]] = {
    **{f"the reserved variable {name}": {"env": {name: "x"}} for name in sorted(RESERVED_ENV)},
    "a variable with a space": {"env": {"A B": "x"}},
    "a variable that is a number": {"env": {"A": 1}},
    "a variable of no end": {"env": {"A": "x" * 5000}},
    "a label with a space": {"podLabels": {"team": "a b"}},
    "a label's name with two slashes": {"podLabels": {"a/b/c": "x"}},
    "a label that begins with a dot": {"podLabels": {"team": ".a"}},
    "a label of 64 characters": {"podLabels": {"team": "a" * 64}},
    "an annotation without a name": {"podAnnotations": {"": "x"}},
    "a node selector with a slash in its value": {"nodeSelector": {"pool": "a/b"}},
    "a GPU's node selector with a space": {"gpu": {"nodeSelector": {"gpu": "h 100"}}},
    "a priority class with two dots": {"priorityClassName": "a..b"},
    "a pull secret in capitals": {"imagePullSecrets": ["Pull"]},
    "cores below zero": {"defaults": {"cpu": -1}},
    "no cores": {"defaults": {"cpu": 0}},
    "too many cores": {"defaults": {"cpu": 10_000}},
    "cores that are a fraction": {"prepare": {"cpu": "1.5"}},
    "memory in GB": {"defaults": {"memory": "16GB"}},
    "two GPUs": {"defaults": {"gpusPerNode": 2}},
    "a grace period of a second": {"terminationGracePeriodSeconds": 1},
    "an effect that there is not": {"tolerations": [{"effect": "Never"}]},
    "a field that there is not": {"gpus": 1},
    "a toleration's field that there is not": {"tolerations": [{"seconds": 1}]},
    "a policy without anybody to ask": {"policy": {"allowedLicenses": ["MIT"]}},
    "a licence of a policy in words": {"policy": {"contact": "legal", "allowedLicenses": ["the MIT licence"]}},
    "a choice of licences in a policy": {"policy": {"contact": "legal", "allowedLicenses": ["MIT OR Apache-2.0"]}},
    "a prefix that ends within a name": {
        "policy": {"contact": "legal", "highestConfidentiality": [{"prefix": "s3://adapters/pub", "highest": "Public"}]}
    },
    "a prefix without a highest": {"policy": {"contact": "legal", "highestConfidentiality": [{"prefix": "s3://"}]}},
    "a confidentiality that there is not": {
        "policy": {"contact": "legal", "highestConfidentiality": [{"prefix": "s3://", "highest": "Secret"}]}
    },
    "a required field that there is not": {"policy": {"contact": "legal", "requiredFields": ["owner"]}},
}
ACCEPTED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "names as Kubernetes has them": {
        "env": {"HTTPS_PROXY": "http://proxy:3128", "_x": ""},
        "podLabels": {"team": "ml", "example.com/cost-centre": "4711", "empty": ""},
        "podAnnotations": {"example.com/note": "any words, even a/b or {c}"},
        "nodeSelector": {"node.kubernetes.io/instance-type": "p5.48xlarge"},
        "tolerations": [{"key": "spot", "operator": "Exists", "tolerationSeconds": 60}],
        "priorityClassName": "low.priority",
    },
    "sizes": {"defaults": {"cpu": 8, "memory": "64Gi", "gpusPerNode": 1}, "prepare": {"cpu": "500m"}},
    "a policy": {
        "policy": {
            "contact": "legal@example.com, or #data on the chat",
            "requiredFields": ["license", "source", "confidentiality", "copyrightHolder"],
            "allowedLicenses": ["MIT", "GPL-2.0-only WITH Classpath-exception-2.0", "LicenseRef-ours"],
            "highestConfidentiality": [
                {"prefix": "s3://", "highest": "Public"},
                {"prefix": "s3://adapters/", "highest": "Restricted"},
                {"prefix": "s3://adapters/team-a/", "highest": "Internal"},
            ],
        }
    },
}


def _is_refused_by_helm(runtime: dict[str, Any], name: str = "default") -> bool:
    """Return True if the schema, as Helm applies it, refuses the runtime."""
    found = list(jsonschema.Draft7Validator(SCHEMA).iter_errors({"runtimes": {name: runtime}}))
    return bool(found)


def _is_refused_by_the_operator(runtime: dict[str, Any], name: str = "default") -> bool:
    try:
        parse_runtimes(yaml.safe_dump({"runtimes": {name: IMAGE | runtime}}))
    except SettingsError as error:
        return f"runtimes.{name}" in str(error)
    return False


@pytest.mark.parametrize("runtime", REFUSED.values(), ids=REFUSED)
def test_helm_refuses_what_the_operator_refuses(runtime: dict[str, Any]) -> None:
    assert _is_refused_by_the_operator(runtime)
    assert _is_refused_by_helm(runtime)


@pytest.mark.parametrize("runtime", ACCEPTED.values(), ids=ACCEPTED)
def test_helm_and_operator_take_what_kubernetes_takes(runtime: dict[str, Any]) -> None:
    assert not _is_refused_by_the_operator(runtime)
    assert not _is_refused_by_helm(runtime)


def test_a_runtime_has_a_name_as_kubernetes_objects_have() -> None:
    assert _is_refused_by_helm({}, "GPU")
    with pytest.raises(SettingsError):
        parse_runtimes(yaml.safe_dump({"runtimes": {"GPU": IMAGE}}))


def test_every_field_of_a_runtime_is_in_the_schema() -> None:
    properties = SCHEMA["properties"]["runtimes"]["additionalProperties"]["properties"]
    assert set(properties) == {field.alias for field in Runtime.model_fields.values()}
