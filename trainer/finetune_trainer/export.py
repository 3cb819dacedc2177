"""The adapter as others read it: a plain PEFT folder, reloaded and compared before anybody may trust it."""

import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from finetune_api.base import finite
from finetune_api.errors import StageError
from finetune_api.job import AdapterMode
from finetune_api.layout import ADAPTER, join
from finetune_api.quality import Quality
from finetune_api.reasons import Fault
from finetune_api.status import Artifact
from finetune_trainer.card import Evaluations, Learned, Lineage, model_card, repetition, stop_ratio
from finetune_trainer.checkpoint import disk_error, file_digest
from finetune_trainer.commit import MANIFEST, Fence, ManifestFile, publish_manifest
from finetune_trainer.data.tokens import TOKENIZER_CLASS, end_ids
from finetune_trainer.earlier_adapter import is_unchanged, write_joint
from finetune_trainer.evaluate import Answer, HeldOut
from finetune_trainer.inputs import Batch
from finetune_trainer.model import LanguageModel
from finetune_trainer.origins import as_record
from finetune_trainer.patience import Patience
from finetune_trainer.runplan import AdapterFacts, RunPlan
from finetune_trainer.stop import StopFlag
from finetune_trainer.store import PreconditionFailed, Store

log = logging.getLogger(__name__)

EVAL = "eval.json"
TEMPLATE = "chat_template.jinja"
_TOKENIZER_FILES = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json")
_SAME_LOGPROB = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_NO_EFFECT_LOGPROB = 1e-6  # fp32 rounding of a log-probability; an adapter with no effect differs by exactly 0
_MAX_EVAL_BYTES = 16 * 2**20
_MAX_ORPHANS = 10_000
_EPOCH_FOLDER = re.compile(rf"/{ADAPTER}-(\d+)/[^/]+$")
_PACKAGES = ("torch", "transformers", "peft", "finetune-operator")


def package_versions() -> dict[str, str]:
    return {package: version(package) for package in _PACKAGES}


def model_stop_ids(model_folder: Path, plan: RunPlan) -> list[int]:
    """Return the token ids that the base model's own configuration stops at."""
    for name in ("generation_config.json", "config.json"):
        path = model_folder / name
        found = end_ids(json.loads(path.read_text()), plan.model.vocabulary_size) if path.exists() else None
        if found is not None:
            return found
    return []


def write_adapter(
    adapted: PeftModel,
    folder: Path,
    model_folder: Path,
    plan: RunPlan,
    stop_ids: list[int],
    lineage: Lineage,
    learned: Learned,
    found: Evaluations,
) -> None:
    """Write everything but the manifest. Raises NOT_FINITE for weights that are not numbers, DISK_FULL."""
    shutil.rmtree(folder, ignore_errors=True)
    weights: dict[str, Tensor] = {}
    try:
        # Without the flag PEFT asks the Hub whether the base has another vocabulary.
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
        if plan.stacked_on is not None:
            write_joint(adapted, folder, plan)
        _sort_config(folder / CONFIG_NAME)
        weights = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
        _write_tokenizer(folder, model_folder, plan)
        _write_generation_config(folder, model_folder, stop_ids)
        (folder / "README.md").write_text(model_card(plan, lineage, learned, found))
        (folder / EVAL).write_text(json.dumps(_eval_json(plan, found), indent=1, ensure_ascii=False))
    except (OSError, SafetensorError) as error:
        raise disk_error(error, "the adapter") from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
        raise StageError(Fault.NOT_FINITE, count=1, step=plan.hyperparameters.total_steps)


def _named(adapter: AdapterFacts) -> dict[str, str]:
    kept = {"mode": adapter.mode.value} if adapter.mode is AdapterMode.STACK else {}
    return {"uri": adapter.uri, "digest": adapter.digest, **kept}


def _learned_data(plan: RunPlan) -> dict[str, object]:
    """What a manifest says of the data: the job's, that of the adapter it went on with, and how confidential all is."""
    how = plan.confidentiality
    return {
        "data": [as_record(each) for each in plan.data],
        **({"earlier_data": [as_record(each) for each in plan.earlier_data]} if plan.earlier_data else {}),
        **({"confidentiality": how.value} if how is not None else {}),
    }


def require_change(folder: Path, starting_adapter: Path, plan: RunPlan) -> None:
    """Raises ADAPTER_NO_EFFECT when the adapter in the folder does what the one did that training began with."""
    if is_unchanged(folder, starting_adapter, plan):
        raise StageError(Fault.ADAPTER_NO_EFFECT, difference=0.0)


def _sort_config(path: Path) -> None:
    """PEFT keeps the modules as a set: sorted, equal runs give equal bytes."""
    content = json.loads(path.read_text())
    content["target_modules"] = sorted(content["target_modules"])
    path.write_text(json.dumps(content, indent=2, sort_keys=True))


def _write_tokenizer(folder: Path, model_folder: Path, plan: RunPlan) -> None:
    """Write the base model's tokenizer as rows were read: by its tokenizer.json alone, and with the template of them.

    Without a config.json AutoTokenizer builds the class that is named, and some replace what tokenizer.json says.
    """
    for name in _TOKENIZER_FILES:
        if (model_folder / name).exists():
            shutil.copyfile(model_folder / name, folder / name)
    config = model_folder / "tokenizer_config.json"
    content = json.loads(config.read_text()) if config.exists() else {}
    content["tokenizer_class"] = TOKENIZER_CLASS
    if plan.chat_template is not None:
        content.pop("chat_template", None)
    (folder / config.name).write_text(json.dumps(content, indent=2, ensure_ascii=False))
    if plan.chat_template is not None:
        (folder / TEMPLATE).write_text(plan.chat_template)
    elif (model_folder / TEMPLATE).exists():
        shutil.copyfile(model_folder / TEMPLATE, folder / TEMPLATE)


def _write_generation_config(folder: Path, model_folder: Path, stop_ids: list[int]) -> None:
    path = model_folder / "generation_config.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    if stop_ids:
        content["eos_token_id"] = stop_ids
    (folder / path.name).write_text(json.dumps(content, indent=2))


def _eval_json(plan: RunPlan, found: Evaluations) -> dict[str, object]:
    def sample(answer: Answer) -> dict[str, object]:
        return {**asdict(answer), "repetition_ratio": answer.repetition_ratio}

    return {
        "quality": found.quality.model_dump(mode="json"),
        "computed_in": found.computed_in,
        "held_out": [
            {name: finite(value) for name, value in evaluation.model_dump().items()}
            | {"perplexity": finite(evaluation.perplexity)}
            | {"figures": {name: finite(value) for name, value in evaluation.figures.items()}}
            for evaluation in found.held_out
        ],
        "samples": [
            {"prompt": prompt.text, "base": sample(base), "tuned": sample(tuned)}
            for prompt, base, tuned in zip(
                plan.sample_prompts, found.base_answers, found.tuned_answers, strict=bool(found.tuned_answers)
            )
        ],
        "stop_ratio": {"base": stop_ratio(found.base_answers), "tuned": stop_ratio(found.tuned_answers)},
        "repetition_ratio": {"base": repetition(found.base_answers), "tuned": repetition(found.tuned_answers)},
    }


@dataclass(frozen=True)
class Measured:
    """What was measured of a committed adapter. held_out: the base's first, the finished adapter's last."""

    quality: Quality
    held_out: list[HeldOut]


def read_measured(store: Store, artifact: Artifact) -> Measured | None:
    """Read what was measured of a committed adapter; None if that cannot be read, which ends nothing."""
    try:
        content = json.loads(store.read(join(artifact.uri, EVAL), max_bytes=_MAX_EVAL_BYTES)[0])
        held_out = [HeldOut.model_validate(each) for each in content.get("held_out", [])]
        return Measured(Quality.model_validate(content["quality"]), held_out)
    except (StageError, ValueError, KeyError, TypeError) as error:
        log.warning("what was measured of the adapter cannot be read (%s)", type(error).__name__)
        return None


def check_reload(
    lm: LanguageModel,
    adapted: PeftModel,
    folder: Path,
    batches: Sequence[Batch],
    on_pass: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Load the adapter from `folder` with plain PEFT and compare log-probabilities with the live model and the base.

    Ends the life of `adapted`: its layers are taken out of the base, whose weights are used again, as two bases may
    not fit. Raises RELOAD_MISMATCH or ADAPTER_NO_EFFECT.
    """
    live = _logprobs(lm, batches, on_pass)
    with adapted.disable_adapter():
        base = _logprobs(lm, batches, on_pass)
    bare = adapted.unload()  # type: ignore[operator]
    assert isinstance(bare, PreTrainedModel)
    reloaded_model = PeftModel.from_pretrained(bare, str(folder)).eval()
    assert reloaded_model.get_base_model() is lm.causal
    reloaded = _logprobs(lm, batches, on_pass)
    mismatch = _largest_difference(reloaded, live)
    effect = _largest_difference(reloaded, base)
    if not mismatch <= _SAME_LOGPROB[lm.dtype]:
        raise StageError(Fault.RELOAD_MISMATCH, difference=mismatch)
    if not effect > _NO_EFFECT_LOGPROB:
        raise StageError(Fault.ADAPTER_NO_EFFECT, difference=effect)
    return {"reload_difference": mismatch, "effect": effect}


@torch.no_grad()
def _logprobs(lm: LanguageModel, batches: Sequence[Batch], on_pass: Callable[[], None]) -> Tensor:
    found: list[Tensor] = []
    for batch in batches:
        found.append(lm.token_logprobs(batch))
        on_pass()
    return torch.cat(found)


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """NaN if any log-probability is not a number, which no comparison passes."""
    return float((a - b).abs().max())


def upload(
    store: Store,
    fence: Fence,
    run_uri: str,
    folder: Path,
    plan: RunPlan,
    lineage: Lineage,
    checks: dict[str, float],
    patience: Patience,
) -> Artifact:
    """Upload the folder and publish its manifest; nothing that lies in the bucket is overwritten.

    The folder's name is `adapter`, unless an earlier attempt died while it wrote there: then the epoch is in it.
    Raises SUPERSEDED when a newer attempt has taken over, and what `patience` ends with.
    """
    names = sorted(path.name for path in folder.iterdir())
    files = [
        ManifestFile(path=name, size_bytes=(folder / name).stat().st_size, sha256=file_digest(folder / name))
        for name in names
    ]
    adapter_uri = join(run_uri, ADAPTER)
    taken = patience.keep_trying(lambda: _is_taken(store, join(adapter_uri, "")))
    if taken or not _upload_files(store, fence, folder, files, adapter_uri, patience):
        adapter_uri = join(run_uri, f"{ADAPTER}-{fence.epoch}")
        if not _upload_files(store, fence, folder, files, adapter_uri, patience):
            # No manifest may name files that another has written; the next attempt has a folder of its own.
            problem = "another writer has put files there"
            raise StageError(
                Fault.STORAGE_UNAVAILABLE, action="write", uri=adapter_uri, tries=1, seconds=0, problem=problem
            )
    manifest: dict[str, object] = {
        "version": 1,
        "files": [file.model_dump() for file in files],
        "step": plan.hyperparameters.total_steps,
        "epoch": fence.epoch,
        "plan_digest": lineage.plan_digest,
        "base": {
            "uri": plan.model.uri,
            "digest": lineage.base_digest,
            "files": lineage.base_files,
            "known_by": lineage.base_known_by,
        },
        **_learned_data(plan),
        **({"starting_adapter": _named(lineage.starting_adapter)} if lineage.starting_adapter else {}),
        "versions": lineage.versions,
        "image": lineage.image,
        "checks": checks,
    }
    manifest_uri = join(adapter_uri, MANIFEST)
    digest = patience.keep_trying(lambda: publish_manifest(store, fence, manifest_uri, manifest))
    return Artifact(
        type="Adapter",
        uri=join(adapter_uri, ""),
        digest=digest,
        manifest_uri=manifest_uri,
        base_digest=lineage.base_digest,
        rank=plan.exported_rank,
    )


def remove_orphans(store: Store, fence: Fence, run_uri: str, committed: Artifact, stop: StopFlag) -> None:
    """After the commit: remove what this and earlier attempts uploaded but never committed. A stop leaves the rest."""
    for info in store.list(join(run_uri, ADAPTER), limit=_MAX_ORPHANS):
        if stop.is_set():
            return
        folder = _EPOCH_FOLDER.search(info.uri)
        newer = folder is not None and int(folder[1]) > fence.epoch
        if not newer and not info.uri.startswith(join(committed.uri, "")):
            fence.check()
            store.delete(info.uri)


def _is_taken(store: Store, folder_uri: str) -> bool:
    """Return whether anything lies in the folder."""
    try:
        return bool(store.list(folder_uri, limit=1))
    except StageError as error:
        if error.fault is Fault.TOO_MANY_FILES:
            return True
        raise


def _upload_files(
    store: Store, fence: Fence, folder: Path, files: Sequence[ManifestFile], uri: str, patience: Patience
) -> bool:
    """Upload the files; False when another writer has put another file there in the meantime."""
    patience.keep_trying(fence.check)
    return all(patience.keep_trying(lambda file=file: _upload_file(store, folder, file, uri)) for file in files)


def _upload_file(store: Store, folder: Path, file: ManifestFile, uri: str) -> bool:
    file_uri = join(uri, file.path)
    try:
        store.upload(folder / file.path, file_uri, if_none_match=True)
    except PreconditionFailed:
        # An earlier try whose answer was lost has perhaps put it there.
        return store.digest(file_uri) == (file.sha256, file.size_bytes)
    return True
