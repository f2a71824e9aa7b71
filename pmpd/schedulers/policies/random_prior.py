"""A class drawn for every sequence, as likely as it is among the labels that a learned scheduler is trained on."""

from __future__ import annotations

from pmpd.schedulers.build import Setting
from pmpd.schedulers.random import Random

TRAINED = ("labels",)


def build(setting: Setting) -> Random:
    return Random(setting.prefill_bits, setting.classes, setting.label_shares, setting.seed)
