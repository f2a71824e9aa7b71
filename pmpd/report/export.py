"""An experiment's folder as files to send: each table also as CSV and LaTeX, and one HTML page that needs nothing else.

Reads ``table.md`` and the figures beside it; knows nothing of what they say.
"""

from __future__ import annotations

import base64
import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}"}
LATEX |= {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
}
LATEX |= {"<": r"$<$", ">": r"$>$", "|": r"\textbar{}"}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .3em .8em; text-align: left; white-space: nowrap }
th { border-bottom: 2px solid #888 }
img { max-width: 100%; display: block; margin: 1em 0 }
pre { background: #f5f5f5; padding: .8em; overflow-x: auto }
"""


@dataclass(frozen=True)
class Table:
    """A table of a Markdown text, under its nearest heading."""

    heading: str
    header: list[str]
    rows: list[list[str]]


def tables_of(text: str) -> list[Table]:
    """Every table of a Markdown text."""
    found: list[Table] = []
    heading = ""
    rows: list[list[str]] = []
    tokens = _markdown().parse(text)
    for before, token in zip([Token("", "", 0), *tokens], tokens, strict=False):
        if token.type == "inline" and before.type == "heading_open":
            heading = token.content
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and before.type in ("th_open", "td_open"):
            rows[-1].append(token.content)
        elif token.type == "table_close":
            found.append(Table(heading, rows[0], rows[1:]))
    return found


def latex_table(table: Table) -> str:
    """A ``tabular`` with booktabs rules, numbers as they stand in the table."""
    columns = "l" + "r" * (len(table.header) - 1)
    lines = [" & ".join(map(latex, row)) + r" \\" for row in (table.header, *table.rows)]
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([f"% {table.heading}", *body, r"\end{tabular}", ""])


def latex(text: str) -> str:
    """Plain text as LaTeX takes it."""
    return "".join(LATEX.get(character, character) for character in text)


def export(folder: Path, title: str, commands: Sequence[str], versions: Mapping[str, str]) -> Path:
    """Write ``table_<n>_<heading>.csv`` and ``.tex`` for each table of ``table.md``, and ``index.html``.

    Returns:
        the page.

    Raises:
        FileNotFoundError: the folder has no ``table.md``.
    """
    text = (folder / "table.md").read_text(encoding="utf-8")
    for old in folder.glob("table_*"):
        old.unlink()
    for number, table in enumerate(tables_of(text), start=1):
        stem = folder / f"table_{number}_{re.sub(r'[^A-Za-z0-9]+', '_', table.heading).strip('_').lower()}"
        with stem.with_suffix(".csv").open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows([table.header, *table.rows])
        stem.with_suffix(".tex").write_text(latex_table(table), encoding="utf-8")
    page = folder / "index.html"
    page.write_text(html_page(text, title, sorted(folder.glob("*.png")), commands, versions), encoding="utf-8")
    return page


def html_page(
    text: str, title: str, figures: Sequence[Path], commands: Sequence[str], versions: Mapping[str, str]
) -> str:
    """One page with everything in it: pictures as data, no script, nothing from a network."""
    pictures = "\n".join(
        f'<h3>{escape(f.stem)}</h3>\n<img alt="{escape(f.stem)}" src="data:image/png;base64,'
        f'{base64.b64encode(f.read_bytes()).decode()}">'
        for f in figures
    )
    made = "\n".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in versions.items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n{_markdown().render(text)}\n"
        f"<h2>Figures</h2>\n{pictures}\n<h2>Commands</h2>\n<pre>{escape(chr(10).join(commands))}</pre>\n"
        f"<h2>Versions</h2>\n<table>{made}</table>\n</body></html>\n"
    )


def _markdown() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable("table")
