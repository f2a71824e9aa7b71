"""The GPU's product against the reference in float64, which test_reference pins to the definition."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from pmpd.kernels import cuda, product
from pmpd.kernels.launch import STEP, Launch, within
from pmpd.kernels.product import Fused, Operand
from tests.kernels.case import TOLERANCE, Case

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("out_features", "in_features"), [(48, 256), (50, 1056), (1, 32), (4099, 640), (100, 11008)])
class TestProduct:
    pytestmark = on_gpu

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_every_precision(self, out_features: int, in_features: int, dtype: torch.dtype, bits: int) -> None:
        case = Case(out_features, in_features, dtype=dtype)
        for rows in (1, 2):
            x = case.x(rows, in_features)
            case.check(cuda.matmul(x, case.weight, bits), x, bits)

    @pytest.mark.parametrize("bits", [2, 3, 4, 7])
    def test_every_number_of_rows(self, out_features: int, in_features: int, dtype: torch.dtype, bits: int) -> None:
        case = Case(out_features, in_features, dtype=dtype)
        for rows in (3, 4, 5, 8, 9, 17, 70):
            x = case.x(rows, in_features)
            case.check(cuda.matmul(x, case.weight, bits), x, bits)


LAUNCHES = [
    Launch(splits, teams, stages, early, late, alone, planes, cluster, hold=500 if late == 0 else 0)
    for splits, teams, stages, early, late, alone in (
        (1, 1, 1, 1, 2, False),
        (2, 3, 2, 1, 0, False),
        (5, 1, 8, 4, 2, True),
        (4, 2, 3, 2, 3, False),  # more than 6 warps
        (4, 3, 2, 2, 1, False),  # more than 8
        (3, 5, 2, 1, 3, False),  # more than 12
    )
    for planes in (False, True)
    for cluster in (1, 2)
]
"""``splits`` of each block of a cluster."""


def whole(plan: Launch, in_features: int) -> Launch:
    """With the ``splits`` of all blocks of a cluster, no more than there are steps."""
    if plan.cluster > 1 and not product.describe(0).clusters:
        pytest.skip("clusters need compute capability 9.0")
    return within(replace(plan, splits=plan.splits * plan.cluster), -(-in_features // STEP))


@pytest.mark.parametrize("plan", LAUNCHES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
class TestLaunches:
    """By either method, whoever shares the columns."""

    pytestmark = on_gpu

    @pytest.mark.parametrize("bits", [2, 3, 4])
    @pytest.mark.parametrize(("out_features", "in_features"), [(48, 256), (50, 1056), (2200, 2816), (4432, 5120)])
    def test_products(self, plan: Launch, dtype: torch.dtype, bits: int, out_features: int, in_features: int) -> None:
        case, plan = Case(out_features, in_features, dtype=dtype), whole(plan, in_features)
        for rows in (1, 2) if plan.planes else (1, 2, 3, 8):
            x, out = case.x(rows, in_features), torch.full((rows, out_features), torch.nan, device="cuda", dtype=dtype)
            done = product.multiply(x, Operand.of(case.weight, bits), Fused(), out, plan)
            assert not plan.planes or done == 1
            case.check(out[:done], x[:done], bits)

    @pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
    @pytest.mark.parametrize("in_features", [1056, 2848])
    def test_norm_gate_and_residual(self, plan: Launch, dtype: torch.dtype, in_features: int, bits: int) -> None:
        if plan.planes and bits > 4:
            pytest.skip("planes are for 2 to 4 bits")
        case, plan = Case(4144, in_features, dtype=dtype), whole(plan, in_features)
        norm_weight = case.x(in_features, seed=6)
        for rows in (1,) if plan.planes else (1, 2, 8):
            x, residual = case.x(rows, in_features) / 64, case.x(rows, 2072, seed=4)
            out = torch.empty_like(residual)
            fused = Fused(norm_weight, 1e-2, True, residual)
            done = product.multiply(x, Operand.of(case.weight, bits), fused, out, plan)
            normed = functional.rms_norm(x.double(), (in_features,), norm_weight.double(), 1e-2)
            both = (normed @ case.exact(bits).T).unflatten(1, (-1, 2, 8))
            expected = (functional.silu(both[:, :, 0]) * both[:, :, 1]).flatten(1) + residual.double()
            assert (out.double() - expected)[:done].norm() / expected[:done].norm() < 2 * TOLERANCE[dtype]

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("column", [700, 1055])
    def test_a_row_that_is_not_finite_has_no_finite_output(
        self, plan: Launch, dtype: torch.dtype, column: int, value: float
    ) -> None:
        case, plan = Case(80, 1056, dtype=dtype), whole(plan, 1056)
        x, out = case.x(2, 1056), torch.zeros(2, 80, device="cuda", dtype=dtype)
        x[1, column] = value
        for of in (slice(0, 1), slice(1, 2)) if plan.planes else (slice(0, 2),):
            assert product.multiply(x[of], Operand.of(case.weight, 2), Fused(), out[of], plan) == out[of].shape[0]
        assert not out[1].isfinite().any()
        case.check(out[:1], x[:1], 2)


@pytest.mark.parametrize("plan", [plan for plan in LAUNCHES if not plan.planes], ids=str)
class TestLookUp:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_two_bits_without_tables_of_bytes(self, plan: Launch, dtype: torch.dtype) -> None:
        case, plan = Case(50, 1056, dtype=dtype), whole(plan, 1056)
        operand = Operand.of(case.weight, 2)
        assert operand.bytes_at_2 is not None
        x, out = case.x(2, 1056), torch.empty(2, 50, device="cuda", dtype=dtype)
        assert product.multiply(x, replace(operand, bytes_at_2=None), Fused(), out, plan) == 2
        case.check(out, x, 2)

    @pytest.mark.parametrize("bits", [5, 6, 8])
    def test_bits_that_planes_do_not_take(self, plan: Launch, bits: int) -> None:
        case, plan = Case(2200, 2816), whole(plan, 2816)
        for rows in (1, 2, 3, 8):
            x, out = case.x(rows, 2816), torch.full((rows, 2200), torch.nan, device="cuda", dtype=torch.float16)
            done = product.multiply(x, Operand.of(case.weight, bits), Fused(), out, plan)
            case.check(out[:done], x[:done], bits)


@pytest.mark.parametrize("cluster", [2, 4])
class TestClusters:
    """What :class:`TestLaunches` leaves out."""

    pytestmark = on_gpu

    @pytest.mark.parametrize(("planes", "rows"), [(True, 1), (False, 1), (False, 3), (False, 8)])
    @pytest.mark.parametrize("out_features", [16, 48, 4432])
    def test_blocks_that_finish_no_tile_or_many(self, cluster: int, planes: bool, out_features: int, rows: int) -> None:
        case, plan = Case(out_features, 2848), whole(Launch(2, 3, 3, 2, 0, planes=planes, cluster=cluster), 2848)
        x, norm_weight = case.x(rows, 2848) / 64, case.x(2848, seed=6)
        normed = functional.rms_norm(x.double(), (2848,), norm_weight.double(), 1e-2)
        for bits, fused, expected in ((2, Fused(), x.double()), (3, Fused(norm_weight, 1e-2), normed)):
            out = torch.full((rows, out_features), torch.nan, device="cuda", dtype=x.dtype)
            done = product.multiply(x, Operand.of(case.weight, bits), fused, out, plan)
            exact = (expected @ case.exact(bits).T)[:done]
            assert (out[:done].double() - exact).norm() / exact.norm() < 2 * TOLERANCE[x.dtype]

    @pytest.mark.parametrize("bits", [2, 4, 5, 7])
    @pytest.mark.parametrize("rows", [1, 3, 8])
    def test_tables_of_groups(self, cluster: int, bits: int, rows: int) -> None:
        case, plan = Case(200, 2848, 96), whole(Launch(2, 2, 2, 1, 1, cluster=cluster), 2848)
        x, out = case.x(rows, 2848), torch.full((rows, 200), torch.nan, device="cuda", dtype=torch.float16)
        done = product.multiply(x, Operand.of(case.weight, bits), Fused(), out, plan)
        case.check(out[:done], x[:done], bits)


@pytest.mark.parametrize("group_size", [32, 64, 128, 96])
@pytest.mark.parametrize("bits", range(2, 9))
class TestGroups:
    pytestmark = on_gpu

    def test_a_group_has_its_own_table(self, bits: int, group_size: int) -> None:
        case = Case(70, 736, group_size)
        for rows in (1, 6, 40):
            x = case.x(rows, 736)
            case.check(cuda.matmul(x, case.weight, bits), x, bits)


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("bits", range(2, 8))
class TestPrecisions:
    pytestmark = on_gpu

    def test_planes_above_a_precision_make_no_difference(self, bits: int, rows: int) -> None:
        case = Case(2208, 2816)
        x = case.x(rows, 2816)
        before = cuda.matmul(x, case.weight, bits)
        above = case.weight.packed.view(-1)[2208 * 2816 * bits // 32 :]
        assert above.numel() * 32 == 2208 * 2816 * (8 - bits)
        above.bitwise_not_()
        assert torch.equal(cuda.matmul(x, case.weight, bits), before)


class TestAroundTheProduct:
    pytestmark = on_gpu

    @pytest.mark.parametrize("rows", [1, 4, 11, 40])
    @pytest.mark.parametrize("bits", [2, 3, 4, 5])
    def test_norm_gate_residual_and_bias(self, bits: int, rows: int) -> None:
        case = Case(96, 800)
        x, residual, bias = case.x(rows, 800), case.x(rows, 96, seed=4), case.x(96, seed=5)
        norm_weight = case.x(800, seed=6)
        result = cuda.matmul(x, case.weight, bits, norm_weight=norm_weight, norm_eps=1e-2, residual=residual, bias=bias)
        normed = functional.rms_norm(x.double(), (800,), norm_weight.double(), 1e-2)
        case.check(result, normed, bits, residual.double() + bias.double())

    @pytest.mark.parametrize("rows", [1, 4, 11, 40])
    @pytest.mark.parametrize("bits", [2, 3, 4, 5])
    @pytest.mark.parametrize("out_features", [16, 4144])
    def test_gates_and_ups_in_turns(self, bits: int, rows: int, out_features: int) -> None:
        case = Case(out_features, 800)
        x, residual, bias = case.x(rows, 800), case.x(rows, out_features // 2, seed=4), case.x(out_features, seed=5)
        norm_weight = case.x(800, seed=6)
        fused = {"norm_weight": norm_weight, "norm_eps": 1e-2, "residual": residual, "bias": bias}
        result = cuda.matmul(x / 64, case.weight, bits, gate=True, **fused)
        normed = functional.rms_norm((x / 64).double(), (800,), norm_weight.double(), 1e-2)
        both = (normed @ case.exact(bits).T + bias.double()).unflatten(1, (-1, 2, 8))
        expected = (functional.silu(both[:, :, 0]) * both[:, :, 1]).flatten(1) + residual.double()
        # An output has the errors of two products.
        assert (result.double() - expected).norm() / expected.norm() < 2 * TOLERANCE[case.dtype]

    def test_leading_dimensions_strides_and_offsets(self) -> None:
        case = Case(48, 256)
        views = (case.x(2, 3, 256), case.x(256), case.x(256, 8).T, case.x(5, 257)[:, 1:], case.x(9, 512)[:, ::2])
        for x in views:
            case.check(cuda.matmul(x, case.weight, 3), x, 3)

    @pytest.mark.parametrize("rows", [2, 40])
    def test_it_writes_where_it_is_told_and_in_place_of_the_residual(self, rows: int) -> None:
        case = Case(48, 256)
        x, out = case.x(rows, 256), case.x(rows, 48, seed=4)
        before = out.double()
        assert cuda.matmul(x, case.weight, 4, residual=out, out=out) is out
        case.check(out, x, 4, before)

    def test_zero_and_not_finite_inputs(self) -> None:
        case = Case(48, 256)
        x = case.x(3, 256)
        x[0] = 0
        x[1, 7] = float("nan")
        x[2, 9] = float("inf")
        result = cuda.matmul(x, case.weight, 3)
        assert torch.equal(result[0], torch.zeros_like(result[0]))
        assert not result[1:].isfinite().any()

    def test_on_another_stream_and_in_a_graph(self) -> None:
        case = Case(4096, 2048)
        x = case.x(1, 2048)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = cuda.matmul(x, case.weight, 2)
        stream.synchronize()
        case.check(result, x, 2)
        graph, out = torch.cuda.CUDAGraph(), torch.empty_like(result)
        with torch.cuda.graph(graph):
            for bits in (4, 3):
                cuda.matmul(x, case.weight, bits, out=out)
        for seed in (7, 8):
            x.copy_(case.x(1, 2048, seed=seed))
            graph.replay()
            case.check(out, x, 3)

    def test_kernels_that_overlap_wait_for_each_others_results(self) -> None:
        case = Case(2048, 2048)
        x = y = case.x(1, 2048)
        for bits in (2, 3, 4, 2, 3, 4):
            y = cuda.matmul(y, case.weight, bits) / 64
            z = cuda.matmul(x, case.weight, bits)
            x = cuda.matmul(z, case.weight, bits) / 2**12
        expected = torch.stack([case.exact(bits) for bits in (2, 3, 4)])
        exact = case.x(1, 2048).double()
        for bits in (0, 1, 2, 0, 1, 2):
            exact = exact @ expected[bits].T @ expected[bits].T / 2**12
        error = (x.double() - exact).norm() / exact.norm()
        assert error < 20 * TOLERANCE[torch.float16]
        assert y.isfinite().all()

    def test_decoded_weights_are_the_tables_entries(self) -> None:
        for case in (Case(50, 1056), Case(33, 640, 64, torch.bfloat16)):
            for bits in range(2, 9):
                decoded, exact = cuda.dequantize(case.weight, bits).double(), case.exact(bits)
                # A table's integers keep 2**-15 of a row's range, and the dtype rounds once more.
                assert (decoded - exact).norm() < 0.1 * TOLERANCE[case.dtype] * exact.norm() * 5

    def test_it_compiles(self) -> None:
        case = Case(48, 256)
        x = case.x(2, 256)
        for bits in (2, 3):
            *operand, bytes_at_2 = vars(Operand.of(case.weight, bits)).values()
            assert (bytes_at_2 is not None) == (bits == 2)
            bytes_named = dict(zip(("byte_table", "byte_scales"), bytes_at_2 or (), strict=False))
            torch.library.opcheck(torch.ops.pmpd.nested_matmul.default, (x, *operand), bytes_named)
            compiled = torch.compile(
                lambda x, bits=bits: 2 * cuda.matmul(x, case.weight, bits), fullgraph=True, backend="aot_eager"
            )
            case.check(compiled(x), 2 * x, bits)

    def test_repeated_products_are_bitwise_equal(self) -> None:
        case = Case(300, 4096)
        x = case.x(4, 4096)
        first = cuda.matmul(x, case.weight, 4)
        assert all(torch.equal(cuda.matmul(x, case.weight, 4), first) for _ in range(5))


class TestRefusals:
    pytestmark = on_gpu

    def test_what_does_not_fit_is_named(self) -> None:
        case = Case(48, 256)
        x = case.x(2, 256)
        with pytest.raises(ValueError, match="bits=9"):
            cuda.matmul(x, case.weight, 9)
        with pytest.raises(ValueError, match="bfloat16"):
            cuda.matmul(x.bfloat16(), case.weight, 3)
        *operand, bytes_at_2 = vars(Operand.of(case.weight, 2)).values()
        with pytest.raises(ValueError, match="128 features"):
            torch.ops.pmpd.nested_matmul(x[:, :128], *operand)
        with pytest.raises(ValueError, match="give both or neither"):
            torch.ops.pmpd.nested_matmul(x, *operand, byte_table=bytes_at_2[0])
        with pytest.raises(ValueError, match="residual must be"):
            cuda.matmul(x, case.weight, 3, residual=x)
        with pytest.raises(ValueError, match="out must be"):
            cuda.matmul(x, case.weight, 3, out=x)
        with pytest.raises(ValueError, match="16 rows or a multiple, not 50"):
            cuda.matmul(x, Case(50, 256).weight, 3, gate=True)
