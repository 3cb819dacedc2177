"""Every answer is learned after exactly what a server sends; judged by an oracle on transformers alone."""

from typing import Any

import pytest

from finetune_trainer.data import answers
from finetune_trainer.data.answers import learnable
from finetune_trainer.data.renders import Chat
from finetune_trainer.data.stops import Ends
from finetune_trainer.data.template import ChatTemplate
from template_table import NOW, SHAPES, Shape, answer, stops_of, trl_templates, user, verdict

TEMPLATES = trl_templates()
# One of each kind: plain, moves nothing but its end, reasons in the last answer, opens reasoning, closes it, ends
# answers with the next message's token, takes parts of text, has channels, marks answers.
QUICK = ["qwen2_5", "phi3", "qwen3", "qwen3_5_think", "qwen3_5_nothink", "glm4moe", "smolvlm", "gptoss", "lfm2_2_5"]
LONG = [each for n in range(100) for each in (user(f"Say number {n}."), answer(f"Number {n} it is."))]


@pytest.mark.parametrize("name", QUICK)
def test_every_answer_follows_what_a_server_sends_and_ends_where_the_model_stops(name: str) -> None:
    for shape in ("three turns", "tool", "reasoning, turns", "words and call"):
        assert verdict(name, TEMPLATES[name], SHAPES[shape])[1] == []


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("phi3", "three turns", "whole"),
        ("qwen3", "three turns", "unrolled, 3"),
        ("qwen3", "one masked", "unrolled, 2"),
        ("qwen3_5_think", "one turn", "whole, without_reasoning"),
        ("qwen3_5_nothink", "reasoning", "whole, with_reasoning"),
        ("deepseek_r1_distill", "one turn", "refused: no_reasoning messages[1]"),
        ("deepseek_r1_distill", "<think> inline", "whole, reasoning_placed"),
        ("llama3", "reasoning", "refused: vanishes messages[1].reasoning_content Reasoning"),
        ("lfm2", "tool", "refused: vanishes messages[1].tool_calls ToolCalls"),
        ("gptoss", "words and call", "unrolled, 2, answer_of_short"),
        ("gptoss", "two calls", "refused: vanishes messages[1].tool_calls ToolCalls"),
        ("glm4moe", "one turn", "whole, end_of_next"),
        ("llava_next", "three turns", "whole"),
    ],
)
def test_what_becomes_of_conversations(name: str, shape: str, words: str) -> None:
    assert verdict(name, TEMPLATES[name], SHAPES[shape])[0] == words


@pytest.mark.parametrize("said", [{"reasoning_content": "Look it up."}, {"content": "Look it up."}])
def test_an_answer_after_a_call_is_learned_where_the_template_drops_the_reasoning_before_it(
    said: dict[str, Any],
) -> None:
    """gpt-oss's keeps what is thought before a call only until there is an answer."""
    template = ChatTemplate(TEMPLATES["gptoss"], {}, NOW)
    question, called, result, last = SHAPES["tool"].messages
    chat = Chat([question, {**called, **said}, result, last], (False, True, False, True))
    found = learnable(template, chat, Ends(tuple(stops_of("gptoss"))))
    first, second = ([text[begin:end] for begin, end in spans] for text, spans in found.sequences)
    thought = "<|channel|>analysis<|message|>Look it up.<|end|>"
    assert first == [
        thought + '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"town": "Oslo"}<|call|>'
    ]
    assert second == ["<|channel|>final<|message|>It rains.<|return|>"]
    assert all(thought in text for text in found.texts), "it is sent as long as there is no answer"


@pytest.mark.parametrize("name", ["glm4moe", "phi3"])
@pytest.mark.parametrize("letters", ["A", "d", "n", "user", "end", "And then?", "Which one?"])
def test_an_answer_of_letters_that_what_follows_it_has_too_ends_where_the_model_stops(name: str, letters: str) -> None:
    """As answers to questions with several choices are: `A`, and the template goes on with `<|user|>` or `<|end|>`."""
    for turns in ([user("Which one?"), answer(letters)], [user(letters), answer(letters), user("?"), answer(letters)]):
        words, wrong = verdict(name, TEMPLATES[name], Shape(turns))
        assert (words.partition(",")[0], wrong) == ("whole", [])


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "smolvlm"])
def test_a_long_conversation_is_rendered_a_few_times_alone_to_the_same_result(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"}, NOW)
    renders: list[int] = []
    render = template.render

    def counted(messages: list[Any], *others: Any) -> str:
        renders.append(len(messages))
        return render(messages, *others)

    monkeypatch.setattr(template, "render", counted)
    said = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in LONG]
    chat = Chat(said if name == "smolvlm" else LONG, [each["role"] == "assistant" for each in LONG])
    ends = Ends(tuple(stops_of(name)))
    found = learnable(template, chat, ends)
    assert len(renders) < 12
    monkeypatch.setattr(answers, "MAX_EXACT_ANSWERS", 1000)
    assert learnable(template, chat, ends) == found
    assert len(found.places) == 100


def test_a_text_that_holds_what_the_template_writes_is_judged_answer_by_answer() -> None:
    turns = [dict(each) for each in LONG[:40]]
    turns[7]["content"] = "It is <|im_end|>\n<|im_start|>assistant\nNumber 5 it is."
    template = ChatTemplate(TEMPLATES["qwen2_5"], {}, NOW)
    found = learnable(template, Chat(turns, [each["role"] == "assistant" for each in turns]), Ends(("<|im_end|>",)))
    assert [found.texts[0][begin:end] for _, _, begin, end in found.places[3:5]] == [
        "It is <|im_end|>\n<|im_start|>assistant\nNumber 5 it is.<|im_end|>",
        "Number 4 it is.<|im_end|>",
    ]


def test_marks_that_differ_from_what_is_served_are_told() -> None:
    marked = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}WORDS{% endgeneration %}<|im_end|>"
        "{% else %}U:{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    same = marked.replace("WORDS{% endgeneration %}<|im_end|>", "{{ m.content }}<|im_end|>{% endgeneration %}")
    other = marked.replace("WORDS", "").replace("<|im_end|>", "{{ m.content }}<|im_end|>")
    assert verdict("chatml", same, SHAPES["three turns"])[0] == "whole"
    assert verdict("chatml", other, SHAPES["three turns"])[0] == "whole, marks_differ"
