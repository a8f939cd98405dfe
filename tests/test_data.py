"""The data package: the splits, and an item's way to the encoder."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from scipy import signal

from data import DataError, Dataset, batches, carve_val, open_dataset, store


@pytest.mark.parametrize("samples,frames", [(48_000, 299), (512, 1)])
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


@pytest.mark.parametrize("height,width,scale", [(360, 480, (0.08, 1.0)), (100, 800, (0.6, 1.0))])
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
    views = dataset({side: {"kind": "rgb", "array": rgb} for side in ("front", "rear")})
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
    inputs, _, _ = next(iter(ds.batches("test", 2)))
    assert inputs["rgb"].shape == (2, 1, 3, 224, 224)


def test_evaluation_sees_every_item_once_in_order_and_training_all_but_an_incomplete_batch():
    ds = open_dataset("synthetic")
    for part in ("val", "test"):
        index = torch.cat([index for _, _, index in ds.batches(part, 48)])
        assert index.tolist() == ds.indices(part).tolist()
    generator, epochs = torch.Generator().manual_seed(0), []
    for _ in range(2):
        items = []
        for _, labels, index in ds.batches("train", 48, augment=True, generator=generator):
            assert len(index) == 48 and labels.tolist() == ds.labels[index].tolist()
            items += index.tolist()
        assert sorted(items) == ds.indices("train").tolist()
        epochs.append(items)
    assert epochs[0] != epochs[1]
    assert len(ds.batches("train", 50, augment=True)) == 3


def test_val_is_carved_from_train_by_class_and_by_group():
    labels = np.arange(80) % 2
    carved = carve_val(np.where(np.arange(80) < 40, 0, 2), labels, None, 0.25)
    assert np.bincount(carved).tolist() == [30, 10, 40]
    assert np.bincount(labels[carved == 1]).tolist() == [5, 5]
    labels, groups = np.arange(80) % 2, np.arange(80) // 8
    apart = carve_val(np.where(groups >= 8, 2, 0), labels, groups, 0.2)
    assert set(groups[apart == 1]).isdisjoint(groups[apart == 0]) and (apart == 1).sum() == 16
    mixed = carve_val(np.where(np.arange(80) % 8 == 0, 2, 0), labels, groups, 0.2)
    assert set(groups[mixed == 1]) & set(groups[mixed == 0])        # as test does with train


@pytest.mark.parametrize("name,split,said", [
    ("ave", None, "python -m data.prepare ave --raw DIR"),
    ("nowhere", None, "neither as a path nor under"),
    ("synthetic", "clean", "no split 'clean': it has official")])
def test_a_dataset_that_is_not_there_says_how_to_get_it(name, split, said, tmp_path):
    with pytest.raises(DataError, match=said):
        open_dataset(name, tmp_path, split)


def test_arrays_go_to_the_device_in_slices(monkeypatch):
    array = np.random.default_rng(0).integers(0, 256, (100, 1, 3, 8, 8), dtype=np.uint8)
    monkeypatch.setattr(batches, "SLICE", 7 * array[0].nbytes)
    assert torch.equal(batches.send(array, torch.device("cpu")), torch.from_numpy(array))


def test_a_share_of_val_far_from_the_one_asked_for_gives_its_reason(capsys):
    labels, groups = np.arange(16) % 2, np.repeat([0, 1, 7], [7, 7, 2])
    ds = Dataset("made", "official", ["a", "b", "c"], {}, labels, list(map(str, labels)), groups,
                 np.repeat([0, 2], [14, 2]), {}, 0.1)
    ds.check(2)
    said = capsys.readouterr().err
    assert "50% of the training items are held out, not 10%: whole groups" in said
    assert "no train items of 1 classes: c" in said
