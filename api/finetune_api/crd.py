"""The CustomResourceDefinition of FineTuneJob, made from the models.

pydantic's JSON schema is not what Kubernetes takes: a *structural* schema has no references, no null, no const, no
boolean-free exclusive bounds, and either named properties or free ones. `structural` translates; what it does not
know it refuses, so that a new construct in a model is seen here and not by the API server.
"""

from typing import Any, cast

from pydantic import BaseModel

from finetune_api.cel import rules
from finetune_api.job import FineTuneJobSpec
from finetune_api.names import CATEGORIES, GROUP, KIND, MAX_NAME_LENGTH, PLURAL, SHORT_NAMES, SINGULAR, VERSION
from finetune_api.status import PHASE_FIELD, FineTuneJobStatus

Schema = dict[str, Any]

MAX_WORD_LENGTH = 64  # of a status field that holds one word of a list
MUTABLE_FIELDS = ("startPolicy", "suspend", "ttlSecondsAfterFinished")

_KEPT = (
    "type",
    "description",
    "enum",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "required",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-validations",
)
_DROPPED = ("title", "default", "additionalProperties", "$defs")  # noise, or meaningless beside `properties`
_TRANSLATED = ("$ref", "anyOf", "const", "properties", "items", "pattern", "exclusiveMinimum", "exclusiveMaximum")


def custom_resource_definition() -> Schema:
    """The whole object, as `kubectl apply` takes it."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": SINGULAR,
                "shortNames": list(SHORT_NAMES),
                "categories": list(CATEGORIES),
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": printer_columns(),
                    "selectableFields": [{"jsonPath": f".{PHASE_FIELD}"}],
                    "schema": {"openAPIV3Schema": object_schema()},
                }
            ],
        },
    }


def object_schema() -> Schema:
    """Schema of a FineTuneJob object."""
    spec = structural(FineTuneJobSpec)
    spec["x-kubernetes-validations"] = [*spec.get("x-kubernetes-validations", []), *immutability(spec)]
    return {
        "description": "Fine-tunes a language model and commits the adapter with its digests to object storage.",
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}"},
            "kind": {"type": "string", "description": KIND},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": with_open_words(structural(FineTuneJobStatus)),
        },
        **rules(
            (
                f"self.metadata.name.size() <= {MAX_NAME_LENGTH}",
                f"metadata.name is longer than {MAX_NAME_LENGTH} characters; write a shorter one, "
                "as names of pods are made from it",
            ),
            (
                "self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
                "metadata.name may hold only lower-case letters, digits and -, no dot and no - at an end; write such a "
                "name, as pods are named after it",
            ),
            (
                "!has(self.spec.model.adapterFrom) || !has(self.spec.model.adapterFrom.jobName) "
                "|| self.spec.model.adapterFrom.jobName != self.metadata.name",
                "model.adapterFrom.jobName is this job itself; name the job before it",
            ),
        ),
    }


def printer_columns() -> list[Schema]:
    """What `kubectl get ftj` shows; priority 1 only with `-o wide`."""

    def column(name: str, path: str, kind: str = "string", *, wide: bool = False) -> Schema:
        return {"name": name, "type": kind, "jsonPath": path} | ({"priority": 1} if wide else {})

    return [
        column("Method", ".spec.method.type"),
        column("Model", ".spec.model.uri"),
        column("Phase", f".{PHASE_FIELD}"),
        column("Reason", '.status.conditions[?(@.type=="Succeeded")].reason'),
        column("Progress", ".status.progress.text"),
        column("ETA", ".status.progress.eta"),
        column("Loss", ".status.metrics.loss"),
        column("Attempt", ".status.attempts[-1:].number", "integer"),
        column("Age", ".metadata.creationTimestamp", "date"),
        column("GPUs", ".spec.resources.gpusPerNode", "integer", wide=True),
        column("Accuracy", _of_progress("reward_accuracy"), "number", wide=True),
        column("Margin", _of_progress("reward_margin"), "number", wide=True),
        column("Artifact", ".status.artifacts[0].uri", wide=True),
    ]


def _of_progress(figure: str) -> str:
    """Return where the last value of a method's figure stands."""
    return f'.status.progress.figures[?(@.name=="{figure}")].value'


def immutability(spec: Schema) -> list[dict[str, str]]:
    """Transition rules that freeze every field of the spec but MUTABLE_FIELDS.

    They stand at the spec, not at the fields: a rule at an optional field does not run when it appears or vanishes.
    """
    frozen = [name for name in spec["properties"] if name not in MUTABLE_FIELDS]
    return [
        {
            "rule": f"self.{name} == oldSelf.{name}"
            if name in spec["required"]
            else f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})",
            "message": f"spec.{name} cannot change once created; create a new FineTuneJob",
        }
        for name in frozen
    ]


def structural(model: type[BaseModel]) -> Schema:
    """The structural schema of a model. Raises ValueError for a construct that has no translation."""
    schema = model.model_json_schema()
    return _translate(schema, schema.get("$defs", {}))


def with_open_words(schema: Schema) -> Schema:
    """Return the schema with bounded text in place of fixed lists of words.

    A later operator must be able to write its words on the CRD of an earlier one; the code knows the lists."""
    node = {key: value for key, value in schema.items() if key != "enum"}
    if "enum" in schema:
        node |= {"type": "string", "maxLength": MAX_WORD_LENGTH}
    if "properties" in node:
        node["properties"] = {name: with_open_words(child) for name, child in node["properties"].items()}
    if "items" in node:
        node["items"] = with_open_words(node["items"])
    return node


def _translate(node: Schema, definitions: dict[str, Schema]) -> Schema:
    if "$ref" in node:
        # What stands beside the reference says more than the shared definition.
        target = definitions[node["$ref"].removeprefix("#/$defs/")]
        return _translate({**target, **{key: value for key, value in node.items() if key != "$ref"}}, definitions)
    if "anyOf" in node:
        return _union(node, definitions)
    unknown = set(node) - {*_KEPT, *_DROPPED, *_TRANSLATED}
    if unknown or ("additionalProperties" in node and "properties" not in node):
        raise ValueError(f"no structural schema for {unknown or 'a free map'} in {node}")
    schema: Schema = {key: node[key] for key in _KEPT if key in node}
    if "const" in node:
        schema["enum"] = [node["const"]]
    if "pattern" in node and "x-kubernetes-validations" not in node:
        schema["pattern"] = node["pattern"]  # else a rule says the same with words that help
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if exclusive in node:
            schema |= {bound: node[exclusive], exclusive: True}
    if "properties" in node:
        properties = cast(dict[str, Schema], node["properties"])
        schema["properties"] = {name: _translate(child, definitions) for name, child in properties.items()}
    if "items" in node:
        schema["items"] = _translate(node["items"], definitions)
    return schema


def _union(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """`T | None` is an optional T; `int | str` is Kubernetes' int-or-string, bounded by the rules beside it."""
    outer = {key: value for key, value in node.items() if key not in ("anyOf", "default")}
    members = [member for member in node["anyOf"] if member.get("type") != "null"]
    if len(members) == 1:
        return _translate({**members[0], **outer}, definitions)
    if [member.get("type") for member in members] != ["integer", "string"] or "x-kubernetes-validations" not in outer:
        raise ValueError(f"no structural schema for the union {node}")
    return {**_translate(outer, definitions), "x-kubernetes-int-or-string": True}
