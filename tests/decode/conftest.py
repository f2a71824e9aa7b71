from __future__ import annotations

import pytest
from torch import nn

from tests.decode.plain import RoundingCell, rounded, tiny


@pytest.fixture(scope="session")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, RoundingCell]:
    """A tiny Llama with grouped key-value heads, in float64, and the cell its layers follow."""
    return rounded(tiny(tmp_path_factory.mktemp("quantised"), "llama_gqa"))
