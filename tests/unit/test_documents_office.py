"""Word documents, books, mail and code as rows of continued pre-training."""

from pathlib import Path

import pytest

from data_run import prepare_run
from finetune_trainer.data.documents.found import Found, NoTextError
from finetune_trainer.data.documents.kinds import READERS
from finetune_trainer.data.file_kinds import document_of
from finetune_trainer.data.problems import Change, Drop
from written_documents import docx_bytes, epub_bytes, mail_bytes

RST = b"""Rivers
======

A river flows :unknown:`towards` the *sea*.

Longest
-------

* The Nile
* The Rhine

.. include:: /etc/passwd
.. raw:: html

   <b>raw</b>

::

    depth * width
"""


def read(tmp_path: Path, name: str, content: bytes) -> list[Found]:
    path = tmp_path / name
    path.write_bytes(content)
    kind = document_of(name)
    assert kind is not None
    return list(READERS[kind](path))


def test_a_word_document_keeps_headings_lists_and_tables(tmp_path: Path) -> None:
    (found,) = read(tmp_path, "a.docx", docx_bytes())
    assert found.title == "All rivers"
    assert found.text == (
        "# Rivers\n\nA river flows towards the sea.\n\n- The Nile\n- The Rhine\n\n"
        "| River | Length |\n| Nile | 6650 km |\n\nThat is all."
    )


def test_a_book_is_read_in_the_order_of_its_spine_and_nothing_outside_of_it(tmp_path: Path) -> None:
    chapters = ["<h1>Two</h1><p>second</p>", "<h1>One</h1><p>first</p>"]
    (found,) = read(tmp_path, "a.epub", epub_bytes(chapters))
    assert (found.title, found.text) == ("A book", "# One\n\nfirst\n\n# Two\n\nsecond")
    climbing = epub_bytes(chapters, ["../../../../etc/passwd", "c1.xhtml"])
    assert [each.text for each in read(tmp_path, "b.epub", climbing)] == ["# One\n\nfirst"]


def test_restructured_text_reads_no_file_and_runs_nothing(tmp_path: Path) -> None:
    (found,) = read(tmp_path, "a.rst", RST)
    for expected in ("A river flows", "sea", "# ", "- The Nile", "depth * width"):
        assert expected in found.text
    for forbidden in ("root:", "<b>"):
        assert forbidden not in found.text


ODD = "=?x-no?q?A?="
MAILS = {
    "plain text": (mail_bytes("Rivers", "The Nile.\n"), "Rivers\n\nThe Nile.", ()),
    "both": (mail_bytes("Rivers", "The Nile.", "<p>The <b>Rhine</b>.</p>"), "Rivers\n\nThe Nile.", ()),
    "HTML": (mail_bytes("Flüsse", "", "<p>The <b>Rhine</b>.</p>"), "Flüsse\n\nThe Rhine.", ()),
    "an attachment": (mail_bytes("A", "B", "", b"secret"), "A\n\nB", (Change.ATTACHMENTS_LEFT_OUT,)),
    "an unknown encoding": (b"Subject: =?x-no?q?A?=\nContent-Type: text/plain; charset=x-no\n\nB", ODD + "\n\nB", ()),
    "a broken word": (b"Subject: =?utf-8?b?A?=\n\nB", "=?utf-8?b?A?=\n\nB", ()),
    "an encoding that is none": (b"Subject: A\nContent-Type: text/plain; charset=undefined\n\nB", "A\n\nB", ()),
}  # fmt: skip


@pytest.mark.parametrize("case", MAILS)
def test_a_mail_is_its_subject_and_its_text(tmp_path: Path, case: str) -> None:
    content, text, changes = MAILS[case]
    (found,) = read(tmp_path, "a.eml", content)
    assert (found.text, found.changes) == (text, changes)


def test_each_mail_of_a_mailbox_is_a_row_and_attachments_are_counted(tmp_path: Path) -> None:
    mails = [mail_bytes(f"Mail {at}", f"the quick brown fox {at}", "", b"x" * (at == 1)) for at in range(3)]
    (tmp_path / "data").mkdir()
    box = b"".join(b"From a@example.org Sat Nov 28 00:00:00 2026\n" + each + b"\n" for each in mails)
    (tmp_path / "data" / "a.mbox").write_bytes(box)
    (tmp_path / "data" / "b.py").write_bytes(b"def quick(fox):\n    return fox\n")
    prepared = prepare_run(tmp_path, {"method": {"type": "CPT"}})
    assert [each["rows_in"] for each in prepared.report["files"]] == [3, 1]
    assert prepared.report["changed"].get("attachments_left_out") == 1


def test_a_mailbox_whose_first_lines_are_not_ascii_is_read(tmp_path: Path) -> None:
    box = b"".join(b"From j\xfcrgen@example.org Sat Nov 28 00:00:00 2026\nSubject: A\n\n%d\n\n" % at for at in range(2))
    assert [each.text for each in read(tmp_path, "a.mbox", box)] == ["A\n\n0", "A\n\n1"]


def test_a_word_document_of_which_a_part_is_damaged_is_left_out(tmp_path: Path) -> None:
    content = docx_bytes()
    with pytest.raises(NoTextError) as caught:
        read(tmp_path, "a.docx", content.replace(b"PK\x03\x04", b"PK\x03\x05", 1))
    assert caught.value.drop is Drop.BROKEN_DOCUMENT


@pytest.mark.parametrize("name", ["a.docx", "a.epub", "a.mbox", "a.eml"])
@pytest.mark.parametrize("content", [b"PK\x03\x04broken", b"\x00" * 99, b"no such thing"], ids=["cut", "zeros", "text"])
def test_what_is_not_what_its_name_says_is_left_out(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(NoTextError) as caught:
        read(tmp_path, name, content)
    assert caught.value.drop is Drop.BROKEN_DOCUMENT


def test_a_document_with_a_password_is_told(tmp_path: Path) -> None:
    with pytest.raises(NoTextError) as caught:
        read(tmp_path, "a.docx", b"\xd0\xcf\x11\xe0" + b"\0" * 99)
    assert caught.value.drop is Drop.ENCRYPTED
