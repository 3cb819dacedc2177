"""Each default stands once, in `finetune_api.defaults`: the code takes it from there, and so does the field's text."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest

from finetune_api import defaults
from finetune_api.crd import object_schema

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for part in ("api", "operator", "trainer", "cli") for path in (ROOT / part).rglob("*.py"))
API = ROOT / "api/finetune_api"
DEFAULTS_FILE = API / "defaults.py"
FIELDS_FILES = {API / name for name in ("job.py", "pii.py", "text_quality.py", "duplicates.py")}
NAMES = {name for name, value in vars(defaults).items() if name.isupper() and not isinstance(value, TypeVar)}
# A text that would tell these is no help to who writes a job.
NOT_IN_TEXTS = {"LEARNING_RATE_EXPONENTS"}
# Values that are seldom anything else than a default, and where they are.
DISTINCTIVE = {"us-east-1", 0.02, 0.03, 2e-4, 5e-4, 86400}
PICKERS = ("pick", "given")
OTHER_MEANINGS = {
    ("trainer/finetune_trainer/sizing.py", "LoRA"),  # the only peft.type there is
    ("api/finetune_api/job.py", 86400),  # the most that two fields take
    ("operator/finetune_operator/progress_status.py", 86400),  # seconds of a day
    ("trainer/finetune_trainer/export.py", 0.02),  # a tolerance in nats
    ("trainer/finetune_trainer/metrics.py", 0.03),  # a bound of a histogram
    ("trainer/finetune_trainer/data/renderer.py", 0.02),  # seconds of rendering a row
}


def optional_fields(schema: dict[str, Any], place: str = "spec") -> Iterator[tuple[str, str, str]]:
    """Place, type and text of every field that may be absent."""
    for name, child in schema.get("properties", {}).items():
        if name not in schema.get("required", []):
            yield f"{place}.{name}", child.get("type", "scalar"), child["description"]
        yield from optional_fields(child, f"{place}.{name}")
    if "items" in schema:
        yield from optional_fields(schema["items"], f"{place}[]")


FIELDS = list(optional_fields(object_schema()["properties"]["spec"]))


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def names_used(path: Path) -> set[str]:
    """Names of `defaults` that a module uses, as `defaults.NAME` or imported by name."""
    used: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "defaults":
            used.add(node.attr)
        if isinstance(node, ast.ImportFrom) and node.module == "finetune_api.defaults":
            used |= {alias.name for alias in node.names}
    return used & NAMES


@pytest.mark.parametrize(
    ("field", "absent"),
    [
        ("runtime", defaults.RUNTIME),
        ("method.sft.lossOn", defaults.LOSS_ON),
        ("peft.rank", "the smallest of 16, 32, 64 and 128 (CPT: of 64 and 128)"),
        ("peft.alpha", defaults.LORA_ALPHA),
        ("preprocessing.maxSequenceLength", "the longest row, at most what the model was made for"),
        ("preprocessing.tooLong", f"{defaults.CPT_TOO_LONG} for CPT, {defaults.SFT_TOO_LONG} for SFT"),
        ("preprocessing.maxTooLongFraction", defaults.MAX_TOO_LONG_FRACTION),
        ("preprocessing.onBadRow", defaults.ON_BAD_ROW),
        ("preprocessing.maxBrokenFraction", defaults.MAX_BROKEN_FRACTION),
        ("preprocessing.deduplication.exact", defaults.EXACT_COPIES),
        ("preprocessing.deduplication.near", f"{defaults.CPT_NEAR_COPIES} for CPT"),
        ("preprocessing.deduplication.similarity", defaults.SIMILARITY),
        ("datasets[].weight", defaults.DATASET_WEIGHT),
        ("hyperparameters.epochs", f"by the number of rows, {defaults.MIN_EPOCHS} to {defaults.MAX_EPOCHS}"),
        (
            "hyperparameters.learningRate",
            "by the model's family and width: 5e-4 for Llama and Qwen up to a width of 2000",
        ),
        ("hyperparameters.globalBatchSize", "the most of 4, 8, 16 and 32 that leaves at least 200 steps"),
        ("hyperparameters.warmupRatio", defaults.WARMUP_RATIO),
        ("hyperparameters.schedule", f"{defaults.SFT_SCHEDULE} for SFT, {defaults.CPT_SCHEDULE} for CPT"),
        ("hyperparameters.weightDecay", 0),
        ("hyperparameters.seed", defaults.SEED),
        ("evaluation.holdoutFraction", f"{defaults.HOLDOUT_FRACTION}, at most {defaults.MAX_HELD_OUT_ROWS} rows"),
        ("checkpoint.intervalSeconds", defaults.CHECKPOINT_INTERVAL_S),
        ("checkpoint.keepLast", defaults.CHECKPOINTS_KEPT),
        ("recovery.maxRetries", defaults.MAX_RETRIES),
        ("recovery.maxDisruptions", defaults.MAX_DISRUPTIONS),
        ("recovery.progressDeadlineSeconds", defaults.PROGRESS_DEADLINE_S),
        ("storage.region", defaults.REGION),
        ("ttlSecondsAfterFinished", defaults.TTL_S),
    ],
)
def test_the_text_of_a_field_tells_its_default(field: str, absent: str | float):
    text = next(text for place, _, text in FIELDS if place == f"spec.{field}")
    assert f"Absent: {absent}" in text


def test_every_field_that_may_be_absent_says_what_then_happens():
    assert [place for place, kind, text in FIELDS if kind != "object" and "Absent: " not in text] == []


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_default_is_used_by_the_code_and_by_the_fields_text(name: str):
    users = [path for path in SOURCES if name in names_used(path) and path != DEFAULTS_FILE]
    assert [path for path in users if path not in FIELDS_FILES], "no code uses it"
    assert bool(FIELDS_FILES.intersection(users)) is (name not in NOT_IN_TEXTS)


def second_copies() -> Iterator[tuple[str, object]]:
    """Literals in the place of a default: named so, given to `pick` or `given`, or of a default's very value."""
    for path in set(SOURCES) - {DEFAULTS_FILE}:
        file = str(path.relative_to(ROOT))
        for node in nodes(path):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                yield from (
                    (file, name.id) for name in node.targets if isinstance(name, ast.Name) and "DEFAULT" in name.id
                )
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in PICKERS:
                picked = [argument for argument in node.args[1:3] if isinstance(argument, ast.Constant)]
                yield from ((file, argument.value) for argument in picked if argument.value is not None)
            if isinstance(node, ast.Constant) and not isinstance(node.value, bool) and node.value in DISTINCTIVE:
                yield file, node.value


def test_no_default_is_written_a_second_time():
    assert set(second_copies()) - OTHER_MEANINGS == set()
