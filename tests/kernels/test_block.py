"""The kernels between products, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pmpd.kernels.block import ADDRESSES, KEPT, MAX_SPLITS, BlockKernels, divide, not_supported

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = [torch.float16, torch.bfloat16]


def normal(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0, std: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.empty(shape, device="cuda").normal_(0, std, generator=generator).to(dtype)


def error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


def limit(dtype: torch.dtype) -> float:
    return 1e-3 if dtype == torch.float16 else 6e-3


def some_kernels(dtype: torch.dtype) -> BlockKernels:
    return BlockKernels(4, 2, 32, dtype)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [((4, 2, 80, torch.float16), "80"), ((18, 2, 64, torch.float16), "18/2"), ((4, 2, 64, torch.float32), "float32")],
)
def test_what_has_no_kernels_is_named(sizes: tuple[int, int, int, torch.dtype], reason: str) -> None:
    assert reason in (not_supported(*sizes) or "")
    assert not_supported(32, 8, 128, torch.bfloat16) is None


@pytest.mark.parametrize(
    ("heads", "most", "expected"),
    [
        (32, 8, (8, 8)),  # Vicuna-7B
        (16, 8, (8, 8)),  # MobileLLaMA: 16 blocks would be two clusters
        (32 * 3, 8, (2, 2)),
        (32 * 5, 8, (1, 1)),
        (13, 8, (8, 8)),
        (12, 8, (22, 1)),  # 12 * 8 is less than three quarters of the processors
        (8, 8, (32, 1)),  # Llama-3: one cluster a head would leave half of the processors idle
        (16, 4, (16, 1)),
        (32, 1, (8, 1)),
        (16, 1, (16, 1)),
        (120, 1, (2, 1)),
    ],
)
def test_attention_is_divided_among_the_processors(heads: int, most: int, expected: tuple[int, int]) -> None:
    assert divide(heads, 132, most) == expected


@given(heads=st.integers(1, 512), processors=st.integers(16, 200), most=st.sampled_from([1, 2, 4, 8]))
def test_a_head_has_one_cluster_or_none(heads: int, processors: int, most: int) -> None:
    splits, cluster = divide(heads, processors, most)
    assert cluster <= most
    assert cluster in (1, splits)
    assert 1 <= splits <= MAX_SPLITS
    assert splits > 1 or heads > processors
    assert heads * splits <= max(heads, 2 * processors), "more than there is scratch memory for"


class TestOnGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", [8, 576, 4096, 8200])
    @pytest.mark.parametrize("rows", [1, 3])
    def test_norm(self, dtype: torch.dtype, size: int, rows: int) -> None:
        x, weight = normal(rows, size, dtype=dtype), normal(size, dtype=dtype, seed=2)
        out = torch.full_like(x, torch.nan)
        some_kernels(dtype).norm(x, weight, out, 1e-5)
        wide = x.double()
        expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        assert error(out, expected) < limit(dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", [8, 1536, 11008])
    def test_gating(self, dtype: torch.dtype, size: int) -> None:
        gate_up, out = normal(3, 2 * size, dtype=dtype, std=3), normal(3, size, dtype=dtype)
        some_kernels(dtype).gate(gate_up, out)
        gate, up = gate_up.double().unflatten(-1, (-1, 2, 8)).unbind(-2)
        assert error(out, (functional.silu(gate) * up).flatten(-2)) < limit(dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("vocab", [5, 300, 32003])
    def test_the_first_of_the_largest_is_chosen(self, dtype: torch.dtype, vocab: int) -> None:
        kernels = some_kernels(dtype)
        for seed in range(3):  # scratch memory is as it was before
            logits = normal(3, vocab, dtype=dtype, seed=seed) - 9
            logits[1] = logits[1].round()  # many that are equal
            tokens = torch.full((3,), -1, device="cuda")
            kept_tokens = torch.full((43, 8), -1, device="cuda")
            kept_logits = torch.full_like(logits, torch.nan)
            places = [41] * KEPT + [kept_tokens.data_ptr(), kept_logits.data_ptr()]
            assert len(places) == ADDRESSES
            binding = torch.tensor(places, device="cuda")
            kernels.choose(logits, tokens, binding)
            expected = [int((row == row.max()).nonzero()[0]) for row in logits]
            assert tokens.tolist() == kept_tokens[41, :3].tolist() == expected
            assert int((kept_tokens != -1).sum()) == 3, "of this column alone"
            assert torch.equal(kept_logits, logits)
            assert binding.tolist() == [42, *places[1:]]

    def test_columns_are_counted_once_for_many_rows(self) -> None:
        """Blocks of eight rows do not all run at once: none may read the column when it has been counted up."""
        kernels, steps = some_kernels(torch.float16), 200
        logits = normal(8, 32000, dtype=torch.float16)
        tokens = torch.full((8,), -1, device="cuda")
        kept_tokens = torch.full((steps + 1, 8), -1, device="cuda")
        kept_logits = torch.empty_like(logits)
        binding = torch.tensor([0] * KEPT + [kept_tokens.data_ptr(), kept_logits.data_ptr()], device="cuda")
        for _ in range(steps):
            kernels.choose(logits, tokens, binding)
        assert int(binding[0]) == steps
        assert torch.equal(kept_tokens[:steps], logits.argmax(-1).expand(steps, 8))
        assert torch.equal(kept_tokens[steps], torch.full((8,), -1, device="cuda"))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("heads", "kv_heads", "dim", "rows"),
        [
            *((*sizes, rows) for sizes in ((32, 32, 128), (9, 3, 64), (12, 2, 128), (4, 4, 16)) for rows in (1, 3, 5)),
            *((16, 2, 64, 3), (2, 1, 256, 1), (2, 1, 256, 5), (6, 1, 256, 3), (8, 1, 256, 1)),
            *((32, 8, 128, 8), (24, 4, 256, 8), (64, 8, 256, 8), (16, 8, 256, 4)),  # clusters on an H100: 4, 4, 2 and 8
        ],
    )
    @pytest.mark.parametrize("column", [0, 5, 130, 600, 1000])
    @pytest.mark.parametrize("clusters", [True, False])
    def test_attention_over_the_cache(
        self, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, rows: int, column: int, clusters: bool
    ) -> None:
        capacity, layer = column + 7, 1
        starts = [0, column // 2, column, column // 3, 0, column // 5, column, column // 2][:rows]
        kernels = BlockKernels(heads, kv_heads, dim, dtype, clusters=clusters)
        keys, values = (normal(rows, kv_heads, capacity, dim, dtype=dtype, seed=s) for s in (1, 2))
        keys[:, :, column + 1 :], values[:, :, column:] = torch.nan, torch.nan  # not to be read
        for row, start in enumerate(starts):
            keys[row, :, :start], values[row, :, :start] = torch.nan, torch.nan
        before = keys.clone(), values.clone()
        qkv = normal(rows, (heads + 2 * kv_heads) * dim, dtype=dtype, seed=3, std=2)
        bias = normal((heads + 2 * kv_heads) * dim, dtype=dtype, seed=4)
        angles = torch.arange(capacity, device="cuda")[:, None] * 10.0 ** -torch.linspace(0, 4, dim // 2, device="cuda")
        turns = torch.stack((angles.cos(), angles.sin()), -1).contiguous()
        addresses = [0, 0, 0, 0, keys.data_ptr(), values.data_ptr()]
        binding = torch.tensor([column, capacity, *starts, *[0] * (8 - rows), *addresses], device="cuda")
        out = torch.full((rows, heads * dim), torch.nan, device="cuda", dtype=dtype)
        for _ in range(2):  # the scratch memory is as it was, and the step can be run again
            kernels.attend(qkv, bias, turns, binding, layer, dim**-0.5, out)
        wide = (qkv.double() + bias.double()).view(rows, -1, dim)
        for row, start in enumerate(starts):
            cos, sin = turns[column - start].double().unbind(-1)
            first, second = wide[row].chunk(2, -1)
            turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
            k, v = before[0][row, :, start : column + 1].double(), before[1][row, :, start : column + 1].double()
            k[:, -1], v[:, -1] = turned[heads:-kv_heads], wide[row, -kv_heads:]
            k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
            weights = ((k @ turned[:heads, :, None])[..., 0] * dim**-0.5).softmax(-1)
            assert error(out[row].view(heads, dim), (weights[:, None] @ v)[:, 0]) < 3 * limit(dtype)
            assert error(keys[row, :, column], turned[heads:-kv_heads]) < limit(dtype)
            assert error(values[row, :, column], wide[row, -kv_heads:]) < limit(dtype)
        for cache, old in zip((keys, values), before, strict=True):
            cache[:, :, column] = old[:, :, column]
            assert torch.equal(cache.nan_to_num(99), old.nan_to_num(99)), "another column was written"
