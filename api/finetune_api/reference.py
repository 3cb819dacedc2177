"""The reasons as a page for people, `docs/reasons.md`, made from the table that the code uses.

`make crds` writes it, and a test fails when the page is stale.
"""

from finetune_api.reasons import EXIT_CODES, FAULTS, Fault, Reason, is_final

_HEAD = """# Reasons and exit codes

Generated from `api/finetune_api/reasons.py` by `make crds`; do not edit.

A condition's `reason` is one of the reasons below; its `message` is the sentence, with the places filled in.
Exit codes are those of the trainer's container.

"""


def _retry(reason: Reason) -> str:
    if reason is Reason.COMMITTED:
        return "-"
    return "no: change something first" if is_final(reason) else "yes, counted by `recovery.maxRetries`"


def page() -> str:
    """The whole page, as Markdown."""
    lines = ["| exit code | reason | tried again | what happened and what to do |", "|---|---|---|---|"]
    for reason, code in EXIT_CODES.items():
        for fault in Fault:
            if FAULTS[fault].reason is reason:
                lines.append(f"| {code} | `{reason}` | {_retry(reason)} | `{fault}`: {FAULTS[fault].text} |")
    others = ", ".join(f"`{reason}`" for reason in Reason if reason not in EXIT_CODES)
    return _HEAD + "\n".join(lines) + f"\n\nReasons of the operator itself, each with a message of its own: {others}.\n"
