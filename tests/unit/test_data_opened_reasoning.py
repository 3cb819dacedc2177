"""Raw output of a model does not repeat the opening of its reasoning, which the prompt has written."""

import pytest

from finetune_trainer.data.opened_reasoning import with_openings
from finetune_trainer.data.renders import Chat
from finetune_trainer.data.sequences import Note
from finetune_trainer.data.template import ChatTemplate
from template_table import NOW, SHAPES, Shape, answer, trl_templates, user, verdict, written

TEMPLATES = trl_templates()
RAW = "Count: one.\n</think>\n\nIt is one."


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "qwen3_5_think"])
def test_raw_output_is_learned_as_if_its_reasoning_were_opened(name: str) -> None:
    question = user("What is one?")
    turns = [question, answer(RAW), question, answer(RAW)]
    opened = [question, answer(f"<think>\n{RAW}"), question, answer(f"<think>\n{RAW}")]
    sequences, notes = written(name, TEMPLATES[name], Shape(turns))
    expected, notes_of_opened = written(name, TEMPLATES[name], Shape(opened))
    assert sequences == expected is not None
    assert set(notes) == {*notes_of_opened, Note.OPENING_ADDED}
    assert verdict(name, TEMPLATES[name], Shape(opened))[1] == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("deepseek_r1_distill", "The tag </think> closes a block."),  # words about it
        ("deepseek_r1_distill", f"<think>\n{RAW}"),
        ("qwen2_5", RAW),  # whose prompt opens nothing
        ("qwen3", RAW),  # whose template reads it as reasoning itself
    ],
)
def test_what_the_prompt_does_not_open_or_what_is_no_end_of_reasoning_stays_as_it_is(name: str, content: str) -> None:
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"}, NOW)
    chat = Chat([user("q"), answer(content)], [False, True])
    assert with_openings(template, chat) is chat


def test_no_template_is_asked_where_no_answer_has_the_end_of_reasoning(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(TEMPLATES["deepseek_r1_distill"], {"bos_token": "<s>", "eos_token": "</s>"}, NOW)
    monkeypatch.setattr(template, "render", None)
    turns = SHAPES["three turns"]
    chat = Chat(turns.messages, turns.learned)
    assert with_openings(template, chat) is chat
