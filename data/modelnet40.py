"""ModelNet40: 12,311 meshes of 40 kinds of object, seen from two opposite sides.

Raw, one of: ModelNet40/<class>/{train,test}/<name>.off, rendered here (elevation 30; `front` is
azimuth 0, `rear` 180), or the twelve shaded PNGs an object, <class>/{train,test}/<name>.obj.
shaded_v001.png to _v012.png, of which the first and the seventh are taken (`view1`, `view7`), also
when numbered from v0000. All may lie one or two folders deeper. Which of the two shows an object's
front is not known: of the one that could be compared, bed_0001, the first was the rear. One grey
channel: the renders have no colour.

official = clean  9,843 / 2,468 as the folders say; no object stands in both
"""

import itertools
import re

from data.media import BadFile, check_file, read_off, read_picture, render, resize
from data.prepare import Index, Item, find_files
from data.store import check

EXPECTED = {"official": (9843, 0, 2468)}       # train, val, test
VIEWS = 12      # of an object, evenly spaced: the seventh is opposite the first
PNG = re.compile(r"(.+)\.obj[._]\w*shaded_v(\d+)\.png", re.IGNORECASE)


def index(raw, options):
    meshes, views = {}, {}      # (class, part, name): {0: mesh}, {number of the view: PNG}
    for path in [path for up in ("", "*/", "*/*/") for path in find_files(raw, f"{up}*/*/*.*")]:
        kind, part = path.parts[-3:-1]
        png, mesh = PNG.fullmatch(path.name), path.suffix.lower() == ".off"
        if part not in ("train", "test") or not (png or mesh):
            continue
        key = kind, part, png[1] if png else path.stem
        number = int(png[2]) if png else 0
        files = (views if png else meshes).setdefault(key, {})
        other = files.setdefault(number, path)
        check(other == path, f"{other} and {path} are the same of one object: remove one")
    check(meshes or views, f"{raw} holds neither <class>/{{train,test}}/*.off nor the twelve-view "
                           "PNGs: see docs/datasets.md for what to put where")
    check(not (meshes and views),
          f"{raw} holds {len(meshes)} meshes and the rendered views of {len(views)} objects: put "
          "one kind elsewhere, so that it is known which is meant")

    start = min([1, *itertools.chain(*views.values())])     # published views begin at 0 or at 1
    numbers = [0] if meshes else [start + number for number in range(VIEWS)]
    notes = []
    if views and set().union(*views.values()) == {numbers[0], numbers[VIEWS // 2]}:
        numbers = [numbers[0], numbers[VIEWS // 2]]
        notes = [f"each object has views {numbers[0]} and {numbers[1]} alone: these are taken as "
                 f"the first and the seventh of {VIEWS}, which look from opposite sides"]
    classes, items = sorted({kind for kind, _, _ in meshes or views}), []
    for (kind, part, name), files in (meshes or views).items():
        check(set(files) <= set(numbers),
              f"{kind}/{part}/{name} has views {min(files)} to {max(files)}, not {numbers[0]} to "
              f"{numbers[-1]}: only of {VIEWS} views is the seventh opposite the first")
        some = str(next(iter(files.values())))      # tells the name of one that is missing
        files = [str(files.get(number, numbered(some, number))) for number in numbers]
        items.append(Item(f"{kind}/{part}/{name}", classes.index(kind), name, files))
    official = {item.id: 0 if "/train/" in item.id else 2 for item in items}
    modalities = {name: {"kind": "view", "shape": (1, 1, 256, 256)}
                  for name in (("front", "rear") if meshes else ("view1", "view7"))}
    splits = {"official": official, "clean": official}
    return Index(items, classes, modalities, splits, EXPECTED, notes=notes)


def numbered(path, number):
    """The name of another view: v001 -> v007, v0000 -> v0006."""
    return re.sub(r"\d+(?=\.png$)", lambda m: f"{number:0{len(m[0])}}", path, flags=re.IGNORECASE)


def decode(item, options):
    if len(item.files) == 1:
        vertices, triangles = read_off(item.files[0])
        try:
            views = [render(vertices, triangles, azimuth) for azimuth in (0, 180)]
        except ValueError as error:
            raise BadFile(item.files[0], str(error)) from None
        if min(view.min() for view in views) == 255:
            raise BadFile(item.files[0], "shows nothing: too thin, or a corner far away from all "
                                         "others")
        return {"front": views[0][None], "rear": views[1][None]}, None
    for path in item.files:        # an object that lacks a view is not whole
        check_file(path)
    first, seventh = (resize(read_picture(item.files[at], "L")) for at in (0, len(item.files) // 2))
    return {"view1": first[None], "view7": seventh[None]}, None
