import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pmpd.kernels import block, launch
from pmpd.kernels.launch import Launch
from pmpd.kernels.product import Fused, Variant

GPUS = [(132, 227 * 1024), (108, 163 * 1024), (46, 99 * 1024)]  # H100, A100, an Ada


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("can", [{}, {"planes": False}, {"clusters": False}, {"clusters": False, "planes": False}])
@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize(("processors", "shared"), GPUS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_product_fits_every_gpu(
    bits: int, processors: int, shared: int, chain: bool, can: dict[str, bool], groups: int
) -> None:
    can = can | ({"planes": False} if groups > 1 else {})
    for out_features in (1, 576, 2048, 4096, 22016, 151936):
        for in_features in (32, 576, 2048, 11008, 28672):
            for rows in (1,) if chain else range(1, 9):
                plan = launch.choose(out_features, in_features, bits, rows, processors, chain=chain, **can)
                plan = launch.fit(plan, bits, out_features, in_features, groups, rows, processors, shared)
                own = plan.shared_bytes(bits, out_features, in_features, groups)
                variant = Variant.of(plan, bits, torch.float16, Fused(), (out_features, in_features), groups)
                assert own <= shared
                assert 1 <= plan.rows <= rows
                assert plan.capacity >= plan.rows
                assert 1 <= plan.warps <= variant.max_threads // 32 <= launch.MAX_WARPS
                assert 1 <= plan.early <= plan.stages
                assert plan.late in (0, 1, 2, 3)
                assert 0 <= plan.hold <= 500
                assert not plan.hold or plan.late == 0, "only what comes at once asks for its weights too soon"
                assert plan.splits <= -(-in_features // launch.STEP)
                assert plan.splits % plan.cluster == 0
                assert plan.blocks % plan.cluster == 0
                clusters, most = plan.blocks // plan.cluster, plan.most_tiles(out_features)
                assert (most - 1) * clusters < -(-out_features // 16) <= most * clusters, "each has as many or one less"
                own_splits = plan.splits // plan.cluster
                assert plan.teams <= own_splits or own_splits % 4, "or teams cannot begin with different splits"
                assert plan.cluster == 1 or can.get("clusters", True)
                assert not plan.planes or (can.get("planes", True) and rows == 1)


@pytest.mark.parametrize(
    ("plan", "kept"),
    [
        (Launch(22, 1, 2, 2, cluster=2, blocks=132, rows=2), 22),
        (Launch(10, 1, 2, 2, cluster=2, blocks=132, rows=8), 25),  # five steps of each of five splits
        (Launch(22, 1, 2, 2, cluster=2, blocks=132, rows=1), 22),
        (Launch(22, 1, 2, 2, cluster=1, blocks=132, rows=2), 43),
        (Launch(22, 1, 2, 2, cluster=2, blocks=132, rows=1, planes=True), 22),
    ],
)
def test_a_block_of_a_cluster_has_memory_for_its_own_columns_alone(plan: Launch, kept: int) -> None:
    tiles = -(-4096 // 16 // (132 // plan.cluster))  # of the block that has most
    ring, columns = plan.warps * 2 * 1024, 2 * plan.rows * (256 * kept + 16)
    sums = plan.splits // plan.cluster + plan.cluster - 1  # of its own splits, and what the other block sends
    partial = tiles * sums * plan.rows * 16 * 4
    tables = tiles * 16 * (8 + (16 if plan.planes else 8))
    # Three numbers of each row and warp, the inbox's barrier, and a number of each row and block.
    fixed = 12 * plan.rows * plan.max_warps + 8 + 4 * plan.rows * plan.cluster
    assert plan.shared_bytes(2, 4096, 11008, 1) == -(-fixed // 128) * 128 + ring + columns + partial + tables


def test_a_team_has_memory_for_tables_of_more_than_five_bits() -> None:
    """Of a tile, two bytes an entry and lane, with nine columns an entry or more."""
    for bits, columns, spread in ((5, 1024, 0), (6, 575, 0), (6, 576, 8192), (8, 2048, 0), (8, 2304, 32768)):
        plans = (Launch(4, teams, 2, 2, blocks=132, rows=1) for teams in (1, 3))
        one, three = (plan.shared_bytes(bits, 2112, columns, 1) for plan in plans)
        rings = 4 * 2 * 16 * 256 * bits // 8
        assert three - one == 2 * (rings + spread)


@pytest.mark.parametrize(("bits", "groups", "columns", "spread"), [
    (5, 1, 4096, False), (6, 1, 575, False), (6, 1, 576, True), (7, 1, 1152, True), (8, 1, 4096, True),
    (8, 4, 4096, False),
])  # fmt: skip
def test_tables_in_shared_memory_are_spread_where_columns_are_enough(
    bits: int, groups: int, columns: int, spread: bool
) -> None:
    plan = launch.fit(Launch(4, 2, 2, 2), bits, 2112, columns, groups, 1, *GPUS[0])
    assert Variant.of(plan, bits, torch.float16, Fused(), (2112, columns), groups).spread == spread


def test_spread_tables_go_before_anything_else_does() -> None:
    plan = Launch(4, 2, 2, 2)
    spread = launch.fit(plan, 8, 2112, 4096, 1, 1, *GPUS[0])
    assert spread == replace(plan, blocks=132, rows=1)
    needed = spread.shared_bytes(8, 2112, 4096, 1)
    assert launch.fit(plan, 8, 2112, 4096, 1, 1, 132, needed) == spread
    assert launch.fit(plan, 8, 2112, 4096, 1, 1, 132, needed - 1) == replace(spread, spread=False)


def test_bit_planes_take_one_row() -> None:
    for rows in range(1, 9):
        assert launch.fit(Launch(4, 2, planes=True), 2, 4096, 4096, 1, rows, *GPUS[0]).rows == 1
        assert launch.fit(Launch(4, 2), 2, 4096, 4096, 1, rows, *GPUS[0]).rows == rows


@pytest.mark.parametrize(
    ("plan", "max_warps", "chunk"),
    [
        (Launch(4, 2, rows=2), 8, (6, False)),
        (Launch(8, 1, rows=2), 8, (6, True)),
        (Launch(16, 1, rows=2, cluster=2), 8, (3, True)),
        (Launch(4, 3, rows=2), 12, (6, False)),
        (Launch(5, 3, rows=2), 16, (6, False)),
        (Launch(4, 2, rows=1), 16, (6, False)),
        (Launch(4, 2, rows=1, planes=True), 8, (6, False)),
        (Launch(3, 2, rows=2), 8, (6, False)),
        (Launch(3, 2, rows=1, planes=True), 6, (6, False)),
        (Launch(3, 3, rows=1, planes=True), 12, (6, False)),
        (Launch(13, 1, rows=1, planes=True), 16, (4, True)),
        (Launch(17, 1, rows=2), 16, (3, True)),
    ],
)
def test_few_warps_have_more_registers(plan: Launch, max_warps: int, chunk: tuple[int, bool]) -> None:
    variant = Variant.of(replace(plan, blocks=132), 2, torch.float16, Fused(), (4096, 11008), 1)
    assert (variant.max_threads, variant.chunk, variant.once) == (32 * max_warps, *chunk)


@pytest.mark.parametrize(
    ("plan", "chunk"),
    [
        (Launch(4, 2, rows=2), (6, False)),
        (Launch(4, 3, rows=2), (4, False)),
        (Launch(15, 1, rows=2), (2, False)),
        (Launch(22, 1, rows=2), (2, True)),
        (Launch(15, 1, rows=1, planes=True), (3, True)),
    ],
)
def test_a_norm_leaves_look_up_fewer_registers_for_x(plan: Launch, chunk: tuple[int, bool]) -> None:
    norm = Fused(norm_weight=torch.empty(0))
    variant = Variant.of(replace(plan, blocks=132), 2, torch.float16, norm, (4096, 11008), 1)
    assert (variant.chunk, variant.once) == chunk


@pytest.mark.parametrize(
    ("plan", "bits", "steps"),
    [
        (Launch(11, 1, rows=1), 2, 2 * 4),  # 43 steps among 11 warps, two tiles of a block
        (Launch(11, 2, rows=1), 2, 4),
        (Launch(22, 1, rows=1, cluster=2), 2, 4 * 2),  # four tiles of two blocks
        (Launch(11, 1, rows=8), 3, 2 * 4),
        (Launch(11, 1, rows=1, planes=True), 2, 2 * 4),
    ],
)
def test_a_warp_that_has_all_its_steps_under_way_is_compiled_so(plan: Launch, bits: int, steps: int) -> None:
    for stages in (steps - 1, steps, steps + 1):
        launched = replace(plan, stages=stages, blocks=128)
        variant = Variant.of(launched, bits, torch.float16, Fused(), (4096, 11008), 1)
        assert variant.whole == (stages >= steps)


def test_a_measured_shape_gets_what_was_fastest_for_it() -> None:
    for row in launch.measured():
        rivals = [r for r in launch.measured() if (r.chain, r.bits, r.rows) == (row.chain, row.bits, row.rows)]
        same = [r for r in rivals if (r.steps, r.tiles_a_processor) == (row.steps, row.tiles_a_processor)]
        fastest = min(same, key=lambda r: r.microseconds).launch
        out_features, in_features = round(row.tiles_a_processor * 132) * 16, row.steps * launch.STEP
        assert launch.choose(out_features, in_features, row.bits, row.rows, 132, chain=row.chain) == fastest


def test_what_was_measured_runs_as_it_was() -> None:
    processors, shared = GPUS[0]
    with Path(launch.__file__).with_name("launches.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["processors"] for row in rows} == {str(processors)}
    for row in rows:
        measured = launch.parse(row)
        sizes = (measured.bits, int(row["out_features"]), int(row["in_features"]))
        fitted = launch.fit(measured.launch, *sizes, 1, measured.rows, processors, shared)
        assert fitted == replace(measured.launch, blocks=processors, rows=measured.rows, spread=fitted.spread), row


@pytest.mark.parametrize("heads_a_key_head", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_a_processor_takes_one_block_of_a_kind_and_two_of_attention(heads_a_key_head: int, head_dim: int) -> None:
    shared = GPUS[0][1]
    processor = shared + launch.RESERVED_BYTES
    alone = launch.reserved_bytes(shared, alone=True)
    other = launch.reserved_bytes(shared, alone=False)
    assert 2 * alone > processor, "two on one processor"
    assert alone + other + 2 * launch.RESERVED_BYTES <= processor, "one does not fit beside the other"
    cluster = block.max_cluster(heads_a_key_head, head_dim)
    own = block.static_bytes(heads_a_key_head, head_dim, cluster)
    assert own <= block.STATIC_BYTES
    attention = block.reserved_bytes(heads_a_key_head, head_dim, shared, cluster) + own + launch.RESERVED_BYTES
    assert alone + launch.RESERVED_BYTES + 2 * attention <= processor, "attention does not fit beside a product"
    assert 2 * alone + 2 * attention > processor
    assert other + 3 * attention > processor, "three blocks of attention beside a product"


@pytest.mark.parametrize(("clusters", "in_features"), [(False, 65536), (True, 131072)])
def test_a_reduction_too_long_for_the_gpu_is_refused(clusters: bool, in_features: int) -> None:
    """Two blocks of a cluster have room for twice as much."""
    plan = launch.choose(64, in_features, 2, 1, 132, clusters=clusters)
    assert plan.cluster == 1 + clusters
    with pytest.raises(ValueError, match=f"in_features={in_features}"):
        launch.fit(plan, 2, 64, in_features, 1, 1, 132, 99 * 1024)
