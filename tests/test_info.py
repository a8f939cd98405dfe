"""What `data.info` shows: a sheet on which one sees what is there, and text that any terminal takes."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, arrays
from PIL import Image

from data import info, store


def write(folder, n=8, **modalities):
    """A prepared folder: items 0 to n - 3 train, the last two test; two classes in turn."""
    return store.write(folder, modalities, np.arange(n) % 2, {"official": [0] * (n - 2) + [2] * 2}, ["a", "стол"],
                       [f"item {i}" for i in range(n)])


def sheet(folder, *flags):
    info.main([str(folder), "--sheet", str(folder.parent / "sheet.png"), *flags])
    with Image.open(folder.parent / "sheet.png") as picture:
        return np.asarray(picture).astype(int)


def modality(kind, array):
    return store.modality(kind, array)


def test_one_loud_spot_does_not_make_a_spectrogram_black():
    features = np.random.default_rng(0).uniform(0, 1, (1, 1, 40, 60)).astype(np.float16)
    features[0, 0, 0, 0] = 5000
    (picture,), = info.tiles(modality("spectrogram", features), [0])
    assert 100 < picture.float().mean() < 155


def test_noise_in_flow_does_not_look_like_motion():
    moves, rests = np.full((2, 3, 2, 64, 64), 127, np.uint8)
    moves[:, 0] += 40                                                               # to the right
    rests += np.random.default_rng(0).integers(0, 2, rests.shape, dtype=np.uint8)   # 127 or 128: rounding alone
    still = moves * 0 + 127
    for flow in ([moves, rests], [still, rests]):       # also where nothing else moves
        first, second = info.tiles(modality("flow", np.stack(flow)), [0, 1])
        assert all((picture > 230).all() for picture in second)
        assert (torch.stack(first).amin() < 60) == (flow[0] is moves)
    turned = info.tiles(modality("flow", np.stack([moves, 255 - moves])), [0, 1])
    assert (turned[0][0].float() - turned[1][0].float()).abs().mean() > 50          # left is another colour


def test_both_parts_are_shown_and_said(tmp_path, monkeypatch):
    folder = write(tmp_path / "mine", n=50, x={"kind": "view", "array": np.zeros((50, 1, 1, 8, 8), np.uint8)})
    _, _, _, splits, ids, _ = store.read(folder)
    assert (splits["official"][info.choose(splits, 8)] == 2).sum() == 2 and len(info.choose(splits, 8)) == 6
    written = []
    monkeypatch.setattr(info, "writer", lambda size: lambda draw, x, y, text: written.append(text))
    sheet(folder)
    assert written[0] == "x" and written[-1] == "стол, test: item 49" and written[1].split()[1] == "train:"


def test_text_of_any_alphabet_is_no_box(tmp_path):
    drawn = {}

    class Paper:
        def text(self, place, text, **options):
            drawn["text"] = text
    write_text = info.writer(12)
    write_text(Paper(), 0, 0, "Größe стол 模型")
    assert drawn["text"] == "Größe стол \\u6a21\\u578b"
    folder = write(tmp_path / "mine", x={"kind": "view", "array": np.full((8, 1, 1, 8, 8), 255, np.uint8)})
    lines = [sheet(folder)[info.LINE + i * (info.TILE + info.LINE) + info.TILE:][:info.LINE] for i in range(2)]
    assert all((line < 128).sum() > 100 for line in lines)


def test_a_long_id_does_not_hide_the_class(tmp_path):
    spec = arrays()
    spec["ids"] = ["i" * 300 + str(i) for i in range(48)]
    before = sheet(store.write(tmp_path / "short", **arrays()))
    after = sheet(store.write(tmp_path / "long", **spec))
    line = slice(info.LINE + info.TILE, 2 * info.LINE + info.TILE)
    np.testing.assert_array_equal(before[line, :90], after[line, :90])      # "class 0, train:"


@pytest.mark.parametrize("name,made", [("x", "x.png"), ("x.png", "x.png"), ("x.jpg", None)])
def test_the_sheet_is_a_png_whatever_it_is_called(name, made, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) if not made else open(os.devnull):
        info.main([tiny, "--sheet", str(tmp_path / name)])
    if made:
        with Image.open(tmp_path / made) as picture:
            assert picture.format == "PNG"
    else:
        error = capsys.readouterr().err
        assert "the contact sheet is a PNG, call it x.png" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("module", ["info", "verify"])
@pytest.mark.parametrize("locale", ["C", "en_US.ISO-8859-1"])
def test_any_terminal_takes_what_is_printed(module, locale, tmp_path):
    spec = arrays(n_classes=2)
    spec["classes"], spec["ids"][0] = ["Größe", "模型"], "стол"
    folder = store.write(tmp_path / "Größe 模", **spec)
    environment = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONIOENCODING", None)
    if locale != "C":        # where this machine has no such locale the stream's encoding is set as it would be
        environment["PYTHONIOENCODING"] = "iso-8859-1"
    done = subprocess.run([sys.executable, "-m", f"data.{module}", str(folder)], env=environment, cwd=tmp_path,
                          capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    if module == "info":
        assert rb"\u6a21\u578b" in done.stdout and len(list(tmp_path.glob("*-contact-sheet.png"))) == 1
