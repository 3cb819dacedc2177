"""Every command that documentation, notes and the Makefile name works as typed in the root of the repository."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


def _modules() -> list[str]:
    """Modules of this repository's tools that some file tells people to run."""
    pages = [ROOT / "Makefile", ROOT / ".ci/run", *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    pages += [page for tool in ("bench", "demo", "testbed") for page in (ROOT / tool).glob("**/*") if page.is_file()]
    texts = [page.read_text() for page in pages if page.suffix in {"", ".md", ".py"}]
    named = re.compile(r"-m (bench\.\w+|demo(?:\.\w+)?|testbed)\b")
    return sorted({name for text in texts for name in named.findall(text)})


def test_the_tools_are_found() -> None:
    assert {"bench.operator", "bench.startup", "bench.throughput", "demo", "demo.assets", "testbed"} <= set(_modules())


@pytest.mark.parametrize("module", _modules())
def test_a_tool_that_is_named_somewhere_starts_without_pythonpath(module: str) -> None:
    # The testbed is there before anything is installed.
    bare = ["-S"] if module == "testbed" else []
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *bare, "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
