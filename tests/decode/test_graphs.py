from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from pmpd.decode import decode, prefill
from pmpd.decode.captured import CapturedStep
from pmpd.decode.graphs import MAX_ROWS, GraphedModel
from pmpd.decode.loop import State
from pmpd.records import Schedule
from pmpd.schedulers import Planned
from tests.decode.plain import RoundingCell, make_prompts, plain_decode, rounded, tiny
from tests.decode.test_loop import run, tokens_of
from tests.tiny import FAMILIES

SCHEDULE = Schedule(4, (4, 3, 2), (3, 9))
PROMPTS = make_prompts(5, 17, 1, 30, 17)
M = 16


def graphed(model: nn.Module, cell: object) -> GraphedModel:
    return GraphedModel(model, cell, CapturedStep(model))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_captured_step_is_the_models_own(tmp_path: Path, family: str) -> None:
    model, cell = rounded(tiny(tmp_path, family))
    prompts = make_prompts(5, 17, 30)
    expected = [plain_decode(model, cell, p, SCHEDULE, 12) for p in prompts]
    assert tokens_of(run(graphed(model, cell), cell, prompts, SCHEDULE, 12, []), 3) == expected


def test_rows_leave_and_the_rest_goes_on(quantised: tuple[nn.Module, RoundingCell]) -> None:
    model, cell = quantised
    endless = [plain_decode(model, cell, p, SCHEDULE, M) for p in PROMPTS]
    eos = [endless[0][0], endless[1][4], endless[3][9]]
    expected = [plain_decode(model, cell, p, SCHEDULE, M, eos) for p in PROMPTS]
    assert len(set(map(len, expected))) >= 3
    assert tokens_of(run(graphed(model, cell), cell, PROMPTS, SCHEDULE, M, eos), len(PROMPTS)) == expected


def test_states_and_forks_take_turns(quantised: tuple[nn.Module, RoundingCell]) -> None:
    """Steps of several states in any order: each is told of its own sequence, and none writes into another's cache."""
    model, cell = quantised
    steps_of = graphed(model, cell)
    first = prefill(steps_of, cell, PROMPTS[:2], 4, max_new_tokens=M)
    second = prefill(steps_of, cell, PROMPTS[2:], 4, max_new_tokens=M + 300)
    done: dict[str, list[list[int]]] = {name: [[] for _ in PROMPTS] for name in ("first", "fork", "second")}

    def take(name: str, state: object, schedule: Schedule, num_tokens: int) -> None:
        for step in decode(steps_of, cell, state, Planned(schedule), max_new_tokens=num_tokens, eos_ids=[]):  # type: ignore[arg-type]
            for row, token in zip(step.rows.tolist(), step.tokens.tolist(), strict=True):
                done[name][row].append(token)

    other = Schedule(4, (4, 3, 2), (3, 4))  # parts where the fork is made
    take("first", first, SCHEDULE, 5)
    done["fork"] = [list(ids) for ids in done["first"]]
    fork = first.fork()
    take("second", second, SCHEDULE, 7)
    take("fork", fork, other, 8)
    take("first", first, SCHEDULE, M)
    take("second", second, SCHEDULE, M)
    take("fork", fork, other, M)
    assert done["first"][:2] == [plain_decode(model, cell, p, SCHEDULE, M) for p in PROMPTS[:2]]
    agree = [plain_decode(model, cell, p, other, M) for p in PROMPTS[:2]]
    assert [ids[:5] for ids in agree] == [ids[:5] for ids in done["first"][:2]]
    assert done["fork"][:2] == agree
    assert done["second"][:3] == [plain_decode(model, cell, p, SCHEDULE, M) for p in PROMPTS[2:]]


def test_a_large_batch_takes_the_models_forward(quantised: tuple[nn.Module, RoundingCell]) -> None:
    model, cell = quantised
    prompts = make_prompts(*range(3, 3 + MAX_ROWS + 1))
    expected = [plain_decode(model, cell, p, SCHEDULE, 4) for p in prompts]
    steps = run(graphed(model, cell), cell, prompts, SCHEDULE, 4, [])
    assert tokens_of(steps, len(prompts)) == expected


def test_what_steps_returned_is_not_written_over(quantised: tuple[nn.Module, RoundingCell]) -> None:
    model, cell = quantised
    check_what_is_kept(graphed(model, cell), cell)


def check_what_is_kept(steps_of: GraphedModel, cell: Any) -> None:
    """Yielded tokens stay what they were, and a state's logits until its own next step."""

    def take(state: State, num_tokens: int) -> None:
        for step in decode(steps_of, cell, state, Planned(SCHEDULE), max_new_tokens=num_tokens, eos_ids=[]):
            yielded.append((step.tokens, step.tokens.clone()))

    yielded: list[tuple[torch.Tensor, torch.Tensor]] = []
    states = [prefill(steps_of, cell, PROMPTS[i : i + 2], 4, max_new_tokens=M) for i in (0, 2)]
    take(states[0], 4)
    states.append(states[0].fork())
    for num_tokens in (6, 9, M):
        for state in states:
            others = [(other.logits, other.logits.clone()) for other in states if other is not state]
            take(state, num_tokens)
            assert all(torch.equal(now, then) for now, then in others)
    assert len(yielded) == 4 + 2 * (M - 4) + M
    assert all(torch.equal(now, then) for now, then in yielded)


def test_a_policy_sees_the_logits_before_its_step(quantised: tuple[nn.Module, RoundingCell]) -> None:
    class Confident:
        """Falls to 2 bits for good once the margin of the first row is large."""

        schedule = None
        low = False

        def bits(self, step: int, logits: torch.Tensor | None) -> int:
            assert logits is not None
            first, second = logits[0].topk(2).values
            self.low = self.low or float(first - second) > 0.4
            return 2 if self.low else 4

    model, cell = quantised
    results = []
    for runner in (model, graphed(model, cell)):
        state = prefill(runner, cell, PROMPTS[:2], 4, max_new_tokens=M)
        steps = list(decode(runner, cell, state, Confident(), max_new_tokens=M, eos_ids=[]))
        results.append([(step.bits, step.tokens.tolist()) for step in steps])
    assert results[0] == results[1]
    assert len({bits for bits, _ in results[0][1:]}) == 2, "it should have switched on the way"


def test_a_sliding_window_is_not_captured(tmp_path: Path) -> None:
    model = tiny(tmp_path, "mistral")
    model.config.sliding_window = 6  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="mistral attends to a sliding window of 6 tokens"):
        CapturedStep(model)


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "dynamic", "factor": 2.0}, {"full": {"rope_type": "default"}, "part": {"rope_type": "longrope"}}],
)
def test_a_rotary_embedding_that_waits_for_the_cpu_is_not_captured(tmp_path: Path, rope: dict[str, object]) -> None:
    model = tiny(tmp_path, "stablelm")
    model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0}  # type: ignore[union-attr]
    CapturedStep(model)
    model.config.rope_parameters = rope  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="stablelm's rotary embedding is (dynamic|longrope)"):
        CapturedStep(model)


def test_buffers_are_for_the_rows_that_came(quantised: tuple[nn.Module, RoundingCell]) -> None:
    model, cell = quantised
    body = CapturedStep(model)
    grown = []
    for prompts, room in ((PROMPTS[:1], 4), (PROMPTS[:3], 4), (PROMPTS[:1], 4), (PROMPTS[:2], 400), (PROMPTS[:2], 4)):
        state = prefill(model, cell, prompts, 4, max_new_tokens=room)
        grown.append((body.bind(state), *body.keys[0].shape[::2]))
    assert grown == [(True, 1, 256), (True, 3, 256), (False, 3, 256), (True, 3, 512), (False, 3, 512)]


def test_graphs_of_moved_buffers_go_with_their_memory(quantised: tuple[nn.Module, RoundingCell]) -> None:
    model, cell = quantised
    steps_of = graphed(model, cell)
    steps_of._graphs[4, 1] = steps_of._pool = object()  # type: ignore[assignment]
    run(steps_of, cell, PROMPTS[:1], SCHEDULE, 3, [])
    assert not steps_of._graphs
    assert steps_of._pool is None


def test_steps_are_taken_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for a second GPU: what is bound, captured and replayed must find it to be the current one."""
    entered: list[torch.device] = []
    seen: list[tuple[str, list[torch.device]]] = []

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        entered.append(which)
        yield
        entered.remove(which)

    def note(what: str, result: object) -> object:
        return lambda *_: (seen.append((what, list(entered))), result)[1]

    monkeypatch.setattr(torch.cuda, "device", device)
    body, state, graph = MagicMock(), MagicMock(bits=4, tokens=MagicMock(is_cuda=True)), MagicMock()
    state.__len__.return_value = 1
    state.tokens.device = torch.device("cuda:1")
    body.result.return_value = state.logits, state.tokens
    body.bind, graph.replay = note("bind", False), note("replay", None)
    steps_of = GraphedModel(nn.Identity(), None, body)
    monkeypatch.setattr(steps_of, "_capture", note("capture", graph))
    steps_of.decode_step(state)
    assert seen == [(what, [torch.device("cuda:1")]) for what in ("bind", "capture", "replay")]
