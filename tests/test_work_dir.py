"""Work that was interrupted goes on: factors in a work directory, calibrations in a file."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import monarch_fx as mfx
from monarch_fx import factors
from monarch_fx.errors import ConfigError

CONFIG = mfx.MonarchConfig(nblocks=2, rank=4)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Sizes of the weights that were projected."""
    sizes: list[tuple[int, ...]] = []
    project = factors._project

    def counted(dense: torch.Tensor, *args: Any) -> mfx.Monarch:
        sizes.append(tuple(dense.shape))
        return project(dense, *args)

    monkeypatch.setattr(factors, "_project", counted)
    return sizes


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_interrupted_work_goes_on(
    tmp_path: Path, projected: list[tuple[int, ...]], calibrated: bool, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(100, 32)
    options: dict[str, Any] = {"example_inputs": x, "config": CONFIG, "calibration": [x] if calibrated else None}
    wanted = mfx.monarchify(model(), **options).state_dict()
    report = mfx.report(mfx.monarchify(model(), **options))
    projected.clear()
    with monkeypatch.context() as patch:
        patch.setattr(factors.os, "replace", interrupted_the_second_time())
        with pytest.raises(KeyboardInterrupt):
            mfx.monarchify(model(), inplace=inplace, work_dir=tmp_path / "new" / "work", **options)
    assert projected == [(48, 32), (32, 48)]
    again = mfx.monarchify(model(), inplace=inplace, work_dir=tmp_path / "new" / "work", **options)
    assert projected == [(48, 32), (32, 48), (32, 48)]  # the second was not kept
    torch.testing.assert_close(again.state_dict(), wanted, rtol=0, atol=0)
    assert mfx.report(again).errors == report.errors
    assert mfx.report(again).losses == report.losses
    mfx.monarchify(model(), work_dir=tmp_path / "new" / "work", **options)
    assert len(projected) == 3


def interrupted_the_second_time() -> Any:
    replace, calls = factors.os.replace, []

    def maybe(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*args)

    return maybe


def test_factors_of_something_else_are_made_anew(tmp_path: Path, projected: list[tuple[int, ...]]) -> None:
    x = torch.randn(100, 32)
    options: dict[str, Any] = {"example_inputs": x, "work_dir": tmp_path}
    mfx.monarchify(model(), config=CONFIG, **options)
    assert len(projected) == 2
    mfx.monarchify(model(), config=mfx.MonarchConfig(nblocks=2, rank=5), **options)
    assert len(projected) == 4
    mfx.monarchify(model(), config=mfx.MonarchConfig(nblocks=2, rank=5), calibration=[x], **options)
    assert len(projected) == 6
    changed = model()
    with torch.no_grad():
        changed[0].weight[0, 0] += 1
    mfx.monarchify(changed, config=mfx.MonarchConfig(nblocks=2, rank=5), calibration=[x], **options)
    assert len(projected) == 8  # the second layer sees other inputs
    (tmp_path / "0.weight.safetensors").write_bytes(b"torn")
    mfx.monarchify(changed, config=mfx.MonarchConfig(nblocks=2, rank=5), calibration=[x], **options)
    assert projected[8:] == [(48, 32)]


def test_a_calibration_is_saved(tmp_path: Path) -> None:
    x, file = torch.randn(100, 32), tmp_path / "seen.safetensors"
    calibration = mfx.calibrate(model(), [x], example_inputs=x)
    calibration.save(file)
    loaded = mfx.Calibration.load(file)
    assert (loaded.loss, loaded.fingerprint) == (calibration.loss, calibration.fingerprint)
    assert set(loaded.statistics) == set(calibration.statistics)
    for name, seen in calibration.statistics.items():
        assert torch.equal(loaded.statistics[name].inputs, seen.inputs)
        assert seen.gradients is not None
        assert torch.equal(loaded.statistics[name].gradients, seen.gradients)
    made = [mfx.monarchify(model(), example_inputs=x, config=CONFIG, calibration=c) for c in (calibration, loaded)]
    torch.testing.assert_close(made[0].state_dict(), made[1].state_dict(), rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == [file]


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    """They are refused before anything is computed."""
    options: dict[str, Any] = {"example_inputs": torch.randn(3, 32), "config": CONFIG, "calibration": unread()}
    file = tmp_path / "file"
    file.write_text("text")
    for folder in (file, file / "work"):
        with pytest.raises(ConfigError, match="is a file or inside one: give a folder"):
            mfx.monarchify(model(), work_dir=folder, **options)
    if sys.platform == "linux":  # where not even an administrator writes to /proc
        with pytest.raises(ConfigError, match=r"work_dir='/proc' can't be written to .*give a folder"):
            mfx.monarchify(model(), work_dir="/proc", **options)
        with pytest.raises(ConfigError, match=r"work_dir='/proc/work' can't be made .*give another folder"):
            mfx.monarchify(model(), work_dir="/proc/work", **options)


def unread() -> Iterator[torch.Tensor]:
    raise AssertionError
    yield


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "0.weight.safetensors").mkdir()
    dense, x = model(), torch.randn(3, 32)
    with pytest.raises(ConfigError, match=r"0\.weight\.safetensors' can't be written"):
        mfx.monarchify(dense, example_inputs=x, config=CONFIG, work_dir=tmp_path, inplace=True)
    torch.testing.assert_close(dense(x), model()(x))


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_files_cut_short(tmp_path: Path, projected: list[tuple[int, ...]], kept: int) -> None:
    options: dict[str, Any] = {"example_inputs": torch.randn(3, 32), "config": CONFIG, "work_dir": tmp_path}
    wanted = mfx.monarchify(model(), **options).state_dict()
    file = tmp_path / "0.weight.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    projected.clear()
    torch.testing.assert_close(mfx.monarchify(model(), **options).state_dict(), wanted, rtol=0, atol=0)
    assert projected == [(48, 32)]
    calibration = tmp_path / "seen"
    mfx.calibrate(model(), [torch.randn(9, 32)]).save(calibration)
    calibration.write_bytes(calibration.read_bytes()[:kept])
    with pytest.raises(ConfigError, match=r"seen' is not a calibration .*or not all of one .*monarch_fx\.calibrate"):
        mfx.Calibration.load(calibration)


def test_calibrations_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing' can't be read .*give the file that Calibration\.save"):
        mfx.Calibration.load(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"is a folder: give the file that Calibration\.save"):
        mfx.Calibration.load(tmp_path)
    save_file({"w": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"other' is not a calibration .* it says None"):
        mfx.Calibration.load(tmp_path / "other")
    calibration = mfx.calibrate(model(), [torch.randn(9, 32)])
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "missing" / "seen"):
        with pytest.raises(ConfigError, match=r"can't be written .*give a file in a folder that exists"):
            calibration.save(path)
    assert {path.name for path in tmp_path.iterdir()} == {"other", "folder"}
