"""The class that a trained network says."""

from __future__ import annotations

from pmpd.schedulers.build import Setting
from pmpd.schedulers.learned import Learned

TRAINED = ("network",)


def build(setting: Setting) -> Learned:
    assert setting.network is not None
    return Learned(setting.network, setting.prefill_bits, setting.classes)
