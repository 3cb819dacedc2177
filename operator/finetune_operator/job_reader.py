"""A FineTuneJob as the operator reads it. Unknown fields are ignored; what cannot be read is said, never raised."""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from pydantic import ValidationError

from finetune_api import defaults, names
from finetune_api.job import FineTuneJobSpec
from finetune_api.reasons import Reason
from finetune_api.redact import shortened
from finetune_api.status import ConditionType, FineTuneJobStatus
from finetune_operator.clock import parse_time

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


@dataclass(frozen=True)
class FineTuneJob:
    """`spec` is None when it cannot be read, and `problem` then says why."""

    name: str
    namespace: str
    uid: str
    generation: int
    resource_version: str
    deleting: bool
    spec: FineTuneJobSpec | None
    problem: str
    status: FineTuneJobStatus
    created_at: datetime | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.namespace, self.name

    @property
    def owner(self) -> tuple[str, str]:
        """Return (namespace, UID): what its Kubernetes Jobs and pods name as their owner."""
        return self.namespace, self.uid

    @property
    def finished(self) -> bool:
        """Return True once the verdict is stored; it never changes again."""
        return is_finished(self.status)


def is_finished(status: FineTuneJobStatus) -> bool:
    return any(c.type == ConditionType.FINISHED and c.status == "True" for c in status.conditions)


def verdict_at(body: Mapping[str, Any]) -> str | None:
    """Return when an object got its verdict, without reading all of it; None for a job that is not finished."""
    status = cast(Mapping[str, Any], body.get("status") or {})
    found = (each for each in status.get("conditions") or () if each.get("type") == ConditionType.FINISHED)
    return next((str(each.get("lastTransitionTime", "")) for each in found if each.get("status") == "True"), None)


def ttl_s_of(spec: FineTuneJobSpec | None) -> int:
    """Return for how many seconds the Kubernetes Jobs of a finished job are kept."""
    return defaults.given(spec.ttl_seconds_after_finished if spec is not None else None, defaults.TTL_S)


def read_job(body: Mapping[str, Any]) -> FineTuneJob:
    """Read any object that has metadata.name and metadata.uid. Never raises: see `problem`."""
    meta = cast(Mapping[str, Any], body.get("metadata") or {})
    name = str(meta.get("name", ""))
    spec, problem = read_spec(body.get("spec"))
    if len(name) > names.MAX_NAME_LENGTH or not _NAME.fullmatch(name):
        spec = None
        problem = (
            f"metadata.name must be at most {names.MAX_NAME_LENGTH} lower-case letters, digits and -; found {name!r}"
        )
    return FineTuneJob(
        name=name,
        namespace=str(meta.get("namespace", "")),
        uid=str(meta.get("uid", "")),
        generation=int(meta.get("generation") or 0),
        resource_version=str(meta.get("resourceVersion", "")),
        deleting=bool(meta.get("deletionTimestamp")),
        spec=spec,
        problem=shortened(problem, 1024),
        status=read_status(body.get("status")),
        created_at=parse_time(meta.get("creationTimestamp")),
    )


def read_spec(raw: object) -> tuple[FineTuneJobSpec | None, str]:
    """Return the spec, or None and why it cannot be read."""
    try:
        return FineTuneJobSpec.model_validate(raw), ""
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["spec", *(str(part) for part in first["loc"])])
        return (
            None,
            f"{place}: {first['msg']}; this operator reads {names.API_VERSION}, fix the field, or update the operator",
        )


def read_status(raw: object) -> FineTuneJobStatus:
    """The status as far as this version can read it: parts it cannot are as if absent, never an error.

    Conditions are read one by one, so that a newer version's condition never hides a verdict.
    """
    fields = dict(cast(Mapping[str, Any], raw)) if isinstance(raw, Mapping) else {}
    with contextlib.suppress(ValidationError):
        return FineTuneJobStatus.model_validate(fields)
    for key, value in list(fields.items()):
        if isinstance(value, list):
            fields[key] = [item for item in cast(list[object], value) if _readable({key: [item]})]
        if not _readable({key: fields[key]}):
            del fields[key]
    return FineTuneJobStatus.model_validate(fields)


def _readable(fields: dict[str, Any]) -> bool:
    try:
        FineTuneJobStatus.model_validate(fields)
    except ValidationError:
        return False
    return True


def reason_of(text: str | None) -> Reason:
    """The reason a status field names; Unknown for one of a newer version."""
    try:
        return Reason(text or "")
    except ValueError:
        return Reason.UNKNOWN
