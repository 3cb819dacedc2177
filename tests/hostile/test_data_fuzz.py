"""Whatever a data file or document has become, its rows are accounted for or its end named: `make fuzz` sees more."""

from fuzzing import changed, fuzz


def test_changed_files_of_every_notation_and_kind_of_document_lose_nothing_without_a_word() -> None:
    ends = fuzz(seed=12, count=2000)
    assert {"broken_document", "empty_document"} <= set(ends), "documents are among them"
    assert ends["whole"] > 100, "some files are hardly changed"
    assert ends["broken rows"] > 100
    assert len(ends) >= 5, "the changes reach several ends"


def test_a_finding_can_be_made_again() -> None:
    assert changed(12, 7) == changed(12, 7)
    assert changed(12, 7) != changed(13, 7)
