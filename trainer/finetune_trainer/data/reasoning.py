"""Reasoning: what opens and closes it, where a message has it, and how templates are asked for either form."""

import re
from typing import Any, cast

from finetune_trainer.data.template import ChatTemplate, Message

# What opens a block of reasoning in published templates, and what closes it.
REASONING_BLOCKS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "◁think▷": "◁/think▷",
    "<|channel>thought": "<channel|>",
}
_OPENINGS = tuple(REASONING_BLOCKS)
# Variables by which published templates write their prompt with or without reasoning, and the value that says so.
WITH_REASONING = (("enable_thinking", True), ("thinking", True), ("enable_reasoning", True))
WITHOUT_REASONING = (
    ("enable_thinking", False),
    ("thinking", False),
    ("enable_reasoning", False),
    ("reasoning", False),
    ("reasoning_effort", "none"),
)
_FIELDS = ("reasoning_content", "thinking", "reasoning")


def words_of(message: Message) -> str:
    """Return a message's content, whose parts are all of text if it has parts."""
    content: Any = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in cast(list[dict[str, Any]], content))
    return content if isinstance(content, str) else ""


def may_close(content: str) -> bool:
    """Whether a content may hold what closes reasoning: of all that does, each has one of these letters, and pairs."""
    if "/" not in content and "|" not in content:
        return False
    return "</" in content or "|>" in content or "/t" in content or "[/" in content


def reasoning_of(message: Message) -> tuple[str, str, str]:
    """Return a message's reasoning, what closes it inside its content (nothing where it stands apart), and the content
    after it. The reasoning is empty where there is none."""
    content = message.get("content")
    if type(content) is not str:
        content = words_of(message)
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning.strip():
        return reasoning, "", content
    if not may_close(content):
        return "", "", content
    for opening, closing in REASONING_BLOCKS.items():
        if closing not in content:
            continue
        inside, _, after = content.partition(closing)
        if inside.lstrip().startswith(opening):
            inside = inside.lstrip()[len(opening) :]
            return (inside, closing, after) if inside.strip() else ("", closing, after)
    return "", "", content


def opened_by(template: ChatTemplate, context: str) -> str | None:
    """Return what opens reasoning at the end of a prompt, if the template itself has put it there."""
    bare = context.rstrip()
    if not bare.endswith(_OPENINGS):
        return None
    tag = next(each for each in REASONING_BLOCKS if bare.endswith(each))
    return tag if tag in template.source else None


def begin_of_empty_block(template: ChatTemplate, context: str) -> int | None:
    """Return where at the end of a prompt a block without reasoning begins, if the template itself has put it there."""
    bare = context.rstrip()
    for opening, closing in REASONING_BLOCKS.items():
        inside = bare.removesuffix(closing).rstrip()
        if bare.endswith(closing) and inside.endswith(opening) and opening in template.source:
            return len(inside) - len(opening)
    return None


def without_fields(message: Message) -> Message:
    """Return a message without the fields of reasoning."""
    return {name: value for name, value in message.items() if name not in _FIELDS}


def without_reasoning(message: Message) -> Message:
    """Return a message without reasoning, and without what is said beside calls, which some templates write as such."""
    bare = without_fields(message)
    if message.get("tool_calls"):
        bare.pop("content", None)
    return bare


def empty_block(opening: str) -> re.Pattern[str]:
    """Return what finds a block without reasoning at the begin of a text."""
    return re.compile(rf"\A\s*{re.escape(opening)}\s*{re.escape(REASONING_BLOCKS[opening])}")
