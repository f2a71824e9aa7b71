"""Tables as CSV and LaTeX, and the page to send: what stands in table.md stands in each."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from pmpd.report import markdown_table
from pmpd.report.export import export, latex, latex_table, tables_of

HEADER = ["scheduler", "ROUGE-L [95 %]", "n"]
ROWS = [["fp16_a", "30.7 [27.5, 34.2]", "24"], ["low & high", "11.9 [6.5, 17.7]", "24"]]
TEXT = (
    f"## tiny, cnndm\n\n{markdown_table(HEADER, ROWS)}\n\nA caption.\n\n"
    f"## Missing\n\n{markdown_table(['a'], [['x']])}\n"
)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.sources: list[str] = []
        self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_cell = tag in ("td", "th")
        self.sources += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self._in_cell and data.strip():
            self.cells.append(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "table.md").write_text(TEXT)
    figure = Figure()
    figure.subplots().plot([1, 2])
    figure.savefig(tmp_path / "curve.png")
    return tmp_path


def test_tables_are_found_under_their_headings():
    first, second = tables_of(TEXT)
    assert (first.heading, first.header, first.rows) == ("tiny, cnndm", HEADER, ROWS)
    assert (second.heading, second.rows) == ("Missing", [["x"]])


def test_every_table_is_written_as_csv_and_as_latex(folder):
    (folder / "table_9_old.csv").write_text("of an earlier report")
    export(folder, "tiny", [], {})
    names = sorted(p.name for p in folder.glob("table_*"))
    assert names == ["table_1_tiny_cnndm.csv", "table_1_tiny_cnndm.tex", "table_2_missing.csv", "table_2_missing.tex"]
    with (folder / "table_1_tiny_cnndm.csv").open() as stream:
        assert list(csv.reader(stream)) == [HEADER, *ROWS]
    text = (folder / "table_1_tiny_cnndm.tex").read_text()
    rows = [line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if line.endswith(r"\\")]
    assert rows == [["scheduler", r"ROUGE-L [95 \%]", "n"], [r"fp16\_a", *ROWS[0][1:]], [r"low \& high", *ROWS[1][1:]]]
    assert text.count(r"\begin{tabular}{lrr}") == text.count(r"\end{tabular}") == 1


def test_what_latex_would_read_as_a_command_is_escaped():
    assert latex(r"50 % of $x_1 & y^2 {a} \b #3 ~") == (
        r"50 \% of \$x\_1 \& y\textasciicircum{}2 \{a\} \textbackslash{}b \#3 \textasciitilde{}"
    )
    assert not re.search(r"(?<!\\)[&%$#_]", latex_table(tables_of(TEXT)[0]).replace(" & ", " ").split("\n", 1)[1])


def test_the_page_has_everything_and_asks_nobody(folder):
    page = export(folder, "tiny <1>", ["python pipelines/run.py x='<y>'"], {"torch": "2.13"}).read_text()
    parsed = _Page()
    parsed.feed(page)
    for cell in [*HEADER, *(c for row in ROWS for c in row), "torch", "2.13"]:
        assert cell in " ".join(parsed.cells)
    assert parsed.sources
    assert all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert "http" not in page.replace("http-equiv", "")
    assert "tiny &lt;1&gt;" in page
    assert "<script" not in page
    assert "x='&lt;y&gt;'" in page or "x=&#x27;&lt;y&gt;&#x27;" in page


def test_a_folder_without_tables_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        export(tmp_path, "t", [], {})
