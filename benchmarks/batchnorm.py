"""BatchNorm after a change of bit-widths: leave its statistics, or re-estimate them?

    python benchmarks/batchnorm.py --data data --checkpoint resnet20_cifar10_sigma0.25.pt

Accuracy and agreement with the float network, under noise, on held-out training images, at 8 and 4 bits:
statistics left alone; re-estimated on plain noisy images; on augmented noisy images, as training saw them;
and after a brief fine-tuning as in the search, which moves them as it goes. Prints a table and writes
results/batchnorm.json.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import arq
import models

ROOT = Path(__file__).resolve().parents[1]


@torch.no_grad()
def reestimate(classifier, batches):
    """Running statistics as the plain average over the batches."""
    norms = [module for module in classifier.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    classifier.train()
    for batch in batches:
        classifier(batch)
    classifier.eval()
    for norm in norms:
        norm.momentum = 0.1  # PyTorch's default, for the fine-tuning that follows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--batches", type=int, default=24, help="of the re-estimation, 128 images each")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    options = parser.parse_args(argv)
    config = arq.parse_config(["--dataset", "cifar10", "--data", options.data, "--device", "cpu"])
    train_images, search_images = arq.hold_out(arq.load_images(config, True), 500)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)

    def noisy(x):
        return x + config.sigma * torch.randn(x.shape, generator=generator)

    test = [noisy(x) for x in search_images.batch(range(500)).split(100) for _ in range(4)]
    labels = torch.tensor(search_images.labels).view(5, 1, 100).expand(5, 4, 100).flatten()
    picks = [torch.randint(len(train_images), (128,), generator=generator) for _ in range(options.batches)]
    plain = [train_images.batch(some.tolist()) for some in picks]
    moved = [arq.augment(x, torch.rand(3, 128, generator=generator)) for x in plain]
    finetuned = "12 steps of fine-tuning"
    ways = {
        "left alone": None,
        "re-estimated, plain images": [noisy(x) for x in plain],
        "re-estimated, augmented": [noisy(x) for x in moved],
        finetuned: None,
    }

    classifier = (
        models.load_base_checkpoint(options.checkpoint, "resnet20", 10)
        .to(config.device, memory_format=torch.channels_last)
        .eval()
    )
    table = models.quantize_model(classifier, 32)
    models.calibrate(classifier, test[:4])
    state = copy.deepcopy(classifier.state_dict())

    def classes():
        network = models.integer_network(classifier)
        with torch.inference_mode():
            return torch.cat([network(x).argmax(1) for x in test])

    float_classes = classes()
    rows = []

    def measure(bits, way):
        found = classes()
        accuracy = float((found == labels).float().mean())
        disagreement = float((found != float_classes).float().mean())
        rows.append({"bits": bits, "batchnorm": way, "accuracy": accuracy, "disagreement": disagreement})
        print(
            f"{bits:>2} bits, {way:<27} accuracy under noise {accuracy:.4f}, disagreement {disagreement:.4f}"
        )

    measure(32, "left alone")
    for bits in (8, 4):
        for way, batches in ways.items():
            classifier.load_state_dict(state)
            models.set_policy(classifier, models.uniform_policy(table, bits))
            if batches is not None:
                reestimate(classifier, batches)
            if way == finetuned:
                arq.train(classifier, train_images, config, 12, arq.EPISODE_LR, "episode")
            measure(bits, way)
    facts = {"samples": len(labels), "sigma": config.sigma, "reestimation_images": 128 * options.batches}
    arq.write_whole(options.out / "batchnorm.json", {**facts, "rows": rows})


if __name__ == "__main__":
    main()
