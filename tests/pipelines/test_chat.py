from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pytest

import pmpd
from pipelines import chat
from pmpd.kernels import CudaUnavailableError

COLOURED = re.compile(r"\x1b\[(\d+)m(.*?)\x1b\[0m", re.DOTALL)


def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: str, *arguments: str) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat.main(list(arguments))
    return capsys.readouterr().out


def test_it_answers_every_line_of_a_pipe_in_one_conversation(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    tiny_llama: Path,
) -> None:
    options = ["--model", str(tiny_llama), "--store", str(tmp_path), "--device", "cpu", "--no-calibration"]
    caplog.set_level(logging.INFO)
    out = talk(
        monkeypatch, capsys, "The fox?\nThe dog?\n\nNot read\n", *options, "--max-new-tokens", "7", "--switch-step", "2"
    )
    model = pmpd.load(tiny_llama, store=tmp_path, device="cpu", calibration=None)
    turns: list[str] = []
    for message in ("The fox?", "The dog?"):
        turns.append(message)
        pieces = list(model.generate(turns, scheduler="static", switch_step=2, max_new_tokens=7))
        turns.append("".join(piece.text for piece in pieces))
        assert turns[-1] in out
        bits = [piece.bits for piece in pieces[1:]]
        assert f"{sum(bits) / len(bits):.2f} bits on average]" in out
    assert out.count("tokens/s") == 2
    assert "bits save no time" in out
    assert "\x1b[" not in out
    assert "quantising" in caplog.text


def test_tokens_have_the_colour_of_their_precision(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_llama: Path
) -> None:
    options = ["--model", str(tiny_llama), "--store", str(tmp_path), "--device", "cpu", "--no-calibration"]
    out = talk(monkeypatch, capsys, "The fox?\n", *options, "--color", "always", "--scheduler", "3:3@2,2")
    legend, _, rest = out.partition("legend: ")[2].partition("\n")
    named = {text: colour for colour, text in COLOURED.findall(legend)}
    assert next(iter(named)) == "16 bits (unquantised)"
    model = pmpd.load(tiny_llama, store=tmp_path, device="cpu", calibration=None)
    pieces = [p for p in model.generate(["The fox?"], scheduler="3:3@2,2") if p.text]
    assert [(c, t) for c, t in COLOURED.findall(rest)] == [(named[f"{p.bits} bits"], p.text) for p in pieces]


def test_no_two_precisions_have_one_colour() -> None:
    assert len(set(chat.COLOURS.values())) == len(chat.COLOURS)


def test_bytes_that_are_no_text_are_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python reads them where the locale is C."""
    lines = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", lines)
    assert list(chat.messages("")) == ["caf?"]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: no folder"):
        chat.main(["--model", "./nowhere", "--store", str(tmp_path)])
    with pytest.raises(SystemExit, match="0"):
        chat.main(["--help"])


def test_a_gpu_that_cannot_run_the_kernels_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise CudaUnavailableError("Tesla T4 is too old: use device=cpu")

    monkeypatch.setattr(pmpd, "load", refuse)
    with pytest.raises(SystemExit, match="error: Tesla T4 is too old"):
        chat.main([])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--scheduler", "losless"], "'losless' is none of fp16"),
        (["--max-new-tokens", "0"], "max_new_tokens=0: at least 1"),
        (["--switch-step", "300"], r"switch_step=300 is not possible: 0 to max_new_tokens \(256\)"),
    ],
)
def test_what_is_wrong_without_a_model_is_said_before_one_is_loaded(
    monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.setattr(pmpd, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit, match=said):
        chat.main(options)


def test_precisions_that_a_model_lacks_are_said_before_a_message_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Path
) -> None:
    options = ["--model", str(tiny_llama), "--store", str(tmp_path), "--device", "cpu", "--no-calibration"]
    monkeypatch.setattr(chat, "messages", lambda prompt: pytest.fail("a message was asked for"))
    with pytest.raises(SystemExit, match=r"needs \[7\] bits.*--max-bits"):
        chat.main([*options, "--scheduler", "7:7", "--max-bits", "5"])


def test_every_flag_that_a_hint_names_is_there() -> None:
    flags = ["--model", "--max-bits", "--keep-fp16", "--trust-remote-code", "--device", "--prompt"]
    assert set(flags) <= set(chat.parser()._option_string_actions)


def test_a_conversation_that_outgrows_the_context_starts_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_llama: Path
) -> None:
    options = ["--model", str(tiny_llama), "--store", str(tmp_path), "--device", "cpu", "--no-calibration"]
    options += ["--max-new-tokens", "5"]
    too_long = "The lazy dog. " * 200
    out = talk(monkeypatch, capsys, f"The fox?\n{too_long}\nThe fox?\n", *options)
    first, _, refused = out.partition("legend")[2].partition("[no answer: ")
    assert "more than the model's context of 512. The next message starts a new conversation]" in refused
    model = pmpd.load(tiny_llama, store=tmp_path, device="cpu", calibration=None)
    text = "".join(piece.text for piece in model.generate(["The fox?"], max_new_tokens=5))
    assert text in first
    assert text in refused.partition("new conversation]")[2]
    assert out.count("tokens/s") == 2
