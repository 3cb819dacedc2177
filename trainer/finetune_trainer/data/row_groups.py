"""Which rows are held out together: by the value of a field that the job names. Only a hash of the value goes on."""

import hashlib
from collections.abc import Mapping
from typing import Any, cast

from finetune_trainer.data.field_names import says_nothing, shown
from finetune_trainer.data.problems import Broken, Problem

_READS_IT = "evaluation.groupBy reads it"


def group_hash(row: object, field: str) -> bytes | Broken:
    """Return 16 bytes, equal for rows whose field says the same: 7, 7.0 and "7" do, as tables write numbers each in
    their way."""
    value = cast(Mapping[str, Any], row).get(field) if isinstance(row, Mapping) else None
    if isinstance(value, Broken):
        return value
    if says_nothing(value):
        return Broken(Problem.MISSING_FIELD, shown(field), _READS_IT)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool):
        return Broken(Problem.WRONG_TYPE, shown(field), f"must be a text or a whole number: {_READS_IT}")
    said = str(value).strip().encode(errors="surrogatepass")
    return hashlib.blake2b(said, digest_size=16, person=b"group").digest()
