from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pmpd.artifacts import write_json
from pmpd.generate import Model, Piece, trained
from pmpd.models import Prompter, load_model, load_tokenizer
from pmpd.records import Schedule, class_schedules
from pmpd.schedulers import Fixed, Learned, LearnedNetwork, save_network
from tests.decode.plain import plain_decode
from tests.decode.test_llama import nested
from tests.tiny import HEADS, HIDDEN, tiny_model_dir

M = 18


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tiny_model_dir(tmp_path_factory.mktemp("generate"), "llama")
    loaded: Any = load_model(folder, torch.float64)
    cell = nested(loaded)
    prompter = Prompter(load_tokenizer(folder), "tokenizer")
    return Model(loaded, cell, prompter, high_bits=4, low_bits=2, engine="plain")


def expected(model: Model, schedule: Schedule, ids: list[int], m: int = M) -> list[int]:
    return plain_decode(model.model, model.cell, ids, schedule, m, model.prompter.eos_ids)  # type: ignore[arg-type]


def tokens(pieces: list[Piece]) -> list[int]:
    return [piece.token for piece in pieces]


@pytest.mark.parametrize(
    ("scheduler", "schedule"),
    [
        ("fp16", Schedule.uniform(16)),
        ("high", Schedule.uniform(4)),
        ("low", Schedule.uniform(2)),
        ("static", Schedule(4, (4, 2), (M // 3,))),
        ("4:4@2,3@5,2", Schedule(4, (4, 3, 2), (2, 5))),
        (Schedule(3, (3, 2), (4,)), Schedule(3, (3, 2), (4,))),
        (Fixed(Schedule.uniform(3)), Schedule.uniform(3)),
    ],
)
def test_an_answer_is_what_its_schedule_decodes(model: Model, scheduler: Any, schedule: Schedule) -> None:
    pieces = list(model.generate("The quick brown fox", scheduler=scheduler, max_new_tokens=M))
    ids = model.prompter.ids(["The quick brown fox"])
    assert tokens(pieces) == expected(model, schedule, ids)
    assert [piece.bits for piece in pieces] == [schedule.prefill_bits, *schedule.bits_of(len(pieces))]
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    assert "".join(piece.text for piece in pieces) == model.prompter.text(tokens(pieces))


def test_warming_up_changes_no_answer(model: Model) -> None:
    before = tokens(list(model.generate("The fox", max_new_tokens=6)))
    model.warm_up()
    assert tokens(list(model.generate("The fox", max_new_tokens=6))) == before


def test_a_switch_step_is_the_last_high_step(model: Model) -> None:
    pieces = list(model.generate("The lazy dog", scheduler="static", switch_step=2, max_new_tokens=6))
    assert [piece.bits for piece in pieces] == [4, 4, 4, 2, 2, 2][: len(pieces)]
    with pytest.raises(ValueError, match="switch_step=2 goes with scheduler='static'"):
        model.generate("The lazy dog", scheduler="high", switch_step=2)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: at least 1"),
        ({"max_new_tokens": -5}, "max_new_tokens=-5: at least 1"),
        ({"max_new_tokens": 6, "switch_step": 7}, r"switch_step=7 is not possible: 0 to max_new_tokens \(6\)"),
        ({"max_new_tokens": 6, "switch_step": -1}, "switch_step=-1 is not possible"),
    ],
)
def test_numbers_out_of_range_are_refused_when_it_is_called(
    model: Model, numbers: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate("The fox", **numbers)


def test_a_conversation_and_raw_text_become_their_own_prompts(model: Model) -> None:
    turns = ["The fox?", "Quick.", "The dog?"]
    pieces = list(model.generate(turns, scheduler="high", max_new_tokens=5))
    ids = model.prompter.ids(["The fox?", "The dog?"], ["Quick."])
    assert tokens(pieces) == expected(model, Schedule.uniform(4), ids, 5)
    pieces = list(model.generate("The quick", scheduler="high", max_new_tokens=5, raw=True))
    assert tokens(pieces) == expected(model, Schedule.uniform(4), model.prompter.raw_ids("The quick"), 5)
    for wrong, raw in ((["The fox?", "Quick."], False), (turns, True)):
        with pytest.raises(ValueError, match="give one text, or a conversation"):
            model.generate(wrong, raw=raw)


def test_no_piece_ends_inside_a_character(model: Model) -> None:
    """The tokenizer is one of bytes, so a random model's answer is full of broken characters."""
    words = "naïve — 日本語 🦊"
    ids = model.prompter.raw_ids(words)[1:]
    pieces = list(model._pieces((i, token, 4, len(ids)) for i, token in enumerate(ids)))
    assert len(pieces) == len(ids) > len(words)
    assert "".join(piece.text for piece in pieces) == words
    assert not any("\ufffd" in piece.text for piece in pieces)
    cut = list(model._pieces((i, token, 4, len(ids) - 1) for i, token in enumerate(ids[:-1])))
    assert "".join(piece.text for piece in cut) == model.prompter.text(ids[:-1])


def artifact(folder: Path, stage: str = "train_learned") -> Path:
    """A trained scheduler's artifact for the tiny model, always of the same class."""
    folder.mkdir(exist_ok=True)
    network = LearnedNetwork(HEADS, HIDDEN // HEADS, 4)
    with torch.no_grad():
        network.output.weight.zero_()
        network.output.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    save_network(network, folder / "scheduler.safetensors")
    config = {"prefill_bits": 4, "levels": [4, 2], "grid_parts": 3}
    write_json(folder / "artifact.json", {"stage": stage, "config": config})
    return folder


def test_a_trained_scheduler_is_read_from_its_artifact(model: Model, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "trained")
    chosen = class_schedules(4, (4, 2), M)[2]
    for scheduler in (folder, str(folder), trained(folder, M)):
        pieces = list(model.generate("The fox", scheduler=scheduler, max_new_tokens=M))
        assert [piece.bits for piece in pieces] == [4, *chosen.bits_of(len(pieces))]
    assert isinstance(model.scheduler(folder, 30), Learned)


def test_what_is_no_scheduler_is_named(model: Model, tmp_path: Path) -> None:
    for wrong in ("lossless", str(tmp_path / "nowhere"), "4:4@1,4"):
        with pytest.raises(ValueError, match="is none of fp16, high, low, static"):
            model.generate("The fox", scheduler=wrong)
    with pytest.raises(ValueError, match="holds no scheduler.safetensors"):
        model.generate("The fox", scheduler=tmp_path)
    with pytest.raises(ValueError, match="is an artifact of rollouts"):
        model.generate("The fox", scheduler=artifact(tmp_path / "other", "rollouts"))
    with pytest.raises(ValueError, match=r"needs \[7\] bits, and this model has \[2, 3, 4, 16\]"):
        model.generate("The fox", scheduler="7:4")


def test_precisions_are_checked_when_it_is_made(model: Model) -> None:
    for high, low, message in ((5, 2, "high_bits=5 is not a precision"), (3, 3, "low_bits=3 must be below")):
        with pytest.raises(ValueError, match=message):
            Model(model.model, model.cell, model.prompter, high_bits=high, low_bits=low, engine="")
