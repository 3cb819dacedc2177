"""Names, words and values of others reach people as letters: they steer no terminal and form no part of a page."""

import io
import logging
import re
import string
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console

from finetune_api.errors import StageError
from finetune_api.names import Stage
from finetune_api.printable import printable, printable_lines
from finetune_api.quality import Quality
from finetune_api.reasons import FAULTS, Fault, words
from finetune_api.run import MAX_RESULT_BYTES, Progress, RunResult, Trouble
from finetune_api.status import DataStatus, PlanStatus, ResolvedValue
from finetune_cli import show
from finetune_cli.describe import describe
from finetune_cli.screen import cleaned
from finetune_operator.logs import LineFormatter
from finetune_trainer import logs, results
from finetune_trainer.card import Evaluations, Learned, Lineage, model_card
from status_samples import DATA, DIGEST, PLAN
from tiny_run import make_run

ROOT = Path(__file__).parents[2]
CLIPBOARD = "\x1b]52;c;cm0gLXJmIH4=\x07"
HOSTILE = {
    "the clipboard": CLIPBOARD,
    "a clear screen": "\x1b[2J\x1b[1;1H",
    "one control character": "\x9b2J",
    "a carriage return": "safe\rforged",
    "lines": "a\nFailed  forged\u2028forged\x85forged\v\f\x1c",
    "other directions": "\u202egpj.exe\u2066",
    "NUL and DEL": "\x00\x7f\x08",
    "half a character": "\ud800",
    "tags": "\U000e0041",
}
# What Markdown and HTML would make of a name.
PAGE = [
    "\n# Verified by the makers\n",
    "</td><img src=x onerror=alert(1)><script>",
    "[here](https://evil.example)",
    "![](https://evil.example/pixel.png)",
    "` `` ``` code `",
    "a | b \\| c \\\\| d",
    "**bold** _it_ ~~gone~~ <!-- ",
    "https://evil.example www.evil.example",
    "&lt;b&gt; \\",
    '"\n---\nlicense: mit\n',
]
ALL = [*HOSTILE.values(), *PAGE]
_STYLE = re.compile(r"\x1b\[[0-9;]*m")  # rich's own colours


def _shows_letters_alone(text: str) -> bool:
    return all(letter.isprintable() or letter in "\n\u200c\u200d\u200e\u200f" for letter in text)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_printable_text_is_one_line_of_letters(text: str) -> None:
    assert "\n" not in printable(text)
    assert _shows_letters_alone(printable(text))
    assert _shows_letters_alone(printable_lines(text))


def test_letters_of_all_languages_stay_as_they_are() -> None:
    text = "Größe 数据 بیانیهٔ می\u200cخواهم क्\u200dष 👩\u200d👩\u200d👧 \u200f"  # noqa: RUF001
    assert printable(text) == text


@pytest.mark.parametrize("fault", list(Fault))
def test_a_faults_sentence_is_one_printable_line_whatever_its_arguments_are(fault: Fault) -> None:
    places = [name for _, name, _, _ in string.Formatter().parse(FAULTS[fault].text) if name is not None]
    for text in ALL:
        said = str(StageError(fault, **dict.fromkeys(places, text)))
        assert "\n" not in said
        assert _shows_letters_alone(said)


@pytest.mark.parametrize(
    "value",
    [10**5000, -(10**5000), float("nan"), "数" * 300, "\ud800" * 300, CLIPBOARD * 99],
    ids=["large", "small", "nan", "wide", "half characters", "escapes"],
)
def test_no_argument_is_too_long_for_a_fault_or_for_its_result(value: str | int | float) -> None:
    error = StageError(Fault.BROKEN_ROW, file=value, row=value, field=value, problem=value, broken=value, rows=value)
    result = results.failed(Stage.PREPARE, 1, error, None, None)
    message = result.to_message()
    assert len(message) <= MAX_RESULT_BYTES
    again = RunResult.model_validate_json(message)
    assert (again.fault, again.exit_code) == (Fault.BROKEN_ROW, error.exit_code)
    assert _shows_letters_alone(words(again.fault, again.args))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_log_line_is_printable(text: str) -> None:
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "read %s", (text,), None)
    try:
        raise ValueError(text)
    except ValueError as error:
        failed = logging.LogRecord("x", logging.INFO, "x.py", 1, "read", (), (ValueError, error, error.__traceback__))
    for formatter in (
        logs.PlainFormatter(exception_messages=True),
        logs.JsonFormatter({"job": "team/bot"}, exception_messages=True),
    ):
        assert _shows_letters_alone(formatter.format(record))
        assert _shows_letters_alone(formatter.format(failed))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_line_of_the_operators_log_is_printable_whole_and_without_credentials(text: str) -> None:
    said = f"422 Invalid: {text}\n2026-01-01 ERROR x: forged; Authorization: Bearer abcdefgh12345678"
    try:
        raise ValueError(said)
    except ValueError as error:
        trace = (ValueError, error, error.__traceback__)
    formatter = LineFormatter()
    line = formatter.format(logging.LogRecord("x", logging.WARNING, "x.py", 1, "%s", (said,), None))
    head, *rest = formatter.format(logging.LogRecord("x", logging.ERROR, "x.py", 1, "bug", (), trace)).split("\n")
    assert "\n" not in line
    assert all(each.startswith("    ") for each in rest)
    for each in (line, head, *rest):
        assert _shows_letters_alone(each)
        assert "abcdefgh12345678" not in each


def _job(text: str) -> dict[str, Any]:
    """Return a job of the cluster in which every word that the CLI shows is `text`."""
    condition = {"type": "Degraded", "status": "True", "reason": text, "message": text}
    return {
        "metadata": {"name": text, "generation": 1},
        "status": {
            "observedGeneration": 1,
            "phase": text,
            "progress": {"text": text, "eta": text},
            "metrics": {"loss": text},
            "conditions": [condition, {**condition, "type": "QualityConcern"}, {**condition, "type": "Succeeded"}],
            "plan": {**PLAN, "uri": text, "resolved": [{"field": text, "value": text, "reason": text}]},
            "data": {**DATA, "reportUri": text, "reportPageUri": text, "dropped": [{"reason": text, "rows": 1}]},
            "attempts": [{"number": 1, "stage": text, "class": text, "reason": text, "exitCode": 1}],
            "artifacts": [{"type": text, "uri": text, "digest": text}],
        },
    }


def _shown_by_run(console: Console, text: str) -> None:
    trouble = Trouble(fault=Fault.ACCESS_DENIED, args={"action": text, "uri": text}, since=1)
    failed = RunResult(stage=Stage.TRAIN, attempt=1, fault=Fault.BROKEN_ROW, args={"file": text}, exit_code=11)
    plan = PlanStatus.model_validate({**PLAN, "resolved": [{"field": "f", "value": text[:64], "reason": text[:64]}]})
    done = failed.model_copy(update={"artifact": None, "quality": Quality(), "log_uri": text})
    sample = {"prompt": text, "base": text, "tuned": text}
    with show.StageView(console, Stage.TRAIN, 1) as view:
        view.update(Progress(stage=Stage.TRAIN, attempt=1, activity="Training", total_steps=9, trouble=trouble))
    uris = {"reportUri": text, "reportPageUri": text}
    data = DataStatus.model_validate({**DATA, **uris, "dropped": [{"reason": text[:64], "rows": 1}]})
    show.show_prepared(console, data, plan)
    show.show_changed_data(console, [text, text])
    show.show_gone(console, text)
    show.show_retry(console, failed, 1, 3, 1.0)
    show.show_failure(console, failed, text)
    show.show_success(console, done, [sample], text)


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("is_terminal", [True, False])
def test_nothing_that_the_command_line_shows_steers_the_terminal(text: str, is_terminal: bool) -> None:
    text = text.replace("\ud800", "\ufffd")  # JSON from the cluster holds no half characters
    output = io.StringIO()
    console = cleaned(Console(file=output, force_terminal=is_terminal, width=200, highlight=False))
    describe(_job(text), console)
    _shown_by_run(console, text)
    console.print(text, markup=False)
    said = output.getvalue()
    said = re.sub(r"\x1b\[(\?25[lh]|2K|1A|[0-9]+A)|\r", "", said) if is_terminal else said  # rich's own bars
    assert said
    assert _shows_letters_alone(_STYLE.sub("", said))


def test_every_console_of_the_command_line_is_the_one_that_cleans() -> None:
    sources = [*(ROOT / "cli").rglob("*.py"), *(ROOT / "demo").rglob("*.py")]
    assert [str(path) for path in sources if re.search(r"\bConsole\(", path.read_text())] == [
        str(ROOT / "cli/finetune_cli/screen.py")
    ]


def _outline(card: str) -> list[str]:
    """Return the structure of a page without its words: what is a heading, a table's cell, a link."""

    def names(tokens: list[Token]) -> list[str]:
        found: list[str] = []
        for token in tokens:
            found += [token.type] if token.type not in ("text", "text_special", "softbreak") else []
            found += names(token.children or [])
        return found

    return names(MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card.partition("\n---\n")[2]))


def test_no_name_or_value_of_others_forms_a_part_of_the_model_card(tmp_path: Path) -> None:
    run = make_run(tmp_path)

    def card(text: str) -> str:
        resolved = [ResolvedValue(field="learningRate", value=text[:64], reason=text[:160])]
        model = run.plan.model.model_copy(update={"architecture": text, "uri": text})
        lineage = Lineage(text, DIGEST, DIGEST, {text: DIGEST}, {"peft": "1"}, text)
        learned = Learned(rows=1, distinct_rows=1, tokens=1, label_tokens=1, skipped_steps=0)
        plan = run.plan.model_copy(update={"model": model, "resolved": resolved})
        return model_card(plan, lineage, learned, Evaluations([], [], [], Quality(), "fp32"))

    plain = card("harmless")
    for text in ALL:
        hostile = card(text.replace("\ud800", "\ufffd"))  # a plan is UTF-8
        assert _shows_letters_alone(hostile)
        assert _outline(hostile) == _outline(plain), text
        # Sites make links of addresses without any markup.
        without_code = re.sub(r"```sh\n.*\n```|(`+)[^\n]*?\1", "", hostile.partition("\n---\n")[2])
        assert not re.search(r"https?://|www\.", without_code)
        head = hostile.removeprefix("---\n").partition("\n---\n")[0].splitlines()
        assert [line.partition(":")[0] for line in head] == ["library_name", "base_model", "pipeline_tag", "tags"]
