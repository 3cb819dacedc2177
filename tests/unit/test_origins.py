"""What is said of data, where it is said of the adapter that learned it."""

import pytest

from finetune_api.governance import Confidentiality
from finetune_api.job import DatasetSpec
from finetune_trainer.origins import MAX_EARLIER, DataOrigin, as_record, highest, joined, origins_of

PUBLIC, RESTRICTED = Confidentiality.PUBLIC, Confidentiality.RESTRICTED


def of(confidentiality: Confidentiality | None, uri: str = "s3://data/a/") -> DataOrigin:
    return DataOrigin(uri=uri, confidentiality=confidentiality)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([PUBLIC], PUBLIC),
        ([PUBLIC, RESTRICTED, PUBLIC], RESTRICTED),
        ([PUBLIC, None], None),
        ([], None),
    ],
)
def test_an_adapter_is_as_confidential_as_the_most_confidential_of_its_data_where_all_is_said(
    said: list[Confidentiality | None], expected: Confidentiality | None
) -> None:
    assert highest(of(each) for each in said) == expected


def test_the_order_of_confidentiality_is_fixed() -> None:
    assert [each.rank for each in Confidentiality] == [0, 1, 2, 3]
    assert list(Confidentiality) == ["Public", "Internal", "Confidential", "Restricted"]


def test_rows_that_are_chosen_by_their_own_licence_are_under_it() -> None:
    given = {"uri": "s3://data/a/", "license": "ODC-By-1.0", "licenseField": "license", "licenses": ["MIT", "CC0-1.0"]}
    (origin,) = origins_of([DatasetSpec.model_validate(given)])
    assert origin.under == "ODC-By-1.0; rows under MIT, CC0-1.0"
    assert as_record(origin) == {"uri": "s3://data/a/", "license": "ODC-By-1.0", "licenses": ["MIT", "CC0-1.0"]}


def test_of_a_chain_of_adapters_each_dataset_is_named_once_and_not_for_ever() -> None:
    own, earlier = [of(None, "s3://data/1/")], [of(None, f"s3://data/{number}/") for number in range(300)]
    found = joined(own, earlier)
    assert len(found) == MAX_EARLIER
    assert [each.uri for each in found[:3]] == ["s3://data/1/", "s3://data/0/", "s3://data/2/"]


@pytest.mark.parametrize("how", [None, RESTRICTED])
def test_a_long_chain_of_adapters_stays_as_confidential_as_its_oldest_data(how: Confidentiality | None) -> None:
    earlier = [*(of(PUBLIC, f"s3://data/{number}/") for number in range(300)), of(how, "s3://data/oldest/")]
    assert highest(joined([of(PUBLIC)], earlier)) == how
