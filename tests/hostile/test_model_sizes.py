"""How large a model is, its weights say; what config.json says besides them changes no plan."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from data_run import write_model
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_trainer.data.model_facts import read_model
from finetune_trainer.runplan import ModelFacts
from finetune_trainer.store import open_store
from tiny_run import saved_shapes  # which imports torch: models are judged in this process, see `data_run.judged`


def _facts(model: Path) -> ModelFacts:
    """Return what does not tell of the files."""
    found = read_model(open_store(StorageConfig()), model.as_uri())
    found.tokenizer.close()
    return found.facts.model_copy(update={"files": [], "digest": "sha256:" + "0" * 64})


def _rewrite(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _of_family(model: Path, family: str) -> None:
    write_model(model)
    config, shapes = saved_shapes(family)
    (model / "config.json").write_text(json.dumps(config))
    weights = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(weights, model / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gpt2", {"intermediate_size": 10**12}),
        ("gpt2", {"num_key_value_heads": 10**12, "head_dim": 10**12}),
        ("llama", {"num_experts_per_tok": 10**12, "n_shared_experts": 10**12}),
        ("llama", {"n_layer": 15, "max_seq_len": 10**300, "layer_types": ["sliding_attention"] * 2}),
    ],
)
def test_fields_that_the_family_does_not_read_change_no_plan_beyond_the_weights(
    tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    _of_family(tmp_path / "model", family)
    honest = _facts(tmp_path / "model")
    _rewrite(tmp_path / "model", **fields)
    found = _facts(tmp_path / "model")
    assert found.model_copy(update={"widths": honest.widths}) == honest
    per_layer = honest.parameters // honest.hidden_size
    assert max(found.widths.query, found.widths.key, found.widths.mlp) <= per_layer
    assert found.widths.windowed_layers <= 2


def test_layers_of_parts_that_the_model_does_not_have_get_no_adapter(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    honest = _facts(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    beside = {f"extra.{kind}.kind{kind}.weight": np.zeros((2, 2), dtype=np.float32) for kind in range(100)}
    safetensors.numpy.save_file(safetensors.numpy.load_file(path) | beside, path)
    assert _facts(tmp_path / "model") == honest


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tokenizer_config.json", {"padding_side": "up"}),
        ("tokenizer_config.json", {"tokenizer_object": "mine"}),
        ("tokenizer_config.json", {"unk_token": 7}),
        ("generation_config.json", {"watermarking_config": [1]}),
    ],
)
def test_what_an_adapter_is_exported_with_is_judged_before_anything_is_trained(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    write_model(tmp_path / "model")
    path = tmp_path / "model" / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))
    with pytest.raises(StageError) as caught:
        _facts(tmp_path / "model")
    assert caught.value.fault is Fault.BROKEN_MODEL
    assert f"{name} cannot be loaded by transformers" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_theta": float("nan")}, "rope_theta NaN"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}}, "rope_parameters.rope_theta inf"),
        ({"rope_theta": 0}, "rope_theta 0"),
        ({"rope_theta": -5.0}, "rope_theta -5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": float("nan")}}, "rope_scaling.factor NaN"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps NaN"),
        ({"rms_norm_eps": -1}, "rms_norm_eps -1"),
        ({"rms_norm_eps": -(10**1000)}, "rms_norm_eps -1e+18"),
        ({"layers": [{}, {"scale": float("nan")}]}, "layers[1].scale NaN"),
    ],
)
def test_a_number_with_which_the_model_computes_no_numbers_is_named_before_training(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    write_model(tmp_path / "model")
    _rewrite(tmp_path / "model", **fields)
    with pytest.raises(StageError) as caught:
        _facts(tmp_path / "model")
    assert caught.value.fault is Fault.BROKEN_MODEL
    assert f"config.json has {words}, " in str(caught.value)


def test_a_field_that_knows_no_end_may_be_infinite(tmp_path: Path) -> None:
    """As `time_step_limit` of Mamba."""
    write_model(tmp_path / "model")
    honest = _facts(tmp_path / "model")
    _rewrite(tmp_path / "model", time_step_limit=[0.0, float("inf")])
    assert _facts(tmp_path / "model") == honest
