"""The part of the chart's values.schema.json that is made from the models: what a runtime may say.

Helm refuses by it, when a release is installed, what the operator would refuse when it starts.
"""

from typing import Any, cast

from pydantic import TypeAdapter

from finetune_api.objects import DnsName
from finetune_api.platform import Runtime

Schema = dict[str, Any]

_DROPPED = ("title", "default", "x-kubernetes-validations")


def runtimes_schema() -> Schema:
    """Return the JSON schema (draft 7, without references) of the value `runtimes`.

    No field of a runtime itself is required: the chart fills in the image."""
    whole = Runtime.model_json_schema()
    del whole["required"]
    names = _inlined(TypeAdapter(DnsName).json_schema(), {})
    return {
        "type": "object",
        "minProperties": 1,
        "propertyNames": {key: value for key, value in names.items() if key != "type"},
        "additionalProperties": _inlined(whole, whole.get("$defs", {})),
    }


def _inlined(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """Return the schema with its references put in, without what only pydantic or Kubernetes reads."""
    if "$ref" in node:
        target = definitions[node["$ref"].removeprefix("#/$defs/")]
        return _inlined({**target, **{key: value for key, value in node.items() if key != "$ref"}}, definitions)
    if "anyOf" in node:
        members = [_inlined(member, definitions) for member in node["anyOf"] if member.get("type") != "null"]
        rest = {key: value for key, value in node.items() if key not in (*_DROPPED, "anyOf")}
        return {**(members[0] if len(members) == 1 else {"anyOf": members}), **rest}
    schema = {key: value for key, value in node.items() if key not in (*_DROPPED, "$defs")}
    if isinstance(schema.get("properties"), dict):
        children = cast(dict[str, Schema], schema["properties"])
        schema["properties"] = {name: _inlined(child, definitions) for name, child in children.items()}
    if isinstance(schema.get("items"), dict):
        schema["items"] = _inlined(cast(Schema, schema["items"]), definitions)
    return schema
