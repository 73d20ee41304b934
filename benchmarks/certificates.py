"""How many passes do incremental certificates need, and what do two-sided radii gain?

    python benchmarks/certificates.py --data data --checkpoints DIR

DIR holds resnet20_cifar10_sigma0.25.pt, ...0.50.pt and ...1.00.pt. What float ResNet-20 and its
8- and 4-bit copies predict under the same noise is collected first (hours on two cores; kept in
runs/certificates, so that the same command continues); all certificates are made from that, in
minutes. Prints, and writes results/certificates.json."""

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
IMAGES, SAMPLES = 50, 8000  # per sigma; noisy copies of each
SHARES = [0.01 * 1.4**i for i in range(14)]  # of n: passes that are tried
LEVEL = 0.9  # of the ACR of n samples


# ---- predictions are collected ----
def build_networks(config, checkpoint) -> dict:
    """The float network, and its copies of few bits as training simulates them."""
    train_images, held_out = arq.hold_out(arq.load_images(config, train=True), 500)
    config.checkpoint = checkpoint
    networks = {"float": arq.build_base(config, 10)}
    start, table = arq.prepare(networks["float"], held_out, config)
    for name, num_batches in TUNING_BATCHES.items():
        classifier = copy.deepcopy(start)
        models.set_policy(classifier, models.uniform_policy(table, int(name[0])))
        arq.train(classifier, train_images, config, num_batches, 0.005, "episode")
        networks[name] = classifier
    return networks


def collect(options, sigma: str) -> dict:
    """What each network predicts for the same noisy copies of test images (B, SAMPLES), the
    images' labels, and the classes (B,) that the float network selects."""
    file = WORK / f"{sigma}.pt"
    if file.exists():
        return arq.read_state(file)
    words = f"--dataset cifar10 --images 5000 --sigma {sigma}".split()
    config = arq.parse_config([*words, "--data", options.data])
    images = arq.load_images(config, train=False)
    ids = range(50, 5000, 5000 // IMAGES)
    x = images.batch(ids, config.device)
    collected = {"label": torch.tensor(images.labels)[ids]}
    checkpoint = f"{options.checkpoints}/resnet20_cifar10_sigma{sigma}.pt"
    for name, classifier in build_networks(config, checkpoint).items():
        network = models.integer_network(classifier.to(config.device), config.eval_batch)
        g = Smooth(network, 10, config.sigma, batch_size=config.eval_batch)
        if name == "float":
            collected["selected"] = g.sample_under_noise(x, ids, N0, "select").argmax(1)
        collected[name] = g.predictions(x, ids, torch.full((IMAGES,), SAMPLES), "samples")
        print(f"sigma {sigma}: {name} is sampled", flush=True)
    WORK.mkdir(parents=True, exist_ok=True)
    arq.write_whole(file, collected)
    return collected


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
        samples = self.by_noise[key][:, : int(sizes.max())]
        return samples * (torch.arange(samples.shape[1]) < sizes[:, None])

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


def sharpness(old: Tensor, new: Tensor, selected: list[int], sigma: float) -> dict:
    """Passes per image of right class that reach LEVEL of the ACR which n samples certify, in
    five splits of the samples into n that are cached or replayed, and n fresh ones."""
    n = old.shape[1] // 2
    sizes = [max(10, round(share * n)) for share in SHARES]
    needed = {method: [] for method in METHODS}
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        cached, others = torch.randperm(2 * n, generator=generator).split(n)
        replay = Replay(old[:, cached], new[:, cached], new[:, others], selected, sigma)
        rows = certificates(new[:, cached], selected, sigma)
        full_acr = certify.average_certified_radius(rows)
        for method in METHODS:
            shares = [replay.acr(method, size) / full_acr for size in sizes]
            needed[method].append(passes_needed(sizes, shares))
    disagreement = float((old != new).float().mean())
    return {"right": len(old), "n": n, "disagreement": disagreement, "needed": needed}


def sides(predictions: Tensor, selected: list[int], sigma: float) -> dict:
    """ACR by one- and two-sided radii of the first 1,000 samples; wrong images count 0."""
    rows = certificates(predictions[:, :1000], selected, sigma)
    share = len(rows) / IMAGES
    one_sided = certify.average_certified_radius(rows) * share
    two_sided = certify.average_certified_radius(certify.two_sided(rows)) * share
    return {"one-sided": one_sided, "two-sided": two_sided}


def median(passes: list) -> str:
    value = statistics.median(math.inf if needed is None else needed for needed in passes)
    return "-" if value == math.inf else f"{value:.0f}"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data", help="image tree of CIFAR-10")
    parser.add_argument("--checkpoints", required=True, help="folder of the float networks")
    options = parser.parse_args(argv)
    results = {"sharpness": {}, "sides": {}}
    for sigma in SIGMAS:
        images = collect(options, sigma)
        right = images["label"] == images["selected"]
        selected = images["selected"][right].tolist()
        for name in ("float", *TUNING_BATCHES):
            measured = sides(images[name][right], selected, float(sigma))
            results["sides"][f"{sigma}, {name}"] = measured
            print(f"sigma {sigma}, {name}: ACR {measured}")
        for name in TUNING_BATCHES:
            old, new = images["float"][right], images[name][right]
            measured = sharpness(old, new, selected, float(sigma))
            results["sharpness"][f"{sigma}, {name}"] = {"images": IMAGES, **measured}
            passes = {method: median(values) for method, values in measured["needed"].items()}
            print(f"sigma {sigma}, {name}: passes that reach {LEVEL:.0%} of the ACR {passes}")
    arq.write_whole(ROOT / "results" / "certificates.json", results)


if __name__ == "__main__":
    main()
