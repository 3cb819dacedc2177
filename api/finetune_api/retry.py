"""Decide after each attempt whether its job ends, and else how long to wait: the one retry rule. Pure.

The operator and `finetune run` ask here, and docs/reasons.md is written from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from finetune_api import defaults
from finetune_api.job import RecoverySpec
from finetune_api.names import MAX_ATTEMPTS, Stage
from finetune_api.reasons import FINAL_EXIT_CODES, Reason, reason_of_exit
from finetune_api.status import AttemptStatus

FINAL_SECOND_TIME = (Reason.HOST_OOM, Reason.DISK_LIMIT)  # within one stage: once may be chance, twice is the size
STORAGE_REASONS = (Reason.DATA_NOT_FOUND, Reason.ACCESS_DENIED)
PATIENCE_S = 900  # for what a person must fix outside the job: missing or denied storage, a missing Secret, an image
FIRST_DELAY_S = 15.0
MAX_DELAY_S = 60.0
MAX_REFUSED_DELAY_S = 600.0  # after pods that their node refused: the 999 attempts there may be then take a week


class JobEnd(StrEnum):
    """Why no attempt follows."""

    FINAL = "Final"  # the next one would end alike
    PATIENCE = "Patience"  # storage stayed missing or denied for longer than the patience
    RETRIES = "Retries"  # recovery.maxRetries, or the numbers of attempts, are used up


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How often and how long a job is tried."""

    max_retries: int
    max_disruptions: int
    patience_s: float

    @classmethod
    def of(cls, recovery: RecoverySpec | None, patience_s: float = PATIENCE_S) -> "Limits":
        """Return the limits of a job, with the defaults of absent fields."""
        recovery = recovery or RecoverySpec()
        return cls(
            max_retries=defaults.given(recovery.max_retries, defaults.MAX_RETRIES),
            max_disruptions=defaults.given(recovery.max_disruptions, defaults.MAX_DISRUPTIONS),
            patience_s=patience_s,
        )


def is_prepared_again(stage: Stage | str, exit_code: int) -> bool:
    """Return True if an attempt to train has ended because its plan was of another release: prepare comes next."""
    return stage == Stage.TRAIN and reason_of_exit(exit_code) == Reason.PLAN_OUTDATED


def failure_class(
    stage: Stage | str, exit_code: int, earlier: Sequence[AttemptStatus]
) -> Literal["Failure", "Waiting", "Superseded"]:
    """Return what a failed attempt counts as; only Failure uses up a retry.

    Waiting: somebody may still put the data there. Superseded: its plan was of another release, and the job is prepared
    again; a second time that did not help, as when nodes hold different images.
    """
    reason = reason_of_exit(exit_code)
    if is_prepared_again(stage, exit_code) and all(each.reason != reason for each in earlier):
        return "Superseded"
    return "Waiting" if stage == Stage.PREPARE and reason in STORAGE_REASONS else "Failure"


def job_end(
    attempts: Sequence[AttemptStatus], *, failures: int, waited_s: float | None, limits: Limits
) -> JobEnd | None:
    """Return why the job ends after the last of its attempts, which has ended; None when another one follows.

    attempts: oldest first. failures: all attempts of class Failure, also those that are no longer listed. waited_s:
    seconds since the first of the attempts in class Waiting ended, None when nothing that a user mends is waited for.
    """
    last = attempts[-1]
    if last.attempt_class == "Waiting" and waited_s is not None and waited_s >= limits.patience_s:
        return JobEnd.PATIENCE
    if last.attempt_class == "Failure" and _is_final(last, attempts[:-1]):
        return JobEnd.FINAL
    if failures > limits.max_retries or last.number >= MAX_ATTEMPTS:
        return JobEnd.RETRIES
    return None


def _is_final(last: AttemptStatus, earlier: Sequence[AttemptStatus]) -> bool:
    """Return whether trying again without a change is pointless. Exit codes of a newer trainer count by their range."""
    if last.exit_code in FINAL_EXIT_CODES:
        return True
    return last.reason in FINAL_SECOND_TIME and any(
        (each.stage, each.reason) == (last.stage, last.reason) for each in earlier
    )


def delay_s(attempts: Sequence[AttemptStatus]) -> float:
    """Return the seconds to wait after the last attempt: 15, 30, then 60 while it goes on; a first retry comes at once.

    Waiting attempts are delayed from the first on, up to 600 s where a node refused the pod; disrupted or suspended
    ones never.
    """
    last_class = attempts[-1].attempt_class if attempts else None
    if last_class not in ("Failure", "Waiting"):
        return 0.0
    in_a_row = next(
        (index for index, each in enumerate(reversed(attempts)) if each.attempt_class != last_class), len(attempts)
    )
    doublings = in_a_row - 1 if last_class == "Waiting" else in_a_row - 2
    longest_s = MAX_REFUSED_DELAY_S if attempts[-1].reason == Reason.POD_NOT_STARTED else MAX_DELAY_S
    return min(longest_s, FIRST_DELAY_S * 2**doublings) if doublings >= 0 else 0.0
