"""Rules of the repository itself: locks, layout, and what must not be in any file."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
BASE: list[str] = PROJECT["project"]["dependencies"]
ASKED = {
    "dev": [*BASE, *EXTRAS["operator"], *EXTRAS["trainer"], *EXTRAS["cli"], *PROJECT["dependency-groups"]["dev"]],
    "operator": [*BASE, *EXTRAS["operator"]],
    "trainer": [*BASE, *EXTRAS["trainer"]],
    "cli": [*BASE, *EXTRAS["cli"]],
    "uv": ["uv"],
}
# Written in halves, as this file is searched too.
REGISTRY_HOSTS = [
    "pypi" + ".org",
    "files.python" + "hosted.org",
    "proxy.golang" + ".org",
    "registry.npm" + "js.org",
    "deb.debian" + ".org",
    "docker" + ".io",
    "gcr" + ".io",
    "quay" + ".io",
]


def pins(lock: str) -> dict[str, str]:
    """Version by package of a requirements file."""
    text = (ROOT / f"requirements/{lock}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9._-]+)(?:\[[^\]]*\])?==([^ \\;]+)", text, re.MULTILINE))


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=PATIENCE_S)
    return [ROOT / name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("lock", ASKED)
def test_every_dependency_is_locked_at_a_version_that_was_asked_for(lock: str):
    found = pins(lock)
    for requirement in map(Requirement, ASKED[lock]):
        version = found.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in requirements/{lock}.txt: make lock"
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}: make lock"


@pytest.mark.parametrize("lock", ["dev", "operator", "trainer", "cli", "uv", "assets"])
def test_every_locked_package_has_a_hash_and_no_place_to_come_from(lock: str):
    text = (ROOT / f"requirements/{lock}.txt").read_text()
    for block in re.split(r"\n(?=[a-z0-9])", text):
        assert "--hash=sha256:" in block, block[:200]
    assert "index-url" not in text
    assert "find-links" not in text


@pytest.mark.parametrize("lock", ["operator", "trainer", "cli", "uv"])
def test_images_hold_the_versions_that_the_tests_ran_with(lock: str):
    assert pins(lock).items() <= pins("dev").items()


def test_the_operator_is_locked_without_torch_and_object_storage():
    assert not {"torch", "transformers", "numpy", "boto3"} & pins("operator").keys()


def test_the_operator_folder_does_not_shadow_the_stdlib_module():
    assert not (ROOT / "operator/__init__.py").exists()


def test_no_file_names_a_package_registry():
    pattern = re.compile("|".join(map(re.escape, REGISTRY_HOSTS)))
    for path in tracked_files():
        # Go names its modules by host, so the checksum file cannot do without.
        if path.suffix in {".sum", ".mod"}:
            continue
        match = pattern.search(path.read_text(errors="replace"))
        assert match is None, f"{path.relative_to(ROOT)} names {match[0] if match else ''}"


def test_no_file_is_so_large_that_it_should_have_been_made():
    for path in tracked_files():
        assert path.stat().st_size < 1_000_000, path
