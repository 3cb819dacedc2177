"""Which FineTuneJobs the API server is asked for: those that are not finished, and by themselves those that are.

A phase is for people, so the selectors only spare work: what they bring is judged by its conditions. A server whose CRD
does not name the field, as one of an earlier release, answers 400 and is asked for all of them.
"""

import logging

from finetune_api.status import FINAL_PHASES, PHASE_FIELD, Phase

log = logging.getLogger(__name__)

UNFINISHED = ",".join(f"{PHASE_FIELD}!={phase}" for phase in FINAL_PHASES)
# What has no phase yet is new. A phase of a later operator is in both: its conditions tell.
FINISHED = ",".join(f"{PHASE_FIELD}!={phase}" for phase in ("", *(each for each in Phase if each not in FINAL_PHASES)))
PARAMETER = "fieldSelector"

BAD_REQUEST = 400
CANNOT_SELECT = (
    f"the installed CRD cannot select FineTuneJobs by {PHASE_FIELD}: finished ones are listed and watched too, which "
    "costs memory and time for each that is kept; install the CRD of this release"
)


class PhaseSelection:
    """Whether the server selected by phase when it was last asked; a change is logged once."""

    def __init__(self) -> None:
        self._works = True

    def notes(self) -> list[str]:
        """Return what is good to know, in words."""
        return [] if self._works else [CANNOT_SELECT]

    def answered(self, *, selected: bool) -> None:
        """The server answered a request with a selector, or the same one without."""
        if selected != self._works:
            self._works = selected
            if selected:
                log.info("the API server selects FineTuneJobs by phase")
            else:
                log.warning(CANNOT_SELECT)
