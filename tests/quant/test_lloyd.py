import sys

import numpy as np
import pytest

from pmpd.quant import kmeans, lloyd
from tests.quant.test_kmeans import errors, random_rows


@pytest.fixture
def no_compiled_loops() -> None:
    lloyd._loops.cache_clear()


def test_a_missing_library_is_named_with_its_fix(monkeypatch: pytest.MonkeyPatch, no_compiled_loops: None) -> None:
    monkeypatch.setitem(sys.modules, "flash1dkmeans", None)
    with pytest.raises(ImportError, match=r"pip install 'pmpd\[lloyd\]'"):
        lloyd.seed_clusters(random_rows(0, 1, 20), 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaussian", "few_values", "mostly_zero_weights"])
def test_cuts_are_whole_repeatable_and_no_better_than_exact(kind: str) -> None:
    pytest.importorskip("flash1dkmeans", reason="needs pmpd[lloyd]")
    rows = random_rows(0, 8, 150, kind)
    cuts = lloyd.seed_clusters(rows, 4)
    assert np.array_equal(cuts, lloyd.seed_clusters(rows, 4))
    scale = errors(rows, np.array([[0, 150]] * 8, np.int32))
    assert (errors(rows, kmeans.seed_clusters(rows, 4)) <= errors(rows, cuts) + 1e-12 * scale).all()
    split = lloyd.split_clusters(rows, cuts)
    assert np.array_equal(split[:, ::2], cuts)
    assert (np.diff(split) >= 0).all()
    assert (errors(rows, split) <= errors(rows, cuts) + 1e-12 * scale).all()


@pytest.mark.slow
def test_a_row_shorter_than_its_clusters_has_a_value_each() -> None:
    pytest.importorskip("flash1dkmeans", reason="needs pmpd[lloyd]")
    rows = random_rows(0, 2, 3)
    assert lloyd.seed_clusters(rows, 4).tolist() == [[0, 1, 2, 3, 3]] * 2
