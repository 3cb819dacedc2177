"""What a training method decides: all that the rest of the trainer asks it, so that nothing asks which one it is.

Prepare reads these values too, so a method's module imports torch for its types alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy.typing as npt

from finetune_api.job import DatasetFormat, LossOn, MethodSpec, Schedule, TooLong
from finetune_api.text_quality import QualityPreset
from finetune_trainer.data.examples import TokenRun, Tree
from finetune_trainer.data.kind import Kind
from finetune_trainer.runplan import Denominator, RunPlan

if TYPE_CHECKING:
    from torch import Tensor

    from finetune_trainer.inputs import Batch
    from finetune_trainer.policy import Scores
    from finetune_trainer.sizing import Choices

T = TypeVar("T")


class Default(NamedTuple, Generic[T]):
    """What stands in for a value that the job leaves open, and why."""

    value: T
    reason: str


class Loss(NamedTuple):
    """What a pass adds to a step: `sum`, a differentiable fp32 scalar, and beside it the sums that `figures` names."""

    sum: "Tensor"
    figures: Mapping[str, "Tensor"]


def _nothing(scores: "Scores", batch: "Batch") -> Mapping[str, "Tensor"]:  # noqa: ARG001 (every method's has it)
    """Measure nothing beside the loss."""
    return {}


def _all(batch: "Batch") -> Sequence[bool]:
    """Take every answer for one to give."""
    return [True] * len(batch.label_counts)


def _settled(spec: MethodSpec, columns: Mapping[str, npt.NDArray[Any]], choices: "Choices") -> MethodSpec:  # noqa: ARG001
    """Have no options that depend on the examples."""
    return spec


def _as_it_is(method: "Method", _: MethodSpec) -> "Method":
    """Have no options that the loss needs."""
    return method


def answer_stop_token_ids(plan: RunPlan, model_stop_ids: list[int]) -> list[int]:
    """Return the tokens that training put at the end of answers; an answer ends nowhere else."""
    return plan.stop_token_ids or model_stop_ids


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a method decides about rows, the plan, the step, held-out rows and the card.

    A job's losses are of *units*, which the denominator names. `losses` gives that of each unit of a pass, in order,
    for held-out rows; `loss` gives their sum, each times its weight, for the step: so both are the same function, as
    are `measures` and the figures of `loss`."""

    # Rows
    kinds: tuple[Kind[Any], ...]  # that it takes
    labels: Callable[[MethodSpec], LossOn]  # which tokens of its rows are to be learned
    choose: Callable[[MethodSpec, "Choices"], MethodSpec]  # fills in the options left open, and records them
    # Fills in the options that depend on the columns of the examples that are trained on, and records them.
    settle: Callable[[MethodSpec, Mapping[str, npt.NDArray[Any]], "Choices"], MethodSpec] = _settled
    examples: Callable[[Sequence[TokenRun]], list[Tree]]  # what a row's sequences, or a text's pieces, become
    # What a good and a bad answer to one prompt become; None where single answers are learned as they are.
    pairs: Callable[[TokenRun, TokenRun], Tree] | None = None
    too_long: TooLong  # what becomes of rows that are too long, by default
    quality_preset: QualityPreset = QualityPreset.CHAT  # which rules rows are judged by, by default
    drops_near_copies: bool = False  # by default, where it drops copies
    needs_end_token: bool  # whether every row ends with the tokenizer's end token

    # The plan
    longest_tokens: int | None  # of a sequence, by default; None: as many as the model and the memory allow
    sequences: int = 1  # of an example at most, where they have to be in one pass
    ranks: tuple[int, ...]  # of the adapter, from which the number of tokens to learn chooses
    epochs: Callable[[float], Default[float]]  # by the rows that one of them reads
    schedule: Default[Schedule]
    denominator: Denominator
    learning_rate: Default[float] | None = None  # None: by the base model's family and width

    # The step, and held-out rows
    loss: Callable[["Scores", "Batch"], Loss]
    losses: Callable[["Scores", "Batch"], "Tensor"]  # (units,) fp32, nats
    figures: tuple[str, ...] = ()  # of `loss`: what metrics.jsonl tells beside it, each over the step's denominator
    measures: Callable[["Scores", "Batch"], Mapping[str, "Tensor"]] = _nothing  # (units,) of each figure
    wanted: Callable[["Batch"], Sequence[bool]] = _all  # (sequences,) whether an answer is one to give
    needs_reference: bool = False  # whether `batch.reference` is to be there
    needs_drift: bool = False  # and `batch.drift`, of examples of one sequence each
    bound: Callable[["Method", MethodSpec], "Method"] = _as_it_is  # with the options of a job

    # Answers of the tuned model
    stop_token_ids: Callable[[RunPlan, list[int]], list[int]]  # that end them; the base model's are given
    # The tokens whose probability at the end of held-out answers tells whether the model ends them: none where no
    # answer ends with one, None for a method without answers.
    answer_end_ids: Callable[[RunPlan], list[int] | None]

    # Words of the card
    name: str
    rows_name: str  # what its examples are made of

    @property
    def formats(self) -> tuple[DatasetFormat, ...]:
        """The shapes of rows that it takes, in the order of the CRD."""
        return tuple(each for each in DatasetFormat if any(each in kind.formats for kind in self.kinds))

    @property
    def takes_documents(self) -> bool:
        """Whether a row may be a plain text, which is what a document is."""
        return DatasetFormat.TEXT in self.formats

    @property
    def takes_chats(self) -> bool:
        """Whether a row may be a conversation, which the chat template renders."""
        return any(kind.may_be_rendered for kind in self.kinds)
