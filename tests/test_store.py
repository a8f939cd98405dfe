"""The prepared folder: what `store.write` refuses, what comes back, damage in one line."""

import json
import pickle
import shutil
import subprocess

import numpy as np
import pytest
from conftest import arrays

from data import DataError, open_dataset, store


def write(folder):
    """A prepared folder with every kind of file: groups and frames too."""
    spec = arrays(n=8, n_classes=2, size=8)
    spec["modalities"]["image"]["frame"] = np.full((8, 2), 30)
    return store.write(folder, **spec, groups=np.arange(8) // 2)


def test_write_and_open_again(tmp_path):
    spec = arrays()
    spec["modalities"]["image"].update(size=(np.int64(6), 4), scale=np.array([0.5, 1]), flip=False)
    spec["modalities"]["audio"].update(mean=np.float32(0.5))
    folder = store.write(tmp_path / "mine", **spec, groups=np.arange(48))
    by_path, by_name = open_dataset(folder), open_dataset("mine", root=tmp_path)
    assert by_path.name == by_name.name == "mine" and by_path.fingerprint == by_name.fingerprint
    for name, mod in by_path.modalities.items():
        np.testing.assert_array_equal(mod.array, spec["modalities"][name]["array"])
        assert isinstance(mod.array, np.memmap)
    image = by_path.modalities["image"]
    assert (image.size, image.scale, image.flip) == ((6, 4), (0.5, 1), False)
    assert by_path.modalities["audio"].mean == 0.5
    assert by_path.in_channels == {"audio": 1, "image": 3}
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["splits"] == {"official": {"train": 36, "val": 0, "test": 12}}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(DataError, match="exists already"):
        store.write(folder, **spec)


@pytest.mark.parametrize("change,message", [
    (lambda a: a["labels"].__setitem__(0, 9), "labels must be whole numbers 0 .. 2"),
    (lambda a: a["ids"].__setitem__(0, "item 1"), "ids: 'item 1' comes more than once"),
    (lambda a: a["splits"].update(odd=np.full(48, 7)), "split 'odd' must hold"),
    (lambda a: a["splits"].update(odd=np.zeros(48, int)), "split 'odd' has no test items"),
    # the order of a set is chance
    (lambda a: a.update(classes=set(a["classes"])), "classes: a list is needed"),
    (lambda a: a["modalities"].update({"../x": a["modalities"]["audio"]}), "use a to z, 0 to 9"),
    *((lambda a, name=name: a["modalities"].update({name: a["modalities"]["audio"]}),
       "means something else in the scripts: choose another")
      for name in ("label", "group", "fused", "fusion", "own", "unweighted", "calibrated", "joint",
                   "shared", "duc", "consistency", "complement", "forward", "train")),
    *((lambda a, m=m, changed=changed: a["modalities"][m].update(changed), message)
      for m, changed, message in (
          ("image", {"size": 8}, "modality 'image': size is 8, not a height and a width"),
          ("audio", {"kind": "rgb"}, "modality 'audio': kind 'rgb' is stored as uint8"),
          ("image", {"scale": (0, 1)}, "not 0 < smallest <= largest <= 1"),
          ("image", {"array": np.full((48, 1, 2, 8, 8), 9, np.uint8)}, "cannot have 2 channels"),
          ("image", {"array": np.ones((48, 1, 3, 8, 8), np.uint8)}, "has no value beyond 1"),
          ("image", {"frame": np.zeros((48, 2))}, "must hold height and width"),
          ("audio", {"array": np.zeros((7, 1, 8, 8), np.float16)}, "has 7 items"),
          ("audio", {"array": np.full((48, 1, 8, 8), np.nan, np.float16)}, "not finite"),
          ("audio", {"std": 0}, "std above 0"),
          ("audio", {"kind": "audio", "array": np.zeros((48, 511), np.int16)},
           "511 samples is shorter than a window of 512"))),
])
def test_write_refuses_what_training_cannot_take(tmp_path, change, message):
    spec = arrays()
    change(spec)
    with pytest.raises(DataError) as error:
        store.write(tmp_path / "bad", **spec)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def edited(change):
    """A change of meta.json's bytes: `change` of its dict."""
    def bytes_of(whole):
        meta = json.loads(whole)
        change(meta)
        return json.dumps(meta).encode()
    return bytes_of


@pytest.mark.parametrize("name,change,message", [
    ("meta.json", None, "it has no meta.json"), ("meta.json", lambda b: b[:20], "JSONDecodeError"),
    ("meta.json", edited(lambda m: m.pop("sha256")), "KeyError: 'sha256'"),
    ("meta.json", edited(lambda m: m["classes"].pop()), "labels must be whole numbers 0 .. 0"),
    ("ids.txt", lambda b: b[:9], "there are 2 ids"), ("audio.npy", None, "audio.npy"),
    ("audio.npy", lambda b: b[:-8], "audio.npy cannot be read"),
    ("label.npy", lambda _: pickle.dumps(["never read"]), "label.npy cannot be read"),
    ("split.official.npy", lambda b: b[:-1] + b"\x07", "must hold 0")])
def test_damage_is_one_clear_line(name, change, message, tmp_path):
    folder = write(tmp_path / "mine")
    path = folder / name
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    with pytest.raises(DataError) as error:
        open_dataset(folder, val=0)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_the_sums_say_which_file_is_damaged(tmp_path):
    folder, sums = write(tmp_path / "mine"), ["sha256sum", "-c", "--quiet", "SHA256SUMS"]
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum here")
    assert subprocess.run(sums, cwd=folder).returncode == 0
    image = folder / "image.npy"
    image.write_bytes(image.read_bytes()[:-1] + b"\x07")
    done = subprocess.run(sums, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.startswith("image.npy: FAILED")


def test_an_older_folder_of_views_behind_a_link_is_read_as_rgb(tmp_path):
    folder, link = write(tmp_path / "mine"), tmp_path / "link"
    meta = folder / "meta.json"
    older = edited(lambda m: m["modalities"]["image"].update(kind="view"))
    meta.write_bytes(older(meta.read_bytes()))
    link.symlink_to(folder)
    ds = open_dataset(link)
    assert ds.name == "link" and ds.modalities["image"].kind == "rgb"
    assert ds.fingerprint == open_dataset(folder).fingerprint
