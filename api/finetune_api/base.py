"""Base models: camelCase on the wire, snake_case in Python, bounded everywhere."""

import hashlib
import math
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic.alias_generators import to_camel

T = TypeVar("T")


class ApiModel(BaseModel):
    """Part of the FineTuneJob object. Unknown fields are ignored: an old operator must survive a newer CRD.

    The API server and the CLI refuse unknown fields by the closed schema of the CRD.
    """

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, serialize_by_alias=True, frozen=True, extra="ignore"
    )


class WireModel(BaseModel):
    """Part of the contract between operator and trainer. Unknown fields are ignored: see `finetune_api.run`."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class StoredModel(BaseModel):
    """What decides a training and is read back by a later attempt. Unknown fields are errors: a reader that ignored
    what it does not know would train otherwise than the writer decided."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Str64 = Annotated[str, StringConstraints(max_length=64)]
Str256 = Annotated[str, StringConstraints(max_length=256)]
Uri = Annotated[str, StringConstraints(max_length=1024)]
# Pods report numbers, and a pod may be hostile: one that JSON readers do not keep whole could never be stored.
Count = Annotated[int, Field(ge=0, le=2**53 - 1)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$", max_length=71)]


def sha256_digest(content: bytes) -> str:
    """Return the content's SHA-256 as a Digest."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


def finite(value: T) -> T | None:
    """The value; None for a float that is not finite: JSON has no NaN, so such a figure is one that is not known."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def first_problem(error: ValidationError) -> tuple[str, str]:
    """(field, what is wrong with it) of the first of the problems; never what was found there."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    return ".".join(str(part) for part in first["loc"]), first["msg"]
