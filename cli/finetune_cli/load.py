"""Reads a job's file. YAML 1.2, as kubectl reads numbers: 2e-4 is a number."""

import json
from pathlib import Path
from typing import Any, cast

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from finetune_api.names import KIND
from finetune_api.redact import shortened
from finetune_cli.errors import CommandError, Exit

MAX_FILE_BYTES = 1 << 20


def load_job(path: Path) -> dict[str, Any]:
    """Return the one FineTuneJob in a file, which may hold other objects too.

    Raises CommandError as `load_jobs`, and when there are several.
    """
    jobs = load_jobs(path)
    if len(jobs) != 1:
        raise CommandError(f"{path} has {len(jobs)} objects of kind {KIND}; write one", Exit.USAGE)
    return jobs[0]


def load_jobs(path: Path) -> list[dict[str, Any]]:
    """Return the FineTuneJobs in a file, which may hold other objects too.

    Raises CommandError when the file is not readable, is no YAML, or has no job.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}", Exit.USAGE) from error
    if len(content) > MAX_FILE_BYTES:
        raise CommandError(f"{path} is larger than {MAX_FILE_BYTES} bytes; this is no job", Exit.USAGE)
    try:
        documents: list[Any] = list(YAML(typ="safe", pure=True).load_all(content.decode()))
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not UTF-8 text", Exit.USAGE) from error
    except MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise CommandError(f"{path}{line}: {error.problem}", Exit.USAGE) from error
    except YAMLError as error:
        raise CommandError(f"{path} is no YAML: {shortened(str(error), 200)}", Exit.USAGE) from error
    except RecursionError as error:
        raise CommandError(f"{path} is nested too deeply; this is no job", Exit.USAGE) from error
    except ValueError as error:  # such as the date 2024-13-45, or a number of 5,000 digits
        raise CommandError(
            f"{path} is no YAML: {shortened(str(error), 200)}; quote what is a word", Exit.USAGE
        ) from error
    jobs = [cast(dict[str, Any], one) for one in documents if isinstance(one, dict) and one.get("kind") == KIND]
    if not jobs:
        raise CommandError(f"{path} has no objects of kind {KIND}; write one", Exit.USAGE)
    try:
        return cast(list[dict[str, Any]], json.loads(json.dumps(jobs, allow_nan=False, default=str)))
    except (ValueError, TypeError) as error:
        raise CommandError(f"{path}: {error}; write plain numbers, words and lists", Exit.USAGE) from error
