"""Does a certificate hold against an attacker: gradient ascent on the smoothed classifier?

    python benchmarks/attack.py --data data --checkpoint resnet20_cifar10_sigma0.25.pt

Certifies CIFAR-10 images with the float network and a 4-bit copy, and attacks right
certificates within 0.999 of the radius R, where the smoothed class must not change, and within
2 R, where nothing is promised (SmoothAdv, Salman et al., NeurIPS 2019). Broken: PREDICT, on
noise of its own, returns another class. Either may err with probability alpha per image. The
integer network is judged; gradients are those of its simulation. Prints, and writes
results/attack.json: eight minutes for 40 images on a CPU.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import arq
import certify
import models
from benchmarks.certificates import build_networks

ROOT = Path(__file__).resolve().parents[1]
IMAGES, N, ALPHA = 40, 1000, 0.001
REACH = {"inside": 0.999, "twice": 2.0}  # how far the attacker may go, in certified radii
STEPS, DRAWS = 20, 16  # of gradient ascent; noisy copies in each
BLOCK = 10  # images attacked together


def smoothed_loss(classifier, x, labels, sigma: float, generator) -> Tensor:
    """-log of the softmax averaged over DRAWS noisy copies: (B,) from x (B, C, H, W)."""
    shape = len(x), DRAWS, *x.shape[1:]
    noise = torch.randn(shape, generator=generator, device=x.device)
    noisy = (x[:, None] + sigma * noise).flatten(0, 1)  # B * DRAWS, C, H, W
    log_p = F.log_softmax(classifier(noisy), 1).view(len(x), DRAWS, -1)
    return math.log(DRAWS) - log_p[torch.arange(len(x)), :, labels].logsumexp(1)


def length(x: Tensor) -> Tensor:
    """l2 norm of each image (B, C, H, W), never 0: (B, 1, 1, 1)."""
    return x.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


def attack(classifier, images, labels, eps: Tensor, sigma: float, generator) -> Tensor:
    """Images (B, C, H, W) of high smoothed loss, in [0, 1], within l2 eps (B,) of those given.
    A step of 2 eps / STEPS along the gradient is projected on the ball, then clipped to [0, 1],
    which only shortens the distance."""
    eps, x = eps.view(-1, 1, 1, 1), images
    for _ in range(STEPS):
        x = x.detach().requires_grad_()
        loss = smoothed_loss(classifier, x, labels, sigma, generator)
        (gradient,) = torch.autograd.grad(loss.sum(), x)  # a sum: images share no step
        delta = x.detach() + 2 * eps / STEPS * gradient / length(gradient) - images
        delta = delta * (eps / length(delta)).clamp(max=1)
        x = (images + delta).clamp(0, 1)
    return x


def attack_network(classifier, images: arq.ImageSet, config) -> dict:
    """Certify and attack the images: how many certificates held, by the attacker's reach."""
    network = models.integer_network(classifier.to(config.device), config.eval_batch)
    classifier.requires_grad_(False)  # only the image moves
    generator = torch.Generator(config.device).manual_seed(0)
    outcomes = {reach: {"held": 0, "abstained": 0, "broken": 0} for reach in REACH}
    for first in range(0, len(images), BLOCK):
        block = images.subset(list(range(len(images)))[first : first + BLOCK])
        x = block.batch(range(len(block)), config.device)
        g = smooth(network, config, "before the attack")
        rows = g.certify(x, block.labels, block.ids, n=N, alpha=ALPHA)
        right = [i for i, row in enumerate(rows) if row.correct]
        if not right:
            continue
        ids = [block.ids[i] for i in right]
        labels = torch.tensor([block.labels[i] for i in right], device=config.device)
        radius = torch.tensor([rows[i].radius for i in right], device=config.device)
        for reach, counts in outcomes.items():
            eps = REACH[reach] * radius
            moved = attack(classifier, x[right], labels, eps, config.sigma, generator)
            judge = smooth(network, config, f"attacked, {reach}")
            classes = judge.predict(moved, ids, N, ALPHA)
            for label, predicted in zip(labels.tolist(), classes):
                names = {label: "held", certify.ABSTAIN: "abstained"}
                counts[names.get(predicted, "broken")] += 1
        print(f"{first + len(block)} images: {outcomes}", flush=True)
    return {"certified": sum(outcomes["inside"].values()), **outcomes}


def smooth(network, config, purpose: str) -> certify.Smooth:
    settings = config.sigma, config.seed, config.eval_batch, purpose
    return certify.Smooth(network, 10, *settings, levels=None)  # the attacker's pixels are real


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data", help="image tree of CIFAR-10")
    parser.add_argument("--checkpoint", required=True, help="float ResNet-20")
    options = parser.parse_args(argv)
    words = f"--dataset cifar10 --sigma 0.25 --images {IMAGES}".split()
    config = arq.parse_config([*words, "--data", options.data])
    images = arq.load_images(config, train=False)
    classifiers = build_networks(config, options.checkpoint)
    networks = {"float": classifiers["float"], "4 bits": classifiers["4 bit"]}
    results = {"sigma": config.sigma, "images": IMAGES, "steps": STEPS, "draws": DRAWS}
    results |= {"n": N, "alpha": ALPHA, "reach": REACH, "networks": {}}
    for name, classifier in networks.items():
        results["networks"][name] = attack_network(classifier, images, config)
    arq.write_whole(ROOT / "results" / "attack.json", results)


if __name__ == "__main__":
    main()
