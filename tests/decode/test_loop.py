from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pmpd.decode import decode, prefill
from pmpd.decode.loop import State
from pmpd.records import Schedule, Step
from pmpd.schedulers import Planned
from tests.decode.plain import RoundingCell, make_prompts, plain_decode, rounded, tiny
from tests.tiny import CONTEXT, FAMILIES

Quantised = tuple[nn.Module, RoundingCell]
SCHEDULE = Schedule(4, (4, 3, 2), (3, 9))
PROMPTS = make_prompts(5, 17, 1, 30, 17)
M = 16


def tokens_of(steps: list[Step], num_prompts: int) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in range(num_prompts)]
    for step in steps:
        for row, token in zip(step.rows.tolist(), step.tokens.tolist(), strict=True):
            out[row].append(token)
    return out


def run(
    model: nn.Module, cell: object, prompts: list[list[int]], schedule: Schedule, m: int, eos: list[int]
) -> list[Step]:
    state = prefill(model, cell, prompts, schedule.prefill_bits, max_new_tokens=m)  # type: ignore[arg-type]
    return list(decode(model, cell, state, Planned(schedule), max_new_tokens=m, eos_ids=eos))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_yields_what_each_prompt_yields_alone(tmp_path: Path, family: str) -> None:
    model, cell = rounded(tiny(tmp_path, family))
    prompts = make_prompts(5, 17, 30)
    expected = [plain_decode(model, cell, p, SCHEDULE, 12) for p in prompts]
    assert tokens_of(run(model, cell, prompts, SCHEDULE, 12, []), 3) == expected
    together, uniform = (final_logits(model, cell, prompts, s, 12) for s in (SCHEDULE, Schedule.uniform(4)))
    assert not torch.allclose(together, uniform, rtol=0, atol=1e-3), "precision changes nothing here"
    for row, prompt in enumerate(prompts):
        alone = final_logits(model, cell, [prompt], SCHEDULE, 12)
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-9)


def test_a_fork_has_logits_of_its_own(quantised: tuple[nn.Module, RoundingCell]) -> None:
    """A step may write over its state's."""
    model, cell = quantised
    state = prefill(model, cell, PROMPTS[:2], 4, max_new_tokens=M)
    for fork in (state.fork(), state.fork(torch.tensor([0, 1]))):
        before = fork.logits.clone()
        state.logits.add_(1)
        assert torch.equal(fork.logits, before)


def final_logits(model: nn.Module, cell: object, prompts: list[list[int]], schedule: Schedule, m: int) -> Tensor:
    state = prefill(model, cell, prompts, schedule.prefill_bits, max_new_tokens=m)  # type: ignore[arg-type]
    for _ in decode(model, cell, state, Planned(schedule), max_new_tokens=m, eos_ids=[]):  # type: ignore[arg-type]
        pass
    return state.logits


def test_a_sliding_window_is_respected(tmp_path: Path) -> None:
    model = tiny(tmp_path, "mistral")
    full = tokens_of(run(model, None, PROMPTS, Schedule.uniform(16), M, []), len(PROMPTS))
    model.config.sliding_window = 6  # type: ignore[union-attr]
    for block in model.model.layers:  # type: ignore[union-attr]
        block.self_attn.config.sliding_window = 6
    expected = [plain_decode(model, None, p, Schedule.uniform(16), M) for p in PROMPTS]
    assert expected != full
    assert tokens_of(run(model, None, PROMPTS, Schedule.uniform(16), M, []), len(PROMPTS)) == expected


def test_rows_leave_with_their_end_of_sequence_token(quantised: Quantised) -> None:
    model, cell = quantised
    endless = [plain_decode(model, cell, p, SCHEDULE, M) for p in PROMPTS]
    eos = [endless[0][0], endless[1][4], endless[3][9], endless[4][4]]
    expected = [plain_decode(model, cell, p, SCHEDULE, M, eos) for p in PROMPTS]
    assert len(set(map(len, expected))) >= 3, "rows should end at different steps"
    assert len(expected[0]) == 1
    assert tokens_of(run(model, cell, PROMPTS, SCHEDULE, M, eos), len(PROMPTS)) == expected


@pytest.mark.parametrize("m", [1, 2, 7])
def test_a_sequence_has_exactly_max_new_tokens(quantised: Quantised, m: int) -> None:
    steps = run(*quantised, PROMPTS, SCHEDULE, m, [])
    assert [step.index for step in steps] == list(range(m))
    assert all(len(ids) == m for ids in tokens_of(steps, len(PROMPTS)))


def test_steps_carry_the_bits_of_the_schedule(quantised: Quantised) -> None:
    steps = run(*quantised, PROMPTS, Schedule(4, (3, 2), (5,)), M, [])
    assert [step.bits for step in steps] == [4] + [3] * 5 + [2] * (M - 6)


@pytest.mark.parametrize(("s", "expected"), [(0, [2] * 4), (1, [3, 2, 2, 2]), (4, [3] * 4), (9, [3] * 4)])
def test_switch_step_counts_high_decode_steps(quantised: Quantised, s: int, expected: list[int]) -> None:
    steps = run(*quantised, PROMPTS[:1], Schedule(3, (3, 2), (s,)), 5, [])
    assert [step.bits for step in steps[1:]] == expected


def test_the_state_is_whole_at_every_yield(quantised: Quantised) -> None:
    """Stop after any token, go on with another policy, in the state itself or a fork of some rows."""
    model, cell = quantised
    eos = [plain_decode(model, cell, PROMPTS[1], SCHEDULE, M)[2]]
    for stop in range(1, 8):
        switched = Schedule(4, (4, 2), (stop - 1,))
        expected = [plain_decode(model, cell, p, switched, M, eos) for p in PROMPTS]
        state = prefill(model, cell, PROMPTS, 4, max_new_tokens=M)
        steps: list[Step] = []
        for step in decode(model, cell, state, Planned(Schedule.uniform(4)), max_new_tokens=M, eos_ids=eos):
            steps.append(step)
            if step.index == stop - 1:
                break
        assert state.step == stop
        fork = state.fork(torch.arange(len(state) - 1, -1, -1))
        for branch in (state, fork):
            rest = list(decode(model, cell, branch, Planned(switched), max_new_tokens=M, eos_ids=eos))
            assert tokens_of(steps + rest, len(PROMPTS)) == expected


def test_a_policy_sees_the_logits_before_its_step(quantised: Quantised) -> None:
    class Watching:
        schedule = None

        def __init__(self) -> None:
            self.seen: list[list[int]] = []

        def bits(self, step: int, logits: Tensor | None) -> int:
            assert logits is not None
            assert step == len(self.seen) + 1
            self.seen.append(logits.argmax(-1).tolist())
            return 3

    policy = Watching()
    state = prefill(*quantised, PROMPTS, 3, max_new_tokens=5)
    steps = list(decode(*quantised, state, policy, max_new_tokens=5, eos_ids=[]))
    assert policy.seen == [step.tokens.tolist() for step in steps[:-1]]


def test_keep_drops_the_other_rows(quantised: Quantised) -> None:
    model, cell = quantised
    state = prefill(model, cell, PROMPTS, 4, max_new_tokens=M)
    state.keep(torch.tensor([4, 1]))
    assert sorted(state.rows.tolist()) == [1, 4]
    done = tokens_of(list(decode(model, cell, state, Planned(SCHEDULE), max_new_tokens=M, eos_ids=[])), len(PROMPTS))
    assert done == [plain_decode(model, cell, p, SCHEDULE, M) if i in (1, 4) else [] for i, p in enumerate(PROMPTS)]


def test_a_view_is_the_unpadded_cache_of_the_last_block(quantised: Quantised) -> None:
    model, cell = quantised
    state = prefill(model, cell, PROMPTS, 3, max_new_tokens=M)
    for row, prompt in enumerate(PROMPTS):
        alone = prefill(model, cell, [prompt], 3, max_new_tokens=M)
        keys, values = alone.cache.buffers[-1].used()
        view = state.view(row)
        assert view.keys.shape == (2, len(prompt), 16)
        assert view.max_new_tokens == M
        torch.testing.assert_close(view.keys, keys[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(view.values, values[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(view.logits, alone.logits[0], rtol=0, atol=1e-10)


def test_a_view_outlives_decoding_and_is_refused_after_it(quantised: Quantised) -> None:
    state: State = prefill(*quantised, PROMPTS, 3, max_new_tokens=3)
    view = state.view(4)
    before = view.keys.clone()
    list(decode(*quantised, state, Planned(Schedule.uniform(3)), max_new_tokens=3, eos_ids=[]))
    state.keep(torch.tensor([3]))
    assert torch.equal(view.keys, before)
    with pytest.raises(ValueError, match="3 tokens have been generated"):
        state.view(0)


def test_consumers_are_not_put_in_a_no_gradient_mode(quantised: Quantised) -> None:
    state = prefill(*quantised, PROMPTS, 3, max_new_tokens=2)
    for step in decode(*quantised, state, Planned(Schedule.uniform(3)), max_new_tokens=2, eos_ids=[]):
        assert torch.is_grad_enabled()
        assert not torch.is_inference(step.tokens)


def test_prompts_that_do_not_fit_the_context_are_refused_by_index(quantised: Quantised) -> None:
    fits = make_prompts(CONTEXT - 4)[0]
    assert len(run(*quantised, [fits], Schedule.uniform(3), 4, [])) == 4
    message = rf"prompt 1 has {CONTEXT - 3} tokens; with max_new_tokens=4 .* context of {CONTEXT}"
    with pytest.raises(ValueError, match=message):
        prefill(*quantised, [fits, [3, *fits]], 3, max_new_tokens=4)


def test_bad_arguments_are_refused_by_name(tmp_path: Path, quantised: Quantised) -> None:
    model, cell = quantised
    with pytest.raises(ValueError, match="prompts is empty"):
        prefill(model, cell, [], 3, max_new_tokens=4)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        prefill(model, cell, [[3], []], 3, max_new_tokens=4)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        prefill(model, cell, [[3]], 3, max_new_tokens=0)
    state = prefill(model, cell, [[3]], 3, max_new_tokens=4)
    with pytest.raises(ValueError, match="max_new_tokens=5, but prefill left room for max_new_tokens=4"):
        next(decode(model, cell, state, Planned(SCHEDULE), max_new_tokens=5, eos_ids=[]))
    with pytest.raises(ValueError, match="bits=3, but the model is not quantised"):
        prefill(model, None, [[3]], 3, max_new_tokens=4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_padding_reaches_no_logit_on_a_gpu(tmp_path: Path, dtype: torch.dtype) -> None:
    """Fully masked rows of padding must not turn into NaN in any attention kernel."""
    model = tiny(tmp_path, "llama_gqa").to("cuda", dtype)
    state = prefill(model, None, PROMPTS, 16, max_new_tokens=M)
    for row, prompt in enumerate(PROMPTS):
        alone = prefill(model, None, [prompt], 16, max_new_tokens=M)
        scale = float(alone.logits.abs().max())
        torch.testing.assert_close(state.logits[row], alone.logits[0], rtol=0, atol=0.05 * scale)
    steps = list(decode(model, None, state, Planned(Schedule.uniform(16)), max_new_tokens=M, eos_ids=[]))
    assert all(len(ids) == M for ids in tokens_of(steps, len(PROMPTS)))
    assert bool(state.logits.isfinite().all())
