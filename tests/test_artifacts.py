"""The store: keys, what is built and when, what is damaged or no store."""

import json

import pytest

from pmpd.artifacts import DamagedArtifactError, Node, Root, Store, StoreError, recipe_key, write_json


def node(name="a", version=1, **inputs):
    return Node("stage", version, {"name": name}, inputs)


def write(node, inputs, out):
    write_json(out / "value.json", {"name": node.config["name"], "from": sorted(str(p) for p in inputs.values())})


def test_key_is_pinned_and_depends_on_everything():
    assert recipe_key("s", 1, {"a": 1, "b": 2}, {"x": "k"}) == recipe_key("s", 1, {"b": 2, "a": 1}, {"x": "k"})
    assert recipe_key("s", 1, {"a": 1}, {"x": "k"}) == "bc5f6ec3a0f0d440"
    keys = {
        recipe_key("s", 1, {"a": 1}, {"x": "k"}),
        recipe_key("t", 1, {"a": 1}, {"x": "k"}),
        recipe_key("s", 2, {"a": 1}, {"x": "k"}),
        recipe_key("s", 1, {"a": 2}, {"x": "k"}),
        recipe_key("s", 1, {"a": 1}, {"x": "l"}),
        recipe_key("s", 1, {"a": 1}, {"y": "k"}),
    }
    assert len(keys) == 6


def test_an_artifact_is_built_once(tmp_path):
    store, calls = Store(tmp_path / "s"), []

    def execute(n, inputs, out):
        calls.append(n.config["name"])
        write(n, inputs, out)

    child = node("child", parent=node("parent"))
    first = store.materialize(child, execute)
    assert store.materialize(child, execute) == first
    assert calls == ["parent", "child"]
    assert store.status(child) == "cached"


def test_a_cached_child_needs_no_parent(tmp_path):
    store = Store(tmp_path / "s")
    child = node("child", parent=node("parent"))
    store.materialize(child, write)
    for path in sorted(store.path(child.inputs["parent"]).iterdir()):
        path.unlink()
    store.path(child.inputs["parent"]).rmdir()
    assert Store(tmp_path / "s").materialize(child, None).exists()


def test_a_store_that_another_process_is_just_making_is_no_stranger(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "store.json.99.tmp").write_text("")
    Store(tmp_path / "s")


@pytest.mark.parametrize("damage", ["change", "remove", "manifest"])
def test_a_damaged_artifact_is_named_and_rebuilt_never_used(tmp_path, damage, caplog):
    Store(tmp_path / "s").materialize(node(), write)
    store = Store(tmp_path / "s")
    path = store.path(node())
    if damage == "change":
        (path / "value.json").write_text("{}")
    elif damage == "remove":
        (path / "value.json").unlink()
    else:
        (path / "artifact.json").write_text("{")
    with pytest.raises(DamagedArtifactError, match="value.json|artifact.json"):
        store.verify(node())
    store.materialize(node(), write)
    assert json.loads((path / "value.json").read_text())["name"] == "a"
    assert "damaged" in caplog.text


def test_another_format_is_refused(tmp_path):
    Store(tmp_path / "s")
    write_json(tmp_path / "s" / "store.json", {"format": 99})
    with pytest.raises(StoreError, match="format 99"):
        Store(tmp_path / "s")


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(StoreError, match="no store"):
        Store(tmp_path)
    for no_folder in (tmp_path / "mine.txt", tmp_path / "mine.txt" / "below"):
        with pytest.raises(StoreError, match=r"mine\.txt.* cannot be a store .* give another store=DIR"):
            Store(no_folder)


def test_roots_are_located_only_when_needed(tmp_path):
    store = Store(tmp_path / "s")
    file = tmp_path / "data"
    file.write_text("x")
    located = []
    root = Root("data", "k1", lambda: located.append(1) or file)
    child = node("child", data=root)
    assert child.key != node("child", data=Root("data", "k2", lambda: file)).key
    assert not located
    store.materialize(child, write)
    assert located == [1]


def test_only_what_is_asked_for_is_checked(tmp_path):
    def both(n, inputs, out):
        write_json(out / "summary.json", 1)
        (out / "weights.bin").write_bytes(b"12345678")

    path = Store(tmp_path / "s").materialize(node(), both)
    (path / "weights.bin").write_bytes(b"1234")
    store = Store(tmp_path / "s")
    assert store.verify(node(), ".json") == path
    with pytest.raises(DamagedArtifactError, match="weights.bin"):
        store.verify(node())
