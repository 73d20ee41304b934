"""ARQ: mixed-precision quantization that keeps a network's certified robustness.

    python arq.py                                                 # offline, minutes on two cores
    python arq.py --dataset cifar10 --sigma 0.25 --budget 0.015   # the paper's setting

    paper              here                          meaning
    P                  policy                        {layer: [w_bits, a_bits]}
    f, f^P             classifier                    the base classifier, float or under a policy
    Algorithm 1        search                        base certificate, episodes of the agent, the best policy
    s_l                BitWidthEnvironment.states    10 features per layer and kind (weights, activations), in [0, 1]
    a -> b             BitWidthEnvironment.bits      action in [0, 1] to a width
    BitOPs constraint  enforce_budget                takes bits from the last layer back until the policy fits
    reward             relative_acr                  (ACR(g^P) - ACR(g)) / ACR(g), on held-out training images
    X                  test images                   the final certificate's images, never seen before it
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Optional

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

import certify
import models
from certify import NoiseKey
from ddpg import DDPG, DDPGConfig
from models import Classifier, Layer, Policy


class InputError(Exception):
    """Something the user gave cannot work; the message says what, where, and what to do instead."""


# ---- options --------------------------------------------------------------------------------------------------

def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Every option; a default of None is filled in per dataset (DEFAULTS)."""
    dataset: str = option("shapes", "shapes (drawn by the program), cifar10, imagenet, or folder (your image tree)")
    data: str = option("data", "where the images are, or where CIFAR-10 is downloaded to")
    arch: Optional[str] = option(None, "resnet8/20/32/44/56/110 (CIFAR), resnet18, resnet50 or mobilenet_v2")
    checkpoint: Optional[str] = option(None, "float base classifier trained with noise; without it, one is trained")
    mean: Optional[str] = option(None, "normalisation of the checkpoint, three numbers with commas")
    std: Optional[str] = option(None, "likewise")
    sigma: Optional[float] = option(None, "standard deviation of the noise, in [0, 1] pixels (default: 0.25, or what "
                                    "the network of --evaluate was made for)")
    budget: float = option(0.015, "BitOPs allowed, as a fraction of the float network's")
    size_budget: Optional[float] = option(None, "weight bits allowed, as a fraction of the float network's")
    epochs: Optional[int] = option(None, "training epochs of the base classifier")
    episodes: Optional[int] = option(None, "search episodes, one policy each")
    episode_steps: Optional[int] = option(None, "fine-tuning steps of each policy before it is certified")
    finetune_epochs: Optional[float] = option(None, "fine-tuning epochs of the best policy; fractions are fine")
    search_images: Optional[int] = option(None, "training images held out for the search")
    search_n: Optional[int] = option(None, "samples per search image of the base classifier's certificate")
    n_p: Optional[int] = option(None, "samples per search image of a policy's incremental certificate")
    images: Optional[int] = option(None, "test images of the final certificates, evenly spaced")
    n0: int = option(100, "samples that select the class")
    n: Optional[int] = option(None, "samples that bound its probability")
    alpha: float = option(0.001, "probability that one image's certificate is wrong")
    alpha_zeta: float = option(0.001, "the same for the disparity in the incremental certificate")
    gamma: Optional[float] = option(None, "cached p_A from which IRS draws fresh samples")
    image_size: Optional[int] = option(None, "side of the images the network sees")
    batch_size: int = option(128, "training batch")
    eval_batch: Optional[int] = option(None, "samples per forward pass when certifying")
    seed: int = option(0, "seed of training, search and noise")
    device: str = option("auto", "auto, cuda, mps or cpu")
    out: Optional[str] = option(None, "run folder (default: under runs/)")
    evaluate: Optional[str] = option(None, "certify this saved network on the test images, and stop")


# The paper-sized runs: 600 episodes and 20 random ones are HAQ's; n_p is a tenth of the cached samples, as IRS
# reports; 500 test images at n = 10,000 resolve an ACR to about 0.015. `shapes` is sized for minutes on two cores.
DEFAULTS = {
    "shapes": dict(arch="resnet8", image_size=32, epochs=8, episodes=30, episode_steps=8, finetune_epochs=4.0,
                   search_images=100, search_n=500, n_p=100, images=100, n=1000, gamma=0.99),
    "cifar10": dict(arch="resnet20", image_size=32, epochs=90, episodes=600, episode_steps=20, finetune_epochs=30.0,
                    search_images=500, search_n=10000, n_p=1000, images=500, n=10000, gamma=0.99),
    "imagenet": dict(arch="resnet50", image_size=224, epochs=90, episodes=600, episode_steps=20, finetune_epochs=10.0,
                     search_images=500, search_n=10000, n_p=1000, images=500, n=10000, gamma=0.995),
}
DEFAULTS["folder"] = {**DEFAULTS["cifar10"], "gamma": 0.99}
PLACE_OPTIONS = ("out", "data", "device", "eval_batch")  # where and how fast, not what: a run may move between them


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def parse_config(argv=None) -> Config:
    parser = OneLineParser(description="ARQ: mixed-precision quantization that keeps certified robustness.",
                           epilog="Defaults not shown depend on the dataset; see DEFAULTS in arq.py.")
    for f in dataclasses.fields(Config):
        kind = {"Optional[int]": int, "Optional[float]": float, "Optional[str]": str}.get(
            str(f.type).replace("typing.", ""), f.type)
        shown = "" if f.default is None else f" (default: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), type=kind, default=f.default, metavar=kind.__name__.upper(),
                            help=f.metadata["help"] + shown)
    return check_config(Config(**vars(parser.parse_args(argv))))


def check_config(config: Config) -> Config:
    """Fill in the dataset's defaults and refuse what cannot work, before any data is touched."""
    if config.dataset not in DEFAULTS:
        raise InputError(f"unknown --dataset {config.dataset!r}; there are {', '.join(DEFAULTS)}")
    for name in ("checkpoint", "evaluate"):
        path = getattr(config, name)
        if path is not None and not Path(path).is_file():
            raise InputError(f"--{name} {path}: no such file")
    saved = models.saved_options(config.evaluate) if config.evaluate else {}
    for name, value in {**DEFAULTS[config.dataset], "sigma": 0.25, **saved}.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    if config.arch not in (*models.CIFAR_RESNETS, *models.TORCHVISION_NETS):
        raise InputError(f"unknown --arch {config.arch!r}; there are "
                         f"{', '.join((*models.CIFAR_RESNETS, *models.TORCHVISION_NETS))}")
    for name in ("sigma", "budget", "size_budget"):
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"--{name.replace('_', '-')} must be a positive number, not {value}")
    for name in ("alpha", "alpha_zeta", "gamma"):
        if not 0 < getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must lie between 0 and 1, not {getattr(config, name)}")
    lowest = dict(epochs=0, episodes=1, episode_steps=0, finetune_epochs=0, seed=0, image_size=8, batch_size=2)
    for name in ("epochs", "episodes", "episode_steps", "finetune_epochs", "search_images", "search_n", "n_p", "images",
                 "n0", "n", "image_size", "batch_size", "seed"):
        if getattr(config, name) < lowest.get(name, 1):
            raise InputError(f"--{name.replace('_', '-')} must be at least {lowest.get(name, 1)}, "
                             f"not {getattr(config, name)}")
    for name, alpha in (("n", config.alpha), ("search_n", config.alpha)):
        if not certify.can_certify(getattr(config, name), alpha):
            needed = next(n for n in range(1, 10 ** 6) if certify.can_certify(n, alpha))
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)} can never certify at alpha = {alpha}: "
                             f"even all samples agreeing leave the bound at or below 1/2; at least {needed} are needed")
    if config.n_p > config.search_n:
        raise InputError(f"--n-p {config.n_p} replays cached samples, so it cannot exceed --search-n {config.search_n}")
    for name in ("mean", "std"):
        text = getattr(config, name)
        try:
            if text is not None and len([float(part) for part in text.split(",")]) != 3:
                raise ValueError
        except ValueError:
            raise InputError(f"--{name} takes three numbers with commas, such as 0.5,0.5,0.5, not {text!r}") from None
    config.device = pick_device(config.device)
    if config.eval_batch is None:  # on a CPU batches that stay in its cache are fastest; a GPU wants them large
        pixels = config.image_size ** 2
        config.eval_batch = max(8, (100 if config.device == "cpu" else 2000) * 1024 // max(pixels, 1024))
    if config.out is None:
        tag = "evaluate" if config.evaluate else f"budget{config.budget:g}-seed{config.seed}"
        config.out = str(Path("runs") / f"{config.dataset}-{config.arch}-sigma{config.sigma:g}-{tag}")
    return config


def pick_device(name: str) -> str:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, there in available.items() if there)
    if name not in available:
        raise InputError(f"unknown --device {name!r}; there are auto, {', '.join(available)}")
    if not available[name]:
        raise InputError(f"--device {name} is not available on this machine; use --device auto")
    return name


def option_key(config: Config, names) -> str:
    """A short name for the values of some options."""
    text = json.dumps([getattr(config, name) for name in names])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ---- progress and files ---------------------------------------------------------------------------------------

class Progress:
    """One line, rewritten in place, with rate and time left; silent when stderr is not a terminal."""

    def __init__(self, label: str, total: int, unit: str):
        self.label, self.total, self.unit = label, total, unit
        self.done, self.start, self.shown = 0, time.monotonic(), 0.0
        self.on = sys.stderr.isatty()

    def add(self, amount: int) -> None:
        self.done += amount
        now = time.monotonic()
        if self.on and (now - self.shown > 0.2 or self.done >= self.total):
            self.shown = now
            rate = self.done / max(now - self.start, 1e-9)
            left = duration((self.total - self.done) / max(rate, 1e-9))
            print(f"\r  {self.label}: {self.done}/{self.total} {self.unit}, {rate:.3g}/s, {left} left   ",
                  end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.on:
            print("\r" + " " * 100 + "\r", end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    seconds = int(seconds + 0.5)
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 7200:
        return f"{seconds // 60} min"
    return f"{seconds / 3600:.1f} h"


def write_json(path: Path, value) -> None:
    """Complete or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


# ---- images ---------------------------------------------------------------------------------------------------

class ImageSet:
    """Labelled images. Small sets live in memory as uint8 (N, 3, S, S); large ones are read from files when asked.

    `batch(indices)` gives float images in [0, 1]. Order is by label, then by name or original position.
    """

    def __init__(self, labels: list[int], classes: list[str], pixels: Optional[Tensor] = None,
                 paths: Optional[list[Path]] = None, size: int = 32):
        self.labels, self.classes, self.pixels, self.paths, self.size = labels, classes, pixels, paths, size

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices, device="cpu") -> Tensor:
        if self.pixels is not None:
            pixels = self.pixels[torch.as_tensor(indices)]
        else:
            with ThreadPoolExecutor() as pool:
                pixels = torch.stack(list(pool.map(lambda i: read_image(self.paths[i], self.size), indices)))
        return pixels.to(device).float().div_(255)


def read_image(path: Path, size: int) -> Tensor:
    """An RGB image, its shorter side resized and its centre cropped to uint8 (3, size, size)."""
    try:
        image = torchvision.io.decode_image(str(path), mode=torchvision.io.ImageReadMode.RGB)
    except Exception as error:
        reason = str(error).splitlines()[0][:80]
        raise InputError(f"{path}: cannot be read as an image ({reason}); repair or remove it") from None
    if image.shape[1:] != (size, size):
        image = TF.center_crop(TF.resize(image, [size], antialias=True), [size, size])
    return image


IN_MEMORY_BYTES = 2 ** 31
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm")


def load_folder(root: Path, size: int) -> ImageSet:
    """An image tree `root/<class>/*`: classes by sorted folder name, files by sorted name."""
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    found = [(label, path) for label, name in enumerate(classes) for path in sorted((root / name).iterdir())
             if path.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise InputError(f"{root}: no images in class folders; expected {root}/<class>/*.jpg or .png")
    labels, paths = [label for label, _ in found], [path for _, path in found]
    images = ImageSet(labels, classes, paths=paths, size=size)
    if len(paths) * 3 * size * size <= IN_MEMORY_BYTES:
        progress = Progress(f"reading {root}", len(paths), "images")
        images.pixels = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:
            for i, image in enumerate(pool.map(lambda path: read_image(path, size), paths)):
                images.pixels[i] = image
                progress.add(1)
        progress.close()
    return images


def load_images(config: Config) -> tuple[ImageSet, ImageSet]:
    """The training and the test set."""
    if config.dataset == "shapes":
        return draw_shapes(8000, seed=0), draw_shapes(1000, seed=1)
    root, test_name = Path(config.data), "test" if (Path(config.data) / "test").is_dir() else "val"
    if (root / "train").is_dir() and (root / test_name).is_dir():
        train, test = load_folder(root / "train", config.image_size), load_folder(root / test_name, config.image_size)
        if train.classes != test.classes:
            raise InputError(f"{root}: train/ and {test_name}/ have different class folders "
                             f"({sorted(set(train.classes) ^ set(test.classes))[:3]} ...)")
        return train, test
    if config.dataset == "cifar10":
        return tuple(load_cifar10(config, train) for train in (True, False))
    raise InputError(f"--data {root}: expected an image tree {root}/train/<class>/* and {root}/test/<class>/* "
                     f"(or val/)")


def load_cifar10(config: Config, train: bool) -> ImageSet:
    try:
        try:
            data = torchvision.datasets.CIFAR10(config.data, train=train)
        except RuntimeError:
            data = torchvision.datasets.CIFAR10(config.data, train=train, download=True)
    except Exception:  # many kinds of network and file errors, one remedy
        raise InputError(f"no CIFAR-10 in --data {config.data} and it could not be downloaded; fetch cifar-10-python"
                         f".tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html into {config.data}, or put an "
                         f"image tree there ({config.data}/train/<class>/*, {config.data}/test/<class>/*)") from None
    order = sorted(range(len(data)), key=lambda i: data.targets[i])
    pixels = torch.from_numpy(data.data[order]).permute(0, 3, 1, 2).contiguous()
    if config.image_size != 32:
        pixels = TF.resize(pixels, [config.image_size, config.image_size], antialias=True)
    return ImageSet([data.targets[i] for i in order], data.classes, pixels)


SHAPES = ["bars across", "bars upright", "checkers", "cross", "disk", "frame", "plus", "ring", "square", "triangle"]


def draw_shapes(count: int, seed: int, size: int = 32) -> ImageSet:
    """Ten classes of shapes (count, 3, 32, 32), sorted by class: low contrast on a mottled ground, so that noise of
    sigma 0.25 costs accuracy."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=g)

    labels = torch.arange(count) * len(SHAPES) // count
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    radius, angle = uniform(0.4, 0.75, count, 1, 1), uniform(-0.3, 0.3, count, 1, 1)
    x, y = x - uniform(-0.3, 0.3, count, 1, 1), y - uniform(-0.3, 0.3, count, 1, 1)
    u = (x * angle.cos() + y * angle.sin()) / radius
    v = (y * angle.cos() - x * angle.sin()) / radius
    r, box = (u * u + v * v).sqrt(), torch.maximum(u.abs(), v.abs())
    stripes = lambda w: (w * 7).sin() > 0  # noqa: E731
    diagonal = torch.minimum((u + v).abs(), (u - v).abs())
    masks = [(box < 1) & stripes(v), (box < 1) & stripes(u), (box < 1) & (stripes(u) ^ stripes(v)),
             (r < 1.1) & (diagonal < 0.42), r < 1, (box < 0.95) & (box > 0.55), (box < 1) & (torch.minimum(u.abs(), v.abs()) < 0.3),
             (r < 1) & (r > 0.6), box < 0.85, (v < 0.8) & (v > 2 * u.abs() - 1)]
    mask = torch.stack(masks)[labels, torch.arange(count)][:, None].float()
    ground = uniform(0.25, 0.75, count, 3, 1, 1)
    mottle = F.interpolate(uniform(-0.15, 0.15, count, 3, 5, 5), size, mode="bilinear", align_corners=True)
    sign = torch.where(uniform(0, 1, count, 3, 1, 1) < 0.5, -1.0, 1.0)
    contrast = uniform(0.06, 0.32, count, 1, 1, 1) * sign
    pixels = (ground + mottle + contrast * mask).clamp(0, 1).mul(255).round().to(torch.uint8)
    return ImageSet(labels.tolist(), SHAPES, pixels)


def evenly_spaced(count: int, total: int) -> list[int]:
    """`count` indices of a set of `total`, evenly spaced from the first."""
    return [i * total // count for i in range(count)]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random flip and shift by up to an eighth of the side (zero padded), one draw per image."""
    batch, _, height, width = images.shape
    pad = max(1, height // 8)
    padded = F.pad(images, (pad,) * 4)
    top, left = torch.randint(2 * pad + 1, (2, batch), generator=generator)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    flipped = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    index = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


# ---- training -------------------------------------------------------------------------------------------------

def train(classifier: nn.Module, images: ImageSet, indices: list[int], config: Config, steps: int, lr: float,
          weight_decay: float, purpose: str, label: str = "", warmup: float = 0.2) -> None:
    """Gaussian noise augmentation (Cohen et al., section 4): cross-entropy on augmented images plus noise of sigma.

    Nesterov SGD for `steps` batches, the rate rising over the first `warmup` share of them and falling to 0 along
    a cosine. Quantizer steps and BatchNorm decay no weights. Equal arguments draw equal batches and noise.
    """
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}|{purpose}".encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    noise_generator = torch.Generator(config.device).manual_seed(seed + 1)
    decayed = [p for p in classifier.parameters() if p.ndim > 1]
    others = [p for p in classifier.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    rate = lambda t: min((t + 1) / (warmup * steps + 1), 0.5 + 0.5 * math.cos(math.pi * t / steps))  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    labels = torch.tensor(images.labels)
    progress = Progress(label, steps, "batches")
    classifier.train()
    order: list[int] = []
    for _ in range(steps):
        if len(order) < config.batch_size:
            order += torch.tensor(indices)[torch.randperm(len(indices), generator=generator)].tolist()
        chosen, order = order[:config.batch_size], order[config.batch_size:]
        x = augment(images.batch(chosen, config.device), generator)
        noise = torch.randn(x.shape, generator=noise_generator, device=x.device)
        loss = F.cross_entropy(classifier(x + config.sigma * noise), labels[chosen].to(x.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        models.keep_steps_positive(classifier)
        if label:
            progress.add(1)
    progress.close()
    classifier.eval()
    if steps and not torch.isfinite(loss):
        raise InputError(f"{purpose}: the training loss is {float(loss)}; try fewer epochs or another --seed")


# ---- search ---------------------------------------------------------------------------------------------------

def enforce_budget(table: list[Layer], policy: Policy, budget: float, size_budget: Optional[float] = None) -> Policy:
    """The policy, forced under the budget (HAQ, section 3.3): from the last layer back, one bit at a time.

    budget and size_budget are fractions of the float network's BitOPs and weight bits. Each visit takes one bit
    from the layer's weights, then one from its activations, until the policy fits; ends keep their 8 bits.
    Raises InputError if the narrowest policy is over the budget.
    """
    policy = {name: list(bits) for name, bits in policy.items()}
    float_policy = models.uniform_policy(table, models.FLOAT_BITS, models.FLOAT_BITS)
    spare = budget * models.bitops(table, float_policy) - models.bitops(table, policy)
    allowed = math.inf if size_budget is None else size_budget * 32
    spare_bits = sum(layer.weights * (allowed - policy[layer.name][0]) for layer in table)
    while spare < 0 or spare_bits < 0:
        moved = False
        for layer in reversed(table[1:-1]):
            bits = policy[layer.name]
            for kind in (0, 1):
                over = spare < 0 or (spare_bits < 0 and kind == 0)
                if over and bits[kind] > models.MIN_BITS:
                    bits[kind] -= 1
                    spare += layer.macs * bits[1 - kind]
                    spare_bits += layer.weights if kind == 0 else 0
                    moved = True
        if not moved:
            floor = models.uniform_policy(table, models.MIN_BITS)
            raise InputError(f"--budget {budget:g} is below what the narrowest policy costs: {models.MIN_BITS} bits with "
                             f"{models.END_BITS}-bit ends need {models.bitops_ratio(table, floor):.5f} of the BitOPs and "
                             f"{models.size_bytes(table, floor) / models.size_bytes(table, float_policy):.4f} of the size")
    return policy


class BitWidthEnvironment:
    """An episode walks the layers; each takes two actions, its weights' and its activations' (HAQ, section 3.2).

    States are float tensors (10,) in [0, 1]: index, c_in, c_out, kernel, stride, input map size, weights, depthwise,
    weight-or-activation flag, previous action. The first and the last layer are fixed at 8 bits and not visited.
    """

    def __init__(self, table: list[Layer], budget: float, size_budget: Optional[float] = None):
        self.table, self.budget, self.size_budget = table, budget, size_budget
        self.steps = [(layer, kind) for layer in table[1:-1] for kind in (0, 1)]
        rows = [[i, layer.c_in, layer.c_out, layer.kernel, layer.stride, layer.map_size, layer.weights,
                 layer.depthwise, kind] for i, (layer, kind) in enumerate(self.steps)]
        features = torch.tensor(rows, dtype=torch.float32)
        low, high = features.amin(0), features.amax(0)
        self.features = (features - low) / (high - low).clamp_min(1e-9)

    @staticmethod
    def bits(action: float) -> int:
        """round(b_min - 1/2 + a (b_max - b_min + 1)): equal shares of [0, 1] for every width."""
        span = models.MAX_BITS - models.MIN_BITS + 1
        return min(models.MAX_BITS, max(models.MIN_BITS, round(models.MIN_BITS - 0.5 + action * span)))

    def rollout(self, act: Callable[[Tensor], float]) -> tuple[Tensor, Tensor, Policy]:
        """One episode: states (T, 10), actions (T, 1) as `act` emitted them, and the policy forced under the budget."""
        policy = models.uniform_policy(self.table, models.MIN_BITS)
        states, actions, action = [], [], 1.0
        for features, (layer, kind) in zip(self.features, self.steps):
            states.append(torch.cat([features, torch.tensor([action])]))
            action = act(states[-1])
            actions.append(action)
            policy[layer.name][kind] = self.bits(action)
        policy = enforce_budget(self.table, policy, self.budget, self.size_budget)
        return torch.stack(states), torch.tensor(actions)[:, None], policy


class PolicyEvaluator:
    """ACR of f under a policy: widths set on the base weights, a brief fine-tuning, incremental certification."""

    def __init__(self, classifier: Classifier, cache: certify.ReplayCache, images: Tensor, train_images: ImageSet,
                 train_indices: list[int], config: Config):
        self.classifier, self.cache, self.images = classifier, cache, images
        self.train_images, self.train_indices, self.config = train_images, train_indices, config
        self.base_state = {name: value.clone() for name, value in classifier.state_dict().items()}

    def __call__(self, policy: Policy) -> list[certify.IncrementalCertificate]:
        config = self.config
        self.classifier.load_state_dict(self.base_state)
        models.set_policy(self.classifier, policy)
        train(self.classifier, self.train_images, self.train_indices, config, config.episode_steps, EPISODE_LR,
              FINETUNE_DECAY, "episode")
        return certify.certify_incremental(self.classifier, self.cache, self.images, config.n_p, config.alpha_zeta,
                                           config.gamma, config.eval_batch)


EPISODE_LR, FINETUNE_LR, FINETUNE_DECAY = 0.005, 0.02, 1e-4
BASE_LR, BASE_DECAY = 0.2, 5e-4


def search(environment: BitWidthEnvironment, evaluate: Callable, base_acr: float, config: Config, out: Path) -> dict:
    """Algorithm 1, after FullRobustCertify(f): episodes of the agent, each one line of search.jsonl.

    evaluate(policy) returns incremental certificates; reward = (ACR(g^P) - ACR(g)) / ACR(g). Every episode ends
    with search.jsonl and search_state.pt on disk, and a later call continues after the last. Returns the best
    episode's record.
    """
    agent = DDPG(environment.features.shape[1] + 1, config.seed,
                 DDPGConfig(episodes=config.episodes, warmup_episodes=min(20, max(1, config.episodes // 3))))
    log, state_path = out / "search.jsonl", out / "search_state.pt"
    records = []
    if state_path.exists():
        saved = torch.load(state_path, weights_only=True)
        agent.load_state_dict(saved["agent"])
        records = saved["records"]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    start, first = time.monotonic(), len(records)
    for episode in range(first, config.episodes):
        began = time.monotonic()
        states, actions, policy = environment.rollout(agent.act)
        acr = certify.average_certified_radius(evaluate(policy))
        reward = (acr - base_acr) / base_acr
        agent.learn(states, actions, reward)
        records.append({"episode": episode, "acr": acr, "reward": reward, "noise": agent.noise,
                        "bitops_ratio": models.bitops_ratio(environment.table, policy),
                        "size_bytes": models.size_bytes(environment.table, policy),
                        "seconds": round(time.monotonic() - began, 3), "policy": policy})
        with log.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
        save_state({"agent": agent.state_dict(), "records": records}, state_path)
        best = max(records, key=lambda record: record["acr"])
        left = (time.monotonic() - start) / (episode + 1 - first) * (config.episodes - episode - 1)
        print(f"  episode {episode + 1:>3}/{config.episodes}  ACR {acr:.4f}  reward {reward:+.4f}  BitOPs "
              f"{100 * records[-1]['bitops_ratio']:.3f} %  best {best['acr']:.4f}  {duration(left)} left", flush=True)
    return max(records, key=lambda record: record["acr"])


def save_state(value, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    torch.save(value, part)
    os.replace(part, path)


# ---- stages ---------------------------------------------------------------------------------------------------

BASE_OPTIONS = ("dataset", "data", "arch", "sigma", "epochs", "seed", "image_size", "batch_size", "search_images")


def floats(text: Optional[str]):
    return None if text is None else tuple(float(part) for part in text.split(","))


def base_path(config: Config) -> Path:
    return Path("runs") / "bases" / f"{config.dataset}-{config.arch}-{option_key(config, BASE_OPTIONS)}.pt"


def load_or_train_base(config: Config, images: ImageSet, indices: list[int]) -> Classifier:
    """The float base classifier: --checkpoint, one trained earlier with equal base options, or a new one."""
    num_classes = len(images.classes)
    if config.checkpoint is not None:
        try:
            base = models.load_base_checkpoint(config.checkpoint, config.arch, num_classes, floats(config.mean),
                                               floats(config.std))
        except ValueError as error:
            raise InputError(str(error)) from None
        return prepare(base, config)
    small = config.image_size <= 64
    mean, std = (models.CIFAR10_MEAN, models.CIFAR10_STD) if small else (models.IMAGENET_MEAN, models.IMAGENET_STD)
    torch.manual_seed(config.seed)
    base = prepare(models.build_classifier(config.arch, num_classes, floats(config.mean) or mean,
                                           floats(config.std) or std), config)
    path = base_path(config)
    if path.exists():
        print(f"base classifier: reusing {path}", flush=True)
        base.load_state_dict(torch.load(path, map_location=config.device, weights_only=True))
        return base.eval()
    steps = config.epochs * len(indices) // config.batch_size
    train(base, images, indices, config, steps, BASE_LR, BASE_DECAY, "base", "training the base")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_state(base.state_dict(), path)
    return base


def prepare(classifier: Classifier, config: Config) -> Classifier:
    """On the device, in evaluation mode, in the memory layout that convolutions on a CPU run fastest in."""
    return classifier.to(config.device, memory_format=torch.channels_last).eval()


class Stages:
    """Times each stage and counts the images that pass through the network; kept over interruptions."""

    def __init__(self, path: Path):
        self.path, self.passes = path, 0
        self.records = json.loads(path.read_text()) if path.exists() else {}

    def watch(self, classifier: nn.Module) -> None:
        def count(module, inputs):
            self.passes += len(inputs[0])
        classifier.register_forward_pre_hook(count)

    def run(self, name: str, call: Callable):
        print(f"{name} ...", flush=True)
        start, before = time.monotonic(), self.passes
        try:
            return call()
        finally:
            old = self.records.get(name, {"seconds": 0.0, "forward_passes": 0})
            self.records[name] = {"seconds": round(old["seconds"] + time.monotonic() - start, 2),
                                  "forward_passes": old["forward_passes"] + self.passes - before}
            write_json(self.path, self.records)


def certify_images(classifier: Classifier, images: ImageSet, config: Config, path: Path, purpose: str) -> list:
    """The final certificate on test images, one flushed row an image; rows already in the file are kept."""
    indices = evenly_spaced(config.images, len(images))
    done = []
    if path.exists():
        done = certify.read_certificates(path) if path.stat().st_size else []
        part = path.with_name(path.name + ".part")  # without a last line cut off by an interruption
        with part.open("w") as file:
            certify.write_certificates(file, done)
        os.replace(part, path)
    key = NoiseKey(config.seed, purpose)
    block = max(1, 4 * config.eval_batch // config.n)
    progress = Progress("certifying", len(indices), "images")
    progress.add(len(done))
    with path.open("a") as file:
        for first in range(len(done), len(indices), block):
            ids = indices[first:first + block]
            rows = certify.certify(classifier, images.batch(ids, config.device), [images.labels[i] for i in ids], ids,
                                   len(images.classes), config.sigma, config.n0, config.n, config.alpha, key,
                                   config.eval_batch)
            certify.write_certificates(file, rows)
            done += rows
            progress.add(len(rows))
    progress.close()
    return done


def summarize(rows, bitops_ratio: float, size: int, search_acr: Optional[float]) -> dict:
    return {"acr": certify.average_certified_radius(rows), "acr_standard_error": certify.acr_standard_error(rows),
            "accuracy": certify.certified_accuracy(rows, 0),
            "certified_accuracy": {str(r): certify.certified_accuracy(rows, r) for r in RADII},
            "abstained": sum(row.predict == certify.ABSTAIN for row in rows) / len(rows),
            "bitops_ratio": bitops_ratio, "size_bytes": size, "search_acr": search_acr, "images": len(rows)}


RADII = (0.0, 0.25, 0.5, 0.75)


def estimate_times(classifier: Classifier, images: ImageSet, indices: list[int], table: list[Layer], config: Config,
                   base_trained: bool) -> None:
    """Print what each stage should take, from about a second's measurement on this machine."""
    x = images.batch(indices[:1], config.device).expand(config.eval_batch, -1, -1, -1)
    state = {name: value.clone() for name, value in classifier.state_dict().items()}

    def rate(work: Callable[[], int], seconds: float) -> float:
        work()
        start, done = time.monotonic(), 0
        while time.monotonic() - start < seconds:
            done += work()
        return done / (time.monotonic() - start)

    def forward() -> int:
        with torch.inference_mode():
            classifier(x).argmax(1).cpu()
        return len(x)

    def step() -> int:
        train(classifier, images, indices, config, 1, 0.0, 0.0, "timing")
        return config.batch_size

    float_forward, float_step = rate(forward, 0.2), rate(step, 0.2)
    models.set_policy(classifier, models.uniform_policy(table, 4))
    forward_rate, step_rate = rate(forward, 0.2), rate(step, 0.4)
    models.set_policy(classifier, models.uniform_policy(table, models.FLOAT_BITS, models.FLOAT_BITS))
    classifier.load_state_dict(state)
    train_images = len(indices)
    final = config.images * (config.n0 + config.n)
    episode = config.episode_steps * config.batch_size / step_rate + config.search_images * config.n_p / forward_rate
    stages = {
        "train the base": 0 if base_trained else config.epochs * train_images / float_step,
        "certify the base, search images": config.search_images * (config.n0 + config.search_n) / float_forward,
        f"search, {config.episodes} episodes": config.episodes * episode,
        "fine-tune": config.finetune_epochs * train_images / step_rate,
        "certify the base, test images": final / float_forward,
        "certify ARQ, test images": final / forward_rate}
    print(f"expected on {config.device}: {forward_rate:.0f} quantized and {float_forward:.0f} float images/s, "
          f"training {step_rate:.0f} and {float_step:.0f} images/s")
    for name, seconds in stages.items():
        print(f"  {name:<36} {duration(seconds):>8}")
    print(f"  {'together at most':<36} {duration(sum(stages.values())):>8}", flush=True)


# ---- the run --------------------------------------------------------------------------------------------------

def open_run(config: Config) -> Path:
    """The run folder, new or of a run with the same options."""
    out = Path(config.out)
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in PLACE_OPTIONS}
    path = out / "config.json"
    if path.exists():
        old = json.loads(path.read_text())
        differ = [f"--{name.replace('_', '-')} {old.get(name)} there, {value} here"
                  for name, value in options.items() if old.get(name) != value]
        if differ:
            raise InputError(f"--out {out} holds a run of other options ({'; '.join(differ[:4])}); "
                             f"give another --out, or remove it")
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out} is not empty and holds no run of this program; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, options)
    return out


def run(config: Config) -> dict:
    """The whole method: base, its certificate, search, fine-tuning, the quantized network's certificate, results."""
    train_images, test_images = load_images(config)
    check_counts(config, train_images, test_images)
    search_ids = evenly_spaced(config.search_images, len(train_images))
    held_out = set(search_ids)
    train_ids = [i for i in range(len(train_images)) if i not in held_out]
    num_classes = len(train_images.classes)

    # Everything that could refuse the options comes before the work they ask for.
    float_table = models.quantize_model(models.build_classifier(config.arch, num_classes), config.image_size)
    enforce_budget(float_table, models.uniform_policy(float_table, models.MIN_BITS), config.budget, config.size_budget)
    base_ready = config.checkpoint is not None or base_path(config).exists()
    if config.checkpoint is not None:
        classifier = load_or_train_base(config, train_images, train_ids)
    out = open_run(config)
    results_path = out / "results.json"
    if results_path.exists():
        print(f"{out} is finished; these are its results")
        results = json.loads(results_path.read_text())
        print_report(results, json.loads((out / "policy.json").read_text()), config, out)
        return results
    print(f"{config.dataset}: {len(train_ids)} training, {len(search_ids)} search, {config.images} test images, "
          f"{num_classes} classes; {config.arch}, sigma {config.sigma:g}; run folder {out}", flush=True)
    stages = Stages(out / "stages.json")
    if not base_ready:
        probe = prepare(models.build_classifier(config.arch, num_classes), config)
        estimate_times(probe, train_images, train_ids, models.quantize_model(probe, config.image_size), config, False)
    if config.checkpoint is None:
        classifier = stages.run("base classifier", lambda: load_or_train_base(config, train_images, train_ids))
    stages.watch(classifier)
    table = models.quantize_model(classifier, config.image_size)
    search_images = train_images.batch(search_ids, config.device)
    calibration = search_images[:256]
    generator = torch.Generator(config.device).manual_seed(config.seed)
    noise = torch.randn(calibration.shape, generator=generator, device=config.device)
    models.calibrate(classifier, (calibration + config.sigma * noise).split(config.eval_batch))
    if base_ready:
        estimate_times(classifier, train_images, train_ids, table, config, True)

    base_rows = stages.run("certify the base, test images", lambda: certify_images(
        classifier, test_images, config, out / "base_certificates.tsv", "base certificate"))
    cache = stages.run("certify the base, search images", lambda: certify.certify_and_cache(
        classifier, search_images, [train_images.labels[i] for i in search_ids], search_ids, num_classes, config.sigma,
        config.n0, config.search_n, config.alpha, NoiseKey(config.seed, "search"), config.eval_batch))
    base_acr = certify.average_certified_radius(cache.certificates)
    if base_acr == 0:
        raise InputError("the base classifier certifies none of the search images, so there is nothing to keep; train "
                         "it longer (--epochs), or lower --sigma")
    print(f"  ACR of the base on the search images: {base_acr:.4f}")

    environment = BitWidthEnvironment(table, config.budget, config.size_budget)
    evaluate = PolicyEvaluator(classifier, cache, search_images, train_images, train_ids, config)
    best = stages.run("search", lambda: search(environment, evaluate, base_acr, config, out))
    write_json(out / "policy.json", best["policy"])

    model_path = out / "model.pt"
    if not model_path.exists():
        classifier.load_state_dict(evaluate.base_state)
        models.set_policy(classifier, best["policy"])
        steps = int(config.finetune_epochs * len(train_ids) / config.batch_size)
        stages.run("fine-tune", lambda: train(classifier, train_images, train_ids, config, steps, FINETUNE_LR,
                                              FINETUNE_DECAY, "fine-tune", "fine-tuning"))
        models.save_model(model_path, classifier, config.arch, num_classes, config.image_size, best["policy"],
                          config.sigma)
    classifier, table, _ = models.load_model(model_path)  # what is certified is what was saved
    classifier = prepare(classifier, config)
    stages.watch(classifier)
    rows = stages.run("certify ARQ, test images", lambda: certify_images(
        classifier, test_images, config, out / "certificates.tsv", "certificate"))

    float_policy = models.uniform_policy(table, models.FLOAT_BITS, models.FLOAT_BITS)
    results = summarize(rows, models.bitops_ratio(table, best["policy"]), models.size_bytes(table, best["policy"]),
                        best["acr"])
    results["base"] = summarize(base_rows, 1.0, models.size_bytes(table, float_policy), base_acr)
    results.update(run_facts(config), stages=stages.records)
    write_json(results_path, results)
    print_report(results, best["policy"], config, out)
    return results


def check_counts(config: Config, train_images: ImageSet, test_images: ImageSet) -> None:
    if config.images > len(test_images):
        raise InputError(f"--images {config.images}: the test set has only {len(test_images)} images")
    if config.search_images > len(train_images) // 2:
        raise InputError(f"--search-images {config.search_images} leaves too little of {len(train_images)} training images")
    if len(train_images.classes) < 2:
        raise InputError(f"--data {config.data}: at least two classes are needed")
    if len(train_images) - config.search_images < config.batch_size:
        raise InputError(f"--batch-size {config.batch_size}: only {len(train_images) - config.search_images} "
                         f"training images are left beside the search images")


def evaluate_saved(config: Config) -> dict:
    """--evaluate: certify a saved network, quantized (model.pt) or a float checkpoint, on the test images."""
    train_images, test_images = load_images(config)
    check_counts(config, train_images, test_images)
    num_classes = len(train_images.classes)
    try:
        if models.saved_options(config.evaluate):
            classifier, table, saved = models.load_model(config.evaluate)
            policy = saved["policy"]
            if saved["num_classes"] != num_classes:
                raise ValueError(f"{config.evaluate} has {saved['num_classes']} classes, the images {num_classes}")
        else:
            classifier = models.load_base_checkpoint(config.evaluate, config.arch, num_classes, floats(config.mean),
                                                     floats(config.std))
            table = models.quantize_model(classifier, config.image_size)
            policy = models.uniform_policy(table, models.FLOAT_BITS, models.FLOAT_BITS)
    except ValueError as error:
        raise InputError(str(error)) from None
    out = open_run(config)
    stages = Stages(out / "stages.json")
    classifier = prepare(classifier, config)
    stages.watch(classifier)
    rows = stages.run("certify", lambda: certify_images(classifier, test_images, config, out / "certificates.tsv",
                                                        "certificate"))
    results = summarize(rows, models.bitops_ratio(table, policy), models.size_bytes(table, policy), None)
    results.update(run_facts(config), stages=stages.records)
    write_json(out / "results.json", results)
    print_report(results, policy, config, out)
    return results


def run_facts(config: Config) -> dict:
    """What a reader of results.json needs to know about how the numbers came about."""
    return {"sigma": config.sigma, "alpha": config.alpha, "n0": config.n0, "n": config.n, "device": config.device,
            "torch": torch.__version__, "threads": torch.get_num_threads()}


def print_report(results: dict, policy: Policy, config: Config, out: Path) -> None:
    """Float base and ARQ side by side, and the policy, one line a layer."""
    columns = {"float base": results["base"], "ARQ": results} if "base" in results else {"network": results}
    lines = [("certified accuracy at radius 0", lambda r: f"{r['accuracy']:.4f}")]
    lines += [(f"certified accuracy at {radius:g}", lambda r, radius=radius: f"{r['certified_accuracy'][str(radius)]:.4f}")
              for radius in RADII[1:]]
    lines += [("average certified radius (ACR)", lambda r: f"{r['acr']:.4f}"),
              ("  its standard error over images", lambda r: f"{r['acr_standard_error']:.4f}"),
              ("ACR on the search images", lambda r: "-" if r["search_acr"] is None else f"{r['search_acr']:.4f}"),
              ("abstained", lambda r: f"{r['abstained']:.4f}"),
              ("BitOPs, % of float", lambda r: f"{100 * r['bitops_ratio']:.4f}"),
              ("weights, bytes", lambda r: f"{r['size_bytes']:,}")]
    print(f"\n{config.dataset}, {config.arch}, sigma {config.sigma:g}: {results['images']} test images, n0 = {config.n0}, "
          f"n = {config.n}, alpha = {config.alpha:g} an image\n")
    print(f"{'':<34}" + "".join(f"{name:>14}" for name in columns))
    for label, text in lines:
        print(f"{label:<34}" + "".join(f"{text(column):>14}" for column in columns.values()))
    print(f"\n{'layer':<26}{'weights':>9}{'input':>9}   (bits)")
    for name, (w_bits, a_bits) in policy.items():
        print(f"{name:<26}{w_bits:>9}{a_bits:>9}")
    print(f"\nwritten to {out}/", flush=True)


def main(argv=None) -> int:
    try:
        config = parse_config(argv)
        evaluate_saved(config) if config.evaluate else run(config)
    except InputError as error:
        print(f"arq.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\narq.py: interrupted; the same command continues the run", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
