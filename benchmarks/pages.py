"""Tables of a page that a script writes.

They stand between ``<!-- table NAME -->`` and ``<!-- end -->``, where nobody writes by hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping


def filled(page: str, tables: Mapping[str, str]) -> str:
    """``page`` with each marked table replaced."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match[2]]}\n<!-- end -->"

    return re.sub(r"(<!-- table ([a-z0-9-]+) -->)\n.*?<!-- end -->", replace, page, flags=re.DOTALL)
