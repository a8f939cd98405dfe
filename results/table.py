"""The results as tables in Markdown and in words, from the JSON files of one or more folders alone.

    python -m results.table                # the published runs, those of results/runs
    python -m results.table runs           # your own, of any number of folders
    python -m results.table --readme       # into README.md and docs/results.svg

What cannot be averaged is left out and named on stderr: a file that is no result, a row of which
two files hold one seed or whose runs have not one setting.
"""

import argparse
import functools
import io
import itertools
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats

from data import exit_codes, whole_file
from data.store import check

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "results/runs"
BEGIN, END = "<!-- results.table begins -->", "<!-- results.table ends -->"

OURS = ("joint_baseline", "balance", "dimml", "udi")
JOINT, ENSEMBLE = "joint_baseline.concat", "joint_baseline.ensemble"    # what all is compared with
CALIBRATED = "calibrated"       # the ensemble's head that counts as a row
MAIN = (ENSEMBLE, JOINT, "joint_baseline.film", "joint_baseline.gated", "balance.auxiliary",
        "balance.ogm_ge", "balance.mmpareto", "balance.dgl", "dimml", "dimml.duc0", "udi",
        "udi.interaction0-0")
MAIN_ON = {"joint_baseline.film": "synergy", "joint_baseline.gated": "synergy"}     # there alone
QUESTIONS = (       # what a practitioner asks: a row's answer, or another head, less another's
    ("Should I calibrate the ensemble?", (ENSEMBLE, CALIBRATED), (ENSEMBLE, None)),
    ("Should I train jointly?", (JOINT, None), (ENSEMBLE, None)),
    ("When must I train jointly?", ("joint_baseline.gated", None), (ENSEMBLE, None)),
    ("Does a cure help joint training?", ("balance.auxiliary", None), (JOINT, None)),
    ("Does a cure help joint training?", ("balance.ogm_ge", None), (JOINT, None)),
    ("Does a cure help joint training?", ("balance.mmpareto", None), (JOINT, None)),
    ("Does a cure help joint training?", ("balance.dgl", None), (JOINT, None)),
    ("Is DI-MML worth it?", ("dimml", None), (ENSEMBLE, None)),
    ("Is DI-MML worth it?", ("dimml", None), (ENSEMBLE, CALIBRATED)),
    ("Is its DUC loss worth it?", ("dimml", None), ("dimml.duc0", None)),
    ("Is UDI worth it?", ("udi", None), (ENSEMBLE, None)),
    ("Is UDI worth it?", ("udi", None), (ENSEMBLE, CALIBRATED)),
    ("Is its guidance worth it?", ("udi", None), ("udi.interaction0-0", None)),
)
LEGEND = f"""\
Test accuracy in %, mean ± standard deviation over n seeds; the number to quote is that of the last
epoch. Differences, to `{JOINT}` and to `{ENSEMBLE}`, are in points,
with a 95 % interval in brackets (Student's t, paired by seed). Intervals tell how far the seeds
differ and hold for these test items; where nothing differs, one in twenty still excludes zero.
Joint training against the ensemble is the one planned comparison. All other rows are a family: one
is "shown" to beat the ensemble, or to lose to it, only after Holm's correction, within one dataset
and one of the two ensembles, plain and calibrated. A true gain of the smallest size that these
seeds could have shown would be shown about half the time."""


def warn(message):
    print(f"results.table: {message}", file=sys.stderr)


# ---- reading -------------------------------------------------------------------------------------
def read(path):
    """A file's result: a dict of schema 2 or 3 (docs/result.md). Raises one of many kinds of error
    for a file that holds none."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["schema"] not in (2, 3):
        raise ValueError(f"its schema is {result['schema']}, not 2 or 3")
    for key, kind in {"recipe": dict, "data": dict, "probes": dict, "modality_heads": dict,
                      "classes": list, "epochs": list, "seed": int, "seconds": float,
                      "precision": str}.items():
        if not isinstance(result.get(key), kind) or result[key] == []:
            raise ValueError(f"its entry {key} is missing or of another kind")
    answer = result["answer"]
    predictions = result["test"]["heads"][answer]["predictions"]
    pairs = zip(predictions, result["test"]["labels"], strict=True)
    right = statistics.fmean(said == label for said, label in pairs)
    if not abs(right - result["heads"][answer]["last"]["accuracy"]) < 1e-6:
        raise ValueError("the accuracy of its answer is not that of its predictions")
    return result


def setting(result):
    """What must be the same in runs that are averaged."""
    return {key: result[key] for key in ("data", "val", "precision")} | result["recipe"]


def differing(ours, theirs):
    """The settings that two results both have and in which they differ. Older results may have
    entries that newer ones lack."""
    a, b = setting(ours), setting(theirs)
    return [key for key in a if key in b and a[key] != b[key]]


def made_with(key, result):
    """What a result says of its making, as text; of its code the digests alone, not the epochs."""
    if key == "code":
        return str(sorted({stretch["sha256"] for stretch in result.get(key, ())}))
    return str(result.get(key))


def read_folder(folder):
    """{(dataset, split): {row: {seed: result}}} of the runs in a folder that may be averaged.

    The splits fold0, fold1, .. of a dataset count as one split, "folds", its seeds being (split,
    seed). Raises DataError where there is no such folder.
    """
    check(folder.is_dir(), f"there is no folder {folder}")
    found, runs = {}, {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = read(path)
            row = ".".join(filter(None, (result["method"], result["variant"])))
            section, seed = (result["dataset"], result["split"]), result["seed"]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            warn(f"{path} is left out: it is no result ({error!r})")
            continue
        if re.fullmatch(r"fold\d+", section[1]):
            section, seed = (section[0], "folds"), (section[1], seed)
        found.setdefault((section, row), []).append((seed, result))

    for (section, row), made in found.items():
        other = set()
        for (seed, ours), (their_seed, theirs) in itertools.combinations(made, 2):
            other.update(differing(ours, theirs))
            if ours["schema"] == theirs["schema"]:
                other.update(setting(ours).keys() ^ setting(theirs).keys())
            if seed == their_seed and ours != theirs:
                other.add(f"what they say of seed {seed}")
        if other:
            warn(f"{row} on {', '.join(section)} is left out: its runs in {folder} differ in "
                 f"{', '.join(sorted(other))}: keep those of one setting there")
        else:
            runs.setdefault(section, {})[row] = dict(sorted(dict(made).items()))
    return runs


def load(*folders):
    """`read_folder` of one or more folders (none: the published runs), rows in their order. Where
    two folders hold one row, the folder that is named first has it."""
    runs, ordered = {}, {}
    for folder in dict.fromkeys(Path(folder).expanduser() for folder in folders or [RUNS]):
        for section, rows in read_folder(folder).items():
            for row, results in rows.items():
                if results != runs.setdefault(section, {}).setdefault(row, results):
                    warn(f"{row} on {', '.join(section)}: a folder named before {folder} has this "
                         "row, and that is shown")
    for section, rows in sorted(runs.items()):
        ordered[section] = {}
        for row in sorted(rows, key=lambda row: place(row, is_ablation(row, section[0]))):
            ordered[section][row] = rows[row]
            for key in ("commit", "code", "device", "threads", "versions"):
                if len({made_with(key, result) for result in rows[row].values()}) > 1:
                    warn(f"{row} on {', '.join(section)}: averaged, but made with another {key}")
    return ordered


# ---- which rows there are ------------------------------------------------------------------------
def main_rows(dataset):
    """The names of a dataset's main rows, in their order."""
    return [row for row in MAIN if MAIN_ON.get(row, dataset) == dataset]


def is_ablation(row, dataset):
    """Whether a row is one of our scripts' beside the main ones. Those of a fork are none, nor are
    runs of one modality or with the anchor named, which some datasets need."""
    method, _, variant = row.partition(".")
    return (method in OURS and row not in main_rows(dataset)
            and not variant.startswith(("only-", "anchor-")))


def place(row, ablation):
    """Sorts main rows first, in their order, then those of other methods, then ablations."""
    return ablation, MAIN.index(row) if row in MAIN and not ablation else len(MAIN), row


def without_ablations(runs):
    main = {}
    for section, rows in runs.items():
        for row, results in rows.items():
            if not is_ablation(row, section[0]):
                main.setdefault(section, {})[row] = results
    return main


# ---- numbers -------------------------------------------------------------------------------------
def accuracy(results, head=None, rule="last", measure="accuracy"):
    """{seed: test accuracy in %} of a head, by its name (None: the method's answer), under a rule,
    which a run without validation items may not have."""
    values = {}
    for seed, result in results.items():
        heads = result["heads"] | result["modality_heads"]
        rules = heads.get(head or result["answer"], {})
        if rule in rules:
            values[seed] = 100 * rules[rule][measure]
    return values


def head(name):
    """A function like `accuracy`, of one head."""
    return functools.partial(accuracy, head=name)


def probe(modality):
    """A function like `accuracy`, of a linear classifier on a modality's frozen encoder."""
    def probes(results):
        return {seed: 100 * result["probes"][modality] for seed, result in results.items()
                if modality in result["probes"]}
    return probes


class Difference(NamedTuple):
    """Of n paired values: mean, 95 % interval, standard deviation, p of a two-sided t-test."""
    mean: float
    low: float
    high: float
    std: float
    p: float
    n: int


def paired(ours, theirs):
    """{seed: value} twice -> the Difference over the seeds that both have. One seed, or seeds that
    all differ by the same, show nothing: p is 1. Raises ValueError where they have no seed in
    common."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        raise ValueError("no seed in common")
    n, mean = len(differences), statistics.mean(differences)
    std = statistics.stdev(differences) if n > 1 else 0.0
    if std < 1e-9:
        return Difference(mean, mean, mean, 0.0, 1.0, n)
    test = scipy.stats.ttest_1samp(differences, 0)
    low, high = test.confidence_interval(0.95)
    return Difference(mean, float(low), float(high), std, float(test.pvalue), n)


def compare(results, base, ours=accuracy, theirs=accuracy):
    """`paired` for two rows' {seed: result}, each by its measure.

    They must share data, precision and how long the encoders are trained; all else is the method.
    Raises ValueError, which says why, where they cannot be compared.
    """
    same = ("data", "val", "precision", "epochs", "batch_size", "lr", "lr_step")
    if not base:
        raise ValueError("there is no row to compare with")
    for seed in results.keys() & base.keys():
        other = [key for key in differing(results[seed], base[seed]) if key in same]
        if other:
            raise ValueError(f"different {', '.join(other)}")
    return paired(ours(results), theirs(base))


def holm(p_values, level=0.05):
    """{row: p} -> the rows that are shown at a level which holds for all of them together."""
    shown = []
    for rank, row in enumerate(sorted(p_values, key=p_values.get)):
        if p_values[row] * (len(p_values) - rank) > level:
            break
        shown.append(row)
    return shown


def smallest_gain(differences, m):
    """What these seeds could have shown in a family of m rows, in points: the median of
    t(1 - 0.05 / 2m, n - 1) std / sqrt(n)."""
    share = 1 - 0.05 / (2 * m)
    return statistics.median(scipy.stats.t.ppf(share, d.n - 1) * d.std / math.sqrt(d.n)
                             for d in differences)


def right_alone(results, ensemble, head=None):
    """Who was right alone: {cell: (items that a row's head gets right, items)}, over all its runs.

    A test item's cell says which encoders, each trained alone, get it right: "only audio", ..,
    "both" ("several" of more than two), "neither" ("none"). It is taken from the ensemble of the
    next seed, for the last that of the first: items on which the encoders of the same seed happen
    to fail would show a synergy that is not there. Raises ValueError where there is no such seed.
    """
    counts = {}
    for result in results.values():
        others = {other["seed"]: other["test"] for other in ensemble.values()
                  if other["split"] == result["split"] and other["seed"] != result["seed"]}
        if not others:
            raise ValueError("there is no ensemble of another seed")
        test = others[min([seed for seed in others if seed > result["seed"]] or others)]
        labels = np.array(test["labels"])
        if labels.tolist() != result["test"]["labels"]:
            raise ValueError("other test items")
        alone = {m: said["predictions"] == labels for m, said in test["modality_heads"].items()}
        able = sum(alone.values())          # how many encoders get an item right
        cells = {f"only {m}": alone[m] & (able == 1) for m in alone}
        some, no = ("both", "neither") if len(alone) == 2 else ("several", "none")
        cells |= {some: able > 1, no: able == 0}
        right = result["test"]["heads"][head or result["answer"]]["predictions"] == labels
        for cell, items in cells.items():
            hits, total = counts.get(cell, (0, 0))
            counts[cell] = hits + int(right[items].sum()), total + int(items.sum())
    return counts


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


def points(d, plus="+"):
    """A Difference as "+1.2 [+0.3, +2.1]"; without a plus "1.2 [0.3, 2.1]"; of one seed, or where
    all seeds differ by the same, "+1.2"."""
    interval = f" [{signed(d.low, plus)}, {signed(d.high, plus)}]" if d.std else ""
    return signed(d.mean, plus) + interval


def modalities(rows):
    """The modalities' names, in the dataset's order."""
    return list(dict.fromkeys(m for results in rows.values() for result in results.values()
                              for m in result["probes"]))


def heads(results, group="heads"):
    """The names of a row's heads: its own, or with "modality_heads" those of the modalities."""
    return list(dict.fromkeys(name for result in results.values() for name in result[group]))


def lines(rows):
    """(label, results, head) of all that a dataset's table shows: each modality of the ensemble
    alone, every row's answer, and its other heads, which are controls."""
    for row, results in rows.items():
        if row == ENSEMBLE:
            for m in heads(results, "modality_heads"):
                yield f"{m} alone", results, m
        yield f"`{row}`", results, None
        answer = next(iter(results.values()))["answer"]
        for control in heads(results):
            if control != answer:
                yield f"`{row}`, {control}", results, control


def answers(rows):
    """Those `lines` that count as a row: every answer, and the calibrated ensemble."""
    return [line for line in lines(rows) if line[2] in (None, CALIBRATED)]


def markdown(header, body):
    text = ""
    for row in (header, ["---"] * len(header), *body):
        cells = [cell.replace("|", r"\|") for cell in row]
        text += f"| {' | '.join(cells)} |\n"
    return text


def most_runs(rows):
    """How many runs a row has; where rows have different numbers, the largest."""
    return max(map(len, rows.values()))


def title(section, rows):
    return f"{', '.join(section)} (n = {most_runs(rows)})"


def overview(runs):
    """One table: a row a method, a column a dataset, the mean answer in each cell. Its first rows:
    the first modality of each dataset alone, the second one alone, and so on."""
    columns, alone, main = [], [], set()
    for (dataset, split), rows in runs.items():
        n = most_runs(rows)
        column = {"method": title((dataset, split), rows)}
        ensemble = rows.get(ENSEMBLE, {})
        for i, m in enumerate(heads(ensemble, "modality_heads"), 1):
            column[f"modality {i} alone"] = f"{m} {mean_std(accuracy(ensemble, m), n)}"
        alone = max(alone, list(column)[1:], key=len)
        for label, results, name in answers(rows):
            column[label] = mean_std(accuracy(results, name), n)
        columns.append(column)
        main.update(row for row in rows if not is_ablation(row, dataset))

    # a row that is a main one on some of the datasets stands among the main ones
    every = {row for rows in runs.values() for row in rows}
    labels = ["method", *alone]
    for row in sorted(every, key=lambda row: place(row, row not in main)):
        labels += [label for label in (f"`{row}`", f"`{row}`, {CALIBRATED}")
                   if any(label in column for column in columns)]
    header, *body = ([label, *(column.get(label, "") for column in columns)] for label in labels)
    return markdown(header, body)


def details(rows):
    """A dataset's table: each answer under three rules, compared, what the encoders learned, and
    what a run costs."""
    body = []
    for label, results, name in lines(rows):
        n = len(results)
        cells = [label, str(n)]
        for rule in ("last", "best_val", "best_test"):
            cells.append(mean_std(accuracy(results, name, rule), n))
        cells.append(mean_std(accuracy(results, name, measure="macro_f1"), n))
        for base in (JOINT, ENSEMBLE):
            try:
                d = compare(results, rows.get(base, {}), head(name))
                few = "" if d.n == n else f", n = {d.n}"
                cells.append(points(d) + few if label != f"`{base}`" else "")
            except ValueError as why:
                cells.append(str(why))
        for m in modalities(rows):
            cells.append(mean_std(probe(m)(results), n) if name is None else "")
        cells += cost_of_a_run(results) if name is None else ["", "", ""]
        body.append(cells)
    header = ["method", "n", "last", "best val", "best test", "macro-F1", "last − joint",
              "last − ensemble", *(f"{m} probe" for m in modalities(rows)), "minutes a run",
              "s an epoch", "GPU memory"]
    if not any(cells[-1] for cells in body):        # all on a CPU
        header, *body = (cells[:-1] for cells in (header, *body))
    return markdown(header, body)


def cost_of_a_run(results):
    """Minutes of the fastest run (other work on the machine slows some), seconds an epoch of it
    with its evaluation, and the largest peak memory on a GPU, as text."""
    fastest = min(results.values(), key=lambda result: result["seconds"])
    memory = max(result.get("peak_memory") or 0 for result in results.values())
    return [f"{fastest['seconds'] / 60:.1f}",
            f"{fastest['seconds'] / len(fastest['epochs']):.1f}",
            f"{memory / 2**30:.1f} GiB" if memory else ""]


# ---- words ---------------------------------------------------------------------------------------
def costs(rows):
    """What joint training costs each encoder: {modality: Difference of the probe, trained alone
    less jointly}; None for one that is not shown to be better than guessing when trained alone, and
    so has nothing to lose. Raises ValueError as `compare` does."""
    joint, ensemble = rows.get(JOINT, {}), rows.get(ENSEMBLE, {})
    guessing = {seed: 100 / len(result["classes"]) for seed, result in ensemble.items()}
    lost = {}
    for m in modalities({JOINT: joint}):
        lost[m] = compare(ensemble, joint, probe(m), probe(m))
        above = paired(probe(m)(ensemble), guessing)
        if above.n > 1 and above.low <= 0:
            lost[m] = None
    return lost


def joint_against_ensemble(rows):
    """How much less each encoder has learned jointly than alone, by its probe, and the one planned
    comparison, a t-test at 5 % of its own: sentences."""
    missing = [f"`{row}`" for row in (JOINT, ENSEMBLE) if row not in rows]
    if missing:
        return [f"What joint training costs is not known: no run of {' or '.join(missing)}."]
    try:
        answer, lost = compare(rows[JOINT], rows[ENSEMBLE]), costs(rows)
    except ValueError as why:
        return [f"What joint training costs is not known: {why}."]
    if answer.n == 1:
        return ["What joint training costs is not known: one seed shows nothing."]

    said = []
    for m, d in lost.items():
        if d is None:
            said.append(f"The {m} encoder has nothing to lose: trained alone it is not shown to be "
                        "better than guessing.")
            continue
        cost = f"{points(d, '-')} points (n = {d.n})."
        if d.p > 0.05:
            said.append(f"No cost is shown for the {m} encoder: {cost}")
        elif d.mean > 0:
            said.append(f"Joint training costs the {m} encoder {cost}")
        else:
            said.append(f"The {m} encoder gains by joint training, which costs it {cost}")
    verb = "beats the ensemble" if answer.mean > 0 else "loses to the ensemble"
    if answer.p > 0.05:
        verb = "is not shown to differ from the ensemble"
    return [*said, f"Joint training {verb}: {points(answer)} points (n = {answer.n})."]


def family(rows, base=None):
    """All other rows against the ensemble of single modalities, plain or "calibrated":
    {row: Difference} of those that can be compared, which of them are shown to differ, how many
    rows the family has, and {why not: rows} of the rest. A row of one seed, which is to have more,
    counts in the family, so that the others are not judged more mildly until it does."""
    compared, p_values, apart = {}, {}, {}
    for label, results, own in answers(rows):
        named = re.search(r"\.(only|anchor)-", label)       # a part of a row, not its rival
        if label in (f"`{JOINT}`", f"`{ENSEMBLE}`") or named or own and own == base:
            continue
        try:
            d = compare(results, rows.get(ENSEMBLE, {}), head(own), head(base))
            p_values[label] = d.p
            if d.n == 1:
                raise ValueError("one seed")
            compared[label] = d
        except ValueError as why:
            apart.setdefault(f"Not compared, {why}", []).append(label)
    return compared, holm(p_values), len(p_values), apart


def against_ensemble(rows, base=None):
    """Which rows of the `family` are shown to beat the ensemble and which to lose to it: sentences,
    the verdict first."""
    name = f"{base} ensemble" if base else "ensemble"
    compared, shown, m, apart = family(rows, base)
    better, worse, level = [], [], []
    for label, d in compared.items():
        if label not in shown:
            level.append(label)
        else:
            (better if d.mean > 0 else worse).append(f"{label} {points(d)}")

    others = f"{m} other row{'s' * (m > 1)}"
    verdict = f"Of {others} none is shown to beat the {name}"
    if better:
        verdict = f"Shown to beat the {name}, of {others}: {', '.join(better)}"
    if compared:
        verdict += (" (smallest gain that could have been shown: "
                    f"{smallest_gain(compared.values(), m):.1f} points)")
    else:
        verdict = f"Whether another row beats the {name} is not known"
    said = [f"{verdict}."]
    groups = {"Shown to lose to it": worse, "Not shown to differ from it": level, **apart}
    for what, labels in groups.items():
        if labels:
            said.append(f"{what}: {', '.join(labels)}.")
    return said


def paragraph(section, rows):
    """What a dataset's runs say, in one line."""
    rows = {row: results for row, results in rows.items() if not is_ablation(row, section[0])}
    said = [f"**{', '.join(section)}.**"]
    if section[1] == "folds":
        folds = {result["split"] for results in rows.values() for result in results.values()}
        said.append(f"A run is one seed of one fold, of {', '.join(sorted(folds))}.")
    said += joint_against_ensemble(rows) + against_ensemble(rows)
    if CALIBRATED in heads(rows.get(ENSEMBLE, {})):
        said += against_ensemble(rows, CALIBRATED)
    return " ".join(said)


def questions(runs):
    """What a practitioner asks, as a table: a row a question, a column a dataset, from the main
    rows. A question that no dataset's runs answer is left out; without any the text is empty."""
    def difference(rows, d, plus="+"):
        few = f" (n = {d.n})" if d.n != most_runs(rows) else ""
        return points(d, plus) + few

    def lost(rows):
        return ", ".join(f"{m} {difference(rows, d, '-')}" for m, d in costs(rows).items() if d)

    def less(rows, ours, base):
        (row, own), (other, theirs) = ours, base
        d = compare(rows.get(row, {}), rows.get(other, {}), head(own), head(theirs))
        return difference(rows, d)

    def verdict(rows, base):
        compared, shown, m, _ = family(rows, base)
        if not compared:
            return ""
        better = [label for label in shown if compared[label].mean > 0]
        worse = [label for label in shown if compared[label].mean < 0]
        return short(f"beat: {', '.join(better) or 'none'}; lose: {', '.join(worse) or 'none'}; "
                     f"of {m} ({smallest_gain(compared.values(), m):.1f})")

    def short(text):
        return text.replace("joint_baseline.", "").replace("balance.", "")

    def name(row, own):
        return short(f"`{row}`, {own}" if own else f"`{row}`")

    asked = [("What does joint training cost each encoder?", "probe, `ensemble` − `concat`",
              lost, [])]
    for question, ours, base in QUESTIONS:
        asked.append((question, f"{name(*ours)} − {name(*base)}", less, [ours, base]))
    for base in (None, CALIBRATED):
        asked.append(("Which rows are shown to beat the ensemble, which to lose to it?",
                      f"each but `concat`, less {name(ENSEMBLE, base)}", verdict, [base]))

    runs, body, above = without_ablations(runs), [], None
    for question, look_at, answer, of in asked:
        cells = []
        for rows in runs.values():
            try:
                cells.append(answer(rows, *of))
            except ValueError:      # there are no such rows
                cells.append("")
        if any(cells):
            body.append([question if question != above else "", look_at, *cells])
            above = question
    header = ["question", "look at", *itertools.starmap(title, runs.items())]
    return markdown(header, body) if body else ""


def readme(runs):
    """What README shows."""
    return f"{overview(runs)}\n{questions(runs)}"


# ---- the picture ---------------------------------------------------------------------------------
def picture(runs):
    """An SVG, as bytes: test accuracy of a few rows' answers beside each encoder's probe, mean and
    standard deviation. Without a background and in a middle grey, for white and for black."""
    import matplotlib
    from matplotlib.figure import Figure
    grey = "#7d8590"
    bars = {JOINT: ("joint", "#d55e00"), "joint_baseline.gated": ("gated fusion", "#cc79a7"),
            ENSEMBLE: ("ensemble", "#999999"), "dimml": ("DI-MML", "#2b8cd6"),
            "udi": ("UDI", "#009e73")}
    settings = {"svg.fonttype": "path", "svg.hashsalt": "nanoMML", "font.size": 9,
                "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False,
                "text.color": grey, "xtick.color": grey, "ytick.color": grey,
                "axes.edgecolor": grey, "axes.labelcolor": grey}
    # the set that is real and of three modalities first
    sections = sorted(runs, key=lambda section: section[0] != "utdmhad")
    height, legend = -(-len(sections) // 3), {}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9, 0.3 + 2.4 * height), layout="constrained")
        panels = figure.subplots(height, min(3, len(sections)), squeeze=False).ravel()
        for ax in panels[len(sections):]:
            ax.set_axis_off()
        for ax, section in zip(panels, sections):
            rows = runs[section]
            groups = {"answer": accuracy} | {f"{m}\nencoder": probe(m) for m in modalities(rows)}
            there = [row for row in bars if row in rows]
            for k, row in enumerate(there):
                name, colour = bars[row]
                legend[name] = matplotlib.patches.Patch(color=colour)
                for x, measure in enumerate(groups.values()):
                    values = list(measure(rows[row]).values())
                    std = statistics.stdev(values) if len(values) > 1 else None
                    ax.bar(x + 0.8 * ((k + 0.5) / len(there) - 0.5), statistics.mean(values),
                           0.72 / len(there), yerr=std, color=colour, ecolor=grey,
                           error_kw={"elinewidth": 0.8})
            ax.set_xticks(range(len(groups)), groups)
            ax.tick_params(axis="x", length=0)
            ax.set(title=title(section, rows), ylim=(0, 100))
            if ax.get_subplotspec().is_first_col():
                ax.set_ylabel("test accuracy, %")
        figure.legend(legend.values(), legend, loc="outside upper center", ncols=5, frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        return file.getvalue()


def main(argv=None):
    parser = argparse.ArgumentParser("python -m results.table", description="Tables of results.")
    parser.add_argument("folders", nargs="*", metavar="DIR", help="(default: results/runs)")
    parser.add_argument("--readme", action="store_true", help="write README's table and picture")
    args = parser.parse_args(argv)
    check(not (args.readme and args.folders),
          "--readme shows the published runs: give no DIR with it")
    runs = load(*args.folders)
    check(runs, f"no runs to show in {', '.join(args.folders) or RUNS}")
    if args.readme:
        page = (ROOT / "README.md").read_text(encoding="utf-8")
        before, _, after = re.split(f"{BEGIN}|{END}", page)
        with whole_file(ROOT / "docs/results.svg") as file:
            file.write(picture(runs))
        with whole_file(ROOT / "README.md") as file:
            file.write(f"{before}{BEGIN}\n{readme(without_ablations(runs))}{END}{after}".encode())
        return
    print(readme(runs))
    print(LEGEND)
    for section, rows in runs.items():
        print(f"\n{paragraph(section, rows)}\n\n{details(rows)}", end="")


if __name__ == "__main__":
    with exit_codes("results.table"):
        main()
