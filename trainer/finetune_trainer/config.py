"""The run configuration as the pod finds it."""

import json
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from finetune_api.base import first_problem, sha256_digest
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_api.run import CONTRACT_VERSION, RunConfig

_MAX_CONFIG_BYTES = 1 << 20  # a ConfigMap's limit


def load(path: Path, digest: str | None = None) -> RunConfig:
    """Read the configuration of this or an earlier contract, ignoring fields that this trainer does not know.

    digest: of the file, as the operator told it; None where nobody did. Raises StageError(CONFIG_REPLACED) for another
    one, CONTRACT_SKEW when an operator of a later contract wrote it, CONFIG_UNREADABLE."""
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise StageError(Fault.CONFIG_UNREADABLE, field=str(path), problem="larger than 1 MiB")
        content = path.read_bytes()
        if digest is not None and digest != sha256_digest(content):
            raise StageError(Fault.CONFIG_REPLACED, file=str(path))
        found: object = json.loads(content)
    except OSError as error:
        raise StageError(Fault.CONFIG_UNREADABLE, field=str(path), problem=error.strerror or "not readable") from error
    except ValueError as error:
        raise StageError(Fault.CONFIG_UNREADABLE, field=str(path), problem="not JSON") from error
    if not isinstance(found, dict):
        raise StageError(Fault.CONFIG_UNREADABLE, field=str(path), problem="not a JSON object")
    version = cast("dict[str, object]", found).get("contract_version")
    if type(version) is not int or not 1 <= version <= CONTRACT_VERSION:  # True is an int, and no version
        raise StageError(Fault.CONTRACT_SKEW, operator=shortened(str(version), 20), trainer=CONTRACT_VERSION)
    try:
        return RunConfig.model_validate(found)
    except ValidationError as error:
        field, problem = first_problem(error)
        raise StageError(
            Fault.CONFIG_UNREADABLE, field=shortened(field, 200), problem=shortened(problem, 200)
        ) from error
