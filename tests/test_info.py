"""What `data.info` shows: a sheet on which one sees what is there, text that any terminal takes."""

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PLAIN, ROOT, arrays
from PIL import Image

from data import info, store


def write(folder, n=8, **modalities):
    """A prepared folder: items 0 to n - 3 train, the last two test; two classes in turn."""
    return store.write(folder, modalities, np.arange(n) % 2, {"official": [0] * (n - 2) + [2] * 2},
                       ["a", "стол"], [f"item {i}" for i in range(n)])


def sheet(folder, *flags):
    info.main([str(folder), "--sheet", str(folder.parent / "sheet.png"), *flags])
    with Image.open(folder.parent / "sheet.png") as picture:
        return np.asarray(picture).astype(int)


def test_one_loud_spot_does_not_make_a_spectrogram_black():
    features = np.random.default_rng(0).uniform(0, 1, (1, 1, 40, 60)).astype(np.float16)
    features[0, 0, 0, 0] = 5000
    (picture,), = info.tiles(store.modality("spectrogram", features), [0])
    assert 100 < picture.float().mean() < 155


def test_noise_in_flow_does_not_look_like_motion():
    moves, rests = np.full((2, 3, 2, 64, 64), 127, np.uint8)
    moves[:, 0] += 40                                                   # to the right
    rests += np.random.default_rng(0).integers(0, 2, rests.shape, dtype=np.uint8)   # rounding alone
    still = moves * 0 + 127
    for flow in ([moves, rests], [still, rests]):       # also where nothing else moves
        first, second = info.tiles(store.modality("flow", np.stack(flow)), [0, 1])
        assert all((picture > 230).all() for picture in second)
        assert (torch.stack(first).amin() < 60) == (flow[0] is moves)
    turned = info.tiles(store.modality("flow", np.stack([moves, 255 - moves])), [0, 1])
    right, left = (pictures[0].float() for pictures in turned)
    assert (right - left).abs().mean() > 50


def test_both_parts_are_shown_and_said(tmp_path, monkeypatch):
    array = np.zeros((50, 1, 1, 8, 8), np.uint8)
    folder = write(tmp_path / "mine", n=50, x={"kind": "view", "array": array})
    _, _, _, splits, ids, _ = store.read(folder)
    assert splits["official"][info.choose(splits, 8)].tolist() == [0] * 4 + [2] * 2
    written = []
    monkeypatch.setattr(info, "writer", lambda size: lambda draw, x, y, text: written.append(text))
    sheet(folder)
    assert written[0] == "x" and written[-1] == "стол, test: item 49"
    assert written[1].split()[1] == "train:"


def test_text_of_any_alphabet_is_no_box(tmp_path):
    drawn = {}

    class Paper:
        def text(self, place, text, **options):
            drawn["text"] = text
    write_text = info.writer(12)
    write_text(Paper(), 0, 0, "Größe стол 模型")
    assert drawn["text"] == "Größe стол \\u6a21\\u578b"
    white = np.full((8, 1, 1, 8, 8), 255, np.uint8)
    drawn = sheet(write(tmp_path / "mine", x={"kind": "view", "array": white}))
    for row in range(2):
        line = drawn[(row + 1) * (info.LINE + info.TILE):][:info.LINE]
        assert (line < 128).sum() > 100


def test_a_long_id_does_not_hide_the_class(tmp_path):
    spec = arrays()
    spec["ids"] = ["i" * 300 + str(i) for i in range(48)]
    before = sheet(store.write(tmp_path / "short", **arrays()))
    after = sheet(store.write(tmp_path / "long", **spec))
    line = slice(info.LINE + info.TILE, 2 * info.LINE + info.TILE)
    np.testing.assert_array_equal(before[line, :90], after[line, :90])      # "class 0, train:"


@pytest.mark.parametrize("name,made", [("x", "x.png"), ("x.png", "x.png"), ("x.jpg", None)])
def test_the_sheet_is_a_png_whatever_it_is_called(name, made, tiny, tmp_path, capsys):
    with contextlib.nullcontext() if made else pytest.raises(SystemExit):
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
    environment = {**os.environ, **PLAIN, "LC_ALL": locale, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONIOENCODING", None)
    if locale != "C":       # a machine may lack that locale
        environment["PYTHONIOENCODING"] = "iso-8859-1"
    done = subprocess.run([sys.executable, "-m", f"data.{module}", str(folder)], env=environment,
                          cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    if module == "info":
        assert rb"\u6a21\u578b" in done.stdout
        assert len(list(tmp_path.glob("*-contact-sheet.png"))) == 1
