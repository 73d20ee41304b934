"""How well does a policy's reward rank policies, by samples per image? Kendall's tau on `shapes`.

    python arq.py && python benchmarks/ranking.py --base runs/bases/shapes-*.pt

Random policies under random budgets, each fine-tuned as in an episode. The truth is the ACR that --full fresh
samples per image certify; the rewards are IRS and the estimate, on the first n_p of the cached samples.
Predictions are collected once per policy and replayed. Prints a table and writes results/ranking.json.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch
from scipy.stats import kendalltau

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arq  # noqa: E402
import certify  # noqa: E402
import models  # noqa: E402

SIZES = (100, 150, 200, 300, 500)  # n_p


class Recorded(certify.Smooth):
    """Replays predictions that were recorded, by key: {key: (B, largest size)}."""

    def record(self, images, ids, sizes: dict) -> "Recorded":
        self.table = {key: super(Recorded, self).predictions(images, ids, sizes[key], key) for key in sizes}
        return self

    def predictions(self, images, ids, sizes, key, first=0):
        part = self.table[key][:, first : first + int(sizes.max())]
        return torch.where(torch.arange(part.shape[1]) < sizes[:, None], part, 0)


def rewards(g: Recorded, cache, right: float) -> dict:
    """ACR of all search images by reward and n_p; images of wrong class, a share 1 - right, count 0."""
    found = {}
    for n_p in SIZES:
        rows = g.certify_incremental(None, cache, n_p)
        found[f"irs {n_p}"] = right * certify.average_certified_radius(rows)
        found[f"estimate {n_p}"] = right * float(g.estimate_radii(None, cache, n_p).mean())
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", required=True, help="a float base that arq.py trained")
    parser.add_argument("--policies", type=int, default=30)
    parser.add_argument("--full", type=int, default=600, help="samples per image behind the truth")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "ranking.json")
    options = parser.parse_args(argv)
    config = arq.parse_config(["--checkpoint", options.base, "--device", "cpu"])
    images = arq.load_images(config, True)
    train_images, search_images = arq.hold_out(images, config.search_images)
    base = arq.build_base(config, len(images.classes))
    g = certify.Smooth(base, 10, config.sigma, config.seed, config.eval_batch, "search")
    x = search_images.batch(range(len(search_images)))
    cache = g.certify_and_cache(x, search_images.labels, search_images.ids, config.n0, max(SIZES))
    some = [i for i, row in enumerate(cache.certificates) if row.selected == row.label]
    right, ids = len(some) / len(x), [search_images.ids[i] for i in some]
    rows = [cache.certificates[i] for i in some]
    cache = certify.ReplayCache(rows, cache.predictions[some], cache.key)
    ones = torch.ones(len(rows), dtype=torch.int64)
    n_a = torch.tensor([row.n_a for row in rows])
    near_one = (certify.lower_confidence_bound(n_a, max(SIZES), config.alpha) >= config.gamma).long()
    evaluate = arq.policy_evaluator(base, train_images, search_images, config)
    table = models.quantize_model(copy.deepcopy(base), config.image_size)
    generator = torch.Generator().manual_seed(0)
    policies = []
    for number in range(options.policies):
        budget = 0.006 + 0.012 * float(torch.rand((), generator=generator))
        environment = arq.BitWidthEnvironment(table, budget)
        policy = environment.rollout(lambda state: float(torch.rand((), generator=generator)))[2]
        began = time.monotonic()
        quantized = evaluate.quantize(policy)
        evaluate.finetune(quantized)
        network = arq.integers(quantized, config)
        g = Recorded(network, 10, config.sigma, config.seed, config.eval_batch, "search")
        sizes = {cache.key: max(SIZES) * ones, cache.key + "/fresh": max(SIZES) * near_one}
        g.record(x[some], ids, {**sizes, f"truth {number}": options.full * ones})
        votes = (g.table[f"truth {number}"] == torch.tensor([row.selected for row in rows])[:, None]).sum(1)
        p_a = certify.lower_confidence_bound(votes, options.full, config.alpha)
        truth = right * float(certify.certified_radius(p_a, config.sigma).mean())
        policies.append({"truth": truth, "bitops_ratio": models.bitops_ratio(table, policy)})
        policies[-1] |= rewards(g, cache, right)
        print(
            f"policy {number + 1}/{options.policies}: ACR {truth:.4f}, {time.monotonic() - began:.1f} s",
            flush=True,
        )
    names = [name for name in policies[0] if name not in ("truth", "bitops_ratio")]
    truth = [policy["truth"] for policy in policies]
    tau = {name: kendalltau(truth, [policy[name] for policy in policies]).statistic for name in names}
    for n_p in SIZES:
        print(f"n_p {n_p:>5}: IRS {tau[f'irs {n_p}']:.3f}, estimate {tau[f'estimate {n_p}']:.3f}")
    found = {"images": len(x), "right": len(some), "full": options.full, "tau": tau, "policies": policies}
    options.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
