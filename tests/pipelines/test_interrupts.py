"""Ctrl-C ends a run wherever it falls."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.answer import answered
from pipelines.interrupts import heard

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def as_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # put back afterwards
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # pytest's makes a warning of it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Deaf:
    """Interrupted while it goes, where Python raises nothing."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def compiles(reached: list[str]) -> None:
    """Interrupted while a compiler is at work."""
    text = "interrupt()\nreached.append('compiled')"
    exec(text, {"__name__": "numba.core", "reached": reached, "interrupt": lambda: signal.raise_signal(signal.SIGINT)})


def becomes_another_error(reached: list[str]) -> None:
    """As in PyTorch where it asks Python for a shape."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None


@pytest.mark.parametrize(
    ("interrupted", "first"),
    [
        (lambda reached: signal.raise_signal(signal.SIGINT), []),
        (lambda reached: Deaf(), []),
        (compiles, ["compiled"]),
        (becomes_another_error, []),
    ],
    ids=["anywhere", "in __del__", "in a compiler", "in C code"],
)
def test_an_interrupt_ends_a_run_in_a_line(
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    interrupted: Callable[[list[str]], object],
    first: list[str],
) -> None:
    reached: list[str] = []

    def main() -> None:
        interrupted(reached)
        time.sleep(5)
        reached.append("the end")

    with pytest.raises(SystemExit) as ended:
        answered(main)
    assert ended.value.code == 130
    assert reached == first
    assert [r.getMessage() for r in caplog.records] == ["interrupted; the same command goes on from here"]
    assert capfd.readouterr() == ("", "")


def test_one_interrupt_is_one() -> None:
    def twice() -> None:
        compiles([])
        signal.raise_signal(signal.SIGINT)  # before the first could be raised

    with heard():
        with pytest.raises(KeyboardInterrupt):
            twice()
        time.sleep(0.2)


def test_what_else_is_lost_is_still_said(capfd: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def __del__(self) -> None:
            raise TypeError("a bug of somebody's")

    answered(Broken)
    assert "TypeError: a bug of somebody's" in capfd.readouterr().err


def test_handlers_are_put_back_and_an_ignored_interrupt_stays_ignored() -> None:
    def handlers() -> tuple[object, ...]:
        return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM), sys.unraisablehook

    before = handlers()
    with heard():
        assert all(now is not then for now, then in zip(handlers(), before, strict=True))
    assert handlers() == before
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with heard():
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("program", ["run", "report", "tune", "chat"])
def test_an_interrupt_while_modules_load_is_a_word(tmp_path: Path, program: str) -> None:
    # A module that the program imports, found first, that stops where the interrupt is to come.
    (tmp_path / "transformers.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    loading = subprocess.Popen(
        [sys.executable, f"pipelines/{program}.py"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job that a shell started in the background ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert loading.stdout is not None
    assert loading.stdout.readline() == "loading\n"
    loading.send_signal(signal.SIGINT)
    assert loading.communicate(timeout=30) == ("", "interrupted\n")
    assert loading.returncode == 130
