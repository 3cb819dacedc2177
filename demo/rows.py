"""The demo's dataset: real conversations as `messages` rows in two files, with a dozen broken rows among them.

Deterministic: the same package gives the same bytes.
"""

import json

from demo.assets import conversations

# Two topics are left out: `tech_support` is a thousand copies of one pattern, `coding` has long listings.
_LEFT_OUT = {"tech_support", "coding"}
_BROKEN_EVERY = 61

# What people's files have in them. Each is a line of its own and no row that can be trained on.
BROKEN_LINES: tuple[bytes, ...] = (
    b'{"messages": [{"role": "user", "content": "Good morning, how',
    b"Hello there, this is no JSON at all",
    b'["Hello", "Hi"]',
    b'{"dialogue": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}',
    b'{"messages": "Hello"}',
    b'{"messages": []}',
    b'{"messages": [{"role": "robot", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}',
    b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "Hi"}]}',
    b'{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "Hi"}]}',
    b'{"messages": [{"role": "user", "content": "Are you there?"}, {"role": "assistant", "content": ""}]}',
    b'{"messages": [{"role": "user", "content": "Is anybody there?"}]}',
    b'{"messages": [{"role": "user", "content": "Caf\xe9?"}, {"role": "assistant", "content": "Yes"}]}',
)


def good_rows() -> list[dict[str, list[dict[str, str]]]]:
    """Conversations that end with an answer, in the order of the package."""
    rows: list[dict[str, list[dict[str, str]]]] = []
    for topic, turns in conversations():
        if topic not in _LEFT_OUT:
            whole = turns[: len(turns) // 2 * 2]
            roles = ("user", "assistant") * (len(whole) // 2)
            rows.append(
                {"messages": [{"role": role, "content": text} for role, text in zip(roles, whole, strict=True)]}
            )
    return rows


def demo_files() -> dict[str, bytes]:
    """Content by file name: two files with the broken lines among the others."""
    lines: list[bytes] = []
    broken = list(BROKEN_LINES)
    for number, row in enumerate(good_rows(), start=1):
        lines.append(json.dumps(row, ensure_ascii=False).encode())
        if number % _BROKEN_EVERY == 0 and broken:
            lines.append(broken.pop(0))
    lines += broken
    half = len(lines) // 2
    first, second = (b"\n".join(part) + b"\n" for part in (lines[:half], lines[half:]))
    return {"chat-0.jsonl": first, "chat-1.jsonl": second}
