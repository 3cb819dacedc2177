"""By a template that writes one message after another, beginnings are cut out of one text, and are what it writes."""

from collections import Counter
from datetime import UTC, datetime
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_run import CHATML, ENDS, every_answer
from finetune_trainer.data.answers import learnable
from finetune_trainer.data.containment import Dress
from finetune_trainer.data.renders import Chat, Renders
from finetune_trainer.data.template import FAILURES, ChatTemplate, Message
from template_table import SHAPES, trl_templates

NOW = datetime(2026, 1, 2, tzinfo=UTC)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = trl_templates()
TAKEN = ["cohere", "gemma", "llama3", "phi3", "qwen2_5", "qwen3_instruct_2507"]
TURNS = [{"role": role, "content": f"{role} {turn}"} for turn in range(3) for role in ("user", "assistant")]
WITH_SYSTEM = [{"role": "system", "content": "short"}, *TURNS]


def outcome(template: ChatTemplate, chat: Chat, count: int, prompt: bool) -> str | type[Exception]:
    """Return what the template writes of the first messages, or how it fails."""
    try:
        return template.render(chat.messages[:count], prompt, chat.tools, chat.variables)
    except FAILURES as error:
        return type(error)


def cut_out(renders: Renders, count: int, prompt: bool) -> str | type[Exception]:
    variables = renders.chat.variables
    try:
        return renders.context(count, variables) if prompt else renders.finished(count - 1, variables)
    except FAILURES as error:
        return type(error)


def require_equal(template: ChatTemplate, chat: Chat) -> None:
    """Each part is what the template writes for it."""
    renders = Renders(template, chat)
    for count, prompt in product(range(1, len(chat.messages) + 1), (True, False)):
        assert cut_out(renders, count, prompt) == outcome(template, chat, count, prompt), (count, prompt)


def is_taken(source: str, chat: Chat) -> bool:
    template = ChatTemplate(source, SPECIAL, NOW)
    return template.by_turns(chat.messages, False, chat.tools, chat.variables) is not None


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_part_of_a_conversation_is_what_a_published_template_writes_for_it(name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], SPECIAL, NOW)
    for shape, dress in product(SHAPES.values(), (Dress(), Dress(parts=True))):
        variables = {"enable_thinking": False} if dress.parts else {}
        require_equal(template, dress.on(Chat(shape.messages, shape.learned, shape.tools, variables)))


@pytest.mark.parametrize("name", TAKEN)
def test_published_templates_of_one_loop_are_taken_for_such(name: str) -> None:
    assert is_taken(TEMPLATES[name], Chat(TURNS, every_answer(TURNS)))


LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content }}TURN{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize(
    "source",
    [
        LOOP.replace("TURN", "{{ loop.length }}") + PROMPT,
        LOOP.replace("TURN", "{{ loop.revindex }}") + PROMPT,
        LOOP.replace("TURN", "{{ loop['last'] }}") + PROMPT,
        LOOP.replace("TURN", "{{ messages | length }}") + PROMPT,
        LOOP.replace("TURN", "{{ messages[-1].role }}") + PROMPT,
        LOOP.replace("TURN", "{% if add_generation_prompt and loop.last %}<assistant>{% endif %}"),
        LOOP.replace("TURN", "{% for p in [] %}{% else %}{{ loop.revindex }}{% endfor %}") + PROMPT,
        LOOP.replace("TURN", "{% if m.role == 'x' %}{% break %}{% endif %}") + PROMPT,
        LOOP.replace("TURN", "{{ _asks_back_ }}") + PROMPT,
        "{% set n = messages | length %}" + LOOP + PROMPT,
        "{% set ns = namespace(all=messages) %}" + LOOP + PROMPT,
        "{% for m in messages %}{% if m.role == 'user' %}u{% endif %}{% endfor %}" + LOOP + PROMPT,
        "{% macro f() %}{{ messages[-1].role }}{% endmacro %}" + LOOP + PROMPT,
        "{% macro f() %}{{ said[-1].role }}{% endmacro %}{% set said = messages[1:] %}" + LOOP + PROMPT,
        "{% set ns = namespace(x='') %}" + LOOP.replace("TURN", "{% set ns.x = m.role %}") + PROMPT + "{{ ns.x }}",
        LOOP + "{% if add_generation_prompt and messages[0].role != 'assistant' %}<assistant>{% endif %}",
        "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}" + PROMPT,
        "{% for m in messages recursive %}{{ m.content }}{% endfor %}" + PROMPT,
        "{% for m in messages %}{{ m.content }}{% else %}none{% endfor %}" + PROMPT,
        "{% if tools %}" + LOOP + "{% else %}" + LOOP + "{% endif %}" + PROMPT,
    ],
)
def test_a_template_that_may_look_at_all_messages_is_not_taken(source: str) -> None:
    chat = Chat(TURNS, every_answer(TURNS))
    assert not is_taken(source, chat)
    require_equal(ChatTemplate(source, SPECIAL, NOW), chat)


@pytest.mark.parametrize(
    "turn",
    [
        "{% if loop.last %}|{% endif %}",
        "{{ loop.nextitem.role if loop.nextitem }}",
        "{{ (messages[loop.index0 + 1] or m).role }}",
        "{% if loop.first or messages[loop.index0 - 1].role == 'user' %}|{% endif %}",
        "{{ (loop.previtem or m).role }}{{ messages[0].content }}",
        "{% if m.role == 'user' %}{% continue %}{% endif %}{{ loop.last }}",
    ],
)
@pytest.mark.parametrize(
    "begin", ["", "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}"]
)
def test_what_a_template_asks_about_the_next_message_is_no_part_of_a_beginning_that_is_cut_out(
    begin: str, turn: str
) -> None:
    source = begin + LOOP.replace("TURN", turn) + PROMPT
    for messages in (TURNS, WITH_SYSTEM):
        chat = Chat(messages, every_answer(messages))
        assert is_taken(source, chat)
        require_equal(ChatTemplate(source, SPECIAL, NOW), chat)


def test_a_message_before_the_first_counts_as_one_behind_all_and_the_template_is_given_up() -> None:
    source = LOOP.replace("TURN", "{{ messages[loop.index0 - 1].role }}") + PROMPT
    assert not is_taken(source, Chat(TURNS, every_answer(TURNS)))


class Counted(dict[str, Any]):
    """A message that counts how often its content is read."""

    def __init__(self, message: Message, reads: Counter[str]) -> None:
        super().__init__(message)
        self._reads = reads

    def __getitem__(self, name: str) -> Any:
        self._reads[name] += 1
        return super().__getitem__(name)


def test_a_conversation_is_written_once_however_many_answers_it_has() -> None:
    template, learned = ChatTemplate(CHATML, SPECIAL, NOW), every_answer(TURNS)
    learnable(template, Chat(TURNS, learned), ENDS)  # by which the prompt is known
    reads: Counter[str] = Counter()
    found = learnable(template, Chat([Counted(each, reads) for each in TURNS], learned), ENDS)
    assert [found.texts[0][place.begin : place.end] for place in found.places] == [
        f"assistant {turn}<|im_end|>" for turn in range(3)
    ]
    assert reads["content"] == len(TURNS)


BEFORE = st.sampled_from(
    [
        "{% set said = messages %}",
        "{% set said = messages[1:] %}",
        "{% set said = messages[1:] if messages[0].role == 'system' else messages %}",
        "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}",
        "{% if tools %}{% set said = messages[1:] %}{% else %}{% set said = messages %}{% endif %}",
        "{% set ns = namespace(x='', n=0) %}",
        "{{ messages[1].content }}",
        "{% set n = messages | length %}",
        "{% macro f(m) %}{{ m.role }}{{ messages[0].content }}{% endmacro %}",
        "{% macro g(m) %}{{ m.role }}{% for x in m.content %}{{ loop.last }}{% endfor %}{% endmacro %}",
        "{% for t in tools %}{{ t }}{{ loop.last }}{% endfor %}",
        "{{ mood }}",
        "begin",
    ]
)
TURN = st.sampled_from(
    [
        "{{ m.content }}",
        "{% if loop.first %}F{% endif %}",
        "{% if loop.last %}L{% endif %}",
        "{{ loop.index }}{{ loop.previtem.role }}",
        "{{ loop.nextitem.role }}",
        "{{ loop.length }}",
        "{{ messages[loop.index0 - 1].role }}",
        "{{ said[loop.index0 - 1].role }}",
        "{{ said[loop.index0 - 2].role if loop.index0 > 1 }}",
        "{{ messages[loop.index0 + 1].role }}",
        "{{ said[loop.index0 + 1].role }}",
        "{{ messages[loop.index0].role }}",
        "{{ messages[0].role }}",
        "{{ said[1].role }}",
        "{{ messages[-1].role }}",
        "{% set ns.x = m.content %}{% set ns.n = ns.n + 1 %}",
        "{{ ns.x }}{{ ns.n }}",
        "{% for p in m.content %}{{ loop.last }}{{ p }}{% endfor %}",
        "{% for p in [] %}{% else %}{{ loop.last }}{% endfor %}",
        "{% for p in [1] %}{{ messages[loop.index0 + 1].role }}{% endfor %}",
        "{% if m.role == 'assistant' %}{% continue %}{% endif %}",
        "{% if loop.index0 == 2 %}{% break %}{% endif %}",
        "{% generation %}{{ m.content }}{{ loop.last }}{% endgeneration %}",
        "{% set text %}{{ m.content }}{% if loop.last %}!{% endif %}{% endset %}{{ text }}",
        "{% filter upper %}{{ loop.nextitem.content }}{% endfilter %}",
        "{{ f(m) }}{{ g(m) }}",
        "{{ m.content if not loop.last else 'last' }}",
        "{% if add_generation_prompt %}P{% endif %}",
        "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}",
    ]
)
AFTER = st.sampled_from(
    [
        PROMPT,
        "{{ eos_token }}",
        "{{ ns.x }}",
        "{{ mood }}{{ tools }}",
        "{{ messages[-1].role }}",
        "{{ messages[0].role }}",
        "{{ said | length }}",
        "{{ m.role }}{{ text }}",
        "{% for x in [1, 2] %}{{ loop.last }}{% endfor %}",
        "{% set p = mood %}{{ p }}",
        "{{ f(tools) }}",
    ]
)


@settings(max_examples=200, deadline=None)
@given(
    before=st.lists(BEFORE, max_size=3),
    over=st.sampled_from(["messages", "said", "messages[1:]"]),
    turn=st.lists(TURN, min_size=1, max_size=4),
    after=st.lists(AFTER, max_size=3),
)
def test_every_part_is_what_any_template_writes_for_it(
    before: list[str], over: str, turn: list[str], after: list[str]
) -> None:
    source = f"{''.join(before)}{{% for m in {over} %}}{''.join(turn)}{{% endfor %}}{''.join(after)}"
    template = ChatTemplate(source, SPECIAL, NOW)
    for messages in (TURNS, WITH_SYSTEM, [{"role": "user", "content": "q"}, {"role": "tool", "content": "r"}, *TURNS]):
        for tools, variables in ((None, {}), ([{"name": "f"}], {"mood": "calm"})):
            require_equal(template, Chat(messages, every_answer(messages), tools, variables))


def test_names_that_marks_have_are_not_taken_from_a_template() -> None:
    template = ChatTemplate("{{ _turn_begins_ is defined }}" + CHATML, SPECIAL, NOW)
    assert template.by_turns(TURNS, False, None, {}) is None
    assert template.render(TURNS).startswith("False")
