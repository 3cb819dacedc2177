"""Open the reasoning of answers that only close it: a model's raw output does not repeat what its prompt has written.

Rows are often made of such output. Templates look for both tags, and would write the reasoning behind an empty block.
"""

import re
from dataclasses import replace

import jinja2

from finetune_trainer.data.reasoning import REASONING_BLOCKS, may_close, opened_by, reasoning_of
from finetune_trainer.data.renders import Chat
from finetune_trainer.data.template import ChatTemplate, Message

_QUESTION = "Hello"


def with_openings(template: ChatTemplate, chat: Chat) -> Chat:
    """Return the conversation with the tag that the template's prompt opens reasoning by before each answer that has
    reasoning and only the tag that closes it; the same object where there is none."""
    if not any(_may_lack_opening(message) for message in chat.messages):
        return chat
    opening = _opening(template, chat)
    if opening is None:
        return chat
    messages = [_opened(message, opening) for message in chat.messages]
    return chat if messages == chat.messages else replace(chat, messages=messages)


def _may_lack_opening(message: Message) -> bool:
    content = message.get("content")
    return (
        message["role"] == "assistant"
        and isinstance(content, str)
        and may_close(content)
        and any(closing in content for closing in REASONING_BLOCKS.values())
        and reasoning_of(message)[:2] == ("", "")
    )


def _opening(template: ChatTemplate, chat: Chat) -> str | None:
    """Return what the template's prompt for an answer opens reasoning by."""
    for content in (_QUESTION, [{"type": "text", "text": _QUESTION}]):
        try:
            prompt = template.render([{"role": "user", "content": content}], True, None, chat.variables)
        except (jinja2.TemplateError, TypeError, LookupError):
            continue  # the row itself tells how it fails
        return opened_by(template, prompt)
    return None


def _opened(message: Message, opening: str) -> Message:
    """Return an answer with its reasoning opened, if the closing tag begins or ends a line: words about it do not."""
    if not _may_lack_opening(message):
        return message
    before, closing, after = message["content"].partition(REASONING_BLOCKS[opening])
    at_a_line = re.search(r"(^|\n)[ \t]*\Z", before) or re.match(r"[ \t]*(\n|\Z)", after)
    if not closing or not before.strip() or opening in before or not at_a_line:
        return message
    return {**message, "content": f"{opening}\n{before}{closing}{after}"}
