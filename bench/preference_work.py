"""The same preferences for every trainer: real words of known lengths, prepared by our own stage, in its plan's order.

Whoever trains reads these token ids, begins with the same adapter, and updates it after the same pairs or answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

from bench.workload import RANK, Workload, local_path, prepare_run, write_rows
from finetune_api.layout import PLAN, join
from finetune_trainer.data.examples import Examples, open_examples
from finetune_trainer.mismatched import Mismatched
from finetune_trainer.runplan import RunPlan

ANSWER_TOKENS = 200
LEARNING_RATE = 1e-4
BETA = 0.1  # also KTO's, and ORPO's lambda
SEED = 42


@dataclass(frozen=True)
class Case:
    """What is trained. batch: pairs of a step, or answers of one."""

    method: str
    prompt_tokens: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.prompt_tokens}"


class PairIds(NamedTuple):
    """Both answers to a prompt."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class ThumbIds(NamedTuple):
    """An answer, and the one of another prompt that KTO reads with this prompt too."""

    prompt: list[int]
    answer: list[int]
    other: list[int]
    good: bool


@dataclass(frozen=True)
class PreferenceWork:
    """One prepared run of a case."""

    case: Case
    run: Workload

    @classmethod
    def prepare(cls, folder: Path, case: Case, model_folder: Path, steps: int, threads: int) -> Self:
        """Prepare so many steps of the case in `folder`."""
        folder.mkdir(parents=True)
        rows = _rows(case, model_folder, steps * case.batch)
        spec = {
            "model": {"uri": model_folder.as_uri()},
            "method": {"type": case.method} | _options(case.method),
            "peft": {"type": "LoRA", "rank": RANK},
            "datasets": [{"uri": write_rows(folder, rows).as_uri()}],
            "hyperparameters": {
                "maxSteps": steps,
                "globalBatchSize": case.batch,
                "learningRate": LEARNING_RATE,
                "warmupRatio": 0.0,
                "schedule": "Linear",
                "weightDecay": 0.0,
                "seed": SEED,
            },
            "evaluation": {"holdoutFraction": 0},
        }
        digest = prepare_run(folder, spec, threads)
        return cls(case, Workload(folder, _without_sample_prompts(Workload(folder, digest))))

    @property
    def start_file(self) -> Path:
        """The adapter that all begin with, once ours has begun."""
        return self.run.folder / "start.safetensors"

    @property
    def tree_ratio(self) -> float:
        """How many times as many tokens are read as there are, were each prompt computed once."""
        train = self.run.plan["train"]
        return train["total_tokens"] / train["stored_tokens"]

    @property
    def step_tokens(self) -> float:
        """Tokens of the answers' whole sequences, on the mean of the steps."""
        return self.run.plan["train_tokens"] / self.run.plan["hyperparameters"]["total_steps"]

    @cached_property
    def examples(self) -> Examples:
        return open_examples(local_path(self.run.plan["train"]["arrays"]["tokens"]["uri"]).parent)

    @property
    def order(self) -> list[list[int]]:
        """The examples of each step."""
        import safetensors.numpy

        arrays = safetensors.numpy.load_file(local_path(self.run.plan["batches"]["uri"]))
        return [arrays["examples"][begin:end].tolist() for begin, end in pairwise(arrays["step_offsets"])]

    @property
    def pairs(self) -> list[list[PairIds]]:
        """The pairs of each step."""
        return [[self._pair(example) for example in step] for step in self.order]

    @property
    def thumbs(self) -> list[list[ThumbIds]]:
        """The rated answers of each step."""
        hyper = self.run.plan["hyperparameters"]
        others = Mismatched.of(self.examples, hyper["seed"], hyper["max_sequence_length"])
        return [[self._thumb(example, others.partner(example)) for example in step] for step in self.order]

    def _pair(self, example: int) -> PairIds:
        (prompt, chosen), (_, rejected) = self._sides(example)
        return PairIds(prompt, chosen, rejected)

    def _thumb(self, example: int, other: int) -> ThumbIds:
        ((prompt, answer),), ((_, others),) = self._sides(example), self._sides(other)
        return ThumbIds(prompt, answer, others, bool(self.examples.columns["label"][example] > 0))

    def _sides(self, example: int) -> list[tuple[list[int], list[int]]]:
        """Return prompt and answer of each sequence of an example."""
        found: list[tuple[list[int], list[int]]] = []
        for tokens, labels in map(self.examples.read, self.examples.sequences_of([example])):
            begin = int(labels.argmax())
            found.append((tokens[:begin].tolist(), tokens[begin:].tolist()))
        return found


def _options(method: str) -> dict[str, Any]:
    """Return what would else be the methods' own: the same for all trainers."""
    weights = {"desirableWeight": 1.0, "undesirableWeight": 1.0}
    options = {"DPO": {"beta": BETA}, "ORPO": {"lambda": BETA}, "KTO": {"beta": BETA, **weights}}
    return {method.lower(): options[method]}


def _without_sample_prompts(run: Workload) -> str:
    """Take the prompts out of the plan whose answers are shown: no other trainer gives such. Return its new digest."""
    path = local_path(join(run.config.run_uri, PLAN))
    plan = RunPlan.model_validate_json(path.read_bytes()).model_copy(update={"sample_prompts": []})
    path.write_text(plan.model_dump_json())
    return plan.digest()


def _rows(case: Case, model_folder: Path, count: int) -> list[dict[str, Any]]:
    texts = _Texts(model_folder)
    if case.method == "KTO":
        return [
            {
                "prompt": texts.take(case.prompt_tokens),
                "completion": " " + texts.take(ANSWER_TOKENS),
                "label": number % 2 == 0,
            }
            for number in range(count)
        ]
    return [
        {
            "prompt": texts.take(case.prompt_tokens),
            "chosen": " " + texts.take(ANSWER_TOKENS),
            "rejected": " " + texts.take(ANSWER_TOKENS),
        }
        for _ in range(count)
    ]


class _Texts:
    """The demo's conversations as one long text, of which pieces of so many tokens are taken, one after another."""

    def __init__(self, model_folder: Path) -> None:
        from tokenizers import Tokenizer

        from demo.assets import conversations

        words = " ".join(turn for _, turns in conversations() for turn in turns).split()
        text = " ".join(words)
        encoded = Tokenizer.from_file(str(model_folder / "tokenizer.json")).encode(text, add_special_tokens=False)
        self._text = text
        self._begins: Sequence[int] = [begin for begin, _ in encoded.offsets]
        self._place = 0

    def take(self, tokens: int) -> str:
        """Return the next whole words that are so many tokens, or a few more."""
        first, place = self._place, self._place + tokens
        while " " not in self._text[self._begins[place] - 1 : self._begins[place] + 1]:  # a token that begins no word
            place += 1
        self._place = place
        return self._text[self._begins[first] : self._begins[place]].strip()
