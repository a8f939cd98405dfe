"""ModelNet40's views: which two pictures are opposite sides must be known, not guessed."""

import numpy as np
import pytest
import raw
from conftest import REAL
from PIL import Image

from data import DataError, modelnet40, prepare, store


def views(root, numbers=range(1, 13), name="bed_0001", part="train", style="shaded"):
    """An object whose view v is a picture of grey 10 v."""
    for number in numbers:
        path = root / f"bed/{part}/{name}.obj.{style}_v{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * number).save(path)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("alone", [False, True])
def test_the_first_and_the_seventh_of_twelve_are_taken(first, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(modelnet40, "EXPECTED", {})
    numbers = (first, first + 6) if alone else range(first, first + 12)
    views(tmp_path / "raw", numbers)
    views(tmp_path / "raw", numbers, "bed_0002", "test")
    (tmp_path / "raw/bed/train/._bed_0001.obj.shaded_v013.png").write_bytes(b"AppleDouble")
    folder = prepare.prepare("modelnet40", tmp_path / "raw", tmp_path / "out", workers=1)
    meta, modalities, *_ = store.read(folder)
    grey = {name: mod.array.mean((1, 2, 3, 4)).tolist() for name, mod in modalities.items()}
    assert grey == {"view1": [10.0 * first] * 2, "view7": [10.0 * (first + 6)] * 2}
    said = "taken as the first and the seventh of 12" in " ".join(meta["notes"])
    assert said == alone


@pytest.mark.parametrize("make,message", [
    (lambda r: views(r, range(20)), "has views 0 to 19, not 0 to 11: only of 12"),
    (lambda r: views(r, range(1, 25)), "has views 1 to 24, not 1 to 12"),
    (lambda r: (views(r), views(r, range(1, 21), "b2")), "bed/train/b2 has views 1 to 20"),
    (lambda r: (views(r), views(r, range(12), "b2")), "bed_0001 has views 1 to 12, not 0 to 11"),
    (lambda r: (views(r), views(r, style="whiteshaded")), "are the same of one object"),
    (lambda r: (views(r), raw.off(r / "bed/train/bed_0002.off")),
     "holds 1 meshes and the rendered views of 1 objects"),
    (lambda r: (raw.off(r / "bed/train/a.off"), raw.off(r / "bed/train/a.OFF")),
     "are the same of one object"),
])
def test_views_and_meshes_that_may_mean_two_things_are_refused(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        modelnet40.index(tmp_path, {})


def test_a_view_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(modelnet40, "EXPECTED", {})
    for name, part in (("bed_0001", "train"), ("bed_0002", "train"), ("bed_0003", "test")):
        views(tmp_path / "raw", name=name, part=part)
    lacking = tmp_path / "raw/bed/train/bed_0001.obj.shaded_v003.png"
    lacking.unlink()
    with pytest.raises(DataError, match=f"1 files of modelnet40 are missing, the first: {lacking}"):
        prepare.prepare("modelnet40", tmp_path / "raw", tmp_path / "out", workers=1)
    folder = prepare.prepare("modelnet40", tmp_path / "raw", tmp_path / "out", workers=1,
                             skip_bad=True)
    assert f"bed_0001: {lacking}: is missing" in capsys.readouterr().err
    assert store.read_meta(folder)["splits"]["official"] == {"train": 1, "val": 0, "test": 1}


@pytest.mark.skipif(not REAL.is_dir(), reason="the real samples are not here")
def test_the_real_views(tmp_path):
    index = modelnet40.index(REAL / "modelnet40/shaded_png", {})
    arrays = [modelnet40.decode(item, {})[0] for item in index.items]
    assert len(arrays) == 4 and all(list(pair) == ["view1", "view7"] for pair in arrays)
    assert all(np.abs(pair["view1"].astype(int) - pair["view7"]).mean() > 1 for pair in arrays)


def test_a_download_that_was_unpacked_one_folder_deeper_is_found(tmp_path):
    for place in ("bed", "ModelNet40/bed", "ModelNet40/ModelNet40/bed"):
        raw.off(tmp_path / place / "train/bed_0001.off")
        raw.off(tmp_path / "__MACOSX" / place / "train/._bed_0001.off")
        item, = modelnet40.index(tmp_path, {}).items
        assert item.id == "bed/train/bed_0001"
        (tmp_path / place / "train/bed_0001.off").unlink()
