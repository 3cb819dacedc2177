"""Image build: tells importlib.metadata which release the copied code is, without building and installing a wheel."""

import sys
import tomllib
from pathlib import Path

pyproject, folder = map(Path, sys.argv[1:])
project = tomllib.loads(pyproject.read_text())["project"]
info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
info.mkdir()
(info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: {project['version']}\n")
