"""Says why a chat template fails on a conversation, in words of the template and the code alone.

What jinja2 says may quote the row, and names neither what the template lacks nor what to do. So its words are told only
where they stand in the template's code; of a name that the template reads and does not find it is told where in the
row it is missing, and which parts of the row the template never reads.
"""

import re
from collections.abc import Iterator

import jinja2

from finetune_api.redact import shortened
from finetune_trainer.data.renders import Chat
from finetune_trainer.data.template import ChatTemplate

MAX_WORDS = 160
_MAX_NAME = 32
_NOT_ALLOWED = "it does what transformers' sandbox refuses too (SecurityError)"
# As jinja2 says it: "'dict object' has no attribute 'content'", "'documents' is undefined".
_NOT_FOUND = re.compile(r"has no attribute '([^']+)'\Z|\A'([^']+)' is undefined\Z")
_OF_MESSAGES = ("content", "role", "name", "tool_calls", "tool_call_id", "reasoning_content")


def refusal_words(error: Exception, template: ChatTemplate, chat: Chat) -> str:
    """Return why the template fails on a conversation, without the row's words."""
    if isinstance(error, jinja2.exceptions.SecurityError):
        return _NOT_ALLOWED
    said = str(error)
    if said in template.constants and "\n" not in said:
        return shortened(said, MAX_WORDS)
    found = [*_not_found(said, template, chat), *_not_read(template, chat)]
    words = f"{type(error).__name__}: {'; '.join(found)}" if found else type(error).__name__
    return shortened(words, MAX_WORDS)


def _not_found(said: str, template: ChatTemplate, chat: Chat) -> Iterator[str]:
    """Yield what the template reads that is not there, if that is what it fails on."""
    match = _NOT_FOUND.search(said)
    name = next((each for each in match.groups() if each), "") if match else ""
    if not name or name not in template.names:  # it may be the row's
        return
    lacking = [index for index, message in enumerate(chat.messages) if name not in message]
    if name in _OF_MESSAGES and lacking:
        yield f"it reads {name}, which messages[{lacking[0]}] has not"
    else:
        yield f"it reads {shortened(name, _MAX_NAME)}, which is not given"


def _not_read(template: ChatTemplate, chat: Chat) -> Iterator[str]:
    """Yield which parts of the row the template never reads, and what to do."""
    calls = any(message.get("tool_calls") for message in chat.messages) and "tool_calls" not in template.names
    tools = bool(chat.tools) and "tools" not in template.variables
    if calls or tools:
        names = " or ".join([*(["tool_calls"] if calls else []), *(["tools"] if tools else [])])
        yield f"it never reads {names}: put a template that does beside the model"
