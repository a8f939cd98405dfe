"""ModelNet40: 12,311 meshes of 40 kinds of object, seen from two opposite sides.

Raw: ModelNet40/<class>/{train,test}/<name>.off, rendered here: elevation 30; `front` is azimuth 0,
`rear` 180. One grey channel: the renders have no colour.

official = clean  9,843 / 2,468 as the folders say; no object stands in both
"""

from data.media import BadFile, read_off, render
from data.prepare import Index, Item, find_files, find_folder
from data.store import PARTS

EXPECTED = {"official": (9843, 0, 2468)}       # train, val, test
N_CLASSES = 40
AZIMUTHS = {"front": 0, "rear": 180}


def index(raw):
    folder, items, official = find_folder(raw, "ModelNet40"), [], {}
    for part in ("train", "test"):
        for path in find_files(folder, f"*/{part}/*.off"):
            kind = path.parts[-3]
            name = f"{kind}/{part}/{path.stem}"
            items.append(Item(name, kind, path.stem, [str(path)]))
            official[name] = PARTS[part]
    classes = sorted({item.label for item in items})
    for item in items:
        item.label = classes.index(item.label)
    modalities = {view: {"kind": "rgb", "shape": (1, 1, 256, 256)} for view in AZIMUTHS}
    return Index(items, classes, modalities, {"official": official, "clean": official}, EXPECTED)


def decode(item):
    path, = item.files
    vertices, triangles = read_off(path)
    try:
        views = {name: render(vertices, triangles, azimuth)[None]
                 for name, azimuth in AZIMUTHS.items()}
    except ValueError as error:
        raise BadFile(path, str(error)) from None
    if min(view.min() for view in views.values()) == 255:
        raise BadFile(path, "shows nothing: too thin, or a corner far away from all others")
    return views, None
