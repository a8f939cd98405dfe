"""Prepared folders that are damaged, or made to do harm: one clear line each, nothing executed,
nothing outside touched."""

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
    """A prepared folder with every kind of file: groups and frames, skipped items, group names."""
    spec = arrays(n=8, n_classes=2, size=8)
    spec["modalities"]["image"]["frame"] = np.full((8, 2), 30)
    store.write(folder, **spec, groups=np.arange(8) // 2)
    edit(folder, lambda m: m.update(skipped={"item 9": "is silent"}, groups=["a", "b", "c", "d"]))
    return folder


def edit(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


class Harm:
    def __reduce__(self):
        return os.mkdir, (os.environ["HARM"],)


# Each damage: a function of the folder.
def remove(name):
    return lambda f: (f / name).unlink()


def data(name, change):
    """Other bytes, made of those that were there."""
    return lambda f: (f / name).write_bytes(change((f / name).read_bytes()))


def meta(change):
    return lambda f: edit(f, change)


def array(name, values):
    return lambda f: np.save(f / f"{name}.npy", values)


def forged(name, values):
    """Another array, and its SHA-256 in meta.json: what one who wants to deceive would do."""
    def damage(f):
        array(name, values(np.load(f / f"{name}.npy")) if callable(values) else values)(f)
        digest = store.sha256(f / f"{name}.npy")
        edit(f, lambda m: m["sha256"].update({f"{name}.npy": digest}))
    return damage


def link(name, target):
    def damage(f):
        (f / name).unlink()
        os.symlink(target, f / name)
    return damage


def pipe(f):
    (f / "label.npy").unlink()
    os.mkfifo(f / "label.npy")


def flip(place):
    return lambda whole: whole[:place] + bytes([whole[place] ^ 1]) + whole[place:][1:]


def header(shape):
    """The first 128 bytes of an .npy file, with any shape."""
    text = f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return lambda _: b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def no_numbers(features):
    features[1, 0, 0, 0], features[5, 0, 2, 3] = np.nan, np.inf
    return features


LABELS, PART = "labels must be whole numbers 0 .. 1", "must hold 0"
CUT, NO_FILE = "audio.npy cannot be read", "is not a plain file"
READ = [        # what `open_dataset` refuses by itself, and what it says
    (remove("meta.json"), "no meta.json"),
    (data("meta.json", lambda _: b'{"schema": 1,'), "meta.json cannot be read: Expecting"),
    (data("meta.json", lambda _: b"[" * 200_000), "meta.json cannot be read: maximum recursion"),
    (data("meta.json", lambda _: b"\xff\xfe{}"), "meta.json cannot be read: 'utf-8' codec"),
    (meta(lambda m: m.update(schema=2)), "is not of schema 1: prepare the dataset again"),
    (meta(lambda m: m.update(items=9)), "counts other items than the arrays hold"),
    (meta(lambda m: m["splits"]["official"].update(train=5)), "counts other items"),
    (meta(lambda m: m["modalities"]["audio"].update(shape=[8, 1, 8, 9])), "meta.json says other"),
    (meta(lambda m: m["modalities"]["audio"].update(array="x")), "has unknown options"),
    (meta(lambda m: m["modalities"]["audio"].update(std=0)), "std is 0, not above 0"),
    (meta(lambda m: m["modalities"]["audio"].update(mean=np.nan)), "mean is nan, not a finite"),
    (meta(lambda m: m["modalities"]["image"].update(size=[10 ** 6, 10 ** 6])), "at most 4096"),
    (meta(lambda m: m["classes"].pop()), "labels must be whole numbers 0 .. 0"),
    (meta(lambda m: m["classes"].__setitem__(0, "\x1b[2J")), "must be one line"),
    (meta(lambda m: m["groups"].pop()), "group.npy has groups that meta.json does not name"),
    (meta(lambda m: m["modalities"].update({"/etc/passwd": m["modalities"]["audio"]})),
     "'/etc/passwd' cannot name a modality"),
    (meta(lambda m: m["splits"].update({"../secret": {}})), "'../secret' cannot name a modality"),
    (meta(lambda m: m["sha256"].update({"../secret.npy": "0" * 64})), "sha256 does not"),
    (meta(lambda m: m["sha256"].pop("ids.txt")), "sha256 does not list the files"),
    (remove("audio.npy"), "audio.npy is missing"),
    (data("audio.npy", lambda whole: whole[:-8]), CUT),
    (data("label.npy", lambda whole: whole[:50]), "label.npy cannot be read"),
    (data("audio.npy", lambda whole: whole + b"more"), "4 bytes longer than its header says"),
    (data("audio.npy", header("(5000000000000, 1, 1, 1)")), CUT),       # 10 TB
    (data("audio.npy", header(f"({2 ** 62}, 2, 2, 2)")), CUT),          # beyond 64 bit
    (array("audio", np.zeros((3, 1, 4, 4), np.float16)), "meta.json says otherwise"),
    (array("label", np.array([Harm()] * 8)), "label.npy cannot be read"),
    (data("label.npy", lambda _: pickle.dumps(Harm())), "label.npy cannot be read"),
    (lambda f: np.savez(open(f / "label.npy", "wb"), a=np.zeros(8)), "label.npy cannot be read"),
    (link("audio.npy", "../secret.npy"), f"audio.npy {NO_FILE}: links are not followed"),
    (link("meta.json", "../secret.json"), f"meta.json {NO_FILE}"),
    (link("ids.txt", "nowhere"), f"ids.txt {NO_FILE}"),
    (pipe, f"label.npy {NO_FILE}"),
    (lambda f: os.truncate(f / "ids.txt", 1 << 43), "ids.txt has 8796093022208 bytes"),     # sparse
    (data("ids.txt", lambda _: b"a\n" * 8), "1 different ones for 8 items, 'a' comes more than"),
    (data("ids.txt", lambda _: b"a\nb\n"), "there are 2 ids"),
    *((forged("label", values), LABELS) for values in (
        np.arange(8), np.full(8, -1), np.full(8, np.nan), np.zeros((8, 2), int), np.int64(0))),
    *((forged("split.official", np.array(codes, np.uint8)), PART) for codes in (
        [0, 0, 0, 2, 0, 0, 0, 3], [0, 1, 2, 4, 5, 6, 99, 7], [0, 1, 2])),
    (forged("image.frame", np.zeros((8, 2), np.int32)), "frame of modality 'image' must hold"),
    (forged("group", np.zeros(8)), "groups must be whole numbers"),
]
VERIFY = [      # what takes a look at every byte
    (data("image.npy", flip(-5)), "image.npy           changed: its SHA-256 is not the one in"),
    (data("label.npy", flip(128)), "label.npy           changed"),
    (data("ids.txt", lambda _: b"0\n1\n2\n3\n4\n5\n6\n7\n"), "ids.txt             changed"),
    (array("image", np.zeros((8, 1, 3, 8, 8), np.uint8)), "image.npy           changed"),
    (meta(lambda m: m["sha256"].update({"audio.npy": 7})), "audio.npy           changed"),
    (forged("audio", no_numbers), "damaged: features that are not finite in 2 items, the first"),
]


def command(folder, capsys):
    """`python -m data.verify`: its exit code, what it printed and its one line on stderr."""
    code = 0
    try:
        verify.main([str(folder)])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_a_whole_folder(tmp_path, capsys):
    folder = write(tmp_path / "mine")
    code, out, err = command(folder, capsys)
    assert (code, err) == (0, "")
    assert [line.split()[1] for line in out.splitlines()] == ["ok"] * 7 + ["agrees"]
    assert store.sha256(folder / "meta.json") in out       # the one thing to compare by hand
    os.symlink(folder, tmp_path / "link")                  # a whole folder may lie on another disk
    assert command(tmp_path / "link", capsys)[0] == 0
    assert len(open_dataset(tmp_path / "link").ids) == 8
    edit(folder, lambda m: m["classes"].reverse())         # only meta.json's own SHA-256 tells
    code, changed, _ = command(folder, capsys)
    assert code == 0 and changed.splitlines()[-1] != out.splitlines()[-1]


@contextlib.contextmanager
def watched(folder):
    """Nothing but files inside the folder is opened, and only to read; nothing is unpickled."""
    seen = []           # the hook can never be removed
    sys.addaudithook(lambda *event: seen.append(event) if seen is not None else None)
    try:
        yield
    finally:
        events, seen = seen, None
    for event, args in events:
        assert event not in ("exec", "pickle.find_class", "os.system", "subprocess.Popen",
                             "os.remove", "os.rename", "os.mkdir")
        if event == "open":
            assert Path(args[0]).parent == folder and args[1] in ("r", "rb", None), args
            assert not args[2] & os.O_WRONLY, args


@pytest.mark.parametrize("damage,message", READ + VERIFY)
def test_damage_is_one_clear_line(damage, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    folder = write(tmp_path / "mine")
    shutil.copy(folder / "audio.npy", tmp_path / "secret.npy")
    shutil.copy(folder / "meta.json", tmp_path / "secret.json")
    assert command(folder, capsys)[0] == 0       # what Python loads at the first use is loaded now
    damage(folder)
    read = (damage, message) in READ
    with watched(folder):
        code, out, err = command(folder, capsys)
        if read:
            with pytest.raises(DataError) as error:
                open_dataset(folder)
    assert code == 2 and len(err.splitlines()) == 1 and "Traceback" not in out + err
    assert message in (str(error.value) if read else out)
    assert not (tmp_path / "harm").exists()


def test_info_shows_no_control_characters(tmp_path, capsys):
    folder = write(tmp_path / "mine")
    edit(folder, lambda m: m.update(skipped={"\x1b[2J": "\ud800\nline"}, groups=["\x07"] * 4))
    info.describe(folder)
    printed = capsys.readouterr().out
    assert "\n  [2J: line\n" in printed and not set(printed) & set("\x1b\x07\ud800")


# ---- anything at all -----------------------------------------------------------------------------
fuzzed = settings(deadline=None, database=None, derandomize=TRIALS == 1)


def one_line_or_usable(folder):
    """Open what stands there: a DataError of one short line, or batches and tables come out of it.
    True if it opened."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as out:
        warnings.simplefilter("error")
        try:
            ds = open_dataset(folder, val=0)
        except DataError as error:
            assert store.LINE.fullmatch(str(error)) and len(str(error)) < 500, str(error)
            return False
        inputs, labels, _ = next(iter(ds.batches("train", 2, augment=True)))
        assert all(len(x) == 2 and x.ndim == 5 for x in inputs.values())
        assert labels.max() < len(ds.classes)
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


@contextlib.contextmanager
def replaced(path, other):
    """A new file for a while: what is still mapped must not change under it."""
    kept, new = path.with_suffix(".kept"), path.with_suffix(".new")
    os.replace(path, kept)
    try:
        new.write_bytes(other)
        os.replace(new, path)
        yield
    finally:
        os.replace(kept, path)


odd = st.sampled_from(["", "../secret", "/etc/passwd", "audio", "label", "\x1b[2J", "two\nlines",
                       "\ud800", "x" * 999, True, None, 0, -1, 2, 10 ** 13, 10 ** 400, 0.5, 1e308,
                       np.nan, np.inf, [4, 4], [10 ** 7, 10 ** 7], [1, 0.5], {}, []])
anything = st.recursive(
    odd | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (st.lists(inner, max_size=3)
                   | st.dictionaries(st.text(max_size=9), inner, max_size=3)), max_leaves=6)
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
    meta = json.loads((scratch / "meta.json").read_text())
    for place, action, value in changes:
        value = copy.deepcopy(value)
        places = list(nodes(meta))
        if not places:
            break
        tree, key = places[place % len(places)]
        if action == "remove":
            del tree[key]
        elif action == "add" and isinstance(tree, dict):
            tree[value if isinstance(value, str) else "more"] = value
        else:
            tree[key] = value
    with replaced(scratch / "meta.json", json.dumps(meta).encode()):
        assert one_line_or_usable(scratch) or not verified(scratch)


damaged = st.tuples(st.integers(0, 2000), st.binary(max_size=8), st.integers(0, 2000))


def with_damage(whole, damage):
    """Where, what, instead of how many bytes."""
    place, other, length = damage
    return whole[:place] + other + whole[place + length:]


@settings(fuzzed, max_examples=300 * TRIALS)
@given(damage=damaged)
def test_any_bytes_of_meta_json_may_be_others(scratch, damage):
    path = scratch / "meta.json"
    with replaced(path, with_damage(path.read_bytes(), damage)):
        assert one_line_or_usable(scratch) or not verified(scratch)


sizes = st.integers(0, 9) | st.sampled_from([
    0, 1, 2, 8, -1, True, 10 ** 13, 2 ** 62, 2 ** 63, 2 ** 64, 10 ** 30, "8", 8.0, None])
types = st.text(max_size=6) | st.sampled_from([
    "<i8", ">i8", "<u8", "|u1", "<f2", "<f8", "|O", "O", "|V0", "|V8", "<U0", "<U99999999",
    "<m8[s]", "|b1", "<c16", "i8,i8", "a5", [("a", "<i8")], [("a", "|O")], {}, 7, "(2,)i8", "\\d"])
made_up = st.builds(
    "{{'descr': {!r}, 'fortran_order': {!r}, 'shape': {!r}, {}}}".format, types,
    st.sampled_from([False, True, 0, "no"]), st.lists(sizes, max_size=6).map(tuple),
    st.sampled_from(["", "", "", "'x': 1", "["]))


@settings(fuzzed, max_examples=1000 * TRIALS)
@given(name=st.sampled_from(["label", "group", "split.official", "audio", "image", "image.frame"]),
       text=made_up | made_up | st.text(max_size=60) | damaged,
       version=st.sampled_from([1, 1, 1, 2, 3, 0]))
def test_any_header_of_an_array_may_be_anything(scratch, name, text, version):
    path = scratch / f"{name}.npy"
    whole = path.read_bytes()
    if isinstance(text, str):
        text = (text.encode(errors="replace") + b"\n").rjust(118)
        size = len(text).to_bytes(2 if version == 1 else 4, "little")
        other = b"\x93NUMPY" + bytes([version, 0]) + size + text + whole[128:]
    else:
        other = with_damage(whole, text)
    with replaced(path, other):
        one_line_or_usable(scratch)
        assert verified(scratch) == (other == whole)
