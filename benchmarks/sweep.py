"""What a sweep costs that has nothing left to do: planning and reporting 4 models x 4 tasks x 6 schedulers, all cached.

    python benchmarks/sweep.py [--profile]

Six cells of a tiny random model are really built, for each task; the other models' cells are copies of what a report
reads under the keys that a plan gives them, so what is read has its true size and number. Then the sweep is planned and
reported in a process of its own, as ``run.py -m`` does it, and the files that it opens are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

MODELS = 4
TASKS = ("cnndm", "dialogsum", "iwslt", "mtbench")
SCHEDULERS = ("fp16", "high", "low", "random", "learned", "high_after_low")
WEIGHTS = (".safetensors", ".bin", ".gguf")


def overrides(folder: Path, models: str, tasks: str) -> list[str]:
    """The grid, as a user would give it."""
    return [
        "model=hf",
        f"model.path={models}",
        "model.dtype=float32",
        "model.high_bits=4",
        "model.low_bits=2",
        "data=samples",
        "budget=tiny",
        "task.overlong=truncate",
        "task.max_new_tokens=9",
        "tracking=disabled",
        f"store={folder / 'store'}",
        "run_name=benchmark",
        f"task={tasks}",
        f"scheduler={','.join(SCHEDULERS)}",
    ]


def prepare(folder: Path) -> list[str]:
    """Build one model's cells, copy them for the others, and return the whole grid's overrides."""
    from pipelines.grid import compose_grid
    from pipelines.multirun import run_grid
    from pipelines.plan import Planner
    from pmpd.artifacts import MANIFEST, Node, Store, read_json, write_json
    from tests.tiny import tiny_model_dir

    paths = [tiny_model_dir(folder, "llama", seed) for seed in range(MODELS)]
    grid = overrides(folder, ",".join(map(str, paths)), ",".join(TASKS))
    store = Store(folder / "store")
    _, configs = compose_grid(grid)
    planned = [Planner(config, store).cell() for config in configs]
    assert not run_grid(overrides(folder, str(paths[0]), ",".join(TASKS)), folder / "one")

    def label(node: Node) -> str:
        return json.dumps([node.stage, node.version, dict(node.config), label_of(node)], sort_keys=True, default=str)

    def label_of(node: Node) -> list[str]:
        """Everything but the model: what the copy and its original have in common."""
        return sorted(
            label(item) if isinstance(item, Node) else item.name
            for name, item in node.inputs.items()
            if name not in ("model",)
        )

    originals = {label(n): store.path(n) for cell in planned for n in cell.read if store.status(n) == "cached"}
    for cell in planned:
        for node in cell.read:
            if store.status(node) != "cached":
                shutil.copytree(originals[label(node)], store.path(node))
                manifest = read_json(store.path(node) / MANIFEST)
                write_json(store.path(node) / MANIFEST, manifest | {"key": node.key})
    return grid


def measure(folder: Path, grid: list[str], profile: bool) -> None:
    """Plan and report in this process; prints seconds and how many files of which kind were opened."""
    started = time.perf_counter()
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    if profile:
        import cProfile
        import pstats

        profiler = cProfile.Profile()
        profiler.enable()
    from pipelines.multirun import run_grid

    imported, imported_cpu = time.perf_counter(), time.process_time()
    missing = run_grid(grid, folder / "report")
    ended = time.perf_counter()
    if profile:
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(60)
    weights = [name for name in opened if name.endswith(WEIGHTS)]
    rows = (folder / "report" / "results.csv").read_text().count("\n") - 1
    print(f"cells: {MODELS * len(TASKS) * len(SCHEDULERS)}, missing: {len(missing)}, numbers: {rows}")
    cpu = time.process_time() - imported_cpu
    print(f"imports {imported - started:.1f} s ({imported_cpu:.1f} s of a core)")
    print(f"planning and reporting {ended - imported:.1f} s ({cpu:.1f} s of a core)")
    print(f"files opened: {len(opened)}, weights among them: {len(weights)}")
    assert not missing
    assert not weights, weights[:3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmark-sweep"), help="kept between calls")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--grid", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.grid:
        measure(given.folder, json.loads(given.grid), given.profile)
        return
    folder = given.folder.absolute()
    ready = folder / "grid.json"
    if not ready.exists():
        ready.parent.mkdir(parents=True, exist_ok=True)
        ready.write_text(json.dumps(prepare(folder)))
    command = [sys.executable, __file__, "--folder", str(folder), "--grid", ready.read_text()]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([*command, *(["--profile"] if given.profile else [])], check=True, env=environment)


if __name__ == "__main__":
    main()
