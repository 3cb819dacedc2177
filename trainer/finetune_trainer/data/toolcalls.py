"""Tools and calls of a row in all their spellings, to OpenAI's form: what may be called, and what an answer calls."""

from typing import Any, cast

from finetune_trainer.data.field_names import says_nothing, shown
from finetune_trainer.data.files import decode
from finetune_trainer.data.problems import Broken, Problem, RefusedError

_OF_A_CALL = frozenset(("id", "type", "function", "index"))
_OF_A_FUNCTION_CALL = frozenset(("name", "arguments", "parameters", "id"))


def from_json(value: object, field: str, what: str) -> object:
    """Return the value that a text of JSON says; another value as it is. Raises RefusedError."""
    if isinstance(value, Broken):
        raise RefusedError(value.problem, field, value.detail)
    if not isinstance(value, str):
        return value
    found = decode(value.encode())
    if isinstance(found, Broken):
        if found.problem is Problem.NOT_JSON:
            raise RefusedError(Problem.WRONG_TYPE, field, f"must be {what}, or the JSON text of one")
        raise RefusedError(found.problem, field)
    return found


def tools(value: object, field: str) -> list[dict[str, Any]] | None:
    """Return the functions that a row offers, each as {type, function}; None for none. Raises RefusedError."""
    what = "a list of functions, each with a name"
    found = from_json(None if says_nothing(value) else value, field, what)
    if says_nothing(found):
        return None
    listed: list[object] = cast(list[object], found) if isinstance(found, list) else [found]
    return [_tool(from_json(each, f"{field}[{index}]", what), f"{field}[{index}]") for index, each in enumerate(listed)]


def without_nulls(value: Any) -> Any:
    """Return a value without the null fields of its objects. A table's columns have one for each field of any row."""
    if isinstance(value, dict):
        return {name: without_nulls(each) for name, each in cast(dict[str, Any], value).items() if each is not None}
    return [without_nulls(each) for each in cast(list[Any], value)] if isinstance(value, list) else value


def _tool(value: object, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RefusedError(Problem.WRONG_TYPE, field, "must be a function: an object with a name")
    tool = cast(dict[str, Any], value)
    function = tool.get("function")
    if tool.get("type", "function") != "function" and function is not None:
        raise RefusedError(Problem.UNSUPPORTED_FIELD, f"{field}.type", "only functions can be called")
    if function is None:
        function = {name: each for name, each in tool.items() if not (name == "type" and each == "function")}
    else:
        unknown = [name for name in tool if name not in ("type", "function") and not says_nothing(tool[name])]
        if unknown:
            raise RefusedError(Problem.UNKNOWN_FIELD, f"{field}.{shown(unknown[0])}")
    if not isinstance(function, dict) or not _is_name(cast(dict[str, Any], function).get("name")):
        raise RefusedError(Problem.WRONG_TYPE, field, "must be a function: an object with a name")
    return {"type": "function", "function": _as_openai(cast(dict[str, Any], function), field)}


def _as_openai(function: dict[str, Any], field: str) -> dict[str, Any]:
    """Return a function with its schema under OpenAI's name, as templates read it; Anthropic's is `input_schema`."""
    if says_nothing(function.get("input_schema")):
        return function
    if not says_nothing(function.get("parameters")):
        raise RefusedError(Problem.TWO_FIELDS, f"{field}.input_schema")
    named = ((name, each) for name, each in function.items() if name != "parameters")
    return {"parameters" if name == "input_schema" else name: each for name, each in named}


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value


def calls(value: object, field: str) -> list[dict[str, Any]]:
    """Return what an answer calls, each as {id?, type, function: {name, arguments}} with the arguments as an object.

    value: a call or a list of them, or JSON text of that; a call with or without `function` around name and arguments.
    Raises RefusedError."""
    what = "a list of calls, each with a name and arguments"
    found = from_json(value, field, what)
    if says_nothing(found):
        return []
    listed: list[object] = cast(list[object], found) if isinstance(found, list) else [found]
    return [_call(from_json(each, f"{field}[{index}]", what), f"{field}[{index}]") for index, each in enumerate(listed)]


def _call(value: object, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RefusedError(Problem.WRONG_TYPE, field, "must be a call: an object with a name and arguments")
    call = {name: each for name, each in cast(dict[str, Any], value).items() if not says_nothing(each)}
    function: object = call.get("function")
    if call.get("type", "function") != "function":
        raise RefusedError(Problem.UNSUPPORTED_FIELD, f"{field}.type", "only functions can be called")
    if function is None:
        known, function = _OF_A_FUNCTION_CALL | {"type"}, call
    else:
        known = _OF_A_CALL
    _refuse_unknown(call, known, field)
    if not isinstance(function, dict):
        raise RefusedError(Problem.WRONG_TYPE, f"{field}.function", "must be an object with a name and arguments")
    said = cast(dict[str, Any], function)
    if function is not call:
        _refuse_unknown(said, _OF_A_FUNCTION_CALL, f"{field}.function")
    if not _is_name(said.get("name")):
        raise RefusedError(Problem.MISSING_FIELD, f"{field}.name")
    canonical: dict[str, Any] = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    canonical["type"] = "function"
    canonical["function"] = {"name": said["name"], "arguments": _arguments(said, field)}
    return canonical


def _refuse_unknown(value: dict[str, Any], known: frozenset[str], field: str) -> None:
    for name, each in value.items():
        if name not in known and not says_nothing(each):
            raise RefusedError(Problem.UNKNOWN_FIELD, f"{field}.{shown(name)}")


def _arguments(function: dict[str, Any], field: str) -> dict[str, Any]:
    given = [function[name] for name in ("arguments", "parameters") if not says_nothing(function.get(name))]
    if len(given) > 1:
        raise RefusedError(Problem.TWO_FIELDS, f"{field}.arguments")
    what = "an object"
    found = from_json(given[0], f"{field}.arguments", what) if given else {}
    found = {} if says_nothing(found) else found
    if not isinstance(found, dict):
        raise RefusedError(Problem.WRONG_TYPE, f"{field}.arguments", f"must be {what}, or the JSON text of one")
    return cast(dict[str, Any], found)
