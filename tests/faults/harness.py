"""Injects faults into sweeps of a tiny model and counts what was lost or came out different. ``make faults``.

    python -m tests.faults.harness [--seed N] [--only KIND] [--stage STAGE] [--keep]

Every kind of fault strikes every stage that it can hit, at a random moment. An injection starts from a finished store,
of which one artifact and all that was made of it are taken away, and is two processes: one in which the fault strikes,
one that is given the same command again. Of a truncated artifact, what was made of it stays every other time: then it
must stay as it is, and the truncated one is built again only if somebody reads it. Then:

- lost: an artifact that was finished is gone or was built again (other than a truncated one), or a cell is missing;
- corrupt: an artifact's files, or a table's, differ from those of the undisturbed run. Times differ from run to run, so
  those of ``latency`` are left out where that is what was struck.

The last line is ``N injected, L lost, C corrupt``; the exit code is 1 unless L and C are 0.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}  # numba's number becomes torch's
os.environ["WANDB_API_KEY"] = "0" * 40
os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:9"  # nobody answers there

import torch
from safetensors.torch import load_file

from pipelines import multirun, report, sweep
from pipelines.grid import compose_grid
from pipelines.plan import Planner
from pmpd.artifacts import MANIFEST, Node, Store, read_json, write_json
from pmpd.config import Config
from pmpd.locks import Patience
from pmpd.tracking import tracker
from tests.faults.injections import Strike, truncate
from tests.pipelines.cells import tiny
from tests.tiny import tiny_model_dir

PROCESS_KINDS = ("kill", "requeue", "holder_gone", "disk_full", "truncated", "stage_error")
KINDS = (*PROCESS_KINDS, "wandb_down")
PATIENCE = Patience(heartbeat_s=0.1, abandoned_after_s=0.8)
TRIES = 4
CANNOT = {
    "data": "it downloads from a hub, and there is none here",
    "linears": "it needs a GPU",
    "gain": "it needs times of a GPU",
    "hyperparameters": "pipelines/tune.py makes it, not a sweep",
}
SCHEDULERS = "high,static,learned,oracle,dense_sparse"


@dataclass(frozen=True)
class Grid:
    """A sweep's cells, composed once: the configurations are those of any command with this store."""

    cells: list[list[str]]
    configs: list[Config]

    def at(self, store: Path, wandb: Path, mode: str) -> list[Config]:
        tracking_mode = tracking_modes()[mode]
        return [
            dataclasses.replace(
                c, store=str(store), tracking=dataclasses.replace(c.tracking, dir=str(wandb), mode=tracking_mode)
            )
            for c in self.configs
        ]


def tracking_modes() -> dict[str, object]:
    from pmpd.config import TrackingMode

    return {mode.value: mode for mode in TrackingMode}


def grids(model: Path) -> list[Grid]:
    """Three sweeps which together have every stage that runs here; the last one's precisions hang on its search."""
    wanted = (
        f"scheduler={SCHEDULERS}",
        "quantizer=joint scheduler=high",
        "quantizer.tuning_steps=2 scheduler=high model.high_bits=null model.low_bits=2",
        "quantizer.refits=2 scheduler=high",
    )
    return [Grid(*compose_grid([*tiny(model), *more.split()])) for more in wanted]


def bin_model(folder: Path) -> Path:
    """A tiny model whose weights are ``.bin``, so that the stage that converts them has work."""
    model = tiny_model_dir(folder, "llama")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    return model


def in_child(work: Callable[[], None], log_file: Path) -> int:
    """Run ``work`` in a forked process, its words in ``log_file``; returns the exit code, a signal's negative."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with log_file.open("a") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s", force=True)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def run_sweeps(all_grids: Sequence[Grid], folder: Path, strike: Strike | None, mode: str = "disabled") -> None:
    """What ``run.py -m`` does, for each grid; without the figures, which are not under test. Exits 3 if cells miss.

    In a child: it replaces functions of modules.
    """
    for name in ("draw_quality", "draw_cells", "draw_switch_steps", "draw_perplexity"):
        setattr(report, name, lambda *_: None)
    multirun.Store = lambda root: Store(root, PATIENCE)  # type: ignore[assignment, misc]
    if strike is not None:
        sweep.execute = strike.execute  # type: ignore[assignment]
    tracker.INIT_TIMEOUT_S = 2.0
    missing = []
    for number, grid in enumerate(all_grids):
        configs = grid.at(folder / "store", folder / "wandb", mode)
        multirun.compose_grid = lambda _, grid=grid, configs=configs: (grid.cells, configs)  # type: ignore[assignment]
        missing += multirun.run_grid([f"grid={number}"], folder / f"report{number}")
    if strike is not None:
        write_json(folder / "strike.json", {"struck": strike.struck, "counts": strike.counts})
    if missing:
        sys.stdout.flush()
        os._exit(3)


class Baseline:
    """The undisturbed run: its store, its tables, and how often each artifact's making touches the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.every_other = itertools.cycle((True, False))
        folder.mkdir(parents=True)
        self.grids = grids(bin_model(folder))

        def work() -> None:
            run_sweeps(self.grids, folder, Strike("count", Store(folder / "store")), "offline")

        started = time.monotonic()
        code = in_child(work, folder / "log")
        assert code == 0, (folder / "log").read_text()[-3000:]
        self.counts: dict[str, list[int]] = read_json(folder / "strike.json")["counts"]
        store = Store(folder / "store")
        configs = [c for grid in self.grids for c in grid.at(folder / "store", folder / "wandb", "disabled")]
        found = [n for config in configs for t in Planner(config, store).cell().read for n in t.ancestors()]
        self.nodes = {n.key: n for n in found}
        self.files = {key: read_json(store.path(n) / MANIFEST)["files"] for key, n in self.nodes.items()}
        took_s = time.monotonic() - started
        print(f"undisturbed: {len(self.nodes)} artifacts of {len(self.stages)} stages in {took_s:.0f} s")

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys(n.stage for n in self.nodes.values()))

    def made_of(self, key: str) -> list[Node]:
        """The artifact and everything that was made of it."""
        return [n for n in self.nodes.values() if key in {a.key for a in n.ancestors()}]


def stamps(store: Store, nodes: Sequence[Node]) -> dict[str, tuple[int, int]]:
    """What tells a finished artifact from one that was built again in its place."""
    found = {n.key: store.path(n) / MANIFEST for n in nodes}
    return {key: (p.stat().st_ino, p.stat().st_mtime_ns) for key, p in found.items() if p.exists()}


@dataclass
class Outcome:
    """One injection: whether the fault struck, and what came of it."""

    kind: str
    stage: str
    struck: bool = False
    lost: tuple[str, ...] = ()
    corrupt: tuple[str, ...] = ()


def inject(base: Baseline, kind: str, stage: str, folder: Path, chance: random.Random) -> Outcome:
    """One fault in one stage, and the same command again."""
    victim = chance.choice([n for n in base.nodes.values() if n.stage == stage])
    shutil.copytree(base.folder / "store", folder / "store")
    (folder / "wandb").mkdir()
    shutil.copytree(base.folder / "wandb" / "sent", folder / "wandb" / "sent")
    store = Store(folder / "store")
    stays = kind == "truncated" and next(base.every_other)
    gone = [] if stays else base.made_of(victim.key)
    for node in gone:
        if kind != "truncated" or node.key != victim.key:
            shutil.rmtree(store.path(node))
    outcome = Outcome(kind, stage)
    mode, at = "disabled", 0
    if kind == "truncated":
        truncate(store, victim, chance.random(), chance.random())
        outcome.struck = True
    elif kind == "wandb_down":
        mode = "online"
        next((folder / "wandb" / "sent").rglob(f"{stage}-{victim.key}.json")).unlink()
    else:
        all_events, writes = base.counts[victim.key]
        at = chance.randrange(writes if kind == "disk_full" else all_events)
    before = stamps(store, [n for n in base.nodes.values() if n.key != victim.key])

    def disturbed() -> None:
        strikes = kind in PROCESS_KINDS and kind != "truncated"
        run_sweeps(base.grids, folder, Strike(kind, store, victim.key, at) if strikes else None, mode)

    code = in_child(disturbed, folder / "log")
    wrong: list[str] = []
    if kind in ("kill", "holder_gone", "requeue"):
        outcome.struck = code in (-9, -15)
    elif kind in ("disk_full", "stage_error"):
        outcome.struck = bool(read_json(folder / "strike.json")["struck"])
        wrong += _error_is_reported(folder, "injected in" if kind == "stage_error" else "is full")
    elif kind == "wandb_down":
        kept = list((folder / "wandb" / "wandb").glob(f"offline-run-*-{stage}-{victim.key}"))
        outcome.struck = len(kept) == 1
        wrong += [] if code == 0 else [f"the sweep ended with {code}"]
    if kind == "holder_gone":
        for lock in (folder / "store" / stage).glob(f"{victim.key}.*.lock"):
            said = read_json(lock)
            if not said.get("released"):
                write_json(lock, said | {"host": "a node that is gone", "machine": "its last boot"})
    finished = stamps(store, [n for n in base.nodes.values() if n.key != victim.key])
    code = in_child(lambda: run_sweeps(base.grids, folder, None), folder / "log")
    wrong += [] if code == 0 else [f"the same command again ended with {code}"]
    after = stamps(store, list(base.nodes.values()))
    wrong += [f"{base.nodes[k].stage} {k} was built again" for k, s in (before | finished).items() if after.get(k) != s]
    outcome.lost = tuple(wrong)
    outcome.corrupt = tuple(_differences(base, folder, store, stage, victim.key if stays else None))
    return outcome


def _error_is_reported(folder: Path, words: str) -> list[str]:
    """Where some cells were finished, the table names the others with what happened."""
    tables = [p.read_text() for p in folder.glob("report*/table.md")]
    failed = " failed: " in (folder / "log").read_text()
    with_missing = [t for t in tables if "## Missing" in t]
    if failed and with_missing and not any(words in t for t in with_missing):
        return [f"no table says {words!r}"]
    return []


def _differences(base: Baseline, folder: Path, store: Store, stage: str, left: str | None) -> list[str]:
    """What is not as undisturbed; ``left`` is the key of one that may still be truncated, as nobody reads it."""
    found = []
    for key, node in base.nodes.items():
        if key == left:
            continue
        manifest = store.path(node) / MANIFEST
        if node.stage == "latency" and stage in {a.stage for a in node.ancestors()}:
            continue  # measured again
        if manifest.exists() and read_json(manifest)["files"] != base.files[key]:
            found.append(f"{node.stage} {key} differs")
        try:
            Store(store.root).verify(node)
        except Exception as error:
            found.append(f"{node.stage} {key}: {error}")
    retimed = any(n.stage == "latency" and stage in {a.stage for a in n.ancestors()} for n in base.nodes.values())
    for number in range(len(base.grids)):
        for name in ("results.csv", "table.md"):
            ours, theirs = folder / f"report{number}" / name, base.folder / f"report{number}" / name
            if not ours.exists() or _without_times(ours, retimed) != _without_times(theirs, retimed):
                found.append(f"report{number}/{name} differs")
    return found


def _without_times(file: Path, retimed: bool) -> list[str]:
    lines = file.read_text().splitlines()
    if not retimed:
        return lines
    if file.suffix == ".md":
        return [line for line in lines if not line.startswith("Measured")]
    header, *rows = csv.reader(lines)
    metric = header.index("metric")
    return [",".join(row) for row in rows if not row[metric].startswith("latency")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, action="append", help="kinds (all)")
    parser.add_argument("--stage", action="append", help="stages (all)")
    parser.add_argument("--keep", action="store_true", help="keep the folders of what went wrong")
    given = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="pmpd-faults-"))
    base = Baseline(root / "undisturbed")
    for stage, why in CANNOT.items():
        print(f"not hit: {stage}: {why}")
    chance = random.Random(given.seed)
    injected = lost = corrupt = 0
    started = time.monotonic()
    for kind in given.only or KINDS:
        for stage in given.stage or base.stages:
            for attempt in range(TRIES):
                folder = root / f"{kind}-{stage}-{attempt}"
                folder.mkdir()
                outcome = inject(base, kind, stage, folder, chance)
                injected += outcome.struck
                lost += bool(outcome.lost)
                corrupt += bool(outcome.corrupt)
                wrong = [*outcome.lost, *outcome.corrupt]
                if wrong:
                    print(f"{kind} in {stage}: " + "; ".join(wrong[:4]) + (f"  ({folder})" if given.keep else ""))
                if not (wrong and given.keep):
                    shutil.rmtree(folder)
                if outcome.struck:
                    break
            else:
                print(f"{kind} in {stage}: did not strike in {TRIES} tries")
                lost += 1  # a harness that cannot hit what it names must not look like a pass
        print(f"{kind}: {injected} injected so far, {time.monotonic() - started:.0f} s", flush=True)
    if not given.keep:
        shutil.rmtree(root)
    print(json.dumps({"seed": given.seed, "stages": len(base.stages), "kinds": len(given.only or KINDS)}))
    print(f"{injected} injected, {lost} lost, {corrupt} corrupt")
    return int(bool(lost or corrupt))


if __name__ == "__main__":
    sys.exit(main())
