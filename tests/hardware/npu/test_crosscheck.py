"""Against two other simulators, where they are installed: ``pip install -e .[crosscheck]``."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

from pmpd.hardware.npu import NPU, decode_forward, published_shapes
from pmpd.hardware.npu.operations import product_s

HOW = "pip install -e .[crosscheck]"

GENZ_BITS = {16: "bf16", 8: "int8", 4: "int4", 2: "int2"}


@pytest.mark.parametrize("bits", GENZ_BITS)
@pytest.mark.parametrize("context", [1, 1024])
@pytest.mark.parametrize("num_macs", [4096, 16384])
def test_decoding_agrees_with_genz_within_two_percent(bits: int, context: int, num_macs: int) -> None:
    genz = pytest.importorskip("GenZ", reason=f"genz-llm is not installed: {HOW}")
    npu = NPU("any", num_macs, 1e9, 32e9, count_head=True, head_bits=bits, kv_bits=bits)  # it has one precision for all
    system = genz.System(
        flops=2 * num_macs * 1e9 / 1e12,
        offchip_mem_bw=32e9 / 2**30,  # it counts bytes in MiB
        off_chip_mem_size=64 * 1024,
        bits=GENZ_BITS[bits],
        compute_efficiency=1,
        memory_efficiency=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = genz.decode_moddeling(
            model="llama2_7b", batch_size=1, input_tokens=context, Bb=1, system_name=system, bits=GENZ_BITS[bits]
        )
    ours_ms = 1e3 * decode_forward(npu, published_shapes()["llama2_7b"], bits, context).total_s
    assert ours_ms == pytest.approx(theirs["Latency"], rel=0.02)


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"), [(64, 64, 64), (128, 256, 192), (100, 100, 100), (17, 64, 96)]
)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 64)])
def test_prefill_utilisation_agrees_with_scalesim(
    tokens: int, outputs: int, inputs: int, height: int, width: int, tmp_path: Path
) -> None:
    simulator = pytest.importorskip("scalesim.scale_sim", reason=f"scalesim is not installed: {HOW}")
    if Version(np.__version__) >= Version("2.4"):
        pytest.skip(
            f"scalesim 3.0.0 fails on numpy {np.__version__}: {HOW} in an environment of its own takes an older one"
        )
    (tmp_path / "scale.cfg").write_text(SCALE_CONFIG.format(height=height, width=width))
    (tmp_path / "gemm.csv").write_text(f"Layer,M,N,K,\nlayer,{tokens},{outputs},{inputs},\n")
    (tmp_path / "layout.csv").write_text("Layer name,\nlayer,\n")
    run = simulator.scalesim(
        save_disk_space=True,
        verbose=False,
        config=str(tmp_path / "scale.cfg"),
        topology=str(tmp_path / "gemm.csv"),
        layout=str(tmp_path / "layout.csv"),
        input_type_gemm=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.run_scale(top_path=str(tmp_path))
    with (tmp_path / "run" / "COMPUTE_REPORT.csv").open(newline="") as file:
        row = {key.strip(): value for key, value in next(csv.DictReader(file)).items() if key}

    # Weights stand in the array (inputs down, outputs across), rows stream through: a tile takes 2 x height + width - 2
    # cycles beside its rows, to load weights and to fill and drain.
    npu = NPU(
        "systolic",
        num_macs=height * width,
        clock_hz=1.0,
        bandwidth_bytes_s=1.0,
        matrix_tile_outputs=width,
        matrix_tile_inputs=height,
        matrix_fill_cycles=2 * height + width - 2,
        matrix_vector_utilisation=1e-6,  # a systolic array has no other mode
    )
    utilisation = tokens * outputs * inputs / (height * width * product_s(npu, tokens, outputs, inputs))
    assert 100 * utilisation == pytest.approx(float(row["Overall Util %"]), rel=0.005)


SCALE_CONFIG = """[general]
run_name = run
[architecture_presets]
ArrayHeight : {height}
ArrayWidth : {width}
IfmapSramSzkB: 4096
FilterSramSzkB: 4096
OfmapSramSzkB: 4096
IfmapOffset: 0
FilterOffset: 10000000
OfmapOffset: 20000000
Bandwidth : 1000
Dataflow : ws
MemoryBanks: 1
ReadRequestBuffer: 512
WriteRequestBuffer: 512
[layout]
IfmapCustomLayout: False
IfmapSRAMBankBandwidth: 10
IfmapSRAMBankNum: 10
IfmapSRAMBankPort: 2
FilterCustomLayout: False
FilterSRAMBankBandwidth: 10
FilterSRAMBankNum: 10
FilterSRAMBankPort: 2
[sparsity]
SparsitySupport : false
SparseRep : ellpack_block
OptimizedMapping : false
BlockSize : 8
RandomNumberGeneratorSeed : 40
[run_presets]
InterfaceBandwidth: CALC
UseRamulatorTrace: False
"""
