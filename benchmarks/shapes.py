"""Is `shapes` hard enough? Noise of sigma 0.25 must cost accuracy, and 2-bit layers must hurt.

    python benchmarks/shapes.py

Trains the default base with and without noise, then quantizes the noise-trained one to 8, 4, 3 and 2 bits
(ends 8) and fine-tunes each as long as a search episode does. Accuracy on the test images without smoothing.
Prints a table and writes results/shapes.json. Some minutes on two cores.
"""

import copy
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arq  # noqa: E402
import models  # noqa: E402


def main():
    config = arq.parse_config(["--device", "cpu"])
    train_images, test_images = arq.load_images(config)
    indices = list(range(len(train_images)))
    x, labels = test_images.batch(range(len(test_images))), torch.tensor(test_images.labels)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    steps = config.epochs * len(indices) // config.batch_size

    def accuracy(classifier, sigma):
        network = models.integer_network(classifier)
        with torch.inference_mode():
            found = torch.cat([network(part).argmax(1) for part in (x + sigma * noise).split(100)])
        return float((found == labels).float().mean())

    def base(sigma):
        torch.manual_seed(config.seed)
        classifier = arq.prepare(models.build_classifier(config.arch, 10), config)
        arq.train(classifier, train_images, indices, arq.dataclasses.replace(config, sigma=sigma), steps,
                  arq.BASE_LR, arq.BASE_DECAY, "base")
        return classifier

    rows = [{"network": "float, trained without noise", "sigma 0": accuracy(base(0.0), 0.0)}]
    classifier = base(config.sigma)
    rows.append({"network": "float, trained with noise", "sigma 0": accuracy(classifier, 0.0),
                 "under noise": accuracy(classifier, config.sigma)})
    table = models.quantize_model(classifier, config.image_size)
    arq.calibrate(classifier, train_images.batch(arq.evenly_spaced(200, len(indices))), config)
    state = copy.deepcopy(classifier.state_dict())
    for bits in (8, 4, 3, 2):
        classifier.load_state_dict(state)
        models.set_policy(classifier, models.uniform_policy(table, bits))
        before = accuracy(classifier, config.sigma)
        arq.train(classifier, train_images, indices, config, config.episode_steps, arq.EPISODE_LR,
                  arq.FINETUNE_DECAY, "episode")
        rows.append({"network": f"{bits} bits, ends 8", "under noise, before fine-tuning": before,
                     "under noise": accuracy(classifier, config.sigma)})
    for row in rows:
        print(f"{row.pop('network'):<30}" + ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
    facts = {"sigma": config.sigma, "images": len(labels), "rows": rows}
    (ROOT / "results" / "shapes.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
