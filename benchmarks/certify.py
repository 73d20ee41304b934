"""Certificates measured: sharpness, ranking of policies, one side or two, speed.

    python benchmarks/certify.py --data data --checkpoints DIR

Sharpness: the ACR that each mode of `incremental.certify_incremental` reaches, over the passes it takes, for
8-bit and (briefly fine-tuned) 4-bit copies of float ResNet-20. Ranking: how well cheap rewards order 40
policies. Both replay predictions that are collected first, image by image (hours on two cores; kept under
--work, so that the same command continues). At n = 100,000 samples are drawn with replacement from the
collected ones. Speed is timed in turn in one process. Prints tables and writes benchmarks/certify.json and
benchmarks/certify.txt.
"""

import argparse
import copy
import json
import math
import resource
import statistics
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
from benchmarks import incremental  # noqa: E402

SIGMAS, NETWORKS = ("0.25", "0.50", "1.00"), ("float", "8 bit", "4 bit")
IMAGES, POOL, N0, ALPHA = 50, 8000, 100, 0.001
POLICIES, RANKING_IMAGES, RANKING_CACHE, RANKING_FULL, RANKING_CHEAP = 40, 32, 2000, 1000, 800
TUNING_STEPS = 100
SHARES = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.5, 0.75, 0.9)
SHOWN = (1, 3, 5, 7, 9, 11)  # 1, 2, 5, 10, 20, 50 %
LEVELS, RANKING_SIZES = (0.75, 0.9, 0.95), (20, 40, 100, 200, 500)
KEY = certify.NoiseKey(0, "benchmark")


def sampled(classifier, images, ids, n, sigma, key) -> torch.Tensor:
    """Predicted classes (B, n) of the first n noisy copies of every image, as uint8."""
    network = models.integer_network(classifier)
    stream = certify.noisy_predictions(network, images, ids, [n] * len(ids), sigma, key, 100)
    return torch.cat([classes for _, classes in stream]).view(-1, n).to(torch.uint8)


def networks(options, config, train_images, train_ids, folder):
    """The float base, and its 8- and 4-bit copies; the latter after TUNING_STEPS of fine-tuning."""
    base = models.load_base_checkpoint(f"{options.checkpoints}/resnet20_cifar10_sigma{config.sigma:.2f}.pt",
                                       "resnet20", 10)
    base = arq.prepare(base, config)
    found = {"float": base}
    for bits in (8, 4):
        classifier = copy.deepcopy(base)
        table = models.quantize_model(classifier, 32)
        some = train_images.batch(train_ids[::len(train_ids) // 256], config.device)
        arq.calibrate(classifier, some, config)
        models.set_policy(classifier, models.uniform_policy(table, bits))
        path = folder / f"{bits}bit.pt"
        if bits == 4 and path.exists():
            classifier.load_state_dict(torch.load(path))
        elif bits == 4:
            arq.train(classifier, train_images, train_ids, config, TUNING_STEPS, arq.EPISODE_LR,
                      arq.FINETUNE_DECAY, "episode")
            arq.write_whole(path, classifier.state_dict())
        found[f"{bits} bit"] = classifier
    return found


def pool_files(options, sigma):
    files = [path for path in (options.work / f"sigma{sigma}").glob("*.pt") if path.stem.isdigit()]
    return sorted(files, key=lambda path: int(path.stem))


def collect_pool(options, sigma: str):
    """Real predictions of the three networks on the same POOL noisy copies of test images, kept by image."""
    folder = options.work / f"sigma{sigma}"
    folder.mkdir(parents=True, exist_ok=True)
    if len(pool_files(options, sigma)) == IMAGES:
        return
    config = arq.parse_config(["--dataset", "cifar10", "--data", options.data, "--sigma", sigma,
                               "--device", options.device])
    train_images, test_images = arq.load_images(config)
    search_ids = set(arq.evenly_spaced(500, len(train_images)))
    train_ids = sorted(set(range(len(train_images))) - search_ids)
    nets = networks(options, config, train_images, train_ids, folder)
    for index in arq.evenly_spaced(500, len(test_images))[5:: 500 // IMAGES]:
        path = folder / f"{index}.pt"
        if path.exists():
            continue
        start = time.monotonic()
        image = test_images.batch([index], config.device)
        counts0 = certify.class_counts(nets["float"], image, [index], N0, 10, config.sigma,
                                       KEY.derive("select"), 100)
        found = {"label": test_images.labels[index], "selected": int(counts0.argmax())}
        if found["label"] == found["selected"]:
            for name, network in nets.items():
                found[name] = sampled(network, image, [index], POOL, config.sigma, KEY.derive("pool"))[0]
        arq.write_whole(path, found)
        print(sigma, index, f"{time.monotonic() - start:.1f}", flush=True)


def collect_ranking(options):
    """POLICIES policies: predictions on the cached noise, on fresh noise, and a long reference."""
    folder = options.work / "ranking"
    folder.mkdir(parents=True, exist_ok=True)
    if len(list(folder.glob("policy*.pt"))) == POLICIES:
        return
    config = arq.parse_config(["--dataset", "cifar10", "--data", options.data, "--sigma", "0.25",
                               "--device", options.device])
    train_images, _ = arq.load_images(config)
    search_ids = arq.evenly_spaced(500, len(train_images))
    train_ids = sorted(set(range(len(train_images))) - set(search_ids))
    ids = search_ids[:: 500 // RANKING_IMAGES][:RANKING_IMAGES]
    images, labels = train_images.batch(ids, config.device), [train_images.labels[i] for i in ids]
    base = arq.prepare(models.load_base_checkpoint(f"{options.checkpoints}/resnet20_cifar10_sigma0.25.pt",
                                                   "resnet20", 10), config)
    table = models.quantize_model(base, 32)
    arq.calibrate(base, images, config)
    path = folder / "cache.pt"
    if not path.exists():
        cache = certify.certify_and_cache(base, images, labels, ids, 10, 0.25, N0, RANKING_CACHE, ALPHA,
                                          KEY.derive("ranking"), 100)
        arq.write_whole(path, {"rows": [vars(row) for row in cache.certificates],
                               "predictions": cache.predictions, "key": tuple(cache.key)})
    saved = torch.load(path)
    right = [i for i, row in enumerate(saved["rows"]) if row["selected"] == row["label"]]
    key = certify.NoiseKey(*saved["key"])
    images, ids = images[right], [ids[i] for i in right]
    state = copy.deepcopy(base.state_dict())
    generator = torch.Generator().manual_seed(0)
    policies = []
    for _ in range(POLICIES):
        budget = 0.005 + 0.015 * float(torch.rand((), generator=generator))
        environment = arq.BitWidthEnvironment(table, budget)
        policies.append(environment.rollout(lambda s: float(torch.rand((), generator=generator)))[2])
    for number, policy in enumerate(policies):
        path = folder / f"policy{number}.pt"
        if path.exists():
            continue
        start = time.monotonic()
        base.load_state_dict(state)
        models.set_policy(base, policy)
        arq.train(base, train_images, train_ids, config, 12, arq.EPISODE_LR, arq.FINETUNE_DECAY, "episode")
        found = {"policy": policy, "bitops_ratio": models.bitops_ratio(table, policy)}
        for name, n, noise in (("replay", RANKING_CHEAP, key), ("full", RANKING_FULL, KEY.derive("full")),
                               ("fresh", RANKING_CHEAP, KEY.derive(f"policy{number}"))):
            found[name] = sampled(base, images, ids, n, 0.25, noise)
        arq.write_whole(path, found)
        print("policy", number, f"{found['bitops_ratio']:.4f} {time.monotonic() - start:.1f}", flush=True)

# ---- replaying what was collected ----

class Replay:
    """Certifies from collected predictions: stands in for the sampling of `incremental.certify_incremental`.

    old, new, fresh: (B, n) what f predicted, what f^P predicted on the same noise, and on other noise.
    """

    def __init__(self, old, new, fresh, selected, sigma):
        self.new, self.fresh, self.key = new, fresh, KEY
        self.n = old.shape[1]
        rows = []
        for i, (votes, top) in enumerate(zip(old, selected)):
            n_a = int((votes == top).sum())
            rows.append(certify.Certificate(i, top, top, 0.0, 1, "", top, n_a, 0, self.n, N0, sigma, ALPHA))
        self.cache = certify.ReplayCache(rows, old, KEY)

    def predictions(self, classifier, images, ids, sigma, batch_size, dtype, sizes, key, first):
        source = self.new if key == KEY else self.fresh
        assert first + int(sizes.max()) <= source.shape[1], "more passes than were collected"
        source = source[:, first:first + int(sizes.max())]
        return source * (torch.arange(source.shape[1]) < sizes[:, None])

    def certify(self, n_p, mode):
        """(ACR, mean passes, images by method)."""
        certify._predictions = self.predictions
        if mode == "estimate":
            return float(certify.estimate_radii(None, self.cache, None, n_p).mean()), n_p, {}
        rows = incremental.certify_incremental(None, self.cache, None, n_p, ALPHA, mode=mode)
        methods = {name: sum(row.method == name for row in rows) for name in incremental.METHODS}
        return certify.average_certified_radius(rows), statistics.mean(r.passes for r in rows), methods

    def two_counts(self, n_p):
        """The other inequality tried: p_A, less Clopper-Pearson bounds of both kinds of change."""
        acr = 0.0
        for row, old, new in zip(self.cache.certificates, self.cache.predictions, self.new):
            before, after = old[:n_p] == row.selected, new[:n_p] == row.selected
            p_a = (certify.lower_confidence_bound(row.n_a, self.n, ALPHA)
                   - certify.upper_confidence_bound(int((before & ~after).sum()), n_p, ALPHA / 2)
                   + certify.lower_confidence_bound(int((after & ~before).sum()), n_p, ALPHA / 2))
            acr += certify.certified_radius(min(max(p_a, 0), 1), row.sigma) / len(self.new)
        return acr


def read_pool(options, sigma):
    """Images of right class as {network: (B, POOL)}; their classes; the number of images in all."""
    found = [torch.load(path) for path in pool_files(options, sigma)]
    right = [one for one in found if one["label"] == one["selected"]]
    pool = {name: torch.stack([one[name] for one in right]) for name in NETWORKS}
    return pool, [one["selected"] for one in right], len(found)


def passes_needed(sizes, shares, level):
    """Passes at which the share of the full ACR reaches `level`, linear in the logarithm between sizes."""
    for (m0, s0), (m1, s1) in zip(zip(sizes, shares), zip(sizes[1:], shares[1:])):
        if s0 < level <= s1:
            return math.exp(math.log(m0) + (level - s0) / (s1 - s0) * math.log(m1 / m0))
    return sizes[0] if shares[0] >= level else math.nan


def sharpness(options, n=4000, bootstrap=False):
    """ACR over passes by every mode, five splits of the pool into cached and fresh samples."""
    results = {}
    for sigma in SIGMAS:
        pool, selected, images = read_pool(options, sigma)
        for name in NETWORKS[1:]:
            curves = {mode: [] for mode in (*incremental.MODES, "two counts")}
            for seed in range(5):
                generator = torch.Generator().manual_seed(seed)
                if bootstrap:
                    some, other = torch.randint(POOL, (2, n), generator=generator)
                else:
                    some, other = torch.randperm(POOL, generator=generator).split(n)
                replay = Replay(pool["float"][:, some], pool[name][:, some], pool[name][:, other], selected,
                                float(sigma))
                votes = (replay.new == torch.tensor(selected)[:, None]).sum(1)
                p_full = certify.lower_confidence_bound(votes, n, ALPHA)
                full = float(certify.certified_radius(p_full, float(sigma)).mean())
                for mode in curves:
                    sizes = [max(10, round(share * n)) for share in SHARES]
                    if mode == "two counts":
                        acrs = [replay.two_counts(m) for m in sizes if 2 * m <= n]
                    elif mode == "paired":
                        acrs = [replay.certify(m, mode)[0] for m in sizes if 2 * m <= n]
                    else:
                        acrs = [replay.certify(m, mode)[0] for m in sizes]
                    curves[mode].append([acr / full for acr in acrs])
            changed = pool["float"] != pool[name]
            results[f"{sigma}, {name}"] = {
                "images": images, "right": len(selected), "disagreement": float(changed.float().mean()),
                "sizes": sizes, "share_of_full_acr": curves, "needed": needed(sizes, curves),
                "auto_methods": [replay.certify(round(share * n), "auto")[2] for share in (0.02, 0.2)]}
    return results


def needed(sizes, curves):
    """{level: {mode: passes by split}}, with the ratio of auto's passes to fresh sampling's."""
    found = {}
    for level in LEVELS:
        by_mode = {mode: [passes_needed(sizes, shares, level) for shares in runs]
                   for mode, runs in curves.items()}
        by_mode["auto over off"] = [a / b for a, b in zip(by_mode["auto"], by_mode["off"])]
        found[str(level)] = by_mode
    return found


def sides(options):
    """One- and two-sided ACR of the same counts; images of wrong class count 0 in both."""
    results = {}
    for sigma in SIGMAS:
        pool, selected, images = read_pool(options, sigma)
        for name in NETWORKS:
            for n in (1000, POOL):
                votes = torch.stack([row[:n].long().bincount(minlength=10) for row in pool[name]])
                tops = torch.tensor(selected)
                rows = certify._certificates(range(len(tops)), selected, tops, votes, N0, float(sigma),
                                             ALPHA, 0)
                one, two = (certify.average_certified_radius(some) * len(rows) / images
                            for some in (rows, certify.two_sided(rows)))
                results[f"{sigma}, {name}, n = {n}"] = {"one-sided": one, "two-sided": two}
    return results


def ranking(options):
    """Kendall's tau between cheap rewards and the ACR of RANKING_FULL samples, over policies."""
    folder = options.work / "ranking"
    saved = torch.load(folder / "cache.pt")
    right = [i for i, row in enumerate(saved["rows"]) if row["selected"] == row["label"]]
    selected = [saved["rows"][i]["selected"] for i in right]
    policies = [torch.load(path) for path in sorted(folder.glob("policy*.pt"))]
    column, old = torch.tensor(selected)[:, None], saved["predictions"][right]
    rewards = {(mode, m): [] for mode in (*incremental.MODES, "estimate") for m in RANKING_SIZES}
    full = []
    for policy in policies:
        p_full = certify.lower_confidence_bound((policy["full"] == column).sum(1), RANKING_FULL, ALPHA)
        full.append(float(certify.certified_radius(p_full, 0.25).mean()))
        replay = Replay(old, policy["replay"], policy["fresh"], selected, 0.25)
        for mode, m in rewards:
            try:
                rewards[mode, m].append(replay.certify(m, mode)[0])
            except AssertionError:  # a plan that wants more samples of one image than were collected
                rewards[mode, m].append(math.nan)
    results, generator = {"policies": len(policies), "images": len(right), "tau": {}}, torch.Generator()
    full = torch.tensor(full)
    picks = torch.randint(len(full), (1000, len(full)), generator=generator.manual_seed(0))
    for (mode, m), values in rewards.items():
        values = torch.tensor(values)
        if values.isnan().any():
            continue
        taus = sorted(kendalltau(values[pick], full[pick]).statistic for pick in picks)
        results["tau"].setdefault(mode, {})[m] = {"tau": kendalltau(values, full).statistic,
                                                  "low": taus[25], "high": taus[974]}
    return results

def as_published(network, image, n, sigma, batch_size):
    """The usual loop: one image, repeated; noise like it; one class at a time into a list of counts."""
    counts = [0] * 10
    with torch.no_grad():
        for first in range(0, n, batch_size):
            batch = image.repeat(min(batch_size, n - first), 1, 1, 1)
            for top in network(batch + torch.randn_like(batch) * sigma).argmax(1).tolist():
                counts[top] += 1
    return counts


def speed(options, rounds=7, n=1000, batch_size=100):
    """Samples per second of `certify` over the bare forward pass and the usual loop, in turn; and memory."""
    config = arq.parse_config(["--dataset", "cifar10", "--data", options.data, "--device", options.device])
    network = arq.prepare(models.load_base_checkpoint(f"{options.checkpoints}/resnet20_cifar10_sigma0.25.pt",
                                                      "resnet20", 10), config)
    images = arq.load_split(config, False).batch([0, 1000, 2000, 3000], config.device)
    resident = images[:1].expand(batch_size, -1, -1, -1).contiguous()

    def bare():
        with torch.inference_mode():
            for _ in range(4 * n // batch_size):
                network(resident).argmax(1).cpu()

    def ours():
        certify.class_counts(network, images, range(4), n, 10, 0.25, KEY, batch_size)

    def published():
        for image in images:
            as_published(network, image[None], n, 0.25, batch_size)

    def seconds(work):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    for work in (bare, ours, published):
        work()
    times = [[seconds(work) for work in (bare, ours, published)] for _ in range(rounds)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    certify.class_counts(network, images[:1], [0], 40 * n, 10, 0.25, KEY, batch_size)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    cache = certify.certify_and_cache(network, images, [0] * 4, range(4), 10, 0.25, N0, n, ALPHA, KEY,
                                      batch_size)
    return {"device": config.device, "threads": torch.get_num_threads(), "rounds": rounds,
            "over the bare forward pass": statistics.median(b / o for b, o, _ in times),
            "over the usual loop": statistics.median(p / o for _, o, p in times),
            "peak memory grown by 40 times the samples, KiB": grown,
            "replay cache, bytes a sample": cache.predictions.element_size()}


# ---- tables ----

def table(results):
    """The tables of certify.txt, as text."""
    lines = ["Passes are counted an image of right class: an image of wrong class costs the modes nothing,",
             "but plain smoothing as much as any. Shares of the ACR that all n samples certify: mean of 5",
             "splits (lowest to highest). Passes needed: median of the splits."]
    for part, n in (("sharpness", 4000), ("bootstrap", 100_000)):
        for setting, found in results[part].items():
            lines += sharpness_table(setting, found, n)
    lines += ["", "One- and two-sided ACR of the same counts"]
    lines += [f"  {name:<32}{arq.down(row['one-sided'])}  {arq.down(row['two-sided'])}"
              for name, row in results["sides"].items()]
    rank = results["ranking"]
    lines += ["", f"Kendall's tau with the ACR of {RANKING_FULL} samples (95 % bootstrap interval), "
                  f"{rank['policies']} policies, {rank['images']} images, by passes an image"]
    for mode, taus in rank["tau"].items():
        lines.append(f"  {mode:<10}" + "  ".join(f"{m}: {t['tau']:.3f} ({t['low']:.2f}-{t['high']:.2f})"
                                                 for m, t in taus.items()))
    lines += ["", "Speed", *(f"  {name}: {value:.3g}" if isinstance(value, float) else f"  {name}: {value}"
                             for name, value in results["speed"].items())]
    return "\n".join(lines) + "\n"


def sharpness_table(setting, found, n):
    """Shares by mode and passes, then the passes that each level needs."""
    modes = found["share_of_full_acr"]
    lines = ["", f"sigma {setting}, n = {n:,}{' (drawn again)' if n > 4000 else ''}: {found['right']} images "
                 f"of right class among {found['images']}, disagreement {found['disagreement']:.4f}",
             f"{'passes':>8}" + "".join(f"{mode:>22}" for mode in modes)]
    for i in SHOWN:
        line = f"{found['sizes'][i]:>8}"
        for runs in modes.values():
            shares = sorted(run[i] for run in runs)
            line += f"{statistics.mean(shares):>8.3f} ({shares[0]:.3f}-{shares[-1]:.3f})"
        lines.append(line)
    for level, by_mode in found["needed"].items():
        ratio = by_mode["auto over off"]
        needs = ", ".join(f"{mode} {shown(by_mode[mode])}" for mode in modes)
        plain = median(ratio) * found["right"] / found["images"]
        lines.append(f"  {float(level):.0%} needs {needs}; auto over off {median(ratio):.2f} "
                     f"({min(ratio):.2f}-{max(ratio):.2f}), over plain smoothing {plain:.2f}")
    return lines


def shown(passes):
    return "-" if math.isnan(median(passes)) else f"{median(passes):.0f}"


def median(values):
    return statistics.median(values) if values and not any(map(math.isnan, values)) else math.nan


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data", help="image tree of CIFAR-10")
    parser.add_argument("--checkpoints", required=True, help="folder of resnet20_cifar10_sigma0.25.pt etc.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "certify", help="where samples are kept")
    options = parser.parse_args()
    for sigma in SIGMAS:
        collect_pool(options, sigma)
    collect_ranking(options)
    speed_found = speed(options)
    results = {"sharpness": sharpness(options), "bootstrap": sharpness(options, 100_000, bootstrap=True),
               "sides": sides(options), "ranking": ranking(options), "speed": speed_found,
               "torch": torch.__version__}
    (ROOT / "benchmarks" / "certify.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    (ROOT / "benchmarks" / "certify.txt").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
