"""Preparing documents, against datatrove and `datasets.map`: `python -m bench.documents [--megabytes 40] [--write]`.

The documents are the texts of HTML pages of Debian's documentation packages, taken out once and kept in the cache. All
do the same to them: put characters right, tell the language, judge repetition and quality (Gopher), find exact copies,
tokenise, write. Peers have an environment of their own. Each program runs in a process of its own on one core, on the
whole and on an eighth of it; speed is the CPU time of what the whole has more, so starting does not count.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench import tables
from bench.data import SIZES, prepare_here
from bench.document_texts import ensure_texts
from bench.environments import python_with

ROOT = Path(__file__).resolve().parents[1]
PEERS = (
    "datatrove[io,processing]==0.10.0",
    "spacy",
    "orjson",
    "datasets==4.8.4",
    "tokenizers==0.22.2",
    "ftfy==6.3.1",
    "py3langid==0.4.0",
)
_TIMEOUT_S = 3600
_PEER_SCRIPT = ROOT / "bench" / "document_peers.py"
_NAMES = {
    "ours": "finetune-operator: prepare of a CPT job",
    "datatrove": "datatrove, and tokenizers",
    "map": "`datasets.map`, and tokenizers",
}


@dataclass(frozen=True)
class Run:
    """What one process tree took. rows: that were left of the documents."""

    cpu_s: float
    peak_bytes: int
    rows: int


def measure(who: str, texts: Path, model: Path) -> Run:
    """Prepare texts by one program on one core."""
    with tempfile.TemporaryDirectory(prefix="bench-documents-") as folder:
        if who == "ours":
            command = [sys.executable, "-m", "bench.documents", "--ours", str(texts), str(model), folder]
        else:
            command = [str(python_with(PEERS)), "-P", str(_PEER_SCRIPT), who, str(texts), str(model), folder]
        env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        env |= {"HF_HOME": folder} | ({"PYTHONPATH": str(ROOT)} if who == "ours" else {})
        every = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(every)})
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            done = subprocess.run(command, env=env, cwd=folder, capture_output=True, timeout=_TIMEOUT_S, check=False)
        finally:
            os.sched_setaffinity(0, every)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode != 0:
            raise SystemExit(f"{who} failed:\n{done.stderr.decode()[-3000:]}")
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        facts = json.loads(done.stdout.splitlines()[-1])
    return Run(cpu_s, facts["peak_bytes"], facts["rows"])


def ours(texts: Path, model: Path, folder: Path) -> dict[str, int]:
    """Prepare in this process."""
    spec = {
        "method": {"type": "CPT"},
        "datasets": [{"uri": texts.as_uri()}],
        "preprocessing": {"quality": {"preset": "Web", "maxDroppedFraction": 1}},
    }
    report = prepare_here(folder, model, spec, cpu_count=1)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + children
    return {"rows": report["rows_in"] - sum(report["dropped"].values()), "peak_bytes": peak * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=40, help="of texts")
    parser.add_argument("--without", nargs="*", choices=("datatrove", "map"), default=[])
    parser.add_argument("--write", action="store_true", help="write results/documents.md")
    parser.add_argument("--ours", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ours:
        print(json.dumps(ours(*arguments.ours)))
        return
    from demo.assets import ensure_model

    model, size_bytes = ensure_model(), int(arguments.megabytes * 1e6)
    names = [name for name in _NAMES if name not in arguments.without]
    with tempfile.TemporaryDirectory(prefix="bench-documents-texts-") as temporary:
        small, whole = (ensure_texts(Path(temporary), size) for size in (size_bytes // SIZES, size_bytes))
        more_bytes = whole.stat().st_size - small.stat().st_size
        runs: dict[str, tuple[Run, Run]] = {}
        for name in names:
            runs[name] = measure(name, small, model), measure(name, whole, model)
            spent = runs[name][1].cpu_s - runs[name][0].cpu_s
            print(f"{name}: {more_bytes / 1e6 / spent:.2f} MB/s of CPU", file=sys.stderr, flush=True)
    body = _body(runs, more_bytes, size_bytes)
    if arguments.write:
        command = f"python -m bench.documents --megabytes {arguments.megabytes:g} --write"
        tables.write(
            "documents", "Preparing documents", command, ["tokenizers", "fastokens", "ftfy", "py3langid"], body
        )
    else:
        print(body)


def _body(runs: dict[str, tuple[Run, Run]], more_bytes: int, size_bytes: int) -> str:
    speeds = {name: more_bytes / 1e6 / (whole.cpu_s - small.cpu_s) for name, (small, whole) in runs.items()}
    peer = speeds.get("datatrove")
    rows = [
        [
            _NAMES[name],
            f"{speeds[name]:.2f}",
            f"{speeds[name] / peer:.1f} x" if peer else "",
            f"{runs[name][1].rows:,}",
            *(f"{run.peak_bytes / 2**20:,.0f}" for run in runs[name]),
        ]
        for name in runs
    ]
    header = ["", "MB per second of CPU", "of datatrove", "documents left", "memory 1x, MiB", "memory 8x, MiB"]
    return (
        f"{size_bytes / 1e6:g} MB of texts of Debian's documentation, and an eighth of them, on one core; speed is "
        "that of what the whole has more. All repair characters (ftfy), tell languages (py3langid; for datatrove "
        "inside a filter of its own), filter by Gopher's rules of quality and repetition, look for exact copies and "
        "tokenise with SmolLM2's tokenizer. Ours also judges by C4's and FineWeb's rules, looks for near copies and "
        "personal data, accounts for every row, divides rows into training and held-out ones and plans all steps.\n\n"
        + tables.table(header, rows)
    )


if __name__ == "__main__":
    main()
