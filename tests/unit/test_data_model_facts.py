"""The base model is judged from its small files and the headers of its weights."""

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from transformers import AutoTokenizer

from data_run import CHATML, CHILD, HIDDEN, INNER, LAYERS, byte_bpe, write_model
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_trainer.data import structure
from finetune_trainer.data.model_facts import Model, read_model
from finetune_trainer.data.model_folder import ModelFolder
from finetune_trainer.data.template import ChatTemplate
from finetune_trainer.store import open_store
from tiny_run import saved_shapes  # which imports torch: models are judged in this process, see `data_run.judged`

WEIGHTS, UP = "model.safetensors", "model.layers.1.mlp.up_proj.weight"
VOCABULARY = byte_bpe().get_vocab_size()


def read(folder: Path) -> Model:
    return read_model(open_store(StorageConfig()), folder.as_uri())


def test_facts_come_from_the_config_and_the_headers(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("not needed")
    facts = read(tmp_path / "m").facts
    projections = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert facts.target_modules == projections
    assert facts.lora_parameters_per_rank == LAYERS * (4 * 2 * HIDDEN + 3 * (HIDDEN + INNER))
    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN
    assert facts.parameters == facts.vocabulary_size * HIDDEN + LAYERS * layer + HIDDEN
    assert (facts.hidden_size, facts.layers, facts.context_length) == (HIDDEN, LAYERS, 512)
    assert facts.packing_safe
    names = [record.uri.rpartition("/")[2] for record in facts.files]
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert all(record.sha256 for record in facts.files)  # weights of at most 4 MiB too


@pytest.mark.parametrize(
    ("family", "changes", "expert_parameters"),
    [
        ("llama", {}, 0),
        # (layers) * (experts) * (three projections), one tensor for each expert
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16}, 2 * 4 * 3 * 32 * 16),
        # One tensor for all experts of a layer, with biases and without.
        ("gpt_oss", {"num_local_experts": 4}, 2 * 4 * (32 * 128 + 128 + 64 * 32 + 32)),
        ("granitemoe", {"num_local_experts": 4}, 2 * 4 * (128 * 32 + 32 * 64)),
    ],
)
def test_the_weights_of_experts_are_counted_and_none_of_them_is_adapted(
    tmp_path: Path, family: str, changes: dict[str, Any], expert_parameters: int
) -> None:
    write_model(tmp_path / "m")
    config, shapes = saved_shapes(family, **changes)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    weights = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(weights, tmp_path / "m" / WEIGHTS)
    facts = read(tmp_path / "m").facts
    assert facts.expert_parameters == expert_parameters
    attention = {"k_proj", "o_proj", "q_proj", "v_proj"}
    assert {*facts.target_modules} == attention | (
        {"down_proj", "gate_proj", "up_proj"} if family == "llama" else set()
    )


@pytest.mark.parametrize(
    ("family", "changes", "left_out", "context_length"),
    [
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}, ("max_position_embeddings",), 128),
        ("gptj", {"rotary_dim": 4, "max_position_embeddings": 128}, (), 128),
        ("bloom", {}, ("max_position_embeddings",), 2**20),
        ("bloom", {"seq_length": 128}, ("max_position_embeddings",), 128),
        ("mamba", {}, ("max_position_embeddings",), 2**20),
        ("llama", {}, ("max_position_embeddings",), 2048),  # what transformers takes a Llama for that does not say it
    ],
)
def test_sizes_are_those_that_transformers_reads_whatever_the_family_calls_them(
    tmp_path: Path, family: str, changes: dict[str, Any], left_out: tuple[str, ...], context_length: int
) -> None:
    write_model(tmp_path / "m")
    config, shapes = saved_shapes(family, **changes)
    config = {name: value for name, value in config.items() if name not in left_out}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    weights = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(weights, tmp_path / "m" / WEIGHTS)
    facts = read(tmp_path / "m").facts
    found = (facts.hidden_size, facts.layers, facts.vocabulary_size, facts.context_length)
    assert found == (32, 2, config["vocab_size"], context_length)


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


@pytest.mark.parametrize("content", ['{"eos_token_id": "</s>"}', '{"eos_token_id": [2, null]}', "{", "[2]"])
def test_a_generation_config_that_train_could_not_read_after_its_last_step_is_refused(
    tmp_path: Path, content: str
) -> None:
    write_model(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(content)
    with pytest.raises(StageError, match=r"generation_config\.json") as caught:
        read(tmp_path / "m")
    assert caught.value.fault is Fault.BROKEN_MODEL


def test_a_configuration_may_hold_infinity_as_transformers_writes_it(tmp_path: Path) -> None:
    write_model(tmp_path / "m", config={"time_step_limit": [0.0, math.inf]})
    assert "Infinity" in (tmp_path / "m" / "config.json").read_text()
    assert read(tmp_path / "m").family == "llama"


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


def large_template_for_tools(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("d")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("x" * 65_536)


Tensors = dict[str, Any]


def rewrite(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    """A change to the tensors of the model's one file."""

    def spoil(folder: Path) -> None:
        safetensors.numpy.save_file(change(safetensors.numpy.load_file(folder / WEIGHTS)), folder / WEIGHTS)

    return spoil


def less(name: str) -> Callable[[Path], None]:
    return rewrite(lambda tensors: {key: each for key, each in tensors.items() if key != name})


def other(name: str, value: Any) -> Callable[[Path], None]:
    return rewrite(lambda tensors: tensors | {name: value})


def configure(**changes: Any) -> Callable[[Path], None]:
    """A configuration that is not that of the weights."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_bytes())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return spoil


def shorten(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])


def shorten_to_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])


def lengthen(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"00")


def point(name: str) -> Callable[[Path], None]:
    """A clone without the large files."""

    def spoil(folder: Path) -> None:
        oid = "oid sha256:" + "ab" * 32
        (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\n{oid}\nsize 538090408\n")

    return spoil


def move(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).rename(folder / name) and None


def shard(*left_out: str, index: bool = True, files: int = 2) -> Callable[[Path], None]:
    """The weights in two files and an index, without the tensors and files `left_out`."""

    def spoil(folder: Path) -> None:
        tensors = safetensors.numpy.load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = [f"model-{number + 1:05}-of-00002.safetensors" for number in range(files)]
        weight_map = {key: names[place % 2] for place, key in enumerate(sorted(tensors))}
        for name in names:
            held = {key: tensors[key] for key, file in weight_map.items() if file == name and key not in left_out}
            if name not in left_out:
                safetensors.numpy.save_file(held, folder / name)
        if index:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def wrap(tensors: Tensors) -> Tensors:
    return {f"_orig_mod.{key}": each for key, each in tensors.items()}


def lose_most(tensors: Tensors) -> Tensors:
    return {key: each for key, each in tensors.items() if key in ("model.norm.weight", UP)}


def misplace(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content.replace(b'"shape":[32]', b'"shape":[31]', 1))


NEXT_LAYER = "model.layers.2.input_layernorm.weight"
VECTOR = np.zeros(HIDDEN, dtype=np.float32)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (less(UP), [UP, "missing from model.safetensors"]),
        (shard(UP), [UP, "missing from model-0000", "-of-00002.safetensors"]),
        (other(UP, np.zeros((INNER, HIDDEN + 1), np.float32)), [UP, WEIGHTS, "is 48 x 33", "asks for 48 x 32"]),
        (other(NEXT_LAYER, VECTOR), [NEXT_LAYER, WEIGHTS, "no place"]),
        (other("model.layers.0.self_attn.q_proj.bias", VECTOR), ["self_attn.q_proj.bias", "no place"]),
        (configure(num_hidden_layers=3), [NEXT_LAYER, "missing", "9 such tensors"]),
        (configure(num_hidden_layers=1), ["model.layers.1.input_layernorm.weight", "no place"]),
        (configure(num_hidden_layers=10**9), ["1,000,000,000 layers", "20 tensors"]),
        (configure(vocab_size=640), ["model.embed_tokens.weight", "asks for 640 x 32 (vocab_size 640)"]),
        (
            configure(hidden_size=64, head_dim=8),
            [f"is {VOCABULARY} x 32", "x 64 (hidden_size 64)"],
        ),
        (configure(tie_word_embeddings=False), ["lm_head.weight is missing from model.safetensors"]),
        (rewrite(wrap), ["begin with _orig_mod.", "save_pretrained"]),
        (rewrite(lose_most), ["model.embed_tokens.weight is missing", "18 such tensors"]),
        (misplace, ["model.safetensors is damaged", "shape"]),
        (shorten, ["model.safetensors is cut off", "bytes"]),
        (shorten_to_header, ["model.safetensors is cut off within its header"]),
        (lengthen, ["model.safetensors has 2 bytes too many"]),
        (point(WEIGHTS), ["model.safetensors is a Git LFS pointer", "git lfs pull"]),
        (point("tokenizer.json"), ["tokenizer.json is a Git LFS pointer", "git lfs pull"]),
        (move("model-00001-of-00001.safetensors"), ["index.json is missing", "model-00001-of-00001.safetensors"]),
        (move("adapter_model.safetensors"), ["is an adapter"]),
        (move("consolidated.safetensors"), ["consolidated.safetensors but no model.safetensors"]),
    ],
)
def test_a_model_that_is_not_whole_is_refused_with_the_tensor_and_the_file(
    tmp_path: Path, spoil: Callable[[Path], None], words: list[str]
) -> None:
    write_model(tmp_path / "m")
    spoil(tmp_path / "m")
    with pytest.raises(StageError) as caught:
        read(tmp_path / "m")
    assert caught.value.fault is Fault.BROKEN_MODEL
    assert [word for word in words if word not in str(caught.value)] == []
    assert caught.value.exit_code == 10


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    shard("model-00002-of-00002.safetensors")(tmp_path / "m")
    with pytest.raises(StageError, match=r"model-00002-of-00002\.safetensors does not exist"):
        read(tmp_path / "m")


@pytest.mark.parametrize(
    "change",
    [
        shard(),
        other("lm_head.weight", np.zeros((VOCABULARY, HIDDEN), dtype=np.float32)),
        other("model.layers.0.self_attn.rotary_emb.inv_freq", np.zeros(4, dtype=np.float32)),
        other("v_head.summary.weight", np.zeros((1, HIDDEN), dtype=np.float32)),
        rewrite(lambda tensors: {key: each.astype(np.float16) for key, each in tensors.items()}),
    ],
    ids=["in shards", "a tied head that is there", "rotary frequencies", "a value head", "half precision"],
)
def test_what_changes_nothing_about_the_model_is_no_fault(tmp_path: Path, change: Callable[[Path], None]) -> None:
    write_model(tmp_path / "m")
    change(tmp_path / "m")
    assert read(tmp_path / "m").facts.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("spoil", "config", "fault", "words"),
    [
        (None, {"auto_map": {"AutoModel": "x.py"}}, Fault.REMOTE_CODE, "^config.json of .* remove auto_map"),
        (None, {"architectures": ["LlavaForConditionalGeneration"]}, Fault.UNSUPPORTED_MODEL, "Llava"),
        (None, {"architectures": []}, Fault.BROKEN_MODEL, "architectures is missing"),
        (None, {"model_type": None}, Fault.BROKEN_MODEL, "model_type is missing"),
        (None, {"quantization_config": {"bits": 4}}, Fault.UNSUPPORTED_MODEL, "quantized"),
        (
            other(UP, np.zeros((INNER, HIDDEN), np.int8)),
            {},
            Fault.UNSUPPORTED_MODEL,
            f"{UP} in model.+ is I8",
        ),
        (move("pytorch_model.bin"), {}, Fault.PICKLE_ONLY, "pytorch_model.bin"),
        (move("llama-Q4_K_M.gguf"), {}, Fault.NO_SAFETENSORS, "llama-Q4_K_M.gguf is of a format that cannot be"),
        (cut_weights, {}, Fault.BROKEN_MODEL, "not a safetensors file"),
        (no_weights, {}, Fault.OBJECT_NOT_FOUND, "model.safetensors"),
        (no_config, {}, Fault.OBJECT_NOT_FOUND, "fix model.uri"),
        (bad_config, {}, Fault.BROKEN_MODEL, "config.json is not a JSON object"),
        (no_tokenizer, {}, Fault.BROKEN_MODEL, "tokenizer.json"),
        (bad_tokenizer, {}, Fault.BROKEN_MODEL, "tokenizer.json cannot be read"),
        (large_template, {}, Fault.BROKEN_MODEL, "larger than 64 KiB"),
        (large_template_for_tools, {}, Fault.BROKEN_MODEL, "larger than 64 KiB"),
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


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": None}, "cannot build it from its config.json: .*hidden_size"),
        ({"model_type": "llama9"}, "cannot build it from its config.json: "),
    ],
)
def test_a_configuration_that_transformers_refuses_is_told_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(structure, "load_without_values", CHILD)
    write_model(tmp_path / "m", config=config)
    with pytest.raises(StageError, match=words) as caught:
        read(tmp_path / "m")
    assert caught.value.fault is Fault.UNSUPPORTED_MODEL


def test_a_tokenizer_config_that_describes_all_tokens_of_speech_is_read(tmp_path: Path) -> None:
    """As language models do that speak (Llasa, Orpheus); such files are written with indents."""
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokens = {str(128256 + number): {"content": f"<|s_{number}|>", **token} for number in range(65_536)}
    content = json.dumps({"added_tokens_decoder": tokens}, indent=2)
    (tmp_path / "tokenizer_config.json").write_text(content)
    found = ModelFolder(open_store(StorageConfig()), tmp_path.as_uri()).json("tokenizer_config.json")
    assert found is not None
    assert found["added_tokens_decoder"] == tokens


WITH_TOOLS = "{{ tools | length }} tools\n" + CHATML
NAMED = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": WITH_TOOLS}]


@pytest.mark.parametrize(
    ("files", "config"),
    [
        ({}, CHATML),
        ({}, NAMED),
        ({"chat_template.jinja": "|" + CHATML}, CHATML),
        ({"chat_template.jinja": "|" + CHATML}, NAMED),
        ({"chat_template.jinja": "|" + CHATML, "additional_chat_templates/tool_use.jinja": WITH_TOOLS}, None),
        ({"chat_template.jinja": "|" + CHATML, "additional_chat_templates/tool_use.jinja": WITH_TOOLS}, NAMED),
        ({"chat_template.jinja": "|" + CHATML, "additional_chat_templates/rag.jinja": "no"}, None),
    ],
)
def test_the_chat_template_is_the_one_that_transformers_takes_with_tools_and_without(
    tmp_path: Path, files: dict[str, str], config: Any
) -> None:
    write_model(tmp_path / "m", template=None, tokenizer_config={} if config is None else {"chat_template": config})
    for name, content in files.items():
        (tmp_path / "m" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "m" / name).write_text(content)
    found = read(tmp_path / "m")
    assert found.chat_template is not None
    ours = ChatTemplate(found.chat_template, found.special_tokens, datetime(2026, 1, 1, tzinfo=UTC))
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "m")
    messages = [{"role": "user", "content": "rain?"}]
    for tools in (None, [{"type": "function", "function": {"name": "weather"}}]):
        expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        assert ours.render(messages, True, tools) == expected
