"""The results as tables in Markdown and in words, from the JSON files of one or more folders alone.

    python -m results.table                # the published runs, those of results/runs
    python -m results.table runs           # your own, of any number of folders
    python -m results.table --ablations    # the ablations too
    python -m results.table --readme       # into README.md, docs/results.svg and the ledger

What cannot be averaged is left out and named on stderr, a line each: a file that is no result, a
seed of which two files say different things, a run whose setting is not that of its row.
"""

import argparse
import functools
import io
import json
import math
import operator
import os
import re
import statistics
import sys
import textwrap
from collections import Counter
from pathlib import Path

import scipy.stats

from data import DataError, exit_codes, whole_file

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "results/runs"
BEGIN, END = "<!-- results.table begins -->", "<!-- results.table ends -->"

JOINT, ENSEMBLE = "joint_baseline.concat", "joint_baseline.ensemble"    # what all is compared with
MAIN = (ENSEMBLE, JOINT, "joint_baseline.auxiliary", "joint_baseline.ogm_ge",
        "joint_baseline.mmpareto", "joint_baseline.dgl", "dimml", "dimml.duc0", "udi",
        "udi.interaction0-0")
LEGEND = f"""\
Test accuracy in %, mean ± standard deviation over n seeds; the number to quote is that of the last
epoch. Differences, to `{JOINT}` and to `{ENSEMBLE}`, are in points,
with a 95 % interval in brackets (Student's t, paired by seed). Where nothing differs, one such
interval in twenty still excludes zero: a method is "shown" to beat the ensemble, or to lose to it,
only after Holm's correction for all methods that are compared on the dataset."""


def warn(message):
    print(f"results.table: {message}", file=sys.stderr)


# ---- reading: anybody's folder, so nothing about a file is taken for granted ---------------------
def text(value):
    return isinstance(value, str)


def name(value):    # of what stands in a line of the table
    return isinstance(value, str) and value.isprintable()


def whole(value):
    return type(value) is int and 0 <= value < 2**32


def number(value):
    return type(value) in (int, float) and abs(value) < 1e15      # nan is no number


def share(value):
    return number(value) and 0 <= value <= 1


def share_or_none(value):
    return value is None or share(value)


SCORE = {"accuracy": share, "macro_f1": share}
RULES = {"last": SCORE, name: SCORE}
SAID = {"predictions": [whole], "confidence": [share]}
RESULT = {    # a name stands for any key
    "method": name, "variant": name, "dataset": name, "split": name, "seed": whole, "val": number,
    "recipe": {text: lambda value: True}, "data": {text: text}, "precision": name, "answer": name,
    "device": text, "seconds": number, "classes": [text], "heads": {name: RULES},
    "modality_heads": {name: RULES}, "probes": {name: share_or_none}, "epochs": [{"epoch": whole}],
    "test": {"labels": [whole], "heads": {name: SAID}, "modality_heads": {name: SAID}},
}


def check(value, shape, where):
    """Raises ValueError, which says where, if a JSON value is not of a shape like those above."""
    if callable(shape):
        if not shape(value):
            raise ValueError(f"{where} is {str(value)[:40]!r}")
    elif not isinstance(value, type(shape)):
        raise ValueError(f"{where} is not a {type(shape).__name__}")
    elif isinstance(shape, list):
        for i, entry in enumerate(value):
            check(entry, shape[0], f"{where}[{i}]")
    else:
        for key, inner in shape.items():
            if callable(key):
                for k in value:
                    check(k, key, f"a name in {where}")
                    check(value[k], inner, f"{where}.{k}")
            elif key not in value:
                raise ValueError(f"{where} has no {key!r}")
            else:
                check(value[key], inner, f"{where}.{key}")


def read(path):
    """A file's result: a dict of schema 2 (docs/result.md). Raises ValueError or OSError, which say
    why, for a file that holds none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a whole JSON file ({error})")
    schema = result.get("schema") if isinstance(result, dict) else None
    if schema != 2:
        raise ValueError(f"its schema is {str(schema)[:40]}, not 2")
    check(result, RESULT, "result")
    test = result["test"]
    if result["answer"] not in result["heads"].keys() & test["heads"].keys():
        raise ValueError(f"its answer {result['answer']!r} is not one of its heads")
    if not test["labels"]:
        raise ValueError("it has no test items")
    for said in (*test["heads"].values(), *test["modality_heads"].values()):
        if {len(said["predictions"]), len(said["confidence"])} != {len(test["labels"])}:
            raise ValueError("its test part has not one prediction for each label")
    right = map(operator.eq, test["heads"][result["answer"]]["predictions"], test["labels"])
    if not math.isclose(statistics.mean(right), answer(result)["last"]["accuracy"], abs_tol=1e-6):
        raise ValueError("the accuracy of its answer is not that of its predictions")
    return result


def load(*folders):
    """{(dataset, split): {row: {seed: result}}} of the runs that may be averaged, a row being a
    method and its variant. Raises DataError where there is no such folder."""
    found = {}
    for folder in folders or [RUNS]:
        folder = Path(os.path.expanduser(folder))
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}")
        for path in sorted(path for path in folder.iterdir() if path.suffix == ".json"):
            try:
                result = read(path)
            except (ValueError, OSError) as error:
                warn(f"{path} is left out: {error}")
                continue
            row = ".".join(filter(None, (result["method"], result["variant"])))
            seeds = found.setdefault((result["dataset"], result["split"]), {}).setdefault(row, {})
            seeds.setdefault(result["seed"], {})[path.resolve()] = result

    runs = {}
    for section, rows in sorted(found.items()):
        for row in sorted(rows, key=position):
            files = {}
            for seed, same_seed in sorted(rows[row].items()):
                (path, first), *others = same_seed.items()
                if all(result == first for _, result in others):        # one file, or its copies
                    files[path] = first
                else:
                    warn(f"{', '.join(map(str, same_seed))} are left out: "
                         f"all are seed {seed} of {row} on {' '.join(section)}")
            results = of_one_setting(files)
            if results:
                runs.setdefault(section, {})[row] = {result["seed"]: result for result in results}
    return runs


def is_ablation(row):
    """Whether a row is one of our scripts' beside the main ones. Those of a fork are none, nor are
    runs of one modality or with the anchor named, which some datasets need."""
    method, _, variant = row.partition(".")
    return (row not in MAIN and method in ("joint_baseline", "dimml", "udi")
            and not variant.startswith(("only-", "anchor-")))


def without_ablations(runs):
    kept = {section: {row: rows[row] for row in rows if not is_ablation(row)}
            for section, rows in runs.items()}
    return {section: rows for section, rows in kept.items() if rows}


def position(row):
    """Main rows first, in their order, then those of other methods, then ablations."""
    return MAIN.index(row) if row in MAIN else len(MAIN) + is_ablation(row), row


def of_one_setting(files):
    """{file: result} of one row -> the results of the setting that most of them share; none where
    two settings are equally frequent. Another commit or device is only warned of."""
    settings = {file: json.dumps(setting(result), sort_keys=True) for file, result in files.items()}
    (most, count), *others = Counter(settings.values()).most_common() or [(None, 0)]
    tie = bool(others) and others[0][1] == count
    kept = {file: result for file, result in files.items() if settings[file] == most}
    for file in [file for file in files if file not in kept]:
        a, b = setting(files[file]), setting(next(iter(kept.values())))
        other = ", ".join(sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key)))
        if tie:
            warn(f"{', '.join(map(str, files))} are left out: no setting is that of most; "
                 f"they differ in {other}")
            return []
        warn(f"{file} is left out: its {other} differs from the rest of its row")
    made = {key: {str(result.get(key)) for result in kept.values()}
            for key in ("commit", "device", "threads", "versions")}
    if unequal := [key for key, values in made.items() if len(values) > 1]:
        warn(f"{', '.join(map(str, kept))}: averaged, but made with another {', '.join(unequal)}")
    return list(kept.values())


def setting(result):
    """What must be the same in runs that are averaged."""
    recipe = {f"--{key.replace('_', '-')}": value for key, value in result["recipe"].items()}
    return {key: result[key] for key in ("data", "val", "precision")} | recipe


# ---- numbers -------------------------------------------------------------------------------------
def answer(result):
    """{rule: scores} of the method's answer."""
    return result["heads"][result["answer"]]


def head(name):
    """A function like `answer` for a head of ours, a control."""
    return lambda result: result["heads"].get(name, {})


def own_head(modality):
    """A function like `answer` for a modality's own head; in the ensemble, the modality alone."""
    return lambda result: result["modality_heads"].get(modality, {})


def accuracy(results, scores=answer, rule="last", measure="accuracy"):
    """{seed: test accuracy in %} under a rule, which a run without val items may not have."""
    rules = {seed: scores(result) for seed, result in results.items()}
    return {seed: 100 * r[rule][measure] for seed, r in rules.items() if rule in r}


def probes(results, modality):
    """{seed: test accuracy in %} of a linear classifier on a modality's frozen encoder."""
    values = {seed: result["probes"].get(modality) for seed, result in results.items()}
    return {seed: 100 * value for seed, value in values.items() if value is not None}


def probe(modality):
    """A function like `accuracy`, of a modality's probe."""
    return functools.partial(probes, modality=modality)


def paired(ours, theirs):
    """{seed: value} twice -> mean difference over the seeds that both have, half of its 95 %
    interval, and their number n. Raises ValueError where they have none in common.

    The interval is Student's for paired samples, t(0.975, n - 1) s / sqrt(n); None for one pair.
    """
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        raise ValueError("no seed has both values")
    n, half = len(differences), None
    if n > 1:
        t = float(scipy.stats.t.ppf(0.975, n - 1))
        half = t * statistics.stdev(differences) / math.sqrt(n)
    return statistics.mean(differences), half, n


def compare(results, base, ours=accuracy, theirs=accuracy):
    """`paired` for two rows' {seed: result}, each by its measure.

    They must share data, precision and how long the encoders are trained; all else is the method.
    Raises ValueError, which says why, where they cannot be compared.
    """
    a, b = (setting(next(iter(runs.values()))) for runs in (results, base))
    same = ("data", "val", "precision", "--epochs", "--batch-size", "--lr", "--lr-step")
    other = [key for key in same if key in a and key in b and a[key] != b[key]]
    if other:
        raise ValueError(f"different {', '.join(other)}")
    return paired(ours(results), theirs(base))


# ---- tables --------------------------------------------------------------------------------------
def mean_std(values, n):
    """Mean of {seed: value}, and the standard deviation over runs where there is more than one;
    their number where it is not n."""
    values = list(values.values())
    if not values:
        return ""
    std = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    few = f" (n = {len(values)})" if len(values) != n else ""
    return f"{statistics.mean(values):.1f}{std}{few}"


def signed(value, plus="+"):
    return f"{round(value, 1) + 0.0:{plus}.1f}".replace("-", "−")    # + 0.0: no "−0.0"


def points(mean, half, plus="+"):
    """A mean difference and its interval: "+1.2 [+0.3, +2.1]"; without a plus "1.2 [0.3, 2.1]"."""
    if half is None:
        return signed(mean, plus)
    return f"{signed(mean, plus)} [{signed(mean - half, plus)}, {signed(mean + half, plus)}]"


def lines(rows):
    """The lines of a table, (label, results, function like `answer`): each modality of the ensemble
    alone, every row's answer, and its other heads of ours, which are controls."""
    for row, results in rows.items():
        some = next(iter(results.values()))
        if row == ENSEMBLE:
            for m in some["modality_heads"]:
                yield f"{m} alone", results, own_head(m)
        yield f"`{row}`", results, answer
        for control in some["heads"]:
            if control != some["answer"]:
                yield f"`{row}`, {control}", results, head(control)


def modalities(rows):
    """The modalities' names, in the dataset's order."""
    results = [result for seeds in rows.values() for result in seeds.values()]
    return list(dict.fromkeys(m for result in results for m in result["probes"]))


def markdown(header, body):
    table = [header, ["---"] * len(header), *body]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n"
                   for row in table)


def overview(runs):
    """One table: a row a method, a column a dataset, the mean answer in each cell. Its first rows:
    the first modality of each dataset alone, the second one alone, and so on."""
    columns, depth = {}, 0
    for section, rows in runs.items():
        n = Counter(map(len, rows.values())).most_common(1)[0][0]
        columns[section] = column = {"method": f"{', '.join(section)} (n = {n})"}
        for row, results in rows.items():
            column[f"`{row}`"] = mean_std(accuracy(results), n)
            try:
                compare(results, rows.get(ENSEMBLE, results))
            except ValueError:
                column[f"`{row}`"] += " †"
        alone = next(iter(rows.get(ENSEMBLE, {}).values()), {"modality_heads": {}})
        for i, m in enumerate(alone["modality_heads"], 1):
            depth = max(depth, i)
            column[f"modality {i} alone"] = (
                f"{m} {mean_std(accuracy(rows[ENSEMBLE], own_head(m)), n)}")
    order = sorted({row for rows in runs.values() for row in rows}, key=position)
    labels = [*(f"modality {i + 1} alone" for i in range(depth)), *(f"`{row}`" for row in order)]
    header, *body = ([label, *(column.get(label, "") for column in columns.values())]
                     for label in ("method", *labels))
    shown = markdown(header, body)
    why = "not compared with the ensemble: other data, other training, or no seed in common"
    return shown + f"\n† {why}.\n" * ("†" in shown)


def details(section, rows):
    """A dataset's table: each answer under three rules, compared, and what the encoders learned."""
    body = []
    for label, results, scores in lines(rows):
        ours, n = functools.partial(accuracy, scores=scores), len(results)
        cells = [label, str(n)]
        measured = [ours(results, rule=rule) for rule in ("last", "best_val", "best_test")]
        measured.append(ours(results, measure="macro_f1"))
        cells += [mean_std(values, n) for values in measured]
        for base in (JOINT, ENSEMBLE):
            if base not in rows or label == f"`{base}`":
                cells.append("" if base in rows else "not run")
                continue
            try:
                mean, half, pairs = compare(results, rows[base], ours)
                cells.append(points(mean, half) + ("" if pairs == n else f", n = {pairs}"))
            except ValueError as why:
                cells.append(str(why))
        for m in modalities(rows):
            cells.append(mean_std(probes(results, m), n) if scores is answer else "")
        body.append(cells)
    return markdown(["method", "n", "last", "best val", "best test", "macro-F1", "last − joint",
                     "last − ensemble", *(f"{m} probe" for m in modalities(rows))], body)


# ---- words ---------------------------------------------------------------------------------------
def cost_of_joint_training(rows):
    """How much less each encoder has learned jointly than alone, by its probe: sentences."""
    missing = " and no ".join(f"`{row}`" for row in (JOINT, ENSEMBLE) if row not in rows)
    if missing:
        return [f"What joint training costs an encoder is not known: there is no {missing}."]
    costs, others = [], []
    for m in modalities(rows):
        try:
            mean, half, n = compare(rows[ENSEMBLE], rows[JOINT], probe(m), probe(m))
        except ValueError as why:
            others.append(f"What joint training costs the {m} encoder is not known: {why}.")
            continue
        cost = f"{points(mean, half, '-')} points (n = {n})"
        if half is None:
            lost = signed(mean, "-")
            others.append(f"One seed: {lost} points for the {m} encoder, which shows nothing.")
        elif mean - half > 0:
            costs.append((mean, f"Joint training costs the {m} encoder {cost}."))
        elif mean + half < 0:
            gain = f"{points(-mean, half, '-')} points more (n = {n})"
            others.append(f"Joint training teaches the {m} encoder {gain}.")
        else:
            others.append(f"No cost is shown for the {m} encoder: {cost}.")
    return [said for _, said in sorted(costs, reverse=True)] + others


def against_ensemble(rows):
    """Which methods are shown to beat the ensemble of single modalities, and which to lose to it:
    sentences, the verdict first. Shown: by a paired t-test at 5 % for all comparisons together
    (Holm); a single seed, or seeds that all differ by the same, show nothing."""
    if ENSEMBLE not in rows:
        return [f"Whether a method beats the ensemble is not known: there is no `{ENSEMBLE}`."]
    compared, apart = {}, {}
    for row, results in rows.items():
        if row == ENSEMBLE:
            continue
        try:
            mean, half, n = compare(results, rows[ENSEMBLE])
            if half is not None:
                t = abs(mean) / half * scipy.stats.t.ppf(0.975, n - 1) if half > 1e-9 else 0
                compared[row] = 2 * float(scipy.stats.t.sf(t, n - 1)), mean, half
                continue
            why = "one seed"
        except ValueError as error:
            why = str(error)
        apart.setdefault(why, []).append(f"`{row}`")
    shown, better, worse, level = set(), [], [], []
    for rank, (p, row) in enumerate(sorted((p, row) for row, (p, *_) in compared.items())):
        if p * (len(compared) - rank) > 0.05:
            break
        shown.add(row)
    for row, (_, mean, half) in compared.items():
        group = level if row not in shown else better if mean > 0 else worse
        group.append(f"`{row}` {points(mean, half)}" if group is not level else f"`{row}`")
    if not compared:
        said = ["Whether a method beats the ensemble is not known."]
    elif better:
        said = [f"Shown to beat the ensemble, of {len(compared)} methods: {', '.join(better)}."]
    else:
        said = [f"Of {len(compared)} methods none is shown to beat the ensemble."]
    said += [f"Shown to lose to it: {', '.join(worse)}."] * bool(worse)
    said += [f"Not told apart from it: {', '.join(level)}."] * bool(level)
    return said + [f"Not compared, {why}: {', '.join(group)}." for why, group in apart.items()]


def words(section, rows):
    """What a dataset's runs say, in one line."""
    return " ".join([f"**{', '.join(section)}.**", *cost_of_joint_training(rows),
                     *against_ensemble(rows)])


def readme(runs):
    """What README shows: the overview, and of each dataset what joint training costs and whether a
    method is shown to beat the ensemble."""
    said = [" ".join([f"**{', '.join(section)}.**", *cost_of_joint_training(rows),
                      against_ensemble(rows)[0]]) for section, rows in runs.items()]
    return overview(runs) + "".join(f"\n{textwrap.fill(line, 100, break_long_words=False)}\n"
                                    for line in said)


# ---- the ledger ----------------------------------------------------------------------------------
BEST = "best test epoch less last"
EFFECTS = {     # of its lines: what is measured, a row and a rule less another row and rule
    "D4": (BEST, "dimml", "best_test", "dimml", "last"),
    "J3": (BEST, "joint_baseline.ogm_ge", "best_test", "joint_baseline.ogm_ge", "last"),
    "U3": ("CKA less CLUB", "udi.cka", "last", "udi", "last"),
    "U4": ("fixed at 1/2 less moving", "udi.interaction0.5-0.5", "last", "udi", "last"),
    "U5": ("stage 1 less scratch", "udi.stage1", "last", "udi", "last"),
}


def effects(runs):
    """{line of the ledger: what the runs, ablations too, say of its effect}."""
    said = {}
    for line, (what, ours, rule, base, base_rule) in EFFECTS.items():
        a, b = (functools.partial(accuracy, rule=r) for r in (rule, base_rule))
        found = [(dataset, *compare(rows[ours], rows[base], a, b))
                 for (dataset, _), rows in runs.items() if {ours, base} <= rows.keys()]
        if found:
            said[line] = f"{what}, points: " + "; ".join(
                f"{dataset} {points(mean, half)} (n = {n})" for dataset, mean, half, n in found)
    return said


def put_effects(said, page):
    """Puts what is said of lines of the ledger into the last cells of these lines."""
    text = page.read_text(encoding="utf-8")
    for line, cell in said.items():
        text = re.sub(rf"^(\| {line} \|.*\|)[^|]*\|$", rf"\1 {cell} |", text, flags=re.M)
    with whole_file(page) as file:
        file.write(text.encode())


# ---- the picture ---------------------------------------------------------------------------------
def picture(runs):
    """An SVG, as bytes: test accuracy of four methods' answers beside each encoder's probe, mean
    and standard deviation. Without a background and in a middle grey, for white and for black."""
    import matplotlib
    from matplotlib.figure import Figure
    grey, methods = "#7d8590", {JOINT: ("joint", "#d55e00"), ENSEMBLE: ("ensemble", "#999999"),
                                "dimml": ("DI-MML", "#2b8cd6"), "udi": ("UDI", "#009e73")}
    settings = {"svg.fonttype": "path", "svg.hashsalt": "nanoMML", "font.size": 9,
                "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
    settings |= {f"{what}.color": grey for what in ("text", "xtick", "ytick")}
    settings |= {"axes.edgecolor": grey, "axes.labelcolor": grey}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9, 2.7), layout="constrained")
        axes = figure.subplots(1, len(runs), squeeze=False)[0]
        for ax, (section, rows) in zip(axes, runs.items()):
            groups = {"answer": accuracy} | {f"{m}\nencoder": probe(m) for m in modalities(rows)}
            for k, (row, (label, colour)) in enumerate(methods.items()):
                for x, measure in enumerate(groups.values()):
                    values = list(measure(rows.get(row, {})).values())
                    if values:
                        std = statistics.stdev(values) if len(values) > 1 else None
                        ax.bar(x + 0.2 * (k - 1.5), statistics.mean(values), 0.18, yerr=std,
                               color=colour, ecolor=grey, error_kw={"elinewidth": 0.8})
            ax.set_xticks(range(len(groups)), groups)
            ax.tick_params(axis="x", length=0)
            ax.set(title=", ".join(section), ylim=(0, 100))
        axes[0].set_ylabel("test accuracy, %")
        handles = [matplotlib.patches.Patch(color=colour) for _, colour in methods.values()]
        figure.legend(handles, [label for label, _ in methods.values()], loc="outside upper center",
                      ncols=4, frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        return file.getvalue()


def put_between(begin, end, text, page):
    """Puts a text between two lines of a page, written whole. Raises DataError if the lines
    do not stand there once each."""
    old = page.read_text(encoding="utf-8")
    if not (old.count(begin) == old.count(end) == 1 and old.index(begin) < old.index(end)):
        raise DataError(f"{page}: it has not the two lines {begin} and {end} once each")
    with whole_file(page) as file:
        file.write(f"{old.split(begin)[0]}{begin}\n{text}{end}{old.split(end)[1]}".encode())


def main(argv=None):
    parser = argparse.ArgumentParser("python -m results.table", description="Tables of results.")
    parser.add_argument("folders", nargs="*", metavar="DIR", help="(default: results/runs)")
    parser.add_argument("--ablations", action="store_true", help="show them too")
    parser.add_argument("--readme", action="store_true", help="write README and ledger")
    args = parser.parse_args(argv)
    if args.readme and args.folders:
        raise DataError("--readme shows the published runs: give no DIR with it")
    runs = load(*args.folders)
    said = effects(runs) if args.readme else {}
    hidden = {row for rows in runs.values() for row in rows if is_ablation(row)}
    if hidden and not args.ablations:
        warn(f"ablations that are not shown without --ablations: {', '.join(sorted(hidden))}")
        runs = without_ablations(runs)
    if not runs:
        raise DataError(f"no runs to show in {', '.join(args.folders) or RUNS}")
    if args.readme:
        drawn = picture(runs)
        put_between(BEGIN, END, readme(runs), ROOT / "README.md")
        with whole_file(ROOT / "docs/results.svg") as file:
            file.write(drawn)
        put_effects(said, ROOT / "results/DEVIATIONS.md")
        return
    print(overview(runs))
    print(LEGEND)
    for section, rows in runs.items():
        print(f"\n{words(section, rows)}\n\n{details(section, rows)}", end="")


if __name__ == "__main__":
    with exit_codes("results.table"):
        main()
