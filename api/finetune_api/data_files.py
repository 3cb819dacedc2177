"""Which files hold rows, and which are documents, told by the end of their names, and how much may come out of one."""

from typing import NamedTuple

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED_ENDINGS = (".gz", ".zst")  # behind one of the others; Parquet packs its columns itself
MAX_UNPACKED_BYTES = 256 * 2**30  # of one file: nothing of it lies on disk or in memory, so this bounds time alone


class DocumentFiles(NamedTuple):
    """How the names of a kind of documents end, and what is read of them, for people."""

    endings: tuple[str, ...]
    words: str


CODE = "source code"
DOCUMENTS: dict[str, DocumentFiles] = {
    "plain text": DocumentFiles(
        (".txt",), "All of it, in UTF-8, or the encoding that its first bytes or its text tell."
    ),
    "Markdown": DocumentFiles(
        (".md",), "All of it as it is written, but for front matter, whose `title` is its title."
    ),
    "HTML": DocumentFiles(
        (".html", ".htm"),
        "The main content, without navigation, header and footer; headings as Markdown's `#`, lists, tables, code.",
    ),
    "PDF": DocumentFiles(
        (".pdf",),
        "The text layer in the order in which people read it, column after column, as paragraphs, headings and tables; "
        "running headers, footers and page numbers are taken off, words that lines divide are joined.",
    ),
    "Word": DocumentFiles((".docx",), "Paragraphs, headings, lists and tables in their order."),
    "EPUB": DocumentFiles((".epub",), "The chapters of the book in the order of its spine."),
    "reStructuredText": DocumentFiles(
        (".rst",), "All of it, as the page that docutils makes of it; no file that it names is read, nothing is run."
    ),
    "mail": DocumentFiles(
        (".eml",),
        "Subject and body, as plain text where there is some, else of its HTML; attachments are left out "
        "(`attachments_left_out`).",
    ),
    "mailbox": DocumentFiles((".mbox",), "The same of each mail, which is a row."),
    CODE: DocumentFiles(
        (
            *(".c", ".cc", ".clj", ".cpp", ".cs", ".cu", ".cxx", ".dart", ".erl", ".ex", ".exs", ".f90", ".fs", ".go"),
            *(".h", ".hpp", ".hs", ".java", ".jl", ".jsx", ".kt", ".lua", ".m", ".ml", ".mjs", ".php", ".pl", ".pm"),
            *(".proto", ".py", ".pyi", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".tf", ".ts", ".tsx"),
            *(".v", ".vhd", ".vue", ".zig"),
        ),
        "Source code, all of it as it is written.",
    ),
}


def listed_endings() -> str:
    """Return all endings of files with rows as the words of a sentence."""
    *most, last = ENDINGS
    return f"{', '.join(most)} or {last} (all but {last} also with {' or '.join(PACKED_ENDINGS)} behind it)"


def listed_documents() -> str:
    """Return all endings of documents as the words of a sentence."""
    endings = [ending for name, kind in DOCUMENTS.items() if name != CODE for ending in kind.endings]
    return f"{', '.join(endings)}, or {CODE} such as {DOCUMENTS[CODE].endings[0]}"
