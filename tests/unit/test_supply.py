"""What is shipped is known: locked by hash, on a base named by digest, under licences that users may accept."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]
SHIPPED = ("operator", "trainer", "cli")
# Packages whose metadata name no licence; each was read in its files.
READ_BY_A_PERSON = {
    "cel-python": "Apache-2.0",
    "cuda-toolkit": "NVIDIA's, a package without files",
    "fastokens": "Apache-2.0; PCRE2 inside, BSD",
}
# Packages whose metadata name the GPL beside other licences.
COPYLEFT_IN_PART = {"docutils": "public domain and BSD; the file under the GPL, for Emacs, is not in its wheel"}
_COPYLEFT = re.compile(r"\bA?GPL|(?<!Lesser )General Public|Affero", re.IGNORECASE)


def locked(name: str) -> dict[str, str]:
    """Return package -> version of one lock."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    found = [Requirement(line.rstrip("\\ ")) for line in lines if re.match(r"[a-zA-Z0-9]", line)]
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in found}


def is_copyleft(licence: str) -> bool:
    """Tell GPL and AGPL from all others, the LGPL among them."""
    return bool(_COPYLEFT.search(licence))


@pytest.mark.parametrize(
    ("licence", "refused"),
    [
        ("GPL-3.0-only", True),
        ("GNU General Public License v2 (GPLv2)", True),
        ("AGPL-3.0", True),
        ("GNU Affero General Public License v3", True),
        ("MIT OR GPL-2.0", True),
        ("LGPL-2.1", False),
        ("GNU Lesser General Public License v3 (LGPLv3)", False),
        ("Apache-2.0", False),
        ("MPL-2.0 AND MIT", False),
    ],
)
def test_gpl_and_agpl_are_told_from_other_licences(licence: str, refused: bool) -> None:
    assert is_copyleft(licence) is refused


def test_no_package_that_is_shipped_is_under_the_gpl_or_agpl_and_each_has_a_licence() -> None:
    tool = Path(sys.executable).with_name("pip-licenses")
    command = [str(tool), "--with-system", "--from=mixed", "--format=json"]
    told = json.loads(subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=True).stdout)
    licences = {str(canonicalize_name(one["Name"])): str(one["License"]) for one in told}
    shipped = {name for part in SHIPPED for name in locked(part)}
    assert sorted(shipped - set(licences)) == []
    assert [name for name in sorted(shipped) if is_copyleft(licences[name])] == sorted(COPYLEFT_IN_PART)
    assert [name for name in sorted(shipped) if licences[name] == "UNKNOWN"] == sorted(READ_BY_A_PERSON)


def test_the_base_image_is_named_by_digest() -> None:
    bases = re.findall(
        r"^ARG BASE_IMAGE=(.*)$|^FROM (?!\$\{BASE_IMAGE\})(\S+)", (ROOT / "Dockerfile").read_text(), re.M
    )
    stages = re.findall(r"^FROM \S+ AS (\S+)", (ROOT / "Dockerfile").read_text(), re.M)
    foreign = [base or source for base, source in bases if source not in stages]
    assert foreign
    assert [name for name in foreign if not re.search(r"@sha256:[0-9a-f]{64}$", name)] == []


def test_make_sbom_lists_every_package_of_both_images_and_of_the_command_line() -> None:
    subprocess.run(["make", "sbom"], cwd=ROOT, capture_output=True, timeout=PATIENCE_S, check=True)
    for part in SHIPPED:
        told = json.loads((ROOT / "dist/sbom" / f"{part}.cdx.json").read_text())
        listed = {canonicalize_name(one["name"]): one["version"] for one in told["components"]}
        assert listed == locked(part)
        hashed = [one for one in told["components"] if one["externalReferences"][0]["hashes"]]
        assert len(hashed) == len(listed)


def test_the_command_line_works_with_what_its_lock_names_and_nothing_else(tmp_path: Path) -> None:
    uv, python = Path(sys.executable).with_name("uv"), tmp_path / "venv/bin/python"
    for command in (
        ["venv", "--python", sys.executable, str(tmp_path / "venv")],
        # Synced, as installing resolves, for which a machine needs more than `make venv` leaves in uv's cache.
        ["pip", "sync", "--python", str(python), "--offline", "--require-hashes", "requirements/cli.txt"],
        # Not built in isolation: this project's own environment has the builder, by hash.
        ["build", "--wheel", "--offline", "--no-build-isolation", "--python", sys.executable, "-o", str(tmp_path)],
        ["pip", "install", "--python", str(python), "--offline", "--no-deps", "finetune-operator", "-f", str(tmp_path)],
        ["pip", "check", "--python", str(python)],
    ):
        subprocess.run([str(uv), *command], cwd=ROOT, capture_output=True, timeout=PATIENCE_S, check=True)
    job = ROOT / "examples" / "quickstart.yaml"
    finetune = [str(python.with_name("finetune")), "validate", str(job)]
    done = subprocess.run(finetune, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
