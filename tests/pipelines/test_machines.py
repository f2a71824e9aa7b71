"""Which machine's times a plan reads, and the GPU experiment from what a store has recorded."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir

from pipelines import machines
from pipelines.gpu import COLUMNS, gpu_cell
from pipelines.grid import CONF
from pipelines.machines import npu_of, timed
from pipelines.plan import Planner
from pipelines.preflight import PreflightError, check_sources
from pipelines.report import report
from pipelines.run import run_cell
from pipelines.schema import register
from pmpd.artifacts import Node, Store, write_json
from pmpd.config import Config, ConfigError, from_omegaconf
from pmpd.stages.base import write_summary
from pmpd.stages.evaluate import RESULTS_FILE


def cell(*lines: str) -> Config:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return from_omegaconf(compose("config", overrides=list(lines)))


def node(machine: str, bits: int = 4) -> Node:
    return Node("latency", 1, {"bits": bits, "machine": machine}, {})


def record(store: Store, made: Node, **content: object) -> Node:
    store.materialize(made, lambda node, inputs, out: write_json(out / RESULTS_FILE, content))
    return made


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_this_machine_times_for_itself_and_a_report_takes_what_there_is(store, monkeypatch):
    monkeypatch.setattr(machines, "here", lambda device: "here")
    there = record(store, node("there"))
    record(store, node("there", bits=3))
    assert timed(store, "cpu", node, reading=False).key == node("here").key
    assert timed(store, "cpu", node, reading=True).key == there.key
    here = record(store, node("here"))
    assert timed(store, "cpu", node, reading=True).key == here.key


def test_without_a_gpu_its_times_are_read_or_refused(store, no_gpu):
    with pytest.raises(ConfigError, match="no CUDA device and the store has no record"):
        timed(store, "cuda", node, reading=False)
    there = record(store, node("H100"))
    assert timed(store, "cuda", node, reading=False).key == there.key


def test_a_cell_on_a_gpu_that_is_not_there_is_refused_before_anything_runs(store, no_gpu):
    config = cell("experiment=gpu", "model=mobilellama", f"store={store.root}")
    with pytest.raises(ConfigError, match="hardware=npu_4k"):
        gpu_cell(config, store)
    with pytest.raises(ConfigError, match="hardware=gpu is not possible: an NPU"):
        npu_of(config.hardware)
    with pytest.raises(ConfigError, match="model=hf is not possible with report=gpu: one of vicuna7b"):
        gpu_cell(cell("experiment=gpu", "model=hf", "model.path=x"), store)


def test_the_gpu_report_is_what_the_store_recorded_and_names_what_is_missing(store, no_gpu, tmp_path, monkeypatch):
    lines = ["experiment=gpu", "model=mobilellama,phi1_5", f"store={store.root}"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machines, "here", lambda device: "H100")
    for name in ("mobilellama", "phi1_5"):
        made = gpu_cell(cell("experiment=gpu", f"model={name}", f"store={store.root}"), store)
        shape = {"out_features": 2048, "in_features": 2048, "forwards": 100}
        times = [{**shape, "bits": b, "hot_us": b / 2, "flushed_us": float(b)} for b in (16, 4, 2)]
        record(store, made.linears, machine="H100", weights="random weights", rows=times)
        assert (made.latency is None) == (name == "phi1_5")
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    missing = report(lines, tmp_path / "paper")
    assert ["mobilellama" in m.command and "hydra.mode=RUN" in m.command for m in missing] == [True]
    frame = pd.read_csv(tmp_path / "paper" / "results.csv")
    assert tuple(frame.columns) == COLUMNS
    assert set(frame.model) == {"phi1_5"}
    hot = frame[(frame.bits == 2) & (frame.cache == "hot")].iloc[0]
    assert (hot.value, hot.machine, hot.weights) == (1.0, "H100", "random weights")
    text = (tmp_path / "paper" / "table.md").read_text()
    assert "8.00x" in text


def test_times_are_of_a_machine_its_software_and_the_code_that_is_timed():
    found = machines.here("cpu")
    assert found is not None
    assert f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}, code " in found
    assert found == machines.here("cpu")


def test_a_gpu_that_is_not_there_is_refused_before_the_first_stage(store, no_gpu, tiny_llama):
    lines = ["model=hf", f"model.path={tiny_llama}", "data=samples", "budget=tiny", "task.max_new_tokens=9"]
    config = cell(*lines, "task.metrics=[rouge_l]", "scheduler=high", "hardware=gpu", f"store={store.root}")
    with pytest.raises(PreflightError, match="the store has no record of one"):
        check_sources(config, store)


def test_a_cell_with_recorded_gpu_times_runs_whole_without_a_gpu(store, tiny_llama, tmp_path, monkeypatch):
    lines = ["model=hf", f"model.path={tiny_llama}", "model.dtype=float32", "model.high_bits=4", "model.low_bits=2"]
    lines += ["data=samples", "budget=tiny", "task.overlong=truncate", "task.max_new_tokens=9", "tracking=disabled"]
    lines += ["task.metrics=[rouge_l]", "scheduler=static", "scheduler.switch_step=3", "hardware=gpu", "device=cpu"]
    config = cell(*lines, f"store={store.root}")
    with monkeypatch.context() as patch:
        patch.setattr(machines, "here", lambda device: "H100")
        planned = Planner(config, store).cell()
    assert planned.latency.config["runtime"] == {"dtype": "float16", "device": "cuda", "trust_remote_code": False}
    steps = [{"bits": b, "context_tokens": 32, "median_ms": ms} for b, ms in ((16, 4.0), (4, 2.0), (2, 1.0))]
    steps = [{**row, "p10_ms": row["median_ms"], "p90_ms": row["median_ms"], "num_steps": 12} for row in steps]
    weights = {"machine": "H100", "engine": "graphs", "weights": "the model's weights"}
    products = [
        {"out_features": 64, "in_features": 64, "forwards": 100, "bits": b, "hot_us": b / 2, "flushed_us": float(b)}
        for b in (16, 4, 2)
    ]
    for made, rows in ((planned.latency, steps), (planned.linears, products)):
        put(store, made, {**weights, "rows": rows})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run_cell(config, tmp_path / "out")
    frame = pd.read_csv(tmp_path / "out" / "results.csv")
    own = frame[frame.scheduler == "static"].set_index("metric")
    # Eight steps: three at 2 ms, five at 1 ms; a sequence that ends early has only the first of them.
    assert 4 / 2 <= own.loc["gpu_decode_speedup", "value"] <= 8 * 4 / (3 * 2 + 5)
    assert own.loc["gpu_decode_speedup", "value"] == pytest.approx(2 * own.loc["gpu_decode_speedup_over_high", "value"])
    assert own.loc["linear_64x64_2_bits_hot", "value"] == 1.0
    assert "on H100, measured steps; graphs" in own.loc["gpu_decode_throughput", "unit"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "GPU over high" in text
    assert "64 x 64" in text
    assert "NPU" not in text


def test_a_gpu_times_every_precision_that_a_cell_takes_and_refuses_outliers(store, tiny_llama, monkeypatch):
    lines = ["model=hf", f"model.path={tiny_llama}", "model.high_bits=4", "model.low_bits=2", "data=samples"]
    lines += ["budget=tiny", "task.max_new_tokens=9", "task.metrics=[rouge_l]", "hardware=gpu", f"store={store.root}"]
    monkeypatch.setattr(machines, "here", lambda device: "H100")
    for bits, wanted in ((6, [16, 6, 4, 2]), (4, [16, 4, 2])):
        planned = Planner(cell(*lines, "scheduler=uniform", f"scheduler.bits={bits}"), store).cell()
        assert planned.latency.config["bits"] == wanted
    for outliers in (
        ("scheduler=dense_sparse", "scheduler.target.switch_step=3"),
        ("scheduler=high", "quantizer=joint", "quantizer.outlier_share=0.005"),
    ):
        with pytest.raises(ConfigError, match="no GPU kernel reads outliers"):
            Planner(cell(*lines, *outliers), store).cell()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cell_on_the_gpu_at_hand_times_its_own_schedules(store, tiny_llama, tmp_path):
    lines = ["model=hf", f"model.path={tiny_llama}", "model.dtype=float16", "model.high_bits=4", "model.low_bits=2"]
    lines += ["data=samples", "budget=tiny", "task.overlong=truncate", "task.max_new_tokens=9", "tracking=disabled"]
    lines += ["task.metrics=[rouge_l]", "scheduler=static", "scheduler.switch_step=3", "hardware=gpu", "device=cuda"]
    config = cell(*lines, f"store={store.root}")
    run_cell(config, tmp_path / "out")
    frame = pd.read_csv(tmp_path / "out" / "results.csv")
    own = frame[frame.scheduler == "static"].set_index("metric")
    assert own.loc["gpu_decode_throughput", "value"] > 0
    assert "fused kernels under CUDA graphs; the model's weights" in own.loc["gpu_decode_throughput", "unit"]
    assert torch.cuda.get_device_name() in own.loc["gpu_decode_throughput", "unit"]
    for cache in ("hot", "flushed"):
        assert own.loc[f"linear_64x64_2_bits_{cache}", "value"] > 0
    assert "GPU over high" in (tmp_path / "out" / "table.md").read_text()
    again = Planner(config, store).cell()
    assert {store.status(node) for node in (again.latency, again.linears)} == {"cached"}


def put(store: Store, node: Node, content: dict[str, object]) -> None:
    """Publish ``node`` as if it had been built elsewhere: its inputs stay to be made."""
    work = store.root / node.stage / f"{node.key}.0.work"
    work.mkdir(parents=True)
    write_json(work / RESULTS_FILE, content)
    write_summary(work, {})
    store._publish(node, work, work.stat().st_ino, 0.0)
