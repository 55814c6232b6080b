"""Training a task of a build: whatever stops it, the next call goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

import surgeon
from surgeon.errors import SpecError
from surgeon.train import TrainOptions, builds


def test_a_run_stopped_after_its_outcome_was_packed_does_not_stand_in_the_way(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"base": {"model": str(base_folder)}, "surgery": [{"lora": {}}], "tasks": {"a": {"labels": ["bad", "good"]}}}
    build, data = tmp_path / "build", tmp_path / "data.csv"
    surgeon.compile(spec, out=build)
    data.write_text("text,label\ngood film,good\nbad film,bad\nfine,good\ndull,bad\n", encoding="utf-8")
    options = TrainOptions(epochs=1, batch_size=2)

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builds, "clear_checkpoints", killed)
        with pytest.raises(KeyboardInterrupt):
            builds.train_build(build, {"a": builds.Files(data)}, options=options)
    assert list((build / builds.CHECKPOINTS / "a").iterdir()), "its checkpoint is still there"
    result = builds.train_build(build, {"a": builds.Files(data)}, options=options)
    assert result.resumed_from is None
    assert not (build / builds.CHECKPOINTS).exists()


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path: Path, device: str) -> None:
    with pytest.raises(SpecError, match=f"cannot train on '{device}'"):
        builds.train_build(tmp_path / "no build", {"a": builds.Files(tmp_path / "no data")}, device=device)
