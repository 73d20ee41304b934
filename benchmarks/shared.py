"""A network from which brief fine-tuning ranks policies as long fine-tuning does, for arq.py's --start.

    python benchmarks/shared.py --out start.pt --dataset cifar10 --checkpoint FILE --budget 0.008 --sigma 0.25
    python arq.py --start start.pt --dataset cifar10 --checkpoint FILE --budget 0.008 --sigma 0.25

From the float base, a dozen steps leave weights of 2 bits far from where they get to: such policies score too
little. Here the base is trained for --shared-epochs while each batch meets another random policy under the
budget, as a one-shot network is (Guo et al., 2020, section 3.2). All other options are arq.py's.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arq  # noqa: E402
import models  # noqa: E402


def train_shared(base, environment, images, search_images, config, epochs, state=None, save=None) -> dict:
    """The state dict of a float network: the base after `epochs` of random policies."""
    classifier = copy.deepcopy(base)
    weights = classifier.state_dict()  # layers are replaced below, but train these very tensors
    models.quantize_model(classifier, config.image_size)
    arq.calibrate(classifier, search_images, config)

    def loss(network, x, noise, labels):
        policy = environment.rollout(lambda state: float(torch.rand(())))[2]
        models.set_policy(classifier, policy)
        return arq.noise_augmentation(network, x, noise, labels)

    steps = int(epochs * (len(images) // config.batch_size))
    of = images, config, steps, arq.FINETUNE_LR, "shared"
    arq.train(classifier, *of, state=state, save=save, loss=loss)
    return weights


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shared-epochs", type=float, default=1.0)
    options, rest = parser.parse_known_args(argv)
    config = arq.parse_config(rest)
    if config.checkpoint is None:
        parser.error("give --checkpoint FILE, the float base; arq.py leaves its own in runs/bases/")
    images = arq.load_images(config, True)
    base = arq.build_base(config, len(images.classes))
    table = models.quantize_model(copy.deepcopy(base), config.image_size)
    environment = arq.BitWidthEnvironment(table, config.budget)
    train_images, search_images = arq.hold_out(images, config.search_images)
    of = base, environment, train_images, search_images, config, options.shared_epochs
    arq.write_whole(options.out, train_shared(*of, save=lambda state: None))


if __name__ == "__main__":
    main()
