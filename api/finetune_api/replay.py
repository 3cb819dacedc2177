"""Replay: rows like those that the model has seen before, mixed in so that it does not forget them."""

from typing import Annotated

from pydantic import Field, StringConstraints

from finetune_api.base import ApiModel

MAX_REPLAYED = 19  # datasets; one at least is new


class ReplaySpec(ApiModel):
    """Which datasets are replayed, and how much of what is learned is theirs."""

    datasets: list[Annotated[str, StringConstraints(min_length=1, max_length=63)]] = Field(
        min_length=1,
        max_length=MAX_REPLAYED,
        description="Names of datasets of this job, not all of them. Of several the weights say how much is of each.",
    )
    fraction: float = Field(
        ge=0.001,
        le=0.9,
        description="Share of the learned tokens that is theirs, in every stretch of the steps; 0.01 to 0.1 is usual. "
        "An epoch reads the other datasets as their weights say, and as much of these as that takes: a part of them, "
        "another one in each epoch, or all of them several times.",
    )
