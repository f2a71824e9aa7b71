import pytest

from pmpd.kernels import block, launch

GPUS = [(132, 227 * 1024), (108, 163 * 1024), (46, 99 * 1024)]  # H100, A100, an Ada


@pytest.mark.parametrize(("processors", "shared"), GPUS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_product_fits_every_gpu(bits: int, processors: int, shared: int) -> None:
    for out_features in (1, 576, 2048, 4096, 22016, 151936):
        for in_features in (32, 576, 2048, 11008, 28672):
            for rows in range(1, 9):
                plan = launch.choose(out_features, in_features, bits, rows, processors)
                plan = launch.fit(plan, bits, out_features, in_features, 1, rows, processors, shared)
                assert plan.shared_bytes(bits, out_features, in_features, 1) <= shared - launch.STATIC_SHARED_BYTES
                assert 1 <= plan.rows <= rows
                assert plan.capacity >= plan.rows
                assert 32 <= plan.threads <= 32 * launch.MAX_WARPS
                assert 1 <= plan.early <= plan.stages
                assert plan.splits <= -(-in_features // launch.STEP)


@pytest.mark.parametrize(("processors", "shared"), GPUS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_product_of_a_chain_fits_every_gpu(bits: int, processors: int, shared: int) -> None:
    for out_features in (1, 576, 2048, 4096, 22016, 151936):
        for in_features in (32, 576, 2048, 11008, 28672):
            plan = launch.choose_in_chain(out_features, in_features, bits, processors)
            plan = launch.fit(plan, bits, out_features, in_features, 1, 1, processors, shared)
            assert plan.shared_bytes(bits, out_features, in_features, 1) <= shared - launch.STATIC_SHARED_BYTES
            assert 1 <= plan.early <= plan.stages
            assert 32 <= plan.threads <= 32 * launch.MAX_WARPS


@pytest.mark.parametrize("heads_a_key_head", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_processor_takes_one_block_of_a_kind_and_two_of_attention(heads_a_key_head: int, head_dim: int) -> None:
    shared = GPUS[0][1]
    processor = shared + launch.RESERVED_BYTES
    most_static = launch.STATIC_SHARED_BYTES
    alone = launch.reserved_bytes(shared, alone=True)
    other = launch.reserved_bytes(shared, alone=False)
    assert 2 * alone > processor, "two on one processor"
    assert alone + other + 2 * most_static <= processor, "one does not fit beside the other"
    own = block.static_bytes(heads_a_key_head, head_dim)
    attention = block.reserved_bytes(heads_a_key_head, head_dim, shared) + own + launch.RESERVED_BYTES
    assert alone + most_static // 2 + 2 * attention <= processor, "attention does not fit beside a product"
    assert 2 * alone + 2 * attention > processor
    assert other + 3 * attention > processor, "three blocks of attention beside a product"


@pytest.mark.parametrize("shared", [shared for _, shared in GPUS])
def test_what_is_reserved_is_there(shared: int) -> None:
    for alone in (True, False):
        assert 0 <= launch.reserved_bytes(shared, alone=alone) <= shared - launch.STATIC_SHARED_BYTES


def test_a_reduction_too_long_for_the_gpu_is_refused() -> None:
    plan = launch.choose(64, 65536, 2, 1, 132)
    with pytest.raises(ValueError, match="in_features=65536"):
        launch.fit(plan, 2, 64, 65536, 1, 1, 132, 99 * 1024)
