"""A wait that never ended counts as the longest in the tables of the operator, and is told as such."""

from bench.operator_waits import Waits


def test_waits_that_never_ended_are_the_longest():
    asked = {f"job-{number}": float(number) for number in range(10)}
    seen = {f"job-{number}": number + 2.0 for number in range(6)}
    waits = Waits(asked, seen, ended_s=100.0)
    assert waits.missing() == 4
    assert waits.percentile(50) == "2.00"
    assert waits.percentile(99) == "more than 94"  # the first of the four was asked for 94 s before the end
    assert Waits(asked, {name: moment + 2.0 for name, moment in asked.items()}).percentile(99) == "2.00"
    assert Waits().percentile(99) == "-"
