"""What people read at night is whole and true: no place is left open, and every field that is named exists."""

import ast
import re
import string
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from finetune_api.crd import object_schema
from finetune_api.names import Stage
from finetune_api.reasons import DISK_FIELDS, FAULTS, MEMORY_FIELDS, Fault, words
from finetune_api.row_words import ROW_WORDS, row_words

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for part in ("api", "operator", "trainer", "cli") for path in (ROOT / part).glob("finetune_*/**/*.py")
)
_PATH = re.compile(r"(?<![\w./:-])((?:[a-z][A-Za-z]*(?:\[[^]]*\])?\.)+[a-z][A-Za-z]*)(?![\w(/-])")
_CAMEL = re.compile(r"(?<![\w.])[a-z]+(?:[A-Z][a-z]+)+(?![\w(])")
_DOTTED = r"(?:[A-Za-z]\w*(?:\[[^]]*\])?\.)+[A-Za-z]\w*"
_ADVICE = re.compile(
    rf"\b(?:raise|lower|set|fix|fewer|more|write|see) ({_DOTTED}(?:(?:,| or| and) {_DOTTED})*)", re.IGNORECASE
)
_BARE_ADVICE = re.compile(r"\b(?:raise|lower|set|fix|fewer) ([a-z]+)(?![\w.])", re.IGNORECASE)
_VALUE = re.compile(rf"(?<![\w./:-])({_DOTTED}): ?([A-Za-z]\w*)")
_NOT_OURS = {"oldSelf", "vLLM", "nHuman", "nAssistant"}  # of CEL; a program; a turn after a line break in JSON
_FILES = ("json", "jsonl", "safetensors", "yaml", "py", "md", "parquet", "gz", "jinja", "txt", "model", "bin", "dev")


@cache
def schema() -> dict[str, Any]:
    return object_schema()  # pyright: ignore[reportReturnType]


def places(fault: Fault) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(FAULTS[fault].text) if name is not None}


def properties(path: str, root: dict[str, Any]) -> dict[str, Any] | None:
    """The schema of a field by its dotted path; None when there is no such field."""
    node = root
    for part in path.split("."):
        node = node.get("properties", {}).get(part.partition("[")[0])
        if node is None:
            return None
        node = node.get("items", node) if "[" in part or node.get("type") == "array" else node
    return node


def fields_named(text: str) -> set[str]:
    """Dotted paths in a text that begin with a field of the job, or that the reader is told to change or look at."""
    roots = {"spec", "status", *schema()["properties"]["spec"]["properties"]}
    found = {path for match in _PATH.finditer(text) if re.split(r"[.\[]", path := match[1])[0] in roots}
    found |= {path for match in _ADVICE.finditer(text) for path in re.findall(_DOTTED, match[1])}
    return {path for path in found if path.split(".")[-1] not in _FILES}


def names(node: Any) -> set[str]:
    """Names of all fields below a node of the schema."""
    if not isinstance(node, dict):
        return set()
    own: dict[str, Any] = node.get("properties", {})  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return set(own).union(*map(names, own.values()), names(node.get("items")))  # pyright: ignore[reportUnknownMemberType]


def wrong_in(text: str) -> set[str]:
    """Return what a sentence says of fields that is not so: paths, words and values."""
    wrong = {path for path in fields_named(text) if not exists(path)}
    if " " in text:  # else it may be a name of Kubernetes
        wrong |= set(_CAMEL.findall(text)) - names(schema()) - _NOT_OURS
    spec = schema()["properties"]["spec"]
    nested = names(spec) - set(spec["properties"])
    wrong |= {match[0] for match in _BARE_ADVICE.finditer(text) if match[1].lower() in nested}
    return wrong | {match[0] for match in _VALUE.finditer(text) if match[2] not in values(match[1], match[2])}


def values(path: str, given: str) -> list[str]:
    """Return the values that a field may have; `given`, where it may have any or is none."""
    field = properties(path if path.startswith(("spec.", "status.")) else f"spec.{path}", schema())
    if field is None:
        return [given]
    return ["true", "false"] if field.get("type") == "boolean" else field.get("enum", [given])


def exists(path: str) -> bool:
    whole = path if path.split(".")[0] in ("spec", "status", "metadata") else f"spec.{path}"
    return properties(whole, schema()) is not None


def literals(path: Path) -> Iterator[tuple[int, str]]:
    """All strings of a module but its docstrings."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, documented) and _has_docstring(n)}  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def _has_docstring(node: Any) -> bool:
    return bool(node.body) and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)


def test_every_field_and_value_that_any_text_names_exists() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {found}"
        for path in SOURCES
        for line, text in literals(path)
        for found in wrong_in(text)
    ]
    assert wrong == []


@pytest.mark.parametrize("fault", list(Fault))
def test_every_word_of_a_fault_that_looks_like_a_field_is_one(fault: Fault) -> None:
    for text in (FAULTS[fault].text, *FAULTS[fault].unknown.values()):
        assert wrong_in(f" {text}") == set()
        assert "mend" not in text


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("raise resources.ephemeralStorage (in status.plan.diskBytes)", {"resources.ephemeralStorage"}),
        ("lower hyperparameter.learningRate", {"hyperparameter.learningRate"}),
        ("lower hyperparameters.learningrate", {"hyperparameters.learningrate"}),
        ("fix storage.region or store.endpoint", {"store.endpoint"}),
        ("pods get less; raise limits.memory", {"limits.memory"}),
        ("Raise Resources.memory", {"Resources.memory"}),
        ("too long: set progressDeadline", {"progressDeadline"}),
        ("raise memory, or lower the batch", {"raise memory"}),
        ("leave such rows out by preprocessing.onBadRow: Skip", {"preprocessing.onBadRow: Skip"}),
        ("leave such rows out by preprocessing.onBadRow: Quarantine", set()),
        ("set preprocessing.chatTemplate: plain, storage.pathStyle: true", set()),
        ("set datasets[0].format, see report.json in spec.output.uri, fewer hyperparameters.epochs", set()),
    ],
)
def test_this_test_would_find_what_is_not_so(text: str, wrong: set[str]) -> None:
    assert wrong_in(text) == wrong


@pytest.mark.parametrize("stage", list(Stage))
def test_the_fields_of_a_stage_s_pod_exist(stage: Stage) -> None:
    assert all(exists(fields[stage]) for fields in (MEMORY_FIELDS, DISK_FIELDS))


def _raised(tree: ast.Module) -> Iterator[tuple[int, Fault, set[str], bool]]:
    """(line, fault, arguments, whether there may be more) of every place that makes a fault's sentence."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and node.args and _fault(node.args[0]) is not None):
            continue
        fault = _fault(node.args[0])
        assert fault is not None
        if isinstance(node.func, ast.Name) and node.func.id == "StageError":
            named = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
            yield node.lineno, fault, named, any(keyword.arg is None for keyword in node.keywords)
        elif isinstance(node.func, ast.Name) and node.func.id == "words" and isinstance(node.args[1], ast.Dict):
            yield (
                node.lineno,
                fault,
                {str(key.value) for key in node.args[1].keys if isinstance(key, ast.Constant)},
                False,
            )


def _fault(node: ast.expr) -> Fault | None:
    is_member = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Fault"
    return Fault[node.attr] if is_member else None  # type: ignore[union-attr]


def test_every_place_of_a_sentence_is_filled_wherever_it_is_raised() -> None:
    open_places = [
        f"{path.relative_to(ROOT)}:{line}: {fault} lacks {sorted(lacking)}"
        for path in SOURCES
        for line, fault, named, more in _raised(ast.parse(path.read_text()))
        if (lacking := places(fault) - named - FAULTS[fault].unknown.keys()) and not more
    ]
    assert open_places == []
    unknown = re.compile(r'''(=|:|else) "\?"''')
    assert [path.name for path in SOURCES if unknown.search(path.read_text())] == []


def test_words_for_what_is_not_known_are_of_places_in_the_sentence() -> None:
    assert all(FAULTS[fault].unknown.keys() <= places(fault) for fault in Fault)


def test_codes_of_rows_have_words_for_one_row_and_for_many() -> None:
    assert row_words("missing_field") == "has a field that is missing"
    assert row_words("of_another_release") == "of_another_release"
    assert all(" " in text for text in ROW_WORDS.values())


def test_a_prepared_job_says_where_every_row_went() -> None:
    args = {"rows_in": 803, "rows_used": 751, "rows_held_out": 39, "rows_dropped": 13, "steps": 20}
    assert words(Fault.PREPARED, args) == "803 rows: 751 to train on, 39 held out, 13 dropped; 20 steps"  # type: ignore[arg-type]
