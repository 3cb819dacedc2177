"""`finetune data check` on folders that nobody has cleaned: what is good is judged, each bad file or row is named."""

import gzip
from pathlib import Path

import pytest

from data_cli import check, job
from data_run import LFS_POINTER, chats, gz, jsonl, prose, put
from finetune_api.job import MethodType
from team_folder import BROKEN, PLANTED, team_folder
from written_documents import encrypted_pdf, scanned_pdf

NOT_ITS_NAME = "it is damaged, or not what the end of its name says: "
NO_TEXT = "it has no text (empty_document)"
BAD: dict[str, tuple[bytes, str]] = {
    "bad/scan.pdf": (scanned_pdf(), "recognise its text first (OCR) (no_text_layer)"),
    "bad/locked.pdf": (encrypted_pdf(), "it is encrypted; write it without a password (encrypted)"),
    "bad/page.pdf": (b"<html>404</html>", f"{NOT_ITS_NAME}no PDF can be read of it (broken_document)"),
    "bad/pointer.md": (
        LFS_POINTER,
        "it is a Git LFS pointer, not the file itself; run git lfs pull where it was cloned",
    ),
    "bad/packed.md": (gzip.compress(b"x" * 99, mtime=0), f"{NOT_ITS_NAME}it holds NUL characters, so it is no text"),
    "bad/a.docx": (b"PK\x03\x04" + bytes(99), NOT_ITS_NAME),
    "bad/a.mbox": (b"Dear Ada,\n", NOT_ITS_NAME),
    "bad/empty.txt": (b"", NO_TEXT),
    "bad/\u202eblank.md": (b" \n\t\n", NO_TEXT),
}
ODD = {  # which is good all the same
    "odd/a.txt": prose(90, 60).encode("utf-16"),
    "odd/half.html": b"<!doctype html><html><body><p>" + prose(91, 60).encode(),
    "odd/b.MD": b"\xef\xbb\xbf" + prose(92, 60).replace(" ", "\r\n").encode(),
}
PASSED_OVER = {".git/config.md": b"x", "notes/~$a.docx": b"x", "photo.png": b"\x89PNG"}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_of_a_messy_folder_of_documents_each_bad_file_is_named_and_the_others_are_judged(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data, {**team_folder(2), **{name: content for name, (content, _) in BAD.items()}, **ODD, **PASSED_OVER})
    code, said = check(str(data), method=MethodType.CPT)
    assert code == 0
    files, left_out = len(team_folder(2)) + len(BAD) + len(ODD), len(BAD) + 1
    assert f"rows    {files}, {left_out} of them dropped; {len(PASSED_OVER)} files passed over\n" in said
    dropped = [line for line in said.splitlines() if line.startswith("dropped ")]
    assert len(dropped) == left_out
    for name, words in {**{name: words for name, (_, words) in BAD.items()}, BROKEN: NOT_ITS_NAME}.items():
        place = f"dropped file://{data}/{name} row 1: ".replace("\u202e", "\ufffd")
        assert [words in line for line in dropped if line.startswith(place)] == [True], name
    assert [name for name in PASSED_OVER if f"passed over file://{data}/{name}\n" not in said] == []
    assert [name for name in PLANTED if f"private 4 {name} in 4 rows (Report)\n" not in said] == []
    assert [name for name, value in PLANTED.items() if value in said] == []
    assert "\u202e" not in said
    assert "Good " in said


SECRET = "zebra7f3a"
ROWS = {  # each of them broken in its way
    f"not json {SECRET}".encode(): "it is not valid JSON: column 1 (not_json)",
    b'{"messages": ' + b"[" * 100_000: "it is nested deeper than 64 levels (too_deep)",
    jsonl(chats(1)).strip().replace(b"what", rb"\ud800" + SECRET.encode()): "which is no character (lone_surrogate)",
    jsonl(chats(1)).strip().replace(b"what", rb"\u0000" + SECRET.encode()): "contains a NUL character (nul_character)",
    jsonl(chats(1)).strip().replace(b"what", b"\xff" + SECRET.encode()): "it is not valid UTF-8 (invalid_utf8)",
    jsonl(chats(1)).strip().replace(b"user", SECRET.encode()): "messages[0].role is no role that is known",
    b'{"messages": []}': "messages is empty (empty)",
    jsonl(chats(1)).strip()[:40]: "it is not valid JSON: column 41 (not_json)",
}


@pytest.mark.parametrize("is_put_aside", [False, True])
def test_of_a_messy_file_each_broken_row_is_named_and_the_exit_code_says_whether_a_job_would_go_on(
    tmp_path: Path, is_put_aside: bool
) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(40)), b_jsonl=b"\n".join([jsonl(chats(20, 40)).strip(), *ROWS]))
    target = str(tmp_path / "data")
    if is_put_aside:
        target = job(tmp_path, {"preprocessing": {"onBadRow": "Quarantine", "maxBrokenFraction": 0.2}})
    code, said = check(target)
    assert code == (0 if is_put_aside else 11)
    assert f"rows    {60 + len(ROWS)}, {len(ROWS)} of them dropped\n" in said
    for number, words in enumerate(ROWS.values(), 21):
        (line,) = [each for each in said.splitlines() if f"b.jsonl row {number}: " in each and "dropped" in each]
        assert words in line
    assert SECRET not in said
    assert ("Good " in said) == is_put_aside
    assert ("go on without them by preprocessing.onBadRow: Quarantine" in said) != is_put_aside


FILES: dict[str, tuple[str, bytes, str]] = {
    "UTF-16": ("b_jsonl", "{}".encode("utf-16"), "it is text in UTF-16; write it as UTF-8"),
    "a stream that is cut off": ("b_jsonl_gz", gz(jsonl(chats(60)))[:-200], "the gzip stream is cut off"),
    "a page": ("b_jsonl", b"<!doctype html><html>404</html>", "it is an HTML page; download it again"),
    "a pointer": ("b_jsonl", LFS_POINTER, "it is a Git LFS pointer, not the file itself; run git lfs pull"),
    "an archive": ("b_jsonl", b"PK\x03\x04" + bytes(99), "it is a zip archive; unpack it"),
    "no table": ("b_parquet", b"PAR1" + bytes(99), "Parquet cannot be decoded (ArrowInvalid)"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_rows_at_all_is_named_with_what_it_is_and_what_to_do(tmp_path: Path, case: str) -> None:
    name, content, words = FILES[case]
    put(tmp_path, a_jsonl=jsonl(chats(9)), **{name: content})
    code, said = check(str(tmp_path / "data"))
    assert code == 11
    assert f"data/{name.replace('_', '.')} cannot be read" in said
    assert words in said
