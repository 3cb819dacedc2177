"""Chat templates: where they are found, the sandbox they run in, and which part of a conversation is an answer.

The sandbox follows transformers' `apply_chat_template` (utils/chat_template_utils.py), so that a rendered
conversation is the same here, in transformers and in vLLM. Only jinja2 is imported: the child process that runs
untrusted templates must stay small.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, cast

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_TEMPLATE_BYTES = 65536
Message = dict[str, Any]
Span = tuple[int | None, int]  # begin (None where it is not known) and end, in characters

# Readable tags that no base model's tokenizer treats specially; an answer ends with the tokenizer's own end token.
_PLAIN = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


def plain_template(begins_with_bos: bool) -> str:
    """The built-in template for base models; with the begin token where the tokenizer itself would add it."""
    return ("{{ bos_token }}" if begins_with_bos else "") + _PLAIN


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks answers in some templates; here it only passes its body on."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Refuses attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as in jinja2, `self` may be an attribute
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError("names that begin with an underscore are refused")


def _raise_exception(message: object) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _first_of_shuffled(values: Sequence[Any]) -> Any:
    """`random`, the same one each time: a job that is prepared twice must give the same plan."""
    return random.Random(0).choice(values)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled template. constants: the texts in its code, which no row has written.

    special_tokens: bos_token, eos_token and so on, as the template sees them; now: what `strftime_now` tells, one
    moment for the whole stage. Raises jinja2.TemplateError when the template is not valid.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], now: datetime) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.filters["random"] = _first_of_shuffled
        del environment.globals["lipsum"]  # random words
        functions: dict[str, Any] = {
            "raise_exception": _raise_exception,
            "strftime_now": now.strftime,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        environment.globals.update(functions)
        self._template = environment.from_string(source)
        self.constants = frozenset(
            node.value for node in environment.parse(source).find_all(nodes.Const) if isinstance(node.value, str)
        )
        self._special_tokens = special_tokens

    def render(
        self,
        messages: list[Message],
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text. template_kwargs: what the row hands to the template by name."""
        return self._template.render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{**self._special_tokens, **(template_kwargs or {})},
        )


class UnstableError(Exception):
    """A conversation is not the beginning of what it should be that of. message: the answer's index."""

    def __init__(self, message: int) -> None:
        super().__init__(message)
        self.message = message


class NotPrefixStableError(UnstableError):
    """What is rendered up to a message changes once more messages follow."""


class PromptNotKeptError(UnstableError):
    """What is rendered up to an answer does not begin with the prompt for that answer, which a served model gets."""


def answers(
    template: ChatTemplate,
    messages: list[Message],
    learned: Sequence[bool],
    learn_all: bool,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[str, list[Span]]:
    """The whole conversation as text, and where in it the answers are whose message is `learned`.

    An answer is what the template adds to the generation prompt for one assistant message. Raises PromptNotKeptError
    where the finished answer does not follow that prompt, such as one that opens reasoning, and NotPrefixStableError
    when the text up to an answer's end is not the beginning of the whole. With `learn_all` neither matters: there is
    one span, from the first answer to the end of the last.
    """
    messages = [_with_reasoning(message) for message in messages]
    whole = template.render(messages, False, tools, template_kwargs)
    spans: list[Span] = []
    for index in (index for index, is_learned in enumerate(learned) if is_learned):
        before = template.render(messages[:index], True, tools, template_kwargs)
        if learn_all:
            return whole, [(len(before) if whole.startswith(before) else None, len(whole))]
        through = (
            whole
            if index == len(messages) - 1
            else template.render(messages[: index + 1], False, tools, template_kwargs)
        )
        if not through.startswith(before):
            raise PromptNotKeptError(index)
        if not whole.startswith(through):
            raise NotPrefixStableError(index)
        spans.append((len(before), len(through)))
    return whole, spans


def _with_reasoning(message: Message) -> Message:
    """Reasoning under all the names that templates read it by, as transformers does."""
    if len(message) > 2:
        names = ("reasoning_content", "thinking", "reasoning")
        reasoning = next((message[name] for name in names if message.get(name) is not None), None)
        if reasoning is not None:
            return {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def find_template(config: dict[str, Any], jinja_file: str | None) -> str | None:
    """The model's template: chat_template.jinja, else that of tokenizer_config.json (of a list, `default`)."""
    if jinja_file is not None:
        return jinja_file
    found = config.get("chat_template")
    if isinstance(found, list):
        entries = [cast(dict[str, Any], entry) for entry in cast(list[Any], found) if isinstance(entry, dict)]
        found = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
    return found if isinstance(found, str) and found else None
