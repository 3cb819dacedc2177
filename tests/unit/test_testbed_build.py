"""Images and packages of the test cluster are made beside its programs, which take longest."""

import subprocess
import threading
from pathlib import Path

import pytest

from testbed import debian
from waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


def test_images_are_made_beside_the_programs_not_after_them() -> None:
    told = subprocess.run(
        ["make", "--dry-run", "images"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=True
    ).stdout
    assert "testbed build-image" in told
    assert "testbed build\n" not in told


def test_packages_that_two_need_at_once_are_installed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    askers: set[int] = set()
    both_asked = threading.Event()
    installed: list[list[str]] = []

    def missing(*, node: bool) -> list[str]:
        assert node
        askers.add(threading.get_ident())
        if len(askers) == 2:
            both_asked.set()
        return [] if installed else ["runc"]

    def install(wanted: list[str]) -> None:
        assert both_asked.wait(PATIENCE_S)
        installed.append(wanted)

    monkeypatch.setattr(debian, "missing", missing)
    monkeypatch.setattr(debian, "_install", install)
    threads = [threading.Thread(target=debian.ensure_packages, kwargs={"node": True}) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)

    assert installed == [["runc"]]
