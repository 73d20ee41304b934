"""How many passes do incremental certificates need, and what do two-sided radii gain?

    python benchmarks/certificates.py --data data --checkpoints DIR

DIR holds resnet20_cifar10_sigma0.25.pt, ...0.50.pt and ...1.00.pt. What float ResNet-20 and its
8- and 4-bit copies predict under the same noise is collected first (hours on two cores; kept in
runs/certificates, so that the same command continues); all certificates are made from that, in
minutes. Prints two tables and writes results/certificates.json."""

import argparse
import copy
import math
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import arq
import certify
import models
from benchmarks.incremental import certify_incremental
from certify import Certificate, ReplayCache, Smooth

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "runs" / "certificates"
SIGMAS = "0.25", "0.50", "1.00"
TUNING_BATCHES = {"8 bit": 0, "4 bit": 100}
METHODS = "fresh", "IRS", "auto"
N0, ALPHA, ALPHA_ZETA = 100, 0.001, 0.001
SHARES = [0.01 * 1.4**i for i in range(14)]  # of n: passes that are tried
LEVEL = 0.9  # of the ACR of n samples


# ---- predictions are collected ----
def build_networks(options, config) -> dict:
    """The float network, and its copies of few bits as they are certified."""
    train_images, held_out = arq.hold_out(arq.load_images(config, train=True), 500)
    config.checkpoint = f"{options.checkpoints}/resnet20_cifar10_sigma{config.sigma:.2f}.pt"
    networks = {"float": arq.build_base(config, 10)}
    start, table = arq.prepare(networks["float"], held_out, config)
    for name, num_batches in TUNING_BATCHES.items():
        classifier = copy.deepcopy(start)
        models.set_policy(classifier, models.uniform_policy(table, int(name[0])))
        arq.train(classifier, train_images, config, num_batches, arq.EPISODE_LR, "episode")
        networks[name] = arq.integer_network(classifier, config)
    return networks


def collect(options, sigma: str) -> list[dict]:
    """What each network predicts for the same noisy copies of test images: a dict per image."""
    WORK.mkdir(parents=True, exist_ok=True)
    indices = range(50, 5000, 5000 // options.images)
    files = [WORK / f"{sigma}-{index}-{options.samples}.pt" for index in indices]
    if not all(file.exists() for file in files):
        words = ["--dataset", "cifar10", "--data", options.data, "--sigma", sigma]
        config = arq.parse_config(words)
        images = arq.load_images(config, train=False)
        networks = build_networks(options, config)
    for index, file in zip(indices, files):
        if file.exists():
            continue
        x = images.batch([index], config.device)
        found = {"label": images.labels[index]}
        for name, network in networks.items():
            g = Smooth(network, 10, config.sigma, batch_size=config.eval_batch)
            if name == "float":
                found["selected"] = int(g.sample_under_noise(x, [index], N0, "select").argmax())
            sizes = torch.tensor([options.samples])
            found[name] = g.predictions(x, [index], sizes, "samples")[0]
        arq.write_whole(file, found)
        print(f"sigma {sigma}: image {index} is sampled", flush=True)
    return [arq.read_state(file) for file in files]


# ---- certificates are made from them ----
class Replay(Smooth):
    """g^P whose samples are collected predictions (B, n): of f (old) and f^P (new) on the same
    noise, of f^P on other noise (fresh). The first tenth serves as pilot."""

    def __init__(self, old, new, fresh, selected: list[int], sigma: float):
        super().__init__(None, 10, sigma, levels=None)
        self.selected, n = selected, old.shape[1]
        pilot, rest = slice(0, n // 10), slice(n // 10, n)
        self.by_noise = {"all": new, "pilot": new[:, pilot], "rest": new[:, rest]}
        self.by_noise |= {"all/fresh": fresh, "rest/fresh": fresh}
        rows = certificates(old, selected, sigma)
        self.cache = ReplayCache(rows, old, "all")
        self.rest = ReplayCache(rows, old[:, rest], "rest")
        self.pilot = ReplayCache(rows, old[:, pilot], "pilot")

    def predictions(self, images, ids, sizes, key):
        found = self.by_noise[key][:, : int(sizes.max())]
        return found * (torch.arange(found.shape[1]) < sizes[:, None])

    def acr(self, method: str, n_p: int) -> float:
        if method == "fresh":
            fresh = self.by_noise["all/fresh"][:, :n_p]
            rows = certificates(fresh, self.selected, self.sigma, ALPHA + ALPHA_ZETA)
        elif method == "IRS":
            rows = self.certify_incremental(None, self.cache, n_p, ALPHA_ZETA)
        else:
            rows = certify_incremental(self, None, self.rest, self.pilot, n_p, ALPHA_ZETA)
        return certify.average_certified_radius(rows)


def certificates(predictions: Tensor, selected, sigma: float, alpha=ALPHA) -> list[Certificate]:
    """CERTIFY from predictions (B, n) of images whose selected class is right."""
    n = predictions.shape[1]
    rows = []
    for i, (votes, top) in enumerate(zip(predictions, selected)):
        counts = votes.long().bincount(minlength=10)
        n_a = int(counts[top])
        n_b = int(counts.index_fill(0, torch.tensor(top), 0).max())
        p_a = certify.lower_confidence_bound(n_a, n, alpha)
        fields = {"predict": top, "radius": certify.certified_radius(p_a, sigma), "time": ""}
        fields |= {"selected": top, "n_a": n_a, "n_b": n_b, "n": n, "n0": N0}
        rows.append(Certificate(i, top, correct=1, **fields, sigma=sigma, alpha=alpha))
    return rows


def passes_needed(sizes: list[int], shares: list[float]) -> float | None:
    """Passes at which the share of the full ACR reaches LEVEL; linear in their logarithm."""
    if shares[0] >= LEVEL:
        return sizes[0]
    for i in range(1, len(shares)):
        if shares[i - 1] < LEVEL <= shares[i]:
            part = (LEVEL - shares[i - 1]) / (shares[i] - shares[i - 1])
            return sizes[i - 1] * (sizes[i] / sizes[i - 1]) ** part
    return None


def sharpness(right: list[dict], name: str, sigma: float) -> dict:
    """Passes per image of right class that reach LEVEL of the ACR which n samples certify, in
    five splits of the samples into n that are cached or replayed, and n fresh ones."""
    selected = [image["selected"] for image in right]
    old, new = (torch.stack([image[key] for image in right]) for key in ("float", name))
    n = old.shape[1] // 2
    needed = {method: [] for method in METHODS}
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        cached, others = torch.randperm(2 * n, generator=generator).split(n)
        replay = Replay(old[:, cached], new[:, cached], new[:, others], selected, sigma)
        rows = certificates(new[:, cached], selected, sigma)
        full_acr = certify.average_certified_radius(rows)
        for method in METHODS:
            sizes = [max(10, round(share * n)) for share in SHARES]
            shares = [replay.acr(method, size) / full_acr for size in sizes]
            needed[method].append(passes_needed(sizes, shares))
    disagreement = float((old != new).float().mean())
    return {"right": len(right), "n": n, "disagreement": disagreement, "needed": needed}


def sides(right: list[dict], total: int, name: str, sigma: float) -> dict:
    """ACR by one- and two-sided radii of the first 1,000 samples, over `total` images."""
    predictions = torch.stack([image[name][:1000] for image in right])
    rows = certificates(predictions, [image["selected"] for image in right], sigma)
    acrs = {}
    for side, radii in (("one-sided", rows), ("two-sided", certify.two_sided(rows))):
        acrs[side] = certify.average_certified_radius(radii) * len(right) / total
    return acrs


def median(passes: list) -> float:
    return statistics.median(math.inf if value is None else value for value in passes)


def tables(results: dict) -> str:
    lines = [
        f"passes per image of right class that reach {LEVEL:.0%} of the ACR of n samples",
        "",
    ]
    lines.append(f"| sigma, bits | {' | '.join(METHODS)} | auto / fresh | auto / all images |")
    lines.append("|---|---|---|---|---|---|")
    for setting, found in results["sharpness"].items():
        needed = found["needed"]
        passes = [median(needed[method]) for method in METHODS]
        cells = ["-" if value == math.inf else f"{value:.0f}" for value in passes]
        pairs = zip(needed["auto"], needed["fresh"])
        ratio = median([auto and fresh and auto / fresh for auto, fresh in pairs])
        plain = ratio * found["right"] / found["images"]  # which samples wrong images, too
        lines.append(f"| {setting} | {' | '.join(cells)} | {ratio:.2f} | {plain:.2f} |")
    lines += [
        "",
        "| sigma, network | ACR, one-sided | two-sided |",
        "|---|---|---|",
    ]
    for setting, acrs in results["sides"].items():
        cells = [arq.cut(acr) for acr in acrs.values()]
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data", help="image tree of CIFAR-10")
    parser.add_argument("--checkpoints", required=True, help="folder of the float networks")
    parser.add_argument("--images", type=int, default=50, help="per sigma")
    parser.add_argument("--samples", type=int, default=8000, help="noisy copies of each")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    options = parser.parse_args(argv)
    options.out.mkdir(exist_ok=True)
    results = {"sharpness": {}, "sides": {}}
    for sigma in SIGMAS:
        images = collect(options, sigma)
        right = [image for image in images if image["label"] == image["selected"]]
        for name in ("float", *TUNING_BATCHES):
            results["sides"][f"{sigma}, {name}"] = sides(right, len(images), name, float(sigma))
        for name in TUNING_BATCHES:
            found = sharpness(right, name, float(sigma))
            results["sharpness"][f"{sigma}, {name}"] = {"images": len(images), **found}
    arq.write_whole(options.out / "certificates.json", results)
    print(tables(results))


if __name__ == "__main__":
    main()
