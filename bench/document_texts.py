"""Texts of Debian's documentation packages as JSON Lines: downloaded, unpacked and taken out of their HTML once."""

import json
import random
import subprocess
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

from bench.environments import cache

PACKAGES = (
    "python3.11-doc",
    "debian-handbook",
    "debian-policy",
    "developers-reference",
    "postgresql-doc-15",
    "debian-reference-en",
)
_LEAST_CHARACTERS = 200
_TIMEOUT_S = 600


def ensure_texts(folder: Path, size_bytes: int) -> Path:
    """Write as many different texts as make up a size, drawn in a fixed order; once all are written, again with a
    line of their own, so that none is a copy."""
    path = folder / f"{size_bytes}.jsonl"
    texts = [json.loads(line)["text"] for line in _all_texts().open()]
    random.Random(0).shuffle(texts)
    with path.open("w") as file:
        written = 0
        for at, text in enumerate(cycle(texts)):
            again = at // len(texts)
            said = f"Edition {again}.\n\n{text}" if again else text
            written += file.write(json.dumps({"text": said}, ensure_ascii=False) + "\n")
            if written >= size_bytes:
                return path
    raise SystemExit("there are no texts")


def _all_texts() -> Path:
    folder = cache("document-texts")
    path = folder / "texts.jsonl"
    if not path.exists():
        for package in PACKAGES:
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True, timeout=_TIMEOUT_S)
        for archive in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg", "-x", str(archive), str(folder / "unpacked")], check=True, timeout=_TIMEOUT_S)
        partial = path.with_suffix(".partial")
        with partial.open("w") as file:
            file.writelines(
                json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in _texts(folder / "unpacked")
            )
        partial.rename(path)
    return path


def _texts(folder: Path) -> Iterator[str]:
    from resiliparse.extract.html2text import extract_plain_text

    for page in sorted(folder.rglob("*.html")):
        if page.is_symlink() or not page.is_file():
            continue
        text = extract_plain_text(page.read_text(errors="replace"), main_content=True, preserve_formatting=True)
        if len(text) >= _LEAST_CHARACTERS:
            yield text
