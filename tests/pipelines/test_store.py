"""The store's command line: what it lists, keeps, refuses, and how far back a number leads."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from pipelines.store import garbage, main
from pmpd.artifacts import Node, Root, Store, write_json


def build(n, inputs, out):
    write_json(out / "results.json", {"name": n.config["name"]})


@pytest.fixture
def chain(tmp_path: Path) -> list[Node]:
    """Weights and data, and what was made of them, in ``tmp_path``/s."""
    (tmp_path / "weights.bin").write_text("w")
    weights = Root("weights.bin", "digest-of-weights", tmp_path.joinpath("weights.bin").absolute)
    first = Node("quantize", 1, {"name": "first"}, {"model": weights})
    last = Node("evaluate", 2, {"name": "last"}, {"nested": first})
    Store(tmp_path / "s").materialize(last, build)
    return [first, last]


def run(tmp_path: Path, *arguments: str) -> int:
    return main([*arguments, "--store", str(tmp_path / "s")])


def test_listing_and_usage_name_every_artifact(chain, tmp_path, capsys):
    assert run(tmp_path, "ls") == 0
    said = capsys.readouterr().out
    assert all(n.key in said for n in chain)
    assert run(tmp_path, "ls", "evaluate") == 0
    assert chain[0].key not in capsys.readouterr().out
    assert run(tmp_path, "du") == 0
    assert "quantize (1)" in capsys.readouterr().out


def test_why_leads_from_a_table_row_back_to_the_weights(chain, tmp_path, capsys):
    table = tmp_path / "results.csv"
    table.write_text(f"metric,value,key\nrouge_l,1.0,{chain[1].key}\n")
    assert run(tmp_path, "why", f"{table}:2") == 0
    said = capsys.readouterr().out
    assert (
        said.index("metric=rouge_l") < said.index(f"evaluate {chain[1].key}") < said.index(f"quantize {chain[0].key}")
    )
    assert "source weights.bin, content digest-of-weights" in said
    assert '{"name": "first"}' in said
    assert said.count("sha256") == 2
    assert run(tmp_path, "why", f"{table}:3") == 1
    assert "rows 2 to 2" in capsys.readouterr().err
    assert run(tmp_path, "why", "nokey") == 1
    table.write_text("metric,value\nrouge_l,1.0\n")
    capsys.readouterr()
    assert run(tmp_path, "why", f"{table}:2") == 1
    assert "has no key in row 2" in capsys.readouterr().err


def test_verify_names_what_differs(chain, tmp_path, capsys):
    assert run(tmp_path, "verify") == 0
    capsys.readouterr()
    (tmp_path / "s" / "quantize" / chain[0].key / "results.json").write_text("{}")
    assert run(tmp_path, "verify") == 1
    said = capsys.readouterr().out
    assert f"quantize {chain[0].key}: results.json differs" in said
    assert said.endswith("2 artifacts, 1 damaged\n")
    assert run(tmp_path, "verify", chain[1].key[:6]) == 0


def test_gc_removes_what_nothing_reads_and_keeps_what_a_run_resumes_from(chain, tmp_path, capsys):
    store = tmp_path / "s"
    other = Node("quantize", 1, {"name": "killed"}, {})
    kept = store / "quantize" / f"{other.key}.1.work"
    kept.mkdir()
    (kept / "part.json").write_text("1")
    (store / "quantize" / f"{other.key}.0.work").mkdir()
    (store / "quantize" / f"{chain[0].key}.3.damaged").mkdir()
    (store / "evaluate" / f"{chain[1].key}.0.work").mkdir()
    (store / "evaluate" / "x.json.1234.tmp").write_text("half")
    before = garbage(store)
    assert run(tmp_path, "gc") == 0
    assert garbage(store) == before, "listing deletes nothing"
    assert run(tmp_path, "gc", "--delete") == 0
    assert garbage(store) == []
    assert (kept / "part.json").exists()
    assert Store(store).verify(chain[1])
    assert {p.name for p in (store / "evaluate").iterdir()} == {chain[1].key}


def test_gc_refuses_while_something_is_built(chain, tmp_path, capsys):
    lock = tmp_path / "s" / "quantize" / "abc.0.lock"
    lock.write_text(json.dumps({"host": "other", "machine": "another", "pid": 7}))
    assert run(tmp_path, "gc", "--delete") == 1
    assert "process 7 of other" in capsys.readouterr().err


@pytest.mark.parametrize("words", [json.dumps({"host": "other", "machine": "another", "pid": 7}), ""])
def test_gc_does_not_wait_for_a_lock_of_a_host_that_is_long_gone(chain, tmp_path, words):
    lock = tmp_path / "s" / "quantize" / "abc.0.lock"
    lock.write_text(words)
    assert run(tmp_path, "gc", "--delete") == 1
    os.utime(lock, (time.time() - 7200, time.time() - 7200))
    assert run(tmp_path, "gc", "--delete") == 0


def test_what_is_no_store_is_refused_and_left_alone(tmp_path, capsys):
    assert run(tmp_path, "ls") == 1
    assert "no store" in capsys.readouterr().err
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine").write_text("x")
    assert run(tmp_path, "gc", "--delete") == 1
    assert (tmp_path / "s" / "mine").exists()
