"""Tables and figures from what the store holds. Knows results, not how they were made."""

from pmpd.report.figures import draw_perplexity, draw_quality, draw_switch_steps
from pmpd.report.frame import COLUMNS, CellRecord, tidy
from pmpd.report.table import linears_table, markdown_table, steps_table, summary_table

__all__ = [
    "COLUMNS",
    "CellRecord",
    "draw_perplexity",
    "draw_quality",
    "draw_switch_steps",
    "linears_table",
    "markdown_table",
    "steps_table",
    "summary_table",
    "tidy",
]
