"""BatchNorm after a change of widths: leave its statistics, or re-estimate them?

    python benchmarks/batchnorm.py --data data --checkpoint resnet20_cifar10_sigma0.25.pt

Accuracy and agreement with the float network, under noise, on held-out training images, at 8 and 4 bits:
statistics left alone; re-estimated on plain noisy images; on augmented noisy images, as training saw them;
and after the search's brief fine-tuning, which moves them as it goes. Prints a table and writes
results/batchnorm.json.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arq  # noqa: E402
import models  # noqa: E402


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--batches", type=int, default=24)
    options = parser.parse_args()
    config = arq.parse_config(["--dataset", "cifar10", "--data", options.data, "--device", "cpu"])
    images, _ = arq.load_images(config)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)

    def noisy(x):
        return x + config.sigma * torch.randn(x.shape, generator=generator)

    search_ids = arq.evenly_spaced(500, len(images))
    others = sorted(set(range(len(images))) - set(search_ids))
    test = [noisy(images.batch(search_ids[i:i + 100])) for i in range(0, 500, 100) for _ in range(4)]
    labels = torch.tensor(images.labels)[search_ids].view(5, 1, 100).expand(5, 4, 100).flatten()
    picks = [torch.tensor(others)[torch.randint(len(others), (128,), generator=generator)]
             for _ in range(options.batches)]
    moved = [arq.augment(images.batch(p), torch.rand(3, 128, generator=generator)) for p in picks]
    ways = {"left alone": None, "re-estimated, plain images": [noisy(images.batch(p)) for p in picks],
            "re-estimated, augmented": [noisy(x) for x in moved],
            "12 steps of fine-tuning": None}

    classifier = arq.prepare(models.load_base_checkpoint(options.checkpoint, "resnet20", 10), config)
    table = models.quantize_model(classifier, 32)
    models.calibrate(classifier, test[:4])
    state = copy.deepcopy(classifier.state_dict())

    def classes():
        network = models.integer_network(classifier)
        with torch.inference_mode():
            return torch.cat([network(x).argmax(1) for x in test])

    float_classes = classes()
    right = float((float_classes == labels).float().mean())
    rows = [{"bits": 32, "batchnorm": "left alone", "accuracy": right, "disagreement": 0.0}]
    for bits in (8, 4):
        for way, batches in ways.items():
            classifier.load_state_dict(state)
            models.set_policy(classifier, models.uniform_policy(table, bits))
            if batches is not None:
                reestimate(classifier, batches)
            if way.startswith("12"):
                arq.train(classifier, images, others, config, 12, arq.EPISODE_LR, arq.FINETUNE_DECAY,
                          "episode")
            found = classes()
            right, other = (found == labels).float().mean(), (found != float_classes).float().mean()
            rows.append({"bits": bits, "batchnorm": way, "accuracy": float(right),
                         "disagreement": float(other)})
    for row in rows:
        print(f"{row['bits']:>2} bits, {row['batchnorm']:<27} accuracy under noise {row['accuracy']:.4f}, "
              f"disagreement {row['disagreement']:.4f}")
    facts = {"samples": len(labels), "sigma": config.sigma, "reestimation_images": 128 * options.batches,
             "rows": rows}
    (ROOT / "results" / "batchnorm.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
