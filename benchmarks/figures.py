"""Figures of a run, and of the comparison.

    python benchmarks/figures.py runs/shapes-resnet8-sigma0.25-budget0.015-seed0
    python benchmarks/figures.py

Of a run: policy.png (bits per layer), radii.png (certified accuracy over radius) and search.png
(ACR by episode), into its folder. Of the comparison, from results/compare/cells.jsonl:
comparison.png (the paper's Figure 1), sizes.png (Figure 3), policies.png (Figure 4), radii.png
and searches.png. Error bars are 95 % intervals over images of the difference to the float base;
seeds are averaged. It needs matplotlib.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arq  # noqa: E402
import certify  # noqa: E402
from benchmarks import compare  # noqa: E402

# Markers tell methods apart in grey, too; ARQ alone is red.
STYLES = {  # color, marker, line
    "ARQ": ("tab:red", "o", "-"),
    "ARQ 600 episodes": ("tab:red", "P", "--"),
    "uniform": ("black", "s", "--"),
    "evolution": ("tab:blue", "^", "-"),
    "evolution 600 episodes": ("tab:cyan", "X", ":"),
    "random": ("dimgray", "x", ":"),
    "LIMPQ": ("tab:green", "D", "-."),
    "HAQ": ("tab:orange", "v", "--"),
    "NIPQ": ("tab:purple", "p", "-."),
}
FLOAT_LINES = {"base": ("black", "--", "float base")}
FLOAT_LINES["control"] = ("gray", ":", "float, fine-tuned alike")


def style_of(method: str) -> dict:
    style = dict(zip(("color", "marker", "linestyle"), STYLES[method]))
    return style | {"markersize": 6, "zorder": 4 if method == "ARQ" else 3}


def panels(count: int, columns: int, width: float, height: float):
    """A figure of so many panels, each of this size in inches."""
    rows = -(-count // columns)
    size = {"figsize": (width * columns, height * rows), "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, squeeze=False, **size)
    for panel in axes.flat[count:]:
        panel.axis("off")
    return figure, axes.flat[:count]


def add_legend(figure, ncols: int) -> None:
    """One legend below, of what any panel shows."""
    pairs = [zip(*panel.get_legend_handles_labels()) for panel in figure.axes]
    lines = {text: line for pair in pairs for line, text in pair}
    where = {"loc": "outside lower center", "ncols": ncols, "frameon": False}
    figure.legend(lines.values(), lines, **where)


# ---- panels of both ----
def plot_policy(panel, policy: dict, title: str) -> None:
    """Bits per layer: dots for weights, crosses for inputs."""
    weights, inputs = zip(*policy.values())
    layers = range(1, len(policy) + 1)
    panel.plot(layers, weights, "o", color="black", label="weights")
    crosses = {"color": "tab:red", "markersize": 8, "markeredgewidth": 2}
    panel.plot(layers, inputs, "x", label="activations", **crosses)
    panel.set(title=title, ylim=(1.5, 8.5), ylabel="bits", xlabel="layer, as executed")


def plot_radii(panel, radii: list[float], acr: float, color: str, line: str, name: str) -> None:
    """Certified accuracy over radius; radii are 0 where wrong."""
    x = torch.linspace(0, 1.05 * max(radii) + 1e-6, 331)
    accuracy = (torch.tensor(radii)[:, None] >= x.clamp_min(1e-9)).float().mean(0)
    panel.plot(x, accuracy, line, color=color, label=f"{name}: ACR {arq.cut(acr)}")
    panel.set(xlabel="l2 radius, pixels in [0, 1]", ylabel="certified accuracy")
    panel.set(ylim=(0, 1.25), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])  # the legend is above
    panel.legend(loc="upper right")


# ---- a run ----
def draw_run(folder: Path) -> dict:
    policy = json.loads((folder / "policy.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    title, figures = f"{config['dataset']}, {config['arch']}, sigma = {config['sigma']:g}", {}
    figures["policy"], (panel,) = panels(1, 1, max(5, 0.3 * len(policy)), 3)
    plot_policy(panel, policy, f"{title}, budget {100 * config['budget']:g} %")
    add_legend(figures["policy"], 2)

    figures["radii"], (panel,) = panels(1, 1, 5, 3.4)
    curves = {"base_certificates.tsv": FLOAT_LINES["base"]}
    curves["certificates.tsv"] = "tab:red", "-", "ARQ"
    for name, style in curves.items():
        rows = certify.read_certificates(folder / name)
        radii = [row.radius * row.correct for row in rows]
        plot_radii(panel, radii, certify.average_certified_radius(rows), *style)
    panel.set(title=f"{title}, n = {config['n']:,}")

    log = folder / "search.jsonl"
    if log.exists():  # --policy has no search
        records = [json.loads(line) for line in log.read_text().splitlines()]
        figures["search"] = draw_search(records)
    return figures


def draw_search(records: list[dict]):
    """ACR on the search images, by episode."""
    figure, (panel,) = panels(1, 1, 6, 3.4)
    noises = [record["noise"] for record in records]
    warmup = noises.count(noises[0]) - 1  # the agent's first episode has the same noise
    panel.axvspan(0.5, warmup + 0.5, color="gainsboro", label="random policies")
    acrs = torch.tensor([record["acr"] for record in records])
    episodes = range(1, len(acrs) + 1)
    panel.plot(episodes, acrs.cummax(0).values, "-", color="black", label="best so far")
    panel.plot(episodes, acrs, "o", color="black", label="episode")
    panel.set(xlabel="episode", ylabel="ACR, search images")
    add_legend(figure, 2)
    return figure


# ---- the comparison ----
def draw_tradeoff(cells: list[dict], cost: str, unit: float, label: str, beside: float = 0.0):
    """ACR over cost, a panel for each sigma, and the difference in clean accuracy, mean of
    sigmas. beside: the share of the axis over which methods of equal cost are spread."""
    sigmas = [sigma for sigma in compare.SIGMAS if compare.at(cells, "base", sigma, 1.0)]
    costs = [c[cost] / unit for c in cells if c["budget"] < 1]
    narrow, widest = 0.6 * min(costs), 1.1 * max(costs)
    places = torch.linspace(-beside / 2, beside / 2, len(compare.METHODS)).tolist()
    figure, axes = panels(len(sigmas) + 1, 2, 5, 3.4)
    for sigma, panel in zip(sigmas, axes):
        for name, (color, line, text) in FLOAT_LINES.items():
            for c in compare.at(cells, name, sigma, 1.0):
                panel.axhline(c["acr"], linestyle=line, color=color, label=text)
        panel.set(title=f"sigma = {sigma:g}", ylabel="ACR")
    for method, place in zip(compare.METHODS, places):
        aside, style = place * (widest - narrow), style_of(method)
        clean = {}  # by budget: cost and points over the base, for each sigma
        for sigma, panel in zip(sigmas, axes):
            (base,) = compare.at(cells, "base", sigma, 1.0)
            budgets = [budget for s, budget in compare.PLACES if s == sigma]
            groups = [compare.at(cells, method, sigma, budget) for budget in budgets]
            groups = [seeds for seeds in groups if seeds]
            x = [statistics.fmean(c[cost] / unit for c in seeds) + aside for seeds in groups]
            y = [compare.mean_acr(seeds) for seeds in groups]
            bars = [1.96 * compare.acr_difference(seeds, [base])[1] for seeds in groups]
            if groups:
                panel.errorbar(x, y, bars, capsize=2, elinewidth=0.7, label=method, **style)
            for seeds, at_cost in zip(groups, x):
                gain = 100 * (statistics.fmean(c["clean"] for c in seeds) - base["clean"])
                clean.setdefault(seeds[0]["budget"], []).append((at_cost, gain))
        whole = [pairs for pairs in clean.values() if len(pairs) == len(sigmas)]
        means = [tuple(map(statistics.fmean, zip(*pairs))) for pairs in whole]
        if means:
            axes[-1].plot(*zip(*means), **style)
    axes[-1].axhline(0, color="black", linestyle="--")
    limits = -4, 4  # one network's standard error is two points
    axes[-1].set(title="clean accuracy, mean of sigmas", ylim=limits, ylabel="points over base")
    for panel in axes:
        panel.set(xlabel=label, xlim=(narrow, widest))
    add_legend(figure, 4)
    return figure


def draw_policies(cells: list[dict]):
    """ARQ's bits at 1.5 and 0.8 %, a panel for each sigma."""
    places = [(s, budget) for budget in (0.015, 0.008) for s in compare.SIGMAS]
    chosen = [c for place in places for c in compare.at(cells, "ARQ", *place)[:1]]
    figure, axes = panels(len(chosen), 3, 3.8, 2.6)
    for c, panel in zip(chosen, axes):
        title = f"sigma = {c['sigma']:g}, budget {100 * c['budget']:g} %"
        plot_policy(panel, c["policy"], title)
    add_legend(figure, 2)
    return figure


def draw_radii(cells: list[dict]):
    """Certified accuracy over radius: the float base, its fine-tuned twin, and ARQ at 1.5 %."""
    figure, axes = panels(3, 3, 4.2, 3.2)
    styles = FLOAT_LINES | {"ARQ": ("tab:red", "-", "ARQ, 1.5 %")}
    for sigma, panel in zip(compare.SIGMAS, axes):
        for method, style in styles.items():
            for c in compare.at(cells, method, sigma, 0.015, 10_000):
                plot_radii(panel, c["radii"], c["acr"], *style)
        panel.set(title=f"sigma = {sigma:g}, n = 10,000")
    return figure


def draw_searches(cells: list[dict]):
    """Rewards as ACR on search images, means of twenty, by evaluation. HAQ's is another."""
    names = ["ARQ", "evolution", "random", "ARQ" + compare.LONG, "evolution" + compare.LONG]
    places = [place for place in compare.PLACES if compare.at(cells, "ARQ", *place)]
    figure, axes = panels(len(places), 3, 4.2, 3)
    for (sigma, budget), panel in zip(places, axes):
        for number, method in enumerate(names):
            for c in compare.at(cells, method, sigma, budget):
                means = torch.tensor(c["search_acr"]).unfold(0, 20, 1).mean(1)
                style = style_of(method) | {"markevery": (10 * number, 60)}
                panel.plot(range(20, 20 + len(means)), means, label=method, **style)
        panel.set(title=f"sigma = {sigma:g}, budget {100 * budget:g} %", xlabel="evaluation")
        panel.set(ylabel="ACR, mean of the last 20", xscale="log")
        panel.set_xticks([20, 50, 100, 200, 600], ["20", "50", "100", "200", "600"])
        panel.minorticks_off()
    add_legend(figure, len(names))
    return figure


def draw_comparison(cells: list[dict]) -> dict:
    bitops = "bitops_ratio", 0.01, "BitOPs, % of float (points moved apart)", 0.08
    figures = {"comparison": draw_tradeoff(cells, *bitops)}
    figures["sizes"] = draw_tradeoff(cells, "size_bytes", 1000, "weights, kB")
    figures["policies"], figures["radii"] = draw_policies(cells), draw_radii(cells)
    return figures | {"searches": draw_searches(cells)}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="a run folder of arq.py")
    options = parser.parse_args(argv)
    plt.switch_backend("agg")
    plt.rcParams.update({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3})
    folder = options.run or compare.RESULTS
    figures = draw_run(folder) if options.run else draw_comparison(compare.read_cells())
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=90)
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
