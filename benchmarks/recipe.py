"""Which fine-tuning keeps certified robustness? Losses, lengths, rates and policies, on development images.

    python benchmarks/recipe.py --data DIR --checkpoint FILE [--trials trials.jsonl]

Development images: the fourth of every ten of the 5,000 test images; none is among the 500 of a table (the
first of every ten). A trial is a JSON object: policy (a file, 2 to 8 bits, or "float"), loss, epochs, lr,
float32, seed. Without --trials: TRIALS, of which the first is the base. Finished trials are lines of
results/recipe.jsonl; the command goes on where it stopped.

Losses: "labels"; "same:s" and "other:s", where a share s of the targets is the float base's softmax on the
same images under the same or under other noise, and the rest the labels; "consistency:w", labels and w times
the divergence of two noisy copies from their mean, on half as many images (Jeong and Shin, 2020).
"""

import argparse
import contextlib
import copy
import ctypes
import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arq  # noqa: E402
import certify  # noqa: E402
import models  # noqa: E402

FRAME = "--dataset cifar10 --search-images 200 --images 500 --n 500"
README = "results/cifar10-resnet20-sigma0.25/policy.json"


def trial(policy, loss="labels", epochs=4, lr=arq.FINETUNE_LR, float32=False, seed=1) -> dict:
    names = "policy loss epochs lr float32 seed".split()
    return dict(zip(names, (policy, loss, epochs, lr, float32, seed)))


TRIALS = [trial("float", epochs=0), trial(README, "same:1", 1), trial(README, "consistency:2", 1)]
TRIALS += [trial(README, "other:1", 1), trial(README, "other:0.7")]
TRIALS += [trial(README, float32=float32, seed=seed) for seed in (1, 2, 3) for float32 in (False, True)]


def same_noise(network, x, noise, labels, teacher, share: float):
    """As arq.noise_augmentation, but the teacher sees what the network sees."""
    with torch.no_grad():
        answers = teacher(x + noise).float().softmax(1)
    targets = share * answers + (1 - share) * F.one_hot(labels, answers.shape[1])
    return F.cross_entropy(network(x + noise).float(), targets, reduction="none")


def consistency(network, x, noise, labels, weight: float):
    """Per image of the batch's first half, whose two copies count once."""
    half = len(x) // 2
    x, labels = x[:half], labels[:half]
    logp = network(torch.cat([x + noise[:half], x + noise[half:]])).float().log_softmax(1).view(2, half, -1)
    mean = logp.exp().mean(0)
    divergence = (mean * (mean.clamp_min(1e-6).log() - logp)).sum(2).mean(0)
    return 2 * (F.nll_loss(logp.mean(0), labels, reduction="none") + weight * divergence)


def loss_of(name: str, base):
    kind, _, value = name.partition(":")
    teacher = copy.deepcopy(base).eval()
    losses = {"labels": arq.noise_augmentation, "consistency": partial(consistency, weight=float(value or 0))}
    for which, loss in (("same", same_noise), ("other", arq.noise_augmentation)):
        losses[which] = partial(loss, teacher=teacher, share=float(value or 0))
    return losses[kind]


def certificates(network, images, config) -> list:
    g = certify.Smooth(network, 10, config.sigma, 0, config.eval_batch, "development")
    blocks = torch.arange(len(images)).split(50)
    rows = []
    for block in blocks:
        x, part = images.batch(block.tolist(), config.device), slice(int(block[0]), int(block[-1]) + 1)
        rows += g.certify(x, images.labels[part], images.ids[part], config.n0, config.n)
    return rows


def run(trial: dict, base, train_images, search_images, development, config) -> dict:
    """The trial with what it came to."""
    classifier = copy.deepcopy(base)
    table = models.quantize_model(classifier, config.image_size)
    arq.calibrate(classifier, search_images, config)
    config = copy.copy(config)
    config.seed, config.float32 = trial["seed"], trial["float32"]
    policy = trial["policy"]
    if policy == "float":
        bits = models.uniform_policy(table, models.FLOAT_BITS, models.FLOAT_BITS)
    elif policy.isdigit():
        bits = models.uniform_policy(table, int(policy))
    else:
        bits = json.loads((ROOT / policy).read_text())
    models.set_policy(classifier, bits)
    steps, start = int(trial["epochs"] * (len(train_images) // config.batch_size)), time.monotonic()
    of = train_images, config, steps, trial["lr"], "fine-tune"
    arq.train(classifier, *of, loss=loss_of(trial["loss"], base))
    seconds = time.monotonic() - start
    rows = certificates(models.integer_network(classifier), development, config)
    found = {"acr": certify.average_certified_radius(rows), "accuracy": certify.certified_accuracy(rows, 0)}
    found |= {"bitops_ratio": models.bitops_ratio(table, bits), "seconds": seconds}
    return trial | found | {"radii": [row.radius * row.correct for row in rows]}


def gain(row: dict, other: dict) -> str:
    difference = torch.tensor(row["radii"]).double() - torch.tensor(other["radii"])
    return f"{float(difference.mean()):+.4f} +- {float(difference.std()) / len(difference) ** 0.5:.4f}"


def show(found: list[dict]) -> None:
    """ACR, less the base's, accuracy; then bfloat16 less float32 where all else is equal."""
    for r in found:
        kind = f"{Path(r['policy']).parent.name or r['policy']}, {r['loss']}, {r['epochs']:g} epochs"
        kind += f", lr {r['lr']:g}" + (", float32" if r["float32"] else "") + f", seed {r['seed']}"
        print(f"{kind:<74} ACR {r['acr']:.4f}, {gain(r, found[0])}, accuracy {100 * r['accuracy']:.1f} %")
    names = "policy loss epochs lr seed".split()
    pairs = [(r, s) for r in found for s in found if s["float32"] and not r["float32"]]
    for r, s in pairs:
        if all(r[name] == s[name] for name in names):
            print(
                f"bfloat16 less float32, {r['loss']}, {r['epochs']:g} epochs, seed {r['seed']}: {gain(r, s)}"
            )


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data")
    parser.add_argument("--checkpoint", required=True, help="the float base of sigma 0.25")
    parser.add_argument("--trials", type=Path, help="a file with a JSON object a line")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "recipe.jsonl")
    options = parser.parse_args(argv)
    with contextlib.suppress(OSError, AttributeError, TypeError):  # as in arq.main
        ctypes.CDLL(None).mallopt(-3, 2**30)
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
    config = arq.parse_config([*FRAME.split(), "--data", options.data, "--checkpoint", options.checkpoint])
    images, test = arq.load_images(config, True), arq.load_images(config, False)
    train_images, search_images = arq.hold_out(images, config.search_images)
    development = test.subset(range(3, len(test), 10))
    base = arq.build_base(config, len(images.classes))
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    found, wanted = [json.loads(line) for line in lines], TRIALS
    if options.trials is not None:
        wanted = TRIALS[:1] + [json.loads(line) for line in options.trials.read_text().splitlines()]
    for one in wanted:
        if not any(all(row[key] == value for key, value in one.items()) for row in found):
            found.append(run(one, base, train_images, search_images, development, config))
            lines = (json.dumps(row, allow_nan=False) + "\n" for row in found)
            arq.write_whole(options.out, "".join(lines).encode())
            print(f"{len(found)} trials", flush=True)
    show(found)


if __name__ == "__main__":
    main()
