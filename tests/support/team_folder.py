"""The documents of a team, made here: PDF, HTML, Markdown and mail, with personal data, copies and one broken file."""

import textwrap
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from data_run import prose
from finetune_trainer.data.examples import ARRAYS
from written_documents import mail_bytes, page_html, pages_pdf

PLANTED = {
    "EMAIL": "ada.lovelace@example.org",
    "PHONE": "+1 415-555-2671",
    "CARD": "4111 1111 1111 1111",
    "IBAN": "DE89 3704 0044 0532 0130 00",
    "API_KEY": "ghp_" + "a1B2c3D4e5F6" * 3,
}
TELLING = [f"The {name} is {value}." for name, value in PLANTED.items()]
COPY, NEAR_COPY, BROKEN = "notes/copy.md", "pages/near.html", "manuals/broken.pdf"
LINE = 80  # characters


def team_folder(of_each: int = 6) -> dict[str, bytes]:
    """Return content by name: so many documents of each kind, of which the first ones tell PLANTED.

    COPY says what the second note says, NEAR_COPY nearly what the second page does, and BROKEN is cut off."""
    files: dict[str, bytes] = {}
    for number in range(of_each):
        told = TELLING if number == 0 else []
        texts = [prose(10 * number + kind, 90) for kind in range(4)]
        lines = [*textwrap.wrap(texts[0], LINE), *told]
        files |= {
            f"manuals/{number}.pdf": pages_pdf([lines[:6], lines[6:]], "Manual of pumps", "page {page}"),
            f"pages/{number}.html": _page(number, [texts[1], *told]),
            f"notes/{number}.md": "\n\n".join([f"# Note {number}", "## Why", texts[2], *told]).encode(),
            f"mail/{number}.eml": mail_bytes(f"News {number}", "\n\n".join([texts[3], *told])),
        }
    return files | {
        COPY: files["notes/1.md"],
        NEAR_COPY: _page(1, [f"{prose(11, 90)} indeed"]),
        BROKEN: files["manuals/1.pdf"][:300],
    }


def _page(number: int, paragraphs: Sequence[str]) -> bytes:
    body = "".join(f"<p>{each}</p>" for each in paragraphs)
    return page_html(f"<h1>Page {number}</h1>{body}", f"Page {number}")


def planted_in(content: bytes, tokenizer: Tokenizer) -> list[str]:
    """Return which types of PLANTED stand in some bytes, as texts or as arrays of the tokenizer's ids."""
    return [name for name, value in PLANTED.items() if any(form in content for form in _forms(value, tokenizer))]


def _forms(value: str, tokenizer: Tokenizer) -> Iterator[bytes]:
    for text in {value, value.replace(" ", "")}:
        yield text.encode()
        yield np.array(tokenizer.encode(text).ids, dtype=ARRAYS["tokens"]).tobytes()
