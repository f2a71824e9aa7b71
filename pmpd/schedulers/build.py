"""From a policy's name and options to a scheduler. Finds the modules of ``policies``; knows none of them by name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pmpd.records import Schedule
from pmpd.schedulers import policies
from pmpd.schedulers.base import Scheduler
from pmpd.schedulers.network import LearnedNetwork


@dataclass(frozen=True)
class Setting:
    """What a scheduler decides about, and what was trained for it.

    Attributes:
        levels: decode precisions, falling.
        classes: schedules at the task's M, in order of average bits, cheapest first.
        label_shares: by class, of the seed prompts' labels; empty unless the policy needs ``labels``.
        network: trained on them; None unless the policy needs ``network``.
    """

    prefill_bits: int
    levels: tuple[int, ...]
    classes: tuple[Schedule, ...]
    seed: int
    label_shares: tuple[float, ...] = field(default=())
    network: LearnedNetwork | None = None


SHIPPED = ("confidence", "learned", "random", "random_prior")
"""Policies that tests and the version of the stage that asks them pin, so their text is in no key."""


def policy_names() -> list[str]:
    """Every policy that there is."""
    return sorted(module.name for module in pkgutil.iter_modules(policies.__path__))


def policy_file(policy: str) -> Path | None:
    """The file whose text is the policy; None of a shipped one.

    Raises:
        ValueError: no such policy.
    """
    file = Path(_module(policy).__file__)
    return None if policy in SHIPPED else file


def trained_for(policy: str) -> tuple[str, ...]:
    """Which trained things the policy needs: ``network``, ``labels``.

    Raises:
        ValueError: no such policy.
    """
    needs: tuple[str, ...] = _module(policy).TRAINED
    return needs


def build(policy: str, setting: Setting, options: Mapping[str, Any]) -> Scheduler:
    """The scheduler.

    Raises:
        ValueError: no such policy, an option that it has not, or a value that it refuses.
    """
    check_options(policy, options)
    make: Callable[..., Scheduler] = _module(policy).build
    return make(setting, **options)


def check_options(policy: str, options: Mapping[str, Any]) -> None:
    """Refuse what can be refused before anything is trained.

    Raises:
        ValueError: no such policy, or an option that it has not.
    """
    known = list(inspect.signature(_module(policy).build).parameters)[1:]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"scheduler.options={unknown} are none of policy {policy}, which has {known or 'no options'}")


def _module(policy: str) -> Any:
    if policy not in policy_names():
        raise ValueError(f"scheduler.policy={policy} is not possible: one of {', '.join(policy_names())}")
    return importlib.import_module(f"{policies.__name__}.{policy}")
