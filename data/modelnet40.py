"""ModelNet40: 12,311 meshes of 40 kinds of object; a front and a rear view.

Raw, one of: ModelNet40/<class>/{train,test}/<name>.off, rendered here (elevation 30, azimuth 0 and 180), or the twelve
shaded PNGs an object, <class>/{train,test}/<name>.obj.shaded_v001.png (front) and _v007.png (rear), also when numbered
from v0000. One grey channel: the renders have no colour.

official = clean  9,843 / 2,468 as the folders say; no object stands in both
"""

import re

from data.media import BadFile, read_off, read_picture, render, resize
from data.prepare import Index, Item
from data.store import DataError

EXPECTED = {"official": (9843, 0, 2468)}       # train, val, test
PNG = re.compile(r"(.+)\.obj[._]\w*shaded_v(\d+)\.png")


def index(raw, options):
    home = raw / "ModelNet40" if (raw / "ModelNet40").is_dir() else raw
    found = {}                                                     # (class, part, name): {view number: file}
    for path in home.glob("*/*/*.*"):
        kind, part = path.parts[-3:-1]
        png = PNG.fullmatch(path.name)
        if part in ("train", "test") and path.suffix == ".off":
            found.setdefault((kind, part, path.stem), {})["off"] = path
        elif part in ("train", "test") and png:
            found.setdefault((kind, part, png[1]), {})[int(png[2])] = path
    if not found:
        raise DataError(f"{raw} holds neither <class>/{{train,test}}/*.off nor the twelve-view PNGs")
    classes, items = sorted({key[0] for key in found}), []
    first = min((number for views in found.values() for number in views if number != "off"), default=None)
    for (kind, part, name), views in found.items():
        if "off" in views:
            files = [str(views["off"])]
        else:                                                      # the view opposite is six of twelve further on
            stem = str(next(iter(views.values())))
            files = [re.sub(r"_v(\d+)\.png$", lambda m: f"_v{number:0{len(m[1])}d}.png", stem) for number in (first, first + 6)]
        items.append(Item(f"{kind}/{part}/{name}", classes.index(kind), name, files))
    official = {item.id: 0 if "/train/" in item.id else 2 for item in items}
    modalities = {side: {"kind": "view", "shape": (1, 1, 256, 256)} for side in ("front", "rear")}
    return Index(items, classes, modalities, {"official": official, "clean": official}, EXPECTED)


def decode(item, options):
    if len(item.files) == 1:
        vertices, triangles = read_off(item.files[0])
        try:
            views = [render(vertices, triangles, azimuth) for azimuth in (0, 180)]
        except ValueError as error:
            raise BadFile(item.files[0], str(error)) from None
        if min(view.min() for view in views) == 255:
            raise BadFile(item.files[0], "shows nothing: too thin, or a corner far away from all others")
    else:
        views = [resize(read_picture(path, "L")) for path in item.files]
    return {"front": views[0][None], "rear": views[1][None]}, None
