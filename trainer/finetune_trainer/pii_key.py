"""The key of the pseudonyms: read from the file of a Secret, and told to nobody but the processes that read rows."""

import hashlib
from pathlib import Path

from finetune_api.errors import StageError
from finetune_api.pii import PiiSpec
from finetune_api.reasons import Fault
from finetune_trainer.data.pii.actions import needs_key

FIELD = "preprocessing.pii.keySecretRef"
MIN_KEY_BYTES = 32  # what `openssl rand -hex 16` writes; keys that can be guessed undo every pseudonym
MAX_KEY_BYTES = 4096


def read_key(spec: PiiSpec | None, path: str | None) -> bytes | None:
    """Return the job's key, None where it has no pseudonyms. Raises CONFIG_UNREADABLE, without a word of the key."""
    if not needs_key(spec):
        return None
    if path is None:
        problem = (
            "no key was given; for finetune run, name a file with 32 random bytes or more in FINETUNE_PII_KEY_FILE"
        )
        raise StageError(Fault.CONFIG_UNREADABLE, field=FIELD, problem=problem)
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_KEY_BYTES + 1).strip()
    except OSError as error:
        problem = f"the file of the key: {error.strerror or 'not readable'}"
        raise StageError(Fault.CONFIG_UNREADABLE, field=FIELD, problem=problem) from error
    if not MIN_KEY_BYTES <= len(content) <= MAX_KEY_BYTES:
        problem = (
            f"the key has {len(content):,} bytes; it must have {MIN_KEY_BYTES} to {MAX_KEY_BYTES:,}, random ones, "
        )
        problem += "as `openssl rand -hex 32` writes them"
        raise StageError(Fault.CONFIG_UNREADABLE, field=FIELD, problem=problem)
    return hashlib.blake2b(content, digest_size=32, person=b"finetune-pii").digest()
