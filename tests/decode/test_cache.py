from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from pmpd.decode import BufferCache
from pmpd.decode.cache import with_cache


def states(rows: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, n, 4, generator=generator), torch.randn(rows, 2, n, 4, generator=generator)


def filled(rows: int = 4, capacity: int = 10, length: int = 5) -> BufferCache:
    cache = BufferCache.empty(2, capacity)
    for layer in range(2):
        cache.update(*states(rows, length, layer), layer)
    return cache


def contents(cache: BufferCache) -> list[Tensor]:
    return [tensor.clone() for buffer in cache.buffers for tensor in buffer.used()]


def test_it_holds_what_a_dynamic_cache_holds() -> None:
    ours, theirs = BufferCache.empty(2, 10), DynamicCache()
    for seed, n in enumerate((5, 1, 3, 1)):
        for layer in range(2):
            assert ours.get_mask_sizes(n, layer) == theirs.get_mask_sizes(n, layer)
            new = states(3, n, 2 * seed + layer)
            for a, b in zip(ours.update(*new, layer), theirs.update(*new, layer), strict=True):
                assert torch.equal(a, b)
            assert ours.get_seq_length(layer) == theirs.get_seq_length(layer)
    assert ours.length == 10


def test_writing_reallocates_nothing() -> None:
    cache = filled()
    before = cache.buffers[0].used()[0].data_ptr()
    cache.update(*states(4, 1, 9), 0)
    assert cache.buffers[0].used()[0].data_ptr() == before


def test_more_than_its_capacity_is_refused() -> None:
    with pytest.raises(AssertionError, match="cache of 10 columns asked to hold 11"):
        filled().update(*states(4, 6, 9), 0)


@pytest.mark.parametrize("rows", [None, [2, 0]])
def test_a_fork_is_independent_of_its_origin(rows: list[int] | None) -> None:
    cache = filled()
    before = contents(cache)
    fork = cache.fork(None if rows is None else torch.tensor(rows))
    expected = [t if rows is None else t[rows] for t in before]
    assert all(torch.equal(a, b) for a, b in zip(contents(fork), expected, strict=True))
    fork.update(*states(len(expected[0]), 1, 7), 0)
    for tensor in fork.buffers[1].used():
        tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(contents(cache), before, strict=True))
    assert cache.length == 5


def test_keep_moves_rows_in_place() -> None:
    cache = filled()
    before = contents(cache)
    cache.keep(torch.tensor([0, 3, 2]))
    assert all(torch.equal(a, b[[0, 3, 2]]) for a, b in zip(contents(cache), before, strict=True))
    keys, _ = cache.update(*states(3, 1, 5), 0)
    assert keys.shape == (3, 2, 6, 4)


def test_a_cache_goes_in_under_the_name_that_the_forward_has() -> None:
    class Old(nn.Module):
        def forward(self, input_ids, past_key_values=None):
            return past_key_values

    class New(nn.Module):
        def forward(self, input_ids, cache=None):
            return cache

    cache = BufferCache.empty(1, 4)
    for model in (Old(), New()):
        assert model(None, **with_cache(model, cache)) is cache
