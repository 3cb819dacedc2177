"""What a person sees: bars while a job runs, and a readable end. Plain lines where the output is no terminal."""

import time
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from finetune_api.job import StartPolicy
from finetune_api.names import Stage
from finetune_api.printable import printable
from finetune_api.quality import FIGURE_WORDS, WATCHED_FIGURE, Quality, concern_words, verdict
from finetune_api.reasons import Fault, Reason, reason_of_exit, words
from finetune_api.retry import FINAL_SECOND_TIME
from finetune_api.row_words import row_words
from finetune_api.run import Progress, RunResult, Trouble
from finetune_api.status import DataStatus, PlanStatus
from finetune_cli.screen import table

_PLAIN_INTERVAL_S = 10.0
_TITLES = {Stage.PREPARE: "Preparing data", Stage.TRAIN: "Training"}


def duration(seconds: float) -> str:
    """1h02m, 3m05s or 12s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def rate(rows_per_second: float) -> str:
    """3,400 rows/s, or 0.5 rows/s."""
    return f"{rows_per_second:,.{0 if rows_per_second >= 10 else 1}f} rows/s"


def accuracy(share: float) -> str:
    """Return how many of the preferences in the last step the model shares."""
    return f"reward accuracy {share:.2f}"


def count_files(files: int) -> str:
    """Return the number of files with its noun."""
    return "1 file" if files == 1 else f"{files:,} files"


def plain(text: str) -> str:
    """Return a model's words on one line."""
    return " ".join(printable(text).split()) or "(nothing)"


def describe(progress: Progress) -> str:
    """One line of where a stage is."""
    parts = [progress.activity.lower()]
    if progress.rows_read:
        parts.append(f"{progress.rows_read:,} rows")
    if progress.rows_per_second is not None:
        parts.append(rate(progress.rows_per_second))
    if progress.bytes_total:
        parts.append(f"{progress.percentage}% of data")
    if progress.activity == "Scoring" and progress.answers_to_score:
        share = 100 * progress.answers_scored // progress.answers_to_score
        parts.append(f"{share}% of {progress.answers_to_score:,} answers")
    if progress.total_steps:
        within = f" + {progress.step_tokens:,} tokens" if progress.step_tokens else ""
        parts.append(f"step {progress.step}/{progress.total_steps}{within}")
    if progress.resumed_from_step:
        parts.append(f"resumed at {progress.resumed_from_step}")
    if progress.train_loss is not None:
        parts.append(f"loss {progress.train_loss:.3f}")
    if progress.eval_loss is not None:
        parts.append(f"held-out loss {progress.eval_loss:.3f}")
    if WATCHED_FIGURE in progress.figures:
        parts.append(accuracy(progress.figures[WATCHED_FIGURE]))
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if progress.eta_seconds is not None and (progress.bytes_total or progress.step < progress.total_steps):
        parts.append(f"{duration(progress.eta_seconds)} left")
    return ", ".join(parts)


class StageView:
    """Shows one attempt while it runs; feed it with `update`."""

    def __init__(self, console: Console, stage: Stage, attempt: int) -> None:
        self._console = console
        self._title = _TITLES[stage] + (f" (attempt {attempt})" if attempt > 1 else "")
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[line]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bars.add_task(self._title, total=None, line="starting")
        self._said = ("starting", time.monotonic())
        self._trouble: Fault | None = None
        self._concerns: set[Reason] = set()

    def __enter__(self) -> Self:
        self._bars.start()
        if not self._console.is_terminal:
            self._console.print(f"{self._title}: starting", markup=False)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._bars.stop()

    def update(self, progress: Progress) -> None:
        self._show_trouble(progress.trouble)
        if progress.quality is not None and progress.step < progress.total_steps:
            self._show_concerns(progress.quality)
        line = describe(progress)
        total = progress.total_steps or None
        self._bars.update(self._task, total=total, completed=progress.step, line=escape(line))
        said, said_s = self._said
        now_s = time.monotonic()
        same = said.partition(",")[0] == line.partition(",")[0]
        if self._console.is_terminal or said == line or (same and now_s - said_s < _PLAIN_INTERVAL_S):
            return
        self._said = (line, now_s)
        self._console.print(f"{self._title}: {line}", markup=False, soft_wrap=True)

    def _show_concerns(self, quality: Quality) -> None:
        """Say once, in red, what already speaks against the model while it trains: it may be worth a Ctrl-C."""
        for reason, sentence in zip(quality.concerns, concern_words(quality), strict=True):
            if reason not in self._concerns:
                self._concerns.add(reason)
                self._console.print(f"[bold red]{reason}[/] {escape(sentence)}", soft_wrap=True)

    def _show_trouble(self, trouble: Trouble | None) -> None:
        """Say once that something fails and is tried again, and once that it is over."""
        fault = trouble.fault if trouble is not None else None
        if fault is self._trouble:
            return
        self._trouble = fault
        if trouble is None:
            self._console.print("[green]Saved[/]   what could not be saved is safe again")
            return
        why = escape(words(trouble.fault, trouble.args))
        self._console.print(
            f"[yellow]Unsaved[/] {why}; it is tried again, and the training goes on meanwhile", soft_wrap=True
        )


def show_prepared(console: Console, data: DataStatus, plan: PlanStatus) -> None:
    """What became of the rows, and what was chosen."""
    console.print(
        f"[bold]Data[/]    {data.rows_in:,} rows in {count_files(data.files)}: {data.rows_used:,} to train on, "
        f"{data.rows_held_out:,} held out, {sum(drop.rows for drop in data.dropped):,} dropped",
        soft_wrap=True,
    )
    for drop in data.dropped:
        _more(console, f"{drop.rows:,} dropped", f"each {row_words(drop.reason)} ({drop.reason})")
    _more(console, "report", data.report_page_uri or data.report_uri)
    rows = "" if plan.rows is None else f" read {plan.rows:,} rows ({plan.distinct_rows or 0:,} different ones)"
    learned = f"{plan.label_tokens:,} of them learned from"
    console.print(
        f"[bold]Plan[/]    {plan.steps:,} steps{rows}, {plan.train_tokens:,} tokens, {learned}", soft_wrap=True
    )
    if plan.resolved:
        chosen = table("chosen for you", "value", "because")
        for item in plan.resolved:
            chosen.add_row(escape(item.field), escape(item.value), escape(item.reason))
        console.print(chosen)


def show_planned(console: Console, policy: StartPolicy) -> None:
    console.print(
        f"[bold]Planned[/] as startPolicy: {policy} asks, and not trained; with startPolicy: Automatic the same "
        "command goes on from here",
        soft_wrap=True,
    )


def show_prepared_earlier(console: Console) -> None:
    console.print("[bold]Data[/]    as an earlier call prepared it; what has changed since is not read")


def show_gone(console: Console, run_uri: str) -> None:
    console.print(
        f"[yellow]Gone[/]    what was prepared is no longer in {escape(run_uri)}: prepared again", soft_wrap=True
    )


def show_outdated(console: Console) -> None:
    console.print("[yellow]Plan[/]    it is of another release of the trainer, and no step is finished: prepared again")


def show_changed_data(console: Console, uris: list[str]) -> None:
    """That the adapter is of other data than lies there now, and how to train on that."""
    first = uris[0] if len(uris) == 1 else f"{uris[0]} and {len(uris) - 1} more files"
    console.print(
        f"[yellow]Note[/]    the data has changed since it was prepared: {escape(first)}. This adapter learned from "
        "what was there before; to train on what is there now, give the job another metadata.name",
        soft_wrap=True,
    )


def show_retry(console: Console, result: RunResult, failures: int, max_retries: int, delay_s: float) -> None:
    """Say why an attempt ended, how many more may follow, and when the next one comes."""
    once = reason_of_exit(result.exit_code) in FINAL_SECOND_TIME
    count = "once" if once else f"{failures} of {max_retries}"
    when = f" in {duration(delay_s)}" if delay_s else ""
    console.print(f"[yellow]Retry[/]   {count}{when}: {escape(words(result.fault, result.args))}", soft_wrap=True)


def show_failure(console: Console, result: RunResult, log_file: str) -> None:
    """Why, and where to read on."""
    console.print(f"[bold red]Failed[/]  {escape(words(result.fault, result.args))}", soft_wrap=True)
    _more(console, "exit code", f"{result.exit_code} ({result.fault.value})")
    _more(console, "log", log_file)


def show_success(console: Console, result: RunResult, samples: list[dict[str, str]], metrics_uri: str) -> None:
    """What came out."""
    if result.metrics is not None and result.metrics.eval_loss is not None:
        base = result.metrics.base_eval_loss
        before = "" if base is None else f" (before training {base:.3f})"
        console.print(f"[bold]Loss[/]    {result.metrics.eval_loss:.3f} on held-out rows{before}")
    _show_figures(console, result.quality or Quality())
    for sample in samples:
        answers = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, text in (("prompt", sample["prompt"]), ("base", sample["base"]), ("tuned", sample["tuned"])):
            answers.add_row(f"[dim]{name}[/]", escape(plain(text)))
        console.print(answers)
    artifact = result.artifact
    if artifact is not None:
        console.print(
            "[bold green]Done[/]    the adapter is committed; loaded from its files, it computes what was trained"
        )
        _more(console, "adapter", artifact.uri)
        _more(console, "digest", artifact.digest)
        _more(console, "manifest", artifact.manifest_uri)
    show_quality(console, result.quality)
    if result.log_uri:
        _more(console, "metrics", metrics_uri)
        _more(console, "log", result.log_uri)


def _show_figures(console: Console, quality: Quality) -> None:
    """Say what a preference method has measured of held-out rows, a figure a line."""
    for name, meaning in FIGURE_WORDS.items():
        now, before = quality.figures.get(name), quality.start_figures.get(name)
        if now is not None and before is not None:
            _more(console, f"{now:.3f}", f"{meaning} (before training {before:.3f})")


def show_quality(console: Console, quality: Quality | None) -> None:
    """Say what speaks against the model, in red, or that nothing was measured to say so."""
    if quality is None:
        return
    for reason, sentence in zip(quality.concerns, concern_words(quality), strict=True):
        console.print(f"[bold red]{reason}[/] {escape(sentence)}", soft_wrap=True)
    if not quality.measured:
        console.print(f"[yellow]Note[/]    {escape(verdict(quality).message)}", soft_wrap=True)


def _more(console: Console, name: str, value: str) -> None:
    """One line below a heading; URIs stay whole, so that they can be copied."""
    console.print(f"        {name:10} {value}", markup=False, soft_wrap=True)
