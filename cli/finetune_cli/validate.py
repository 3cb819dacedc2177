"""The API server's judgement of a job, without an API server: the CRD's own schema and its own CEL rules.

Messages are worded as the API server words them, so that what is learned here holds there.
"""

import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

import celpy
from celpy import celtypes
from celpy.adapter import json_to_cel
from celpy.evaluation import CELEvalError
from jsonschema import Draft4Validator  # OpenAPI 3.0, which CRDs use, has draft 4's boolean exclusiveMinimum
from jsonschema.exceptions import ValidationError

from finetune_api.crd import Schema, object_schema
from finetune_api.job import DpoLoss
from finetune_api.names import API_VERSION, KIND
from finetune_api.uris import S3_URI_RULE

# Without a cluster, files of this machine will do as well.
LOCAL_URI_RULE = S3_URI_RULE + " || self.matches('^file:///[^ ].*$')"
MAX_PROBLEMS = 10
_OPTIONS = "spec.method."
_METHOD = f"{_OPTIONS}type"
_FILES_TOO = "; only finetune run takes files of this machine"
_MADE_LETTERS = 5  # that the API server writes after metadata.generateName
_NO_TEXT = "must be of type string; quote it"


def problems(job: dict[str, Any], old: dict[str, Any] | None = None, *, local: bool = True) -> list[str]:
    """What is wrong with a job, at most MAX_PROBLEMS lines; rules on changes are checked against `old`.

    `local` also takes file:/// URIs, as `finetune run` does.
    """
    if job.get("apiVersion") != API_VERSION or job.get("kind") != KIND:
        return [f"this is no FineTuneJob; write apiVersion: {API_VERSION} and kind: {KIND}"]
    given: object = job.get("metadata")
    metadata = cast(dict[str, Any], given) if isinstance(given, dict) else {}
    name: object = metadata.get("name")
    if not local and name is None and isinstance(metadata.get("generateName"), str):
        name = metadata["generateName"] + "x" * _MADE_LETTERS
    if name is not None and not isinstance(name, str):
        return [f"metadata.name: {_NO_TEXT}"]
    if not name:
        return ["metadata.name: Required value"]
    if not local and (wrong := list(_no_texts(metadata))):
        return wrong[:MAX_PROBLEMS]
    job = {**job, "metadata": {"name": name}}  # the API server lets rules see no more of it
    schema = object_schema()
    errors = sorted(_validator().iter_errors(job), key=lambda error: error.json_path)
    found = [line for error in errors for line in _words(error)] or list(_too_large(job, ""))
    # As in the API server: rules are not run on what has not the right shape.
    if not found:
        before = None if old is None else _declared(schema, old)
        found = _told_once(_broken_rules(schema, _declared(schema, job), before, "", local))
    return found[:MAX_PROBLEMS]


def _told_once(lines: Iterable[str]) -> list[str]:
    """Return the lines, of which the first alone says who takes files of this machine: it is said of all."""
    told = list(lines)
    first = next((at for at, line in enumerate(told) if line.endswith(_FILES_TOO)), len(told))
    return [*told[: first + 1], *(line.removesuffix(_FILES_TOO) for line in told[first + 1 :])]


def _no_texts(metadata: dict[str, Any]) -> Iterator[str]:
    """What the API server cannot read of labels and annotations: YAML takes 7 and true for no texts."""
    for field in ("labels", "annotations"):
        value: object = metadata.get(field)
        if isinstance(value, dict):
            others = (name for name, each in cast(dict[str, Any], value).items() if not isinstance(each, str | None))
            yield from (f"metadata.{field}.{name}: {_NO_TEXT}" for name in others)
        elif value is not None:
            yield f"metadata.{field}: must be of type object"


def _too_large(value: object, place: str) -> Iterator[str]:
    """Whole numbers beyond the 64 bits that the API server, and CEL, have for them."""
    if isinstance(value, dict):
        for name, child in cast(dict[str, Any], value).items():
            yield from _too_large(child, f"{place}.{name}".lstrip("."))
    elif isinstance(value, list):
        for index, child in enumerate(cast(list[Any], value)):
            yield from _too_large(child, f"{place}[{index}]")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield f"{place}: the number is too large"


@cache
def _validator() -> Draft4Validator:
    return Draft4Validator(_closed(object_schema()))


def _closed(node: Schema) -> Schema:
    """The schema for jsonschema: unknown fields refused (strict), int-or-string written out, metadata left open."""
    result = dict(node)
    if "x-kubernetes-int-or-string" in node:
        result["type"] = ["integer", "string"]
    if "properties" in node:
        children = cast(dict[str, Schema], node["properties"])
        result["properties"] = {name: _closed(child) for name, child in children.items()}
        result["additionalProperties"] = False
    if "items" in node:
        result["items"] = _closed(node["items"])
    return result


def _place(path: Iterable[object]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _words(error: ValidationError) -> Iterator[str]:
    place, limit = _place(error.absolute_path), error.validator_value
    match error.validator:
        case "required":
            missing = [name for name in cast(list[str], limit) if name not in cast(dict[str, Any], error.instance)]
            # jsonschema reports each missing name on its own.
            name = next(name for name in missing if f"'{name}' is" in error.message)
            yield f"{place}.{name}: Required value".lstrip(".")
        case "additionalProperties":
            known = cast(dict[str, Any], cast(dict[str, Any], error.schema)["properties"])
            for name in cast(dict[str, Any], error.instance):
                if name not in known:
                    yield f'unknown field "{place}.{name}"'.replace('".', '"') + _instead(name, known, place)
        case "type":
            wanted = ",".join(limit) if isinstance(limit, list) else str(limit)
            yield f"{place}: must be of type {wanted}"
        case "enum":
            words = ", ".join(f'"{word}"' for word in cast(list[str], limit))
            found = f'Unsupported value: "{str(error.instance)[:64]}"'
            yield f"{place}: {found}: supported values: {words}{_of_a_loss(error.instance, place)}"
        case "minimum" | "maximum":
            exclusive = cast(dict[str, Any], error.schema).get(f"exclusive{error.validator.title()}", False)
            side = "greater" if error.validator == "minimum" else "less"
            yield f"{place}: should be {side} than {'' if exclusive else 'or equal to '}{limit}"
        case "minItems":
            yield f"{place}: should have at least {limit} items"
        case "maxItems":
            yield f"{place}: must have at most {limit} items"
        case "maxLength":
            yield f"{place}: Too long: may not be more than {limit} bytes"
        case _:
            yield f"{place}: {error.validator} {limit} does not hold"


def _of_a_loss(value: object, place: str) -> str:
    """Return what to write instead of a method that is a loss of DPO."""
    loss = next((each for each in DpoLoss if str(value).lower() == each.lower()), None)
    return f"; {loss} is a loss of DPO: write type: DPO, and dpo.loss: {loss}" if place == _METHOD and loss else ""


def _instead(name: str, known: Iterable[str], place: str) -> str:
    """Return what to write instead of an unknown field: its right name, its right place, or the fields there are.

    place: of the object that has it. The options of a method are no place for those of another, as only one may be."""
    if spelt := next((other for other in known if _letters(other) == _letters(name)), None):
        return f"; write {spelt}"
    spec = cast(Schema, object_schema()["properties"]["spec"])
    places = [found.rpartition(".") for found in _places_of(name, spec, "spec")]
    if place.startswith(_OPTIONS):
        places = [found for found in places if not found[0].startswith(_OPTIONS)]
    if places:
        first, _, spelt = places[0]
        others = [found[0] for found in places[1:] if first.startswith(_OPTIONS) and found[0].startswith(_OPTIONS)]
        return f"; it belongs into {' or '.join([first, *others])}" + ("" if spelt == name else f", as {spelt}")
    return f"; the fields here are {', '.join(sorted(known))}"


def _places_of(name: str, node: Schema, place: str) -> Iterator[str]:
    """Yield where a field of this name is known at or below `place`."""
    for field, child in cast(dict[str, Schema], node.get("properties", {})).items():
        if _letters(field) == _letters(name):
            yield f"{place}.{field}"
        yield from _places_of(name, child, f"{place}.{field}")
    if "items" in node:
        yield from _places_of(name, node["items"], f"{place}[]")


def _letters(name: str) -> str:
    """Return the name as learning_rate, LearningRate and learningRate have it in common."""
    return re.sub("[^a-z]", "", name.lower())


def _declared(schema: Schema, value: Any) -> Any:
    """Return the value as rules see it in the API server: whole numbers are of the type that the schema declares."""
    if schema.get("type") == "number" and isinstance(value, int):
        return float(value)
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        return {name: _declared(properties.get(name, {}), each) for name, each in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_declared(schema["items"], each) for each in cast(list[Any], value)]
    return value


def _broken_rules(schema: Schema, value: Any, old: Any, place: str, local: bool) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", []):
        text: str = rule["rule"]
        if "oldSelf" in text and old is None:
            continue
        is_uri = local and text == S3_URI_RULE
        if not _holds(LOCAL_URI_RULE if is_uri else text, value, old):
            words = _local_advice(value) if is_uri else rule["message"]
            if text == S3_URI_RULE and not is_uri and _holds(LOCAL_URI_RULE, value, old):
                words += _FILES_TOO
            yield f"{place}: {words}".removeprefix(": ")
    if isinstance(value, dict):
        fields, olds = cast(dict[str, Any], value), cast(dict[str, Any], old if isinstance(old, dict) else {})
        for name, child in schema.get("properties", {}).items():
            if name in fields:
                yield from _broken_rules(child, fields[name], olds.get(name), f"{place}.{name}".lstrip("."), local)
    elif isinstance(value, list):
        for index, item in enumerate(cast(list[Any], value)):
            yield from _broken_rules(schema["items"], item, None, f"{place}[{index}]", local)


def _local_advice(value: Any) -> str:
    """Return what to write instead of something that is no URI; a path of this machine is written out."""
    path = str(value).removeprefix("file://").removeprefix("file:")
    if path.startswith(("hf://", "https://huggingface.co/")):
        return "nothing is fetched from the Hugging Face Hub: download it, then write file:// and its absolute path"
    if "://" in path or not path.strip("/ "):
        return "write s3://BUCKET/PATH, or file:// and the absolute path of a file or folder of this machine"
    absolute = Path.cwd() / Path(path).expanduser()
    folder = "/" if path.endswith("/") else ""
    hub = "; a name on the Hugging Face Hub is downloaded first, as nothing is fetched from there"
    may_be_of_hub = path.count("/") == 1 and not path.startswith(("/", ".", "~")) and not absolute.exists()
    advice = f"write file://{os.path.normpath(absolute)}{folder} for a path of this machine, or s3://BUCKET/PATH"
    return advice + (hub if may_be_of_hub else "")


def _holds(rule: str, value: Any, old: Any) -> bool:
    given = {"self": json_to_cel(value), "oldSelf": json_to_cel(old)}
    try:
        return bool(_program(rule).evaluate(given))
    except CELEvalError as error:
        raise ValueError(f"the rule {rule} could not be evaluated") from error


@cache
def _program(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule), functions={"find": _find})


def _find(text: celtypes.Value, pattern: celtypes.Value) -> celtypes.Value:
    """Kubernetes' own addition to CEL: the first match, or nothing."""
    match = re.search(str(pattern), str(text))
    return celtypes.StringType(match.group() if match else "")
