"""Is `shapes` hard enough? Noise of sigma 0.25 must cost accuracy, and 2-bit layers must hurt.

    python benchmarks/shapes.py

Trains the default base with and without noise, then quantizes the noise-trained one to 8, 4, 3 and 2 bits
(first and last layer 8) and fine-tunes each as long as a search episode does. Accuracy on the test images
without smoothing. Prints a table and writes results/shapes.json. Some minutes on two cores.
"""

import argparse
import copy
import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import arq
import models

ROOT = Path(__file__).resolve().parents[1]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", default="6", help="of each base")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    options = parser.parse_args(argv)
    config = arq.parse_config(["--device", "cpu", "--epochs", options.epochs])
    train_images, test_images = arq.load_images(config, True), arq.load_images(config, False)
    x, labels = test_images.batch(range(len(test_images))), torch.tensor(test_images.labels)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    steps = config.epochs * len(train_images) // config.batch_size
    rows = []

    def accuracy(classifier, sigma):
        network = models.integer_network(classifier)
        with torch.inference_mode():
            found = torch.cat([network(part).argmax(1) for part in (x + sigma * noise).split(100)])
        return float((found == labels).float().mean())

    def base(sigma):
        torch.manual_seed(config.seed)
        classifier = (
            models.build_classifier(config.arch, 10)
            .to(config.device, memory_format=torch.channels_last)
            .eval()
        )
        settings = dataclasses.replace(config, sigma=sigma)
        arq.train(classifier, train_images, settings, steps, arq.BASE_LR, "base", arq.BASE_DECAY)
        return classifier

    def add(network, **accuracies):
        rows.append({"network": network, **accuracies})
        cells = (f"{name.replace('_', ' ')} {value:.3f}" for name, value in accuracies.items())
        print(f"{network:<36}" + ", ".join(cells), flush=True)

    add("float, trained without noise", without_noise=accuracy(base(0.0), 0.0))
    classifier = base(config.sigma)
    without_noise, under_noise = accuracy(classifier, 0.0), accuracy(classifier, config.sigma)
    add("float, trained with noise", without_noise=without_noise, under_noise=under_noise)
    table = models.quantize_model(classifier, config.image_size)
    arq.calibrate(classifier, train_images, config)
    state = copy.deepcopy(classifier.state_dict())
    for bits in (8, 4, 3, 2):
        classifier.load_state_dict(state)
        models.set_policy(classifier, models.uniform_policy(table, bits))
        before = accuracy(classifier, config.sigma)
        arq.train(classifier, train_images, config, config.finetune_steps, arq.EPISODE_LR, "episode")
        after = accuracy(classifier, config.sigma)
        add(f"{bits} bits, first and last layer 8", before_finetuning=before, under_noise=after)
    facts = {"sigma": config.sigma, "images": len(labels), "rows": rows}
    arq.write_whole(options.out / "shapes.json", facts)


if __name__ == "__main__":
    main()
