"""What prepare renders and tokenises is what transformers' `apply_chat_template` gives. Imports transformers."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from data_run import CHATML, byte_bpe, write_model
from finetune_api.run import StorageConfig
from finetune_trainer.data.model_facts import read_model
from finetune_trainer.data.template import ChatTemplate, answers, plain_template
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


@pytest.mark.parametrize("source", [CHATML, LLAMA3, BLOCKS, plain_template(False), plain_template(True)])
def test_text_and_tokens_equal_those_of_transformers(tmp_path: Path, source: str) -> None:
    uri = write_model(tmp_path / "model", template=source)
    judge = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = read_model(open_store(StorageConfig()), uri)
    assert model.chat_template == source
    template = ChatTemplate(source, model.special_tokens, datetime.now(UTC))
    for conversation in CONVERSATIONS:
        messages = [{key: value for key, value in message.items() if value is not None} for message in conversation]
        whole, spans = answers(template, messages, 0, learn_all=False)
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
    whole, spans = answers(template, conversation, 0, learn_all=False)
    (tokens,) = model.tokenizer.conversations([whole], [spans], learn_all=False)
    expected = judge.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert tokens.labels.tolist() == expected["assistant_masks"]
