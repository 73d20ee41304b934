"""Agents on a model of real rewards: twenty searches in minutes, where one real search takes half an hour.

    python benchmarks/surrogate.py [--seeds 20] [--collect]

The rewards of compare.py's searches at sigma 0.25 and 0.8 % (600 rewards, results/rewards.jsonl) are
nearly a sum over operands, so ridge regression on the bit-widths predicts them: one value for each of 3, 4, 5
and 6 or more bits, and 1 / (w_bits * a_bits) per layer. Each search (its start, images and noise) has an
offset of its own. On that model, with the noise of one evaluation added, agents search as in the comparison,
and the best of five finalists is reported by its true value. The noise is measured: searches of one seed
began with the same random policies on a GPU and on a CPU. An integer program finds the model's own best
policy under the budget; compare.py trains it as a cell. Writes results/surrogate.json.

--collect: make results/rewards.jsonl again, from the search.jsonl of finished cells under runs/compare/.
"""

import argparse
import copy
import json
import math
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arq  # noqa: E402
import models  # noqa: E402
from benchmarks import compare, rivals  # noqa: E402
from ddpg import DDPG, DDPGConfig  # noqa: E402

REWARDS, OUT = ROOT / "results" / "rewards.jsonl", ROOT / "results" / "surrogate.json"
BUDGET = 0.008
SEARCHES = [(method, seed) for method in ("ARQ", "random", "evolution") for seed in (0, 1)]
OFFSETS = [0, 1, 0, 1, 2, 3]  # evolution ran on a CPU, from other networks than those on the GPU
AGAIN = 0.55  # of one evaluation's noise is a finalist's, with four times the samples: assumed
AGENTS = {  # and settings of DDPGConfig
    "DDPG": (DDPG, {}),
    "evolution": (rivals.EvolutionAgent, {}),
    "random": (rivals.RandomAgent, {}),
    "DDPG, discount 0": (DDPG, {"discount": 0.0}),
    "DDPG, 600 evaluations": (DDPG, {"episodes": 600}),  # the default of arq.py; a quarter of the seeds
}


def collect() -> list[dict]:
    """Every policy that those searches evaluated, with its ACR; finalists left out."""
    found = []
    for (method, seed), offset in zip(SEARCHES, OFFSETS):
        name = compare.name_of(compare.cell(method, 0.25, BUDGET, seed))
        for line in (compare.WORK / name / "search.jsonl").read_text().splitlines():
            record = json.loads(line)
            if not record.get("finalist"):
                bits = sum(list(record["policy"].values())[1:-1], [])
                found.append({"offset": offset, "acr": round(record["acr"], 6), "bits": bits})
    return found


def features(bits: Tensor) -> Tensor:
    """(policies, 40) bit-widths, weights and inputs in turn: 160 indicators and 20 products."""
    known = F.one_hot(bits.clamp(max=6) - 2, 5)[..., 1:].flatten(1).double()
    return torch.cat([known, 1 / (bits[:, 0::2] * bits[:, 1::2]).double()], 1)


def fit(x: Tensor, offsets: Tensor, y: Tensor, ridge: float = 1.0) -> Tensor:
    a = torch.cat([x, F.one_hot(offsets, 4).double()], 1)
    penalty = ridge * torch.eye(a.shape[1], dtype=torch.float64)
    penalty[-4:] *= 1e-6
    return torch.linalg.solve(a.T @ a + penalty, a.T @ y)


def cross_validated(x: Tensor, offsets: Tensor, y: Tensor) -> dict:
    """What ten folds of policies, each predicted from the others, say of the fit. Spread is that within a
    search: its offset explains nothing."""
    of_policy = x.unique(dim=0, return_inverse=True)[1]
    count, predicted = int(of_policy.max()) + 1, torch.zeros_like(y)
    for fold in torch.randperm(count, generator=torch.Generator().manual_seed(0)).chunk(10):
        held = torch.isin(of_policy, fold)
        known = torch.cat([x[held], F.one_hot(offsets[held], 4).double()], 1)
        predicted[held] = known @ fit(x[~held], offsets[~held], y[~held])
    error, means = y - predicted, torch.stack([y[offsets == i].mean() for i in range(4)])
    r2 = 1 - float(error.square().mean() / (y - means[offsets]).square().mean())
    return {"r2": r2, "residual": float(error.std()), "policies": count}


def noise_of(found: list[dict]) -> float:
    """Standard deviation of one evaluation, from policies that two searches of different offsets share."""
    first, other, pairs = {}, {}, {}
    for r in found:
        bits = tuple(r["bits"])
        if first.setdefault(bits, r)["offset"] != r["offset"]:
            other.setdefault(bits, r)
    for bits, r in other.items():
        place = first[bits]["offset"], r["offset"]
        pairs.setdefault(place, []).append(first[bits]["acr"] - r["acr"])
    pairs = [differences for differences in pairs.values() if len(differences) > 2]
    return math.sqrt(statistics.fmean(statistics.variance(differences) / 2 for differences in pairs))


def best_policy(table, weights: Tensor) -> models.Policy:
    """What maximises the model under the budget. All other layers at 2 bits: the sum has no interactions."""
    costs = []
    for i in range(len(table) - 2):
        bits = torch.full((len(rivals.PAIRS), 2 * (len(table) - 2)), models.MIN_BITS)
        bits[:, 2 * i : 2 * i + 2] = torch.tensor(rivals.PAIRS)
        costs.append((-features(bits) @ weights[:-4]).tolist())
    return rivals.cheapest(table, BUDGET, costs)


def search(kind, seed: int, table, value, noise: float, **settings) -> float:
    """The true value of the policy that a search, of a hundred evaluations if not said, chooses."""
    environment = arq.BitWidthEnvironment(table, BUDGET)
    config = DDPGConfig(**{"episodes": 100, "warmup_episodes": 20} | settings)
    agent = kind(environment.state_size, seed, config)
    generator, found = torch.Generator().manual_seed(10_000 + seed), {}  # an evaluation repeats to the digit

    def noisy(true: float, deviation: float) -> float:
        return true + deviation * float(torch.randn((), generator=generator))

    while agent.episode < agent.config.episodes:
        states, actions, policy = environment.rollout(agent.act)
        key = str(policy)
        if key not in found:
            true = value(policy)
            found[key] = noisy(true, noise), true
        agent.learn(states, actions, (found[key][0] - 0.3) / 0.3)
    finalists = sorted(found.values(), reverse=True)[:5]
    return max((noisy(true, AGAIN * noise), true) for _, true in finalists)[1]


def table_of(results: dict) -> str:
    fit = "fit, cross-validated: {policies} policies, R2 {r2:.3f}, residual {residual:.4f}, noise {noise:.4f}"
    titles = (
        "agent | true value of the choice | lowest | highest | DDPG less it | seeds in which DDPG is ahead"
    )
    lines = [fit.format(**results["fit"]), "", f"| {titles} |", "|---" * 6 + "|"]
    lines.append(f"| best under the budget | {results['best']['value']:.4f} |  |  |  |  |")
    for name in AGENTS:
        chosen = results[name]
        cells = [name, mean_of(chosen, ".4f"), f"{min(chosen):.4f}", f"{max(chosen):.4f}", "", ""]
        if name != "DDPG":
            less = [ours - theirs for ours, theirs in zip(results["DDPG"], chosen)]
            cells[4:] = mean_of(less, "+.4f"), f"{sum(one > 0 for one in less)} of {len(less)}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_of(values: list[float], form: str) -> str:
    """The mean, and its standard error over seeds."""
    return f"{statistics.fmean(values):{form}} ({statistics.stdev(values) / len(values) ** 0.5:.4f})"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--collect", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # sums in another order would lead DDPG elsewhere
    if options.collect:
        lines = (json.dumps(row) + "\n" for row in collect())
        arq.write_whole(REWARDS, "".join(lines).encode())
    found = [json.loads(line) for line in REWARDS.read_text().splitlines()]
    offsets, y = torch.tensor([r["offset"] for r in found]), torch.tensor([r["acr"] for r in found]).double()
    x = features(torch.tensor([r["bits"] for r in found]))
    weights = fit(x, offsets, y)
    table = models.quantize_model(copy.deepcopy(models.build_classifier("resnet20", 10)), 32)

    def value(policy: models.Policy) -> float:
        bits = torch.tensor([sum((policy[layer.name] for layer in table[1:-1]), [])])
        return float(features(bits)[0] @ weights[:-4] + weights[-4])

    best = best_policy(table, weights)
    noise = noise_of(found)
    results = {
        "fit": cross_validated(x, offsets, y) | {"noise": noise},
        "best": {"policy": best, "value": value(best)},
    }
    for name, (kind, settings) in AGENTS.items():
        seeds = options.seeds // (4 if "episodes" in settings else 1)
        chosen = [search(kind, seed, table, value, noise, **settings) for seed in range(max(2, seeds))]
        results[name] = chosen
        print(f"{name}: {statistics.fmean(chosen):.4f}", flush=True)
        arq.write_whole(OUT, results)
    print(table_of(results))


if __name__ == "__main__":
    main()
