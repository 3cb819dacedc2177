"""Names of fields that rows and messages have in use: which are read under which spelling, and which carry nothing.

A field that stands nowhere here is refused, or passed over where the job names it: nothing that a row says is lost
without a word. Spellings are those of OpenAI, TRL, axolotl, LLaMA-Factory, ms-swift, torchtune, Mistral and ShareGPT.
"""

import re

ROLE = ("role", "from")
CONTENT = ("content", "value")
REASONING = ("reasoning_content", "reasoning", "thinking")
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
QUESTION = ("question", "query", "prompt", "input")
ANSWER = ("answer", "response", "output")
CONVERSATION = ("conversations", "conversation", "dialogue", "dialog")

# Whether a message is learned. Those of the first kind say it, those of the second the contrary.
LEARNED = ("weight", "train", "training", "trainable", "loss", "loss_mask", "loss_scale", "loss_weight", "learn")
NOT_LEARNED = ("masked",)

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "function_response": "tool",
    "function_result": "tool",
    "function_call": "call",
    "tool_call": "call",
    "tool_calls": "call",
}

# Facts about a row, about where it comes from, or settings of a service: nothing of them is said in the conversation.
_OF_ROWS = """
    id ids uuid guid idx index row row_id row_index example_id sample_id prompt_id question_id conversation_id
    session_id message_id turn_id doc_id document_id user_id __index_level_0__
    source sources source_dataset data_source dataset dataset_name dataset_id subset split origin file file_name
    filename file_path filepath path url uri link domain repo repo_name repository commit license licence
    category categories subcategory topic topics subject subjects genre tag tags task tasks task_name task_type
    problem_type question_type type kind
    difficulty level language languages lang locale language_score language_probability
    author created created_at updated_at date datetime timestamp time year crawl dump snapshot version revision
    model model_name generator generated_by annotator annotator_id
    length len num_turns turns_count num_tokens token_count tokens_count n_tokens word_count char_count
    perplexity quality quality_score score scores rating ratings toxicity similarity confidence margin
    score_chosen score_rejected chosen_score rejected_score chosen_rating rejected_rating chosen_model rejected_model
    hash md5 sha1 sha256 checksum minhash
    meta metadata extra extra_info info parallel_tool_calls
"""
METADATA = frozenset(_OF_ROWS.split())
_OF_MESSAGES = """
    id uuid message_id turn_id parent_id index turn created created_at timestamp date time
    model model_name generator source lang language meta metadata token_count num_tokens score rating
"""
METADATA_OF_MESSAGES = frozenset(_OF_MESSAGES.split())

MAX_SHOWN = 32
# The column in which pandas writes each row's place in its table, unless it is told not to; read and written again.
_INDEX = re.compile(r"(Unnamed: [0-9]+([.][0-9]+)?)?")
_WHOLE_NUMBER = re.compile(r"[0-9]+([.]0)?")


def is_fact(name: str, value: object) -> bool:
    """Whether a field is a fact about its row, by its name, or, in a column without a name, by being a row's place."""
    return name in METADATA or (_INDEX.fullmatch(name) is not None and _WHOLE_NUMBER.fullmatch(str(value)) is not None)


def shown(name: str) -> str:
    """Return a field's name for an error or report: a key may be data too, so only what looks like a name is told."""
    looks_like_one = len(name) <= MAX_SHOWN and name.replace("-", "_").isidentifier()
    return name if looks_like_one else "(other)"


def says_nothing(value: object) -> bool:
    """Whether a value is as good as no value: null, a text without words, an empty list or object."""
    return value is None or value in ("", [], {}) or (isinstance(value, str) and value.isspace())
