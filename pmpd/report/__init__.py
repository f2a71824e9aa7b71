"""Tables and figures from what the store holds. Knows results, not how they were made."""

from pmpd.report.figures import draw_cells, draw_perplexity, draw_quality, draw_switch_steps
from pmpd.report.frame import COLUMNS, CellRecord, one_each_model, tidy
from pmpd.report.table import (
    category_table,
    failures_line,
    linears_table,
    markdown_table,
    perplexity_table,
    steps_table,
    summary_table,
)

__all__ = [
    "COLUMNS",
    "CellRecord",
    "category_table",
    "draw_cells",
    "draw_perplexity",
    "draw_quality",
    "draw_switch_steps",
    "failures_line",
    "linears_table",
    "markdown_table",
    "one_each_model",
    "perplexity_table",
    "steps_table",
    "summary_table",
    "tidy",
]
