import pytest

from finetune_operator.job_reader import FineTuneJob, read_job
from finetune_operator.known_jobs import MAX_KNOWN, MAX_WRITTEN, KnownJobs

KEY = ("a", "bot")


def job(version: str = "1", name: str = "bot") -> FineTuneJob:
    meta = {"name": name, "namespace": "a", "uid": f"uid-{name}", "resourceVersion": version}
    return read_job({"metadata": meta})


@pytest.fixture
def known() -> KnownJobs:
    return KnownJobs()


def wrote(known: KnownJobs, *versions: str) -> FineTuneJob:
    """Let rounds write these versions, and the last of them keep the job."""
    for version in versions:
        known.wrote(job(version))
    known.keep(job(versions[-1]))
    return job(versions[-1])


def test_a_job_is_known_to_the_round_that_follows_and_to_no_further_one_that_fails(known: KnownJobs):
    left = wrote(known, "2")
    assert known.take(KEY) == left
    assert known.take(KEY) is None


@pytest.mark.parametrize(
    ("heard", "is_known"),
    [("2", True), ("3", True), ("4", False), (None, False)],
    ids=["own", "own-last", "other", "none"],
)
def test_only_a_version_of_another_hand_has_the_job_read(known: KnownJobs, heard: str | None, is_known: bool):
    wrote(known, "2", "3")
    known.hear(KEY, heard)
    assert (known.take(KEY) is not None) == is_known


def test_the_watch_may_tell_of_our_own_write_before_its_answer_is_there(known: KnownJobs):
    known.hear(KEY, "2")
    left = wrote(known, "2")
    assert known.take(KEY) == left


def test_a_change_during_a_round_is_not_hidden_by_what_the_round_keeps(known: KnownJobs):
    wrote(known, "2")
    assert known.take(KEY) is not None
    known.hear(KEY, "9")
    known.keep(job("2"))
    assert known.take(KEY) is None


def test_a_job_that_was_read_is_known_by_its_version_too(known: KnownJobs):
    known.keep(job("5"))
    known.hear(KEY, "5")
    assert known.take(KEY) == job("5")


def test_as_many_jobs_and_versions_are_kept_as_the_bounds_say(known: KnownJobs):
    for number in range(MAX_KNOWN + 1):
        known.keep(job(name=f"bot-{number}"))
    assert known.take(("a", "bot-0")) is None
    assert known.take(("a", "bot-1")) is not None
    wrote(known, *(str(version) for version in range(MAX_WRITTEN + 1)))
    assert not known.has_written(KEY, "0")
    assert known.has_written(KEY, "1")


def test_nothing_is_left_of_a_job_that_is_forgotten(known: KnownJobs):
    wrote(known, "2")
    known.hear(KEY, "9")
    known.forget(KEY)
    assert not known.has_written(KEY, "2")
    known.keep(job("3"))
    assert known.take(KEY) == job("3"), "neither the job nor what was heard of it is left"
    wrote(known, "4")
    known.forget(KEY)
    assert known.take(KEY) is None


def test_a_job_that_a_watch_tells_of_for_the_first_time_is_known_to_its_first_round(known: KnownJobs):
    known.offer(job("5"))
    known.hear(KEY, "5")
    assert known.take(KEY) == job("5")


def test_what_a_watch_tells_of_a_job_does_not_replace_what_a_round_left_of_it(known: KnownJobs):
    left = wrote(known, "6")
    known.offer(job("5"))
    assert known.take(KEY) == left


@pytest.mark.parametrize(
    ("heard", "listed", "is_known"),
    [
        ((), "3", True),
        ((), "2", True),
        ((), "9", False),
        (("3",), "9", False),
        (("9",), "3", False),
        ((None,), "3", False),
    ],
    ids=["own-last", "own", "other", "other-unheard", "older-than-what-was-heard", "nobody-knows"],
)
def test_a_list_has_the_job_read_where_it_shows_what_no_round_knows_and_hides_nothing_that_was_heard(
    known: KnownJobs, heard: tuple[str | None, ...], listed: str, is_known: bool
):
    wrote(known, "2", "3")
    for version in heard:
        known.hear(KEY, version)
    known.listed(KEY, listed)
    assert (known.take(KEY) is not None) == is_known
