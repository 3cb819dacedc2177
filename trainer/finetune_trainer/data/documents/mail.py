"""Mail: subject and body of each message, plain text where there is some; attachments are passed over and counted."""

import mailbox
from collections.abc import Iterator
from email import message_from_binary_file, message_from_bytes
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.message import Message
from itertools import islice
from pathlib import Path

from finetune_trainer.data.documents.found import Found, NoTextError, tidy, titled
from finetune_trainer.data.documents.html_pages import of_html
from finetune_trainer.data.documents.plain_files import decoded
from finetune_trainer.data.problems import Change, Drop

_MAX_PARTS = 1000  # of a message
_MAX_MESSAGES = 1_000_000  # of a mailbox
_PLAIN, _HTML = "text/plain", "text/html"


def read_mail(path: Path) -> list[Found]:
    """Return one message."""
    with path.open("rb") as stream:
        message = message_from_binary_file(stream)
    if not message.keys():
        raise NoTextError(Drop.BROKEN_DOCUMENT, "it has no headers of a mail")
    return [_found(message)]


def read_mailbox(path: Path) -> Iterator[Found]:
    """Yield the messages of a mailbox (mbox), each a row."""
    with path.open("rb") as stream:
        if stream.read(len("From ")) != b"From ":
            raise NoTextError(Drop.BROKEN_DOCUMENT, "it begins as no mailbox does")
    box = mailbox.mbox(path, create=False)
    try:
        for count, key in enumerate(box.iterkeys(), 1):
            if count > _MAX_MESSAGES:
                raise NoTextError(Drop.DOCUMENT_TOO_LARGE, f"more than {_MAX_MESSAGES:,} messages")
            yield _found(message_from_bytes(box.get_bytes(key)))  # box[key] ends at a first line that is not ASCII
    finally:
        box.close()


def _found(message: Message) -> Found:
    bodies: dict[str, str] = {}
    others = 0
    for part in islice(message.walk(), _MAX_PARTS):
        kind = part.get_content_type()
        if part.is_multipart():
            continue
        if kind not in (_PLAIN, _HTML) or part.get_content_disposition() == "attachment":
            others += 1
        elif not bodies.get(kind):
            bodies[kind] = _content(part)
    body = bodies.get(_PLAIN, "").strip() or of_html(bodies.get(_HTML, ""), main_content=False).text
    subject = titled(_subject(message))
    changes = (Change.ATTACHMENTS_LEFT_OUT,) if others else ()
    return Found("\n\n".join(each for each in (subject, tidy(body)) if each), subject, changes)


def _content(part: Message) -> str:
    """Return the text of a part; nothing where it is none."""
    content = part.get_payload(decode=True)
    if not isinstance(content, bytes):
        return ""
    charset = part.get_content_charset()
    try:
        return content.decode(charset or "utf-8")
    except (LookupError, ValueError):
        pass
    try:
        return decoded(content)
    except NoTextError:
        return ""


def _subject(message: Message) -> str:
    given = str(message.get("subject") or "")
    try:
        return str(make_header(decode_header(given)))
    except (LookupError, ValueError, HeaderParseError):  # of an unknown encoding, or one that it has not
        return given
