"""The figures, from the finished cells of compare.py under results/compare/.

    python benchmarks/figures.py [--cells DIR] [--out DIR]

It needs matplotlib, and writes comparison.png (the paper's Figure 1: ACR and clean accuracy over BitOPs),
sizes.png (Figure 3: the same over model size), policies.png (Figure 4: bits per layer), radii.png (certified
accuracy over radius) and searches.png (rewards by evaluation). Error bars are 95 % intervals over images of
the difference to the float base; seeds are averaged. What no finished cell holds is left out, and so are
variants in the first two: compare.SHOWN names what they draw.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import certify  # noqa: E402
from benchmarks import compare  # noqa: E402

# Markers tell methods apart in grey, too; ARQ alone is red. Hollow: a variant of the filled one.
STYLES = {  # color, marker, line
    "ARQ": ("tab:red", "o", "-"),
    "ARQ 24 steps": ("tab:red", "*", ":"),
    "ARQ 600 episodes": ("tab:red", "P", "--"),
    "ARQ estimate": ("tab:pink", "o", ":"),
    "ARQ from f": ("tab:red", "o", ":"),
    "uniform": ("black", "s", "--"),
    "evolution": ("tab:blue", "^", "-"),
    "evolution 600 episodes": ("tab:cyan", "X", ":"),
    "random": ("dimgray", "x", ":"),
    "LIMPQ": ("tab:green", "D", "-."),
    "LIMPQ 24 steps": ("tab:green", "*", ":"),
    "HAQ": ("tab:orange", "v", "--"),
    "NIPQ": ("tab:purple", "p", "-."),
    compare.MODEL: ("tab:brown", "*", ":"),
}


def style_of(method: str) -> dict:
    style = dict(zip(("color", "marker", "linestyle"), STYLES[method]))
    hollow = {"markerfacecolor": "white"} if method.endswith(" from f") else {}
    return style | hollow | {"markersize": 6, "zorder": 3 + (method == "ARQ")}


def read_cells(folder: Path, n: int = 1000) -> list[dict]:
    """Finished cells with that n, each with its certificates."""
    cells = [json.loads(file.read_text()) | {"file": file} for file in sorted(folder.glob("*.json"))]
    cells = [cell for cell in cells if cell["n"] == n]
    for cell in cells:
        cell["rows"] = certify.read_certificates(cell["file"].with_suffix(".tsv"))
    return cells


def seeds_averaged(cells: list[dict], method: str, sigma: float) -> list[list[dict]]:
    """The cells of a method, by budget: lists of those that differ in their seeds."""
    some = of(cells, method, sigma)
    return [[c for c in some if c["budget"] == b] for b in sorted({c["budget"] for c in some})]


def of(cells: list[dict], method: str, sigma: float | None = None) -> list[dict]:
    found = [c for c in cells if c["method"] == method and sigma in (None, c["sigma"])]
    return sorted(found, key=lambda c: c["bitops_ratio"])


def sigmas_of(cells: list[dict]) -> list[float]:
    return sorted({cell["sigma"] for cell in cells})


def draw_tradeoff(cells: list[dict], cost, label: str, beside: float = 0.0):
    """ACR over cost, a panel for each sigma, and the difference in clean accuracy, mean of sigmas.
    beside: the share of the axis over which methods of the same cost are spread, to tell their bars apart."""
    sigmas = sigmas_of(cells)
    costs = [cost(cell) for cell in cells if cell["budget"] < 1] or [1.0]
    narrow, widest = 0.6 * min(costs), 1.1 * max(costs)
    places = torch.linspace(-beside / 2, beside / 2, len(compare.SHOWN)).tolist()
    aside = {method: place * (widest - narrow) for method, place in zip(compare.SHOWN, places)}
    rows = -(-(len(sigmas) + 1) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(10, 3.4 * rows + 0.6), layout="constrained", squeeze=False)
    axes = axes.flat[: len(sigmas) + 1]
    for panel in figure.axes[len(axes) :]:
        panel.axis("off")
    for sigma, panel in zip(sigmas, axes):
        for name, style in (("base", "--"), ("control", ":")):
            for cell in of(cells, name, sigma)[:1]:
                text = {"base": "float base", "control": "float, fine-tuned alike"}[name]
                panel.axhline(cell["acr"], linestyle=style, color="black", linewidth=1, label=text)
        for method in compare.SHOWN:
            x, y, error = [], [], []
            for some in seeds_averaged(cells, method, sigma):
                x.append(statistics.fmean(map(cost, some)) + aside[method])
                rows = compare.mean_rows([cell["rows"] for cell in some])
                y.append(certify.average_certified_radius(rows))
                base_rows = of(cells, "base", sigma)[0]["rows"]
                error.append(1.96 * certify.acr_difference(rows, base_rows)[1])
            if x:
                panel.errorbar(x, y, error, label=method, capsize=2, elinewidth=0.7, **style_of(method))
        panel.set(title=f"sigma = {sigma:g}", xlabel=label, ylabel="ACR")
        panel.set_xlim(narrow, widest)
    for method in compare.SHOWN:
        points = {}  # by budget, for budgets that have all sigmas
        for sigma in sigmas:
            clean = of(cells, "base", sigma)[0]["accuracy_without_noise"]
            for some in seeds_averaged(cells, method, sigma):
                gain = statistics.fmean(cell["accuracy_without_noise"] for cell in some) - clean
                point = statistics.fmean(map(cost, some)) + aside[method], 100 * gain
                points.setdefault(some[0]["budget"], []).append(point)
        whole = [values for values in points.values() if len(values) == len(sigmas)]
        pairs = sorted(tuple(map(statistics.fmean, zip(*values))) for values in whole)
        if pairs:
            axes[-1].plot(*zip(*pairs), **style_of(method))
    axes[-1].axhline(0, color="black", linestyle="--", linewidth=1)
    axes[-1].set_xlim(narrow, widest)
    axes[-1].set(
        title="clean accuracy" + ", mean" * (len(sigmas) > 1),
        xlabel=label,
        ylim=(-4, 4),  # one network's standard error is two points
        ylabel="points over base",
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_policies(cells: list[dict]):
    """ARQ's bits, layer by layer: dots for weights, crosses for inputs; a row for each budget."""
    sigmas = sigmas_of(cells)
    places = {(c["sigma"], c["budget"]) for c in of(cells, "ARQ")}
    budgets = sorted({b for _, b in places if all((s, b) in places for s in sigmas)}, reverse=True)
    if not budgets:
        return None
    size = 3.6 * len(sigmas), 2.5 * len(budgets)
    figure, axes = plt.subplots(len(budgets), len(sigmas), figsize=size, layout="constrained", squeeze=False)
    for budget, row in zip(budgets, axes):
        for sigma, panel in zip(sigmas, row):
            some = [c for c in of(cells, "ARQ", sigma) if c["budget"] == budget and c["seed"] == 0]
            for cell in some:
                weights, inputs = zip(*cell["policy"].values())
                layers = range(1, len(weights) + 1)
                panel.plot(layers, weights, "o", color="black", label="weights")
                panel.plot(
                    layers, inputs, "x", color="tab:red", label="input", markersize=8, markeredgewidth=2
                )
            panel.set(title=f"sigma = {sigma:g}, budget {100 * budget:g} %", ylim=(1.5, 8.5), ylabel="bits")
    for panel in axes[-1]:
        panel.set_xlabel("layer, in order of execution")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_radii(cells: list[dict]):
    """Certified accuracy over radius: the float base, its fine-tuned twin, and ARQ at 1.5 %."""
    sigmas = sigmas_of(cells)
    if not sigmas:
        return None
    figure, axes = plt.subplots(
        1, len(sigmas), figsize=(4.2 * len(sigmas), 3.2), layout="constrained", squeeze=False
    )
    lines = {"base": ("black", "--", "float base"), "control": ("gray", ":", "float, fine-tuned alike")}
    lines["ARQ"] = ("tab:red", "-", "ARQ, 1.5 %")
    for sigma, panel in zip(sigmas, axes[0]):
        radii = torch.linspace(0, 3.3 * sigma, 331).tolist()
        for method, (color, style, name) in lines.items():
            some = [c for c in of(cells, method, sigma) if c["budget"] in (1.0, 0.015) and c["seed"] == 0]
            for cell in some[:1]:
                values = [certify.certified_accuracy(cell["rows"], radius) for radius in radii]
                text = f"{name}: ACR {int(cell['acr'] * 1e4) / 1e4:.4f}"
                panel.plot(radii, values, style, color=color, label=text)
        panel.set(title=f"sigma = {sigma:g}, n = 10,000", xlabel="l2 radius, in [0, 1] pixels", ylim=(0, 1.2))
        panel.set(ylabel="certified accuracy", yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])  # the legend is above
        panel.legend(loc="upper right")
    return figure


def draw_searches(cells: list[dict]):
    """Rewards as ACR on search images, means of twenty, by evaluation. HAQ's reward is another."""
    names = ["ARQ", "evolution", "random", "ARQ" + compare.LONG, "evolution" + compare.LONG]
    searched = [c for c in cells if c["method"] in names]
    groups = sorted({(c["sigma"], c["budget"]) for c in searched}, key=lambda g: (g[0], -g[1]))
    if not groups:
        return None
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    size = (4.2 * columns, 3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for panel in axes.flat[len(groups) :]:
        panel.axis("off")
    for (sigma, budget), panel in zip(groups, axes.flat):
        for method in names:
            some = [c for c in of(cells, method, sigma) if c["budget"] == budget]
            for number, cell in enumerate(some):
                means = torch.tensor(cell["search_acr"]).unfold(0, 20, 1).mean(1)
                style = {**style_of(method), "markevery": (10 * names.index(method), 60)}
                panel.plot(range(20, 20 + len(means)), means, label=None if number else method, **style)
        panel.set(title=f"sigma = {sigma:g}, budget {100 * budget:g} %", xlabel="evaluation", xscale="log")
        panel.set(ylabel="ACR, mean of the last 20")
        panel.set_xticks([20, 50, 100, 200, 600], ["20", "50", "100", "200", "600"], minor=False)
        panel.minorticks_off()
    found = {text: line for panel in axes.flat for line, text in zip(*panel.get_legend_handles_labels())}
    figure.legend(found.values(), found, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=Path, default=ROOT / "results" / "compare")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "compare")
    options = parser.parse_args(argv)
    cells = read_cells(options.cells)
    plt.rcParams.update({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3})
    figures = {
        "comparison": draw_tradeoff(
            cells, lambda cell: 100 * cell["bitops_ratio"], "BitOPs, % of float (points moved apart)", 0.08
        ),
        "sizes": draw_tradeoff(cells, lambda cell: cell["size_bytes"] / 1000, "weights, kB"),
        "policies": draw_policies(cells),
        "radii": draw_radii(read_cells(options.cells, 10_000)),
        "searches": draw_searches(cells),
    }
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(options.out / f"{name}.png", dpi=90)


if __name__ == "__main__":
    main()
