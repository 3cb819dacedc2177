"""The terminal: every text that reaches it is printable, whoever wrote it."""

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment
from rich.table import Table

from finetune_api.printable import printable_lines


def terminal(*, stderr: bool = False) -> Console:
    """Return the console that all commands write to: names and words from outside do not command the terminal."""
    # No emoji: `:name:` in a file's name is its name.
    return cleaned(Console(stderr=stderr, highlight=False, emoji=False))


def cleaned(console: Console) -> Console:
    """Return the console, which from now on prints nothing but printable text, lines, and styles of its own."""
    console.push_render_hook(_Cleaner())
    return console


class _Cleaner(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Cleaned(renderable) for renderable in renderables]


def table(*headings: str, header_style: str = "table.header") -> Table:
    """Return a table that cuts nothing: what is too long goes on in the next line, in the first column last."""
    made = Table(box=None, padding=(0, 2, 0, 0), header_style=header_style)
    for index, heading in enumerate(headings):
        made.add_column(heading, overflow="fold", no_wrap=index == 0)
    return made


@dataclass
class _Cleaned:
    """What is to be printed, with the text of its segments made printable; control segments are rich's own."""

    renderable: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.renderable, options):
            yield segment if segment.control else Segment(printable_lines(segment.text), segment.style)
