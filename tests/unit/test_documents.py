"""Documents as rows of continued pre-training: what is read of each, and that one which is broken costs itself."""

import errno
import gzip
import json
import os
import threading
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from data_run import LFS_POINTER, context, jsonl, prepare_run
from finetune_api.data_files import DOCUMENTS
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_trainer.data.documents import extractor, found
from finetune_trainer.data.documents.extractor import Extractors
from finetune_trainer.data.documents.kinds import READERS
from finetune_trainer.data.documents.reading import Document, extracted
from finetune_trainer.data.file_kinds import DocumentKind, document_of
from finetune_trainer.data.problems import Drop
from finetune_trainer.shown import Wanted, show
from finetune_trainer.store import Store, open_store
from written_documents import columns_pdf, encrypted_pdf, page_html, pages_pdf, pdf, put_lines, scanned_pdf, table_pdf

CPT = {"method": {"type": "CPT"}}
PROSE = [f"Line {word} of a text that is long enough to be a line of a column." for word in ("one", "two", "three")]


def text_of(tmp_path: Path, name: str, content: bytes) -> str:
    """Return what is read of a document, in this process."""
    path = tmp_path / name
    path.write_bytes(content)
    kind = document_of(name)
    assert kind is not None
    return "\n---\n".join(each.text for each in READERS[kind](path))


def title_of(tmp_path: Path, name: str, content: bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content)
    kind = document_of(name)
    assert kind is not None
    return next(iter(READERS[kind](path))).title


def folder(tmp_path: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_every_ending_names_a_kind_and_every_kind_has_a_reader() -> None:
    assert set(DOCUMENTS) == set(DocumentKind) == set(READERS)
    assert document_of("a/B.HTM") is DocumentKind.HTML
    assert document_of("a.pdf/b") is None


def test_a_folder_of_documents_becomes_one_row_each(tmp_path: Path) -> None:
    folder(
        tmp_path,
        {
            "a.txt": b"the quick brown fox",
            "b/c.MD": b"# Dogs\n\nthe lazy dog",
            "b/d.html": page_html("<h1>Foxes</h1><p>The fox is quick, as everybody knows who has seen one.</p>"),
            "e.pdf": pages_pdf([["the quick brown fox jumps"]]),
            "f.png": b"\x89PNG",
        },
    )
    prepared = prepare_run(tmp_path, CPT)
    assert [(Path(each["uri"]).name, each["rows_in"], each["rows_used"]) for each in prepared.report["files"]] == [
        (name, 1, 1) for name in ("a.txt", "c.MD", "d.html", "e.pdf")
    ]
    assert len(prepared.train) == 4
    assert [Path(each).name for each in prepared.report["ignored_files"]] == ["f.png"]


def test_documents_beside_files_of_rows_are_passed_over_and_told(tmp_path: Path, caplog: Any) -> None:
    folder(tmp_path, {"README.md": b"# A dataset", "a.jsonl": jsonl([{"text": "the quick brown fox"}] * 3)})
    prepared = prepare_run(tmp_path, CPT)
    assert [Path(each).name for each in prepared.report["ignored_files"]] == ["README.md"]
    assert "1 documents are passed over" in caplog.text


def test_a_pattern_picks_documents_beside_files_of_rows(tmp_path: Path) -> None:
    folder(tmp_path, {"README.md": b"# A dataset", "a.jsonl": jsonl([{"text": "x"}])})
    prepared = prepare_run(tmp_path, {**CPT, "datasets": [{"uri": (tmp_path / "data").as_uri() + "/*.md"}]})
    assert [Path(each["uri"]).name for each in prepared.report["files"]] == ["README.md"]


def test_a_method_that_learns_answers_takes_no_documents(tmp_path: Path) -> None:
    folder(tmp_path, {"a.md": b"# A"})
    with pytest.raises(StageError) as caught:
        prepare_run(tmp_path)
    assert caught.value.fault is Fault.NO_FILES_MATCH


BROKEN: dict[str, tuple[str, bytes, Drop, str]] = {
    "scanned pages": ("a.pdf", scanned_pdf(), Drop.NO_TEXT_LAYER, ""),
    "a password": ("a.pdf", encrypted_pdf(), Drop.ENCRYPTED, ""),
    "no PDF": ("a.pdf", b"<html>not found</html>", Drop.BROKEN_DOCUMENT, "no PDF can be read of it"),
    "a PDF that is cut off": ("a.pdf", pages_pdf([PROSE])[:300], Drop.BROKEN_DOCUMENT, "no PDF can be read of it"),
    "nothing": ("a.txt", b"", Drop.EMPTY_DOCUMENT, ""),
    "white space": ("a.md", b" \n\t\n", Drop.EMPTY_DOCUMENT, ""),
    "a pointer": ("a.txt", LFS_POINTER, Drop.BROKEN_DOCUMENT, "Git LFS pointer"),
    "bytes": ("a.txt", bytes(range(256)) * 9, Drop.BROKEN_DOCUMENT, "holds NUL characters"),
    "a wrong mark": ("a.txt", b"\xff\xfea", Drop.BROKEN_DOCUMENT, "no valid utf-16-le"),
    "gzip": ("a.md", gzip.compress(b"x" * 99, mtime=0), Drop.BROKEN_DOCUMENT, "holds NUL characters"),
    "a page of navigation": ("a.html", b"<html><body><script>x</script></body></html>", Drop.EMPTY_DOCUMENT, ""),
    "a page whose content is empty": ("a.html", b"<html><body><main></main></body></html>", Drop.EMPTY_DOCUMENT, ""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_document_of_which_nothing_can_be_used_costs_itself(tmp_path: Path, case: str) -> None:
    name, content, drop, words = BROKEN[case]
    folder(tmp_path, {name: content, "z.txt": b"the quick brown fox"})
    prepared = prepare_run(tmp_path, CPT)
    first, second = prepared.report["files"]
    assert (first["rows_in"], first["dropped"]) == (1, {drop: 1})
    assert second["rows_used"] == 1
    (decision,) = [each for each in prepared.decisions if each["action"] == "drop"]
    assert (decision["stage"], decision["reason"], decision["row"]) == ("extract", drop, 1)
    assert words in decision.get("words", "")
    assert len(first["sha256"]) == len("sha256:") + 64


def test_a_job_whose_documents_are_all_left_out_ends_with_the_reason(tmp_path: Path) -> None:
    folder(tmp_path, {"a.pdf": scanned_pdf(), "b.pdf": scanned_pdf()})
    with pytest.raises(StageError, match="recognise its text first") as caught:
        prepare_run(tmp_path, CPT)
    assert caught.value.fault is Fault.NO_TRAINING_DATA


SURPRISE = "Die Größe der Stadt überrascht die Gäste."
TABLE = "# A\n\n* b\n* c\n\n| x | y |\n|---|---|\n| 1 | 2 |"
TEXTS: dict[str, tuple[str, bytes, str]] = {
    "UTF-8 with a mark": ("a.txt", "\ufeffGröße\r\nzwei\r".encode(), "Größe\nzwei\n"),
    "UTF-16": ("a.txt", "Größe".encode("utf-16"), "Größe"),
    "an older encoding": ("a.txt", SURPRISE.encode("cp1252"), SURPRISE),
    "Markdown": ("a.md", TABLE.encode(), TABLE),
    "front matter": ("a.md", b"---\ntitle: Foxes\ndraft: true\n---\n\n# A\n", "# A"),
    "a rule, which is no front matter": ("a.md", b"---\n\nwords", "---\n\nwords"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_plain_document_is_read_as_it_is(tmp_path: Path, case: str) -> None:
    name, content, text = TEXTS[case]
    assert text_of(tmp_path, name, content) == text


BODY = """<h1>Rivers</h1><p>A river is a natural stream of water, which flows towards a sea or a lake.</p>
<h2>Longest</h2><ul><li>The Nile flows through eleven countries.</li><li>The Amazon carries the most water.</li></ul>
<table><tr><th>River</th><th>Length</th></tr><tr><td>Nile</td><td>6650 km</td></tr></table>
<pre>flow = width * depth
    * speed</pre><p>Rivers are used for transport, for energy and for drinking water in many countries.</p>"""


def test_of_a_page_the_content_is_read_with_headings_lists_tables_and_code(tmp_path: Path) -> None:
    text = text_of(tmp_path, "a.html", page_html(BODY))
    for expected in (
        "# Rivers\n", "A river is a natural stream of water, which flows", "## Longest\n", "The Nile flows through",
        "| Nile | 6650 km |", "flow = width * depth\n    * speed", "Rivers are used for transport",
    ):  # fmt: skip
        assert expected in text
    for navigation in ("Shop", "Log in", "Imprint", "Ten tricks", "tracking", "color"):
        assert navigation not in text
    assert title_of(tmp_path, "a.html", page_html(BODY)) == "Rivers - Atlas"


@pytest.mark.parametrize("in_turn", [False, True])
def test_columns_are_read_one_after_another_however_they_were_written(tmp_path: Path, in_turn: bool) -> None:
    columns = [[f"{side} line {at} of the text of this column" for at in range(12)] for side in ("left", "right")]
    text = text_of(tmp_path, "a.pdf", columns_pdf("A title that stands over both of the columns", columns, in_turn))
    order = ["# A title that", *(f"{side} line {at} " for side in ("left", "right") for at in range(12))]
    places = [text.index(each) for each in order]
    assert places == sorted(places)


def test_three_columns_are_read_one_after_another(tmp_path: Path) -> None:
    columns = [[f"{side}{at} short line here" for at in range(9)] for side in "abc"]
    text = text_of(tmp_path, "a.pdf", columns_pdf("Three", columns))
    places = [text.index(f"{side}{at} ") for side in "abc" for at in range(9)]
    assert places == sorted(places)


def test_what_runs_along_the_pages_is_taken_off(tmp_path: Path) -> None:
    pages = [[f"Page text {name} begins here and is long.", "It goes on in a second line."] for name in "abcd"]
    text = text_of(tmp_path, "a.pdf", pages_pdf(pages, "Annual report {page}", "{page}"))
    assert "Annual report" not in text
    assert text.count("Page text") == 4
    assert not any(line.strip().isdigit() for line in text.splitlines())


def test_what_stands_at_the_edge_of_one_page_stays(tmp_path: Path) -> None:
    text = text_of(tmp_path, "a.pdf", pages_pdf([["one"], ["two"], ["three"]], "", "note {page} of its own"))
    assert "note" not in text  # it stands on all
    whole = text_of(tmp_path, "b.pdf", pdf(lambda canvas: put_lines(canvas, 60, 800, ["A title", "and words"])))
    assert "A title" in whole


def test_words_divided_at_the_end_of_a_line_are_joined_and_compounds_stay(tmp_path: Path) -> None:
    lines = [
        "The whole text of this document is about an impor-",
        "tant matter, which is well-known to all who have a well-",
        "known name, and it ends somewhere in this last line here.",
        "Afterwards the next sentence is written in ﬁne letters.",
    ]
    text = text_of(tmp_path, "a.pdf", pages_pdf([lines]))
    assert "an important matter, which is well-known to all who have a well-known name" in text
    assert "\n" not in text.partition(" last line")[0]


def test_a_table_keeps_its_rows(tmp_path: Path) -> None:
    rows = [["River", "Length", "Sea"], ["Nile", "6650 km", "Mediterranean"], ["Rhine", "1233 km", "North Sea"]]
    text = text_of(tmp_path, "a.pdf", table_pdf("The table shows some rivers and how long they are.", rows))
    assert "\n".join("| " + " | ".join(row) + " |" for row in rows) in text


def test_title_and_source_are_put_into_the_text_by_a_template(tmp_path: Path) -> None:
    named = page_html("<h1>Foxes</h1><p>The fox is quick, as everybody knows.</p>", "All foxes")
    folder(tmp_path, {"b/fox.html": named, "dog.txt": b"The dog is lazy {source}."})
    template = {"documents": {"template": "{title} ({source})\n{text}"}}
    shown = show(context(tmp_path, {**CPT, "preprocessing": template}), Wanted(most=2))
    texts = ["".join(segment.text for segment in row.segments) for row in shown]
    assert texts[0].startswith("All foxes (b/fox.html)\n# Foxes")
    assert texts[1].startswith("dog (dog.txt)\nThe dog is lazy {source}.")


def test_a_large_text_becomes_several_rows_cut_where_paragraphs_end() -> None:
    text = "".join(f"Paragraph {at}. {'word ' * 20}\n\n" for at in range(200))
    parts = found.parts(text, 4000)
    assert "".join(parts) == text
    assert all(len(part) <= 4000 and part.endswith("\n\n") for part in parts)
    assert found.parts("ü" * 5000, 4000) == ["ü" * 1000] * 5


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [("DOCUMENT_CPU_S", 1e-4, "s to read it"), ("MEMORY_BYTES", 200 * 2**20, "MiB of memory")],
)
def test_a_document_that_takes_too_much_is_left_out_and_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: float, words: str
) -> None:
    large = tmp_path / "a.html"
    large.write_bytes(b"<p>word " * 10_000_000)
    monkeypatch.setattr(extractor, limit, value)
    with closing(Extractors(1)) as extractors:
        left_out = extractors.extract(large, DocumentKind.HTML, tmp_path / "out")
        assert left_out is not None
        assert left_out.drop is Drop.EXTRACTION_ENDED
        assert words in left_out.words
        monkeypatch.undo()
        (tmp_path / "b.txt").write_bytes(b"words")
        assert extractors.extract(tmp_path / "b.txt", DocumentKind.TEXT, tmp_path / "out") is None


def test_a_full_disk_is_told_as_that_and_leaves_no_document_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"words")
    with closing(Extractors(1)) as extractors, pytest.raises(OSError, match="space") as caught:
        extractors.extract(tmp_path / "a.txt", DocumentKind.TEXT, Path("/dev/full"))
    assert caught.value.errno == errno.ENOSPC


class _Meeting(Store):
    """A store in which nobody is answered before several wait."""

    def __init__(self, store: Store, several: int) -> None:
        super().__init__(StorageConfig())
        self._store, self._barrier = store, threading.Barrier(several)
        self.opened: list[str] = []

    def open(self, uri: str, *, if_match: str | None = None) -> BinaryIO:
        self.opened.append(uri)
        self._barrier.wait(60)
        return self._store.open(uri, if_match=if_match)


def test_documents_are_fetched_several_at_once_and_come_in_order(tmp_path: Path) -> None:
    several = 8
    documents: list[Document] = []
    for number in range(5 * several):
        path = tmp_path / f"{number:02}.txt"
        path.write_bytes(b"words %d" % number)
        documents.append(Document(path.as_uri(), path.stat().st_size, DocumentKind.TEXT, path.name))
    store = _Meeting(open_store(StorageConfig()), several)
    rows = [
        json.loads(row.content) for each in extracted(store, documents, tmp_path / "work", 2) for row in each.rows()
    ]
    assert rows == [{"text": f"words {number}"} for number in range(5 * several)]
    assert not (tmp_path / "work").exists()


def test_nothing_is_left_where_reading_stops_early(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    documents: list[Document] = []
    for number in range(200):
        path = tmp_path / f"{number:03}.txt"
        path.write_bytes(b"words")
        documents.append(Document(path.as_uri(), 5, DocumentKind.TEXT, path.name))
    with closing(extracted(open_store(StorageConfig()), documents, tmp_path / "work", 2)) as found_documents:
        next(found_documents)
    assert not (tmp_path / "work").exists()
    assert len(os.listdir("/proc/self/fd")) <= len(before)
