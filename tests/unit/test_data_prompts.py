"""What a server sends for an answer, and what it is to get back, by what a template's prompt ends in."""

import pytest

from finetune_trainer.data.prompts import AnswerNotFoundError, NoReasoningError, Server
from finetune_trainer.data.renders import Chat, Renders
from finetune_trainer.data.sequences import Note
from finetune_trainer.data.stops import Ends
from finetune_trainer.data.template import ChatTemplate
from template_table import NOW, SHAPES, Shape, answer, call, user, verdict

_TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}<assistant>PROMPT{% endif %}"
_CALLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
    "{% endfor %}<|im_end|>{% endfor %}<assistant>"  # begins the next answer, whether it is asked or not
)


def template(prompt: str, turns: str = _TURNS) -> ChatTemplate:
    return ChatTemplate(turns + _PROMPT.replace("PROMPT", prompt), {}, NOW)


def server(made: ChatTemplate, said: dict[str, object]) -> tuple[Server, Renders]:
    renders = Renders(made, Chat([user("q"), said], [False, True]))
    return Server(renders, Ends(("<|im_end|>",))), renders


@pytest.mark.parametrize("block", ["<think>\n\n</think>\n\n", "<think></think>", "<|channel>thought\n<channel|>"])
def test_an_answer_is_learned_after_the_empty_block_that_only_the_prompt_has(block: str) -> None:
    asked, renders = server(template(block), answer("a"))
    served = asked.served(1, {})
    assert (served.context, served.answer) == (f"<user>q<|im_end|><assistant>{block}", "a<|im_end|>")
    assert renders.notes == {Note.EMPTY_BLOCK_SENT}
    assert verdict("chatml", template(block).source, SHAPES["three turns"]) == ("unrolled, 3, empty_block_sent", [])


@pytest.mark.parametrize(
    ("prompt", "said", "error"),
    [
        ("<think></think>", answer("a", reasoning_content="r"), AnswerNotFoundError),  # its reasoning comes after none
        ("<think></think>", answer("<think>\nr\n</think>\n\na"), AnswerNotFoundError),
        ("<think></think>x", answer("a"), AnswerNotFoundError),  # not what the prompt ends in
        ("<think>", answer("a"), NoReasoningError),
    ],
)
def test_what_does_not_follow_the_prompt_is_refused(prompt: str, said: dict[str, object], error: type) -> None:
    with pytest.raises(error):
        server(template(prompt), said)[0].served(1, {})


def test_a_prompt_is_asked_for_without_reasoning_by_each_variable_that_templates_read() -> None:
    made = template("{% if reasoning is not defined or reasoning %}<think>{% endif %}")
    served = server(made, answer("a"))[0].served(1, {})
    assert (served.variables, served.answer) == ({"reasoning": False}, "a<|im_end|>")


def test_a_call_ends_at_its_stop_token_though_the_template_begins_the_next_message() -> None:
    said = answer("Look.", tool_calls=[call("weather", 1, town="Oslo")])
    made = ChatTemplate(_CALLS, {}, NOW)
    assert server(made, said)[0].served(1, {}).answer.endswith('{"town": "Oslo"}}<|im_end|>')


def test_a_call_that_the_template_does_not_write_has_vanished_and_its_words_end_as_words_do() -> None:
    source = _TURNS + "{% if add_generation_prompt %}<assistant>{% else %}</s>{% endif %}"
    turns = Shape([user("q"), answer("Look.", tool_calls=[call("weather", 1, town="Oslo")])])
    assert verdict("chatml", source, turns)[0] == "refused: vanishes messages[1].tool_calls ToolCalls"


# As Hermes's: the last result ends otherwise than one that an answer follows.
_RESULTS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
    "{% endfor %}{% if m.role == 'tool' and not loop.last %}{{ '\\n' }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("shape", ["tool", "words and call", "two calls"])
def test_an_answer_after_results_that_end_otherwise_without_it_is_learned_after_what_is_sent(shape: str) -> None:
    assert verdict("chatml", _RESULTS, SHAPES[shape]) == ("unrolled, 2, answer_of_short", [])
