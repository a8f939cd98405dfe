"""What `data.info` shows: a sheet on which one sees what is there."""

import numpy as np
from conftest import arrays
from PIL import Image

from data import info, store


def test_a_sheet_of_every_kind(tmp_path, monkeypatch):
    spec, rng = arrays(n_classes=2), np.random.default_rng(0)
    for kind, shape in (("audio", (600,)), ("flow", (10, 2, 8, 8))):
        array = rng.integers(0, 255, (48, *shape)).astype(store.KINDS[kind][0])
        spec["modalities"][f"{kind}2"] = {"kind": kind, "array": array}
    spec["classes"], spec["ids"][0] = ["Größe", "$x"], "стол" * 99
    folder = store.write(tmp_path / "Größe 1.5", **spec)
    monkeypatch.chdir(tmp_path)
    info.main([str(folder)])
    with Image.open(tmp_path / "Größe 1.5-contact-sheet.png") as sheet:
        assert sheet.format == "PNG" and sheet.size == (1600, 1440)
        assert len(sheet.getcolors(99_999)) > 50
