"""`finetune data`: what a job will learn from its rows, and which of them it would drop, before anything is paid."""

import importlib.util
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from finetune_api.base import first_problem
from finetune_api.errors import StageError
from finetune_api.job import MethodType
from finetune_api.names import API_VERSION, KIND, Stage
from finetune_api.row_words import ROW_WORDS, row_words
from finetune_cli import local
from finetune_cli.errors import CommandError, Exit
from finetune_cli.load import load_job
from finetune_cli.run import INSTALL
from finetune_cli.show import count_files
from finetune_cli.validate import problems

if TYPE_CHECKING:
    from finetune_trainer.context import StageContext
    from finetune_trainer.shown import ShownRow

MAX_PLACES = 20
_JOB_ENDINGS = (".yaml", ".yml")
_LEARNED = "bold green"
_NO_MODEL = "without a model: no chat template, tokens or lengths; name a base model by --model, or a job's file"


def show(
    target: str, most: int, row: str | None, as_json: bool, model: str | None, method: MethodType, console: Console
) -> int:
    """Show rows as they will be learned from. Raises CommandError for what cannot be read."""
    with _stage(target, model, method) as (ctx, renders):
        from finetune_trainer.shown import NoSuchFileError, Wanted, show, show_unrendered

        wanted = Wanted(most) if row is None else Wanted(1, *_file_and_number(row))
        try:
            rows = (show if renders else show_unrendered)(ctx, wanted)
        except StageError as error:
            raise CommandError(str(error), error.exit_code) from error
        except NoSuchFileError as error:
            raise CommandError(f"--row: {error}", Exit.USAGE) from error
    if row is not None and not rows:
        numbers = "rows are numbered from 1, of CSV and TSV from 2, as the header is row 1"
        raise CommandError(f"--row: {row} is no row of the data; {numbers}", Exit.USAGE)
    if as_json:
        # ASCII alone, DEL escaped too: the console leaves it as it is.
        text = json.dumps([asdict(each) for each in rows], indent=1).replace("\x7f", "\\u007f")
        console.print(text, markup=False, soft_wrap=True)
        return Exit.SUCCEEDED
    console.print("Learned is what stands in ⟦ ⟧", style="dim")
    if not renders:
        console.print(f"As read, {_NO_MODEL}", style="yellow", soft_wrap=True)
    for each in rows:
        _show_row(each, console)
    return Exit.SUCCEEDED


def _show_row(row: "ShownRow", console: Console) -> None:
    place = f", sequence {row.sequence} of {row.sequences}" if row.sequences > 1 else ""
    console.print()
    said = f", {row.answer}" if row.answer else ""
    console.print(Text(f"{row.file} row {row.row}{place}{said}", style="bold"), soft_wrap=True)
    if row.dropped is not None:
        console.print(Text(f"dropped: {_words(row.dropped, row.words)}", style="red"), soft_wrap=True)
        return
    for each in row.changed:
        console.print(Text(f"changed: {_words(each)}", style="yellow"), soft_wrap=True)
    text = Text()
    for segment in row.segments:
        text.append(f"⟦{segment.text}⟧" if segment.learned else segment.text, _LEARNED if segment.learned else None)
    console.print(text, soft_wrap=True)
    if row.stop is not None:
        console.print(Text(f"stops at {row.stop}", style="dim"), soft_wrap=True)


def _words(code: str, more: str | None = None) -> str:
    """Return a sentence on what was done to a row: of the field or part that the code names, else of the row.

    more: what is wrong there, where more is known than the reason says."""
    from finetune_trainer.data.problems import Problem
    from finetune_trainer.data.taught import NOTE_WORDS

    reason, colon, detail = code.partition(": ")
    told = f": {more}" if more else ""
    if detail and reason in {*Problem}:
        return f"{detail} {ROW_WORDS[reason]}{told} ({reason})"
    return f"{NOTE_WORDS.get(reason) or f'it {row_words(reason)}'}{told} ({reason}){colon}{detail}"


@dataclass(frozen=True)
class Page:
    """A page that is to be written. rows: of each dataset, as they are learned, which are data."""

    path: Path
    rows: int = 0


def check(target: str, model: str | None, method: MethodType, console: Console, page: Page | None = None) -> int:
    """Do all of prepare but writing; returns 0, or the exit code with which prepare would end."""
    with _stage(target, model, method) as (ctx, renders):
        try:
            found = _checked(ctx) if renders else _read(ctx)
            _say_rows(found.report, ctx, console)
            if page is not None:
                _write(page, found.report, ctx, renders)
                console.print(f"page    {page.path}", markup=False, soft_wrap=True)
        except StageError as error:
            raise CommandError(str(error), error.exit_code) from error
        first, *more = found.lines
        console.print(first, markup=False, soft_wrap=True)
        _say_quality(found.report, console)
        _say_leaks(found.report["leaks"], console)
        _say_pii(found.report["pii"], console)
        for line in more:
            console.print(line, markup=False, soft_wrap=True)
        if found.error is not None:
            raise CommandError(str(found.error), found.error.exit_code)
    written = "nothing was written" if page is None else "nothing but the page was written"
    console.print(
        f"[green]Good[/]    {written if renders else f'as far as it can be told {_NO_MODEL}'}", soft_wrap=True
    )
    return Exit.SUCCEEDED


@dataclass(frozen=True)
class _Found:
    """What is told of data. report: as in report.json; lines: what follows the rows; error: what would end the job."""

    report: Mapping[str, Any]
    lines: Sequence[str]
    error: StageError | None


def _read(ctx: "StageContext") -> _Found:
    from finetune_trainer.shown import check_unrendered

    read = check_unrendered(ctx)
    return _Found(read.report, [f"shapes  {', '.join(dict.fromkeys(read.formats)) or 'none'}"], read.error)


def _checked(ctx: "StageContext") -> _Found:
    from finetune_trainer import prepare

    findings = prepare.check(ctx)
    found = findings.report
    lines = [f"files   {count_files(len(found['files']))}"]
    if findings.error is None:
        lines += _of_a_plan(found)
    return _Found(found, lines, findings.error)


def _of_a_plan(found: Mapping[str, Any]) -> list[str]:
    """Return what is told of data that can be trained on."""
    lengths = found["lengths"]
    percentiles = ", ".join(f"{name} {tokens:,}" for name, tokens in lengths["percentiles"].items())
    lines = [
        f"tokens  {lengths['tokens']:,} in {lengths['sequences']:,} sequences of {lengths['examples']:,} "
        f"examples, {lengths['label_tokens']:,} learned; {percentiles}",
    ]
    if found["same_ids"] is not None:
        lines.append(f"ids     {found['same_ids']['words']}")
    special = found["special_tokens_in_words"]
    lines += [f"special {rows:,} rows have {name} in their own words" for name, rows in special.items()]
    return [*lines, *(f"        {each['field']}: {each['value']}, {each['reason']}" for each in found["resolved"])]


def _write(page: Page, report: Mapping[str, Any], ctx: "StageContext", renders: bool) -> None:
    """Write the page; its rows are read once more."""
    from finetune_trainer.prepare import page as page_of
    from finetune_trainer.shown import Wanted, show, show_unrendered

    rows = (show if renders else show_unrendered)(ctx, Wanted(page.rows)) if page.rows else []
    page.path.write_bytes(page_of(report, rows))


def _say_rows(found: Mapping[str, Any], ctx: "StageContext", console: Console) -> None:
    from finetune_trainer.shown import decisions, reason_of

    rows_in, dropped, passed_over_files = found["rows_in"], found["dropped"], found["ignored_files_total"]
    passed_over = f"; {count_files(passed_over_files)} passed over" if passed_over_files else ""
    left_out = f"{sum(dropped.values()):,}" if dropped else "none"
    console.print(f"rows    {rows_in:,}, {left_out} of them dropped{passed_over}", soft_wrap=True)
    for uri in found["ignored_files"][:MAX_PLACES]:
        console.print(f"passed over {uri}", markup=False, soft_wrap=True)
    said = Counter[str]()
    for decision in decisions(ctx):
        reason = decision["reason"]
        said[reason] += decision["action"] == "drop"
        if decision["action"] == "drop" and said[reason] <= MAX_PLACES:
            sentence = _words(reason_of(decision), decision.get("words"))
            line = f"dropped {decision['file']} row {decision['row']}: {sentence}"
            console.print(line, markup=False, soft_wrap=True)
    for reason, rows in dropped.items():
        if rows > MAX_PLACES:
            console.print(f"dropped {rows:,} rows in all: {reason}", markup=False, soft_wrap=True)
    for reason, rows in found["changed"].items():
        console.print(f"changed {rows:,} of {rows_in:,} rows: {_words(reason)}", markup=False, soft_wrap=True)


def _say_leaks(leaks: Mapping[str, Any], console: Console) -> None:
    """Say how many rows evaluation sets have too. leaks: as in report.json."""
    for each in leaks.get("sets", ()):
        told = f"leaks   {each['left_out']:,} rows share {leaks['words']} words in a row with {each['name']}"
        short = f", of which {each['short_rows']:,} are too short to be found" if each["short_rows"] else ""
        console.print(f"{told} ({each['rows']:,} rows{short})", markup=False, soft_wrap=True)
    if leaks.get("advice"):
        console.print(f"        {leaks['advice']}", markup=False, soft_wrap=True)


def _say_pii(pii: Mapping[str, Any], console: Console) -> None:
    """Say what personal data and secrets there are. pii: as in report.json."""
    for each in pii["types"]:
        words = f"private {each['found']:,} {each['type']} in {each['rows']:,} rows ({each['action']})"
        console.print(words, markup=False, soft_wrap=True)
    if pii["advice"]:
        console.print(f"        {pii['advice']}", markup=False, soft_wrap=True)


def _say_quality(found: Mapping[str, Any], console: Console) -> None:
    """Say what the rules of quality found, and in which languages the rows are. found: as in report.json."""
    quality, languages = found["quality"], found["languages"]
    if quality["found"]:
        rows = sum(each["rows"] for each in quality["found"])
        if quality["drops"]:
            share = rows / quality["rows"]
            allowed = f"{quality['max_dropped_fraction']:.3g} of them may be left out"
            told = f"would drop {share:.2%} of {quality['rows']:,} rows; {allowed}"
        else:
            told = f"of {quality['rows']:,} rows, none of which is left out"
        console.print(f"quality {quality['preset']}: {told}", soft_wrap=True)
    for each in quality["found"]:
        places = ", ".join(f"{place['uri'].rpartition('/')[2]} row {place['row']}" for place in each["places"])
        words = f"{row_words(each['reason'])} ({each['reason']})"
        line = f"        {each['rows']:>9,}  {each['share']:>7.2%}  {words}: {places}"
        console.print(line, markup=False, soft_wrap=True)
    if languages:
        told = ", ".join(f"{code} {rows:,}" for code, rows in list(languages.items())[:MAX_PLACES])
        console.print(f"spoken  {told}", soft_wrap=True)


@contextmanager
def _stage(target: str, model: str | None, method: MethodType) -> Generator[tuple["StageContext", bool]]:
    """Give a stage that works in a folder of its own, and whether there is a model."""
    is_job = target.endswith(_JOB_ENDINGS)
    if is_job and model is not None:
        raise CommandError(f"{target} names its model; --model is for a URI of data", Exit.USAGE)
    job = load_job(Path(target)) if is_job else _job_of(_data_uri(target), model, method)
    if wrong := problems(job):
        raise CommandError("\n".join([f"{target} is refused:", *(f"  {line}" for line in wrong)]), Exit.USAGE)
    renders = is_job or model is not None
    needed = "torch" if renders else "pyarrow"
    if importlib.util.find_spec(needed) is None:
        raise CommandError(f"reading data needs more packages: {INSTALL}, in a checkout", Exit.USAGE)
    from prometheus_client import CollectorRegistry

    from finetune_trainer.context import StageContext
    from finetune_trainer.serve import Reporter
    from finetune_trainer.store import open_store

    logging.getLogger("finetune_trainer").addHandler(logging.NullHandler())  # what it warns of is shown here
    with tempfile.TemporaryDirectory(prefix="finetune-data-") as folder:
        work_dir = Path(folder)
        state = local.State(uid="data", created_at=datetime.now(UTC))
        try:
            config = local.run_config(job, state, work_dir, local.this_machine(work_dir), os.environ, trains_here=False)
        except ValidationError as error:
            field, problem = first_problem(error)
            raise CommandError(f"{field}: {problem}", Exit.USAGE) from error
        ctx = StageContext(
            config=config,
            stage=Stage.PREPARE,
            attempt=1,
            pod_uid="data",
            plan_digest=None,
            work_dir=work_dir,
            store=open_store(config.storage),
            reporter=Reporter(Stage.PREPARE, 1, CollectorRegistry()),
        )
        yield ctx, renders


def _job_of(data: str, model: str | None, method: MethodType) -> dict[str, Any]:
    """Return a job with this data and every choice left to the defaults; it is never run."""
    spec = {
        "model": {"uri": model or "file:///no/model"},
        "method": {"type": method.value},
        "datasets": [{"uri": data}],
        "output": {"uri": "file:///no/output"},
    }
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "data"}, "spec": spec}


def _data_uri(target: str) -> str:
    """Return the URI of a path of this machine; a URI as it is."""
    if "://" in target:
        return target
    path = os.path.abspath(Path(target).expanduser()).replace("%", "%25")
    return f"file://{path}" + ("/" if target.endswith("/") or Path(target).is_dir() else "")


def _file_and_number(row: str) -> tuple[str, int]:
    file, _, number = row.rpartition(":")
    if not file or not number.isdecimal() or not number.isascii():
        raise CommandError("--row is the name of a file and the number of a row, as FILE:N", Exit.USAGE)
    return file, int(number)
