"""What the compiler says of registers is found, and of the product's kernel alone."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from pmpd.kernels import nvrtc

LOG = """pmpd.cu(20): warning #177-D: variable "UNIT" was declared but never referenced
ptxas info    : Compiling entry function 'dequantize' for 'sm_90'
ptxas         .     32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
ptxas info    : Compiling entry function 'nested_matmul' for 'sm_90'
ptxas info    : Function properties for nested_matmul
ptxas         .     16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers
"""


@pytest.fixture
def registers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("registers")


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("fused", ["", "residual", "norm", "norm, gated"])
def test_registers_and_spills_of_a_program(
    registers: ModuleType, monkeypatch: pytest.MonkeyPatch, rows: int, fused: str
) -> None:
    variant = registers.program(3, rows, (4096, 11008), fused)
    assert (variant.bits, variant.rows, variant.norm, variant.gated) == (3, rows, "norm" in fused, "gated" in fused)

    def build(source: str, options: list[str], architecture: str) -> tuple[bytes, str]:
        assert source == variant.source
        assert options == [*variant.options, "--ptxas-options=-v"]
        assert architecture == "sm_90"
        return b"", LOG

    monkeypatch.setattr(nvrtc, "build", build)
    assert registers.used(variant, "sm_90") == (variant, 80, 16)


def test_a_compiler_that_says_nothing_is_an_error(registers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "build", lambda *_: (b"", "ptxas info: nothing"))
    with pytest.raises(RuntimeError, match="registers"):
        registers.used(registers.program(2, 1, (4096, 4096), ""), "sm_90")
