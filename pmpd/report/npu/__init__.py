"""The report of ``experiment=npu``: the model against what is published, and what the paper's figure leaves out."""

from pmpd.report.npu.published import Published, read_published
from pmpd.report.npu.validation import COLUMNS, ceilings, compare
from pmpd.report.npu.write import write_npu_report

__all__ = ["COLUMNS", "Published", "ceilings", "compare", "read_published", "write_npu_report"]
