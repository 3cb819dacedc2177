"""What `bench.documents` compares with, in an environment of its own, written as their documentation says."""

# pyright: reportMissingImports=false, reportUnknownLambdaType=false

import hashlib
import json
import re
import resource
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

_BATCH = 1000


def datatrove(texts: Path, model: Path, folder: Path) -> int:
    """Return the documents left by datatrove's own blocks, one behind another, in one task.

    Exact copies are looked for by a set in memory: its own block writes signatures in a run of its own, which takes
    longer."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter, LambdaFilter
    from datatrove.pipeline.formatters import FTFYFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    seen: set[bytes] = set()
    left = 0

    def tell(document: Any) -> bool:
        document.metadata["language"] = identifier.classify(document.text[:500])[0]
        return True

    def is_new(document: Any) -> bool:
        nonlocal left
        digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if digest in seen:
            return False
        seen.add(digest)
        left += 1
        return True

    pipeline = [
        JsonlReader(str(texts.parent), glob_pattern=texts.name),
        FTFYFormatter(),
        LambdaFilter(tell),
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        LambdaFilter(is_new),
        DocumentTokenizer(str(folder / "tokens"), tokenizer_name_or_path=str(model / "tokenizer.json"), eos_token=None),
    ]
    LocalPipelineExecutor(pipeline, logging_dir=str(folder / "logs")).run()
    return left


def mapped(texts: Path, model: Path, folder: Path) -> int:
    """Return the documents left by `datasets.map` and `filter`, with the rules in plain Python and a fast tokenizer.

    Of Gopher's rules it has those that take a few lines: counts of words, their mean length, letters, stop words, lines
    said before, and the most frequent two, three and four words after another."""
    from datasets import load_dataset
    from ftfy import TextFixerConfig, fix_text
    from py3langid.langid import MODEL_FILE, LanguageIdentifier
    from tokenizers import Tokenizer

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    mild = TextFixerConfig(uncurl_quotes=False, unescape_html=False, normalization="NFC", explain=False)
    stop_words = {"the", "be", "to", "of", "and", "that", "have", "with"}
    letter = re.compile(r"[^\W\d_]")
    seen: set[bytes] = set()

    def repair(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        fixed = [fix_text(unicodedata.normalize("NFC", text), mild) for text in batch["text"]]
        return {"text": fixed, "language": [identifier.classify(text[:500])[0] for text in fixed]}

    def is_good(text: str) -> bool:
        words = text.split()
        lines = [line for line in text.split("\n") if line.strip()]
        if not 50 <= len(words) <= 100_000 or not 3 <= sum(map(len, words)) / len(words) <= 10:
            return False
        if sum(1 for word in words if letter.search(word)) < 0.8 * len(words) or len(stop_words & {*words}) < 2:
            return False
        if len(lines) - len({*lines}) > 0.3 * len(lines):
            return False
        for size, share in ((2, 0.2), (3, 0.18), (4, 0.16)):
            grams = Counter(zip(*(words[at:] for at in range(size)), strict=False))
            if grams:
                gram, count = grams.most_common(1)[0]
                if count > 1 and count * sum(map(len, gram)) > share * len(text):
                    return False
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        is_new = digest not in seen
        seen.add(digest)
        return is_new

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [each.ids for each in tokenizer.encode_batch_fast(batch["text"])]}

    rows = load_dataset("json", data_files=str(texts), split="train", cache_dir=str(folder / "cache"))
    rows = rows.map(repair, batched=True, batch_size=_BATCH)
    rows = rows.filter(lambda batch: [is_good(text) for text in batch["text"]], batched=True, batch_size=_BATCH)
    return len(rows.map(tokenise, batched=True, batch_size=_BATCH))


if __name__ == "__main__":
    who, texts, model, folder = sys.argv[1], *map(Path, sys.argv[2:])
    left = (datatrove if who == "datatrove" else mapped)(texts, model, folder)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"rows": left, "peak_bytes": peak_kib * 1024}))
