"""The order of a conversation's messages: which is taken as it is, what is changed, and which answers are learned."""

from collections.abc import Sequence
from itertools import pairwise

from finetune_api.job import SameRoleMessages, SystemMessages
from finetune_trainer.data.messages import Message, Said
from finetune_trainer.data.problems import Change, Problem, RefusedError

_BETWEEN = "\n\n"  # what is written between two texts that are joined


class Ordered:
    """The messages of one row as they are to be rendered.

    Raises RefusedError where they are no conversation: a result of no call, or no answer at all."""

    def __init__(self, said: Sequence[Said], systems: SystemMessages, same_role: SameRoleMessages, field: str) -> None:
        self.changes: set[Change] = set()
        messages = self._without_end(list(said), field)
        if any(each.message["role"] not in ("user", "assistant") for each in messages):
            messages = self._systems_joined(messages)
            _check_results(messages, field)
            if systems is SystemMessages.IN_USER:
                messages = self._system_in_user(messages)
        if any(one.message["role"] == other.message["role"] for one, other in pairwise(messages)):
            messages = self._calls_joined(messages)
            messages = self._neighbours(messages, same_role)
        self.messages: list[Message] = [each.message for each in messages]
        learned = [each.message["role"] == "assistant" and each.learned is not False for each in messages]
        if learned[0]:
            if messages[0].learned:
                raise RefusedError(Problem.ORDER, f"{field}[0]", "it is to be learned, and answers nothing")
            learned[0] = False
            self.changes.add(Change.GREETING_NOT_LEARNED)
            if len(messages) == 1:
                raise RefusedError(Problem.NO_ASSISTANT, field, "the only one answers nothing")
        self.learned = tuple(learned)

    def _systems_joined(self, messages: list[Said]) -> list[Said]:
        """Return the messages with one system message for all that they begin with; who is named speaks apart."""
        if any(each.message["role"] == "developer" for each in messages):
            self.changes.add(Change.DEVELOPER_AS_SYSTEM)
            messages = [_as_system(each) for each in messages]
        first = next((i for i, each in enumerate(messages) if each.message["role"] != "system"), len(messages))
        if any(each.message["role"] == "system" for each in messages[first:]):
            self.changes.add(Change.LATE_SYSTEM_KEPT)
        if first < 2 or any("name" in each.message for each in messages[:first]):
            return messages
        self.changes.add(Change.SYSTEMS_JOINED)
        texts = [each.message["content"] for each in messages[:first]]
        joined = {**messages[0].message, "content": _BETWEEN.join(each for each in texts if each)}
        return [Said(joined), *messages[first:]]

    def _system_in_user(self, messages: list[Said]) -> list[Said]:
        """Return the messages with the system message at the beginning of the first user message."""
        if messages[0].message["role"] != "system" or "name" in messages[0].message:
            return messages
        user = next((i for i, each in enumerate(messages) if each.message["role"] == "user"), None)
        if user is None:
            return messages
        system = messages[0].message["content"]
        self.changes.add(Change.SYSTEM_IN_USER)
        content = messages[user].message["content"]
        begun = {**messages[user].message, "content": f"{system}{_BETWEEN}{content}" if system else content}
        return [*messages[1:user], Said(begun), *messages[user + 1 :]]

    def _without_end(self, messages: list[Said], field: str) -> list[Said]:
        """Return the messages to the last answer: nothing after it can be learned, or change what is."""
        places = range(len(messages) - 1, -1, -1)
        end = next((i for i in places if messages[i].message["role"] == "assistant"), None)
        if end is None:
            raise RefusedError(Problem.NO_ASSISTANT, field)
        if end < len(messages) - 1:
            self.changes.add(Change.END_LEFT_OUT)
        return messages[: end + 1]

    def _calls_joined(self, messages: list[Said]) -> list[Said]:
        """Return the messages with every call in the answer that it belongs to: where a model has ended its answer, it
        calls nothing more."""
        found = messages[:1]
        for each in messages[1:]:
            if not _continues(found[-1], each):
                found.append(each)
                continue
            self.changes.add(Change.CALLS_JOINED)
            called = [*found[-1].message.get("tool_calls", ()), *each.message["tool_calls"]]
            found[-1] = Said({**found[-1].message, "tool_calls": called}, found[-1].learned)
        return found

    def _neighbours(self, messages: list[Said], same_role: SameRoleMessages) -> list[Said]:
        """Return the messages with neighbours of one role joined, if that was chosen. Results of calls stay apart."""
        found = messages[:1]
        for each in messages[1:]:
            if each.message["role"] != found[-1].message["role"] or each.message["role"] == "tool":
                found.append(each)
            elif same_role is SameRoleMessages.JOIN and _can_be_joined(found[-1], each):
                self.changes.add(Change.NEIGHBOURS_JOINED)
                content = found[-1].message["content"] + _BETWEEN + each.message["content"]
                found[-1] = Said({**found[-1].message, "content": content}, found[-1].learned)
            else:
                self.changes.add(Change.NEIGHBOURS_KEPT)
                found.append(each)
        return found


def _as_system(said: Said) -> Said:
    return Said({**said.message, "role": "system"}) if said.message["role"] == "developer" else said


def _check_results(messages: list[Said], field: str) -> None:
    before = ""
    for index, each in enumerate(messages):
        role = each.message["role"]
        if role == "tool" and before not in ("assistant", "tool"):
            detail = "the result of a tool follows no answer that could have called it"
            raise RefusedError(Problem.ORDER, f"{field}[{index}]", detail)
        before = role


def _continues(answer: Said, call: Said) -> bool:
    """Whether a message says no more than what the answer before it calls, and both are learned or none."""
    only_calls = call.continues and call.message.keys() == {"role", "tool_calls"}
    return only_calls and answer.message["role"] == "assistant" and (answer.learned is False) == (call.learned is False)


def _can_be_joined(first: Said, second: Said) -> bool:
    """Whether two messages are texts alone, of which both are learned or none."""
    plain = {"role", "content"}
    return first.message.keys() == plain == second.message.keys() and first.learned == second.learned
