"""Imports files of a checkout of the reference code as they lie, with stand-ins for packages that are not installed.

Knows nothing of what is compared: ``benchmarks/reference.py`` does.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def stand_ins(**modules: Any) -> Iterator[None]:
    """Modules under these names while theirs are imported, whatever is installed."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def load_schedulers(folder: Path) -> dict[str, Any]:
    """Their scheduler modules by name. Their package is called as ours is, so ours steps aside for that long."""
    root = folder / "pmpd"
    packages = {"pmpd": root, "pmpd.modules": root / "modules"}
    name = "pmpd.modules.scheduler"
    with stand_ins(**{key: module(__path__=[str(path)]) for key, path in packages.items()}):
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(name)
        return {key.rpartition(".")[2]: sys.modules.pop(key) for key in list(sys.modules) if key.startswith(name)}


def load(path: Path, name: str) -> Any:
    """Their file as a module under our name for it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # numba's cache and dataclasses look it up
    spec.loader.exec_module(loaded)
    return loaded


def module(**members: Any) -> types.ModuleType:
    made = types.ModuleType("stand_in")
    made.__dict__.update(members)
    return made


class Rouge:
    """What evaluate's metric does, by the package that it calls."""

    def compute(
        self, predictions: Sequence[str], references: Sequence[str], use_stemmer: bool = False
    ) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.scoring import BootstrapAggregator

        scorer, aggregator = RougeScorer(["rougeL"], use_stemmer=use_stemmer), BootstrapAggregator()
        for prediction, reference in zip(predictions, references, strict=True):
            aggregator.add_scores(scorer.score(reference, prediction))
        return {"rougeL": aggregator.aggregate()["rougeL"].mid.fmeasure}


class NoBertScore:
    def compute(self, predictions: Sequence[str], **_: Any) -> dict[str, list[float]]:
        return {"f1": [0.0] * len(predictions)}


EVALUATE = module(load=lambda name: Rouge() if name == "rouge" else NoBertScore())
