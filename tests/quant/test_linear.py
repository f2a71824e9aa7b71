import pytest
import torch
from torch import nn

from pmpd.quant.linear import NestedLinear, PrecisionCell
from pmpd.quant.nested import quantize_weight


def make_layer(cell: PrecisionCell, *, bias: bool = True, seed_bits: int = 2, parent_bits: int = 4) -> NestedLinear:
    torch.manual_seed(0)
    original = nn.Linear(40, 6, bias=bias)
    quantized = quantize_weight(
        original.weight, torch.ones(6, 40), seed_bits=seed_bits, parent_bits=parent_bits, group_size=16
    )
    return NestedLinear(quantized, original, cell)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
def test_forward_follows_the_cell(x: torch.Tensor, bias: bool) -> None:
    cell = PrecisionCell()
    layer = make_layer(cell, bias=bias)
    for bits in (16, 4, 2, 3, 16, 4):
        cell.bits = bits
        weight = layer.weight if bits == 16 else layer.nested.dequantize(bits, torch.float64)
        expected = x.double() @ weight.double().T + (layer.bias.double() if bias else 0)
        torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=1e-5)


def test_a_new_cell_is_the_unquantised_model() -> None:
    assert PrecisionCell().bits == 16


def test_a_precision_that_some_layer_lacks_is_refused() -> None:
    cell = PrecisionCell()
    make_layer(cell)
    make_layer(cell, seed_bits=3, parent_bits=5)
    assert cell.available == [3, 4, 16]
    cell.bits = 3
    for bits in (2, 5, 8):
        with pytest.raises(ValueError, match=rf"bits={bits} .*\[3, 4, 16\]"):
            cell.bits = bits
        with pytest.raises(ValueError, match=rf"bits={bits} "):
            cell.prepare(bits)
    assert cell.bits == 3


def test_without_layers_only_the_unquantised_precision_is_there() -> None:
    with pytest.raises(ValueError, match=r"\[16\]"):
        PrecisionCell().bits = 4


def test_a_weight_is_dequantised_once_until_dropped(x: torch.Tensor) -> None:
    cell = PrecisionCell()
    layer = make_layer(cell)
    cell.prepare(3)
    three = layer.weight_at(3)
    cell.bits = 3
    layer(x)
    assert layer.weight_at(3) is three
    four = layer.weight_at(4)
    cell.drop(3)
    assert layer.weight_at(4) is four
    assert layer.weight_at(3) is not three
    cell.drop()
    assert layer.weight_at(4) is not four
    assert torch.equal(layer.weight_at(4), four)


def test_a_moved_layer_dequantises_anew(x: torch.Tensor) -> None:
    cell = PrecisionCell()
    layer = make_layer(cell)
    cell.bits = 4
    layer(x)
    layer.double()
    assert layer(x.double()).dtype == torch.float64
    layer.to(torch.bfloat16)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_names_and_values_of_the_state_are_the_original_layers() -> None:
    original = nn.Linear(40, 6)
    layer = NestedLinear(quantize_weight(original.weight, torch.ones(6, 40)), original, PrecisionCell())
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert layer.weight is original.weight


def test_another_layers_weight_is_refused() -> None:
    quantized = quantize_weight(torch.randn(6, 40), torch.ones(6, 40))
    with pytest.raises(ValueError, match=r"\[6, 40\].*\[40, 6\]"):
        NestedLinear(quantized, nn.Linear(6, 40), PrecisionCell())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_layer_moved_to_a_gpu_computes_there_what_the_cpu_does(x: torch.Tensor) -> None:
    cell = PrecisionCell()
    layer = make_layer(cell)
    for bits in (2, 3, 4, 16):
        cell.bits = bits
        layer.cpu()
        expected = layer(x)
        result = layer.cuda()(x.cuda())
        assert layer.weight_at(bits).device.type == "cuda"
        torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_originals_are_dropped_and_the_rest_stays(x: torch.Tensor, bias: bool) -> None:
    cell = PrecisionCell()
    layer = make_layer(cell, bias=bias)
    cell.bits = 3
    expected = layer(x)
    cell.bits = 16
    cell.drop_originals()
    assert (cell.available, cell.bits, layer.weight) == ([2, 3, 4], 4, None)
    cell.bits = 3
    assert torch.equal(layer(x), expected)
    assert layer.double().weight_at(3).dtype == torch.float64
    assert sum(p.numel() for p in layer.parameters()) == (6 if bias else 0)
    with pytest.raises(ValueError, match="bits=16 is not available"):
        cell.bits = 16


def test_a_layer_can_be_made_of_nested_weights_alone(x: torch.Tensor) -> None:
    whole = make_layer(PrecisionCell())
    cell = PrecisionCell()
    assert whole.bias is not None
    layer = NestedLinear.without_original(whole.nested, whole.bias.detach(), torch.float32, cell)
    assert (cell.available, cell.bits) == ([2, 3, 4], 4)
    for bits in cell.available:
        cell.bits = whole.cell.bits = bits
        assert torch.equal(layer(x), whole(x))
    assert {*layer.state_dict()} == {"bias"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 7, 50])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_half_precision_is_packed_once_for_all_precisions(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    original = nn.Linear(96, 40)
    nested = quantize_weight(original.weight, torch.ones(40, 96), parent_bits=4)
    cell = PrecisionCell()
    layer = NestedLinear(nested, original, cell).to("cuda", dtype)
    alone = NestedLinear.without_original(nested.to("cuda"), layer.bias, dtype, PrecisionCell())
    x = torch.randn(rows, 96, device="cuda").to(dtype)
    for bits in (4, 2, 3):
        cell.bits = alone.cell.bits = bits
        weight = nested.dequantize(bits, torch.float64)
        expected = x.cpu().double() @ weight.T + layer.bias.cpu().double()
        limit = 3e-3 if dtype == torch.float16 else 1.5e-2
        for result in (layer(x), alone(x)):
            assert (result.cpu().double() - expected).norm() / expected.norm() < limit
        torch.testing.assert_close(layer.weight_at(bits).cpu().double(), weight, rtol=1e-2, atol=2e-3)
    packed = layer.packed
    assert packed is not None
    assert packed is layer.packed
    assert alone.nested is None, "the planes are on the device twice"
    with pytest.raises(ValueError, match="load the model again"):
        alone.cpu()
    layer.cpu().float()
    assert layer.packed is None
    torch.testing.assert_close(layer.weight_at(3), nested.dequantize(3, torch.float32))
