"""What a sweep costs that has nothing left to do: planning and reporting 4 models x 4 tasks x 6 schedulers, all cached.

    python benchmarks/sweep.py [--profile]

Six cells of a tiny random model are really built, for each task; the other models' cells are copies of what a report
reads under the keys that a plan gives them, so what is read has its true size and number. Then ``run.py -m`` is run
twice, and timed from the start of its process to the end: its first report, which draws every figure, and another one.
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


COUNTED = """
import atexit, runpy, sys
opened = []
def told():
    weights = [name for name in opened if name.endswith({weights})]
    open("opened", "w").write(f"{{len(opened)}} {{len(weights)}}")
atexit.register(told)
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
sys.argv = {arguments}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""``run.py -m`` by a Python that counts the files it opens, and the weights among them."""


def measure(folder: Path, grid: list[str], profile: bool) -> None:
    """Run the command in a process of its own and print what that took, from its start to its end."""
    report = folder / "outputs" / "paper" / "benchmark"
    arguments = [str(REPOSITORY / "pipelines" / "run.py"), "-m", *grid]
    (folder / "counted.py").write_text(COUNTED.format(weights=WEIGHTS, arguments=arguments))
    drawn = len(list(report.glob("*.png")))
    before, started = os.times(), time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *(["-m", "cProfile", "-o", "profile"] if profile else []), "counted.py"]
    with (folder / "log").open("w") as log:
        code = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log)
    wall_s, after = time.perf_counter() - started, os.times()
    core_s = after.children_user + after.children_system - before.children_user - before.children_system
    if code.returncode:
        sys.exit(f"{(folder / 'log').read_text()[-3000:]}\nthe sweep ended with {code.returncode}")
    opened, weights = map(int, (folder / "opened").read_text().split())
    numbers = (report / "results.csv").read_text().count("\n") - 1
    figures = len(list(report.glob("*.png")))
    print(
        f"{MODELS * len(TASKS) * len(SCHEDULERS)} cells, {numbers} numbers, {figures} figures ({figures - drawn} new): "
        f"{wall_s:.1f} s from start to end, {core_s:.1f} s of a core; {opened} files opened, {weights} weights"
    )
    assert weights == 0, f"a weight was read; if the code that is timed has changed, remove {folder}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmark-sweep"), help="kept between calls")
    parser.add_argument("--profile", action="store_true", help="a cProfile in the folder: for pstats")
    given = parser.parse_args()
    folder = given.folder.absolute()
    ready = folder / "grid.json"
    if not ready.exists():
        ready.parent.mkdir(parents=True, exist_ok=True)
        ready.write_text(json.dumps(prepare(folder)))
    grid = json.loads(ready.read_text())
    shutil.rmtree(folder / "outputs", ignore_errors=True)
    measure(folder, grid, given.profile)  # the first report of it: every figure is drawn
    measure(folder, grid, given.profile)  # and another one: none is


if __name__ == "__main__":
    main()
