"""The base model is judged from its small files and the headers of its weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from data_run import HIDDEN, LAYERS, write_model
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_trainer.data.model_facts import Model, read_model
from finetune_trainer.store import open_store


def read(folder: Path) -> Model:
    return read_model(open_store(StorageConfig()), folder.as_uri())


def test_facts_come_from_the_config_and_the_headers(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("not needed")
    facts = read(tmp_path / "m").facts
    assert facts.target_modules == ["q_proj", "v_proj"]
    assert facts.lora_parameters_per_rank == LAYERS * 2 * (HIDDEN + HIDDEN)
    assert facts.parameters == facts.vocabulary_size * HIDDEN + LAYERS * (2 * HIDDEN * HIDDEN + HIDDEN)
    assert (facts.hidden_size, facts.layers, facts.context_length) == (HIDDEN, LAYERS, 512)
    assert facts.packing_safe
    names = [record.uri.rpartition("/")[2] for record in facts.files]
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert all(record.sha256 for record in facts.files)  # weights of at most 4 MiB too


@pytest.mark.parametrize(
    ("names", "shape"),
    [
        (["mlp.experts.0.up_proj.weight", "mlp.experts.1.up_proj.weight"], (4, 5)),  # as Qwen3 MoE stores them
        (["mlp.experts.down_proj"], (2, 4, 5)),  # GPT-OSS
        (["block_sparse_moe.input_linear.weight"], (2, 4, 5)),  # Granite
    ],
)
def test_the_weights_of_experts_are_counted_and_none_of_them_is_adapted(
    tmp_path: Path, names: list[str], shape: tuple[int, ...]
) -> None:
    write_model(tmp_path / "m", config={"num_local_experts": 2})
    path = tmp_path / "m" / "model.safetensors"
    experts = {f"model.layers.0.{name}": np.zeros(shape, dtype=np.float32) for name in names}
    before = read(tmp_path / "m").facts
    safetensors.numpy.save_file(safetensors.numpy.load_file(path) | experts, path)
    facts = read(tmp_path / "m").facts
    assert (before.expert_parameters, facts.expert_parameters) == (0, 40)
    assert facts.target_modules == ["q_proj", "v_proj"]


def test_a_changed_file_changes_the_digest(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    before = read(tmp_path / "m").facts.digest
    (tmp_path / "m" / "generation_config.json").write_text("{}")
    assert read(tmp_path / "m").facts.digest != before


def test_weights_in_several_files_are_found_by_the_index(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "model-00001-of-00001.safetensors")
    (tmp_path / "m" / "consolidated.safetensors").write_bytes(b"the same weights in another layout")
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    names = [record.uri.rpartition("/")[2] for record in read(tmp_path / "m").facts.files]
    assert "model-00001-of-00001.safetensors" in names
    assert "consolidated.safetensors" not in names


def test_the_end_token_is_taken_from_the_generation_config_when_the_tokenizer_has_none(tmp_path: Path) -> None:
    write_model(tmp_path / "m", tokenizer_config={"eos_token": None})
    assert read(tmp_path / "m").tokenizer.eos_id is None
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert read(tmp_path / "m").tokenizer.eos_id == 0


def rename_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def bad_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 3}')


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def large_template(folder: Path) -> None:
    settings: dict[str, Any] = {"chat_template": "x" * 70_000}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("spoil", "config", "fault", "words"),
    [
        (None, {"auto_map": {"AutoModel": "x.py"}}, Fault.REMOTE_CODE, "auto_map"),
        (None, {"architectures": ["LlavaForConditionalGeneration"]}, Fault.UNSUPPORTED_MODEL, "Llava"),
        (None, {"architectures": []}, Fault.UNSUPPORTED_MODEL, "causal"),
        (None, {"quantization_config": {"bits": 4}}, Fault.UNSUPPORTED_MODEL, "quantized"),
        (None, {"hidden_size": None}, Fault.UNSUPPORTED_MODEL, "hidden_size"),
        (rename_weights, {}, Fault.PICKLE_ONLY, "pytorch_model.bin"),
        (cut_weights, {}, Fault.UNSUPPORTED_MODEL, "not a safetensors file"),
        (no_weights, {}, Fault.OBJECT_NOT_FOUND, "model.safetensors"),
        (no_config, {}, Fault.OBJECT_NOT_FOUND, "fix model.uri"),
        (bad_config, {}, Fault.UNSUPPORTED_MODEL, "config.json is not a JSON object"),
        (no_tokenizer, {}, Fault.UNSUPPORTED_MODEL, "tokenizer.json"),
        (bad_tokenizer, {}, Fault.UNSUPPORTED_MODEL, "tokenizer.json cannot be read"),
        (large_template, {}, Fault.UNSUPPORTED_MODEL, "larger than 64 KiB"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_by_name(
    tmp_path: Path, spoil: Any, config: dict[str, Any], fault: Fault, words: str
) -> None:
    write_model(tmp_path / "m", config=config)
    if spoil:
        spoil(tmp_path / "m")
    with pytest.raises(StageError, match=words) as caught:
        read(tmp_path / "m")
    assert caught.value.fault is fault
