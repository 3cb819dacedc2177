"""Why a row is broken or left out, in words: reports and status hold the codes, which are fixed.

Each is the end of a sentence about the row, or about the field of it that is named. Words never hold the row's content.
"""

MAX_LINE_BYTES = 8 * 2**20
MAX_DEPTH = 64
MAX_VALUES = 500_000  # of JSON in one row: numbers of token ids are fewer, and in 8 MiB there is room for millions
MAX_MESSAGES = 512

ROW_WORDS: dict[str, str] = {
    # Broken: they end the job, or are put aside with onBadRow: Quarantine.
    "not_json": "is not valid JSON",
    "invalid_utf8": "is not valid UTF-8",
    "lone_surrogate": "contains half of a surrogate pair (\\ud800 to \\udfff), which is no character",
    "nul_character": "contains a NUL character",
    "too_deep": f"is nested deeper than {MAX_DEPTH} levels",
    "line_too_long": f"is longer than {MAX_LINE_BYTES // 2**20} MiB",
    "too_many_values": f"has more than {MAX_VALUES:,} values of JSON",
    "repeated_field": "names a field twice, so that one of the two values would be lost",
    "not_an_object": "is not a JSON object",
    "missing_field": "is missing",
    "wrong_type": "has the wrong type",
    "empty": "is empty",
    "unsupported_field": "is not supported yet and would be ignored",
    "unknown_role": "is not one of system, user, assistant",
    "roles_not_alternating": "breaks the order: user and assistant alternate after an optional system message",
    "no_assistant_message": "has no assistant message to learn from",
    "last_not_assistant": "does not end with an assistant message",
    "too_many_messages": f"has more than {MAX_MESSAGES} messages",
    "template_failed": "is refused by the chat template",
    "template_not_prefix_stable": "is rendered differently once more messages follow",
    "generation_prompt_not_kept": "is rendered without text that the chat template's prompt for it has",
    # Valid, but of no use.
    "too_long": "is longer than preprocessing.maxSequenceLength, or than the limit chosen for it",
    "no_label": "has nothing to learn: no token of an answer is in what the chat template makes of it",
    "duplicate_of_held_out": "says the same as a row that is held out, and would spoil its loss",
    "other": "is left out for one of several further reasons",
}


_OF_A_FIELD = ("nul_character", "missing_field", "wrong_type", "empty", "unsupported_field", "unknown_role")


def row_words(code: str) -> str:
    """Return what a row is whose field is not named; the code itself where it is that of a newer trainer."""
    words = ROW_WORDS.get(code, code)
    return f"has a field that {words}" if code in _OF_A_FIELD else words
