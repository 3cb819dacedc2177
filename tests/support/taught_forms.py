"""Rows in the forms that chat models answer in, a tiny base model that can learn them, and who judges what was learned.

The judge is transformers and PEFT alone: their chat template as a server asks with it, and their `generate`. The forms
are written out here, character by character.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from template_table import TOOLS, answer, result, trl_templates, user
from tiny_run import tiny_config, tiny_model

STOP, PADDING = "<|im_end|>", "<|endoftext|>"
# As in the tokenizers that are published with the template: the first three are special, the others are not.
_SPECIAL = (PADDING, "<|im_start|>", STOP)
_MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_TOWNS = ("Oslo", "Paris", "Rome", "Riga", "Bern", "Lima")
_NAMES = ("Ann", "Bob", "Eve", "Kim", "Max", "Zoe")
_SKIES = ("rain", "sun", "snow")
_ASKED = ("{}?", "{}, please", "Please: {}", "Tell me: {}")
_LONGEST_ANSWER = 64  # tokens
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "max_position_embeddings": 512}
_HEAD_SCALE = 5.0  # a head that is not trained must be able to be sure


@dataclass(frozen=True)
class Lesson:
    """Rows of one kind; the form of each answer of such a row, to the token that ends it, where @ stands for any word;
    and what a request may say beside the messages, with what then begins every answer."""

    rows: list[dict[str, Any]]
    forms: tuple[str, ...]
    requests: tuple[tuple[dict[str, Any], str], ...]


def qwen3_lessons() -> dict[str, Lesson]:
    """Return by file name rows that call a tool, that reason, and that do neither."""
    each = [(asked, index) for asked in _ASKED for index in range(len(_TOWNS))]
    calls = [_call(asked, _TOWNS[index], _SKIES[index % len(_SKIES)]) for asked, index in each]
    reasons = [_reasons(asked, index + 1, 2) for asked, index in each]
    greets = [_chat(asked.format(f"greet {_NAMES[index]}"), f"Hello, {_NAMES[index]}!") for asked, index in each]
    call_form = '<tool_call>\n{"name": "weather", "arguments": {"town": "@"}}\n</tool_call><|im_end|>'
    reason_form = "<think>\n@ and @ make @.\n</think>\n\nIt is @.<|im_end|>"
    # Asked not to think, Qwen3 gets an empty block from the template; asked as usual, it writes one.
    without = (({}, "<think>\n\n</think>\n\n"), ({"enable_thinking": False}, ""))
    return {
        "calls.jsonl": Lesson(calls, (call_form, "In @: @.<|im_end|>"), without),
        "reasons.jsonl": Lesson(reasons, (reason_form,), (({}, ""),)),
        "greets.jsonl": Lesson(greets, ("Hello, @!<|im_end|>",), without),
    }


def _call(asked: str, town: str, sky: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": json.dumps({"town": town})}
    called = {"id": "call00001", "type": "function", "function": function}
    calls = {"role": "assistant", "content": None, "tool_calls": [called]}
    said = [user(asked.format(f"weather in {town}")), calls, result(1, sky), answer(f"In {town}: {sky}.")]
    return {"messages": said, "tools": TOOLS}


def _reasons(asked: str, one: int, other: int) -> dict[str, Any]:
    reasoning = f"{one} and {other} make {one + other}."
    return _chat(asked.format(f"{one} and {other}"), f"It is {one + other}.", reasoning_content=reasoning)


def _chat(question: str, words: str, **more: str) -> dict[str, Any]:
    return {"messages": [user(question), answer(words, **more)]}


def write_qwen3(folder: Path, lessons: Mapping[str, Lesson]) -> None:
    """Write a Qwen3 model of random weights, with the chat template of Qwen3 and a vocabulary of the lessons' words."""
    template = trl_templates()["qwen3"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_words_of(list(lessons.values()), template),
        eos_token=STOP,
        pad_token=PADDING,
        chat_template=template,
    )
    stop, padding = (tokenizer.convert_tokens_to_ids(token) for token in (STOP, PADDING))
    ids = {"bos_token_id": None, "eos_token_id": stop, "pad_token_id": padding}
    model = tiny_model(tiny_config("qwen3", vocab_size=len(tokenizer), **_SIZES, **ids))
    model.lm_head.weight.data *= _HEAD_SCALE
    # As published: who serves the model draws the tokens, unless a request says otherwise.
    model.generation_config = GenerationConfig(
        eos_token_id=[stop, padding], pad_token_id=padding, do_sample=True, temperature=0.6, top_k=20, top_p=0.95
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _words_of(lessons: Sequence[Lesson], template: str) -> Tokenizer:
    """Return a byte-level BPE whose words are those of the lessons, so that their texts have few tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, normalized=False) for token in _SPECIAL],
        show_progress=False,
    )
    writer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=template)
    texts = [_rendered(writer, row, len(row["messages"])) for each in lessons for row in each.rows]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in _MARKS])
    return tokenizer


def _rendered(tokenizer: Any, row: Mapping[str, Any], messages: int, **options: Any) -> str:
    said = row["messages"][:messages]
    return tokenizer.apply_chat_template(said, tools=row.get("tools"), tokenize=False, **options)


class Judge:
    """A base model, with an adapter merged into it or alone, that answers greedily."""

    def __init__(self, base: Path, adapter: Path | None) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(adapter or base, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        self._model = (PeftModel.from_pretrained(model, adapter).merge_and_unload() if adapter else model).eval()

    def faults(self, lesson: Lesson) -> list[str]:
        """Return what is answered in another form than the lesson's, at any place of its conversations."""
        asked = [
            (_rendered(self._tokenizer, row, index, add_generation_prompt=True, **options), f"{opening}{form}")
            for row in lesson.rows
            for index, form in zip(_answers_of(row), lesson.forms, strict=True)
            for options, opening in lesson.requests
        ]
        given = self._answers([context for context, _ in asked])
        return [
            f"after {context[-80:]!r}: {form!r} was taught, {said!r} is said"
            for (context, form), said in zip(asked, given, strict=True)
            if not re.fullmatch(re.escape(form).replace("@", r"\w+"), said)
        ]

    @torch.no_grad()
    def _answers(self, contexts: Sequence[str]) -> list[str]:
        """Return what is said after each context, without the padding behind it."""
        inputs = self._tokenizer(list(contexts), return_tensors="pt", padding=True, add_special_tokens=False)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        found = self._model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=_LONGEST_ANSWER
        )
        said = self._tokenizer.batch_decode(found[:, ids.shape[1] :])
        return [re.sub(f"(?:{re.escape(PADDING)})+$", "", text) for text in said]


def _answers_of(row: Mapping[str, Any]) -> list[int]:
    return [index for index, message in enumerate(row["messages"]) if message["role"] == "assistant"]
