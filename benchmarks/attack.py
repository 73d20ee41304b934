"""A certificate meets an attacker: gradient ascent on the smoothed classifier (Figure 2).

    python benchmarks/attack.py --data data --checkpoint resnet20_cifar10_sigma0.25.pt

Certifies test images with the float network and a 4-bit copy, and attacks every right certificate twice:
within 0.999 of its radius R (one-sided), where the smoothed class must not change, and within 2 R, where
nothing is promised. What is certified and judged is the integer network; gradients are its simulation's.
The attack is SmoothAdv (Salman et al., NeurIPS 2019): projected gradient ascent on -log of the
softmax averaged over noise, drawn afresh at every step; images stay within [0, 1]. One is broken
if PREDICT returns another class, on noise of its own; abstentions count apart. Certificate and
PREDICT may each err with probability alpha an image. Prints a table, and writes results/attack.json
after every block.
"""

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arq  # noqa: E402
import certify  # noqa: E402
import models  # noqa: E402
from certify import NoiseKey  # noqa: E402

N0, N, ALPHA = 100, 1000, 0.001
REACH = {"inside": 0.999, "twice": 2.0}  # how far the attacker may go, in certified radii
TUNING_STEPS = 100


def smoothed_loss(classifier, x, labels, sigma, draws, generator):
    """-log of the label's softmax averaged over `draws` noisy copies: (B,) from x (B, C, H, W)."""
    noise = torch.randn(len(x), draws, *x.shape[1:], generator=generator, device=x.device)
    noisy = (x[:, None] + sigma * noise).flatten(0, 1)                      # B * draws, C, H, W
    log_p = F.log_softmax(classifier(noisy), 1).view(len(x), draws, -1)
    return math.log(draws) - log_p[torch.arange(len(x)), :, labels].logsumexp(1)


def length(x):
    """l2 norm of each image (B, C, H, W), never 0: (B, 1, 1, 1)."""
    return x.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


def attack(classifier, images, labels, eps, sigma, steps, draws, generator):
    """Images (B, C, H, W) of high smoothed loss, in [0, 1] and within l2 eps (B,) of those given.

    A step goes 2 eps / steps along the gradient, is projected on the ball, then clipped to [0, 1],
    which only shortens the distance. Quantizers pass gradients straight through.
    """
    eps, x = eps.view(-1, 1, 1, 1), images
    for _ in range(steps):
        x = x.detach().requires_grad_()
        loss = smoothed_loss(classifier, x, labels, sigma, draws, generator)
        gradient, = torch.autograd.grad(loss.sum(), x)  # a sum: images share no step
        delta = x.detach() + 2 * eps / steps * gradient / length(gradient) - images
        x = (images + delta * (eps / length(delta)).clamp(max=1)).clamp(0, 1)
    return x


def attack_network(classifier, test_images, config, options):
    """Certify and attack block by block; yields the counts so far after each."""
    classifier.requires_grad_(False)  # only the image moves
    network = arq.integers(classifier, config)
    generator, began = torch.Generator(config.device).manual_seed(0), time.monotonic()
    setting = dict(num_classes=len(test_images.classes), sigma=config.sigma, n=N, alpha=ALPHA,
                   batch_size=config.eval_batch)
    counts = {reach: {"held": 0, "abstained": 0, "broken": 0, "farthest": 0.0} for reach in REACH}
    indices, radii = arq.evenly_spaced(options.images, len(test_images)), []
    block = max(1, config.eval_batch // options.draws)
    for first in range(0, len(indices), block):
        ids = indices[first:first + block]
        rows = certify.certify(network, test_images.batch(ids, config.device),
                               [test_images.labels[i] for i in ids], ids, n0=N0,
                               key=NoiseKey(config.seed, "before the attack"), **setting)
        rows = [row for row in rows if row.correct]
        radii += [row.radius for row in rows]
        ids = [row.idx for row in rows]
        for reach, found in counts.items() if rows else ():
            images = test_images.batch(ids, config.device)
            labels = torch.tensor([row.label for row in rows], device=config.device)
            eps = torch.tensor([REACH[reach] * row.radius for row in rows], device=config.device)
            x = attack(classifier, images, labels, eps, config.sigma, options.steps, options.draws,
                       generator)
            key = NoiseKey(config.seed, f"attacked, {reach}")
            classes = certify.predict(network, x, ids, key=key, **setting)
            gone = (x.double() - images.double()).flatten(1).norm(dim=1).tolist()
            for row, c, distance in zip(rows, classes, gone):
                found["farthest"] = max(found["farthest"], distance / row.radius)
                found[{certify.ABSTAIN: "abstained", row.label: "held"}.get(c, "broken")] += 1
        yield {"images": min(first + block, len(indices)), "certified": len(radii),
               "mean_radius": sum(radii) / max(len(radii), 1), **counts,
               "seconds": round(time.monotonic() - began, 1)}


def quantized_copy(base, train_images, config):
    """4 bits, ends 8; calibrated and fine-tuned as in the search, for TUNING_STEPS."""
    classifier = copy.deepcopy(base)
    table = models.quantize_model(classifier, config.image_size)
    search_ids = arq.evenly_spaced(config.search_images, len(train_images))
    train_ids = sorted(set(range(len(train_images))) - set(search_ids))
    arq.calibrate(classifier, train_images.batch(search_ids, config.device), config)
    models.set_policy(classifier, models.uniform_policy(table, 4))
    arq.train(classifier, train_images, train_ids, config, TUNING_STEPS, arq.EPISODE_LR,
              arq.FINETUNE_DECAY, "episode")
    return classifier


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True)
    for name, value in {"dataset": "cifar10", "data": "data", "device": "auto", "sigma": 0.25,
                        "images": 100, "steps": 20, "draws": 16,
                        "out": ROOT / "results" / "attack.json"}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    options = parser.parse_args()
    config = arq.parse_config([f"--{name}={getattr(options, name)}"
                               for name in ("dataset", "data", "device", "sigma", "images")])
    train_images, test_images = arq.load_images(config)
    base = models.load_base_checkpoint(options.checkpoint, config.arch, len(test_images.classes))
    networks = {"float": arq.prepare(base, config), "4 bits": quantized_copy(base, train_images, config)}

    results = {name: getattr(options, name) for name in ("checkpoint", "dataset", "sigma", "images", "steps",
                                                         "draws")}
    results["checkpoint"] = Path(options.checkpoint).name
    results.update(n0=N0, n=N, alpha=ALPHA, reach=REACH, device=config.device,
                   threads=torch.get_num_threads(), networks={})
    for name, classifier in networks.items():
        for facts in attack_network(classifier, test_images, config, options):
            results["networks"][name] = facts
            options.out.write_text(json.dumps(results, indent=1) + "\n")
            print(name, facts, flush=True)
    print(f"\n{'network':<12}{'certified':>12}{'mean R':>9}{'within':>10}"
          f"{'held':>8}{'abstained':>11}{'broken':>8}")
    for name, facts in results["networks"].items():
        for reach, factor in REACH.items():
            certified = f"{facts['certified']} of {facts['images']}"
            counts = facts[reach]
            print(f"{name:<12}{certified:>12}{arq.down(facts['mean_radius']):>9}{factor:>8g} R"
                  f"{counts['held']:>8}{counts['abstained']:>11}{counts['broken']:>8}")
    broken = sum(facts["inside"]["broken"] for facts in results["networks"].values())
    allowed = 2 * ALPHA * sum(facts["images"] for facts in results["networks"].values())
    print(f"the promise {'held' if broken <= allowed else 'did NOT hold'}: {broken} broken inside, "
          f"where chance allows {allowed:g}")


if __name__ == "__main__":
    main()
