"""Writes what is made from the code (`make crds`): the CRD, what the chart needs of it, the generated pages in docs/.

The chart's copy is a template and not in Helm's `crds/`, as Helm never upgrades what lies there.
"""

import ast
import json
import re
from collections.abc import Collection, Iterator, Mapping
from itertools import groupby
from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from finetune_api import reference
from finetune_api.chart_schema import runtimes_schema
from finetune_api.crd import custom_resource_definition
from finetune_api.data_files import DOCUMENTS
from finetune_api.names import HTTP_PORT, Stage
from finetune_api.pii import PII_WORDS
from finetune_api.row_words import CHANGE_WORDS, ROW_WORDS
from finetune_api.text_quality import LANGUAGES, RULES, QualityPreset, ThresholdsSpec
from finetune_operator.job_series import MAX_FINISHED
from finetune_operator.metrics import Metrics
from finetune_operator.settings import Settings
from finetune_trainer.data import field_names
from finetune_trainer.data.decided import Decided
from finetune_trainer.data.pii.national_ids import NATIONAL_IDS
from finetune_trainer.data.shapes import SHAPES
from finetune_trainer.data.taught import NOTE_WORDS
from finetune_trainer.metrics import DecidedRows, TrainMetrics
from finetune_trainer.serve import Reporter

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# Generated from api/finetune_api/job.py and status.py by `make crds`; do not edit.\n"
KEEP = """\
  {{- if .Values.crds.keep }}
  annotations:
    helm.sh/resource-policy: keep
  {{- end }}
"""
METRICS_HEAD = """\
# Metrics

Generated from the code by `make crds`; do not edit. Names are as Prometheus stores them; a histogram has `_bucket`,
`_sum` and `_count`. A figure that is not known, such as GPU memory on a CPU, has no sample.
"""
DATA = ROOT / "docs/data.md"
VALUES_SCHEMA = ROOT / "charts/finetune-operator/values.schema.json"
FILES = ROOT / "docs/files.md"
FILES_HEAD = """\
# Files

Generated from the first sentence of each module by `make crds`; do not edit. How the parts belong together stands in
[architecture.md](architecture.md).
"""
PACKAGES = (
    "api/finetune_api",
    "operator/finetune_operator",
    "trainer/finetune_trainer",
    "cli/finetune_cli",
    "demo",
    "testbed",
    "bench",
)


def _purpose(module: Path) -> str:
    """The first sentence of its docstring. Raises ValueError if it has none."""
    text = " ".join((ast.get_docstring(ast.parse(module.read_text())) or "").split("\n\n")[0].split())
    if not text:
        raise ValueError(f"{module} has no docstring")
    return re.split(r"(?<=[a-z`)\"]\.) ", text)[0].replace("|", "\\|")


def files_page() -> str:
    """Every module with a phrase, as Markdown."""
    parts = [FILES_HEAD]
    for package in PACKAGES:
        modules = sorted((ROOT / package).rglob("*.py"))
        rows = [f"| `{path.relative_to(ROOT / package)}` | {_purpose(path)} |" for path in modules]
        parts.append("\n".join([f"## {package}\n", "| file | what it is for |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _rows(collectors: list[Collector]) -> Iterator[str]:
    yield "| metric | type | labels | meaning |"
    yield "|---|---|---|---|"
    for collector in collectors:
        labels = collector._labelnames if isinstance(collector, MetricWrapperBase) else ()  # pyright: ignore[reportPrivateUsage]
        for family in collector.collect():
            name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
            seen = {label: 0 for sample in family.samples for label in sample.labels if label != "le"}
            named = ", ".join(f"`{label}`" for label in labels or seen)
            yield f"| `{name}` | {family.type} | {named} | {family.documentation} |"


def _collectors(registry: CollectorRegistry) -> list[Collector]:
    return list(registry._collector_to_names)  # pyright: ignore[reportPrivateUsage]


def _reported(stage: Stage) -> list[Collector]:
    """Of a pod in this stage that knows everything it can report."""
    registry = CollectorRegistry()
    reporter = Reporter(stage, 1, registry)
    reporter.update(
        **{
            name: 0
            for name, value in reporter.progress()
            if value is None and name not in ("checkpoint", "quality", "trouble")
        }
    )
    if stage is Stage.TRAIN:
        TrainMetrics(registry)
    else:
        decided = Decided()
        decided.add(b'{"stage":"read","action":"drop","reason":"empty"}')
        registry.register(DecidedRows(decided))
    return _collectors(registry)


def metrics_page() -> str:
    """Every metric of operator and trainer, as Markdown."""
    registry = CollectorRegistry()
    Metrics(registry)
    operator = _rows(_collectors(registry))
    trainer = dict.fromkeys(row for stage in Stage for row in _rows(_reported(stage)))
    return (
        f"{METRICS_HEAD}\n## The operator, port {Settings.http_port}\n\n"
        f"`finetune_job_…` are of each job that is not finished, and of the {MAX_FINISHED} that finished last.\n\n"
        + "\n".join(operator)
        + f"\n\n## A pod of a job, port {HTTP_PORT}\n\n"
        + "\n".join(trainer)
        + "\n"
    )


def _shapes() -> Iterator[str]:
    for name, shape in SHAPES.items():
        yield f"**{name}**: {shape.meaning}\n\n```json\n" + "\n".join(shape.examples) + "\n```\n"


def _named(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _message_fields() -> Iterator[str]:
    yield "| of a message | names |"
    yield "|---|---|"
    for what, names in (
        ("who says it", field_names.ROLE),
        ("what is said", field_names.CONTENT),
        ("the reasoning before it", field_names.REASONING),
        ("whether it is learned", field_names.LEARNED),
        ("the contrary", field_names.NOT_LEARNED),
    ):
        yield f"| {what} | {_named(names)} |"
    for role in dict.fromkeys(field_names.ROLES.values()):
        what = "an answer that calls a function" if role == "call" else f"role `{role}`"
        yield f"| {what} | {_named([name for name, meant in field_names.ROLES.items() if meant == role])} |"
    yield f"| passed over | {_named(sorted(field_names.METADATA_OF_MESSAGES))} |"


def _pii() -> Iterator[str]:
    yield "| type | what is told |"
    yield "|---|---|"
    yield from (f"| `{type_}` | {words} |" for type_, words in PII_WORDS.items())
    yield ""
    yield "National numbers:"
    yield ""
    yield "| country | number | a word before it is needed |"
    yield "|---|---|---|"
    for (region, name), group in groupby(NATIONAL_IDS, key=lambda each: (each.region, each.name)):
        needs_word = {bool(each.cue) for each in group}
        needed = "in some of its forms" if len(needs_word) > 1 else "yes" if needs_word == {True} else ""
        yield f"| {region} | {name} | {needed} |"


def _words(words: Mapping[str, str], of_what: str = "a row, or the field that is named, …") -> Iterator[str]:
    yield f"| code | {of_what} |"
    yield "|---|---|"
    yield from (f"| `{code}` | {each} |" for code, each in words.items())


def _documents() -> Iterator[str]:
    yield "| Ending | What is read |"
    yield "|---|---|"
    for files in DOCUMENTS.values():
        yield f"| {_named(files.endings)} | {files.words} |"


def _rules() -> Iterator[str]:
    presets = [each for each in QualityPreset if each is not QualityPreset.OFF]
    yield f"| threshold | {' | '.join(presets)} | of | source | reason |"
    yield "|---|" + "---|" * (len(presets) + 3)
    for name, rule in RULES.items():
        limits = " | ".join(f"{rule.presets[each]:g}" if each in rule.presets else "" for each in presets)
        field = ThresholdsSpec.model_fields[name].alias
        yield f"| `{field}` | {limits} | {rule.figure} | {rule.source} | `{rule.reason}` |"


def data_page() -> str:
    """The page about data as it is, with its lists made anew. Raises ValueError where a list has no place in it."""
    page = DATA.read_text()
    for name, lines in {
        "shapes": _shapes(),
        "metadata": iter([_named(sorted(field_names.METADATA))]),
        "messages": _message_fields(),
        "changes": _words(CHANGE_WORDS),
        "notes": _words(NOTE_WORDS, "a conversation, …"),
        "quality": _rules(),
        "languages": iter([", ".join(f"`{code}`" for code in LANGUAGES)]),
        "reasons": _words(ROW_WORDS),
        "documents": _documents(),
        "pii": _pii(),
    }.items():
        before, begin, rest = page.partition(f"<!-- begin {name} -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->\n")
        if not begin or not end:
            raise ValueError(f"{DATA} has no place for {name}")
        page = before + begin + "\n".join(lines) + "\n" + end + after
    return page


def values_schema() -> str:
    """The chart's schema of values, of which the runtimes are made from the models; the rest is kept as it is."""
    schema = json.loads(VALUES_SCHEMA.read_text())
    schema["properties"]["runtimes"] = runtimes_schema()
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def generated() -> dict[Path, str]:
    """Content by file. Raises ValueError if the CRD would be read as template text by Helm."""
    crd = yaml.safe_dump(custom_resource_definition(), sort_keys=False, width=110, allow_unicode=True)
    if "{{" in crd:
        raise ValueError("the CRD contains {{, which Helm would take for a template")
    first, metadata, rest = crd.partition("metadata:\n")
    return {
        ROOT / "crds/finetunejobs.yaml": HEADER + crd,
        ROOT / "charts/finetune-operator/templates/crd.yaml": (
            HEADER + "{{- if .Values.crds.enabled }}\n" + first + metadata + KEEP + rest + "{{- end }}\n"
        ),
        VALUES_SCHEMA: values_schema(),
        ROOT / "docs/reasons.md": reference.page(),
        ROOT / "docs/metrics.md": metrics_page(),
        DATA: data_page(),
    }


if __name__ == "__main__":
    # Not in `generated`: nobody who adds a module has to wait for a page. Its test is in tests/unit/test_docs.py.
    for path, content in (generated() | {FILES: files_page()}).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
