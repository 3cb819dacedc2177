"""What is said of conversations that cannot be learned."""

from finetune_trainer.data.problems import Problem
from finetune_trainer.data.rows import Conversation
from finetune_trainer.data.taught import refused, stop_is_split


def test_a_stop_that_is_read_as_other_tokens_has_a_code_of_its_own() -> None:
    row = Conversation([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], (False, True))
    broken = stop_is_split(row)
    assert (broken.problem, broken.field) == (Problem.STOP_TOKEN_SPLIT, "messages[1]")
    assert "row 3: message 2 ends in the text of a token" in str(refused(broken, "a.jsonl", 3, ["er"]))
