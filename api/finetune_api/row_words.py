"""Why a row is broken or left out, in words: reports and status hold the codes, which are fixed.

Each is the end of a sentence about the row, or about the field of it that is named. Words never hold the row's content.
"""

MAX_LINE_BYTES = 8 * 2**20
MAX_DEPTH = 64
MAX_VALUES = 500_000  # of JSON in one row: numbers of token ids are fewer, and in 8 MiB there is room for millions
MAX_MESSAGES = 512
MAX_ANSWERS = 64  # to one prompt
SHARED_WORDS = 13  # as GPT-3 counts them (arXiv 2005.14165, appendix C): fewer are often a way of speaking
MIN_ROW_WEIGHT, MAX_ROW_WEIGHT = 1e-6, 1e6  # of one row, unless it is 0: what is beyond is rather another figure

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
    "ragged": "has not as many cells as the header has columns",
    "not_an_object": "is not a JSON object",
    "missing_field": "is missing",
    "wrong_type": "has the wrong type",
    "other_shape": "has another shape than the rows of its dataset; make a dataset of the rows of each, or name "
    "their fields in datasets[].columns",
    "empty": "is empty",
    "out_of_range": "is a number beyond what it may be",
    "unsupported_field": "is not supported yet and would be ignored",
    "unknown_field": "is not known here, so that what it says would be lost; name it in datasets[].columns or "
    "datasets[].ignoreFields",
    "two_fields": "says what another field says too, in other words; leave one of them out, or list it in "
    "datasets[].ignoreFields",
    "not_text": "has a part that is no text; only text can be learned, so leave such rows out",
    "mask_not_clear": "does not say clearly whether the message is learned; write true or false, or 1 or 0",
    "mask_of_others": "asks to learn a message that is not an assistant's; leave it out, or see method.sft.lossOn",
    "mask_and_all": "asks not to learn its message, while method.sft.lossOn: All learns all of a row; leave one out",
    "unknown_role": "is no role that is known; write system, user, assistant or tool",
    "order": "breaks the order of a conversation",
    "no_assistant_message": "has no assistant message to learn from",
    "too_many_answers": f"has more than {MAX_ANSWERS} answers to one prompt",
    "last_not_assistant": "ends with a message that is not the assistant's, which alone can be preferred",
    "masked_answer": "asks not to learn the answer that it is about; leave the mask out, or the row",
    "prompts_differ": "has two answers that follow different messages, so that they cannot be compared",
    "too_many_messages": f"has more than {MAX_MESSAGES} messages",
    "template_failed": "is refused by the chat template",
    "generation_prompt_not_kept": "is rendered without text that the chat template's prompt for it has",
    "no_reasoning": "has no reasoning for the block of it that the chat template's prompt opens",
    "no_stop_token": "ends in no token at which the base model stops",
    "stop_token_split": "ends in the text of a token at which the base model stops, which the tokenizer reads as other "
    "tokens",
    "vanishes": "is not in what the chat template makes of the row",
    # Valid, but of no use.
    "too_long": "is longer than preprocessing.maxSequenceLength, or than the limit chosen for it",
    "no_label": "has nothing to learn: its weight is 0, or no token of an answer is in what the chat template makes of "
    "it",
    "other_license": "is under a licence that datasets[].licenses does not allow",
    "unknown_license": "does not say which licence it is under, by which datasets[].licenses chooses rows",
    "in_evaluation_set": f"shares {SHARED_WORDS} words in a row with an evaluation set of "
    "preprocessing.decontaminateAgainst",
    "duplicate": "says the same as another row, which is kept (ref)",
    "near_duplicate": "says nearly the same as another row, which is kept (ref)",
    "duplicate_of_held_out": "says the same as a row that is held out, and would spoil its loss",
    "equal_answers": "has two answers that say the same, so that nothing is preferred",
    "identical_tokens": "has two answers that are the same tokens once they are rendered and cut to the limit",
    "one_answer": "has one answer alone, which nothing can be preferred to",
    "tied": "has answers that are all scored alike, so that none is preferred",
    "small_margin": "has no two answers whose scores differ by datasets[].preference.minMargin",
    "rated_both_ways": "rates an answer that another row of the same prompt rates the other way",
    "one_sided": "rates an answer to whose prompt no other one is left that is rated the other way",
    "no_text_layer": "is a PDF of pictures without text, as of scanned pages; recognise its text first (OCR)",
    "encrypted": "is encrypted; write it without a password",
    "broken_document": "is damaged, or not what the end of its name says",
    "empty_document": "has no text",
    "document_too_large": "is larger than a document may be; divide it",
    "extraction_ended": "takes more time or memory to read than a document may, or ends what reads it",
    "personal_data": "holds personal data or a secret of a type that the job drops (preprocessing.pii)",
    # Poor, by the rules of preprocessing.quality.
    "other_language": "is in none of the languages of preprocessing.quality.languages",
    "few_words": "has few words",
    "many_words": "has very many words",
    "word_lengths": "has words that are very short or very long in the mean",
    "few_letters": "has many words without a letter",
    "symbols": "has many number signs or ellipses",
    "bullet_lines": "has hardly a line that does not begin with a bullet",
    "ellipsis_lines": "has many lines that end with an ellipsis",
    "few_stop_words": "has hardly any of the words that English sentences are made with",
    "placeholder": "holds the place of what somebody was to write, as lorem ipsum or [insert …] do",
    "boilerplate": "has many lines about cookies, terms of use, privacy or missing JavaScript",
    "line_punctuation": "has few lines that end with a mark of punctuation",
    "short_lines": "has many short lines",
    "repeated_lines": "says the same lines again and again",
    "repeated_paragraphs": "says the same paragraphs again and again",
    "repeated_words": "says the same words after another again and again",
    "empty_answer": "has an answer that says nothing",
    "refusal": "has an answer that refuses, or speaks of being a language model",
    "other": "is left out for one of several further reasons",
}


_OF_A_FIELD = (
    "nul_character",
    "missing_field",
    "wrong_type",
    "empty",
    "out_of_range",
    "unsupported_field",
    "unknown_field",
    "two_fields",
    "mask_not_clear",
    "mask_of_others",
    "mask_and_all",
    "unknown_role",
)

# What is done to a valid row so that it can be learned: the end of a sentence about the row.
CHANGE_WORDS: dict[str, str] = {
    "developer_as_system": "has a developer message, which becomes a system message",
    "systems_joined": "begins with several system messages, which are joined by an empty line",
    "late_system_kept": "has a system message after the beginning, which stays where it is",
    "system_in_user_message": "has a system message, which begins the first user message (SystemMessages: InUser)",
    "calls_joined": "has calls as messages of their own, which belong to the answer before them",
    "neighbours_kept": "has two messages of one role after another, which stay apart",
    "neighbours_joined": "has messages of one role after another, which are joined by an empty line",
    "end_left_out": "ends with messages that no answer follows, which are left out",
    "greeting_not_learned": "begins with an answer to nothing, which is shown to the model and not learned",
    "parts_joined": "has a content of several parts of text, which are joined as they stand",
    "result_as_json": "has the result of a tool as an object or a list, which is written as JSON",
    "nulls_left_out": "has nulls in tools or calls, which the columns of a table fill in for what is absent",
    "attachments_left_out": "is a mail with attachments, of which nothing is learned",
    "pictures_left_out": "has pages that are pictures without text, of which nothing is learned",
    "byte_order_mark": "begins with a byte order mark, which is left out",
    "line_ends": "has line ends of Windows or of an old Mac, which become line feeds",
    "mojibake": "has characters that a wrong encoding made of others, as é became Ã©, which are put right",
    "control_characters": "has control characters outside of code, which are left out",
    "unicode_form": "has characters in several parts, as a letter and its accent, which are composed (Unicode NFC)",
    "personal_data_replaced": "holds personal data or secrets, in whose place their types or pseudonyms stand",
}


def row_words(code: str) -> str:
    """Return what a row is whose field is not named, or what was done to it; of a newer trainer's code, the code."""
    words = ROW_WORDS.get(code) or CHANGE_WORDS.get(code, code)
    return f"has a field that {words}" if code in _OF_A_FIELD else words
