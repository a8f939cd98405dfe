"""Prepared folders that are damaged, or made to do harm: one clear line each, nothing executed, nothing outside touched."""

import contextlib
import copy
import io
import json
import os
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import TRIALS, arrays
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError, info, open_dataset, store, verify


def write(folder):
    """A prepared folder with every kind of file: 8 items, groups and frames, skipped items and group names in meta.json."""
    spec = arrays(n=8, n_classes=2, size=8)
    spec["modalities"]["image"]["frame"] = np.full((8, 2), 30)
    store.write(folder, **spec, groups=np.arange(8) // 2)
    edit(folder, lambda meta: meta.update(skipped={"item 9": "is silent"}, groups=["a", "b", "c", "d"]))
    return folder


def edit(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def put(folder, name, array):
    """Another array, and its SHA-256 in meta.json: what somebody who wants to deceive would do."""
    np.save(folder / f"{name}.npy", array)
    edit(folder, lambda meta: meta["sha256"].update({f"{name}.npy": store.sha256(folder / f"{name}.npy")}))


def flip(folder, name, place):
    data = bytearray((folder / name).read_bytes())
    data[place] ^= 1
    (folder / name).write_bytes(data)


def append(folder, name, more):
    with open(folder / name, "ab") as file:
        file.write(more)


def header(shape, descr="<f2"):
    """The first 128 bytes of an .npy file, with any shape."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def link(folder, name, target):
    (folder / name).unlink()
    os.symlink(target, folder / name)


def pipe(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)


class Harm:
    def __reduce__(self):
        return os.mkdir, (os.environ["HARM"],)


def long_list(folder):
    with open(folder / "ids.txt", "ab") as file:
        file.truncate(1 << 43)       # 8 TB of zeros that take no room on the disk


def no_numbers(folder):
    features = np.load(folder / "audio.npy")
    features[1, 0, 0, 0], features[5, 0, 2, 3] = np.nan, np.inf
    put(folder, "audio", features)


READ = {       # what `open_dataset` refuses by itself, and what it says
    "no meta.json": (lambda f: (f / "meta.json").unlink(), "no meta.json"),
    "half a meta.json": (lambda f: (f / "meta.json").write_text('{"schema": 1,'), "meta.json cannot be read: Expecting"),
    "a deep meta.json": (lambda f: (f / "meta.json").write_text("[" * 200_000), "meta.json cannot be read: maximum recursion"),
    "no text": (lambda f: (f / "meta.json").write_bytes(b"\xff\xfe{}"), "meta.json cannot be read: 'utf-8' codec"),
    "another schema": (lambda f: edit(f, lambda m: m.update(schema=2)), "is not of schema 1: prepare the dataset again"),
    "another count": (lambda f: edit(f, lambda m: m.update(items=9)), "counts other items than the arrays hold"),
    "another split's count": (lambda f: edit(f, lambda m: m["splits"]["official"].update(train=5)), "counts other items"),
    "another shape": (lambda f: edit(f, lambda m: m["modalities"]["audio"].update(shape=[8, 1, 8, 9])),
                      "meta.json says otherwise"),
    "no such option": (lambda f: edit(f, lambda m: m["modalities"]["audio"].update(array="x")), "has unknown options"),
    "a std of 0": (lambda f: edit(f, lambda m: m["modalities"]["audio"].update(std=0)),
                   "std is 0, not above 0"),
    "a mean that is no number": (lambda f: edit(f, lambda m: m["modalities"]["audio"].update(mean=float("nan"))),
                                 "mean is nan, not a finite number"),
    "pictures of 10 TB": (lambda f: edit(f, lambda m: m["modalities"]["image"].update(size=[10 ** 6, 10 ** 6])), "at most 4096"),
    "fewer classes than labels": (lambda f: edit(f, lambda m: m["classes"].pop()), "labels must be whole numbers 0 .. 0"),
    "classes that clear the screen": (lambda f: edit(f, lambda m: m["classes"].__setitem__(0, "\x1b[2J")), "must be one line"),
    "fewer group names": (lambda f: edit(f, lambda m: m["groups"].pop()), "group.npy has groups that meta.json does not name"),
    "a file by an absolute path": (lambda f: edit(f, lambda m: m["modalities"].update({"/etc/passwd": m["modalities"]["audio"]})),
                                   "'/etc/passwd' is no name of a modality"),
    "a file above": (lambda f: edit(f, lambda m: m["splits"].update({"../secret": {}})),
                     "'../secret' is no name of a modality or"),
    "a SHA-256 of a file above": (lambda f: edit(f, lambda m: m["sha256"].update({"../secret.npy": "0" * 64})),
                                  "sha256 does not"),
    "a SHA-256 too few": (lambda f: edit(f, lambda m: m["sha256"].pop("ids.txt")), "sha256 does not list the files"),
    "a missing array": (lambda f: (f / "audio.npy").unlink(), "audio.npy is missing"),
    "a cut array": (lambda f: (f / "audio.npy").write_bytes((f / "audio.npy").read_bytes()[:-8]), "audio.npy cannot be read"),
    "a cut header": (lambda f: (f / "label.npy").write_bytes((f / "label.npy").read_bytes()[:50]), "label.npy cannot be read"),
    "an enlarged array": (lambda f: append(f, "audio.npy", b"more"), "it is 4 bytes longer than its header says"),
    "an array of 10 TB": (lambda f: (f / "audio.npy").write_bytes(header("(5000000000000, 1, 1, 1)")),
                          "audio.npy cannot be read"),
    "an array beyond 64 bit": (lambda f: (f / "audio.npy").write_bytes(header(f"({2 ** 62}, 2, 2, 2)")),
                               "audio.npy cannot be read"),
    "pickled objects": (lambda f: np.save(f / "label.npy", np.array([Harm()] * 8), allow_pickle=True),
                        "label.npy cannot be read"),
    "a pickle": (lambda f: (f / "label.npy").write_bytes(pickle.dumps(Harm())), "label.npy cannot be read"),
    "an archive": (lambda f: np.savez(open(f / "label.npy", "wb"), a=np.zeros(8)), "label.npy cannot be read"),
    "a link to elsewhere": (lambda f: link(f, "audio.npy", "../secret.npy"),
                            "audio.npy is no plain file: links are not followed"),
    "a meta.json from elsewhere": (lambda f: link(f, "meta.json", "../secret.json"), "meta.json is no plain file"),
    "a link to nowhere": (lambda f: link(f, "ids.txt", "nowhere"), "ids.txt is no plain file"),
    "a pipe": (lambda f: pipe(f, "label.npy"), "label.npy is no plain file"),
    "ids of 8 TB": (long_list, "ids.txt has 8796093022208 bytes"),
    "the same id twice": (lambda f: (f / "ids.txt").write_text("a\n" * 8),
                          "1 different ones for 8 items, 'a' comes more than once"),
    "an id too few": (lambda f: (f / "ids.txt").write_text("a\nb\n"), "there are 2 ids"),
    "labels out of range": (lambda f: put(f, "label", np.arange(8)), "labels must be whole numbers 0 .. 1"),
    "labels below 0": (lambda f: put(f, "label", np.full(8, -1)), "labels must be whole numbers 0 .. 1"),
    "labels that are no numbers": (lambda f: put(f, "label", np.full(8, np.nan)), "labels must be whole numbers 0 .. 1"),
    "a table of labels": (lambda f: put(f, "label", np.zeros((8, 2), int)), "labels must be whole numbers 0 .. 1"),
    "one label for all": (lambda f: put(f, "label", np.int64(0)), "labels must be whole numbers 0 .. 1"),
    "an item in two parts": (lambda f: put(f, "split.official", np.array([0, 0, 0, 2, 0, 0, 0, 0 | 2 | 1], np.uint8)),
                             "must hold 0"),
    "indices for codes": (lambda f: put(f, "split.official", np.array([0, 1, 2, 4, 5, 6, 99, 7], np.uint8)), "must hold 0"),
    "a list of indices": (lambda f: put(f, "split.official", np.array([0, 1, 2], np.uint8)), "must hold 0"),
    "frames without extent": (lambda f: put(f, "image.frame", np.zeros((8, 2), np.int32)), "frame of modality 'image' must hold"),
    "groups that are no numbers": (lambda f: put(f, "group", np.zeros(8)), "groups must be whole numbers"),
}
VERIFY = {      # what takes a look at every byte
    "a flipped byte": (lambda f: flip(f, "image.npy", -5),
                       "image.npy           changed: its SHA-256 is not the one in meta.json"),
    "a flipped label": (lambda f: flip(f, "label.npy", 128), "label.npy           changed"),
    "another id": (lambda f: (f / "ids.txt").write_text("".join(f"{i}\n" for i in range(8))), "ids.txt             changed"),
    "an exchanged array": (lambda f: np.save(f / "image.npy", np.zeros((8, 1, 3, 8, 8), np.uint8)),
                           "image.npy           changed"),
    "another SHA-256": (lambda f: edit(f, lambda m: m["sha256"].update({"audio.npy": 7})), "audio.npy           changed"),
    "features that are no numbers": (no_numbers, "damaged: features that are not finite in 2 items, the first number 1"),
}


def command(folder, capsys):
    """`python -m data.verify` in this process: its exit code, what it printed and its one line on stderr."""
    code = 0
    try:
        verify.main([str(folder)])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_a_whole_folder(tmp_path, capsys):
    folder = write(tmp_path / "mine")
    code, out, err = command(folder, capsys)
    assert (code, err) == (0, "") and [line.split()[1] for line in out.splitlines()] == ["ok"] * 7 + ["agrees"]
    assert store.sha256(folder / "meta.json") in out       # the one thing to compare by hand
    os.symlink(folder, tmp_path / "link")                  # a whole folder may lie on another disk
    assert command(tmp_path / "link", capsys)[0] == 0 and len(open_dataset(tmp_path / "link").ids) == 8


@contextlib.contextmanager
def watched(folder):
    """Nothing but files inside the folder is opened, and only to read; nothing is executed or unpickled."""
    seen = []
    sys.addaudithook(lambda event, args: seen.append((event, *args)) if seen is not None else None)     # it can never be removed
    try:
        yield
    finally:
        events, seen = seen, None
    for event, *args in events:
        assert event not in ("exec", "pickle.find_class", "os.system", "subprocess.Popen", "os.remove", "os.rename", "os.mkdir")
        if event == "open":
            assert Path(args[0]).parent == folder and args[1] in ("r", "rb", None) and not args[2] & os.O_WRONLY, args


@pytest.mark.parametrize("case", [*READ, *VERIFY])
def test_damage_is_one_clear_line(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    folder = write(tmp_path / "mine")
    np.save(tmp_path / "secret.npy", np.load(folder / "audio.npy"))
    shutil.copy(folder / "meta.json", tmp_path / "secret.json")
    assert command(folder, capsys)[0] == 0       # whatever Python loads at the first use is loaded now
    damage, message = (READ | VERIFY)[case]
    damage(folder)
    with watched(folder):
        code, out, err = command(folder, capsys)
        if case in READ:
            with pytest.raises(DataError) as error:
                open_dataset(folder)
    assert code == 2 and len(err.splitlines()) == 1 and "Traceback" not in out + err
    assert message in (str(error.value) if case in READ else out)
    assert not (tmp_path / "harm").exists()


def test_what_verify_cannot_see_is_what_it_says(tmp_path, capsys):
    folder = write(tmp_path / "mine")
    before = command(folder, capsys)[1].splitlines()[-1]
    edit(folder, lambda meta: meta["classes"].reverse())
    code, out, _ = command(folder, capsys)
    assert code == 0 and out.splitlines()[-1] != before         # the names are exchanged; only meta.json's own SHA-256 tells


def test_info_shows_no_control_characters(tmp_path, capsys):
    folder = write(tmp_path / "mine")
    edit(folder, lambda meta: meta.update(skipped={"\x1b[2J": "\ud800\nline"}, groups=["\x07"] * 4))
    info.describe(folder)
    printed = capsys.readouterr().out
    assert "\n  [2J: line\n" in printed and not set(printed) & set("\x1b\x07\ud800")


fuzzed = settings(deadline=None, database=None, derandomize=TRIALS == 1)


def one_line_or_usable(folder):
    """Open what stands there: either a DataError of one short line, or batches and tables come out of it. True if it opened."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as out:
        warnings.simplefilter("error")
        try:
            ds = open_dataset(folder, val=0)
        except DataError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 500 and store.LINE.fullmatch(str(error)), str(error)
            return False
        inputs, labels, _ = next(iter(ds.batches("train", 2, augment=True)))
        assert all(len(tensor) == 2 and tensor.ndim == 5 for tensor in inputs.values()) and labels.max() < len(ds.classes)
        info.describe(folder)
    assert out.getvalue().encode()
    return True


def verified(folder):
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            verify.verify(folder)
        except DataError:
            return False
    return True


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return write(tmp_path_factory.mktemp("fuzz") / "mine")


def replace(path, data):
    """As a new file: what is still mapped must not change under it."""
    path.with_suffix(".new").write_bytes(data)
    os.replace(path.with_suffix(".new"), path)


odd = st.sampled_from(["", "../secret", "/etc/passwd", "audio", "label", "\x1b[2J", "two\nlines", "\ud800", "x" * 999, True, None,
                       0, -1, 2, 10 ** 13, 10 ** 400, 0.5, 1e308, float("nan"), float("inf"), [4, 4], [10 ** 7, 10 ** 7],
                       [1, 0.5], {}, []])
anything = st.recursive(odd | st.integers() | st.floats() | st.text(max_size=9), lambda inner: st.lists(
    inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3), max_leaves=6)
changes = st.tuples(st.integers(0, 999), st.sampled_from(["set", "remove", "add"]), anything)


def nodes(tree):
    """Every (container, key) of a JSON tree."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from nodes(tree[key])


@settings(fuzzed, max_examples=1000 * TRIALS)
@given(changes=st.lists(changes, min_size=1, max_size=3))
def test_any_entry_of_meta_json_may_be_anything(scratch, changes):
    whole = (scratch / "meta.json").read_bytes()
    meta = json.loads(whole)
    for place, action, value in changes:
        places = list(nodes(meta))
        if not places:
            break
        tree, key = places[place % len(places)]
        if action == "remove":
            del tree[key]
        elif action == "add" and isinstance(tree, dict):
            tree[value if isinstance(value, str) else "more"] = copy.deepcopy(value)
        else:
            tree[key] = copy.deepcopy(value)
    try:
        replace(scratch / "meta.json", json.dumps(meta).encode())
        opened = one_line_or_usable(scratch)
        assert opened or not verified(scratch)
    finally:
        replace(scratch / "meta.json", whole)


damaged = st.tuples(st.integers(0, 2000), st.binary(max_size=8), st.integers(0, 2000))   # where, what, instead of how many bytes


@settings(fuzzed, max_examples=300 * TRIALS)
@given(damage=damaged)
def test_any_bytes_of_meta_json_may_be_others(scratch, damage):
    whole = (scratch / "meta.json").read_bytes()
    place, other, length = damage
    try:
        replace(scratch / "meta.json", whole[:place] + other + whole[place + length:])
        assert one_line_or_usable(scratch) or not verified(scratch)
    finally:
        replace(scratch / "meta.json", whole)


sizes = st.sampled_from([0, 1, 2, 8, -1, True, 10 ** 13, 2 ** 62, 2 ** 63, 2 ** 64, 10 ** 30, "8", 8.0, None]) | st.integers(0, 9)
types = st.sampled_from(["<i8", ">i8", "<u8", "|u1", "<f2", "<f8", "|O", "O", "|V0", "|V8", "<U0", "<U99999999", "<m8[s]", "|b1",
                         "<c16", "i8,i8", "a5", [("a", "<i8")], [("a", "|O")], {}, 7, "(2,)i8", "\\d"]) | st.text(max_size=6)
made_up = st.builds(
    lambda descr, order, shape, more: f"{{'descr': {descr!r}, 'fortran_order': {order!r}, 'shape': {tuple(shape)!r}, {more}}}",
    types, st.sampled_from([False, True, 0, "no"]), st.lists(sizes, max_size=6), st.sampled_from(["", "", "", "'x': 1", "["]))


@settings(fuzzed, max_examples=1000 * TRIALS)
@given(name=st.sampled_from(["label", "group", "split.official", "audio", "image", "image.frame"]),
       text=made_up | made_up | st.text(max_size=60) | damaged, version=st.sampled_from([1, 1, 1, 2, 3, 0]))
def test_any_header_of_an_array_may_be_anything(scratch, name, text, version):
    path = scratch / f"{name}.npy"
    whole = path.read_bytes()
    if isinstance(text, str):
        text = (text.encode(errors="replace") + b"\n").rjust(118)
        other = b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text + whole[128:]
    else:
        place, instead, length = text
        other = whole[:place] + instead + whole[place + length:]
    try:
        replace(path, other)
        one_line_or_usable(scratch)
        assert verified(scratch) == (other == whole)
    finally:
        replace(path, whole)
