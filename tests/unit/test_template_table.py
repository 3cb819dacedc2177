"""What becomes of conversations by published chat templates is what bench/results/templates.md says, and is right."""

import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from template_table import (
    REFUSED,
    SHAPES,
    Shape,
    is_judged,
    refusal_fault,
    transformers_templates,
    trl_templates,
    verdict,
)

PAGE = Path(__file__).parents[2] / "bench" / "results" / "templates.md"
LEAST_TRAINED = 36  # text templates of TRL by which three turns train
TEMPLATES = trl_templates() | transformers_templates()


@cache
def judged(name: str, shape: str) -> tuple[str, list[str]]:
    return verdict(name, TEMPLATES[name], SHAPES[shape])


@cache
def page() -> dict[str, dict[str, str]]:
    """Return what the page says of each template and shape."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    shapes = [each.replace("`", "") for each in rows[0][1:]]
    return {name: dict(zip(shapes, words, strict=True)) for name, *words in rows[2:]}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_conversation_is_learned_as_it_is_served_or_refused_for_a_true_reason(shape: str) -> None:
    found = {name: judged(name, shape) for name in TEMPLATES}
    assert {name: wrong for name, (_, wrong) in found.items() if wrong} == {}
    told = {name: words for name, (words, _) in found.items()}
    assert {name: page()[name][shape] for name in told} == told, "make templates"


def test_at_least_36_text_templates_of_trl_train_three_turns_and_the_page_counts_all() -> None:
    names = [name for name in trl_templates() if not name.endswith("_training")]
    trained = [name for name in names if not judged(name, "three turns")[0].startswith(REFUSED)]
    assert len(trained) >= LEAST_TRAINED
    assert f"{len(trained)} of {len(names)} text templates of TRL train three turns" in PAGE.read_text()
    said = Counter(re.split("[:,]", words)[0] for row in page().values() for words in row.values())
    assert f"{dict(said)}; against the rule, by the oracle: 0" in PAGE.read_text()
    refused = [words.removeprefix(REFUSED) for row in page().values() for words in row.values() if REFUSED in words]
    assert [words for words in refused if not is_judged(words)] == []


@pytest.mark.parametrize(
    ("source", "shape", "reason", "fault"),
    [
        ("chatml", SHAPES["one turn"], "template_failed no", "it can be learned as it would be served"),
        ("gemma", SHAPES["system"], "template_failed another reason", "the template says something else"),
        ("gemma", SHAPES["system"], "vanishes messages[0].content System", "messages[0].content is nowhere"),
        ("llama3", SHAPES["reasoning"], "vanishes messages[1].content", "messages[1].content is nowhere"),
        ("llama3", SHAPES["reasoning"], "no_reasoning messages[1]", "no_reasoning is nowhere what is wrong"),
    ],
)
def test_the_oracle_finds_reasons_that_are_not_true(source: str, shape: Shape, reason: str, fault: str) -> None:
    chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    chatml += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    stops = ["<|im_end|>", "<end_of_turn>", "<|eot_id|>"]
    found = refusal_fault(chatml if source == "chatml" else TEMPLATES[source], shape, stops, reason)
    assert found is not None
    assert found.startswith(fault)
