"""The comparison tables as Markdown, from results/runs/*.json alone.

    python -m results.table            # print them
    python -m results.table --readme   # put them between the markers of README.md

What cannot be averaged is left out and named on stderr, a line each: a file that is no run, a seed that stands in two
files, a run whose setting is not that of its row. A row of another setting than a baseline's is shown, but not paired.
"""

import argparse
import json
import math
import statistics
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import scipy.stats

RUNS = Path(__file__).parent / "runs"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- results.table begins -->", "<!-- results.table ends -->"

SCHEMA = 1
JOINT, ENSEMBLE = "joint_baseline.concat", "joint_baseline.ensemble"         # what every row is paired with
ORDER = ("joint_baseline", "dimml", "udi")                                   # of the rows; any other method comes last
LEGEND = ("Test accuracy in %, mean ± standard deviation over n seeds. *last − joint*, *last − ensemble*: difference in points "
          f"to the last epoch of `{JOINT}` and of `{ENSEMBLE}`, mean over the seeds that both have [95 % interval, "
          "Student's t, paired by seed].")


def warn(message):
    print(f"results.table: {message}", file=sys.stderr)


def read(path):
    """A run file's result. Raises ValueError, which says why, for a file that is no run."""
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"not a whole JSON file ({error})")
    schema = result.get("schema") if isinstance(result, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"its schema is {schema}, not {SCHEMA}")
    return result


def load(folder=RUNS):
    """{(dataset, split): {method.variant: {seed: result}}}, the baselines first, of the runs that may be averaged."""
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            result = read(path)
        except ValueError as error:
            warn(f"{path.name} is left out: {error}")
            continue
        method = ".".join(filter(None, (result["method"], result["variant"])))
        section = found.setdefault((result["dataset"], result["split"]), {})
        section.setdefault(method, {}).setdefault(result["seed"], {})[path.name] = result

    runs = {}
    for section, methods in sorted(found.items()):
        for method in sorted(methods, key=position):
            files = {}
            for seed, same_seed in sorted(methods[method].items()):
                if len(same_seed) == 1:
                    files.update(same_seed)
                else:
                    warn(f"{', '.join(same_seed)} are left out: all are seed {seed} of {method} on {' '.join(section)}")
            results = of_one_setting(files)
            if results:
                runs.setdefault(section, {})[method] = {result["seed"]: result for result in results}
    return runs


def position(method):
    """A row's place in the table."""
    name = method.split(".")[0]
    return ORDER.index(name) if name in ORDER else len(ORDER), method != ENSEMBLE, method


def of_one_setting(files):
    """{file: result} of one row -> the results whose setting most of them share; none where two are equally frequent."""
    settings = {file: json.dumps(setting(result), sort_keys=True) for file, result in files.items()}
    (most, count), *others = Counter(settings.values()).most_common() or [(None, 0)]
    if others and others[0][1] == count:
        warn(f"{', '.join(files)} are left out: their settings differ, and none is that of most")
        return []
    kept = {file: result for file, result in files.items() if settings[file] == most}
    for file, result in files.items():
        if file not in kept:
            other = ", ".join(differing(result, next(iter(kept.values()))))
            warn(f"{file} is left out: another {other} than {', '.join(kept)}")
    return list(kept.values())


def setting(result):
    """What must be the same in runs that are averaged or compared: data, validation share, precision, processes, recipe."""
    processes = result.get("processes", 1)                                   # the oldest runs do not say: they had one
    return {**{key: result[key] for key in ("data", "val", "amp")}, "processes": processes, **result["recipe"]}


def differing(result, other):
    """The names of the settings in which two runs differ; an entry that only one method has belongs to that method."""
    a, b = setting(result), setting(other)
    keys = a.keys() | b.keys() if result["method"] == other["method"] else a.keys() & b.keys()
    return sorted(key for key in keys if a.get(key) != b.get(key))


def rows(methods):
    """The lines of a table, {label: (results, head)}: each modality of the ensemble by itself, then every method's answer."""
    lines = {}
    for method, results in methods.items():
        *single, answer = next(iter(results.values()))["heads"]              # a method's last head is its answer
        if method == ENSEMBLE:
            lines.update({f"{m} alone": (results, m) for m in single})
        lines[method] = results, answer
    return lines


def accuracy(results, head, rule="last"):
    """{seed: test accuracy in %} of a head under a rule, where there is such a rule (without val items no best_val)."""
    scores = {seed: result["heads"][head] for seed, result in results.items()}
    return {seed: 100 * rules[rule]["accuracy"] for seed, rules in scores.items() if rule in rules}


def probes(results, modality):
    """{seed: test accuracy in %} of a linear classifier on a modality's frozen encoder."""
    return {seed: 100 * result["probes"][modality] for seed, result in results.items() if modality in result["probes"]}


def follower_probes(results):
    """{seed: mean over UDI's followers of their encoders' probes, test accuracy in %}."""
    return {seed: float(np.mean([100 * probe for m, probe in result["probes"].items() if m != result["choice"]["anchor"]]))
            for seed, result in results.items()}


def paired(ours, theirs):
    """{seed: value} twice -> mean difference over the seeds both have, half of its 95 % interval, number of such seeds.

    The interval is Student's for paired samples, t(0.975, n - 1) s / sqrt(n); None for one pair. Raises ValueError for none.
    """
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        raise ValueError("no seed in common")
    n, half = len(differences), None
    if n > 1:
        half = float(scipy.stats.t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return statistics.mean(differences), half, n


def calibration(confidence, correct, bins=10):
    """(N,) in [0, 1] and (N,) bool -> number, mean confidence and accuracy of each bin of equal width, and the expected
    calibration error, sum_b n_b / N |accuracy_b - confidence_b| (Guo et al., ICML 2017). An empty bin is nan."""
    bin_of = np.minimum((np.asarray(confidence) * bins).astype(int), bins - 1)
    number = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(bin_of, confidence, minlength=bins) / number
        share = np.bincount(bin_of, correct, minlength=bins) / number
    return number, mean, share, float(np.nansum(number * np.abs(share - mean)) / number.sum())


def class_accuracy(result, head):
    """(C,): test accuracy in % of each class; nan for a class without test items."""
    labels, predictions = np.array(result["test"]["labels"]), np.array(result["test"]["predictions"][head])
    of_class = labels == np.arange(len(result["classes"]))[:, None]
    with np.errstate(invalid="ignore"):
        return 100 * (of_class & (predictions == labels)).sum(1) / of_class.sum(1)


def mean_std(values):
    """Mean, and the standard deviation over runs where there is more than one."""
    values = list(values)
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def signed(value):
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")                 # + 0.0: no minus before a zero


def points(mean, half):
    """A mean difference and half of its interval in words: "+1.2 [+0.3, +2.1]"."""
    return signed(mean) + ("" if half is None else f" [{signed(mean - half)}, {signed(mean + half)}]")


def compare(row, baseline, measure=accuracy):
    """`paired` for a measure of two rows (results, head or modality). Raises ValueError where they cannot be compared."""
    other = differing(next(iter(row[0].values())), next(iter(baseline[0].values())))
    if other:
        raise ValueError(f"another {', '.join(other)}")
    return paired(measure(*row), measure(*baseline))


def comparison(section, methods):
    """The table of answers: accuracy under three rules, macro-F1, and the paired differences to both baselines."""
    yield ("method", "n", "last", "best val", "best test", "macro-F1", "last − joint", "last − ensemble")
    lines = rows(methods)
    for label, (results, head) in lines.items():
        cells = [f"`{label}`" if label in methods else label, str(len(results))]
        cells += [mean_std(accuracy(results, head, rule).values()) for rule in ("last", "best_val", "best_test")]
        cells.append(mean_std(100 * result["heads"][head]["last"]["macro_f1"] for result in results.values()))
        for baseline in (JOINT, ENSEMBLE):
            if label == baseline:
                cells.append("")
            elif baseline not in methods:
                cells.append("not run")
            else:
                try:
                    mean, half, n = compare((results, head), lines[baseline])
                    cells.append(points(mean, half) + ("" if n == len(results) else f", n = {n}"))
                except ValueError as why:
                    warn(f"{label} on {' '.join(section)} is not paired with {baseline}: {why}")
                    cells.append(str(why))
        yield cells


def encoders(methods):
    """The table of encoders: each modality's own head, where a method has one, and its probe."""
    modalities = sorted({m for results in methods.values() for result in results.values() for m in result["probes"]})
    yield ("method", "n", *(f"{m} {what}" for m in modalities for what in ("head", "probe")))
    for method, results in methods.items():
        row = [f"`{method}`", str(len(results))]
        for m in modalities:
            own = m in next(iter(results.values()))["heads"]
            row += [mean_std(accuracy(results, m).values()) if own else "", mean_std(probes(results, m).values())]
        yield row


def markdown(runs):
    """For each dataset and split the table of answers and the table of encoders."""
    lines = [LEGEND, ""]
    for section, methods in runs.items():
        some = [result for results in methods.values() for result in results.values()]
        counts = {f"{part} items": {result[f"n_{part}"] for result in some} for part in ("train", "val", "test")}
        counts["epochs"] = {result["recipe"]["epochs"] for result in some}
        counts = ", ".join(f"{' or '.join(map(str, sorted(values)))} {name}" for name, values in counts.items())
        lines += [f"**{section[0]}, split `{section[1]}`**: {counts}", ""]
        for table in (comparison(section, methods), encoders(methods)):
            header, *body = table
            lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body)] + [""]
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser("python -m results.table", description="The comparison tables from results/runs/*.json.")
    parser.add_argument("--readme", action="store_true", help="write them between the markers of README.md")
    args = parser.parse_args(argv)
    tables = markdown(load())
    if args.readme:
        before, rest = README.read_text().split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{tables}{END}{rest.split(END)[1]}")
    else:
        print(tables)


if __name__ == "__main__":
    main()
