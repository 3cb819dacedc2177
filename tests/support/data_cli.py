"""`finetune data check` over a folder, called as the command line does."""

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

import spec_cases
from data_run import write_model
from finetune_api.job import MethodType
from finetune_cli import data
from finetune_cli.errors import CommandError
from finetune_cli.screen import cleaned


def job(tmp: Path, spec: dict[str, Any] | None = None) -> str:
    """Write a job over data/ and model/ in the folder; returns its path."""
    if not (tmp / "model").exists():
        write_model(tmp / "model")
    written = spec_cases.base()
    written["spec"] = {
        "model": {"uri": (tmp / "model").as_uri()},
        "method": {"type": "SFT"},
        "datasets": [{"uri": (tmp / "data").as_uri() + "/"}],
        "output": {"uri": (tmp / "out").as_uri()},
        **(spec or {}),
    }
    (tmp / "job.yaml").write_text(json.dumps(written))
    return str(tmp / "job.yaml")


def check(target: str, model: str | None = None, method: MethodType = MethodType.SFT) -> tuple[int, str]:
    """Return the exit code and what was said, the error included."""
    output = io.StringIO()
    try:
        code = data.check(target, model, method, cleaned(Console(file=output)))
    except CommandError as error:
        return error.code, f"{output.getvalue()}{error}"
    return code, output.getvalue()
