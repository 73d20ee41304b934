"""ARQ: mixed-precision quantization that keeps a network's certified robustness.

    python arq.py                                                 # offline, minutes on two cores
    python arq.py --dataset cifar10 --sigma 0.25 --budget 0.015   # the paper's setting

    paper              here                          meaning
    Algorithm 1        search                        base certificate, episodes of the agent, the best policy
    s_l                BitWidthEnvironment.features  features of layers and kinds (weights, input), in [0, 1]
    a -> b             BitWidthEnvironment.bits      action in [0, 1] to a width
    BitOPs constraint  models.enforce_budget         takes bits from the last layer back until the policy fits
    reward             search                        (ACR(g^P) - ACR(g)) / ACR(g), on held-out training images
    ACR(g^P)           PolicyEvaluator               estimated, or certified by IRS, with n_p samples an image
    X                  certify_images                test images, first seen by the final certificate
"""

import argparse
import copy
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, Optional

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

BASE_LR, BASE_DECAY = 0.2, 5e-4
EPISODE_LR, FINETUNE_LR, FINETUNE_DECAY = 0.005, 0.02, 1e-4
RADII = (0.0, 0.25, 0.5, 0.75)
IN_MEMORY_BYTES = 2 ** 31


class InputError(ValueError):
    """Something the user gave cannot work: what, where, and what to do instead."""


# ---- options ----

# The paper-sized runs: 600 episodes are HAQ's; n_p is a tenth of the cached samples; 500 test images resolve
# an ACR to about 0.015, and n = 10,000 caps a radius at 3.2 sigma. `shapes` is sized for two cores' minutes.
PAPER_SIZED = dict(arch="resnet20", image_size=32, epochs=90, episodes=600, episode_steps=20,
                   finetune_epochs=30.0, search_images=500, search_n=10000, n_p=1000, images=500, n=10000,
                   gamma=0.99)
DEFAULTS = {
    "shapes": dict(arch="resnet8", image_size=32, epochs=6, episodes=24, episode_steps=8, finetune_epochs=3.0,
                   search_images=100, search_n=500, n_p=100, images=100, n=1000, gamma=0.99),
    "cifar10": PAPER_SIZED,
    "folder": PAPER_SIZED,
    "imagenet": dict(PAPER_SIZED, arch="resnet50", image_size=224, finetune_epochs=10.0, gamma=0.995),
}
PLACE_OPTIONS = ("out", "data", "eval_batch")  # where and how fast, not what: a run may change them
BASE_OPTIONS = ("dataset", "arch", "mean", "std", "sigma", "epochs", "seed", "image_size", "batch_size",
                "search_images")
SAVED_OPTIONS = ("dataset", "arch", "image_size", "sigma")  # in the file of a network
UPPER = dict(sigma=math.inf, budget=1, size_budget=1, alpha=1, alpha_zeta=1, gamma=1)
LOWEST = dict(epochs=1, episodes=1, episode_steps=0, finetune_epochs=0, search_images=1, search_n=1, n_p=1,
              images=1, n0=1, n=1, image_size=8, batch_size=2, eval_batch=1, seed=0)


def option(default, text: str, **parser_options):
    shown = "" if default is None else f" (default: {default})"
    return field(default=default, metadata={"help": text + shown, **parser_options})


@dataclass
class Config:
    """Every option, from which the command line is made; None is filled in per dataset (DEFAULTS)."""
    dataset: str = option(None, "shapes (drawn by the program), cifar10, imagenet or folder (your own); "
                          "default: shapes, or what the network of --evaluate was made for", choices=DEFAULTS)
    data: str = option("data", "where the images are, or where CIFAR-10 is downloaded to")
    arch: str = option(None, "resnet8/20/32/44/56/110 (CIFAR), resnet18, resnet50 or mobilenet_v2",
                       choices=(*models.CIFAR_RESNETS, *models.TORCHVISION_NETS))
    checkpoint: str = option(None, "float base classifier, trained with noise; else one is trained")
    mean: list = option(None, "normalisation of the network, such as 0.5 0.5 0.5", type=float, nargs=3)
    std: list = option(None, "likewise", type=float, nargs=3)
    sigma: float = option(None, "standard deviation of the noise, in [0, 1] pixels; default: 0.25, or what "
                          "the network of --evaluate was made for")
    budget: float = option(0.015, "BitOPs allowed, as a fraction of the float network's")
    size_budget: float = option(None, "weight bits allowed, as a fraction of the float network's")
    epochs: int = option(None, "training epochs of the base classifier")
    episodes: int = option(None, "search episodes, one policy each")
    episode_steps: int = option(None, "fine-tuning steps of each policy before it is certified")
    finetune_epochs: float = option(None, "fine-tuning epochs of the best policy, such as 2.5")
    search_images: int = option(None, "training images held out for the search")
    search_n: int = option(None, "samples per search image of the base classifier's certificate")
    n_p: int = option(None, "samples per search image of a policy's reward")
    images: int = option(None, "test images of the final certificates, evenly spaced over the set")
    n0: int = option(100, "samples that select the class")
    n: int = option(None, "samples that bound its probability")
    alpha: float = option(0.001, "probability that one image's certificate is wrong")
    alpha_zeta: float = option(0.001, "the same for the disparity in the incremental certificate")
    gamma: float = option(None, "cached p_A from which IRS as published draws fresh samples")
    reward_estimate: str = option("point", "rewards: ACR as point estimate on noise common to all policies, "
                                  "or certified, by IRS", choices=("point", "certified"))
    image_size: int = option(None, "side of the images the network sees")
    batch_size: int = option(128, "training batch")
    eval_batch: int = option(None, "samples per forward pass when certifying")
    seed: int = option(0, "seed of training, search and noise")
    device: str = option("auto", "auto, cuda, mps or cpu", choices=("auto", "cuda", "mps", "cpu"))
    out: str = option(None, "run folder (default: named after the options, under runs/)")
    evaluate: str = option(None, "certify this saved network on the test images, and stop")


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see --help)")


def parse_config(argv=None) -> Config:
    """Options from the command line, checked and completed. Raises InputError."""
    parser = OneLineParser(description="ARQ: mixed-precision quantization that keeps certified robustness.",
                           epilog="Defaults not shown depend on the dataset; see DEFAULTS in arq.py.",
                           allow_abbrev=False)
    for f in dataclasses.fields(Config):
        settings = {"type": f.type, "metavar": f.type.__name__.upper(), **f.metadata}
        parser.add_argument(flag(f.name), default=f.default, **settings)
    return complete_config(Config(**vars(parser.parse_args(argv))))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def complete_config(config: Config) -> Config:
    """Fill in the dataset's defaults and refuse what cannot work, before any data is touched."""
    for name in ("checkpoint", "evaluate"):
        path = getattr(config, name)
        if path is not None and not Path(path).is_file():
            raise InputError(f"{flag(name)} {path}: no such file")
    packed = models.read_packed(config.evaluate) if config.evaluate else None
    saved = {name: packed[0][name] for name in SAVED_OPTIONS} if packed else {}
    for name in ("arch", "image_size"):
        if name in saved and getattr(config, name) not in (None, saved[name]):
            raise InputError(f"--evaluate {config.evaluate} has {flag(name)} {saved[name]}; omit it")
    config.dataset = config.dataset or saved.get("dataset", "shapes")
    for name, value in {**DEFAULTS[config.dataset], "sigma": 0.25, **saved}.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    config.device = pick_device(config.device)
    if config.eval_batch is None:  # small batches stay in a CPU's cache; a GPU wants large ones
        samples = 50 if config.device == "cpu" else 2000
        config.eval_batch = max(8, samples * 32 ** 2 // max(config.image_size, 32) ** 2)
    for name, upper in UPPER.items():
        value = getattr(config, name)
        if value is not None and not 0 < value < upper:
            raise InputError(f"{flag(name)} must be above 0 and below {upper}, not {value}")
    for name, lowest in LOWEST.items():
        value = getattr(config, name)
        if not lowest <= value < 2 ** 31:
            raise InputError(f"{flag(name)} must be at least {lowest} and below 2^31, not {value}")
    for name in ("n", "search_n", "n_p"):
        n, alpha = getattr(config, name), config.alpha + (config.alpha_zeta if name == "n_p" else 0)
        if not certify.can_certify(n, alpha):
            needed = math.floor(math.log(alpha) / math.log(0.5)) + 1
            raise InputError(f"{flag(name)} {n} never certifies at alpha = {alpha:g}; give at least {needed}")
    if config.n_p > config.search_n:
        raise InputError(f"--n-p {config.n_p} exceeds --search-n {config.search_n}, all it can replay")
    if config.out is None:
        source = f"budget{config.budget:g}"
        if config.evaluate:
            source = f"evaluate-{Path(config.evaluate).resolve().parent.name}-{Path(config.evaluate).stem}"
        config.out = f"runs/{config.dataset}-{config.arch}-sigma{config.sigma:g}-{source}-seed{config.seed}"
    return config


def pick_device(name: str) -> str:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(device for device in available if available[device]) if name == "auto" else name
    if not available[name]:
        raise InputError(f"--device {name} is not available on this machine; use --device auto")
    return name


# ---- progress and files ----

def progress(label: str, unit: str, done: int, total: int, block: int = 1) -> Iterator[int]:
    """Count from `done` to `total` in blocks. On a terminal, one line shows rate and time left meanwhile."""
    start, shown = time.monotonic(), 0.0
    on_terminal = bool(label) and sys.stderr.isatty()
    for first in range(done, total, block):
        yield first
        now, reached = time.monotonic(), min(first + block, total)
        if on_terminal and now - shown > 0.2:
            shown, rate = now, (reached - done) / max(now - start, 1e-9)
            print(f"\r  {label}: {reached}/{total} {unit}, {rate:.3g}/s, "
                  f"{duration((total - reached) / rate)} left   ", end="", file=sys.stderr, flush=True)
    if on_terminal:
        print("\r" + " " * 100 + "\r", end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def digest(*parts: bytes) -> str:
    """A short name for what these bytes say."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def write_whole(path: Path, value) -> None:
    """A JSON, torch or packed file, whole or not at all: written beside its place, which it then takes."""
    part = path.with_name(path.name + ".part")
    if path.suffix == ".json":
        part.write_text(json.dumps(value, indent=1) + "\n")
    elif isinstance(value, bytes):
        part.write_bytes(value)
    else:
        torch.save(value, part)
    os.replace(part, path)


# ---- images ----

class ImageSet:
    """Labelled images, ordered by label, then by name or original position.

    Small sets live in memory as uint8 (N, 3, S, S); large ones are read when asked for.
    """

    def __init__(self, labels: list[int], classes: list[str], pixels: Optional[Tensor] = None,
                 paths: Optional[list[Path]] = None, size: int = 32):
        self.labels, self.classes, self.pixels, self.paths, self.size = labels, classes, pixels, paths, size

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """A short name for what the set holds, from its classes, labels and a few images."""
        some = self.read(evenly_spaced(min(16, len(self)), len(self)))
        return digest(json.dumps([self.classes, self.labels, self.size]).encode(), some.numpy().tobytes())

    def read(self, indices) -> Tensor:
        """uint8 images (len(indices), 3, S, S)."""
        if self.pixels is not None:
            return self.pixels[torch.as_tensor(indices)]
        return torch.stack([read_image(self.paths[i], self.size) for i in indices])

    def batch(self, indices, device="cpu") -> Tensor:
        """Float images (len(indices), 3, S, S) in [0, 1]."""
        return self.read(indices).to(device).float().div_(255)


def read_image(path: Path, size: int) -> Tensor:
    """An RGB image as uint8 (3, size, size): shorter side resized, centre cropped. Raises InputError."""
    try:
        image = TF.pil_to_tensor(torchvision.datasets.folder.default_loader(str(path)))
    except Exception as error:  # decoders raise many kinds for broken files
        reason = str(error)[:60]
        raise InputError(f"{path}: cannot be read as an image ({reason}); repair or remove it") from None
    if image.shape[1:] != (size, size):
        image = TF.center_crop(TF.resize(image, [size], antialias=True), [size, size])
    return image


def load_folder(root: Path, size: int) -> ImageSet:
    """An image tree `root/<class>/*`: classes by sorted folder name, files by sorted name."""
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    found = [(label, path) for label, name in enumerate(classes) for path in sorted((root / name).iterdir())
             if path.suffix.lower() in torchvision.datasets.folder.IMG_EXTENSIONS and path.name[0] != "."]
    if not found:
        raise InputError(f"{root}: no images in class folders; expected {root}/<class>/*.jpg or .png")
    labels, paths = [label for label, _ in found], [path for _, path in found]
    images = ImageSet(labels, classes, paths=paths, size=size)
    if len(paths) * 3 * size * size <= IN_MEMORY_BYTES:
        blocks = progress(f"reading {root}", "images", 0, len(paths), 500)
        images.pixels = torch.cat([images.read(range(i, min(i + 500, len(paths)))) for i in blocks])
    return images


def load_split(config: Config, train: bool) -> ImageSet:
    """The training or the test set. Raises InputError where it is missing or too small for the options."""
    root = Path(config.data)
    name = "train" if train else "test" if (root / "test").is_dir() else "val"
    if config.dataset == "shapes":
        images = draw_shapes(8000 if train else 1000, seed=0 if train else 1, size=config.image_size)
    elif (root / name).is_dir():
        images = load_folder(root / name, config.image_size)
    elif config.dataset == "cifar10":
        images = load_cifar10(config, train)
    else:
        raise InputError(f"--data {root}: expected an image tree, {root}/train/<class>/* and "
                         f"{root}/test/<class>/* (or val/)")
    if len(images.classes) < 2:
        raise InputError(f"--data {root}: at least two classes are needed, there is one folder")
    if not train and config.images > len(images):
        raise InputError(f"--images {config.images}: the test set has only {len(images)} images")
    if train and config.search_images + config.batch_size > len(images):
        raise InputError(f"--search-images {config.search_images} leaves less than one --batch-size of "
                         f"{config.batch_size}: there are {len(images)} training images")
    return images


def load_images(config: Config) -> tuple[ImageSet, ImageSet]:
    """The training and the test set, of the same classes. Raises InputError as load_split does."""
    test_images, train_images = load_split(config, False), load_split(config, True)
    if train_images.classes != test_images.classes:
        differ = sorted(set(train_images.classes) ^ set(test_images.classes))
        raise InputError(f"--data {config.data}: the class {differ[0]!r} is only in training or only in test")
    return train_images, test_images


def load_cifar10(config: Config, train: bool) -> ImageSet:
    root = config.data
    try:
        present = (Path(root) / "cifar-10-batches-py").is_dir()
        data = torchvision.datasets.CIFAR10(root, train=train, download=not present)
    except Exception:  # network and file errors of many kinds, one remedy
        source = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
        raise InputError(f"no CIFAR-10 in --data {root}, and it could not be downloaded; unpack {source} "
                         f"there, or put an image tree there (train/<class>/*, test/<class>/*)") from None
    order = sorted(range(len(data)), key=lambda i: data.targets[i])
    pixels = torch.from_numpy(data.data[order]).permute(0, 3, 1, 2).contiguous()
    if config.image_size != 32:
        pixels = TF.resize(pixels, [config.image_size] * 2, antialias=True)
    return ImageSet([data.targets[i] for i in order], data.classes, pixels, size=config.image_size)


SHAPES = {  # what is inside each shape, by coordinates u, v and b = max(|u|, |v|) in [-1, 1]
    "bars across": lambda u, v, b: (b < 1) & ((7 * v).sin() > 0),
    "bars upright": lambda u, v, b: (b < 1) & ((7 * u).sin() > 0),
    "checkers": lambda u, v, b: (b < 1) & (((7 * u).sin() > 0) ^ ((7 * v).sin() > 0)),
    "cross": lambda u, v, b: (u.hypot(v) < 1.1) & (torch.minimum((u + v).abs(), (u - v).abs()) < 0.42),
    "disk": lambda u, v, b: u.hypot(v) < 1,
    "frame": lambda u, v, b: (b < 0.95) & (b >= 0.55),
    "plus": lambda u, v, b: (b < 1) & (torch.minimum(u.abs(), v.abs()) < 0.3),
    "ring": lambda u, v, b: (u.hypot(v) < 1) & (u.hypot(v) > 0.6),
    "square": lambda u, v, b: b < 0.85,
    "triangle": lambda u, v, b: (v < 0.8) & (v > 2 * u.abs() - 1),
}


def draw_shapes(count: int, seed: int, size: int) -> ImageSet:
    """Ten classes of shapes, uint8 (count, 3, size, size) sorted by class, each of its own place, size, tilt
    and colour on a mottled ground; many have so little contrast that noise of sigma 0.25 costs accuracy."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    labels = [i * len(SHAPES) // count for i in range(count)]
    pixels = []
    for label, inside in enumerate(SHAPES.values()):
        k = labels.count(label)
        half, tilt = uniform(0.4, 0.75, k, 1, 1), uniform(-0.3, 0.3, k, 1, 1)
        dx, dy = x - uniform(-0.3, 0.3, k, 1, 1), y - uniform(-0.3, 0.3, k, 1, 1)
        u = (dx * tilt.cos() + dy * tilt.sin()) / half
        v = (dy * tilt.cos() - dx * tilt.sin()) / half
        mask = inside(u, v, torch.maximum(u.abs(), v.abs()))[:, None]
        mottle = F.interpolate(uniform(-0.15, 0.15, k, 3, 5, 5), size, mode="bilinear", align_corners=True)
        sign = (uniform(-1, 1, k, 3, 1, 1)).sign()
        image = uniform(0.25, 0.75, k, 3, 1, 1) + mottle + uniform(0.15, 0.45, k, 1, 1, 1) * sign * mask
        pixels.append(image.clamp(0, 1).mul(255).round().to(torch.uint8))
    return ImageSet(labels, list(SHAPES), torch.cat(pixels), size=size)


def evenly_spaced(count: int, total: int) -> list[int]:
    """`count` indices of a set of `total`, evenly spaced from the first."""
    return [i * total // count for i in range(count)]


def augment(images: Tensor) -> Tensor:
    """Flip and shift each image (B, C, H, W) at random, by up to an eighth of its side, zero padded."""
    count, _, height, width = images.shape
    pad = max(1, height // 8)
    top, left = torch.randint(2 * pad + 1, (2, count, 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    image = torch.arange(count)[:, None, None]
    padded = F.pad(images, (pad,) * 4).permute(0, 2, 3, 1)                                  # B, H, W, C
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(classifier: nn.Module, images: ImageSet, indices: list[int], config: Config, steps: int, lr: float,
          weight_decay: float, purpose: str, state_path: Optional[Path] = None) -> None:
    """Gaussian noise augmentation (Cohen et al., section 3.3): cross-entropy of augmented images plus noise.

    Nesterov SGD for `steps` batches; the rate rises over the first fifth and falls along a cosine. Weight
    decay spares steps, biases and BatchNorm. Randomness is seeded anew every epoch: equal arguments train
    equal networks, and with state_path an interrupted call continues from its last epoch.
    """
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}|{purpose}".encode()).digest()[:4], "little")
    groups = [{"params": [p for p in classifier.parameters() if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in classifier.parameters() if p.ndim <= 1]}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    labels, indices, first = torch.tensor(images.labels), torch.tensor(indices), 0
    epoch = len(indices) // config.batch_size
    if state_path is not None and state_path.exists():
        saved = torch.load(state_path, map_location="cpu", weights_only=True)
        classifier.load_state_dict(saved["classifier"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    classifier.train()
    for step in progress(purpose if state_path else "", "batches", first, steps):
        if step % epoch == 0:
            torch.manual_seed(seed + step // epoch)
            batches = indices[torch.randperm(len(indices))].split(config.batch_size)
        for group in optimizer.param_groups:
            falling = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            group["lr"] = lr * min((step + 1) / (0.2 * steps + 1), falling)
        chosen = batches[step % epoch]
        x = augment(images.batch(chosen, config.device))
        noisy = x + config.sigma * torch.randn(x.shape, device=x.device)
        loss = F.cross_entropy(classifier(noisy), labels[chosen].to(x.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        models.keep_steps_positive(classifier)
        if state_path is not None and ((step + 1) % epoch == 0 or step + 1 == steps):
            if not torch.isfinite(loss):
                raise InputError(f"{purpose}: the loss is {loss:g} at step {step + 1}; try another --seed")
            write_whole(state_path, {"classifier": classifier.state_dict(),
                                     "optimizer": optimizer.state_dict(), "step": step + 1})
    classifier.eval()


# ---- search ----

class BitWidthEnvironment:
    """An episode walks the layers; each takes two actions, one for its weights, one for its input (HAQ, 3.2).

    A state (10,) holds, in [0, 1]: index, c_in, c_out, kernel, stride, input map size, number of weights,
    depthwise flag, weight-or-input flag, previous action. First and last layer keep 8 bits, unvisited.
    """

    def __init__(self, table: list[Layer], budget: float, size_budget: Optional[float] = None):
        models.enforce_budget(table, models.uniform_policy(table, models.MIN_BITS), budget, size_budget)
        self.table, self.budget, self.size_budget = table, budget, size_budget
        self.steps = [(layer, kind) for layer in table[1:-1] for kind in (0, 1)]
        rows = [[i // 2, layer.c_in, layer.c_out, layer.kernel, layer.stride, layer.map_size, layer.weights,
                 layer.depthwise, kind] for i, (layer, kind) in enumerate(self.steps)]
        features = torch.tensor(rows, dtype=torch.float32)
        low, high = features.amin(0), features.amax(0)
        self.features = (features - low) / (high - low).clamp_min(1e-9)
        self.state_size = self.features.shape[1] + 1

    @staticmethod
    def bits(action: float) -> int:
        """round(b_min - 1/2 + a (b_max - b_min + 1)): equal shares of [0, 1] for every width."""
        bits = round(models.MIN_BITS - 0.5 + action * (models.MAX_BITS - models.MIN_BITS + 1))
        return min(models.MAX_BITS, max(models.MIN_BITS, bits))

    def rollout(self, act: Callable[[Tensor], float]) -> tuple[Tensor, Tensor, Policy]:
        """One episode: states (T, 10), actions (T, 1) as emitted, and the policy forced under the budget."""
        policy = models.uniform_policy(self.table, models.MIN_BITS)
        states, actions, action = [], [], 1.0
        for features, (layer, kind) in zip(self.features, self.steps):
            states.append(torch.cat([features, torch.tensor([action])]))
            action = act(states[-1])
            actions.append(action)
            policy[layer.name][kind] = self.bits(action)
        policy = models.enforce_budget(self.table, policy, self.budget, self.size_budget)
        return torch.stack(states), torch.tensor(actions)[:, None], policy


def search(environment: BitWidthEnvironment, evaluate: Callable[[Policy], float], base_acr: float,
           episodes: int, seed: int, out: Path) -> dict:
    """Algorithm 1 after the base certificate: the agent's episodes, and the best one's record.

    evaluate(policy) is the ACR of g^P on the search images. Each episode ends with its line in search.jsonl
    and the agent in search_state.pt, where a later call continues.
    """
    warmup = min(20, max(1, episodes // 3))
    agent = DDPG(environment.state_size, seed, DDPGConfig(episodes=episodes, warmup_episodes=warmup))
    log, state_path, records = out / "search.jsonl", out / "search_state.pt", []
    if state_path.exists():
        saved = torch.load(state_path, map_location="cpu", weights_only=True)
        agent.load_state_dict(saved["agent"])
        records = saved["records"]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    start, first = time.monotonic(), len(records)
    for episode in range(first, episodes):
        noise, began = agent.noise, time.monotonic()
        states, actions, policy = environment.rollout(agent.act)
        acr = evaluate(policy)
        reward = (acr - base_acr) / base_acr
        agent.learn(states, actions, reward)
        records.append({"episode": episode, "acr": acr, "reward": reward, "random": episode < warmup,
                        "noise": noise, "bitops_ratio": models.bitops_ratio(environment.table, policy),
                        "size_bytes": models.size_bytes(environment.table, policy),
                        "seconds": round(time.monotonic() - began, 3), "policy": policy})
        with log.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
        write_whole(state_path, {"agent": agent.state_dict(), "records": records})
        best = max(record["acr"] for record in records)
        left = (time.monotonic() - start) / (episode + 1 - first) * (episodes - episode - 1)
        print(f"  episode {episode + 1:>3}/{episodes}  ACR {down(acr)}  reward {reward:+.4f}  "
              f"BitOPs {100 * records[-1]['bitops_ratio']:.3f} %  best ACR {down(best)}  "
              f"{duration(left)} left", flush=True)
    return max(records, key=lambda record: record["acr"])


# ---- the run ----

def base_path(config: Config, images: ImageSet) -> Path:
    """Where a base trained with these options is kept, for every run whose base options are equal."""
    values = json.dumps([images.fingerprint()] + [getattr(config, name) for name in BASE_OPTIONS]).encode()
    return Path("runs/bases") / f"{config.dataset}-{config.arch}-sigma{config.sigma:g}-{digest(values)}.pt"


def build_base(config: Config, num_classes: int, path: Path) -> Classifier:
    """The float base classifier: --checkpoint, one trained earlier at `path`, or a new one to be trained."""
    mean, std = config.mean, config.std
    if config.checkpoint is not None:
        return prepare(models.load_base_checkpoint(config.checkpoint, config.arch, num_classes, mean, std),
                       config)
    small = config.image_size <= 64
    mean = mean or (models.CIFAR10_MEAN if small else models.IMAGENET_MEAN)
    std = std or (models.CIFAR10_STD if small else models.IMAGENET_STD)
    torch.manual_seed(config.seed)
    base = prepare(models.build_classifier(config.arch, num_classes, mean, std), config)
    if path.exists():
        base.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return base


def prepare(classifier: Classifier, config: Config) -> Classifier:
    """On the device, in evaluation mode, in the memory layout that convolutions run fastest in."""
    return classifier.to(config.device, memory_format=torch.channels_last).eval()


def integers(classifier: Classifier, config: Config) -> nn.Module:
    """The network as it is evaluated. On a GPU its sums are checked at the batch that will run."""
    batch = 2 if config.device == "cpu" else config.eval_batch
    return models.integer_network(prepare(classifier, config), batch)


def certify_and_keep(classifier: Classifier, images: Tensor, labels: list[int], ids: list[int],
                     num_classes: int, config: Config, path: Path) -> certify.ReplayCache:
    """FullRobustCertify(f) on the search images, kept image by image for an interrupted run."""
    rows, predictions, key = [], [], NoiseKey(config.seed, "search")
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        rows, predictions = [certify.Certificate(**row) for row in saved["rows"]], saved["predictions"]
    block = max(1, 10_000 // config.search_n)
    for first in progress("certifying", "images", len(rows), len(ids), block):
        part = slice(first, first + block)
        cache = certify.certify_and_cache(classifier, images[part], labels[part], ids[part], num_classes,
                                          config.sigma, config.n0, config.search_n, config.alpha, key,
                                          config.eval_batch)
        rows += cache.certificates
        predictions.append(cache.predictions)
        write_whole(path, {"rows": [vars(row) for row in rows], "predictions": predictions})
    return certify.ReplayCache(rows, torch.cat(predictions), certify.estimate_key(key, config.search_n))


class PolicyEvaluator:
    """ACR of g^P on the search images: widths set on the base's weights, a brief fine-tuning, n_p samples."""

    def __init__(self, classifier: Classifier, cache: certify.ReplayCache, images: Tensor,
                 train_images: ImageSet, train_ids: list[int], config: Config):
        self.classifier, self.cache, self.images = classifier, cache, images
        self.train_images, self.train_ids, self.config = train_images, train_ids, config
        self.base_state = copy.deepcopy(classifier.state_dict())

    def __call__(self, policy: Policy) -> float:
        config = self.config
        self.classifier.load_state_dict(self.base_state)
        models.set_policy(self.classifier, policy)
        train(self.classifier, self.train_images, self.train_ids, config, config.episode_steps, EPISODE_LR,
              FINETUNE_DECAY, "episode")
        what = integers(self.classifier, config), self.cache, self.images, config.n_p
        if config.reward_estimate == "point":
            return float(certify.estimate_radii(*what, config.eval_batch).mean())
        rows = certify.certify_incremental(*what, config.alpha_zeta, config.gamma, config.eval_batch)
        return certify.average_certified_radius(rows)


def certify_images(classifier: Classifier, images: ImageSet, config: Config, path: Path,
                   purpose: str) -> list[certify.Certificate]:
    """The final certificate on test images, one flushed row an image; rows already in the file are kept."""
    indices, key = evenly_spaced(config.images, len(images)), NoiseKey(config.seed, purpose)
    path.touch()
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a last row that was cut off
    done = certify.read_certificates(path) if path.stat().st_size else []
    block = max(1, 4 * config.eval_batch // config.n)
    with path.open("a") as file:
        for first in progress("certifying", "images", len(done), len(indices), block):
            ids = indices[first:first + block]
            labels = [images.labels[i] for i in ids]
            rows = certify.certify(classifier, images.batch(ids, config.device), labels, ids,
                                   len(images.classes), config.sigma, config.n0, config.n, config.alpha, key,
                                   config.eval_batch)
            certify.write_certificates(file, rows)
            done += rows
    return done


class Stages:
    """Seconds of each stage and images that passed through the network, kept over interruptions."""

    def __init__(self, path: Path):
        self.path, self.passes = path, 0
        self.records = json.loads(path.read_text()) if path.exists() else {}

    def watch(self, classifier: nn.Module) -> None:
        def count(module, inputs):
            self.passes += len(inputs[0])
        classifier.register_forward_pre_hook(count)

    def run(self, name: str, work: Callable, *arguments):
        print(f"{name} ...", flush=True)
        start, passes = time.monotonic(), self.passes
        try:
            return work(*arguments)
        finally:
            record = self.records.setdefault(name, {"seconds": 0.0, "forward_passes": 0})
            record["seconds"] = round(record["seconds"] + time.monotonic() - start, 2)
            record["forward_passes"] += self.passes - passes
            write_whole(self.path, self.records)


def print_expected_times(base: Classifier, images: ImageSet, ids: list[int], config: Config,
                         trained: bool) -> None:
    """What each stage should take, from a few batches through a copy of the base and a quantized one."""
    simulated, plain = copy.deepcopy(base), copy.deepcopy(base)
    table = models.quantize_model(simulated, config.image_size)
    models.set_policy(simulated, models.uniform_policy(table, 4))
    quantized, x = integers(simulated, config), images.batch(ids[:1], config.device)

    def seconds(count: int, work: Callable, *arguments) -> float:
        """An image's time in a call that takes `count` of them; a first call pays for warming up."""
        for _ in range(2):
            start = time.monotonic()
            work(*arguments)
            x.cpu()  # waits for the device
        return (time.monotonic() - start) / count

    count, key = 3 * config.eval_batch, NoiseKey(0, "timing")
    sample = x, [0], count, len(images.classes), config.sigma, key, config.eval_batch
    batches = images, ids[:config.batch_size], config, 2, 0.0, 0.0, "timing"
    float_pass, int_pass = (seconds(count, certify.class_counts, net, *sample) for net in (base, quantized))
    base_step, step = (seconds(2 * config.batch_size, train, net, *batches) for net in (plain, simulated))
    final = config.images * (config.n0 + config.n)
    episode = config.episode_steps * config.batch_size * step + config.search_images * config.n_p * int_pass
    stages = {"train the base": 0 if trained else config.epochs * len(ids) * base_step,
              "certify the base": (config.search_images * config.search_n + final) * float_pass,
              f"search, {config.episodes} episodes": config.episodes * episode,
              "fine-tune": config.finetune_epochs * len(ids) * step, "certify ARQ": final * int_pass}
    print(f"expected on {config.device}, from {1 / float_pass:.0f} float and {1 / int_pass:.0f} quantized "
          f"images/s ({quantized.path}), {1 / step:.0f} in training")
    for name, needed in {**stages, "together": sum(stages.values())}.items():
        print(f"  {name:<34}{duration(needed):>8}", flush=True)


def open_run(config: Config, *image_sets: ImageSet) -> Path:
    """The run folder, new or of a run with the same options, images and networks. Raises InputError."""
    out, path = Path(config.out), Path(config.out) / "config.json"
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in PLACE_OPTIONS}
    files = [Path(name) for name in (config.checkpoint, config.evaluate) if name is not None]
    options["fingerprint"] = [images.fingerprint() for images in image_sets]
    options["fingerprint"] += [digest(file.read_bytes()) for file in files]
    if path.exists():
        try:
            old = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise InputError(f"{path} is not the configuration of a run; give another --out") from None
        differ = [f"{flag(name)} {old.get(name)} there, {value} here" for name, value in options.items()
                  if old.get(name) != value and name != "fingerprint"]
        if old.get("fingerprint") != options["fingerprint"]:
            differ.append("the images or the network file have changed")
        if differ:
            raise InputError(f"--out {out} holds another run: {'; '.join(differ[:4])}; give another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is not empty and holds no run of this program; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, options)
    return out


def run(config: Config) -> dict:
    """The whole method: base, its certificate, search, fine-tuning, the final certificates, results."""
    train_images, test_images = load_images(config)
    num_classes = len(train_images.classes)
    search_ids = evenly_spaced(config.search_images, len(train_images))
    train_ids = sorted(set(range(len(train_images))) - set(search_ids))
    path = base_path(config, train_images)
    trained = config.checkpoint is not None or path.exists()
    base = build_base(config, num_classes, path)
    table = models.quantize_model(copy.deepcopy(base), config.image_size)
    environment = BitWidthEnvironment(table, config.budget, config.size_budget)
    out = open_run(config, train_images, test_images)
    if (out / "results.json").exists():
        print(f"{out} is finished; its results:")
        results, policy = (json.loads((out / name).read_text()) for name in ("results.json", "policy.json"))
        print_report(results, policy, config, out)
        return results
    print(f"{config.dataset}: {len(train_ids)} training, {len(search_ids)} search and {config.images} test "
          f"images, {num_classes} classes; {config.arch}, sigma {config.sigma:g}; run folder {out}")
    print_expected_times(base, train_images, train_ids, config, trained)
    stages = Stages(out / "stages.json")
    stages.watch(base)
    if not trained:
        path.parent.mkdir(parents=True, exist_ok=True)
        state_path, steps = path.with_suffix(".state"), config.epochs * (len(train_ids) // config.batch_size)
        stages.run("train the base", train, base, train_images, train_ids, config, steps, BASE_LR, BASE_DECAY,
                   "base", state_path)
        write_whole(path, base.state_dict())
        state_path.unlink(missing_ok=True)
    elif config.checkpoint is None:
        print(f"base classifier: {path}, trained earlier")

    # Algorithm 1: certify f on the search images, then search.
    classifier = copy.deepcopy(base)  # with the hook that counts passes
    models.quantize_model(classifier, config.image_size)
    search_images = train_images.batch(search_ids, config.device)
    calibrate(classifier, search_images, config)
    labels = [train_images.labels[i] for i in search_ids]
    cache = stages.run("certify the base, search images", certify_and_keep, classifier, search_images, labels,
                       search_ids, num_classes, config, out / "search_cache.pt")
    base_acr = certify.average_certified_radius(cache.certificates)
    print(f"  ACR of the base on the search images: {down(base_acr)}")
    if base_acr == 0:
        raise InputError("the base certifies none of the search images; give one trained with noise "
                         "(--checkpoint), more --epochs or a lower --sigma")
    evaluate = PolicyEvaluator(classifier, cache, search_images, train_images, train_ids, config)
    best = stages.run("search", search, environment, evaluate, base_acr, config.episodes, config.seed, out)
    policy = best["policy"]
    write_whole(out / "policy.json", policy)
    if not (out / "model.arq").exists():
        classifier.load_state_dict(evaluate.base_state)
        models.set_policy(classifier, policy)
        steps = int(config.finetune_epochs * (len(train_ids) // config.batch_size))
        stages.run("fine-tune", train, classifier, train_images, train_ids, config, steps, FINETUNE_LR,
                   FINETUNE_DECAY, "fine-tune", out / "finetune_state.pt")
        description = {name: getattr(config, name) for name in SAVED_OPTIONS}
        description["classes"] = train_images.classes
        write_whole(out / "model.arq", models.pack_model(classifier, table, description))
        (out / "finetune_state.pt").unlink(missing_ok=True)

    # Test images are first seen here. What is certified is what was saved.
    base_rows = stages.run("certify the base, test images", certify_images, base, test_images, config,
                           out / "base_certificates.tsv", "base certificate")
    classifier = integers(models.load_model(out / "model.arq")[0], config)
    stages.watch(classifier)
    rows = stages.run("certify ARQ, test images", certify_images, classifier, test_images, config,
                      out / "certificates.tsv", "certificate")
    results = summarize(rows, classifier, table, policy, config, best["acr"], out / "model.arq")
    wide = models.uniform_policy(table, models.FLOAT_BITS, models.FLOAT_BITS)
    results["base"] = summarize(base_rows, base, table, wide, config, base_acr)
    results["acr_difference"] = dict(zip(("mean", "standard_error"), certify.acr_difference(rows, base_rows)))
    write_whole(out / "results.json", {**results, "stages": stages.records})
    print_report(results, policy, config, out)
    return results


def calibrate(classifier: Classifier, images: Tensor, config: Config) -> None:
    """Activation steps and signs from up to 256 noisy images, spread over the given ones."""
    images = images[evenly_spaced(min(256, len(images)), len(images))]
    generator = torch.Generator(config.device).manual_seed(config.seed)
    noise = torch.randn(images.shape, generator=generator, device=config.device)
    models.calibrate(classifier, (images + config.sigma * noise).split(config.eval_batch))


def evaluate_saved(config: Config) -> dict:
    """--evaluate: certify a saved network, quantized (model.arq) or a float checkpoint, on test images."""
    test_images = load_split(config, False)
    classes, file = test_images.classes, None
    if models.read_packed(config.evaluate):
        classifier, table, saved = models.load_model(config.evaluate)
        policy, file = saved["policy"], Path(config.evaluate)
        if saved["classes"] != classes:
            raise InputError(f"--evaluate {config.evaluate} is for classes {saved['classes'][:3]} ..., these "
                             f"images have {classes[:3]} ...; give its --data")
    else:
        classifier = build_base(dataclasses.replace(config, checkpoint=config.evaluate), len(classes), None)
        table = models.quantize_model(classifier, config.image_size)
        policy = models.uniform_policy(table, models.FLOAT_BITS, models.FLOAT_BITS)
    out, classifier = open_run(config, test_images), integers(classifier, config)
    stages = Stages(out / "stages.json")
    stages.watch(classifier)
    rows = stages.run("certify", certify_images, classifier, test_images, config, out / "certificates.tsv",
                      "certificate")
    results = summarize(rows, classifier, table, policy, config, None, file)
    write_whole(out / "results.json", {**results, "stages": stages.records})
    print_report(results, policy, config, out)
    return results


def summarize(rows, classifier: nn.Module, table: list[Layer], policy: Policy, config: Config,
              search_acr: Optional[float], file: Optional[Path] = None) -> dict:
    """What results.json says of one network, with what its certificates rest on; one-sided unless named."""
    both_sides = certify.two_sided(rows)
    return {"acr": certify.average_certified_radius(rows), "accuracy": certify.certified_accuracy(rows, 0),
            "acr_standard_error": certify.acr_difference(rows)[1],
            "certified_accuracy": {str(radius): certify.certified_accuracy(rows, radius) for radius in RADII},
            "abstained": sum(row.predict == certify.ABSTAIN for row in rows) / len(rows),
            "two_sided": {"acr": certify.average_certified_radius(both_sides),
                          "accuracy": certify.certified_accuracy(both_sides, 0)},
            "bitops_ratio": models.bitops_ratio(table, policy),
            "size_bytes": models.size_bytes(table, policy),
            "file_bytes": file.stat().st_size if file else None, "path": getattr(classifier, "path", "float"),
            "search_acr": search_acr, "images": len(rows), "network": network_hash(classifier, policy),
            "sigma": config.sigma, "n0": config.n0, "n": config.n, "alpha": config.alpha,
            "expected_false_certificates": config.alpha * len(rows),
            "device": config.device, "torch": torch.__version__, "threads": torch.get_num_threads()}


def network_hash(classifier: Classifier, policy: Policy) -> str:
    """Names the network that certificates belong to: a hash of its policy and all tensors of its state."""
    state = [(name, torch.as_tensor(value)) for name, value in sorted(classifier.state_dict().items())]
    return digest(json.dumps([policy, [name for name, _ in state]]).encode(),
                  *(value.cpu().contiguous().numpy().tobytes() for _, value in state))


def down(value: Optional[float]) -> str:
    """Four decimals, rounded towards zero: a printed radius never exceeds the certified one."""
    return "-" if value is None else f"{math.floor(value * 1e4) / 1e4:.4f}"


def print_report(results: dict, policy: Policy, config: Config, out: Path) -> None:
    """Float base and ARQ side by side, and the policy, one line a layer."""
    columns = {"float base": results["base"], "ARQ": results} if "base" in results else {"network": results}
    print(f"\n{config.dataset}, {config.arch}, sigma {config.sigma:g}: {results['images']} test images, "
          f"n0 = {config.n0}, n = {config.n}; radii one-sided unless named otherwise; alpha = "
          f"{config.alpha:g} an image, so {results['expected_false_certificates']:g} false certificates are "
          f"expected at most\n")
    rows = {"accuracy (certified, radius 0)": lambda r: down(r["accuracy"]),
            **{f"certified accuracy at {key}": lambda r, key=str(key): down(r["certified_accuracy"][key])
               for key in RADII},
            "average certified radius (ACR)": lambda r: down(r["acr"]),
            "  standard error over images": lambda r: f"{r['acr_standard_error']:.4f}",
            "ACR of two-sided radii": lambda r: down(r["two_sided"]["acr"]),
            "ACR on the search images": lambda r: down(r["search_acr"]),
            "abstained": lambda r: f"{r['abstained']:.4f}",
            "BitOPs, % of float": lambda r: f"{100 * r['bitops_ratio']:.4f}",
            "weights, bytes (their bits)": lambda r: f"{r['size_bytes']:,}",
            "file, bytes": lambda r: f"{r['file_bytes']:,}" if r["file_bytes"] else "-",
            "arithmetic": lambda r: r["path"]}
    print(f"{'':<34}" + "".join(f"{name:>14}" for name in columns))
    for label, text in rows.items():
        print(f"{label:<34}" + "".join(f"{text(column):>14}" for column in columns.values()))
    if "acr_difference" in results:
        mean, error = results["acr_difference"].values()
        print(f"ACR less the base's, on the same images: {mean:+.4f}, standard error {error:.4f}")
    print(f"\n{'layer':<26}{'weights':>9}{'input':>9}   (bits)")
    for name, (w_bits, a_bits) in policy.items():
        print(f"{name:<26}{w_bits:>9}{a_bits:>9}")
    print(f"\nwritten to {out}/", flush=True)


def keep_memory() -> None:
    """Ask glibc not to hand every tensor's memory back: faulting it in again is a fifth of an evaluation."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 30)      # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError, TypeError):  # another C library
        pass


def main(argv=None) -> int:
    keep_memory()
    try:
        config = parse_config(argv)
        evaluate_saved(config) if config.evaluate else run(config)
        return 0
    except KeyboardInterrupt:
        print("\narq.py: interrupted; the same command continues the run", file=sys.stderr)
        return 130
    except ValueError as error:  # ours, and the modules' own refusals of files and policies
        message = error
    except OSError as error:  # no permission, no space: whatever was finished is on disk
        message = (f"{error.filename or config.out}: {error.strerror or error}; once this is repaired, the "
                   f"same command continues the run")
    print(f"arq.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
