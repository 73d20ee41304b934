"""Does an episode's reward rank policies as their fine-tuned networks rank, and from which start?

    python benchmarks/proxy.py --data DIR --checkpoints DIR [--sigma 0.25] [--budget 0.008]

The policies are those of compare.py's finished cells of that sigma and budget, seed 0, whose networks are
still under runs/compare/. Each gets an episode's reward (IRS, in the cells' frame) from the base and from the
network that shared.py makes. The truth is the ACR of the cell's network on the same search images (n = 1,000,
the noise of finalists): no test image is used. Prints a table with Kendall's tau, and keeps its rows in
results/proxy.json.
"""

import argparse
import json
import sys
from pathlib import Path

from scipy.stats import kendalltau

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arq  # noqa: E402
import models  # noqa: E402
from benchmarks import compare  # noqa: E402

OUT = ROOT / "results" / "proxy.json"
STARTS = {"base": "ARQ from f", "shared": "ARQ"}  # and a method of compare.py that starts there


def table_of(found: dict) -> str:
    lines = ["| policy of | reward from the base | from the shared network | ACR of the final network |"]
    lines += ["|---" * 4 + "|"]
    for sigma, budget in sorted({(row["sigma"], row["budget"]) for row in found.values()}):
        rows = [row for row in found.values() if (row["sigma"], row["budget"]) == (sigma, budget)]
        for row in sorted(rows, key=lambda row: -row["final"]):
            rewards = " | ".join(f"{row[start]:.4f}" for start in STARTS)
            where = f"{row['method']}, sigma {sigma:g}, {100 * budget:g} %"
            lines.append(f"| {where} | {rewards} | {row['final']:.4f} |")
        taus = [kendalltau([r[start] for r in rows], [r["final"] for r in rows])[0] for start in STARTS]
        lines.append(f"| Kendall's tau of these {len(rows)} | {taus[0]:.2f} | {taus[1]:.2f} | |")
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data")
    parser.add_argument("--checkpoints", type=Path, default=Path("."))
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--budget", type=float, default=0.008)
    options = parser.parse_args(argv)
    found = json.loads(OUT.read_text()) if OUT.exists() else {}
    place = options.sigma, options.budget, 0, 1000
    cells = [r for r in compare.finished() if (r["sigma"], r["budget"], r["seed"], r["n"]) == place]
    files = {compare.name_of(r): compare.WORK / compare.name_of(r) / "model.arq" for r in cells}
    missing = [r for r in cells if compare.name_of(r) not in found and files[compare.name_of(r)].exists()]
    for start, method in STARTS.items() if missing else ():
        cell = compare.cell(method, options.sigma, options.budget)
        frame = compare.Frame(cell, options.data, options.checkpoints)
        of = frame.start[0], frame.train_images, frame.search_images, frame.config
        evaluate, final, cache = (
            arq.policy_evaluator(*of),
            arq.policy_evaluator(*of, final=True),
            frame.cache(),
        )
        for r in missing:
            r[start] = evaluate(r["policy"], cache)
            if "final" not in r:
                network = models.load_model(files[compare.name_of(r)])[0]
                radii = final.certificate(network, cache)
                r["final"] = sum(radii) / len(radii)
            print(f"{r['method']}, from the {start}: {r[start]:.4f}, final {r['final']:.4f}", flush=True)
    names = ("method", "sigma", "budget", "policy", "final", *STARTS)
    found |= {compare.name_of(r): {name: r[name] for name in names} for r in missing}
    arq.write_whole(OUT, found)
    print(table_of(found))


if __name__ == "__main__":
    main()
