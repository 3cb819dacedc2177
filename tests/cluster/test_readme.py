"""Every command of README.md and docs/ works as it stands there, after the demo that README begins with."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import testbed
from testbed.binaries import search_path

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/operations.md")
COMMAND_DEADLINE_S = 900.0
DEMO_DEADLINE_S = 1600.0


def commands(page: str) -> list[str]:
    """The lines of all ```sh blocks of a page."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


# `make test` is what runs this test, on every change by `.ci/run`; `make try` and the job it leaves, by
# test_cli_real_run.py.
RUN_ELSEWHERE = {"make demo", "make test", "make try", "finetune run .finetune/try/local.yaml"}
CASES = sorted({command for page in PAGES for command in commands(page)} - RUN_ELSEWHERE)


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[testbed.Cluster, str]]:
    """The cluster after `make demo`, and what it printed."""
    was_up = testbed.find() is not None
    try:
        done = subprocess.run(
            ["make", "demo"], cwd=ROOT, capture_output=True, text=True, timeout=DEMO_DEADLINE_S, check=False
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        cluster = testbed.find()
        assert cluster is not None
        yield cluster, done.stdout
    finally:
        if not was_up:
            testbed.down()


def test_the_demo_ends_with_the_adapter_its_digest_the_rows_and_answers_of_base_and_tuned_model(
    demo: tuple[testbed.Cluster, str],
) -> None:
    end = demo[1].rpartition("== What came out")[2]
    assert re.search(r"^adapter +s3://adapters/quickstart/quickstart-\w{5}/adapter/?$", end, flags=re.MULTILINE)
    assert re.search(r"^digest +sha256:[0-9a-f]{64}$", end, flags=re.MULTILINE)
    assert re.search(r"^data .*803", end, flags=re.MULTILINE)
    assert len(re.findall(r"^ +base ", end, flags=re.MULTILINE)) == 3
    assert len(re.findall(r"^ +tuned ", end, flags=re.MULTILINE)) == 3


@pytest.mark.parametrize("command", CASES)
def test_a_command_of_the_documentation_works(demo: tuple[testbed.Cluster, str], command: str) -> None:
    cluster = demo[0]
    if command.startswith("helm upgrade"):
        command += " --dry-run=server --take-ownership"  # the demo's operator goes on with the demo's values
    env = {
        **os.environ,
        "PATH": f"{ROOT / '.venv' / 'bin'}:{search_path()}",
        "KUBECONFIG": str(cluster.kubeconfig),
        "AWS_ENDPOINT_URL_S3": cluster.s3_endpoint_host,
        "AWS_ACCESS_KEY_ID": cluster.s3_access_key,
        "AWS_SECRET_ACCESS_KEY": cluster.s3_secret_key,
    }
    done = subprocess.run(
        ["bash", "-euc", command],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{(done.stdout + done.stderr)[-4000:]}"
    assert done.stdout.strip()


def test_the_commands_of_the_readme_are_what_ci_and_tests_run() -> None:
    assert set(commands("README.md")) >= RUN_ELSEWHERE
    assert re.search(r"^make --old-file=check test$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
