"""Environments of their own for what benches compare with: one for each list of packages, made once."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_TIMEOUT_S = 900


def cache(name: str) -> Path:
    """Return a folder that stays from run to run."""
    base = Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache" / "finetune-operator")
    folder = base.resolve() / "bench" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def python_with(packages: Sequence[str], python: str = sys.executable) -> Path:
    """Return the Python of an environment that has these packages, and what they need, alone. python: a path, or a
    version for packages that need another than ours."""
    listed = " ".join(packages)
    first = re.split(r"[^\w-]", packages[0])[0]
    folder = cache("environments") / f"{first}-{hashlib.sha256(listed.encode()).hexdigest()[:8]}"
    made, done = folder / "bin" / "python", folder / "packages"
    if not done.exists():
        uv = [sys.executable, "-m", "uv"]
        of_pyenv = sorted(map(str, (Path.home() / ".pyenv" / "versions").glob("3.*/bin")))  # which uv does not look at
        env = os.environ | {"PATH": os.pathsep.join([os.environ["PATH"], *of_pyenv])}
        command = [*uv, "venv", "--quiet", "--clear", "--no-python-downloads", "--python", python, str(folder)]
        subprocess.run(command, check=True, env=env)
        command = [*uv, "pip", "install", "--quiet", "--python", str(made), *packages]
        subprocess.run(command, check=True, timeout=_TIMEOUT_S)
        done.write_text(listed)
    return made
