"""Do step sizes stay put in brief fine-tuning? By the gradient scale of LSQ, and by that of models.LSQ.

    python benchmarks/steps.py --data DIR --checkpoint FILE

CIFAR-10, ResNet-20, sigma 0.25: random policies at 1.5 % of BitOPs, each fine-tuned as in an episode of
compare.py (12 steps) and as a finalist (24), by both scales on the same batches. Reported are the steps'
largest change (the factor to their start), weight channels whose integers are all 0, and accuracy under
noise on the 200 search images, four draws each. Writes results/steps.json.
"""

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arq  # noqa: E402
import models  # noqa: E402
from benchmarks import rivals  # noqa: E402
from ddpg import DDPGConfig  # noqa: E402

FRAME = "--dataset cifar10 --search-images 200 --budget 0.015"


@torch.inference_mode()
def accuracy(network, images, config) -> float:
    x, labels = images.batch(range(len(images))), torch.tensor(images.labels)
    generator = torch.Generator().manual_seed(0)
    noisy = (x + config.sigma * torch.randn(x.shape, generator=generator) for _ in range(4))
    found = (network(x.to(config.device)).argmax(1).cpu() for x in noisy)
    return statistics.fmean((classes == labels).double().mean().item() for classes in found)


def measure(classifier, search_images, config) -> dict:
    """What the fine-tuned network's steps and channels have come to."""
    layers = models.quant_layers(classifier).values()
    quantizers = [one for layer in layers for one in (layer.weight_quantizer, layer.input_quantizer)]
    moved = torch.cat([(one.step / one.initial_steps[one.bits]).detach().view(-1) for one in quantizers])
    empty = sum(int((~layer.freeze().weight.flatten(1).any(1)).sum()) for layer in layers)
    found = {"largest_change": float(torch.maximum(moved, 1 / moved).max()), "empty_channels": empty}
    return found | {"accuracy": accuracy(arq.integers(classifier, config), search_images, config)}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--policies", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "steps.json")
    options = parser.parse_args(argv)
    files = ["--data", options.data, "--checkpoint", options.checkpoint]
    config = arq.parse_config(FRAME.split() + files)
    images, search_images = arq.hold_out(arq.load_images(config, True), config.search_images)
    base = arq.build_base(config, len(images.classes))
    found = []
    for scale, kind in (("range", models.LSQ), ("published", rivals.PublishedScale)):
        classifier = copy.deepcopy(base)
        table = models.quantize_model(classifier, config.image_size, kind)
        arq.calibrate(classifier, search_images, config)
        start = copy.deepcopy(classifier.state_dict())
        environment = arq.BitWidthEnvironment(table, config.budget)
        settings = DDPGConfig(warmup_episodes=options.policies)
        agent = rivals.RandomAgent(environment.state_size, 0, settings)
        for number in range(options.policies):
            policy = environment.rollout(agent.act)[2]
            for steps in (12, 24):
                classifier.load_state_dict(start)
                models.set_policy(classifier, policy)
                arq.train(classifier, images, config, steps, arq.EPISODE_LR, "episode")
                row = {"scale": scale, "policy": number, "steps": steps}
                found.append(row | measure(classifier, search_images, config))
    for scale, name in (("range", "over Q^2 sqrt(N)"), ("published", "over sqrt(N Q), LSQ's")):
        for steps in (12, 24):
            some = [row for row in found if row["scale"] == scale and row["steps"] == steps]
            leapt = sum(row["largest_change"] > 10 for row in some)
            accuracies = [row["accuracy"] for row in some]
            text = (
                f"{name:<22} {steps} steps: {leapt:>2} of {len(some)} policies with a step that leapt tenfold"
            )
            text += f", at most {max(row['largest_change'] for row in some):.1f} times"
            text += f"; {sum(row['empty_channels'] for row in some)} empty channels"
            print(f"{text}; accuracy {statistics.fmean(accuracies):.4f}, lowest {min(accuracies):.4f}")
    arq.write_whole(options.out, found)


if __name__ == "__main__":
    main()
