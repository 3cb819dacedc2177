"""Prepare in partitions: what comes out is the same, however rows are cut and however many processes work on them."""

import errno
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_run import CHATML, GIB, chat, chats, context, jsonl, prose, put, write_model
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import Progress
from finetune_trainer import kept_partitions, prepare
from finetune_trainer.commit import Fence
from finetune_trainer.data import disk, partitions, worker_pool
from finetune_trainer.data.encoders import FAST, HUGGING_FACE, Choice
from finetune_trainer.data.field_names import METADATA
from finetune_trainer.data.partition_messages import PartitionResult
from finetune_trainer.serve import Reporter
from partition_run import cut_partitions, keep_partitions, with_workers

BROKEN = b"not json\n" + jsonl([{"messages": [{"role": "user", "content": "no answer"}]}])
QUARANTINE = {"onBadRow": "Quarantine", "maxBrokenFraction": 0.5}
LONG = [chat("long " * 400, "short"), chat("why? " * 150, "so", "again " * 200, "end")]
TEXTS = [{"text": "".join(f"{i + line} is a number.\n" for line in range(1 + i % 90))} for i in range(200)]
POOR = [{"text": "It says the same again.\n" * (1 + i % 90) if i % 3 else "-" * (i % 7 + 1)} for i in range(200)]
PAIRS = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}", "weight": 1 + i % 3} for i in range(300)]


def chat_files(folder: Path) -> None:
    rows = jsonl(chats(150)) + BROKEN + jsonl(chats(150, 140)) + jsonl(LONG) + jsonl(chats(50, 1000))
    put(folder, a_jsonl=rows, b_jsonl=jsonl(chats(20, 5)))


def mixed_files(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(chats(200))))
    pq.write_table(pa.Table.from_pylist(chats(150, 100)), folder / "data" / "b.parquet")
    (folder / "data" / "c.json").write_text(json.dumps(chats(100, 400)))


def text_files(folder: Path) -> None:
    put(folder, a_jsonl=jsonl(TEXTS))


def document_files(folder: Path) -> None:
    """Texts, some of them long and some empty."""
    (folder / "data").mkdir()
    for i in range(200):
        (folder / "data" / f"{i:03}.{'md' if i % 2 else 'txt'}").write_text(
            "".join(f"{i + line} is a number.\n" for line in range(i % 90))
        )


def poor_files(folder: Path) -> None:
    put(folder, a_jsonl=jsonl(TEXTS + POOR), b_jsonl=jsonl(POOR[::-1] + TEXTS))


def pair_files(folder: Path) -> None:
    lines = "".join(f'"{row["prompt"]}","{row["completion"]}",{row["weight"]}\n' for row in PAIRS)
    put(folder, a_jsonl=jsonl(PAIRS), b_csv=("prompt,completion,weight\n" + lines).encode())


PREFERENCE = {"method": {"type": "DPO"}}
ANSWERS = ("it is", "oh, it is", "well, it may be")


def _asked(i: int) -> str:
    return f"what is {i} and one?"


def preference_pair_files(folder: Path) -> None:
    rows = [
        {"prompt": _asked(i), "chosen": f" {i + 1}.", "rejected": f" {i}." if i % 9 else f" {i + 1}."}
        for i in range(300)
    ]
    put(folder, a_jsonl=jsonl(rows))


def ranking_files(folder: Path) -> None:
    rows = [
        {"question": _asked(i), "responses": [f"{words} {i}" for words in ANSWERS], "scores": [i % 3, 1, i % 5]}
        for i in range(300)
    ]
    put(folder, a_jsonl=jsonl(rows))


def thumb_files(folder: Path) -> None:
    """Answers to 100 prompts, those of each far apart; some prompts have one side alone, some answers both labels."""
    rows = [
        {**chat(_asked(i), f"{words} {i % 7}"), "label": (i + at) % 4 > 1, "weight": 1 + at}
        for at, words in enumerate((*ANSWERS, ANSWERS[0]))
        for i in range(100)
    ]
    put(folder, a_jsonl=jsonl(rows[:250]), b_jsonl=jsonl(rows[250:]))


def personal_files(folder: Path) -> None:
    """Conversations with values of several types, far apart, in questions and in answers."""
    rows = chats(400)
    for at, row in enumerate(rows):
        if at % 7 == 0:
            row["messages"][at % 2]["content"] += f" Mail ada{at % 21}@example.org or call +1 415-555-{2000 + at}."
        if at % 31 == 0:
            row["messages"][1]["content"] += " Card 4111 1111 1111 1111."
    put(folder, a_jsonl=jsonl(rows[:250]), b_jsonl=jsonl(rows[250:]))


def copied_files(folder: Path) -> None:
    """Texts with copies, near copies and chains of them, far apart and in two files."""
    numbers = [" ".join(f"word{i * i + at}" for at in range(60)) for i in range(100, 130)]
    texts = [*numbers, *(f"{text} and so on" for text in numbers), *numbers[:9], *(text[5:] for text in numbers)]
    rows = [{"text": text} for text in texts]
    put(folder, a_jsonl=jsonl(rows[:50]), b_jsonl=jsonl(rows[50:]))


def datasets(folder: Path, *names: str) -> list[dict[str, Any]]:
    return [{"uri": (folder / "data" / name).as_uri(), "weight": 1 + i} for i, name in enumerate(names)]


CASES: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "chat, quarantined, dropped": (chat_files, {"preprocessing": {**QUARANTINE, "maxTooLongFraction": 0.5}}, []),
    "chat, truncated": (chat_files, {"preprocessing": {**QUARANTINE, "tooLong": "Truncate"}}, []),
    "text, split": (text_files, {"method": {"type": "CPT"}}, []),
    "documents": (document_files, {"method": {"type": "CPT"}}, []),
    "personal data": (personal_files, {"preprocessing": {"pii": {"action": "Redact", "types": {"CARD": "Drop"}}}}, []),
    "text, poor rows left out": (
        poor_files,
        {"method": {"type": "CPT"}, "preprocessing": {"quality": {"maxDroppedFraction": 1}}},
        [],
    ),
    "completions with weights": (pair_files, {}, []),
    "copies and near copies": (copied_files, {"method": {"type": "CPT"}, "evaluation": {"holdoutFraction": 0.2}}, []),
    "copies that are reported": (
        copied_files,
        {"method": {"type": "CPT"}, "preprocessing": {"deduplication": {"exact": "Report"}}},
        [],
    ),
    "pairs": (preference_pair_files, PREFERENCE, []),
    "rankings": (ranking_files, PREFERENCE, []),
    "rated answers that become pairs": (thumb_files, PREFERENCE, []),
    "rated answers": (thumb_files, {"method": {"type": "KTO"}}, []),
    "gz, Parquet and a list, with weights": (mixed_files, {}, ["a.jsonl.gz", "b.parquet", "c.json"]),
}
SMALL, LARGE = 8_000, 30_000
MIB = 2**20


def left(folder: Path) -> dict[str, str]:
    """Digests of the arrays, the decisions and the counts of the report, by name; its page also shows its times."""
    job = folder / "out" / "bot-1a2b3" / ".job"
    reports = ("report.json", "report.html")
    files = [path for path in sorted(job.rglob("*")) if path.is_file() and path.name not in reports]
    found = {str(path.relative_to(job)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    report = json.loads((job / "report.json").read_bytes())
    del report["stages"]
    report.pop("disk_bytes", None)
    report.pop("kept_rows", None)
    return found | {"report": json.dumps(report)}


def run(
    folder: Path, spec: dict[str, Any], workers: int, attempt: int = 1, born: datetime | None = None
) -> prepare.RunResult:
    ctx = with_workers(context(folder, spec, attempt), workers)
    job = ctx.config.job.model_copy(update={"created_at": born})
    return prepare.run(replace(ctx, config=ctx.config.model_copy(update={"job": job})))


@pytest.mark.parametrize(
    ("stored_bytes", "workers", "disk_bytes", "expected"),
    [
        (MIB, 2, 100 * GIB, 4 * MIB),  # never smaller
        (80 * MIB, 2, 100 * GIB, 10 * MIB),  # four for each worker
        (80 * GIB, 2, 100 * GIB, 64 * MIB),  # never larger
        (80 * GIB, 2, 4 * GIB, 8 * MIB),  # six of them, with what they become, in an eighth of the disk
        (80 * GIB, 2, 4 * GIB + 100 * MIB, 8 * MIB),
        (80 * GIB, 16, 4 * GIB, 4 * MIB),
    ],
)
def test_partitions_are_sized_by_the_data_the_workers_and_the_disk(
    stored_bytes: int, workers: int, disk_bytes: int, expected: int
) -> None:
    size_bytes = partitions.partition_bytes(stored_bytes, workers, disk_bytes)
    assert size_bytes == expected
    assert partitions.in_flight_bytes(size_bytes, workers) <= max(
        disk_bytes / 8, partitions.in_flight_bytes(4 * MIB, workers)
    )


def test_a_small_dataset_before_a_large_one_keeps_nobody_from_working(
    tmp_path: Path, sized: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(10)), b_jsonl=jsonl(chats(400, 10)))
    sized(SMALL)
    begun: list[object] = []
    begin = worker_pool.Worker.begin

    def told(self: Any, job: Any) -> None:
        begun.append(self)
        begin(self, job)

    monkeypatch.setattr(worker_pool.Worker, "begin", told)
    run(tmp_path, {"datasets": datasets(tmp_path, "a.jsonl", "b.jsonl")}, 2)
    assert len(set(begun)) == 2
    used = report_of(tmp_path)["disk_bytes"]
    assert used["partitions"] == partitions.in_flight_bytes(SMALL, 2)
    assert used["most"] >= used["rows"] + used["partitions"]


def test_the_disk_that_is_taken_stays_within_what_the_plan_says(
    tmp_path: Path, sized: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [chat(f"what is {i} and {i}?", "the answer is " + f"{i} " * (i % 40)) for i in range(900)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_bytes(jsonl(words))
    pq.write_table(pa.Table.from_pylist(chats(300, 100)), tmp_path / "data" / "b.parquet")
    sized(SMALL)
    work = tmp_path / "work" / "1"
    seen: dict[str, list[int]] = {"partitions": [], "all": []}
    touch, keep = Reporter.touch, kept_partitions.KeptPartitions.keep

    def watched(self: Reporter, *given: Any) -> None:
        seen["partitions"].append(disk.size_of(work / "partitions") + disk.size_of(work / "part"))
        seen["all"].append(disk.size_of(work))
        touch(self, *given)

    def keep_and_watch(self: kept_partitions.KeptPartitions, key: str, out: Path, result: Any) -> None:
        keep(self, key, out, result)
        seen["partitions"].append(disk.size_of(work / "partitions") + disk.size_of(work / "part"))
        seen["all"].append(disk.size_of(work))

    monkeypatch.setattr(Reporter, "touch", watched)
    monkeypatch.setattr(kept_partitions.KeptPartitions, "keep", keep_and_watch)
    for workers in (1, 2, 4):
        for taken in seen.values():
            taken.clear()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
        run(tmp_path, {"datasets": datasets(tmp_path, "a.jsonl", "b.parquet")}, workers)
        used, bound = report_of(tmp_path)["disk_bytes"], partitions.in_flight_bytes(SMALL, workers)
        assert used["partitions"] == bound
        # What is seen depends on the moments at which it is looked at: a twelfth says that there was something to see.
        assert bound / 12 < max(seen["partitions"]) <= bound, f"{workers} workers"
        assert used["most"] / 6 < max(seen["all"]) <= used["most"], f"{workers} workers"
        assert not (work / "partitions").exists()


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let so many cores be usable, and partitions have so many bytes."""

    def size(size_bytes: int) -> None:
        cut_partitions(monkeypatch, size_bytes)

    return size


@pytest.mark.parametrize("case", CASES)
def test_what_is_prepared_does_not_depend_on_workers_or_partitions(case: str, tmp_path: Path, sized: Any) -> None:
    files, spec, names = CASES[case]
    files(tmp_path)
    spec = {**spec, "datasets": datasets(tmp_path, *names)} if names else spec
    sized(64 * 2**20)
    run(tmp_path, spec, 1)
    whole = left(tmp_path)
    for workers, size_bytes in ((1, SMALL), (2, SMALL), (4, LARGE)):
        sized(size_bytes)
        run(tmp_path, spec, workers)
        assert left(tmp_path) == whole, f"{workers} workers, {size_bytes} bytes"


def refuse(word: str) -> str:
    return (
        "{% for m in messages %}{% if '" + word + "' in m.content %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    )


@pytest.mark.parametrize(
    ("content", "fault", "row"),
    [
        (jsonl(chats(90)) + jsonl([chat("refused", "a")]) + jsonl(chats(20)) + b"1\n", Fault.TEMPLATE_FAILED, 91),
        (jsonl(chats(90)) + b"1\n" + jsonl([chat("refused", "a")]), Fault.BROKEN_ROW, 91),
        (jsonl(chats(200)) + b"1\n" + jsonl(chats(100)) + b"2\n" + jsonl(chats(100)), Fault.BROKEN_ROW, 201),
        (jsonl(chats(300)) + jsonl(LONG[:1]) + jsonl(chats(100)), Fault.TOO_MANY_LONG_ROWS, 301),
    ],
)
def test_the_first_row_in_order_is_named_however_many_workers_there_are(
    content: bytes, fault: Fault, row: int, tmp_path: Path, sized: Any
) -> None:
    write_model(tmp_path / "model", template=refuse("refused") + CHATML)
    put(tmp_path, a_jsonl=content)
    found: list[str] = []
    for workers, size_bytes in ((1, 64 * 2**20), (1, SMALL), (2, SMALL), (4, LARGE)):
        sized(size_bytes)
        with pytest.raises(StageError) as raised:
            run(tmp_path, {"preprocessing": {"tooLong": "Fail"}}, workers)
        assert (raised.value.fault, raised.value.args_by_name["row"]) == (fault, row)
        found.append(str(raised.value))
    assert len(set(found)) == 1, "in the same words, with the same numbers of rows"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (jsonl(chats(300)) + jsonl(LONG[:1]) + jsonl(chats(100)) + jsonl(LONG), (301, 301, 0)),
        (jsonl(chats(100)) + BROKEN + jsonl(chats(50)) + jsonl(LONG[:1]) + BROKEN + jsonl(chats(9)), (153, 153, 2)),
        (jsonl(LONG[:1]) + jsonl(chats(300)), (1, 1, 0)),
    ],
)
def test_a_row_that_is_too_long_ends_the_job_with_the_same_counts_however_rows_are_cut(
    content: bytes, told: tuple[int, int, int], tmp_path: Path, sized: Any
) -> None:
    put(tmp_path, a_jsonl=content)
    found: list[object] = []
    for workers, size_bytes in ((1, 64 * 2**20), (1, SMALL), (2, SMALL), (4, LARGE)):
        sized(size_bytes)
        with pytest.raises(StageError) as raised:
            run(tmp_path, {"preprocessing": {**QUARANTINE, "tooLong": "Fail"}}, workers)
        args, report = raised.value.args_by_name, report_of(tmp_path)
        broken = sum(report["dropped"].values()) - 1
        assert (args["row"], args["rows"], broken) == told
        assert (args["dropped"], args["longest"], report["rows_in"]) == (1, args["tokens"], args["rows"])
        decisions = (tmp_path / "out" / "bot-1a2b3" / ".job" / "decisions.jsonl").read_bytes()
        del report["stages"]
        found.append((args, report, decisions))
    assert found[0] == found[1] == found[2] == found[3]


def test_a_file_that_breaks_off_soon_behind_a_broken_row_is_told_however_many_workers_there_are(
    tmp_path: Path, sized: Any
) -> None:
    rows = jsonl(chats(100)) + b"1\n" + jsonl(chats(600))
    put(tmp_path, a_jsonl_gz=gzip.compress(rows)[:-20], b_jsonl=b"1\n")
    found: set[str] = set()
    for workers, size_bytes in ((1, 64 * 2**20), (1, SMALL), (2, SMALL), (4, LARGE)):
        sized(size_bytes)
        with pytest.raises(StageError) as raised:
            run(tmp_path, {}, workers)
        assert raised.value.fault is Fault.BROKEN_FILE
        found.add(str(raised.value))
    assert len(found) == 1


def test_too_many_broken_rows_end_the_job_at_the_same_row_however_many_workers_there_are(
    tmp_path: Path, sized: Any
) -> None:
    refused = jsonl([chat("refused", "a")]) * 800
    broken = b"1\n" * 800
    write_model(tmp_path / "model", template=refuse("refused") + CHATML)
    put(tmp_path, a_jsonl=jsonl(chats(300)) + broken + refused, b_jsonl=broken * 4)
    found: list[object] = []
    for workers, size_bytes in ((1, 64 * 2**20), (1, SMALL), (2, SMALL), (4, LARGE)):
        sized(size_bytes)
        with pytest.raises(StageError) as raised:
            run(tmp_path, {"preprocessing": {"onBadRow": "Quarantine", "maxBrokenFraction": 0.5}}, workers)
        report = report_of(tmp_path)
        decisions = (tmp_path / "out" / "bot-1a2b3" / ".job" / "decisions.jsonl").read_bytes()
        told = raised.value.args_by_name
        assert (report["rows_in"], sum(report["dropped"].values())) == (told["rows"], told["broken"])
        found.append((told, decisions))
    assert found[0] == found[1] == found[2] == found[3]
    assert 1000 <= int(told["broken"]) < 4800, "not all rows are read in vain"


@pytest.mark.parametrize(
    ("sent", "error"), [(signal.SIGKILL, MemoryError), (signal.SIGSEGV, RuntimeError), (signal.SIGSTOP, RuntimeError)]
)
def test_a_worker_that_is_killed_or_says_nothing_ends_the_attempt_and_no_process_is_left(
    sent: signal.Signals, error: type[Exception], tmp_path: Path, sized: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(600)))
    sized(SMALL)
    before = below(os.getpid())
    begin = worker_pool.Worker.begin

    def signalled(self: Any, job: Any) -> None:
        begin(self, job)
        self.process.send_signal(sent)

    monkeypatch.setattr(worker_pool, "SILENCE_S", 1.0)
    monkeypatch.setattr(worker_pool.Worker, "begin", signalled)
    with pytest.raises(error, match="partition_worker"):
        run(tmp_path, {}, 2)
    gone(below(os.getpid()) - before)


SCRIPT = """
import sys, pathlib
sys.path[:0] = [{support!r}]
import test_prepare_partitions as tests
from finetune_trainer.data import partitions
from finetune_trainer import kept_partitions
partitions.MIN_PARTITION_BYTES = partitions.MAX_PARTITION_BYTES = tests.SMALL
keep = kept_partitions.KeptPartitions.keep
kept = []
def told(self, *given):
    keep(self, *given)
    kept.append(1)
    if len(kept) == 3:
        print("kept", flush=True)
        sys.stdin.read()
kept_partitions.KeptPartitions.keep = told
tests.run(pathlib.Path({folder!r}), tests.STARTED, {workers})
"""
STARTED: dict[str, Any] = {"method": {"type": "CPT"}}


def killed_in_the_middle(folder: Path, workers: int) -> set[int]:
    """Prepare in a process of its own, kill it once three partitions are kept; return its children."""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")])
    script = SCRIPT.format(support=str(Path(__file__).parent), folder=str(folder), workers=workers)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([paths, os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "kept\n"
    children = below(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return children


def gone(processes: set[int]) -> None:
    """Wait until none of the processes is there any more."""
    deadline_s = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in processes) and time.monotonic() < deadline_s:
        os.sched_yield()
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()], "children end with their parents"


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "bot-1a2b3" / ".job" / "report.json").read_bytes())


def below(pid: int) -> set[int]:
    found: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found |= {child} | below(child)
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_a_prepare_that_is_killed_goes_on_where_it_was(workers: int, tmp_path: Path, sized: Any) -> None:
    text_files(tmp_path)
    write_model(tmp_path / "model")
    sized(SMALL)
    run(tmp_path, STARTED, 1)
    whole = left(tmp_path)
    gone(killed_in_the_middle(tmp_path, workers))
    folder = tmp_path / "out" / "bot-1a2b3" / ".job" / "partitions"
    (folder / ".finetune-1").write_bytes(b"half of a partition that was being kept")
    run(tmp_path, STARTED, 2, attempt=2)
    assert [*folder.iterdir()] == []
    report = report_of(tmp_path)
    assert 0 < report["kept_rows"] < report["rows_in"]
    assert left(tmp_path) == whole, "and its partitions are gone"


def made(folder: Path) -> dict[str, str]:
    """Return what is left, but for the partitions, which tell of the time that they took."""
    return {name: digest for name, digest in left(folder).items() if not name.startswith("partitions/")}


BORN = datetime(2026, 1, 1, tzinfo=UTC)


def test_parts_are_known_by_their_rows_and_by_what_reads_them_and_not_by_the_time(tmp_path: Path, sized: Any) -> None:
    rows = chats(400)
    put(tmp_path, a_jsonl=jsonl(rows))
    sized(SMALL)

    def kept(spec: dict[str, Any], born: datetime) -> int:
        with pytest.MonkeyPatch.context() as patch:
            keep_partitions(patch)
            run(tmp_path, spec, 1, born=born)
        return report_of(tmp_path)["kept_rows"]

    assert kept({}, BORN) == 0
    assert kept({}, BORN + timedelta(days=40)) == 400, "the time of the job's creation is told by no row"
    assert kept({"preprocessing": {"maxSequenceLength": 64}}, BORN) == 0, "another limit may make other rows"
    put(tmp_path, a_jsonl=jsonl([*rows[:390], *chats(10, 5000)]))
    assert 0 < kept({}, BORN) < 390, "what was written meanwhile is read"
    taken = made(tmp_path)
    shutil.rmtree(tmp_path / "out")
    assert kept({}, BORN) == 0
    assert made(tmp_path).items() <= taken.items(), "as if nothing had been kept"


def test_parts_of_a_template_that_tells_the_time_are_known_by_it(tmp_path: Path, sized: Any) -> None:
    write_model(tmp_path / "model", template="{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    put(tmp_path, a_jsonl=jsonl(chats(200)))
    sized(SMALL)
    found: list[int] = []
    for born in (BORN, BORN, BORN + timedelta(days=40)):
        with pytest.MonkeyPatch.context() as patch:
            keep_partitions(patch)
            run(tmp_path, {}, 1, born=born)
        found.append(report_of(tmp_path)["kept_rows"])
    assert found == [0, 200, 0]


def test_how_far_several_workers_have_come_is_told(tmp_path: Path, sized: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [{"text": prose(i, words=1800)} for i in range(360)]
    put(tmp_path, a_jsonl=jsonl(pages[:180]), b_jsonl=jsonl(pages[180:]))
    sized(400_000)
    heard: list[Progress] = []
    update = Reporter.update

    def update_and_listen(self: Reporter, **fields: object) -> None:
        update(self, **fields)
        heard.append(self.progress())

    monkeypatch.setattr(Reporter, "update", update_and_listen)
    run(tmp_path, STARTED, 2)
    total = sum(path.stat().st_size for path in (tmp_path / "data").iterdir())
    reading = [each for each in heard if each.activity == "Reading" and each.bytes_total]
    for name in ("bytes_read", "rows_read"):
        told = [getattr(each, name) for each in reading]
        assert told == sorted(told), f"{name} does not fall"
        assert len(set(told)) >= 4
    for each in reading:
        assert each.bytes_total == total
        assert (each.eta_seconds is not None) == (each.bytes_read > 0)
        assert each.rows_per_second is not None
    assert (reading[-1].rows_read, reading[-1].bytes_read, reading[-1].eta_seconds) == (360, total, 0)


def test_rows_are_read_again_where_one_process_takes_the_library_that_another_has_found_to_be_wrong(
    tmp_path: Path, sized: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(400)))
    sized(SMALL)
    said = iter([Choice(FAST, "the same"), Choice(HUGGING_FACE, "it gives other ids", True)])
    answer = worker_pool.Worker.answer

    def chosen(self: Any, frame: bytes | None) -> Any:
        found = answer(self, frame)
        if isinstance(found, PartitionResult):
            found.choice = next(said, found.choice)
        return found

    monkeypatch.setattr(worker_pool.Worker, "answer", chosen)
    run(tmp_path, {}, 2)
    words = "fastokens gave other ids for a row, so all rows were read again"
    assert report_of(tmp_path)["tokenizer"] == {"library": HUGGING_FACE, "reason": words}


@pytest.mark.parametrize("name", ["row_words.py", "pipeline.py"])
def test_no_part_is_taken_that_other_code_has_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes

    def changed(self: Path) -> bytes:
        return read(self) + b"\n" if self.name == name else read(self)

    before = kept_partitions.code_digest()
    monkeypatch.setattr(Path, "read_bytes", changed)
    assert kept_partitions.code_digest() != before


def test_fields_that_are_passed_over_are_counted_the_same_however_rows_are_cut(tmp_path: Path, sized: Any) -> None:
    names = sorted(METADATA)
    rows = [
        chat(f"{i} and one?", f"{i + 1}") | dict.fromkeys([names[(i * 7 + n) % len(names)] for n in range(30)], "x")
        for i in range(120)
    ]
    put(tmp_path, a_jsonl=jsonl(rows))
    found: list[Any] = []
    for workers, size_bytes in ((1, 64 * 2**20), (1, SMALL), (2, SMALL)):
        sized(size_bytes)
        run(tmp_path, {}, workers)
        found.append(report_of(tmp_path)["ignored_fields"])
    assert found[0] == found[1] == found[2]


def test_a_store_that_is_away_for_a_moment_while_parts_are_kept_ends_no_attempt_but_one_that_is_superseded_does(
    tmp_path: Path, sized: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(200)))
    sized(SMALL)
    said = iter([Fault.STORAGE_UNAVAILABLE])
    check = Fence.check

    def away(self: Fence) -> None:
        if (fault := next(said, None)) is not None:
            args = {"action": "read", "uri": "u", "tries": 1, "seconds": 1, "problem": "p", "newer": 2, "own": 1}
            raise StageError(fault, **args)
        check(self)

    monkeypatch.setattr(Fence, "check", away)
    run(tmp_path, {}, 1)
    assert next(said, None) is None
    assert report_of(tmp_path)["rows_in"] == 200
    said = iter([Fault.SUPERSEDED])
    with pytest.raises(StageError) as caught:
        run(tmp_path, {}, 1)
    assert caught.value.fault is Fault.SUPERSEDED


def run_on_disk(folder: Path, disk_bytes: int, memory_bytes: int = 4 * GIB) -> prepare.RunResult:
    return prepare.run(with_workers(context(folder, {"method": {"type": "CPT"}}), 1, memory_bytes, disk_bytes))


def test_a_disk_that_cannot_suffice_is_refused_as_soon_as_that_is_sure(tmp_path: Path, sized: Any) -> None:
    texts = [{"text": f"{i} {prose(i, words=3 * (1 + i % 90))}"} for i in range(400)]
    put(tmp_path, a_jsonl=jsonl(texts))
    sized(SMALL)
    run_on_disk(tmp_path, 10 * GIB)
    used = report_of(tmp_path)["disk_bytes"]
    at_least = used["rows"] + used["arrays"]
    run_on_disk(tmp_path, used["most"])
    refused: list[tuple[int, str]] = []
    for disk_bytes in (used["rows"] // 2, int(at_least * 0.9)):
        with pytest.raises(StageError) as raised:
            run_on_disk(tmp_path, disk_bytes)
        assert raised.value.fault is Fault.PREPARE_TOO_SMALL
        assert raised.value.args_by_name["field"] == "resources.prepare.disk"
        words = str(raised.value.args_by_name["what"])
        refused.append((int(words.split()[-2] if words.endswith("rows") else words.split()[2]), words))
    (first, _), (last, words) = refused
    assert 0 < first < 400, "in the middle, while rows are read"
    assert (last, words) == (400, "disk for 400 rows and their arrays"), "before they are written"


def test_a_table_that_is_larger_than_the_disk_is_refused_before_a_row_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"text": [os.urandom(500).hex() for _ in range(100)]}), tmp_path / "data" / "a.parquet")
    size_bytes = (tmp_path / "data" / "a.parquet").stat().st_size
    with pytest.raises(StageError) as raised:
        run_on_disk(tmp_path, size_bytes - 1)
    assert raised.value.fault is Fault.PREPARE_TOO_SMALL
    assert raised.value.args_by_name["what"] == "disk for its largest Parquet file"
    assert not disk.size_of(tmp_path / "work" / "1" / "spool"), "nothing was read"


def test_an_order_that_would_not_fit_into_memory_is_refused(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(TEXTS))
    with pytest.raises(StageError) as raised:
        run_on_disk(tmp_path, GIB, memory_bytes=2**28)
    assert raised.value.fault is Fault.PREPARE_TOO_SMALL
    assert raised.value.args_by_name["field"] == "resources.prepare.memory"


@pytest.mark.parametrize("name", ["use", "hashes", "copy_of", "batches.safetensors"])
def test_a_disk_that_is_full_when_a_file_is_mapped_is_told_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, a_jsonl=jsonl(TEXTS))
    reserve = os.posix_fallocate

    def full(file: int, offset: int, size_bytes: int) -> None:
        if os.readlink(f"/proc/self/fd/{file}").endswith("/" + name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(file, offset, size_bytes)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StageError) as raised:
        run_on_disk(tmp_path, GIB)
    assert raised.value.fault is Fault.DISK_FULL
