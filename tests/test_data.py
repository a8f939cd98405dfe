"""The data package: the stored format, the splits, and an item's way to the encoder."""

import json
import re

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from conftest import arrays
from scipy import signal

import joint_baseline
from data import DataError, Dataset, batches, carve_val, open_dataset, store, synthetic


@pytest.mark.parametrize("samples,frames", [(48_000, 299), (160_000, 1004), (512, 1)])
def test_log_spectrogram_is_scipys(samples, frames):
    waveform = (np.random.default_rng(0).normal(0, 3000, (2, samples)) + 500).astype(np.int16)
    _, _, power = signal.spectrogram(waveform / 32768, 16_000, nperseg=512, noverlap=353)
    got = batches.log_spectrogram(torch.from_numpy(waveform))
    assert got.shape == (2, 1, 1, 257, frames)
    np.testing.assert_allclose(got[:, 0, 0], np.log(power + 1e-7), atol=1e-4)
    standard = batches.log_spectrogram(torch.from_numpy(waveform), standardize=True)
    assert standard.mean((1, 2, 3, 4)).abs().max() < 1e-5
    assert (standard.flatten(1).std(1, correction=0) - 1).abs().max() < 1e-4
    silence = torch.zeros(1, samples, dtype=torch.int16)
    assert batches.log_spectrogram(silence, standardize=True).isfinite().all()


def test_crop_is_torchvisions_for_each_sample():
    torch.manual_seed(0)
    pictures = torch.randint(0, 256, (3, 3, 60, 80), dtype=torch.uint8)
    boxes = [(10, 20, 30, 40, False), (0, 0, 60, 80, True), (5, 7, 50, 17, True)]
    shares = torch.tensor([[t / 60, x / 80, h / 60, (-w if flip else w) / 80]
                           for t, x, h, w, flip in boxes])
    got = batches.crop(pictures, batches.affine(shares), (48, 40))
    for i, (t, x, h, w, flip) in enumerate(boxes):
        want = TF.resized_crop(pictures[i].float(), t, x, h, w, [48, 40], antialias=False)
        want = TF.horizontal_flip(want) if flip else want
        # at the rim of an enlarged crop ours sees the next pixel, torchvision repeats the last
        torch.testing.assert_close(got[i, :, 2:-2, 2:-2], want[:, 2:-2, 2:-2], rtol=0, atol=0.02)


@pytest.mark.parametrize("height,width,scale", [
    (360, 480, (0.08, 1.0)), (100, 800, (0.6, 1.0)), (256, 256, (0.9, 1.0))])
def test_boxes_are_drawn_as_torchvision_draws_them(height, width, scale):
    n = 4000
    frame = torch.tensor([height, width]).expand(n, 2)
    ours = batches.draw_boxes(frame, scale, torch.Generator().manual_seed(0))
    top, left, h, w = ours.unbind(1)
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    torch.manual_seed(0)
    transform, picture = T.RandomResizedCrop(8, scale), torch.empty(1, height, width)
    drawn = [transform.make_params([picture]) for _ in range(n)]
    theirs = torch.tensor([[d[key] for key in ("top", "left", "height", "width")] for d in drawn],
                          dtype=torch.float64)
    error = (ours.std(0) + theirs.std(0)) / n ** 0.5      # of the difference, about 1.4 of them
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= 3 * error + 1e-9).all()
    assert ((ours.std(0) - theirs.std(0)).abs() <= 0.06 * theirs.std(0) + 1e-9).all()


def dataset(modalities, n=8):
    checked = {name: store.modality(**spec) for name, spec in modalities.items()}
    return Dataset("made", "official", ["a", "b"], checked, np.arange(n) % 2, list("abcdefgh"),
                   None, np.array([0] * (n - 2) + [2, 2]), {}, 0)


def test_crops_and_flips_differ_within_a_batch_and_flow_goes_with_its_rgb():
    column = np.linspace(0, 255, 64).astype(np.uint8)
    rgb = np.broadcast_to(column, (8, 1, 3, 64, 64)).copy()
    flow = np.broadcast_to(column, (8, 2, 2, 64, 64)).copy()
    flow[:, :, 0] = 200                                    # everything moves to the right
    ds = dataset({"flow": {"kind": "flow", "array": flow}, "rgb": {"kind": "rgb", "array": rgb}})
    generator = torch.Generator().manual_seed(1)
    inputs, _, _ = next(iter(ds.batches("train", 6, augment=True, generator=generator)))
    assert inputs["flow"].shape == (6, 2, 2, 64, 64) and inputs["rgb"].shape == (6, 1, 3, 64, 64)
    rising = inputs["rgb"][:, 0, 0, 32, -1] > inputs["rgb"][:, 0, 0, 32, 0]
    assert rising.any() and not rising.all()               # drawn for each sample
    u = inputs["flow"][:, :, 0].mean((1, 2, 3))
    v = inputs["flow"][:, 0, 1, 32] * 255 * batches.FLOW_STD + 127.5
    assert torch.equal(u > 0, rising)                      # u changes its sign with the mirror
    std = torch.tensor(batches.IMAGENET[3][1])[0] * 255
    seen = inputs["rgb"][:, 0, 0, 32] * std + batches.IMAGENET[3][0][0] * 255
    torch.testing.assert_close(v, seen, rtol=0, atol=0.1)  # the same crop
    views = dataset({f"{side}": {"kind": "view", "array": rgb} for side in ("front", "rear")})
    inputs, _, _ = next(iter(views.batches("train", 6, augment=True, generator=generator)))
    assert not torch.equal(inputs["front"], inputs["rear"])


def test_crops_keep_the_proportions_of_the_original_frame():
    rgb = np.zeros((8, 1, 3, 256, 256), dtype=np.uint8)
    frame = np.tile([[100, 400]], (8, 1))
    ds = dataset({"rgb": {"kind": "rgb", "array": rgb, "frame": frame, "scale": (0.05, 0.05)}})
    generator = torch.Generator().manual_seed(0)
    boxes = ds.batches("train", 6, augment=True, generator=generator).boxes["rgb"]
    aspect = (boxes[:, 3].abs() * 400) / (boxes[:, 2] * 100)
    assert ((aspect > 0.7) & (aspect < 1.4)).all()
    assert ds.modalities["rgb"].size == (224, 224)
    inputs, _, _ = next(iter(ds.batches("test", 2)))
    assert inputs["rgb"].shape == (2, 1, 3, 224, 224)


def test_evaluation_sees_every_item_once_in_order_and_training_all_but_an_incomplete_batch():
    ds = open_dataset("synthetic")
    for part in ("val", "test"):
        index = torch.cat([index for _, _, index in ds.batches(part, 48)])
        assert index.tolist() == ds.indices(part).tolist()
    for _, labels, index in ds.batches("test", 48):
        assert labels.tolist() == ds.labels[index].tolist()
    generator = torch.Generator().manual_seed(0)
    first, second = ([index.tolist() for *_, index in ds.batches("train", 48, augment=True,
                                                                 generator=generator)]
                     for _ in "ab")
    assert [len(index) for index in first] == [48] * 3 and first != second
    assert len(ds.batches("train", 48, augment=True)) == 3
    assert len(set(sum(first, []))) == 144 and set(sum(first, [])) <= set(ds.indices("train"))


def test_val_is_carved_from_train_by_class_and_by_group():
    ds = open_dataset("synthetic", val=0.25)
    train, val, test = (ds.indices(part) for part in ("train", "val", "test"))
    assert not set(train) & set(val) and not set(val) & set(test) and len(train) + len(val) == 192
    assert np.bincount(ds.labels[val]).tolist() == [6] * 8
    assert len(open_dataset("synthetic", val=0).indices("val")) == 0
    labels, groups = np.arange(80) % 2, np.arange(80) // 8
    apart = carve_val(np.where(groups >= 8, 2, 0), labels, groups, 0.2)
    assert set(groups[apart == 1]).isdisjoint(groups[apart == 0]) and (apart == 1).sum() == 16
    mixed = carve_val(np.where(np.arange(80) % 8 == 0, 2, 0), labels, groups, 0.2)
    assert set(groups[mixed == 1]) & set(groups[mixed == 0])        # as test does with train


def test_own_val_part_is_kept_and_val_0_leaves_it_out(tmp_path):
    spec = arrays()
    spec["splits"]["official"][:4] = 1
    folder = store.write(tmp_path / "own", **spec)
    own, none = (open_dataset(folder, val=val) for val in (0.5, 0))
    assert own.indices("val").tolist() == [0, 1, 2, 3]
    assert len(none.indices("val")) == 0 and len(none.indices("train")) == 33


def test_write_and_open_again(tmp_path):
    spec = arrays()
    store.write(tmp_path / "mine", **spec, groups=np.arange(48))
    by_path, by_name = open_dataset(tmp_path / "mine"), open_dataset("mine", root=tmp_path)
    assert by_path.name == by_name.name == "mine" and by_path.fingerprint == by_name.fingerprint
    for name, mod in by_path.modalities.items():
        np.testing.assert_array_equal(mod.array, spec["modalities"][name]["array"])
        assert isinstance(mod.array, np.memmap)
    assert by_path.modalities["image"].scale == (0.5, 1)
    assert by_path.modalities["audio"].in_channels == 1
    meta = json.loads((tmp_path / "mine/meta.json").read_text())
    assert meta["splits"] == {"official": {"train": 36, "val": 0, "test": 12}}
    assert meta["sha256"]["label.npy"] == store.sha256(tmp_path / "mine/label.npy")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(DataError, match="exists already"):
        store.write(tmp_path / "mine", **spec)


@pytest.mark.parametrize("change,message", [
    (lambda a: a["labels"].__setitem__(0, 9), "labels must be whole numbers 0 .. 2"),
    (lambda a: a["ids"].__setitem__(0, "item 1"), "47 different ones for 48"),
    (lambda a: a["ids"].__setitem__(0, "two\nlines"), "must be one line of text"),
    (lambda a: a["splits"].update(odd=np.full(48, 7)), "split 'odd' must hold"),
    (lambda a: a["splits"].update(odd=np.zeros(48, int)), "split 'odd' has no test items"),
    *((lambda a, name=name: a["modalities"].update({name: a["modalities"]["audio"]}), message)
      for name, message in (
          ("../x", "modality name '../x'"), ("label", "label.npy holds the items' labels"),
          ("group", "group.npy holds the items' groups"),
          ("Audio", "use a to z, 0 to 9 and _, a letter first"), ("2d", "a letter first"),
          (7, "a letter first"), ("x.y", "a letter first"), ("", "a letter first"))),
    *((lambda a, m=m, changed=changed: a["modalities"][m].update(changed), message)
      for m, changed, message in (
          ("image", {"size": 8}, "modality 'image': size is 8, not a pair"),
          ("audio", {"kind": "rgb"}, "modality 'audio': kind 'rgb' is stored as uint8"),
          ("image", {"flips": True}, "modality 'image': kind 'rgb' has no option 'flips'"),
          ("audio", {"array": np.zeros((7, 1, 8, 8), np.float16)}, "has 7 items"),
          ("audio", {"array": np.full((48, 1, 8, 8), np.nan, np.float16)}, "not finite"),
          ("audio", {"kind": "audio", "array": np.zeros((48, 511), np.int16)},
           "511 samples is shorter than a window of 512"),
          ("audio", {"kind": "audio", "array": np.zeros((48, 600), ">i2")}, "this array is >i2"),
          ("audio", {"std": 1e-35}, "overflows float32"),
          ("audio", {"mean": True}, "mean is True, not a finite"),
          ("image", {"size": (True, 8)}, "not a height and a width"),
          ("image", {"frame": [[2 ** 31, 5]] * 48}, "must hold height"),
          ("image", {"kind": ["rgb"]}, "is not one of audio, rgb"))),
    *((lambda a, kind=kind, c=channels: a["modalities"].update(mine={
        "kind": kind, "array": np.zeros((48, 1, c, 8, 8), np.uint8)}), message)
      for kind, channels, message in (
          ("view", 2, "cannot have 2 channels: it has 1 or 3"),
          ("view", 4, "kind 'view' cannot have 4 channels"),
          ("rgb", 4, "kind 'rgb' cannot have 4 channels"),
          ("flow", 3, "cannot have 3 channels: it has 2"))),
])
def test_write_refuses_what_training_cannot_take(tmp_path, change, message):
    spec = arrays()
    change(spec)
    with pytest.raises(DataError, match=re.escape(message)):
        store.write(tmp_path / "bad", **spec)
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_that_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(DataError, match="python -m data.prepare ave --raw DIR"):
        open_dataset("ave", root=tmp_path)
    with pytest.raises(DataError, match="neither as a path nor under"):
        open_dataset("nowhere", root=tmp_path)
    with pytest.raises(DataError, match="no split 'clean': it has official"):
        open_dataset("synthetic", split="clean")


def test_the_embedded_set_is_the_one_that_was_measured():
    arrays = synthetic.make()
    digest = "664ebf2a669b8a3b4eaf3bc9991f8baeca6b6093df59d0b624b9ab9b92470647"
    assert synthetic.digest(arrays) == digest
    ds = open_dataset("synthetic", val=0)
    assert ds.fingerprint["synthetic"] == digest
    assert np.bincount(ds.labels[ds.indices("train")]).tolist() == [24] * 8
    assert np.bincount(ds.labels[ds.indices("test")]).tolist() == [50] * 8
    loudest = ds.modalities["audio"].array[:, 0].astype(float).mean(2).max(1)   # a band's: near 1
    assert abs((loudest < 0.45).mean() - 0.2) < 0.04


@pytest.mark.parametrize("kind,shape", [
    ("view", (1, 1, 1, 1)), ("view", (1, 3, 5, 2)), ("rgb", (7, 1, 3, 3)), ("flow", (1, 2, 1, 9)),
    ("audio", (512,)), ("audio", (513,)), ("spectrogram", (1, 1, 1)), ("spectrogram", (4, 3, 700)),
])
def test_what_is_taken_can_be_trained_on(kind, shape, tmp_path):
    array = np.random.default_rng(0).integers(0, 100, (8, *shape)).astype(store.KINDS[kind][0])
    store.write(tmp_path / "mine", {"mine": {"kind": kind, "array": array}}, [0, 1] * 4,
                {"official": [0] * 4 + [2] * 4}, ["a", "b"], list("abcdefgh"))
    ds = open_dataset(tmp_path / "mine", val=0)
    inputs = next(iter(ds.batches("train", 4, augment=True)))[0]["mine"]
    features = joint_baseline.Encoder(ds.modalities["mine"].in_channels)(inputs)
    assert features.shape == (4, 512) and features.isfinite().all()


def test_numpys_scalars_are_numbers(tmp_path):
    features, pictures = np.ones((4, 1, 8, 8), np.float16), np.zeros((4, 1, 3, 8, 8), np.uint8)
    folder = store.write(tmp_path / "mine", {
        "sound": {"kind": "spectrogram", "array": features, "mean": features.mean(),
                  "std": np.float32(0.5)},
        "picture": {"kind": "rgb", "array": pictures, "size": (np.int64(6), np.uint8(4)),
                    "flip": np.bool_(False), "scale": np.array([0.5, 1])}},
        [0, 1, 0, 1], {"official": [0, 0, 2, 2]}, ["a", "b"], list("abcd"))
    meta = json.loads((folder / "meta.json").read_text())["modalities"]
    assert meta["sound"] == {"kind": "spectrogram", "shape": [4, 1, 8, 8], "mean": 1.0, "std": 0.5}
    assert meta["picture"] == {"kind": "rgb", "shape": [4, 1, 3, 8, 8], "size": [6, 4],
                               "scale": [0.5, 1.0], "flip": False}
    picture = open_dataset(folder, val=0).modalities["picture"]
    assert picture.size == (6, 4) and picture.flip is False


def test_any_other_name_can(tmp_path):
    names = ("labels", "split", "ids", "meta", "state", "frame", "type", "forward", "shared", "x_1")
    store.write(tmp_path / "mine", **arrays(modalities=names))
    assert tuple(open_dataset(tmp_path / "mine").modalities) == names


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.write("~/mine", **arrays()) == tmp_path / "mine"
    assert len(store.read("~/mine")[4]) == 48
