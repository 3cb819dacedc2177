"""Which reader a kind of document has."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from finetune_trainer.data.documents.books import read_epub
from finetune_trainer.data.documents.found import Found
from finetune_trainer.data.documents.html_pages import read_html
from finetune_trainer.data.documents.mail import read_mail, read_mailbox
from finetune_trainer.data.documents.pdf_text import read_pdf
from finetune_trainer.data.documents.plain_files import read_markdown, read_text
from finetune_trainer.data.documents.restructured import read_rst
from finetune_trainer.data.documents.word import read_docx
from finetune_trainer.data.file_kinds import DocumentKind

Reader = Callable[[Path], Iterable[Found]]  # raises NoTextError

READERS: Mapping[DocumentKind, Reader] = {
    DocumentKind.TEXT: read_text,
    DocumentKind.MARKDOWN: read_markdown,
    DocumentKind.HTML: read_html,
    DocumentKind.PDF: read_pdf,
    DocumentKind.WORD: read_docx,
    DocumentKind.EPUB: read_epub,
    DocumentKind.RST: read_rst,
    DocumentKind.MAIL: read_mail,
    DocumentKind.MAILBOX: read_mailbox,
    DocumentKind.CODE: read_text,
}
