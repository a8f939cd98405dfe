"""The prepared folder: what `store.write` refuses, what comes back, damage in one line."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from conftest import arrays

from data import DataError, open_dataset, store


def test_write_and_open_again(tmp_path):
    spec = arrays()
    spec["modalities"]["image"].update(size=(np.int64(6), 4), scale=np.array([0.5, 1]), flip=False,
                                       frame=np.full((48, 2), 30))
    spec["modalities"]["audio"].update(mean=np.float32(0.5))
    folder = store.write(tmp_path / "mine", **spec, groups=np.arange(48),
                         notes={"source": tmp_path, "n": np.int64(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    ds = open_dataset(folder)
    assert ds.name == "mine" and ds.in_channels == {"audio": 1, "image": 3}
    for name, mod in ds.modalities.items():
        np.testing.assert_array_equal(mod.array, spec["modalities"][name]["array"])
        assert isinstance(mod.array, np.memmap)
    image = ds.modalities["image"]
    assert (image.kind, image.size, image.scale, image.flip) == ("rgb", (6, 4), (0.5, 1), False)
    assert ds.modalities["audio"].mean == 0.5
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["splits"] == {"official": {"train": 36, "val": 0, "test": 12}}
    assert (meta["source"], meta["n"]) == (str(tmp_path), 3)
    sums = [f"{store.sha256(path)}  {path.name}" for path in folder.iterdir()       # sha256sum's
            if path.name != "SHA256SUMS"]
    assert sorted(sums) == sorted((folder / "SHA256SUMS").read_text().splitlines())
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for there in (folder, tmp_path / "gone"):
        with pytest.raises(DataError, match="exists already"):
            store.write(there, **spec)


@pytest.mark.parametrize("change,message", [
    (lambda a: a["labels"].__setitem__(0, 9), "labels must be whole numbers 0 .. 2"),
    (lambda a: a["ids"].__setitem__(0, "item 1"), "ids: 'item 1' comes more than once"),
    (lambda a: a["splits"].update(odd=np.full(48, 7)), "split 'odd' must hold"),
    (lambda a: a["splits"].update(odd=np.zeros(48, int)), "split 'odd' has no test items"),
    # the order of a set is chance
    (lambda a: a.update(classes=set(a["classes"])), "classes: a list is needed"),
    (lambda a: a.update(splits=[a["splits"]]), "splits: a dict of names is needed"),
    (lambda a: a["modalities"].update(
        flow=dict(kind="flow", array=np.full((48, 1, 2, 8, 8), 9, np.uint8), flip=False)),
     "give them one scale and one flip"),
    *((lambda a, name=name: a["modalities"].update({name: a["modalities"]["audio"]}), message)
      for name, message in (("../x", "use a to z, 0 to 9"), ("fusion", "means something else"),
                            ("forward", "means something else"))),
    *((lambda a, m=m, changed=changed: a["modalities"][m].update(changed), message)
      for m, changed, message in (
          ("audio", {"kind": "rgb"}, "modality 'audio': kind 'rgb' is stored as uint8"),
          ("image", {"array": np.full((48, 1, 2, 8, 8), 9, np.uint8)}, "cannot have 2 channels"),
          ("image", {"array": np.ones((48, 1, 3, 8, 8), np.uint8)}, "has no value beyond 1"),
          ("audio", {"array": np.zeros((7, 1, 8, 8), np.float16)}, "has 7 items"),
          ("audio", {"array": np.full((48, 1, 8, 8), np.nan, np.float16)}, "not finite"),
          ("audio", {"std": 0}, "std above 0"), ("audio", {"mean": [0.1, 0.2]}, "'audio': "),
          ("image", {"size": (8.5, 8)}, "not a height and a width"),
          ("image", {"flip": "no"}, "flip is 'no', not a bool"),
          ("audio", {"kind": "audio", "array": np.zeros((48, 511), np.int16)}, "shorter than"))),
])
def test_write_refuses_what_training_cannot_take(tmp_path, change, message):
    spec = arrays()
    change(spec)
    with pytest.raises(DataError) as error:
        store.write(tmp_path / "bad", **spec)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name,change,message", [
    ("meta.json", lambda b: b[:20], "JSONDecodeError"),
    ("meta.json", lambda b: b.replace(b'"class 2"', b'"class 2", "odd", "odd"'), "classes: 'odd'"),
    ("ids.txt", lambda b: b.replace(b"item 1\n", b"item x\n"), "ids.txt has changed"),
    ("label.npy", lambda b: b[:-8] + bytes(8), "label.npy has changed"),
    ("audio.npy", lambda b: b[:-8], "audio.npy cannot be read"),
    ("audio.npy", lambda _: pickle.dumps(["never read"]), "audio.npy cannot be read")])
def test_damage_is_one_clear_line(name, change, message, tiny):
    path = Path(tiny, name)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError) as error:
        open_dataset(tiny, val=0)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert tiny in str(error.value)
