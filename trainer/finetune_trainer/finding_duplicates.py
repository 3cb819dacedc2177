"""Find rows that say the same as others, or nearly so, once all are in the spool: drop or report them, as asked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_api.duplicates import Copies, DeduplicationSpec
from finetune_api.job import EvaluationSpec
from finetune_trainer.data.buckets import CHUNK, Buckets, group_of_each, groups_of
from finetune_trainer.data.components import Components
from finetune_trainer.data.deduplication import deduplication_of
from finetune_trainer.data.exact_copies import ExactCopies, find_copies
from finetune_trainer.data.left_out import LEFT_OUT, Why
from finetune_trainer.data.mapped import mapped, new_mapped
from finetune_trainer.data.near_copies import NearCopies, Sketched, find_near_copies
from finetune_trainer.data.problems import Drop
from finetune_trainer.data.spool import CLUSTER, ROW
from finetune_trainer.data.told_groups import ToldGroups
from finetune_trainer.reading_steps import PrepareStage

Array = npt.NDArray[Any]

_STAGE = "duplicates"
_REASONS = {Why.COPY: Drop.DUPLICATE, Why.NEAR_COPY: Drop.NEAR_DUPLICATE}


@dataclass(frozen=True)
class Duplicates:
    """What was found among the rows of the spool. left_out: (rows,) LEFT_OUT; clusters: (rows,) CLUSTER, equal for rows
    that are held out together, None where each is alone; report: for report.json."""

    left_out: Array
    clusters: Array | None
    report: dict[str, Any]


def find_duplicates(stage: PrepareStage, folder: Path) -> Duplicates:
    """Find them, and drop those that the job does not want. folder: of the spool."""
    rows = mapped(folder / "rows", ROW)
    left_out = new_mapped(folder / "left_out", LEFT_OUT, len(rows))
    beat = stage.ctx.reporter.touch
    given = stage.preprocessing.deduplication or DeduplicationSpec()
    chosen = deduplication_of(stage.ctx.config.spec)
    report: dict[str, Any] = {}

    def place_of(row: int) -> str:
        return stage.ledger.ref(int(rows[row]["file"]), int(rows[row]["number"]))

    group_by = (stage.ctx.config.spec.evaluation or EvaluationSpec()).group_by
    exact = find_copies(rows, _file_weights(stage), left_out, folder / "hashes", place_of, beat)
    if chosen.exact is not Copies.OFF:
        report["exact"] = {"action": chosen.exact, "copies": exact.copies, **exact.told.report()}
        _tell_exact(stage, given.exact, chosen.exact, exact)
    if not len(rows) or (chosen.near is Copies.OFF and group_by is None):
        _keep(left_out, {Why.COPY: chosen.exact})
        _drop(stage, rows, left_out)
        return Duplicates(left_out, None, report)
    components = Components(rows, folder / "components")
    clusters = new_mapped(folder / "clusters", CLUSTER, len(rows))
    if chosen.near is not Copies.OFF:
        sketched = Sketched(folder, rows, chosen.similarity)
        near = find_near_copies(folder, sketched, components, left_out, clusters, place_of, beat)
        report["near"] = {"action": chosen.near, "similarity": chosen.similarity, "copies": near.copies}
        report["near"] |= near.told.report()
        _tell_near(stage, given.near, chosen.near, near, chosen.similarity)
    _join_copies(components, left_out)
    _keep(left_out, {Why.NEAR_COPY: chosen.near, Why.COPY: chosen.exact})  # those that go on become pairs too
    if stage.method.pairs is not None:
        _join_prompts(components, folder, rows, left_out, beat)
    if group_by is not None:
        groups = join_groups(components, folder, left_out, place_of, beat)
        report["groups"] = {"column": group_by, "values": groups.values, **groups.told.report()}
        text = f"{groups.values:,} values; rows of one are trained on or held out together, with their near copies"
        stage.choices.note("evaluation.groupBy", group_by, text)
    components.write(clusters)
    _drop(stage, rows, left_out)
    return Duplicates(left_out, clusters, report)


def clusters_of_pairs(folder: Path, clusters: Array, origin: Array) -> Array:
    """Return the clusters of the rows that are left once some became pairs. origin: (rows,) which each was before."""
    found = new_mapped(folder / "pair_clusters", CLUSTER, len(origin))
    for begin in range(0, len(origin), CHUNK):
        found[begin : begin + CHUNK] = clusters[origin[begin : begin + CHUNK]]
    return found


def _file_weights(stage: PrepareStage) -> npt.NDArray[np.float64]:
    """(files,) how often the rows of each are read in an epoch."""
    return np.repeat(np.array(stage.weights, dtype=np.float64), [len(each) for each in stage.files])


def _tell_exact(stage: PrepareStage, given: Copies | None, exact: Copies, found: ExactCopies) -> None:
    """Record what became of copies, where there are any."""
    if not found.copies:
        return
    reason = f"{found.copies:,} rows say the same as one of {found.told.groups:,} others"
    if found.weighted:
        reason += f"; {found.weighted:,} have another weight than the one that is kept, which counts the most"
    stage.choices.pick("preprocessing.deduplication.exact", given, exact, reason)


def _tell_near(stage: PrepareStage, given: Copies | None, near: Copies, found: NearCopies, similarity: float) -> None:
    """Record what became of near copies, where there are any."""
    if found.told.rows:
        reason = f"{found.copies:,} of {found.told.rows:,} rows in {found.told.groups:,} clusters say nearly the same "
        reason += f"(similarity {similarity:g}) as one that is kept; no cluster is both trained on and held out"
        stage.choices.pick("preprocessing.deduplication.near", given, near, reason)


def _join_copies(components: Components, left_out: Array) -> None:
    """Join copies to what they are copies of, so that they are in one cluster where they stay."""
    for begin in range(0, len(left_out), CHUNK):
        part = left_out[begin : begin + CHUNK]
        copies = np.flatnonzero(part["why"] == Why.COPY)
        components.join_each((begin + copies).tolist(), part["of"][copies].tolist())


def _join_prompts(components: Components, folder: Path, rows: Array, left_out: Array, beat: Callable[[], None]) -> None:
    """Join the rated answers to one prompt, which become pairs together."""
    prompts = mapped(folder / "prompts", CLUSTER)
    if not len(prompts):
        return
    buckets = Buckets(folder / "hashes", prompts, left_out["why"])
    for bucket in range(buckets.count):
        groups = groups_of(buckets.pieces(bucket))
        for piece in buckets.pieces(bucket):
            rated = piece[rows["label"][piece["row"]] != 0]
            firsts = groups["row"][group_of_each(groups, rated)]
            components.join_each(rated["row"].tolist(), firsts.tolist())
        beat()


@dataclass
class Groups:
    """Rows of one value of a field each. values: how many there are; told: of those with several rows."""

    told: ToldGroups
    values: int = 0


def join_groups(
    components: Components, folder: Path, left_out: Array, place_of: Callable[[int], str], beat: Callable[[], None]
) -> Groups:
    """Join the rows of each value. left_out: (rows,) LEFT_OUT, those that belong to no value any more."""
    hashes = mapped(folder / "groups", CLUSTER)
    found = Groups(ToldGroups(place_of))
    if not len(hashes):
        return found
    buckets = Buckets(folder / "hashes", hashes, left_out["why"])
    for bucket in range(buckets.count):
        groups = groups_of(buckets.pieces(bucket))
        found.values += len(groups)
        found.told.add(groups, lambda bucket=bucket: buckets.pieces(bucket))
        for piece in buckets.pieces(bucket):
            firsts = groups["row"][group_of_each(groups, piece)]
            components.join_each(piece["row"].tolist(), firsts.tolist())
        beat()
    return found


def _keep(left_out: Array, actions: dict[Why, Copies]) -> None:
    """Let those go on whose kind is only reported, or not looked for."""
    for begin in range(0, len(left_out), CHUNK):
        part = left_out[begin : begin + CHUNK]
        for why, action in actions.items():
            if action is not Copies.DROP:
                part["why"][part["why"] == why] = 0


def _drop(stage: PrepareStage, rows: Array, left_out: Array) -> None:
    """Decide of the rows that are left out."""
    for begin in range(0, len(rows), CHUNK):
        chosen = np.flatnonzero(left_out["why"][begin : begin + CHUNK])
        for row in (begin + chosen).tolist():
            record, why, kept = rows[row], Why(int(left_out["why"][row])), rows[_kept(left_out, row)]
            detail = "weight" if why is Why.COPY and record["weight"] != kept["weight"] else ""
            ref = stage.ledger.ref(int(kept["file"]), int(kept["number"]))
            stage.ledger.drop(int(record["file"]), int(record["number"]), _STAGE, _REASONS[why], detail, ref)


def _kept(left_out: Array, row: int) -> int:
    """Return the row in favour of which one is left out; what a copy is of may be a near copy itself."""
    kept = int(left_out["of"][row])
    return int(left_out["of"][kept]) if left_out["why"][kept] else kept
