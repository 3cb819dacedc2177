"""What prepare renders and tokenises is what transformers' `apply_chat_template` gives. Imports transformers."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_run import CHATML, byte_bpe, every_answer, one_sequence, write_model
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_trainer.data.model_facts import read_model
from finetune_trainer.data.template import ChatTemplate, plain_template
from finetune_trainer.data.tokenizer import Tokenizer as ChildTokenizer
from finetune_trainer.store import open_store

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|im_start|>' + "
    "message['role'] + '\n\n'+ message['content'] | trim + '<|im_end|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
BLOCKS = """{%- set ns = namespace(found=false) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.found = true %}
    {%- endif %}
{%- endfor %}
{%- if not ns.found %}
    {{- '<|im_start|>system\\nDefault' + eos_token + '\\n' }}
{%- endif %}
{% for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.reasoning_content is defined %}{{ message.reasoning_content }}{% endif %}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {%- else %}{{ message.content | tojson }}{{ eos_token }}{% endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": '日本 <b>&amp;</b> "quoted" 😀'},
        {"role": "assistant", "content": "  é\r\n\n"},
        {"role": "user", "content": "<|im_end|> inside"},
        {"role": "assistant", "content": "tab\t", "thinking": "hm", "name": None},
    ],
]


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f", "description": "d"}}]])
@pytest.mark.parametrize("in_files", [False, True])
def test_of_templates_by_name_the_one_that_transformers_takes_is_rendered(
    tmp_path: Path, tools: Any, in_files: bool
) -> None:
    named = {"default": BLOCKS, "rag": "r", "tool_use": "{{ bos_token }}{{ tools | tojson }}\n" + LLAMA3 + "\n"}
    listed = [{"name": name, "template": template} for name, template in named.items()]
    uri = write_model(tmp_path / "model", template=None, tokenizer_config={"chat_template": listed})
    if in_files:  # as transformers writes them today
        AutoTokenizer.from_pretrained(str(tmp_path / "model")).save_pretrained(str(tmp_path / "model"))
        assert (tmp_path / "model" / "additional_chat_templates" / "tool_use.jinja").exists()
    model = read_model(open_store(StorageConfig()), uri)
    model.tokenizer.close()
    assert model.chat_template is not None
    text = ChatTemplate(model.chat_template, model.special_tokens, datetime.now(UTC)).render(
        CONVERSATIONS[0], True, tools
    )
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "model"))
    assert text == theirs.apply_chat_template(CONVERSATIONS[0], tools=tools, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("source", [CHATML, LLAMA3, BLOCKS, plain_template(False), plain_template(True)])
def test_text_and_tokens_equal_those_of_transformers(tmp_path: Path, source: str) -> None:
    uri = write_model(tmp_path / "model", template=source)
    judge = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = read_model(open_store(StorageConfig()), uri)
    assert model.chat_template == source
    template = ChatTemplate(source, model.special_tokens, datetime.now(UTC))
    for conversation in CONVERSATIONS:
        messages = [{key: value for key, value in message.items() if value is not None} for message in conversation]
        whole, spans = one_sequence(template, messages, every_answer(messages), learn_all=False)
        assert whole == judge.apply_chat_template(conversation, tokenize=False)
        (tokens,) = model.tokenizer.conversations([whole], [spans], learn_all=False)
        expected = judge.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]
        assert tokens.ids.tolist() == expected


def test_generation_tags_and_structure_find_the_same_answers(tmp_path: Path) -> None:
    uri = write_model(tmp_path / "model", template=BLOCKS, tokenizer=byte_bpe())
    judge = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = read_model(open_store(StorageConfig()), uri)
    template = ChatTemplate(BLOCKS, model.special_tokens, datetime.now(UTC))
    conversation = [*CONVERSATIONS[0], {"role": "user", "content": "r"}, {"role": "assistant", "content": "the fox"}]
    whole, spans = one_sequence(template, conversation, every_answer(conversation), learn_all=False)
    (tokens,) = model.tokenizer.conversations([whole], [spans], learn_all=False)
    expected = judge.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert tokens.labels.tolist() == expected["assistant_masks"]


VOCABULARY = byte_bpe().get_vocab_size()
WHOLE = byte_bpe().get_vocab()["the"]  # a token of the vocabulary that no added token is
SPLIT = byte_bpe().get_vocab()["Ċ"]  # as its text, other bytes stand for it
READ_APART = "the  <x> fox <y>the Ċ other<X>  \n <x><y> <z>[PAD]y<x>y <s>"


def save_again(folder: Path) -> None:
    """Do what the refusal asks for."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (folder / "added_tokens.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)


def require_parity(folder: Path) -> None:
    """Require that the model is taken, and that its rows are split as by AutoTokenizer, also where it is started again
    elsewhere."""
    rows = read_model(open_store(StorageConfig()), folder.as_uri()).tokenizer
    judge = AutoTokenizer.from_pretrained(folder)
    expected = judge.encode(READ_APART, add_special_tokens=False)
    setup, content = rows.restartable
    again = ChildTokenizer(content, setup["eos_token"], setup["eos_id"], json.loads(setup["files"]))
    for each in (rows, again):
        (tokens,) = each.conversations([READ_APART], [[]], True)
        assert tokens.ids.tolist() == expected
        assert each.vocabulary_size == 1 + max(judge.get_vocab().values())
        each.close()


def test_tokens_that_only_other_files_name_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    for number, (config, others) in enumerate(NAMED_ELSEWHERE):
        folder = tmp_path / str(number)
        write_model(folder, tokenizer_config=config, config={"vocab_size": VOCABULARY + 8})
        for name, content in others.items():
            (folder / name).write_text(json.dumps(content))
        require_parity(folder)


def listed(*tokens: dict[str, Any] | str, first: int = VOCABULARY) -> dict[str, Any]:
    """Return tokens as added_tokens_decoder lists them, the first with the first id that is free."""
    entries = [{"content": each} if isinstance(each, str) else each for each in tokens]
    return {"added_tokens_decoder": {str(first + place): each for place, each in enumerate(entries)}}


X: dict[str, Any] = {"__type": "AddedToken", "content": "<x>", "lstrip": True, "normalized": False}
Config = dict[str, Any]
NAMED_ELSEWHERE: list[tuple[Config, Config]] = [
    (listed("<x>"), {}),
    (listed("<x>", "<y>", "[PAD]"), {}),
    ({"added_tokens_decoder": dict(reversed(listed("<x>", "<y>")["added_tokens_decoder"].items()))}, {}),
    (listed({"content": "<x>", "lstrip": True}), {}),
    (listed({"content": "<x>", "rstrip": True, "special": True}), {}),
    (listed({"content": "<x>", "rstrip": True, "normalized": False}, {"content": "<z>", "single_word": True}), {}),
    (listed("the", first=WHOLE), {}),
    (listed({"content": "Ċ", "special": True}, first=SPLIT), {}),
    (listed("<|endoftext|>", first=0) | {"pad_token": "[PAD]"}, {}),
    (listed({"content": "<|im_end|>", "rstrip": True, "special": True}, first=2), {}),
    (listed("<x>") | {"pad_token": "<x>", "unk_token": "<y>"}, {}),
    (listed("<x>") | {"eos_token": "<x>"}, {}),
    ({"eos_token": "<x>"}, {}),
    ({"bos_token": X}, {}),
    ({"bos_token": X, "cls_token": "<z>", "pad_token": "[PAD]", "additional_special_tokens": ["<y>"]}, {}),
    ({"image_token": "<x>", "audio_token": X | {"content": "<y>"}, "unk_token": "the"}, {}),
    ({"additional_special_tokens": ["<y>", X]}, {}),
    ({"additional_special_tokens": ["<y>"], "extra_special_tokens": ["<x>"]}, {}),
    ({"extra_special_tokens": {"image_token": "<x>", "eoi": "<y>"}}, {}),
    ({"model_specific_special_tokens": {"image_token": "<x>"}}, {}),
    ({"added_tokens_decoder": {}}, {"added_tokens.json": {"<x>": VOCABULARY}}),  # which is then not read
    ({}, {"added_tokens.json": {"<y>": VOCABULARY, "<x>": VOCABULARY + 1}}),
    ({"pad_token": "<y>"}, {"added_tokens.json": {"<x>": VOCABULARY, "<y>": VOCABULARY + 1}}),
    ({"pad_token": X}, {"added_tokens.json": {"<x>": VOCABULARY, "<|im_end|>": 2}}),
    ({"eos_token": "<y>"}, {"special_tokens_map.json": {"eos_token": "<x>", "pad_token": {"content": "[PAD]"}}}),
    ({}, {"special_tokens_map.json": {"additional_special_tokens": ["<x>"]}, "added_tokens.json": {"<x>": VOCABULARY}}),
    (listed("<x>"), {"special_tokens_map.json": {"eos_token": "<y>"}}),
    ({"extra_special_tokens": ["<y>"]}, {"special_tokens_map.json": {"extra_special_tokens": ["<y>", "<x>"]}}),
]


@pytest.mark.parametrize(
    ("config", "added", "words"),
    [
        (
            {"added_tokens_decoder": {"9000": {"content": "<x>"}}},
            None,
            f"tokenizer_config.json names the token '<x>' with the id 9000, but AutoTokenizer gives it the id "
            f"{VOCABULARY};",
        ),
        ({}, {"<y>": 2}, "added_tokens.json names the token '<y>' with the id 2, but AutoTokenizer gives it the id"),
        ({}, {"<|im_end|>": 77}, "'<|im_end|>' with the id 77, but tokenizer.json gives it the id 2"),
    ],
)
def test_a_token_that_another_file_gives_another_id_is_refused_until_the_tokenizer_is_saved_again(
    tmp_path: Path, config: dict[str, Any], added: dict[str, int] | None, words: str
) -> None:
    folder = tmp_path / "model"
    write_model(folder, tokenizer_config=config)
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(StageError) as caught:
        require_parity(folder)
    assert caught.value.fault is Fault.BROKEN_MODEL
    assert words in str(caught.value)
    assert "save it again with save_pretrained" in str(caught.value)
    save_again(folder)
    require_parity(folder)


@pytest.mark.parametrize("entry", [{"7": 3}, {"7": {}}, {"x": {"content": "<x>"}}, [], "<x>"])
def test_added_tokens_that_transformers_could_not_read_are_refused(tmp_path: Path, entry: Any) -> None:
    write_model(tmp_path / "model", tokenizer_config={"added_tokens_decoder": entry})
    with pytest.raises(StageError, match=r"added_tokens_decoder in tokenizer_config\.json") as caught:
        require_parity(tmp_path / "model")
    assert caught.value.fault is Fault.BROKEN_MODEL


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"added_tokens_decoder": {"0": {"content": "<|endoftext|>"}, "2": {"content": "<|im_end|>"}}}, None),
        ({}, {"<|im_end|>": 2}),
        ({"pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}, None),
        ({"added_tokens_decoder": None, "extra_special_tokens": []}, None),
    ],
)
def test_files_that_say_the_same_as_the_tokenizer_are_not_refused(
    tmp_path: Path, config: dict[str, Any], added: dict[str, int] | None
) -> None:
    folder = tmp_path / "model"
    write_model(folder, tokenizer_config={name: value for name, value in config.items() if value is not None})
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    require_parity(folder)


def test_a_tokenizer_that_transformers_saved_with_tokens_added_is_read_as_it_reads_it(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["<x>", "<y>"])
    tokenizer.save_pretrained(tmp_path / "model")
    assert Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json")).token_to_id("<y>") == VOCABULARY + 1
    require_parity(tmp_path / "model")
