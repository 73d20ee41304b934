"""Three panels from a run folder: bits per layer, certified accuracy over radius, ACR by episode.

    python benchmarks/figures.py results/cifar10-resnet20-sigma0.25 results/cifar10.png

It needs matplotlib. Bits per layer are drawn as in the paper's Figure 4: dots for weights, crosses for
inputs.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import certify  # noqa: E402


def draw_bits(axes, policy: dict) -> None:
    layers = range(1, len(policy) + 1)
    weights, inputs = zip(*policy.values())
    axes.plot(layers, weights, "o", color="black", label="weights")
    axes.plot(layers, inputs, "x", color="tab:red", label="input", markersize=8, markeredgewidth=2)
    axes.set(xlabel="layer, in order of execution", ylabel="bits", ylim=(1.5, 8.5))
    axes.set_title("Bits per layer")
    axes.legend(loc="upper center")


def draw_accuracy(axes, run: Path, results: dict) -> None:
    base, arq = (certify.read_certificates(run / f"{name}certificates.tsv") for name in ("base_", ""))
    radii = torch.linspace(0, 2.6 * results["sigma"], 261).tolist()
    for rows, style, label in ((base, "--", "float base"), (arq, "-", "ARQ")):
        acr = certify.average_certified_radius(rows)
        bitops = 100 * (results if label == "ARQ" else results["base"])["bitops_ratio"]
        values = [certify.certified_accuracy(rows, radius) for radius in radii]
        text = f"{label}: {bitops:.4g} % of BitOPs, ACR {int(acr * 1e4) / 1e4:.4f}"
        axes.plot(radii, values, style, color="black" if label != "ARQ" else "tab:red", label=text)
    axes.set(xlabel="l2 radius, in [0, 1] pixels", ylabel="certified accuracy", ylim=(0, 1))
    axes.set_title(f"Certified accuracy, {len(arq)} test images, n = {results['n']:,}")
    axes.legend(loc="upper right")


def draw_search(axes, records: list[dict], results: dict) -> None:
    acr = [record["acr"] for record in records]
    best = torch.tensor(acr).cummax(0).values
    axes.plot(range(1, len(acr) + 1), acr, ".", color="black", label="policy of the episode")
    axes.plot(range(1, len(acr) + 1), best, "-", color="tab:red", label="best so far")
    base = results["base"]["search_acr"]
    axes.axhline(base, linestyle="--", color="gray", label="float base")
    axes.set(xlabel="episode", ylabel="ACR on the search images")
    axes.set_title("Search")
    axes.legend(loc="center right")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("out", type=Path, help="a PNG file")
    options = parser.parse_args(argv)
    results = json.loads((options.run / "results.json").read_text())
    records = [json.loads(line) for line in (options.run / "search.jsonl").read_text().splitlines()]
    records = [record for record in records if not record.get("finalist")]
    plt.rcParams.update({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3})
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    draw_bits(axes[0], json.loads((options.run / "policy.json").read_text()))
    draw_accuracy(axes[1], options.run, results)
    draw_search(axes[2], records, results)
    figure.savefig(options.out, dpi=80)


if __name__ == "__main__":
    main()
