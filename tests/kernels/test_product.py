"""The GPU's product as far as a CPU goes: many rows, refusals, shapes."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pmpd import kernels
from pmpd.kernels import cuda, product
from pmpd.kernels.gated import in_turns
from pmpd.kernels.launch import Launch
from pmpd.kernels.product import Fused, Operand, Variant
from tests.kernels.case import TOLERANCE, Case


@pytest.mark.parametrize("rows", [33, 40])
def test_many_rows_are_added_to_a_residual_that_is_written_over(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(50, 96, device="cpu")

    def decode(weight: object, first_row: int, out: Tensor) -> None:
        out.copy_(case.exact(3)[first_row : first_row + len(out)])

    monkeypatch.setattr(product, "decode", decode)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    x, bias = case.x(rows, 96), case.x(50, seed=5)
    for overwritten in (True, False):
        residual = case.x(rows, 50, seed=4)
        added = residual.double() + bias.double()
        out = residual if overwritten else torch.empty_like(residual)
        assert cuda.matmul(x, case.weight, 3, residual=residual, bias=bias, out=out) is out
        case.check(out, x, 3, added)


@pytest.mark.parametrize("parts", [1, 3])
def test_many_rows_are_gated_part_by_part(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(48, 96, device="cpu")

    def decode(weight: object, first_row: int, out: Tensor) -> None:
        out.copy_(case.exact(3)[first_row : first_row + len(out)])

    monkeypatch.setattr(product, "decode", decode)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(cuda, "DECODED_WEIGHTS", 48 * 96 // parts)
    x, residual, bias = case.x(40, 96), case.x(40, 24, seed=4), case.x(48, seed=5)
    both = (x.double() @ case.exact(3).T + bias.double()).unflatten(1, (-1, 2, 8))
    expected = (functional.silu(both[:, :, 0]) * both[:, :, 1]).flatten(1) + residual.double()
    result = cuda.matmul(x, case.weight, 3, gate=True, residual=residual, bias=bias, out=residual)
    assert (result.double() - expected).norm() / expected.norm() < 2 * TOLERANCE[case.dtype]


def test_rows_in_turns_are_eight_of_each() -> None:
    gate, up = torch.arange(24.0).view(2, 12, 1), -torch.arange(24.0).view(2, 12, 1)
    with pytest.raises(RuntimeError, match="unflatten"):
        in_turns(gate, up, dim=1)
    gate, up = torch.arange(16.0)[:, None], 100 + torch.arange(16.0)[:, None]
    both = in_turns(gate, up)
    assert both[:, 0].tolist() == [*range(8), *range(100, 108), *range(8, 16), *range(108, 116)]
    assert torch.equal(in_turns(gate.T, up.T, dim=1), both.T)


@pytest.mark.parametrize("features", [32, 48, 192])
def test_inputs_of_another_width_are_refused(features: int) -> None:
    case = Case(32, 96, device="cpu")
    x = case.x(2, features)
    with pytest.raises(ValueError, match=rf"x has {features} features; the weight \[32, 96\] takes 96"):
        cuda.matmul(x, case.weight, 3)
    with pytest.raises(ValueError, match=rf"x has {features} features"):
        cuda._multiply(x, Operand.of(case.weight, 3), Fused(), x.new_empty(2, 32))


def test_no_rows_have_no_product() -> None:
    case = Case(48, 96, device="cpu")
    for shape in ((0,), (3, 0)):
        out = torch.empty(*shape, 48, dtype=case.dtype)
        assert cuda.matmul(case.x(*shape, 96), case.weight, 3, residual=out, out=out) is out


def test_an_input_of_another_device_or_dtype_is_refused() -> None:
    case = Case(32, 96, device="cpu")
    x = case.x(2, 96)
    with pytest.raises(ValueError, match="x is on meta, the weight on cpu"):
        cuda.matmul(x.to("meta"), case.weight, 3, out=x.new_empty(2, 32))
    with pytest.raises(ValueError, match=r"x is torch\.float32; .* float16 and bfloat16"):
        cuda._multiply(x.float(), Operand.of(case.weight, 3), Fused(), torch.empty(2, 32))


def test_tensors_that_are_not_of_one_weight_are_refused() -> None:
    case, x = Case(32, 96, device="cpu"), torch.zeros(2, 192, dtype=torch.float16)
    packed, table, scales, bits, out_features, in_features, group, _ = vars(Operand.of(case.weight, 3)).values()
    bytes_at_2 = case.weight.bytes_at_2
    assert bytes_at_2 is not None
    for wrong in (
        Operand(packed[:-1], table, scales, bits, out_features, in_features, group),
        Operand(packed[: packed.numel() // 4], table, scales, bits, out_features, in_features, group),
        Operand(packed, table, scales[:16], bits, out_features, in_features, group),
        Operand(packed, table, scales, 2, out_features, in_features, group, (bytes_at_2[0][:1], bytes_at_2[1])),
        Operand(packed, table, scales, 2, out_features, in_features, group, (bytes_at_2[0], bytes_at_2[1][:16])),
    ):
        with pytest.raises(ValueError, match="not those of a weight"):
            cuda._multiply(x[:, :96], wrong, Fused(), x.new_empty(2, 32))


@pytest.mark.parametrize(
    ("rows", "bits", "groups", "of_bytes", "digits"),
    [
        (2, 2, 1, True, 1),
        (8, 2, 1, True, 1),
        (1, 2, 1, True, 2),  # one row is by planes, mostly, and as exact as it can be
        (8, 3, 1, True, 2),
        (8, 2, 4, True, 2),
        (8, 2, 1, False, 2),
    ],
)
def test_tables_of_bytes_are_for_several_rows_by_look_up(
    rows: int, bits: int, groups: int, of_bytes: bool, digits: int
) -> None:
    plan = Launch(2, 2, blocks=132, rows=rows)
    variant = Variant.of(plan, bits, torch.float16, Fused(), (64, 512), groups, of_bytes=of_bytes)
    assert variant.table_digits == digits
    assert f"-DTABLE_DIGITS={digits}" in variant.options


def test_a_gpu_that_is_too_old_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="Tesla T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    with pytest.raises(kernels.CudaUnavailableError, match=r"Tesla T4 has compute capability 7\.5.*use device=cpu"):
        product.describe.__wrapped__(0)


def test_the_fake_gives_the_products_shape() -> None:
    case = Case(50, 96, device="cpu")
    operand = Operand.of(case.weight, 3)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 3, 96, dtype=torch.float16, device="cuda")
        result = torch.ops.pmpd.nested_matmul(x, *vars(operand).values())
        halved = torch.ops.pmpd.nested_matmul(x, *vars(operand).values(), gate=True)
    assert result.shape == (2, 3, 50)
    assert halved.shape == (2, 3, 25)
    assert result.dtype == torch.float16


def test_it_exports() -> None:
    """Only shapes are looked at: the weights are on a CPU, where the product is not."""

    class Layer(torch.nn.Module):
        def __init__(self, weight: cuda.DeviceWeight) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return 2 * cuda.matmul(x, self.weight, 3)

    case = Case(50, 96, device="cpu")
    exported = torch.export.export(Layer(case.weight), (case.x(2, 96),))
    products = [node for node in exported.graph.nodes if node.target is torch.ops.pmpd.nested_matmul.default]
    assert [node.meta["val"].shape for node in products] == [(2, 50)]
