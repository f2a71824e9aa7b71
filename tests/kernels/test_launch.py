import pytest

from pmpd.kernels import launch

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


def test_a_reduction_too_long_for_the_gpu_is_refused() -> None:
    plan = launch.choose(64, 65536, 2, 1, 132)
    with pytest.raises(ValueError, match="in_features=65536"):
        launch.fit(plan, 2, 64, 65536, 1, 1, 132, 99 * 1024)
