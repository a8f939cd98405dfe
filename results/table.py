"""The comparison table as Markdown, from results/runs/*.json alone.

    python -m results.table            # print it
    python -m results.table --readme   # put it between the markers of README.md
"""

import argparse
import json
import statistics
from pathlib import Path

RUNS = Path(__file__).parent / "runs"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- results.table begins -->", "<!-- results.table ends -->"


def load(folder=RUNS):
    """{(dataset, split): {method.variant: [result, ...]}}, sorted."""
    runs = {}
    for path in sorted(Path(folder).glob("*.json")):
        result = json.loads(path.read_text())
        name = f"{result['method']}.{result['variant']}" if result["variant"] else result["method"]
        runs.setdefault((result["dataset"], result["split"]), {}).setdefault(name, []).append(result)
    return runs


def mean_std(values):
    """Percentages: mean, and the standard deviation over runs where there is more than one."""
    values = [100 * value for value in values if value is not None]
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def markdown(runs):
    """A section for each dataset and split: fused accuracy under the three rules, and each modality's head and probe."""
    lines = []
    for (dataset, split), methods in runs.items():
        some = next(iter(methods.values()))[0]
        modalities = sorted({m for results in methods.values() for result in results for m in result["probes"]})
        lines += [f"**{dataset}, split `{split}`**: {some['n_train']} train, {some['n_val']} val, {some['n_test']} test items; "
                  f"{some['recipe']['epochs']} epochs", ""]
        header = ["method", "n", "fused, last", "best val", "best test"]
        header += [f"{m} {what}" for m in modalities for what in ("head", "probe")]
        lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        for method, results in methods.items():
            fused = [result["heads"].get("fused") or next(iter(result["heads"].values())) for result in results]
            row = [f"`{method}`", str(len(results))]
            row += [mean_std([rules.get(rule, {}).get("accuracy") for rules in fused]) for rule in ("last", "best_val", "best_test")]
            for m in modalities:
                row.append(mean_std([result["heads"].get(m, {}).get("last", {}).get("accuracy") for result in results]))
                row.append(mean_std([result["probes"].get(m) for result in results]))
            lines.append("| " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser("python -m results.table", description="The comparison table from results/runs/*.json.")
    parser.add_argument("--readme", action="store_true", help="write it between the markers of README.md")
    args = parser.parse_args(argv)
    table = markdown(load())
    if args.readme:
        before, rest = README.read_text().split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{table}{END}{rest.split(END)[1]}")
    else:
        print(table)


if __name__ == "__main__":
    main()
