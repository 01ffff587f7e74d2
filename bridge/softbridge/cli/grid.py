"""A table that breaks no word: where the terminal is too narrow for its columns, each row becomes a list."""

from __future__ import annotations

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

#: A column of sentences that would be narrower than this is none that anybody reads, ...
READABLE = 24
#: ... and what is longer than this is a sentence.
SENTENCE = 40
INDENT = 4


class Grid(Table):
    """A table of `Text` cells. Rows are lists of ``heading  cell`` where the columns do not fit side by side."""

    def __init__(self, *headings: Text) -> None:
        super().__init__(box=box.SIMPLE, pad_edge=False)
        for heading in headings:
            self.add_column(heading, overflow="fold")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = self._fitted(options.max_width)
        if widths is None:
            yield from self._as_lists()
            return
        for column, width in zip(self.columns, widths, strict=True):
            column.width = width
        yield from super().__rich_console__(console, options)

    def _fitted(self, room: int) -> list[int] | None:
        """The width of each column, so that all of them fit and no word is broken; None if that cannot be."""
        room -= 3 * len(self.columns) - 1  # what separates them
        wanted, needed = [], []
        for column in self.columns:
            texts = [cell.plain for cell in column.cells if isinstance(cell, Text)]
            heading = column.header.plain if isinstance(column.header, Text) else ""
            lines = [line for text in texts for line in text.split("\n")]
            longest = max(map(cell_len, lines), default=0)
            word = max((cell_len(word) for text in (*texts, heading) for word in text.split()), default=0)
            wanted.append(max(longest, cell_len(heading)))
            needed.append(max(word, READABLE if longest > SENTENCE else 0))
        spare = room - sum(needed)
        if spare < 0:
            return None
        widths = needed
        while spare > 0 and widths != wanted:  # what needs least more gets it first
            open_ = [n for n, width in enumerate(widths) if width < wanted[n]]
            for n in sorted(open_, key=lambda n: wanted[n] - widths[n]):
                share = min(wanted[n] - widths[n], max(spare // len(open_), 1), spare)
                widths[n] += share
                spare -= share
        return widths

    def _as_lists(self) -> RenderResult:
        first, *others = self.columns
        if str(first.header):
            yield Text(str(first.header), "bold")
        for title, *cells in zip(*(column.cells for column in self.columns), strict=True):
            yield title
            listed = Table.grid(padding=(0, 2, 0, 0))
            listed.add_column(width=INDENT - 2)
            listed.add_column()
            listed.add_column(overflow="fold")
            for column, cell in zip(others, cells, strict=True):
                if str(cell) not in ("", "-"):
                    listed.add_row("", column.header, cell)
            yield listed
