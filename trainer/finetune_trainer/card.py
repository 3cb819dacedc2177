"""README.md of an adapter: what it is, how well it does, how it was made, how to serve it. Pure; holds no data rows."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from finetune_api.layout import REPORT_PAGE
from finetune_api.printable import markdown, markdown_code, printable
from finetune_api.quality import FIGURE_WORDS, Quality, concern_words, verdict
from finetune_trainer.evaluate import MAX_NEW_TOKENS, Answer, HeldOut
from finetune_trainer.identity import Evidence
from finetune_trainer.methods import method_of
from finetune_trainer.origins import DataOrigin
from finetune_trainer.runplan import ANSWERS_FIELD, SERVED_RANKS, AdapterFacts, Denominator, RunPlan

RELOAD_ROWS = 8  # on which the reloaded adapter is compared


@dataclass(frozen=True)
class Lineage:
    """What the adapter was made from."""

    job_name: str
    plan_digest: str
    base_digest: str
    base_files: dict[str, str]  # name -> sha256
    versions: dict[str, str]
    image: str | None  # of the trainer, as the runtime names it; None: it ran without a container
    base_known_by: dict[str, str] = field(default_factory=dict[str, str])  # name -> identity.Evidence
    starting_adapter: AdapterFacts | None = None  # that training went on with


@dataclass(frozen=True)
class Learned:
    """What the steps have read, which may be less than the data, or the same rows several times."""

    rows: int  # over all steps
    distinct_rows: int
    tokens: int
    label_tokens: int  # learned from: without those of skipped steps
    skipped_steps: int


@dataclass(frozen=True)
class Evaluations:
    """What was measured; empty where there were no held-out rows or prompts."""

    held_out: Sequence[HeldOut]  # the base's first, the finished adapter's last
    base_answers: Sequence[Answer]
    tuned_answers: Sequence[Answer]
    quality: Quality
    computed_in: str  # as in checkpoint.Position


def vllm_rank(rank: int) -> int:
    """The smallest --max-lora-rank that serves an adapter of `rank`."""
    return next(allowed for allowed in SERVED_RANKS if allowed >= rank)


def stop_ratio(answers: Sequence[Answer]) -> float:
    """Share of answers that ended with a stop token within the limit."""
    return sum(answer.stopped for answer in answers) / max(1, len(answers))


def repetition(answers: Sequence[Answer]) -> float:
    """Mean share of repeated 4-grams."""
    return sum(answer.repetition_ratio for answer in answers) / max(1, len(answers))


def model_card(plan: RunPlan, lineage: Lineage, learned: Learned, found: Evaluations) -> str:
    """The whole README.md; what speaks against the adapter comes first."""
    rank = vllm_rank(plan.exported_rank)
    name = lineage.job_name
    model = f"{markdown(plan.model.architecture)}, {plan.model.parameters:,} weights"
    named = [each for each in map(markdown_code, plan.stop_tokens) if each]
    ends = f", with the token ids that ended what was trained{_in_brackets(named)}" if plan.stop_token_ids else ""
    sections = [
        f"""---
library_name: peft
base_model: {json.dumps(printable(plan.model.uri), ensure_ascii=False)}
pipeline_tag: text-generation
tags: [lora, {plan.method.value.lower()}]
---

# {markdown(name)}
""",
        "\n".join(f"> **{reason}**: {words}\n" for reason, words in _concerns(found.quality)),
        f"""A LoRA adapter for {markdown_code(plan.model.uri)} ({model}),
trained by {method_of(plan.method).name}{_after(plan)}.
{_learned(plan, learned)}{_not_adapted(plan)}
Before it was committed it was reloaded from these files: on up to {RELOAD_ROWS} rows it gave the log-probabilities of
the trained model, and others than the base model's. That says that the files are whole, not that the model is good.
What became of every row of its data is told by `{REPORT_PAGE}` in the folder of its run, beside this one.
""",
        _results(plan, found),
        _data(plan),
        f"""## Serve

With vLLM, from local copies of the base model and of this folder:

```sh
vllm serve BASE_MODEL --enable-lora --max-lora-rank {rank} --lora-modules {shlex.quote(printable(name))}=ADAPTER_FOLDER
```

With PEFT: `PeftModel.from_pretrained(base, "ADAPTER_FOLDER")`. {_template(plan)}
`generation_config.json` is the base model's{ends}.
{_forms(plan)}""",
        _table("## Hyperparameters", ("Name", "Value"), [*_hyperparameters(plan), ("computed in", found.computed_in)]),
        _table(
            "## Chosen values",
            ("Field", "Value", "Why"),
            [(value.field, markdown(value.value), markdown(value.reason)) for value in plan.resolved],
        ),
        _table(
            "## Lineage",
            ("What", "Digest"),
            [
                ("plan", lineage.plan_digest),
                ("training tokens", str(plan.train.arrays["tokens"].sha256)),
                ("training labels", str(plan.train.arrays["labels"].sha256)),
                ("base model", lineage.base_digest),
                *((f"base model: {markdown(file)}", _known(file, lineage)) for file in sorted(lineage.base_files)),
                *_begun_with(plan),
                ("trainer image, as it was named", markdown(lineage.image or "none, it ran without a container")),
                *((package, version) for package, version in sorted(lineage.versions.items())),
            ],
        ),
    ]
    return "\n".join(section for section in sections if section)


def _after(plan: RunPlan) -> str:
    adapter = plan.starting_adapter
    if adapter is None:
        return ""
    if plan.stacked_on is None:
        return f", going on with the adapter {markdown_code(adapter.uri)}, whose work is in it"
    own = plan.hyperparameters.lora_rank
    kept = f", beside the adapter {markdown_code(adapter.uri)}, which was kept as it is"
    ranks = f"of its rank of {plan.exported_rank}, {adapter.rank} are that one's, and {own} were trained"
    return f"{kept}.\nBoth are in it: {ranks}"


def _begun_with(plan: RunPlan) -> list[tuple[str, str]]:
    adapter = plan.starting_adapter
    if adapter is None:
        return []
    what = "adapter that training went on with" if plan.stacked_on is None else "adapter that is kept in it"
    return [(f"{what}: {markdown(adapter.uri)}", adapter.digest)]


def _known(file: str, lineage: Lineage) -> str:
    digest = lineage.base_files[file]
    if lineage.base_known_by.get(file) != Evidence.SAMPLE:
        return digest
    return f"{digest} (written since it was planned with, and compared by its size and a sample alone)"


def _concerns(quality: Quality) -> list[tuple[str, str]]:
    return list(zip(quality.concerns, concern_words(quality), strict=True))


def _learned(plan: RunPlan, learned: Learned) -> str:
    skipped = f" ({learned.skipped_steps} of them skipped: not finite)" if learned.skipped_steps else ""
    distinct = f"{learned.distinct_rows:,} of the {plan.train.examples:,} prepared for training"
    read = f"{learned.rows:,} {method_of(plan.method).rows_name}, {distinct}"
    return (
        f"{plan.hyperparameters.total_steps:,} steps{skipped} read {read}:\n"
        f"{learned.tokens:,} tokens, {learned.label_tokens:,} of them learned from."
    )


def _not_adapted(plan: RunPlan) -> str:
    experts = plan.model.expert_parameters
    if not experts:
        return ""
    return f"\nThe experts of its mixture are not adapted: {experts:,} of its {plan.model.parameters:,} weights."


def _template(plan: RunPlan) -> str:
    if plan.chat_template is None:
        return "It was trained on plain text, without a chat template."
    return "Ask with the chat template of this folder\n(`chat_template.jinja`), which is the one that was trained with."


def _in_brackets(words: Sequence[str]) -> str:
    return f" ({', '.join(words)})" if words else ""


def _forms(plan: RunPlan) -> str:
    """Return in which other form than the plain whole conversation answers were taught, a line for each."""
    taught = [value for value in plan.resolved if value.field.startswith(ANSWERS_FIELD)]
    lines = [f"- {markdown(value.value)}: {markdown(value.reason)}.\n" for value in taught]
    return "\nHow its answers were taught:\n\n" + "".join(lines) if lines else ""


def _results(plan: RunPlan, found: Evaluations) -> str:
    denominator = plan.denominator
    rows: list[tuple[str, ...]] = []
    if found.held_out:
        base, tuned = found.held_out[0], found.held_out[-1]
        loss = f"loss on {tuned.rows:,} held-out rows (nats per {denominator.unit})"
        rows.append((loss, f"{base.loss:.4f}", f"{tuned.loss:.4f}"))
        if denominator is Denominator.LABEL_TOKENS:
            rows.append(("perplexity on held-out rows", f"{base.perplexity:.3f}", f"{tuned.perplexity:.3f}"))
        rows += [
            (words, f"{base.figures[name]:.4f}", f"{tuned.figures[name]:.4f}")
            for name, words in FIGURE_WORDS.items()
            if name in base.figures and name in tuned.figures
        ]
        if base.end_probability is not None and tuned.end_probability is not None:
            ends = f"probability of the stop token at {tuned.answer_ends:,} true ends of answers (mean)"
            rows.append((ends, f"{base.end_probability:.3f}", f"{tuned.end_probability:.3f}"))
    if found.tuned_answers:
        base_answers, tuned_answers = found.base_answers, found.tuned_answers
        of_base = "" if plan.starting_adapter is None else " (before: of the bare base model)"
        rows += [
            (
                f"sample answers that end within {MAX_NEW_TOKENS} tokens{of_base}",
                f"{stop_ratio(base_answers):.0%}",
                f"{stop_ratio(tuned_answers):.0%}",
            ),
            (
                f"repetition in sample answers{of_base}",
                f"{repetition(base_answers):.0%}",
                f"{repetition(tuned_answers):.0%}",
            ),
        ]
    text = f"{verdict(found.quality).message}.\n" if not found.quality.measured else ""
    return "\n".join(part for part in (_table("## Results", ("", "Before", "Tuned"), rows), text) if part)


def _data(plan: RunPlan) -> str:
    """What it has learned, as far as its jobs said."""
    rows = [_origin(each, "") for each in plan.data]
    rows += [_origin(each, " (earlier adapter)") for each in plan.earlier_data]
    header = ("Dataset", "Licence", "Source", "Confidentiality", "Copyright holder")
    how = plan.confidentiality
    words = f"What was learned from all of it is {how} as a whole.\n" if how is not None else ""
    return "\n".join(part for part in (_table("## Data", header, rows), words) if part)


def _origin(origin: DataOrigin, of_whom: str) -> tuple[str, ...]:
    named = f"{origin.name}: {origin.uri}" if origin.name is not None else origin.uri
    said = (origin.under, origin.source, origin.confidentiality, origin.copyright_holder)
    return (markdown(named + of_whom), *(markdown(each or "not said") for each in said))


def _hyperparameters(plan: RunPlan) -> list[tuple[str, str]]:
    values = plan.hyperparameters.model_dump(mode="json")
    return [(name, markdown(str(value))) for name, value in values.items()]


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table below its title; nothing without rows."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return "\n".join([title, "", lines[0], "|" + " --- |" * len(header), *lines[1:], ""])
