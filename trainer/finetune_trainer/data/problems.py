"""What can be wrong with a row, as a fixed list of codes; their words are in `finetune_api.row_words`."""

from dataclasses import dataclass
from enum import StrEnum

from finetune_api.redact import without_secrets
from finetune_api.row_words import ROW_WORDS

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class Problem(StrEnum):
    """A row that is not valid: it ends the job, or is put aside with `onBadRow: Quarantine`."""

    NOT_JSON = "not_json"
    INVALID_UTF8 = "invalid_utf8"
    LONE_SURROGATE = "lone_surrogate"
    NUL = "nul_character"
    TOO_DEEP = "too_deep"
    LINE_TOO_LONG = "line_too_long"
    TOO_MANY_VALUES = "too_many_values"
    REPEATED_FIELD = "repeated_field"
    RAGGED = "ragged"
    NOT_AN_OBJECT = "not_an_object"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    OTHER_SHAPE = "other_shape"
    EMPTY = "empty"
    OUT_OF_RANGE = "out_of_range"
    UNSUPPORTED_FIELD = "unsupported_field"
    UNKNOWN_FIELD = "unknown_field"
    TWO_FIELDS = "two_fields"
    NOT_TEXT = "not_text"
    MASK_NOT_CLEAR = "mask_not_clear"
    MASK_OF_OTHERS = "mask_of_others"
    MASK_AND_ALL = "mask_and_all"
    UNKNOWN_ROLE = "unknown_role"
    ORDER = "order"
    NO_ASSISTANT = "no_assistant_message"
    LAST_NOT_ASSISTANT = "last_not_assistant"
    MASKED_ANSWER = "masked_answer"
    PROMPTS_DIFFER = "prompts_differ"
    TOO_MANY_MESSAGES = "too_many_messages"
    TOO_MANY_ANSWERS = "too_many_answers"
    TEMPLATE_FAILED = "template_failed"
    GENERATION_PROMPT_NOT_KEPT = "generation_prompt_not_kept"
    NO_REASONING = "no_reasoning"
    NO_STOP_TOKEN = "no_stop_token"
    STOP_TOKEN_SPLIT = "stop_token_split"
    VANISHES = "vanishes"


class Change(StrEnum):
    """What is done to a valid row so that it can be learned; counted in the report."""

    DEVELOPER_AS_SYSTEM = "developer_as_system"
    SYSTEMS_JOINED = "systems_joined"
    LATE_SYSTEM_KEPT = "late_system_kept"
    SYSTEM_IN_USER = "system_in_user_message"
    CALLS_JOINED = "calls_joined"
    NEIGHBOURS_KEPT = "neighbours_kept"
    NEIGHBOURS_JOINED = "neighbours_joined"
    END_LEFT_OUT = "end_left_out"
    GREETING_NOT_LEARNED = "greeting_not_learned"
    PARTS_JOINED = "parts_joined"
    RESULT_AS_JSON = "result_as_json"
    NULLS_LEFT_OUT = "nulls_left_out"
    ATTACHMENTS_LEFT_OUT = "attachments_left_out"
    PICTURES_LEFT_OUT = "pictures_left_out"
    BYTE_ORDER_MARK = "byte_order_mark"
    LINE_ENDS = "line_ends"
    MOJIBAKE = "mojibake"
    CONTROL_CHARACTERS = "control_characters"
    UNICODE_FORM = "unicode_form"
    PERSONAL_DATA = "personal_data_replaced"


HELD_OUT = "evaluation"  # why a row is held out


class Drop(StrEnum):
    """A valid row that is left out."""

    TOO_LONG = "too_long"
    NO_LABEL = "no_label"
    OTHER_LICENSE = "other_license"
    UNKNOWN_LICENSE = "unknown_license"
    IN_EVALUATION_SET = "in_evaluation_set"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    DUPLICATE_HELD_OUT = "duplicate_of_held_out"
    EQUAL_ANSWERS = "equal_answers"
    IDENTICAL_TOKENS = "identical_tokens"
    ONE_ANSWER = "one_answer"
    TIED = "tied"
    SMALL_MARGIN = "small_margin"
    RATED_BOTH_WAYS = "rated_both_ways"
    ONE_SIDED = "one_sided"
    NO_TEXT_LAYER = "no_text_layer"
    ENCRYPTED = "encrypted"
    BROKEN_DOCUMENT = "broken_document"
    EMPTY_DOCUMENT = "empty_document"
    DOCUMENT_TOO_LARGE = "document_too_large"
    EXTRACTION_ENDED = "extraction_ended"
    PERSONAL_DATA = "personal_data"
    OTHER_LANGUAGE = "other_language"
    FEW_WORDS = "few_words"
    MANY_WORDS = "many_words"
    WORD_LENGTHS = "word_lengths"
    FEW_LETTERS = "few_letters"
    SYMBOLS = "symbols"
    BULLET_LINES = "bullet_lines"
    ELLIPSIS_LINES = "ellipsis_lines"
    FEW_STOP_WORDS = "few_stop_words"
    PLACEHOLDER = "placeholder"
    BOILERPLATE = "boilerplate"
    LINE_PUNCTUATION = "line_punctuation"
    SHORT_LINES = "short_lines"
    REPEATED_LINES = "repeated_lines"
    REPEATED_PARAGRAPHS = "repeated_paragraphs"
    REPEATED_WORDS = "repeated_words"
    EMPTY_ANSWER = "empty_answer"
    REFUSAL = "refusal"


@dataclass(frozen=True, slots=True)
class Broken:
    """One broken row: what is wrong, and in which field, as a path such as `messages[3].content`."""

    problem: Problem
    field: str = ""
    detail: str = ""  # from the code or the template's own literals, never from the row

    @property
    def words(self) -> str:
        return f"{ROW_WORDS[self.problem]}{': ' if self.detail else ''}{self.detail}"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A document of which nothing can be used. words: what is wrong there, beyond the reason; never its own."""

    drop: Drop
    words: str = ""


@dataclass(frozen=True, slots=True)
class ReadDocument:
    """What a document says, or a part of it that is a row. changes: what of it was left out."""

    text: str
    changes: tuple[str, ...] = ()


class RefusedError(Exception):
    """A row is broken; raised while it is read, and never seen outside."""

    def __init__(self, problem: Problem, field: str = "", detail: str = "") -> None:
        super().__init__(problem)
        self.broken = Broken(problem, field, detail)


def place(uri: str) -> str:
    """A URI within the 256 characters a fault's argument may have; the end tells files apart."""
    shown = without_secrets(uri)
    return shown if len(shown) <= 256 else "…" + shown[-255:]
