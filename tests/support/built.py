"""The test cluster's programs are built by `make testbed`, never by a test: it takes longer than pytest waits."""

from pathlib import Path

import pytest

import testbed
from testbed import binaries


def require_testbed(*, node: bool) -> None:
    """Fail at once, and say what to type, where something is not installed or built yet."""
    if missing := testbed.missing(node=node):
        _fail(", ".join(missing))


def require_program(name: str) -> str:
    """Path of a built program; fails at once where it is not built yet."""
    if not Path(path := binaries.binary(name)).exists():
        _fail(name)
    return path


def _fail(missing: str) -> None:
    pytest.fail(f"the test cluster's programs are not there ({missing}); run: make testbed", pytrace=False)
