"""The reasons as a page for people, `docs/reasons.md`, made from the table that the code uses.

`make crds` writes it, and a test fails when the page is stale.
"""

from finetune_api import retry
from finetune_api.names import Stage
from finetune_api.quality import meanings
from finetune_api.reasons import EXIT_CODES, FAULTS, FINAL_EXIT_CODES, Fault, Reason

_DELAYS = f"{retry.FIRST_DELAY_S:g}, {2 * retry.FIRST_DELAY_S:g} and then every {retry.MAX_DELAY_S:g} s"
_PHRASES = ("difference", "remedy", "field")  # places of words, where others take a name or a number
_HEAD = f"""# Reasons and exit codes

Generated from `reasons.py` and `retry.py` in `api/finetune_api` by `make crds`; do not edit.

A condition's `reason` is one of the reasons below; its `message` is the sentence, with the places filled in.
Exit codes are those of the trainer's container. A first retry comes at once, the next ones after {_DELAYS}.

"""


def _retry(reason: Reason) -> str:
    """Return what the retry rule makes of an attempt that ends with this reason, in words."""
    if reason is Reason.COMMITTED:
        return "-"
    code = EXIT_CODES[reason]
    if retry.failure_class(Stage.PREPARE, code, ()) == "Waiting":
        return f"in prepare for {retry.PATIENCE_S // 60} minutes (`finetune run`: no), in train no"
    if code in FINAL_EXIT_CODES:
        return "no: change something first"
    if retry.failure_class(Stage.TRAIN, code, ()) == "Superseded":
        return "yes, from prepare on; counted by `recovery.maxRetries` from the second time on"
    counted = "counted by `recovery.maxRetries`"
    return f"once in each stage, {counted}" if reason in retry.FINAL_SECOND_TIME else f"yes, {counted}"


def _sentence(fault: Fault) -> str:
    """Return the fault's sentence; a place that takes whole phrases shows the usual one instead of its name."""
    text = FAULTS[fault].text
    for place, usual in FAULTS[fault].unknown.items():
        text = text.replace(f"{{{place}}}", usual) if place in _PHRASES else text
    return text


def page() -> str:
    """The whole page, as Markdown."""
    lines = ["| exit code | reason | tried again | what happened and what to do |", "|---|---|---|---|"]
    for reason, code in EXIT_CODES.items():
        for fault in Fault:
            if FAULTS[fault].reason is reason:
                lines.append(f"| {code} | `{reason}` | {_retry(reason)} | `{fault}`: {_sentence(fault)} |")
    lines += ["", "What `QualityConcern` says of the model itself; the job goes on, and ends, as it would without:", ""]
    lines += ["| reason | what was measured and what to do |", "|---|---|"]
    lines += [f"| `{reason}` | {text} |" for reason, text in meanings().items()]
    others = ", ".join(f"`{reason}`" for reason in Reason if reason not in EXIT_CODES and reason not in meanings())
    once = " and ".join(f"`{reason}`" for reason in retry.FINAL_SECOND_TIME)
    return (
        _HEAD
        + "\n".join(lines)
        + f"\n\nReasons of the operator itself, each with a message of its own: {others}.\n\n"
        + f"{once} are tried again once: in the same stage, a second time ends the job, whatever retries are left.\n"
    )
