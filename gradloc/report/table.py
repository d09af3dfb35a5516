"""A table of ready words, and the same in HTML and in Markdown. What is in it: see `tables`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Cell:
    """What stands in a cell.

    Args:
        main: the number to look at first.
        small: a smaller line under it.
        mark: "better" or "worse" where a difference counts, by the report's rule; else "".
    """

    main: str
    small: str = ""
    mark: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table.

    Args:
        columns: their heads; the first column names the row.
        rows: a cell a column.
        reference: index of the row that the others are compared with; None: no such row.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    reference: int | None = None


def html_table(table: Table, *, dense: bool = False) -> str:
    """As HTML; everything in it is escaped.

    Args:
        table: what to set.
        dense: less room and smaller letters, for many rows.
    """
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = []
    for index, row in enumerate(table.rows):
        cells = "".join(_html_cell(cell, first=place == 0) for place, cell in enumerate(row))
        body.append(
            f'<tr class="reference">{cells}</tr>'
            if index == table.reference
            else f"<tr>{cells}</tr>"
        )
    style = "grid dense" if dense else "grid"
    return (
        f'<div class="wide"><table class="{style}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def markdown_table(table: Table) -> str:
    """As a pipe table, which GitHub and others show; ends with a line break."""
    lines = [
        "| " + " | ".join(_markdown(column) for column in table.columns) + " |",
        "|" + "---|" * len(table.columns),
    ]
    for row in table.rows:
        cells = (
            _markdown(f"{cell.main} ({cell.small})" if cell.small else cell.main) for cell in row
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _html_cell(cell: Cell, *, first: bool) -> str:
    tag, scope = ("th", ' scope="row"') if first else ("td", "")
    mark = f' class="{cell.mark}"' if cell.mark else ""
    small = f"<small>{_together(escape(cell.small))}</small>" if cell.small else ""
    return f"<{tag}{scope}{mark}>{_together(escape(cell.main))}{small}</{tag}>"


def _together(text: str) -> str:
    """No line break between a sign and its number."""
    for sign in ("±", "×", "p"):
        text = text.replace(f"{sign} ", f"{sign}\u00a0")
    return text.replace(" ±", "\u00a0±")


def _markdown(text: str) -> str:
    """A bar would end the cell, and the others would be markup."""
    for sign in ("\\", "|", "<", "*", "_", "`", "["):
        text = text.replace(sign, "\\" + sign)
    return text.replace("\n", " ")
