"""Chat templates: where they are found, and the sandbox they run in.

The sandbox follows transformers' `apply_chat_template` (utils/chat_template_utils.py), so that a rendered
conversation is the same here, in transformers and in vLLM. Only jinja2 is imported: the child process that runs
untrusted templates must stay small.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, cast

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from finetune_trainer.data.turnwise import ByTurns, turnwise

MAX_TEMPLATE_BYTES = 65536
FAILURES = (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError)
_MARK, _MARKS = 3, frozenset("<[{|")  # characters that such a text has at least, and one of which it has
_NEWLINE_AT_END = re.compile(r"(\r\n|\r|\n)\Z")
_SPACE_AT_BEGIN = re.compile(r"\A[ \t]+(?=\{[%#](?!\+))")
_MAX_JUDGED = 4096  # attributes of types, whose names a template may compute
Message = dict[str, Any]

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
    """`{% generation %}` marks answers in some templates; what it marked is kept in `marked`, and passed on."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.marked: list[str] = []

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        body = caller()
        self.marked.append(body)
        return body


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


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja's sandbox, which judges each attribute of a type once: it asks for nothing else of an object."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._judged: dict[tuple[type, str], bool] = {}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        known = self._judged.get((type(obj), attr))
        if known is None:
            known = super().is_safe_attribute(obj, attr, value)
            if len(self._judged) < _MAX_JUDGED:
                self._judged[type(obj), attr] = known
        return known


class ChatTemplate:
    """A compiled template.

    special_tokens: bos_token, eos_token and so on, as the template sees them; now: what `strftime_now` tells, one
    moment for the whole stage. Raises jinja2.TemplateError when the template is not valid.

    constants: the texts in its code, which no row has written; marks: those of them that messages rarely have, such as
    `</think>`; variables: the names it reads; names: these, those of attributes, and all texts; marks_answers: whether
    it has `{% generation %}`.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], now: datetime) -> None:
        environment = _Sandbox(
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
        self.source = source
        self._template = environment.from_string(source)
        self._template.globals = dict(self._template.globals)  # a chain of them is copied slowly, for every render
        (self._generation,) = (each for each in environment.iter_extensions() if isinstance(each, _GenerationTag))
        code = environment.parse(source)
        self.constants = frozenset(node.value for node in code.find_all(nodes.Const) if isinstance(node.value, str))
        self.variables = frozenset(node.name for node in code.find_all(nodes.Name) if node.ctx == "load")
        read = {node.attr for node in code.find_all(nodes.Getattr)}
        self.names = self.constants | self.variables | read
        self.marks = sorted(each for each in self.constants if len(each) >= _MARK and not _MARKS.isdisjoint(each))
        self.marks_answers = next(code.find_all(nodes.ExtensionAttribute), None) is not None
        self._special_tokens = special_tokens
        self._turnwise = turnwise(environment, code)
        self._fixed_prompt: str | None = None  # for an answer, where no row changes it

    def render(
        self,
        messages: list[Message],
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the conversation as text. template_kwargs: what the row hands to the template by name."""
        self._generation.marked.clear()
        return self._template.render(self._names_given(messages, add_generation_prompt, tools, template_kwargs or {}))

    def by_turns(
        self,
        messages: list[Message],
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None,
        template_kwargs: Mapping[str, Any],
    ) -> ByTurns | None:
        """Return what `render` does, and where each message is in it; None where that is not sure, or it fails."""
        if self._turnwise is None:
            return None
        self._generation.marked.clear()
        try:
            found = self._turnwise.write(self._names_given(messages, add_generation_prompt, tools, template_kwargs))
        except FAILURES:
            return None  # `render` tells how
        if found is None:
            self._turnwise = None  # nor will it be of the next conversations
        return found

    def prompt_after(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, template_kwargs: Mapping[str, Any]
    ) -> str | None:
        """Return the prompt for the answer to these messages, which is the same behind any of them by turns.

        None where that is not sure."""
        is_fixed = self._turnwise is not None and self._turnwise.ending_reads.isdisjoint(("tools", *template_kwargs))
        if is_fixed and self._fixed_prompt is not None:
            return self._fixed_prompt
        found = self.by_turns(messages, True, tools, template_kwargs)
        if found is not None and is_fixed:
            self._fixed_prompt = found.ending
        return found and found.ending

    def _names_given(
        self,
        messages: list[Message],
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None,
        template_kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        given: dict[str, Any] = {"documents": None, **self._special_tokens, **template_kwargs}
        given |= {"messages": [_with_reasoning(message) for message in messages], "tools": tools}
        given |= {"add_generation_prompt": add_generation_prompt}
        return given

    @property
    def marked(self) -> list[str]:
        """The texts that `{% generation %}` marked in the last render, in order."""
        return self._generation.marked


def _with_reasoning(message: Message) -> Message:
    """Reasoning under all the names that templates read it by, as transformers does."""
    if len(message) > 2:
        names = ("reasoning_content", "thinking", "reasoning")
        reasoning = next((message[name] for name in names if message.get(name) is not None), None)
        if reasoning is not None:
            return {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def find_template(config: dict[str, Any], files: Mapping[str, str]) -> str | None:
    """The model's template: that of its template files by name, else that of tokenizer_config.json.

    Of several it is `default`, and `tool_use` where tools are offered, as in transformers; others, such as `rag`, are
    only for who asks for them by name."""
    named = dict(files)
    found = config.get("chat_template")
    if not files and isinstance(found, list):
        listed = [cast(dict[str, Any], each) for each in cast(list[Any], found) if isinstance(each, dict)]
        texts = ((each.get("name"), each.get("template")) for each in listed)
        named = {name: text for name, text in texts if isinstance(name, str) and isinstance(text, str)}
    elif not files and isinstance(found, str):
        named = {"default": found}
    default, with_tools = named.get("default"), named.get("tool_use")
    if default and with_tools:
        return _by_tools(with_tools, default)
    return default or None


def _by_tools(with_tools: str, without: str) -> str:
    """Return one template that writes what the first does where tools are offered, else what the second does.

    So it is one file of the adapter too. The signs keep what jinja2 would strip around its own lines."""
    return f"{{% if tools +%}}{_part(with_tools)}{{%+ else +%}}{_part(without)}{{%+ endif %}}"


def _part(template: str) -> str:
    """Return a template as it is to stand inside another: without what jinja2 strips where one begins and ends."""
    return _NEWLINE_AT_END.sub("", _SPACE_AT_BEGIN.sub("", template))
