"""The adapter that training goes on with: read and judged in prepare, before anything is paid for.

Any adapter that a FineTuneJob has committed: its manifest says what each file is, and what base model it was made on.
Weights are fetched in train, which knows the SHA-256 of all files of the base and compares those that decide.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, ValidationError

from finetune_api.base import Digest, Str64, Str256, WireModel, first_problem, sha256_digest
from finetune_api.errors import StageError
from finetune_api.job import AdapterMode
from finetune_api.layout import join
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_api.run import MAX_ARG_CHARS, StartingAdapter
from finetune_trainer.commit import MANIFEST, MAX_MANIFEST_BYTES, ManifestFile
from finetune_trainer.origins import MAX_EARLIER, DataOrigin, joined
from finetune_trainer.runplan import MAX_ALPHA, MAX_MODULES, AdapterFacts, FileRecord, ModelFacts
from finetune_trainer.store import Store, spec_field

ADAPTER_CONFIG = "adapter_config.json"  # both as PEFT names them, which prepare does not import
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_FIELD = "model.adapterFrom"
_MAX_CONFIG_BYTES = 2**20
_MAX_HEADER_BYTES = 16 * 2**20  # of weights: names and shapes, of the largest models some 100 KiB
_NOT_COMMITTED = "is not the one that its job committed"
_DECIDING_FILES = ("config.json", "tokenizer.json")  # of a base model, besides its weights


class _Base(WireModel):
    """What a manifest says of the base model. files: SHA-256 by name."""

    files: dict[Str256, Digest] = Field(max_length=1000)


class _Manifest(WireModel):
    """data, earlier_data: absent in those of earlier releases."""

    files: list[ManifestFile] = Field(max_length=100)
    base: _Base
    data: list[DataOrigin] = Field(default=[], max_length=20)
    earlier_data: list[DataOrigin] = Field(default=[], max_length=MAX_EARLIER)


class _Config(WireModel):
    """adapter_config.json of PEFT, as far as it says what layers there are; defaults are PEFT's."""

    peft_type: Literal["LORA"]
    r: int = Field(ge=1, le=65536)
    lora_alpha: int = Field(ge=1, le=MAX_ALPHA)
    target_modules: list[Str64] = Field(max_length=MAX_MODULES)
    bias: Literal["none"] = "none"
    lora_dropout: float = 0.0
    use_dora: Literal[False] = False
    use_rslora: bool = False
    rank_pattern: dict[str, int] = Field(default={}, max_length=0)
    alpha_pattern: dict[str, int] = Field(default={}, max_length=0)
    modules_to_save: None = None


def read_adapter(
    store: Store, source: StartingAdapter, base: ModelFacts, mode: AdapterMode = AdapterMode.CONTINUE
) -> AdapterFacts:
    """Return what the adapter is, which must be of this base model, and of a kind that can be trained on, or kept.

    Raises ADAPTER_NOT_FOUND, ADAPTER_UNUSABLE, also when it is not what its job committed, and ADAPTER_OF_OTHER_BASE as
    far as the base's files are known by now."""
    manifest_uri = join(source.uri, MANIFEST)
    try:
        with spec_field(_FIELD):
            content, _ = store.read(manifest_uri, max_bytes=MAX_MANIFEST_BYTES)
    except StageError as error:
        if error.fault is Fault.OBJECT_NOT_FOUND:
            raise StageError(Fault.ADAPTER_NOT_FOUND, uri=shortened(source.uri, MAX_ARG_CHARS)) from error
        raise
    digest = sha256_digest(content)
    if source.digest is not None and digest != source.digest:
        raise _unusable(source, f"its {MANIFEST} {_NOT_COMMITTED}")
    try:
        manifest = _Manifest.model_validate_json(content)
    except ValidationError as error:
        raise _unusable(source, f"its {MANIFEST} is none that a FineTuneJob writes", error) from error
    files = {file.path: file for file in manifest.files}
    if missing := {ADAPTER_CONFIG, ADAPTER_WEIGHTS} - files.keys():
        raise _unusable(source, f"its {MANIFEST} names no {min(missing)}")
    with spec_field(_FIELD):
        text, _ = store.read(join(source.uri, ADAPTER_CONFIG), max_bytes=_MAX_CONFIG_BYTES)
    if sha256_digest(text) != files[ADAPTER_CONFIG].sha256:
        raise _unusable(source, f"its {ADAPTER_CONFIG} {_NOT_COMMITTED}")
    try:
        config = _Config.model_validate_json(text)
    except ValidationError as error:
        raise _unusable(source, f"its {ADAPTER_CONFIG} is none of a LoRA that is trained here", error) from error
    if problem := _problem(config, base, mode):
        raise _unusable(source, problem)
    weights, expected = files[ADAPTER_WEIGHTS], 4 * config.r * base.lora_parameters_per_rank
    if weights.size_bytes > expected + _MAX_HEADER_BYTES:
        found = f"its {ADAPTER_WEIGHTS} has {weights.size_bytes:,} bytes"
        raise _unusable(source, f"{found}, and weights of rank {config.r} have {expected:,}")
    facts = AdapterFacts(
        uri=source.uri,
        digest=digest,
        weights=FileRecord(uri=join(source.uri, ADAPTER_WEIGHTS), size_bytes=weights.size_bytes, sha256=weights.sha256),
        base_files={name: sha256 for name, sha256 in manifest.base.files.items() if _decides(name)},
        rank=config.r,
        alpha=config.lora_alpha,
        rslora=config.use_rslora,
        target_modules=sorted(config.target_modules),
        mode=mode,
        data=joined(manifest.data, manifest.earlier_data),
    )
    prefix = join(base.uri, "")
    known = {file.uri.removeprefix(prefix): file.sha256 for file in base.files}
    require_same_base(facts, base.uri, {name: sha256 for name, sha256 in known.items() if sha256 is not None})
    if missing := facts.base_files.keys() - known.keys():
        raise _of_other_base(facts, base.uri, min(missing))
    return facts


def _problem(config: _Config, base: ModelFacts, mode: AdapterMode) -> str | None:
    """Return why the adapter cannot be trained on, or kept; None if it can."""
    found, adapted = set(config.target_modules), set(base.target_modules)
    if mode is AdapterMode.CONTINUE and config.use_rslora:
        return "its scale is that of rsLoRA (use_rslora), which is not trained here; mode: Stack keeps it as it is"
    if found == adapted or (mode is AdapterMode.STACK and found <= adapted):
        return None
    names, expected = (", ".join(sorted(each)) for each in (found, adapted))
    return f"it adapts {names}, and this release adapts {expected}"


def require_same_base(adapter: AdapterFacts, base_uri: str, digests: Mapping[str, str]) -> None:
    """Compare the files of the base model that decide what it computes. digests: SHA-256 of those that are known.

    Raises ADAPTER_OF_OTHER_BASE."""
    for name, sha256 in sorted(digests.items()):
        if _decides(name) and adapter.base_files.get(name) != sha256:
            raise _of_other_base(adapter, base_uri, name)


def _decides(name: str) -> bool:
    return name in _DECIDING_FILES or name.endswith(".safetensors")


def _of_other_base(adapter: AdapterFacts, base_uri: str, name: str) -> StageError:
    uri, model = (shortened(each, MAX_ARG_CHARS) for each in (adapter.uri, base_uri))
    return StageError(Fault.ADAPTER_OF_OTHER_BASE, uri=uri, model=model, file=shortened(name, MAX_ARG_CHARS))


def _unusable(source: StartingAdapter, problem: str, error: ValidationError | None = None) -> StageError:
    field, _ = first_problem(error) if error is not None else ("", "")
    problem += f" (see {field})" if field else ""
    uri = shortened(source.uri, MAX_ARG_CHARS)
    return StageError(Fault.ADAPTER_UNUSABLE, uri=uri, problem=shortened(problem, MAX_ARG_CHARS))
