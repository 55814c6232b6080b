"""The cache of converted graphs: a changed rank finds the same graph, and a damaged entry is never used."""

from __future__ import annotations

from pathlib import Path

import surgeon
from surgeon.exporters import cache
from surgeon.runtime.files import hash_file


def _spec(rank: int) -> dict[str, object]:
    return {"surgery": [{"lora": {"rank": rank}}], "tasks": {"a": {"labels": 2}}}


def test_another_rank_reuses_the_graph_and_a_damaged_entry_is_made_anew(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path / "cache"))
    converted: list[Path] = []
    export = cache.OnnxExporter.export

    def counted(self, program, folder, **wanted):
        converted.append(folder)
        return export(self, program, folder, **wanted)

    monkeypatch.setattr(cache.OnnxExporter, "export", counted)
    model = tiny("bert", num_hidden_layers=1)
    builds = [surgeon.compile(_spec(rank), model).save(tmp_path / f"rank{rank}") for rank in (2, 4)]
    assert len(converted) == 1
    assert len({hash_file(build / "model.onnx.data") for build in builds}) == 1
    entry = next(path for path in (tmp_path / "cache").iterdir())
    with (entry / "model.onnx.data").open("r+b") as file:
        file.write(b"damage")
    again = surgeon.compile(_spec(8), model).save(tmp_path / "rank8")
    assert len(converted) == 2
    with surgeon.Session(again) as session:
        session.run({"input_ids": [[5, 6, 7]]}, "a")
    assert hash_file(again / "model.onnx.data") == hash_file(builds[1] / "model.onnx.data")
