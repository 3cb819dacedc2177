"""The child process that loads a model without its values: `python -P -m finetune_trainer.dry_load`, for prepare.

Reads {"config": …, "shapes": {tensor: shape}, "exported": {file: content}, "memory_bytes": …} as JSON from stdin and
writes a LoadReport to stdout. All tensors are on torch's meta device, so weights of any size take no memory. What
transformers raises while it builds the model ends the process; the parent says the last line.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from finetune_trainer.data.child import limit_data
from finetune_trainer.data.structure import (
    MACHINE_FAILED,
    READY,
    REFUSALS,
    SIZES,
    TOO_LARGE,
    LoadReport,
    is_of_the_machine,
)
from finetune_trainer.load_report import report_of

Shapes = dict[str, list[int]]


def judge(config: dict[str, Any], shapes: Shapes, exported: Mapping[str, str] | None = None) -> LoadReport:
    """Return what transformers says when it loads tensors of these shapes into the model of this configuration."""
    report = _load(config, shapes)
    return report.model_copy(update={"not_exported": _why_not_exported(exported or {})})


def _why_not_exported(exported: Mapping[str, str]) -> str | None:
    """Return in words which of the files beside an adapter transformers cannot load, and how it fails; None if none."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in exported.items():
            (Path(folder) / name).write_text(content)
        loaders: dict[str, Any] = {"tokenizer_config.json": AutoTokenizer, "generation_config.json": GenerationConfig}
        for name, loader in loaders.items():
            if name not in exported:
                continue
            try:
                loader.from_pretrained(folder, local_files_only=True)
            except REFUSALS as error:
                if is_of_the_machine(error):
                    raise
                said = type(error).__name__
                return f"{name} cannot be loaded by transformers ({said}); save it again with save_pretrained"
    return None


def _load(config: dict[str, Any], shapes: Shapes) -> LoadReport:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        settings = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        empty = cast(PreTrainedModel, AutoModelForCausalLM.from_config(settings, dtype=torch.float32))
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    loader: Any = type(empty)  # whose types do not know of a loading report
    try:
        loaded, info = loader.from_pretrained(
            None,
            config=empty.config,
            state_dict=tensors,
            dtype=torch.float32,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,  # reported, not raised
            output_loading_info=True,
        )
    except RuntimeError:  # experts that cannot be stacked, say: told by what the conversions would have needed
        return report_of(empty, None, shapes)
    return report_of(loaded, info, shapes).model_copy(update={"sizes": _sizes(settings, loaded)})


def _sizes(settings: PreTrainedConfig, loaded: PreTrainedModel) -> dict[str, int]:
    found = {name: getattr(settings, name, None) for name in SIZES}
    embeddings: Any = loaded.get_input_embeddings()
    if isinstance(embeddings, torch.nn.Embedding):
        found["vocab_size"] = embeddings.num_embeddings  # which the weights agree with; a field may be idle
    return {name: size for name, size in found.items() if type(size) is int and size > 0}


def main() -> int:
    with os.fdopen(os.dup(1), "wb") as reply:
        os.dup2(2, 1)  # whatever libraries print is no reply
        reply.write(READY)
        reply.flush()
        request = json.load(sys.stdin.buffer)
        memory_bytes = request.pop("memory_bytes", None)
        if memory_bytes is not None:
            limit_data(memory_bytes)
        try:
            reply.write(judge(**request).model_dump_json().encode())
        except OSError as error:
            if is_of_the_machine(error):
                return MACHINE_FAILED
            raise
        except MemoryError:
            return TOO_LARGE
    return 0


if __name__ == "__main__":
    sys.exit(main())
