"""A policy is found by the name of its file; what it cannot take is refused by name."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch

from pmpd.records import Prefill, class_schedules
from pmpd.schedulers import Setting, build, check_options, policies, policy_file, policy_names, trained_for

SETTING = Setting(4, (4, 3), tuple(class_schedules(4, (4, 3), 30)), 0)


def test_every_file_is_a_policy_and_says_what_it_needs() -> None:
    folder = Path(next(iter(policies.__path__)))
    assert policy_names() == sorted(f.stem for f in folder.glob("*.py") if f.stem != "__init__")
    for name in policy_names():
        assert set(trained_for(name)) <= {"network", "labels"}
        assert policy_file(name) is None, f"{name} is shipped: name it in SHIPPED, so that its text is in no key"


def test_a_file_and_a_name_are_all_that_a_new_policy_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "always_low.py").write_text(
        "from pmpd.schedulers import Fixed\nTRAINED = ()\n\ndef build(setting, place=0):\n"
        "    return Fixed(setting.classes[place])\n"
    )
    monkeypatch.setattr(policies, "__path__", [*policies.__path__, str(tmp_path)])
    assert build("always_low", SETTING, {"place": 1}).policy().schedule == SETTING.classes[1]  # type: ignore[attr-defined]


def test_the_policy_that_contributing_shows_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = page[page.index('      """Short prompts') : page.index("  The file's text is part of the key")]
    (tmp_path / "length.py").write_text(textwrap.dedent(shown))
    monkeypatch.setattr(policies, "__path__", [*policies.__path__, str(tmp_path)])
    policy = build("length", SETTING, {"tokens": 5})
    for length, place in ((5, 0), (6, -1)):
        keys = torch.zeros(1, length, 2)
        assert policy.begin(Prefill(keys, keys, torch.zeros(3), 30)).schedule == SETTING.classes[place]


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scheduler\.policy=confidnce .*confidence, learned, random"):
        build("confidnce", SETTING, {})
    with pytest.raises(ValueError, match=re.escape("scheduler.options=['sigma'] are none of policy confidence")):
        check_options("confidence", {"sigma": 2})
    with pytest.raises(ValueError, match="no options"):
        check_options("learned", {"epochs": 2})
    with pytest.raises(ValueError, match="first_tokens=1"):
        build("confidence", SETTING, {"first_tokens": 1})
