"""Steps by kernels and graphs on a GPU, against the model that defines them in float64 on a CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from pmpd.decode import BufferCache, decode, prefill, stream
from pmpd.decode.cache import with_cache
from pmpd.decode.captured import CapturedStep
from pmpd.decode.graphs import GraphedModel
from pmpd.decode.llama import FusedLlama, fuse
from pmpd.decode.llama_step import LlamaStep, no_step
from pmpd.decode.loop import State
from pmpd.decode.random import random_llama
from pmpd.quant import PrecisionCell
from pmpd.records import Schedule
from pmpd.schedulers import Fixed, Planned
from tests.decode.plain import make_prompts, tiny
from tests.decode.test_graphs import check_what_is_kept
from tests.decode.test_llama import nested
from tests.tiny import CONTEXT, HIDDEN, INTERMEDIATE, VOCAB_SIZE

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SCHEDULE = Schedule(4, (4, 3, 2), (3, 9))
PROMPTS = make_prompts(5, 17, 1, 30)
M = 16
FUSED = ("llama", "llama_gqa", "qwen2", "mistral")
LIMIT = {torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Norm of the logits' error over their norm, for models of 2 or 3 blocks."""


def config(**values: object) -> Any:
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": 4,
        "vocab_size": VOCAB_SIZE,
    }
    return AutoConfig.for_model("llama", **{**sizes, "num_key_value_heads": 2, "num_hidden_layers": 2, **values})


@pytest.mark.parametrize(
    ("changes", "dtype", "reason"),
    [
        ({"mlp_bias": True}, torch.float16, "biases"),
        ({"attention_bias": True}, torch.float16, "biases"),
        ({"head_dim": 80}, torch.float16, "80"),
        ({"intermediate_size": 100}, torch.float16, "100"),
        ({}, torch.float32, "float32"),
    ],
)
def test_what_has_no_kernels_is_named(changes: dict[str, object], dtype: torch.dtype, reason: str) -> None:
    assert reason in (no_step(config(**changes), dtype) or "")
    assert no_step(config(), torch.bfloat16) is None


def test_a_random_model_has_the_sizes_and_precisions_asked_for() -> None:
    model, cell = random_llama(config(tie_word_embeddings=True), (2, 3, 4), device="cpu", dtype=torch.float32)
    assert cell is not None
    assert cell.available == [2, 3, 4, 16]
    state = prefill(model, cell, PROMPTS, 3, max_new_tokens=4)
    assert state.logits.shape == (len(PROMPTS), VOCAB_SIZE)
    assert state.logits.std() > 0.1
    assert random_llama(config(), (), device="cpu")[1] is None


def on_gpu(tmp_path: Path, family: str, dtype: torch.dtype) -> tuple[GraphedModel, Any, Any, PrecisionCell]:
    """A graphed model on the GPU with its cell, and the same in float64 on the CPU with its."""
    model, cell = fuse_nested(tiny(tmp_path, family).to(dtype))
    exact = copy.deepcopy(model).double()
    exact_cell = exact.blocks[0].qkv.cell
    model.to("cuda")
    return GraphedModel(model, cell, LlamaStep(model)), cell, exact, exact_cell


def fuse_nested(model: Any) -> tuple[FusedLlama, PrecisionCell]:
    fused, cell = fuse(model, nested(model))
    assert cell is not None
    return fused, cell


def exact_logits(model: Any, cell: Any, prompt: list[int], tokens: list[int], schedule: Schedule) -> torch.Tensor:
    """Logits of every step that reads ``tokens`` after ``prompt``, in float64."""
    cache = BufferCache.empty(model.config.num_hidden_layers, len(prompt) + len(tokens))
    rows = []
    with torch.no_grad():
        for step, ids in enumerate([prompt, *([t] for t in tokens)]):
            cell.bits = schedule.bits_at(step) if step else schedule.prefill_bits
            rows.append(model(input_ids=torch.tensor([ids]), **with_cache(model, cache)).logits[0, -1])
    return torch.stack(rows)


class TestOnGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", LIMIT)
    @pytest.mark.parametrize("family", FUSED)
    def test_logits_of_every_step_are_the_definitions(self, tmp_path: Path, family: str, dtype: torch.dtype) -> None:
        graphed, cell, exact, exact_cell = on_gpu(tmp_path, family, dtype)
        for schedule in (SCHEDULE, Schedule(16, (16, 2), (4,))):
            state = prefill(graphed, cell, PROMPTS, schedule.prefill_bits, max_new_tokens=M)
            logits, tokens = [], []
            for step in decode(graphed, cell, state, Planned(schedule), max_new_tokens=M, eos_ids=[]):
                assert torch.equal(step.tokens, state.logits.argmax(-1))
                tokens.append(step.tokens)
                logits.append(state.logits.clone())
            for row, prompt in enumerate(PROMPTS):
                own = [int(t[row]) for t in tokens]
                expected = exact_logits(exact, exact_cell, prompt, own[:-1], schedule)
                result = torch.stack([step[row] for step in logits]).double().cpu()
                worst = ((result - expected).norm(dim=-1) / expected.norm(dim=-1)).max()
                assert worst < LIMIT[dtype], f"row {row}"
        assert len({bits for bits, _ in graphed._graphs}) == 4

    def test_a_long_context_is_split(self, tmp_path: Path) -> None:
        graphed, cell, exact, exact_cell = on_gpu(tmp_path, "llama_gqa", torch.float16)
        prompts = make_prompts(CONTEXT - 40, 300)
        state = prefill(graphed, cell, prompts, 3, max_new_tokens=40)
        steps = list(decode(graphed, cell, state, Planned(Schedule.uniform(3)), max_new_tokens=40, eos_ids=[]))
        for row, prompt in enumerate(prompts):
            own = [int(step.tokens[row]) for step in steps]
            expected = exact_logits(exact, exact_cell, prompt, own[:-1], Schedule.uniform(3))[-1]
            assert (state.logits[row].double().cpu() - expected).norm() / expected.norm() < 1e-2

    def test_rows_leave_forks_part_and_states_take_turns(self, tmp_path: Path) -> None:
        graphed, cell, *_ = on_gpu(tmp_path, "llama_gqa", torch.float16)
        plain = graphed.model

        def run(model: Any) -> list[list[int]]:
            torch.manual_seed(0)
            done = []

            def take(state: State, num_tokens: int) -> None:
                steps = decode(model, cell, state, Planned(SCHEDULE), max_new_tokens=num_tokens, eos_ids=[])
                done.extend([[int(t), int(r)] for s in steps for t, r in zip(s.tokens, s.rows, strict=True)])

            first = prefill(model, cell, PROMPTS, 4, max_new_tokens=M)
            second = prefill(model, cell, PROMPTS[:2], 4, max_new_tokens=M)
            take(first, 5)
            fork = first.fork(torch.tensor([2, 1], device="cuda"))
            take(second, 7)
            first.keep(torch.tensor([3, 0, 1], device="cuda"))
            take(first, 9)
            take(fork, 12)
            take(second, M)
            take(first, M)
            return done

        assert run(graphed) == run(plain)

    def test_what_steps_returned_is_not_written_over(self, tmp_path: Path) -> None:
        graphed, cell, *_ = on_gpu(tmp_path, "llama_gqa", torch.float16)
        check_what_is_kept(graphed, cell)

    def test_a_stream_ends_with_its_token(self, tmp_path: Path) -> None:
        graphed, cell, *_ = on_gpu(tmp_path, "llama", torch.float16)
        scheduler = Fixed(SCHEDULE)
        endless = [int(s.tokens) for s in stream(graphed, cell, PROMPTS[1], scheduler, max_new_tokens=M, eos_ids=[])]
        eos = endless[6]
        steps = list(stream(graphed, cell, PROMPTS[1], scheduler, max_new_tokens=M, eos_ids=[eos]))
        assert [int(s.tokens) for s in steps] == endless[: endless.index(eos) + 1]
        assert [s.bits for s in steps] == [4, *SCHEDULE.bits_of(len(steps))]

    def test_large_vocabularies_and_heads(self) -> None:
        sizes = {"hidden_size": 256, "head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
        shape = config(**sizes, intermediate_size=704, vocab_size=32001)
        model, cell = random_llama(shape, (3,), device="cuda")
        graphed = GraphedModel(model, cell, LlamaStep(model))
        exact = copy.deepcopy(model).double().cpu()
        prompt = make_prompts(40)[0]
        steps = [
            int(s.tokens)
            for s in stream(graphed, cell, prompt, Fixed(Schedule.uniform(3)), max_new_tokens=8, eos_ids=[])
        ]
        exact_cell = exact.blocks[0].qkv.cell
        expected = exact_logits(exact, exact_cell, prompt, steps[:-1], Schedule.uniform(3))
        gap = expected.max(-1).values - expected[torch.arange(8), steps]
        assert gap.max() < 0.05 * expected.std(), "a token far from the largest logit"

    @pytest.mark.parametrize("family", ["phi", "stablelm", "gpt_neox", "llama_gqa"])
    def test_any_model_is_captured(self, tmp_path: Path, family: str) -> None:
        model: Any = tiny(tmp_path, family).to("cuda", torch.float32)
        cell = nested(model)
        graphed = GraphedModel(model, cell, CapturedStep(model))
        results = []
        for runner in (graphed, model):
            state = prefill(runner, cell, PROMPTS, 4, max_new_tokens=M)
            steps = decode(runner, cell, state, Planned(SCHEDULE), max_new_tokens=M, eos_ids=[])
            results.append((torch.stack([s.tokens for s in steps]), state.logits))
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-3)
