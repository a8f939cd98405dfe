"""Whether a prepared dataset is whole: every file against the SHA-256 noted when it was written.

    python -m data.verify ave

prints a line a file and ends with exit code 2 if one is damaged: missing, cut, enlarged, changed,
or holding features that are not finite. Then labels, groups, splits and ids must fit each other and
the counts in meta.json.

Nothing vouches for meta.json itself. A change there is found where it disagrees with the arrays;
class names, a modality's options (scale, mean, ...) and the notes can be changed unseen. So its own
SHA-256 is printed: compare it with the one that whoever gave you the folder has.
"""

import argparse
import os
from pathlib import Path

from tqdm import tqdm

from data import find_prepared, store
from data.errors import DataError
from data.run import exit_codes


def fault(folder, name, digest, progress):
    """What is wrong with one file of a prepared folder, None if nothing is."""
    try:
        read = store.read_array if name.endswith(".npy") else store.read_text
        content = read(folder, name)
        if store.sha256(store.own_file(folder, name), progress) != digest:
            return "changed: its SHA-256 is not the one in meta.json"
    except (DataError, OSError) as error:
        return f"damaged: {error}"
    if name.endswith(".npy") and content.dtype.kind == "f" and (bad := store.not_finite(content)):
        return (f"damaged: features that are not finite in {len(bad)} items, the first number "
                f"{bad[0]}")
    return None


def verify(folder):
    """Check every file of a prepared folder, with a printed line each. Raises DataError."""
    folder = Path(os.path.expanduser(folder))
    meta, faults = store.read_meta(folder), 0
    width = max(map(len, meta["sha256"]))
    paths = [folder / name for name in meta["sha256"]]
    size = sum(path.lstat().st_size for path in paths if path.exists())
    with tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for name, digest in meta["sha256"].items():
            wrong = fault(folder, name, digest, bar.update)
            bar.write(f"{name:{width}}  {wrong or 'ok'}")
            faults += wrong is not None
    if faults:
        raise DataError(f"{folder}: {faults} of {len(meta['sha256'])} files are not what was "
                        "prepared (named above): copy them again, or prepare the dataset again")
    store.read(folder)
    own = store.sha256(store.own_file(folder, "meta.json"))
    print(f"{'meta.json':{width}}  agrees with them; its own SHA-256 is {own}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m data.verify", description="Check a prepared dataset against its SHA-256 sums.")
    parser.add_argument("name", help="a name under --data-dir or the path of a prepared folder")
    parser.add_argument("--data-dir", default="datasets",
                        help="where prepared datasets lie (default: %(default)s)")
    args = parser.parse_args(argv)
    with exit_codes(parser.prog):
        verify(find_prepared(args.name, args.data_dir))


if __name__ == "__main__":
    main()
