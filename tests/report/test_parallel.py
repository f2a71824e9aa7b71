"""Figures are the same whichever process draws them, and one that fails is not passed over."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pmpd.report import draw_switch_steps
from pmpd.report.parallel import Drawing, draw_all
from tests.report.test_report import record


def figures(folder: Path) -> list[Drawing]:
    return [Drawing(draw_switch_steps, (record(value=20.0 + k),), folder / f"{k}.png") for k in range(3)]


def write_session(path: Path) -> None:
    path.write_text(str(os.getsid(0)))


def test_two_processes_draw_what_one_does(tmp_path):
    draw_all(figures(tmp_path / "one"), processes=1)
    draw_all(figures(tmp_path / "two"), processes=2)
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == [f"{k}.{suffix}" for k in range(3) for suffix in ("pdf", "png")]
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)


def test_what_another_process_cannot_draw_is_an_error(tmp_path):
    (tmp_path / "1").write_text("a file, so no folder")
    bad = Drawing(draw_switch_steps, (record(),), tmp_path / "1" / "bad.png")
    with pytest.raises(subprocess.CalledProcessError):
        draw_all([figures(tmp_path)[0], bad], processes=2)


def test_what_a_terminal_sends_comes_to_the_first_process_alone(tmp_path):
    draw_all([Drawing(write_session, (), tmp_path / name) for name in ("here", "there")], processes=2)
    assert (tmp_path / "here").read_text() == str(os.getsid(0))
    assert (tmp_path / "there").read_text() != str(os.getsid(0))
