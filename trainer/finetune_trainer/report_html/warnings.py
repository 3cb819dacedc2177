"""What speaks against the data of a report, each with what to do. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from finetune_api.duplicates import Copies
from finetune_api.row_words import row_words
from finetune_trainer.report_html.details import SECTIONS

MANY_DROPPED = 0.1  # of all rows
MANY_COPIES = 0.1  # of the rows that are left
FEW_LEARNED = 0.025  # of all tokens
MUCH_REPEATED = 0.2  # of all tokens, by conversations that are unrolled

Report = Mapping[str, Any]


def warnings(report: Report) -> list[str]:
    """Return what a person should look at before paying for a training, the worst first."""
    return [*_of_rows(report), *_of_lengths(report), *_of_words(report), *_of_stages(report), *_of_files(report)]


def _of_rows(report: Report) -> Iterator[str]:
    rows, dropped = int(report["rows_in"]), dict[str, int](report["dropped"])
    lost = sum(dropped.values())
    if rows and lost > MANY_DROPPED * rows:
        reason, count = max(dropped.items(), key=lambda each: (each[1], each[0]))
        yield (
            f"{lost / rows:.0%} of the rows are left out, most of them ({count:,}) because each {row_words(reason)}: "
            "see the places below, and mend the files or leave these rows out of them"
        )
    if report["state"] == "prepared" and not sum(file["rows_held_out"] for file in report["files"]):
        yield (
            "no row is held out, so that nothing will tell whether the model has learned more than its own rows: "
            "write evaluation.holdoutFraction, or add rows"
        )
    found: Report = report.get("duplicates", {})
    exact: Report = found.get("exact", {})
    copies = int(exact.get("copies", 0))
    if exact.get("action") == Copies.REPORT and copies > MANY_COPIES * (copies + int(found["distinct_rows"])):
        yield (
            f"{copies:,} rows say what another row says: each of them is learned again; write "
            "preprocessing.deduplication.exact: Drop unless they are to count more"
        )


def _of_lengths(report: Report) -> Iterator[str]:
    lengths = report.get("lengths")
    if lengths and lengths["label_share"] < FEW_LEARNED:
        yield (
            f"only {lengths['label_share']:.1%} of the tokens are learned, the others are read as prompts: see by "
            "`finetune data show` whether the answers are where they should be"
        )
    answers = report.get("answers", {})
    if lengths and answers.get("repeated_tokens", 0) > MUCH_REPEATED * lengths["tokens"]:
        yield (
            f"{answers['repeated_tokens']:,} tokens are read more than once, as the chat template writes earlier "
            "answers otherwise than they were given: see `answers` among the choices"
        )


def _of_words(report: Report) -> Iterator[str]:
    for index, dataset in enumerate(report.get("datasets", ())):
        unknown = dataset["unknown_words"]
        if unknown["learned"]:
            yield (
                f"datasets[{index}] has {unknown['rows']:,} rows with words that the tokenizer does not know, of which "
                f"{unknown['learned']:,} tokens are learned: the model is taught to answer with them; take a base "
                "model that knows them, or leave these rows out"
            )
    for token, rows in report.get("special_tokens_in_words", {}).items():
        yield (
            f"{rows:,} rows have the special token {token} in their own words, which ends or begins something there: "
            "take it out unless it is meant"
        )


def _of_stages(report: Report) -> Iterator[str]:
    for section in SECTIONS:
        told = report.get(section)
        if isinstance(told, dict) and told.get("advice"):
            yield str(cast(dict[str, object], told)["advice"])


def _of_files(report: Report) -> Iterator[str]:
    passed_over = int(report["ignored_files_total"])
    if passed_over:
        yield f"{passed_over:,} files are passed over: see whether one of them should be read"
