"""A certificate meets an attacker: gradient ascent on the smoothed classifier (Figure 2).

    python benchmarks/attack.py --data data --checkpoint resnet20_cifar10_sigma0.25.pt

Certifies test images with the float network and a 4-bit copy, and attacks every right certificate twice:
within 0.999 of its radius R (one-sided), where the smoothed class must not change, and within 2 R, where
nothing is promised. What is certified and judged is the integer network; gradients are its simulation's.
The attack is SmoothAdv (Salman et al., NeurIPS 2019): projected gradient ascent on -log of the softmax
averaged over noise, drawn afresh at every step; images stay within [0, 1]. One is broken if PREDICT returns
another class, on noise of its own; abstentions count apart. Certificate and PREDICT may each err with
probability alpha per image. Prints a table, and writes results/attack.json after every block.
"""

import argparse
import copy
import math
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import arq
import certify
import models

ROOT = Path(__file__).resolve().parents[1]
N0, N, ALPHA = 100, 1000, 0.001
REACH = {"inside": 0.999, "twice": 2.0}  # how far the attacker may go, in certified radii
TUNING_STEPS = 100


def smoothed_loss(classifier, x, labels, sigma, draws, generator):
    """-log of the label's softmax averaged over `draws` noisy copies: (B,) from x (B, C, H, W)."""
    noise = torch.randn(len(x), draws, *x.shape[1:], generator=generator, device=x.device)
    noisy = (x[:, None] + sigma * noise).flatten(0, 1)  # B * draws, C, H, W
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
        (gradient,) = torch.autograd.grad(loss.sum(), x)  # a sum: images share no step
        delta = x.detach() + 2 * eps / steps * gradient / length(gradient) - images
        x = (images + delta * (eps / length(delta)).clamp(max=1)).clamp(0, 1)
    return x


def attack_network(classifier, test_images, config, options):
    """Certify and attack block by block; yields the counts so far after each."""
    classifier.requires_grad_(False)  # only the image moves
    network = arq.integers(classifier, config)
    g = certify.Smooth(
        network, len(test_images.classes), config.sigma, config.seed, config.eval_batch, "before the attack"
    )
    generator, began = torch.Generator(config.device).manual_seed(0), time.monotonic()
    counts = {reach: {"held": 0, "abstained": 0, "broken": 0, "farthest": 0.0} for reach in REACH}
    radii = []
    block = max(1, config.eval_batch // options.draws)
    for first in range(0, len(test_images), block):
        some = test_images.subset(list(range(first, min(first + block, len(test_images)))))
        x = some.batch(range(len(some)), config.device)
        rows = g.certify(x, some.labels, some.ids, N0, N, ALPHA)
        right = [i for i, row in enumerate(rows) if row.correct]
        rows, images = [rows[i] for i in right], x[right]
        radii += [row.radius for row in rows]
        for reach, found in counts.items() if rows else ():
            labels = torch.tensor([row.label for row in rows], device=config.device)
            eps = torch.tensor([REACH[reach] * row.radius for row in rows], device=config.device)
            strength = config.sigma, options.steps, options.draws
            x = attack(classifier, images, labels, eps, *strength, generator)
            judge = certify.Smooth(
                network,
                len(test_images.classes),
                config.sigma,
                config.seed,
                config.eval_batch,
                f"attacked, {reach}",
            )
            classes = judge.predict(x, [row.idx for row in rows], N, ALPHA)
            gone = (x.double() - images.double()).flatten(1).norm(dim=1).tolist()
            for row, c, distance in zip(rows, classes, gone):
                found["farthest"] = max(found["farthest"], distance / row.radius)
                found[{certify.ABSTAIN: "abstained", row.label: "held"}.get(c, "broken")] += 1
        yield {
            "images": min(first + block, len(test_images)),
            "certified": len(radii),
            "mean_radius": sum(radii) / max(len(radii), 1),
            **counts,
            "seconds": round(time.monotonic() - began, 1),
        }


def quantized_copy(base, images, config):
    """4 bits, first and last layer 8; calibrated and fine-tuned as in the search, for TUNING_STEPS."""
    classifier = copy.deepcopy(base)
    table = models.quantize_model(classifier, config.image_size)
    train_images, search_images = arq.hold_out(images, config.search_images)
    arq.calibrate(classifier, search_images, config)
    models.set_policy(classifier, models.uniform_policy(table, 4))
    arq.train(classifier, train_images, config, TUNING_STEPS, arq.EPISODE_LR, "episode")
    return classifier


def report(results):
    print(f"\n{'network':<12}{'certified':>12}{'mean R':>9}{'within':>10}", end="")
    print(f"{'held':>8}{'abstained':>11}{'broken':>8}")
    for name, facts in results["networks"].items():
        for reach, factor in REACH.items():
            certified = f"{facts['certified']} of {facts['images']}"
            counts = facts[reach]
            print(f"{name:<12}{certified:>12}{arq.shown(facts['mean_radius']):>9}{factor:>8g} R", end="")
            print(f"{counts['held']:>8}{counts['abstained']:>11}{counts['broken']:>8}")
    broken = sum(facts["inside"]["broken"] for facts in results["networks"].values())
    allowed = 2 * ALPHA * sum(facts["images"] for facts in results["networks"].values())
    outcome = "held" if broken <= allowed else "did NOT hold"
    print(f"the promise {outcome}: {broken} broken inside, where chance allows {allowed:g}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data", default="data")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20, help="of the attack")
    parser.add_argument("--draws", type=int, default=16, help="noisy copies per step")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    options = parser.parse_args(argv)
    names = "dataset", "data", "device", "sigma", "images"
    config = arq.parse_config([f"--{name}={getattr(options, name)}" for name in names])
    train_images, test_images = arq.load_images(config, True), arq.load_images(config, False)
    test_images = test_images.subset(arq.evenly_spaced(options.images, len(test_images)))
    base = models.load_base_checkpoint(options.checkpoint, config.arch, len(test_images.classes))
    base = base.to(config.device, memory_format=torch.channels_last).eval()
    networks = {"float": base, "4 bits": quantized_copy(base, train_images, config)}

    results = {"checkpoint": Path(options.checkpoint).name}
    results |= {name: getattr(options, name) for name in ("dataset", "sigma", "images", "steps", "draws")}
    results |= {"n0": N0, "n": N, "alpha": ALPHA, "reach": REACH}
    results |= {"device": config.device, "threads": torch.get_num_threads(), "networks": {}}
    for name, classifier in networks.items():
        for facts in attack_network(classifier, test_images, config, options):
            results["networks"][name] = facts
            arq.write_whole(options.out / "attack.json", results)
            print(name, facts, flush=True)
    report(results)


if __name__ == "__main__":
    main()
