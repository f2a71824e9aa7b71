"""A class drawn for every sequence, each as likely as the next unless told otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from pmpd.schedulers.build import Setting
from pmpd.schedulers.random import Random

TRAINED: tuple[str, ...] = ()


def build(setting: Setting, probabilities: Sequence[float] | None = None) -> Random:
    count = len(setting.classes)
    return Random(setting.prefill_bits, setting.classes, probabilities or [1 / count] * count, setting.seed)
