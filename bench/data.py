"""Preparing rows: this checkout, the commit that the data room began with, and TRL, on the same rows, in turns.

Rows are conversations cut from real text (Python's own sources and the demo's dataset), the same each time. Each run is
a process of its own, of an eighth of the rows and of all of them; what more rows cost more is the speed, in MB for each
second of CPU of the whole process tree, so that starting does not count. Prepare's own processes
tell the parts; the tree's memory is that of both sizes. Fails where both commits make other numbers of tokens, but for
1 in 10,000.
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from bench import tables
from bench.data_parts import cpu_s_by_part

BASE = "723dcf3"
ROOT = Path(__file__).resolve().parents[1]
SIZES = 8  # the smaller size is so many times as small
_TIMEOUT_S = 3600
_SAMPLE_S = 0.1
_MAX_LENGTH = 2048
_MOST_OTHER_TOKENS = 1e-4  # of all: ours puts damaged characters right, which the base commit did not
_PARTS = {
    "render_worker": "render",
    "tokenizer_worker": "tokenise",
    "partition_worker": "check, label, write, where several processes do it",
}
_OWN = "prepare itself: read and merge, and the rest where one process does all"


def write_rows(path: Path, size_bytes: int) -> None:
    """Write conversations of one to three turns until there are so many bytes."""
    from demo.rows import good_rows

    generator = random.Random(0)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [source.read_text(errors="ignore") for source in sources]
    texts += [message["content"] for row in good_rows() for message in row["messages"]]
    pieces: list[str] = []
    for text in texts:
        begin = 0
        while begin < len(text):
            size = generator.choice((80, 200, 500, 1000, 1600))
            if piece := text[begin : begin + size].strip():
                pieces.append(piece)
            begin += size
    with path.open("wb") as file:
        written = 0
        while written < size_bytes:
            messages = [
                {"role": role, "content": generator.choice(pieces)[: 400 if role == "user" else None]}
                for _ in range(generator.choice((1, 1, 2, 3)))
                for role in ("user", "assistant")
            ]
            written += file.write(json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n")


@dataclass
class Run:
    """What one process tree took. cpu_s: by part; tokens: of all rows it used, None for TRL."""

    wall_s: float = 0.0
    cpu_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    peak_bytes: int = 0
    tokens: int | None = None
    library: str = ""

    @property
    def whole_cpu_s(self) -> float:
        return sum(self.cpu_s.values())


class _Watch(threading.Thread):
    """Samples the CPU time and memory of a process and all below it, until it ends."""

    def __init__(self, process: psutil.Process, run: Run) -> None:
        super().__init__(daemon=True)
        self._process, self._run = process, run
        self._seen: dict[int, tuple[str, float]] = {}
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(_SAMPLE_S):
            held_bytes = 0
            for each in self._tree():
                try:
                    times, words = each.cpu_times(), " ".join(each.cmdline())
                    held_bytes += each.memory_info().rss
                except psutil.Error:
                    continue
                # A child that has ended but was not waited for has no words any more.
                known, _ = self._seen.get(each.pid, (_OWN, 0.0))
                part = next((part for name, part in _PARTS.items() if name in words), _OWN if words else known)
                self._seen[each.pid] = part, times.user + times.system
            self._run.peak_bytes = max(self._run.peak_bytes, held_bytes)
        for part, cpu_s in self._seen.values():
            self._run.cpu_s[part] += cpu_s

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self._process, *self._process.children(recursive=True)]
        except psutil.Error:
            return []


def measure(who: str, rows: Path, model: Path, code: Path, cores: int) -> Run:
    """Prepare rows by one program in a process of its own."""
    run = Run()
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        command = [sys.executable, "-m", "bench.data", "--one", who, "--folder", folder, str(rows), str(model)]
        paths = [str(code / part) for part in ("api", "trainer")]
        env = os.environ | {"PYTHONPATH": ":".join([*paths, str(ROOT)]), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        every = os.sched_getaffinity(0)
        began_s = time.monotonic()
        os.sched_setaffinity(0, set(sorted(every)[:cores]))
        try:
            process = subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        finally:
            os.sched_setaffinity(0, every)
        watch = _Watch(psutil.Process(process.pid), run)
        watch.start()
        try:
            told, errors = process.communicate(timeout=_TIMEOUT_S)
        finally:
            process.kill()
            watch.ended.set()
            watch.join()
        run.wall_s = time.monotonic() - began_s
        if process.returncode != 0:
            raise SystemExit(f"{who} failed:\n{errors.decode()[-3000:]}")
        facts = json.loads(told.splitlines()[-1])
        run.tokens, run.library = facts["tokens"], facts["library"]
    return run


def one(who: str, rows: Path, model: Path, folder: Path) -> dict[str, object]:
    """Prepare rows in this process, by the code that PYTHONPATH names."""
    return _trl(rows, model, folder) if who == "trl" else _prepare(rows, model, folder)


def _prepare(rows: Path, model: Path, folder: Path) -> dict[str, object]:
    spec = {
        "method": {"type": "SFT"},
        "datasets": [{"uri": rows.as_uri()}],
        "preprocessing": {"maxSequenceLength": _MAX_LENGTH},
        "evaluation": {"holdoutFraction": 0.01},
    }
    report = prepare_here(folder, model, spec, cpu_count=2)
    return {"tokens": report["lengths"]["tokens"], "library": report.get("tokenizer", {}).get("library", "tokenizers")}


def prepare_here(folder: Path, model: Path, spec: dict[str, Any], cpu_count: int) -> dict[str, Any]:
    """Prepare in this process, as its container does but for the judgement of the model; return report.json."""
    from finetune_api.layout import REPORT, join
    from finetune_api.run import CONTRACT_VERSION, RunConfig
    from finetune_trainer.__main__ import main

    _leave_out_the_model(model)
    config = RunConfig.model_validate(
        {
            "contract_version": CONTRACT_VERSION,
            "job": {"name": "bench", "namespace": "bench", "uid": "1a2b3c4d"},
            "spec": {**spec, "model": {"uri": model.as_uri()}, "output": {"uri": (folder / "out").as_uri()}},
            "run_uri": (folder / "out" / "bench").as_uri(),
            "storage": {},
            "resources": {"cpu_count": cpu_count, "memory_bytes": 16 * 2**30, "disk_bytes": 50 * 2**30, "gpus": 0},
            "work_dir": str(folder / "work"),
            "http_port": 0,
            "termination_log": str(folder / "termination-log"),
        }
    )
    (folder / "run.json").write_text(config.to_json())
    code = main(["prepare", "--config", f"{folder}/run.json", "--attempt", "1", "--result", f"{folder}/result.json"])
    if code != 0:
        raise SystemExit((folder / "result.json").read_text())
    return json.loads(Path(join(config.run_uri, REPORT).removeprefix("file://")).read_bytes())


def _leave_out_the_model(model: Path) -> None:
    """Have the model's structure not judged, which loads torch: the base commit did not do it."""
    if importlib.util.find_spec("finetune_trainer.data.structure") is None:
        return
    from finetune_trainer.data import structure

    config = json.loads((model / "config.json").read_bytes())
    sizes = {name: value for name, value in config.items() if type(value) is int}
    report = structure.LoadReport(architecture=config["architectures"][0], sizes=sizes)
    structure.load_without_values = lambda _: report


def _trl(rows: Path, model: Path, folder: Path) -> dict[str, object]:
    """Let TRL render and tokenise, as its SFTTrainer does before training; its model is tiny."""
    from datasets import load_dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    config = AutoConfig.from_pretrained(model)
    config.update({"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1})
    config.update({"num_key_value_heads": 1, "head_dim": 64})
    SFTTrainer(
        model=AutoModelForCausalLM.from_config(config),
        args=SFTConfig(output_dir=str(folder), max_length=_MAX_LENGTH, report_to=[], use_cpu=True, bf16=False),
        train_dataset=load_dataset("json", data_files=str(rows), split="train", cache_dir=str(folder / "cache")),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    return {"tokens": None, "library": "tokenizers"}


def speed(small: list[Run], whole: list[Run], size_bytes: int) -> float:
    """Return MB that are prepared in a second of CPU, beyond what the smaller size takes."""
    more_bytes = size_bytes * (SIZES - 1) / SIZES
    more_s = median(run.whole_cpu_s for run in whole) - median(run.whole_cpu_s for run in small)
    return more_bytes / 1e6 / more_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=10, help="of rows; the table in results/ is of 100")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--without", nargs="*", choices=("base", "trl"), default=[])
    parser.add_argument("--write", action="store_true", help="write results/data.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        rows, model = arguments.paths
        print(json.dumps(one(arguments.one, rows, model, arguments.folder)))
        return
    from demo.assets import ensure_model

    model, size_bytes = ensure_model(), int(arguments.megabytes * 1e6)
    names = [name for name in ("ours", "base", "trl") if name not in arguments.without]
    runs: dict[tuple[str, str], list[Run]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="bench-data-rows-") as temporary:
        folder = Path(temporary)
        sizes = {"1x": size_bytes // SIZES, "8x": size_bytes}
        for name, size in sizes.items():
            (folder / name).mkdir()
            write_rows(folder / name / "rows.jsonl", size)
        archive = subprocess.run(["git", "archive", BASE], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=BytesIO(archive)) as tar:
            tar.extractall(folder / "base", filter="data")
        for _ in range(arguments.runs):
            for name in names:
                for size in sizes:
                    code = folder / "base" if name == "base" else ROOT
                    run = measure(name, folder / size / "rows.jsonl", model, code, cores=os.cpu_count() or 1)
                    runs[name, size].append(run)
                    told = f"{run.wall_s:.1f} s, {run.whole_cpu_s:.1f} s of CPU, load {os.getloadavg()[0]:.1f}"
                    print(f"{name} {size}: {told}", file=sys.stderr, flush=True)
        one_core = [measure("ours", folder / size / "rows.jsonl", model, ROOT, cores=1) for size in sizes]
        parts = cpu_s_by_part(folder / "1x" / "rows.jsonl", model, folder)
    tokens = {name: runs[name, "8x"][0].tokens or 0 for name in names if name != "trl"}
    if max(tokens.values()) - min(tokens.values()) > _MOST_OTHER_TOKENS * max(tokens.values()):
        raise SystemExit(f"not the same tokens, so this is not the same work: {tokens}")
    body = _body(names, runs, size_bytes, one_core, parts)
    if arguments.write:
        command = f"python -m bench.data --megabytes {arguments.megabytes:g} --runs {arguments.runs} --write"
        tables.write("data", "Preparing rows", command, ["tokenizers", "fastokens", "transformers", "trl"], body)
    else:
        print(body)


_NAMES = {"ours": "finetune-operator", "base": f"finetune-operator at {BASE}", "trl": "TRL SFTTrainer"}


def _body(
    names: list[str],
    runs: dict[tuple[str, str], list[Run]],
    size_bytes: int,
    one_core: list[Run],
    parts_s: dict[str, float],
) -> str:
    speeds = {name: speed(runs[name, "1x"], runs[name, "8x"], size_bytes) for name in names}
    header = ["", "read by", "MB per second of CPU", "of " + BASE, "wall, s", "memory 1x, MiB", "memory 8x, MiB"]
    rows = [
        [
            _NAMES[name],
            runs[name, "8x"][0].library,
            f"{speeds[name]:.2f}",
            f"{speeds[name] / speeds['base']:.1f} x" if "base" in speeds else "",
            tables.spread([run.wall_s for run in runs[name, "8x"]]),
            *(f"{median(run.peak_bytes for run in runs[name, size]) / 2**20:,.0f}" for size in ("1x", "8x")),
        ]
        for name in names
    ]
    ours = [name for name in names if name != "trl"]
    parts = sorted({part for name in ours for run in runs[name, "8x"] for part in run.cpu_s})
    shares = [[part, *(f"{_more_s(runs, name, part):.2f}" for name in ours)] for part in parts]
    small_s, whole_s = (median(run.wall_s for run in runs["ours", size]) for size in ("1x", "8x"))
    more_of_one_s = one_core[1].wall_s - one_core[0].wall_s
    each = {part: [f"{spent_s:.2f}", f"{size_bytes / SIZES / 1e6 / spent_s:.1f}"] for part, spent_s in parts_s.items()}
    return (
        f"SmolLM2-135M-Instruct's tokenizer, {size_bytes / 1e6:g} MB of conversations and an eighth of them; loss on "
        "answers for ours, on all tokens for TRL. Both commits made the same number of tokens but for 1 in 10,000, "
        "or this table is not written.\n\n"
        + tables.table(header, rows)
        + "\n\nSeconds of CPU by process, of seven eighths of the rows:\n\n"
        + tables.table(["", *(_NAMES[name] for name in ours)], shares)
        + "\n\nOurs by part, of the smaller size, in one process and without messages:\n\n"
        + tables.table(["", "CPU, s", "MB/s"], [[part, *cells] for part, cells in each.items()])
        + f"\n\nOurs on {os.cpu_count()} cores takes {whole_s:.1f} s, on one {one_core[1].wall_s:.1f} s, start "
        f"included; for what the larger size has more {whole_s - small_s:.1f} s and {more_of_one_s:.1f} s, so "
        f"{os.cpu_count()} cores are {more_of_one_s / (whole_s - small_s):.2f} x as fast as one. "
        "Memory is that of the whole process tree. The check of the model's structure, which the base commit does not "
        "have and which loads torch, is left out."
    )


def _more_s(runs: dict[tuple[str, str], list[Run]], name: str, part: str) -> float:
    small, whole = (median(run.cpu_s[part] for run in runs[name, size]) for size in ("1x", "8x"))
    return whole - small


if __name__ == "__main__":
    main()
