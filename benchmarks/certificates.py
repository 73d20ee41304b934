"""Certificates measured: sharpness, ranking of policies, one side or two, speed.

    python benchmarks/certificates.py --data data --checkpoints DIR

Sharpness: the ACR that each mode of `incremental.certify_incremental` reaches, over the passes it takes, for
8-bit and (briefly fine-tuned) 4-bit copies of float ResNet-20. Ranking: how well cheap rewards order 40
policies. Both replay predictions that are collected first, image by image (hours on two cores; kept under
--work, so that the same command continues). At n = 100,000 samples are drawn with replacement from the
collected ones. Speed is timed in turn in one process. Prints tables and writes results/certificates.json and
results/certificates.txt.
"""

import argparse
import copy
import math
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from scipy.stats import kendalltau

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import arq
import certify
import models
from benchmarks import incremental
from certify import Smooth, certified_radius, lower_confidence_bound, upper_confidence_bound

ROOT = Path(__file__).resolve().parents[1]
SIGMAS = ("0.25", "0.50", "1.00")
NETWORKS = ("float", "8 bit", "4 bit")
N0, ALPHA = 100, 0.001
RANKING_CACHE, RANKING_FULL, RANKING_CHEAP = 2000, 1000, 800  # samples per image
TUNING_STEPS = 100
SHARES = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.5, 0.75, 0.9)
SHOWN = (1, 3, 5, 7, 9, 11)  # 1, 2, 5, 10, 20, 50 %
LEVELS = (0.75, 0.9, 0.95)
RANKING_SIZES = (20, 40, 100, 200, 500)
KEY = "0|benchmark"


# ---- predictions are collected ----


def load_config(options, sigma: str) -> arq.Config:
    steps = "--finetune-steps", "12"
    return arq.parse_config(
        ["--dataset", "cifar10", "--data", options.data, "--sigma", sigma, "--device", options.device, *steps]
    )


def load_base(options, config):
    path = f"{options.checkpoints}/resnet20_cifar10_sigma{config.sigma:.2f}.pt"
    return (
        models.load_base_checkpoint(path, "resnet20", 10)
        .to(config.device, memory_format=torch.channels_last)
        .eval()
    )


def sampled(classifier, images, ids, n, config, key) -> torch.Tensor:
    """Predicted classes (B, n) of the first n noisy copies of every image, as uint8."""
    g = Smooth(arq.integers(classifier, config), 10, config.sigma)
    return g.predictions(images, ids, torch.full((len(images),), n), key)


def networks(options, config, train_images, folder):
    """The float base, and its 8- and 4-bit copies; the latter after TUNING_STEPS of fine-tuning."""
    base = load_base(options, config)
    found = {"float": base}
    for bits in (8, 4):
        classifier = copy.deepcopy(base)
        table = models.quantize_model(classifier, 32)
        arq.calibrate(classifier, train_images, config)
        models.set_policy(classifier, models.uniform_policy(table, bits))
        path = folder / f"{bits}bit.pt"
        if bits == 4 and path.exists():
            classifier.load_state_dict(arq.read_state(path))
        elif bits == 4:
            arq.train(classifier, train_images, config, TUNING_STEPS, arq.EPISODE_LR, "episode")
            arq.write_whole(path, classifier.state_dict())
        found[f"{bits} bit"] = classifier
    return found


def pool_files(options, sigma):
    files = [path for path in (options.work / f"sigma{sigma}").glob("*.pt") if path.stem.isdigit()]
    return sorted(files, key=lambda path: int(path.stem))


def collect_pool(options, sigma: str):
    """Real predictions of the three networks on the same --pool noisy copies of test images, by image."""
    if len(pool_files(options, sigma)) == options.images:
        return
    folder = options.work / f"sigma{sigma}"
    config = load_config(options, sigma)
    train_images, _ = arq.hold_out(arq.load_images(config, True), 500)
    test_images = arq.load_images(config, False)
    nets = networks(options, config, train_images, folder)
    for index in arq.evenly_spaced(500, len(test_images))[5 :: 500 // options.images]:
        path = folder / f"{index}.pt"
        if path.exists():
            continue
        start = time.monotonic()
        image = test_images.batch([index], config.device)
        g = Smooth(nets["float"], 10, config.sigma)
        counts0 = g.sample_under_noise(image, [index], N0, KEY + "/select")
        found = {"label": test_images.labels[index], "selected": int(counts0.argmax())}
        if found["label"] == found["selected"]:
            for name, network in nets.items():
                found[name] = sampled(network, image, [index], options.pool, config, KEY + "/pool")[0]
        arq.write_whole(path, found)
        print(sigma, index, f"{time.monotonic() - start:.1f}", flush=True)


def collect_ranking(options):
    """--policies policies: predictions on the cached noise, on fresh noise, and a long reference."""
    folder = options.work / "ranking"
    if len(list(folder.glob("policy*.pt"))) == options.policies:
        return
    config = load_config(options, "0.25")
    train_images, held_out = arq.hold_out(arq.load_images(config, True), 500)
    search_images = held_out.subset(list(range(0, 500, 15))[:32])
    images = search_images.batch(range(32), config.device)
    base = load_base(options, config)
    path = folder / "cache.pt"
    if not path.exists():
        g = Smooth(base, 10, 0.25, purpose="benchmark/ranking")
        cache = g.certify_and_cache(images, search_images.labels, search_images.ids, N0, RANKING_CACHE, ALPHA)
        rows = [vars(row) for row in cache.certificates]
        arq.write_whole(path, {"rows": rows, "predictions": cache.predictions, "key": cache.key})
    saved = arq.read_state(path)
    right = [i for i, row in enumerate(saved["rows"]) if row["selected"] == row["label"]]
    ids = [search_images.ids[i] for i in right]
    evaluate = arq.policy_evaluator(base, train_images, search_images, config)
    table = models.quantize_model(copy.deepcopy(base), 32)
    generator = torch.Generator().manual_seed(0)
    for number in range(options.policies):
        budget = 0.005 + 0.015 * float(torch.rand((), generator=generator))
        environment = arq.BitWidthEnvironment(table, budget)
        policy = environment.rollout(lambda state: float(torch.rand((), generator=generator)))[2]
        path = folder / f"policy{number}.pt"
        if path.exists():
            continue
        start = time.monotonic()
        quantized = evaluate.quantize(policy)
        evaluate.finetune(quantized)
        found = {"policy": policy, "bitops_ratio": models.bitops_ratio(table, policy)}
        for name, n, noise in (
            ("replay", RANKING_CHEAP, saved["key"]),
            ("full", RANKING_FULL, KEY + "/full"),
            ("fresh", RANKING_CHEAP, f"{KEY}/policy{number}"),
        ):
            found[name] = sampled(quantized, images[right], ids, n, config, noise)
        arq.write_whole(path, found)
        print("policy", number, f"{found['bitops_ratio']:.4f} {time.monotonic() - start:.1f}", flush=True)


# ---- replaying what was collected ----


class Replay(Smooth):
    """g^P whose samples are collected predictions.

    old, new, fresh: (B, n) what f predicted, what f^P predicted on the same noise, and on other noise.
    """

    def __init__(self, old, new, fresh, selected, sigma):
        super().__init__(None, 10, sigma)
        self.new, self.fresh = new, fresh
        n = old.shape[1]
        rows = []
        for i, (votes, top) in enumerate(zip(old, selected)):
            n_a = int((votes == top).sum())
            counts = {"selected": top, "n_a": n_a, "n_b": 0, "n": n, "n0": N0}
            rows.append(certify.Certificate(i, top, top, 0.0, 1, "", **counts, sigma=sigma, alpha=ALPHA))
        self.cache = certify.ReplayCache(rows, old, KEY)

    def predictions(self, images, ids, sizes, key, first=0):
        source = self.new if key == KEY else self.fresh
        last = first + int(sizes.max())
        if last > source.shape[1]:
            raise IndexError("more passes than were collected")
        source = source[:, first:last]
        return source * (torch.arange(source.shape[1]) < sizes[:, None])

    def acr(self, n_p, mode):
        if mode == "estimate":
            return float(self.estimate_radii(None, self.cache, n_p).mean())
        if mode == "two counts":
            return self.two_counts(n_p)
        return certify.average_certified_radius(self.rows(n_p, mode))

    def rows(self, n_p, mode):
        return incremental.certify_incremental(self, None, self.cache, n_p, ALPHA, mode=mode)

    def two_counts(self, n_p):
        """The other inequality tried: p_A, less Clopper-Pearson bounds of both kinds of change."""
        selected = torch.tensor([row.selected for row in self.cache.certificates])[:, None]
        old = self.cache.predictions == selected
        before, after = old[:, :n_p], self.new[:, :n_p] == selected
        p_a = (
            lower_confidence_bound(old.sum(1), old.shape[1], ALPHA)
            - upper_confidence_bound((before & ~after).sum(1), n_p, ALPHA / 2)
            + lower_confidence_bound((after & ~before).sum(1), n_p, ALPHA / 2)
        )
        return float(certified_radius(p_a.clamp(0, 1), self.sigma).mean())


def read_pool(options, sigma):
    """Images of right class as {network: (B, --pool)}; their classes; the number of images in all."""
    found = [arq.read_state(path) for path in pool_files(options, sigma)]
    right = [one for one in found if one["label"] == one["selected"]]
    pool = {name: torch.stack([one[name] for one in right]) for name in NETWORKS}
    return pool, [one["selected"] for one in right], len(found)


def passes_needed(sizes, shares, level):
    """Passes at which the share of the full ACR reaches `level`, linear in the logarithm between sizes."""
    for (m0, s0), (m1, s1) in zip(zip(sizes, shares), zip(sizes[1:], shares[1:])):
        if s0 < level <= s1:
            return math.exp(math.log(m0) + (level - s0) / (s1 - s0) * math.log(m1 / m0))
    return sizes[0] if shares[0] >= level else math.nan


def sharpness(options, n, bootstrap=False):
    """ACR over passes by every mode, five splits of the pool into cached and fresh samples."""
    results = {}
    sizes = [max(10, round(share * n)) for share in SHARES]
    for sigma in SIGMAS:
        pool, selected, images = read_pool(options, sigma)
        for name in NETWORKS[1:]:
            curves = {mode: [] for mode in (*incremental.MODES, "two counts")}
            for seed in range(5):
                generator = torch.Generator().manual_seed(seed)
                if bootstrap:
                    some, other = torch.randint(options.pool, (2, n), generator=generator)
                else:
                    some, other = torch.randperm(options.pool, generator=generator).split(n)
                old, new, fresh = pool["float"][:, some], pool[name][:, some], pool[name][:, other]
                replay = Replay(old, new, fresh, selected, float(sigma))
                votes = (new == torch.tensor(selected)[:, None]).sum(1)
                p_full = lower_confidence_bound(votes, n, ALPHA)
                full = float(certified_radius(p_full, float(sigma)).mean())
                for mode, runs in curves.items():
                    most = n // 2 if mode in ("paired", "two counts") else n
                    runs.append([replay.acr(m, mode) / full for m in sizes if m <= most])
            changed = pool["float"] != pool[name]
            results[f"{sigma}, {name}"] = {
                "images": images,
                "right": len(selected),
                "disagreement": float(changed.float().mean()),
                "sizes": sizes,
                "share_of_full_acr": curves,
                "needed": needed(sizes, curves),
                "auto_methods": [auto_methods(replay, round(share * n)) for share in (0.02, 0.2)],
            }
    return results


def auto_methods(replay, n_p):
    """Images by the method that auto chose for them, in the last split."""
    chosen = [row.method for row in replay.rows(n_p, "auto")]
    return {name: chosen.count(name) for name in incremental.METHODS}


def needed(sizes, curves):
    """{level: {mode: passes by split}}, with the ratio of auto's passes to fresh sampling's."""
    found = {}
    for level in LEVELS:
        by_mode = {}
        for mode, runs in curves.items():
            by_mode[mode] = [passes_needed(sizes, shares, level) for shares in runs]
        by_mode["auto over off"] = [a / b for a, b in zip(by_mode["auto"], by_mode["off"])]
        found[str(level)] = by_mode
    return found


def sides(options):
    """One- and two-sided ACR of the same counts; images of wrong class count 0 in both."""
    results = {}
    for sigma in SIGMAS:
        pool, selected, images = read_pool(options, sigma)
        tops = torch.tensor(selected)[:, None]
        for name in NETWORKS:
            for n in sorted({min(1000, options.pool), options.pool}):
                votes = torch.stack([row[:n].long().bincount(minlength=10) for row in pool[name]])
                n_a = votes.gather(1, tops).squeeze(1)
                n_b = votes.scatter(1, tops, 0).amax(1)
                one = certified_radius(lower_confidence_bound(n_a, n, ALPHA), float(sigma))
                p_a, p_b = (
                    lower_confidence_bound(n_a, n, ALPHA / 2),
                    upper_confidence_bound(n_b, n, ALPHA / 2),
                )
                two = certified_radius(p_a, float(sigma), p_b)
                acrs = {"one-sided": float(one.sum()) / images, "two-sided": float(two.sum()) / images}
                results[f"{sigma}, {name}, n = {n}"] = acrs
    return results


def ranking(options):
    """Kendall's tau between cheap rewards and the ACR of RANKING_FULL samples, over policies."""
    folder = options.work / "ranking"
    saved = arq.read_state(folder / "cache.pt")
    right = [i for i, row in enumerate(saved["rows"]) if row["selected"] == row["label"]]
    selected = [saved["rows"][i]["selected"] for i in right]
    policies = [arq.read_state(path) for path in sorted(folder.glob("policy*.pt"))]
    column, old = torch.tensor(selected)[:, None], saved["predictions"][right]
    rewards = {(mode, m): [] for mode in (*incremental.MODES, "estimate") for m in RANKING_SIZES}
    full = []
    for policy in policies:
        p_full = lower_confidence_bound((policy["full"] == column).sum(1), RANKING_FULL, ALPHA)
        full.append(float(certified_radius(p_full, 0.25).mean()))
        replay = Replay(old, policy["replay"], policy["fresh"], selected, 0.25)
        for (mode, m), values in rewards.items():
            try:
                values.append(replay.acr(m, mode))
            except IndexError:  # a plan that wants more samples of one image than were collected
                values.append(math.nan)
    results = {"policies": len(policies), "images": len(right), "tau": {}}
    full = torch.tensor(full)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(full), (1000, len(full)), generator=generator)
    for (mode, m), values in rewards.items():
        values = torch.tensor(values)
        if values.isnan().any():
            continue
        tau = kendalltau(values, full).statistic
        taus = sorted(kendalltau(values[pick], full[pick]).statistic for pick in picks)
        results["tau"].setdefault(mode, {})[m] = {"tau": tau, "low": taus[25], "high": taus[974]}
    return results


# ---- speed ----


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
    config = load_config(options, "0.25")
    network = load_base(options, config)
    images = arq.load_images(config, False).batch([0, 1000, 2000, 3000], config.device)
    resident = images[:1].expand(batch_size, -1, -1, -1).contiguous()
    g = Smooth(network, 10, 0.25, batch_size=batch_size)

    def bare():
        with torch.inference_mode():
            for _ in range(4 * n // batch_size):
                network(resident).argmax(1).cpu()

    def ours():
        g.sample_under_noise(images, range(4), n, KEY)

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
    g.sample_under_noise(images[:1], [0], 40 * n, KEY)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    cache = g.certify_and_cache(images, [0] * 4, range(4), N0, n, ALPHA)
    return {
        "device": config.device,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "over the bare forward pass": statistics.median(b / o for b, o, _ in times),
        "over the usual loop": statistics.median(p / o for _, o, p in times),
        "peak memory grown by 40 times the samples, KiB": grown,
        "replay cache, bytes per sample": cache.predictions.element_size(),
    }


# ---- tables ----


def table(results):
    """The tables of certificates.txt, as text."""
    lines = [
        "Passes are counted per image of right class: an image of wrong class costs the modes nothing,",
        "but plain smoothing as much as any. Shares of the ACR that all n samples certify: mean of 5",
        "splits (lowest to highest). Passes needed: median of the splits.",
    ]
    for part, drawn in (("sharpness", ""), ("bootstrap", " (drawn again)")):
        for setting, found in results[part].items():
            n = round(found["sizes"][-1] / SHARES[-1])
            lines += sharpness_table(f"sigma {setting}, n = {n:,}{drawn}", found)
    lines += ["", "One- and two-sided ACR of the same counts"]
    for name, row in results["sides"].items():
        lines.append(f"  {name:<32}{arq.shown(row['one-sided'])}  {arq.shown(row['two-sided'])}")
    rank = results["ranking"]
    lines += [
        "",
        f"Kendall's tau with the ACR of {RANKING_FULL} samples (95 % bootstrap interval), "
        f"{rank['policies']} policies, {rank['images']} images, by passes per image",
    ]
    for mode, taus in rank["tau"].items():
        cells = [f"{m}: {t['tau']:.3f} ({t['low']:.2f}-{t['high']:.2f})" for m, t in taus.items()]
        lines.append(f"  {mode:<10}" + "  ".join(cells))
    lines += ["", "Speed"]
    for name, value in results["speed"].items():
        lines.append(f"  {name}: {value:.3g}" if isinstance(value, float) else f"  {name}: {value}")
    return "\n".join(lines) + "\n"


def sharpness_table(setting, found):
    """Shares by mode and passes, then the passes that each level needs."""
    modes = found["share_of_full_acr"]
    lines = [
        "",
        f"{setting}: {found['right']} images of right class among {found['images']}, "
        f"disagreement {found['disagreement']:.4f}",
        f"{'passes':>8}" + "".join(f"{mode:>22}" for mode in modes),
    ]
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
        lines.append(
            f"  {float(level):.0%} needs {needs}; auto over off {median(ratio):.2f} "
            f"({min(ratio):.2f}-{max(ratio):.2f}), over plain smoothing {plain:.2f}"
        )
    return lines


def shown(passes):
    return "-" if math.isnan(median(passes)) else f"{median(passes):.0f}"


def median(values):
    return statistics.median(values) if values and not any(map(math.isnan, values)) else math.nan


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data", help="image tree of CIFAR-10")
    parser.add_argument("--checkpoints", required=True, help="folder of resnet20_cifar10_sigma0.25.pt etc.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=50, help="of the sharpness, at most 500")
    parser.add_argument("--pool", type=int, default=8000, help="noisy copies of each")
    parser.add_argument("--policies", type=int, default=40, help="of the ranking")
    parser.add_argument("--large", type=int, default=100_000, help="samples drawn again from the pool")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "certify", help="where samples are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    options = parser.parse_args(argv)
    for sigma in SIGMAS:
        collect_pool(options, sigma)
    collect_ranking(options)
    results = {
        "speed": speed(options),
        "sharpness": sharpness(options, options.pool // 2),
        "bootstrap": sharpness(options, options.large, bootstrap=True),
        "sides": sides(options),
        "ranking": ranking(options),
        "torch": torch.__version__,
    }
    arq.write_whole(options.out / "certificates.json", results)
    text = table(results)
    (options.out / "certificates.txt").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
