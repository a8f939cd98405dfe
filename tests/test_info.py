"""What `data.info` shows: a sheet on which one sees what is there."""

import numpy as np
from conftest import arrays
from PIL import Image

from data import info, store


def test_pictures_are_shown_as_they_are_stored():
    flow = np.full((1, 3, 2, 4, 4), 127, np.uint8)
    flow[0, :, 0] = 200                                                 # to the right: red
    assert info.picture(store.modality("flow", flow), 0)[0, 0].tolist() == [200, 127, 127]
    grey = np.arange(32, dtype=np.uint8).reshape(1, 2, 1, 4, 4)
    side_by_side = np.concatenate(grey[0, :, 0], 1)[..., None].repeat(3, 2)
    np.testing.assert_array_equal(info.picture(store.modality("rgb", grey), 0), side_by_side)


def test_a_sheet_of_every_kind(tmp_path, monkeypatch):
    spec, rng = arrays(n_classes=2), np.random.default_rng(0)
    shapes = {"sound": ("audio", (600,)), "flow": ("flow", (10, 2, 8, 8)),
              "skeleton": ("spectrogram", (3, 20, 64))}
    for name, (kind, shape) in shapes.items():
        array = rng.integers(0, 255, (48, *shape)).astype(store.KINDS[kind][0])
        spec["modalities"][name] = {"kind": kind, "array": array}
    spec["classes"], spec["ids"][0] = ["Größe", "模型 $x"], "стол" * 99
    folder = store.write(tmp_path / "Größe 1.5", **spec)
    monkeypatch.chdir(tmp_path)
    info.main([str(folder)])
    with Image.open(tmp_path / "Größe 1.5-contact-sheet.png") as sheet:
        assert sheet.format == "PNG" and sheet.size == (2000, 1440)
        assert len(sheet.getcolors(99_999)) > 50
