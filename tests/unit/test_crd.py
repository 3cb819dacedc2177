"""The generated CRD is current, small, and structural."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel

from finetune_api.crd import MUTABLE_FIELDS, custom_resource_definition, object_schema, structural

ROOT = Path(__file__).resolve().parents[2]


def nodes(schema: dict[str, Any], place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield place, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{place}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{place}[]")


ALL_NODES = list(nodes(object_schema()))


def test_the_generated_files_are_current():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "crds/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path, content in module.generated().items():
        assert path.read_text() == content, f"{path} is stale; run `make crds`"


def test_the_crd_fits_into_client_side_apply_and_reads_back():
    text = (ROOT / "crds/finetunejobs.yaml").read_text()
    assert len(text.encode()) < 150_000
    assert yaml.safe_load(text) == custom_resource_definition()


def test_every_node_is_structural_bounded_and_described():
    for place, node in ALL_NODES:
        assert not {"$ref", "default", "title", "const", "oneOf", "anyOf", "additionalProperties"} & set(node), place
        assert "type" in node or node.get("x-kubernetes-int-or-string"), place
        assert place == ".metadata" or "[]" in place or len(node["description"]) > 3, place
        if not place.startswith((".spec", ".status")):
            continue
        if node.get("type") == "array":
            assert node["maxItems"] <= 20, place
        if node.get("type") == "string":
            assert "maxLength" in node or "enum" in node, place
        if node.get("type") in ("integer", "number") and place.startswith(".spec"):
            assert {"minimum", "maximum"} <= set(node), place


def test_all_of_the_spec_is_frozen_but_what_may_change():
    spec = object_schema()["properties"]["spec"]
    rules = " ".join(rule["rule"] for rule in spec["x-kubernetes-validations"])
    assert {name for name in spec["properties"] if f"oldSelf.{name}" not in rules} == set(MUTABLE_FIELDS)


def test_only_four_things_must_be_written():
    spec = object_schema()["properties"]["spec"]
    required = {f"{place}.{name}" for place, node in nodes(spec) for name in node.get("required", [])}
    of_parts = {
        name for name in required if name.startswith((".peft", ".storage", ".preprocessing", ".replay"))
    }  # required once the part is written
    assert required - of_parts == {
        *(".model", ".method", ".datasets", ".output"),
        *(".model.uri", ".method.type", ".datasets[].uri", ".output.uri"),
    }


def test_messages_of_rules_are_short_enough_to_read():
    for _, node in ALL_NODES:
        for rule in node.get("x-kubernetes-validations", []):
            assert len(rule["message"]) <= 150
            assert "\n" not in rule["message"]


class _FreeMap(BaseModel):
    free: dict[str, str]


class _Mixed(BaseModel):
    mixed: int | str


class _Word(BaseModel):
    word: Literal["a"] | None = None


def test_a_construct_without_translation_is_refused():
    with pytest.raises(ValueError, match="a free map"):
        structural(_FreeMap)
    with pytest.raises(ValueError, match="union"):
        structural(_Mixed)


def test_an_optional_word_becomes_a_list_of_one():
    assert structural(_Word)["properties"]["word"] == {"type": "string", "enum": ["a"]}


def test_the_words_of_a_later_operator_fit_into_the_status():
    for place, node in ALL_NODES:
        assert not place.startswith(".status") or "enum" not in node, place
        assert place != ".status.phase" or node["maxLength"] == 64
