"""Does an episode's reward rank policies as their fine-tuned networks rank, and from which start?

    python benchmarks/proxy.py --data DIR --checkpoints DIR [--sigma 0.25] [--budget 0.008]

The policies are those of compare.py's finished cells of that sigma and budget, seed 0. Each gets an
episode's reward (IRS, in the cells' frame) from the base and from the network that shared.py makes in one
epoch or in four, after 12 training steps or 24, and from the base after 48 steps of the last fine-tuning's
recipe. The truth is the ACR of the cell's network on the same search images (n = 1,000, the noise of
finalists), where that network is still under runs/compare/; beside it stands the cell's ACR on test images,
by which nothing is chosen. It prints a table with Kendall's tau of both, and keeps its rows in
results/proxy.json as they come; the table has those with all rewards.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

from scipy.stats import kendalltau

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arq  # noqa: E402
import models  # noqa: E402
from benchmarks import compare, shared  # noqa: E402

OUT, WORK = ROOT / "results" / "proxy.json", ROOT / "runs" / "proxy"
STARTS = {  # epochs of shared.py, and the method of compare.py that starts there or has as many steps
    "base": (0, "ARQ from f"),
    "base, 48 steps of the recipe": (0, "ARQ by recipe"),
    "1 epoch": (1, "ARQ"),
    "1 epoch, 24 steps": (1, "ARQ 24 steps"),
    "4 epochs": (4, "ARQ"),
    "4 epochs, 24 steps": (4, "ARQ 24 steps"),
}
TRUTHS = {"search images": "final", "test images": "test"}  # of the cell's network


def table_of(found: dict) -> str:
    titles = " | ".join([f"reward, {start}" for start in STARTS] + [f"ACR, {on}" for on in TRUTHS])
    lines = [f"| policy of | {titles} |", "|---" * (1 + len(STARTS) + len(TRUTHS)) + "|"]
    whole = [row for row in found.values() if all(start in row for start in STARTS)]
    for sigma, budget in sorted({(row["sigma"], row["budget"]) for row in whole}):
        rows = [row for row in whole if (row["sigma"], row["budget"]) == (sigma, budget)]
        for row in sorted(rows, key=lambda row: -row["test"]):
            cells = [f"{row[start]:.4f}" for start in STARTS]
            cells += [arq.shown(row[name]) if name in row else "" for name in TRUTHS.values()]
            where = f"{row['method']}, sigma {sigma:g}, {100 * budget:g} %"
            lines.append(f"| {' | '.join([where, *cells])} |")
        for on, name in TRUTHS.items():
            of = [row for row in rows if name in row]
            if of:
                taus = [kendalltau([r[start] for r in of], [r[name] for r in of]) for start in STARTS]
                shown = " | ".join(f"{tau:.2f} (p = {p:.2f})" for tau, p in taus)
                lines.append(f"| tau of these {len(of)}, {on} | {shown} | | |")
    return "\n".join(lines)


def network_of(frame: compare.Frame, epochs: int) -> models.Classifier:
    """What episodes start from: the base, the comparison's shared network, or one trained longer."""
    if epochs <= 1:
        return frame.start[0]
    config, network = frame.config, copy.deepcopy(frame.base)
    file = WORK / f"sigma{config.sigma:g}-budget{config.budget:g}-epochs{epochs}.pt"
    if not file.exists():
        environment = arq.BitWidthEnvironment(frame.table, config.budget)
        of = frame.base, environment, frame.train_images, frame.search_images, config, epochs
        arq.write_whole(file, shared.train_shared(*of, save=lambda state: None))
    network.load_state_dict(arq.read_state(file))
    return network


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
    kept = "method", "sigma", "budget", "policy", "seed", "n"
    cells = [{name: r[name] for name in kept} | {"test": r["acr"]} for r in cells]
    known = [found.get(compare.name_of(r), {}) for r in cells]  # of the same policy
    here = [(old if old.get("policy") == r["policy"] else {}) | r for r, old in zip(cells, known)]
    for start, (epochs, method) in STARTS.items():
        missing = [r for r in here if start not in r]
        if not missing:
            continue
        cell = compare.cell(method, options.sigma, options.budget)
        frame = compare.Frame(cell, options.data, options.checkpoints)
        of = network_of(frame, epochs), frame.train_images, frame.search_images, frame.config
        evaluate, final, cache = (
            arq.policy_evaluator(*of),
            arq.policy_evaluator(*of, final=True),
            frame.cache,
        )
        if method.endswith(compare.RECIPE):
            evaluate = compare.by_recipe(evaluate, frame)
        for r in missing:
            r[start] = evaluate(r["policy"], cache)
            file = files[compare.name_of(r)]
            if "final" not in r and file.exists():
                radii = final.certificate(models.load_model(file)[0], cache)
                r["final"] = sum(radii) / len(radii)
            print(f"{r['method']}, {start}: {r[start]:.4f}", flush=True)
            found[compare.name_of(r)] = r
            arq.write_whole(OUT, found)
    print(table_of(found))


if __name__ == "__main__":
    main()
