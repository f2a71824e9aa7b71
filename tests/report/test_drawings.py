"""A figure is drawn again when what it shows has changed, and only then."""

from __future__ import annotations

from pathlib import Path

from pmpd.report.drawings import Drawings


def test_only_what_changed_or_is_gone_is_drawn(tmp_path):
    drawn: list[str] = []

    def curve(rows: list[float], path: Path) -> None:
        drawn.append(path.name)
        for suffix in (".png", ".pdf"):
            path.with_suffix(suffix).write_text(str(rows))

    def report(first: list[float], second: list[float]) -> list[str]:
        drawn.clear()
        drawings = Drawings(tmp_path)
        drawings.add(curve, first, name="one.png")
        drawings.add(curve, second, name="two.png")
        drawings.draw()
        assert [p.name for p in drawings.paths] == ["one.png", "two.png"]
        return list(drawn)

    assert report([1.0], [2.0]) == ["one.png", "two.png"]
    assert report([1.0], [2.0]) == []
    assert report([1.0], [2.5]) == ["two.png"]
    (tmp_path / "one.pdf").unlink()
    assert report([1.0], [2.5]) == ["one.png"]
    (tmp_path / "mine.png").write_text("a user's own")
    Drawings(tmp_path).draw()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures.json", "mine.png"]
    assert report([1.0], [2.5]) == ["one.png", "two.png"]
    (tmp_path / "figures.json").write_text("{")
    assert report([1.0], [2.5]) == ["one.png", "two.png"]
