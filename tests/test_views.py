"""ModelNet40's views: which two pictures are opposite sides must be known, not guessed."""

import numpy as np
import pytest
import raw
from conftest import REAL, prepared, real

from data import modelnet40, store


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("alone", [False, True])
def test_the_first_and_the_seventh_of_twelve_are_taken(first, alone, tmp_path, expect):
    expect(modelnet40)
    numbers = (first, first + 6) if alone else range(first, first + 12)
    raw.views(tmp_path / "raw", numbers)
    raw.views(tmp_path / "raw", numbers, "bed_0002", "test")
    (tmp_path / "raw/bed/train/._bed_0001.obj.shaded_v013.png").write_bytes(b"AppleDouble")
    meta, modalities, *_ = store.read(prepared("modelnet40", tmp_path))
    grey = {name: mod.array.mean((1, 2, 3, 4)).tolist() for name, mod in modalities.items()}
    assert grey == {"view1": [10.0 * first] * 2, "view7": [10.0 * (first + 6)] * 2}
    said = "taken as the first and the seventh of 12" in " ".join(meta["notes"])
    assert said == alone


def test_a_view_that_is_missing_is_named(tmp_path, expect, capsys):
    expect(modelnet40)
    for name, part in (("bed_0001", "train"), ("bed_0002", "train"), ("bed_0003", "test")):
        raw.views(tmp_path / "raw", name=name, part=part)
    lacking = tmp_path / "raw/bed/train/bed_0001.obj.shaded_v003.png"
    lacking.unlink()
    prepared("modelnet40", tmp_path, code=2)
    error = capsys.readouterr().err
    assert f"1 files of modelnet40 are missing, the first: {lacking}" in error
    folder = prepared("modelnet40", tmp_path, "--skip-bad")
    assert f"bed_0001: {lacking}: is missing" in capsys.readouterr().err
    assert store.read_meta(folder)["splits"]["official"] == {"train": 1, "val": 0, "test": 1}


@real
def test_the_real_views():
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
