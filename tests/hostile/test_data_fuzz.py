"""Whatever a data file has become, its rows are accounted for or its end is named: `make fuzz` looks at more."""

from fuzzing import changed, fuzz


def test_changed_files_of_every_notation_lose_no_row_without_a_word() -> None:
    ends = fuzz(seed=12, count=2000)
    assert ends["whole"] > 100, "some files are hardly changed"
    assert ends["broken rows"] > 100
    assert len(ends) >= 5, "the changes reach several ends"


def test_a_finding_can_be_made_again() -> None:
    assert changed(12, 7) == changed(12, 7)
    assert changed(12, 7) != changed(13, 7)
