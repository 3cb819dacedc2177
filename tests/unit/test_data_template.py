"""Answers are found by the template's structure, and the template can do no harm."""

from datetime import UTC, datetime
from importlib.metadata import files
from typing import Any

import jinja2
import pytest

from data_run import CHATML, ENDS, every_answer, one_sequence
from finetune_trainer.data import child as children
from finetune_trainer.data import renderer
from finetune_trainer.data.problems import Broken, Problem
from finetune_trainer.data.renderer import Rendered, Renderer, TemplateInvalidError
from finetune_trainer.data.renders import Chat
from finetune_trainer.data.rows import Conversation
from finetune_trainer.data.sequences import RenderedSequence
from finetune_trainer.data.stops import Ends
from finetune_trainer.data.template import (
    ChatTemplate,
    find_template,
    plain_template,
)
from finetune_trainer.data.template_words import refusal_words

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def messages(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def spans_of(sequence: RenderedSequence) -> list[str]:
    return [sequence.text[begin:end] for begin, end in sequence.spans]


def taught(source: str, texts: tuple[str, ...], learn_from: int = 0) -> list[str]:
    """Return the answers of a conversation that one sequence carries."""
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, NOW)
    found = one_sequence(template, messages(*texts), every_answer(messages(*texts), learn_from))
    assert found.text == template.render(messages(*texts))
    return spans_of(found)


def test_an_answer_is_what_the_template_adds_to_the_generation_prompt_through_the_stop_token() -> None:
    assert taught(CHATML, ("q", "a", "r", "b")) == ["a<|im_end|>", "b<|im_end|>"]


def test_only_answers_of_the_completion_are_learned() -> None:
    assert taught(CHATML, ("q", "a", "r", "b"), learn_from=2) == ["b<|im_end|>"]


def test_an_answer_between_others_may_be_context_only() -> None:
    template, turns = ChatTemplate(CHATML, {}, NOW), messages("q", "a", "r", "b", "s", "c")
    found = one_sequence(template, turns, (False, True, False, False, False, True))
    assert spans_of(found) == ["a<|im_end|>", "c<|im_end|>"]


def test_tools_and_what_the_row_hands_to_the_template_reach_it() -> None:
    source = "{{ tools[0].function.name }} {{ mood }} {{ eos_token }}" + CHATML
    child = Renderer(source, {"eos_token": "</s>"}, NOW, ends=ENDS, learn_all=False, accepted=["Tools"])
    tools: list[dict[str, Any]] = [{"type": "function", "function": {"name": "weather"}}]
    try:
        (found,) = child.render([Conversation(messages("q", "a"), (False, True), tools, {"mood": "calm"})])
    finally:
        child.close()
    assert isinstance(found, Rendered)
    assert found.sequences[0].text.startswith("weather calm </s><|im_start|>user")


def test_with_all_tokens_to_learn_there_is_one_span_from_the_first_answer() -> None:
    turns = messages("q", "a", "r", "b")
    found = one_sequence(ChatTemplate(CHATML, {}, NOW), turns, every_answer(turns), learn_all=True)
    assert spans_of(found) == ["a<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"]


def test_an_answer_that_repeats_the_question_is_still_found_by_its_place() -> None:
    assert taught(CHATML, ("same", "same")) == ["same<|im_end|>"]


def test_where_an_answer_begins_is_unknown_after_an_opened_block_and_where_it_ends_is_not() -> None:
    source = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
    )
    turns = messages("q", "a", "r", "b")
    found = one_sequence(ChatTemplate(source, {}, NOW), turns, every_answer(turns), learn_all=True)
    assert found.spans == [(None, len(found.text))]


@pytest.mark.parametrize("with_bos", [True, False])
def test_the_plain_template_is_readable_and_ends_answers_with_the_end_token(with_bos: bool) -> None:
    template = ChatTemplate(plain_template(with_bos), {"bos_token": "<s>", "eos_token": "</s>"}, NOW)
    text = template.render(messages("hello", "hi", "bye", "bye"))
    begin = "<s>" if with_bos else ""
    assert text == begin + "### User:\nhello\n\n### Assistant:\nhi</s>\n\n### User:\nbye\n\n### Assistant:\nbye</s>\n\n"
    assert taught(plain_template(with_bos), ("hello", "hi", "bye", "bye")) == ["hi</s>", "bye</s>"]


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        ({}, {}, None),
        ({"chat_template": "a"}, {}, "a"),
        ({"chat_template": "a"}, {"default": "b"}, "b"),
        ({"chat_template": "a"}, {"tool_use": "b"}, None),
        ({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}, {}, "d"),
        ({"chat_template": [{"name": "default", "template": each} for each in "de"]}, {}, "e"),
        ({"chat_template": [{"name": "tool_use", "template": 7}, {"name": "default", "template": "d"}]}, {}, "d"),
        ({"chat_template": [{"name": ["tool_use"]}, {"name": "default", "template": "d"}, 7]}, {}, "d"),
        ({"chat_template": [{"name": "tool_use", "template": "t"}]}, {}, None),
        ({"chat_template": 7}, {}, None),
    ],
)
def test_the_template_is_found_where_transformers_finds_it(
    config: dict[str, Any], files: dict[str, str], expected: str | None
) -> None:
    assert find_template(config, files) == expected


@pytest.mark.parametrize("with_tools", [CHATML, "{% macro f(x) -%}<{{ x }}>{%- endmacro %}{{ f(tools[0]) }}"])
@pytest.mark.parametrize("begin", ["", "\n", "  ", "\t \n", "  {% if true %}a{% endif %}", "{#- c #}\n", "{{- 'b' }}"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n", "  \n", "{% if true %}\n{% endif %}\n\n", "\n{{ 'e' -}}\n", "\r\n"])
def test_of_templates_by_name_tool_use_is_for_rows_with_tools_and_default_for_others(
    with_tools: str, begin: str, end: str
) -> None:
    named = {"tool_use": begin + with_tools + end, "rag": "r", "default": begin + CHATML + "|" + end}
    config = {"chat_template": [{"name": name, "template": each} for name, each in named.items()]}
    both = find_template(config, {})
    assert both is not None
    for tools, name in (([{"f": 1}], "tool_use"), (None, "default"), ([], "default")):
        of_one = ChatTemplate(named[name], {}, NOW).render(messages("q", "a"), True, tools)
        assert ChatTemplate(both, {}, NOW).render(messages("q", "a"), True, tools) == of_one


def test_a_template_may_say_its_own_words_but_never_the_rows() -> None:
    template, chat = (
        ChatTemplate("{{ raise_exception('Only user and assistant') }}", {}, NOW),
        Chat(messages("q", "a"), (False, True)),
    )
    for said, told in (("Only user and assistant", "Only user and assistant"), ("secret of the row", "TemplateError")):
        assert refusal_words(jinja2.TemplateError(said), template, chat) == told


@pytest.mark.parametrize(
    "source",
    [
        "{# my secret plan #}{{ raise_exception(messages[0].content) }}",
        "my secret plan{{ raise_exception(messages[0].content) }}",
        "{% if messages[0].content == 'my secret plan, whole' %}{% endif %}{{ raise_exception(messages[0].content) }}",
        "{% set my_secret_plan = 1 %}{{ raise_exception(messages[0].content | replace(' ', '_')) }}",
    ],
)
def test_words_of_a_row_that_stand_somewhere_in_the_template_are_still_the_rows(source: str) -> None:
    assert rendered(source, ("my secret plan", "a")) == [Broken(Problem.TEMPLATE_FAILED, detail="TemplateError")]


def test_a_template_that_takes_longer_than_all_templates_do_is_refused_after_a_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(renderer, "BASE_CPU_S", 0.5)
    slow = "{% for i in range(9999) %}{% for j in range(20) %}{% endfor %}{% endfor %}" + CHATML
    with pytest.raises(TemplateInvalidError, match=r"s of CPU for \d+ rows, .* s for each") as caught:
        rendered(slow, *[("a", "b")] * 500)
    assert caught.value.row is None, "no row is to blame"


def test_long_conversations_may_take_the_time_that_all_their_beginnings_take() -> None:
    spent, turns = renderer.Spent(), [{"role": "user", "content": ""}] * 512
    spent.add(Conversation(turns, every_answer(turns)), 20_000, Rendered([]))
    spent.cpu_s = renderer.BASE_CPU_S + 250
    assert spent.too_much is None
    spent.cpu_s += 50
    assert spent.too_much is not None


@pytest.mark.parametrize("name", ["gemma4_v5", "llama3_2"])
def test_the_slowest_published_templates_take_less_than_what_long_conversations_are_allowed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renderer, "BASE_CPU_S", 0)
    (source,) = (each.read_text() for each in files("trl") or [] if each.name == f"{name}.jinja")
    (found,) = rendered(source, ("Tell me a little more, please.",) * 40, row_cpu_s=60)
    assert isinstance(found, Rendered)
    assert len(found.sequences[0].spans) == 20


def rendered(source: str, *conversations: tuple[str, ...], row_cpu_s: float = 5) -> list[Rendered | Broken]:
    ends = Ends((*ENDS.stops, "<turn|>", "<|eot_id|>"))
    child = Renderer(source, {"eos_token": "</s>"}, NOW, ends=ends, learn_all=False, row_cpu_s=row_cpu_s)
    rows = [Conversation(messages(*texts), every_answer(messages(*texts))) for texts in conversations]
    results: list[Rendered | Broken] = []
    try:
        while len(results) < len(rows):
            results += child.render(rows[len(results) :])
    finally:
        child.close()
    return results


def test_texts_that_are_much_come_a_few_at_a_time() -> None:
    child = Renderer("{{ 'x' * 1500000 }}" + CHATML, {}, NOW, ends=ENDS, learn_all=True)
    rows = [Conversation(messages("a", "b"), (False, True))] * 9
    try:
        counts = [len(child.render(rows)) for _ in range(3)]
    finally:
        child.close()
    assert counts == [2, 2, 2]


def test_the_child_process_renders_as_the_template_does() -> None:
    (found,) = rendered(CHATML, ("ü", "日本"))
    whole = "<|im_start|>user\nü<|im_end|>\n<|im_start|>assistant\n日本<|im_end|>\n"
    assert found == Rendered([RenderedSequence(whole, [(len(whole) - 13, len(whole) - 1)])])


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("{{ raise_exception('no such thing') }}", "no such thing"),
        ("{{ raise_exception(messages[0].content) }}", "TemplateError"),
        ("{{ messages.append(1) }}", "it does what transformers' sandbox refuses too (SecurityError)"),
        ("{{ messages.__class__.x }}", "it does what transformers' sandbox refuses too (SecurityError)"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[9].role.x }}", "UndefinedError"),
        ("{{ 'x' * 40000000 }}" + CHATML, "it makes more than 10 Mi characters of the row"),
        ("{{ 'x' * 4000000000 }}", "MemoryError"),
        ("{{ '\\ud800' }}" + CHATML, "UnicodeEncodeError"),
    ],
)
def test_a_template_that_fails_on_a_row_says_why_without_the_row(source: str, detail: str) -> None:
    assert rendered(source, ("secret", "a")) == [Broken(Problem.TEMPLATE_FAILED, detail=detail)]


def test_a_template_that_loops_is_stopped_and_the_row_is_found() -> None:
    source = (
        "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
        "{% endfor %}{% endif %}" + CHATML
    )
    good, bad, last = rendered(source, ("a", "b"), ("loop", "b"), ("c", "d"), row_cpu_s=0.3)
    assert isinstance(good, Rendered)
    assert isinstance(last, Rendered)
    assert bad == Broken(Problem.TEMPLATE_FAILED, detail="it took more than 0.3 s of CPU or 512 MiB")


def test_a_template_that_loops_inside_a_c_function_is_stopped_too() -> None:
    source = "{% if messages[0].content == 'loop' %}{{ 7 ** (9 ** (messages | length + 7)) }}{% endif %}"
    (found,) = rendered(source, ("loop", "b"), row_cpu_s=0.3)
    assert isinstance(found, Broken)


def test_a_template_that_kills_the_child_again_and_again_ends_the_job() -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    source = "{% if messages[0].content == 'loop' %}" + loop + "{% endif %}"
    with pytest.raises(TemplateInvalidError, match="5 rows before it"):
        rendered(source, *[("loop", "b")] * 7, row_cpu_s=0.1)
    with pytest.raises(TemplateInvalidError, match="it took more than") as caught:
        rendered(loop, ("a", "b"), row_cpu_s=0.1)
    assert caught.value.row is None, "no row is to blame: it loops on any conversation"


@pytest.mark.parametrize("answers", [0, 1])
def test_a_child_that_somebody_kills_ends_the_attempt_and_blames_neither_row_nor_template(
    answers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = children.exchange
    asked: list[children.Process] = []

    def killed(process: children.Process, *frames: bytes, max_bytes: int) -> list[bytes] | None:
        asked.append(process)
        if len(asked) > answers:
            process.kill()  # as the kernel does where a pod's memory is full
            process.wait()
        return exchange(process, *frames, max_bytes=max_bytes)

    monkeypatch.setattr(children, "exchange", killed)
    with pytest.raises(MemoryError, match="render_worker was killed"):
        rendered(CHATML, ("a", "b"), ("c", "d"))
    assert all(each.returncode is not None for each in asked)


def test_a_template_that_does_not_compile_is_refused() -> None:
    with pytest.raises(TemplateInvalidError, match="TemplateSyntaxError"):
        rendered("{% for %}", ("a", "b"))


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "secret"}}}
CALLING: list[dict[str, Any]] = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "a"},
]


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        (
            "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}",
            "UndefinedError: it reads content, which messages[1] has not; it never reads tool_calls or tools: put a "
            "template that does beside the model",
        ),
        (
            "{% for m in messages %}{{ m.content | length / 0 }}{{ m.tool_calls }}{{ tools }}{% endfor %}",
            "ZeroDivisionError",
        ),
        (
            "{% for m in messages %}{{ m.tool_calls }}{{ tools }}{{ documents_of_mine.x }}{% endfor %}",
            "UndefinedError: it reads documents_of_mine, which is not given",
        ),
        (
            "{{ tools }}{% for m in messages %}{% if m.tool_calls %}{{ m[m.tool_calls[0].function.arguments.town].x }}"
            "{% endif %}{% endfor %}",
            "UndefinedError",
        ),
        (
            "{{ tools }}{% for m in messages %}{% if m.tool_calls %}"
            "{{ raise_exception('no calls') if m.content is defined else m.content.x }}{% endif %}{% endfor %}",
            "no calls",
        ),
    ],
)
def test_of_a_row_that_a_template_does_not_take_it_is_told_what_the_template_lacks(source: str, detail: str) -> None:
    child = Renderer(source, {"eos_token": "</s>"}, NOW, ends=ENDS, learn_all=False)
    row = Conversation(CALLING, every_answer(CALLING), tools=[CALL])
    try:
        assert child.render([row]) == [Broken(Problem.TEMPLATE_FAILED, detail=detail)]
    finally:
        child.close()
