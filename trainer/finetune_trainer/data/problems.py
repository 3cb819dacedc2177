"""What can be wrong with a row, as a fixed list with words. Words never contain the row's content."""

from dataclasses import dataclass
from enum import StrEnum


class Problem(StrEnum):
    """A row that is not valid: it ends the job, or is put aside with `onBadRow: Quarantine`."""

    NOT_JSON = "not_json"
    INVALID_UTF8 = "invalid_utf8"
    LONE_SURROGATE = "lone_surrogate"
    NUL = "nul_character"
    TOO_DEEP = "too_deep"
    LINE_TOO_LONG = "line_too_long"
    REPEATED_FIELD = "repeated_field"
    NOT_AN_OBJECT = "not_an_object"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    EMPTY = "empty"
    UNSUPPORTED_FIELD = "unsupported_field"
    UNKNOWN_ROLE = "unknown_role"
    ROLES_NOT_ALTERNATING = "roles_not_alternating"
    NO_ASSISTANT = "no_assistant_message"
    LAST_NOT_ASSISTANT = "last_not_assistant"
    TOO_MANY_MESSAGES = "too_many_messages"
    TEMPLATE_FAILED = "template_failed"
    TEMPLATE_NOT_PREFIX_STABLE = "template_not_prefix_stable"


class Drop(StrEnum):
    """A valid row that is left out."""

    TOO_LONG = "too_long"
    NO_LABEL = "no_label"
    DUPLICATE_HELD_OUT = "duplicate_of_held_out"


MAX_LINE_BYTES = 8 * 2**20
MAX_DEPTH = 64
MAX_MESSAGES = 512

WORDS: dict[Problem, str] = {
    Problem.NOT_JSON: "is not valid JSON",
    Problem.INVALID_UTF8: "is not valid UTF-8",
    Problem.LONE_SURROGATE: "contains half of a surrogate pair (\\ud800 to \\udfff), which is no character",
    Problem.NUL: "contains a NUL character",
    Problem.TOO_DEEP: f"is nested deeper than {MAX_DEPTH} levels",
    Problem.LINE_TOO_LONG: f"is longer than {MAX_LINE_BYTES // 2**20} MiB",
    Problem.REPEATED_FIELD: "names a field twice, so that one of the two values would be lost",
    Problem.NOT_AN_OBJECT: "is not a JSON object",
    Problem.MISSING_FIELD: "is missing",
    Problem.WRONG_TYPE: "has the wrong type",
    Problem.EMPTY: "is empty",
    Problem.UNSUPPORTED_FIELD: "is not supported yet and would be ignored",
    Problem.UNKNOWN_ROLE: "is not one of system, user, assistant",
    Problem.ROLES_NOT_ALTERNATING: "breaks the order: user and assistant alternate after an optional system message",
    Problem.NO_ASSISTANT: "has no assistant message to learn from",
    Problem.LAST_NOT_ASSISTANT: "does not end with an assistant message",
    Problem.TOO_MANY_MESSAGES: f"has more than {MAX_MESSAGES} messages",
    Problem.TEMPLATE_FAILED: "is refused by the chat template",
    Problem.TEMPLATE_NOT_PREFIX_STABLE: "is rendered differently once more messages follow",
}


@dataclass(frozen=True, slots=True)
class Broken:
    """One broken row: what is wrong, and in which field, as a path such as `messages[3].content`."""

    problem: Problem
    field: str = ""
    detail: str = ""  # from the code or the template's own literals, never from the row

    @property
    def words(self) -> str:
        return f"{WORDS[self.problem]}{': ' if self.detail else ''}{self.detail}"


def place(uri: str) -> str:
    """A URI within the 256 characters a fault's argument may have; the end tells files apart."""
    return uri if len(uri) <= 256 else "…" + uri[-255:]
