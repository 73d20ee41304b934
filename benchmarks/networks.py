"""Which networks can be quantized: torchvision's and two pre-activation ones, at 4 bits, in integers.

    python benchmarks/networks.py                    # all: minutes; writes results/networks.json and .txt
    python benchmarks/networks.py --only resnet18 vit_b_16
    python benchmarks/networks.py --model MODEL.arq --data DIR  # a trained one: writes results/backends.json

Weights are random. Each network is quantized (first and last layer at 8 bits), calibrated on 16 random images
and run on them as its simulation and in integers. Differences are those of the logits, over their spread over
the images. A large one starts at a named layer: so many of its input's integers differ there, and the nearest
one was so far from a rounding boundary, in steps.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import arq  # noqa: E402
import models  # noqa: E402

TORCHVISION = (
    "vgg11_bn squeezenet1_1 shufflenet_v2_x0_5 regnet_y_400mf regnet_x_400mf densenet121 efficientnet_b0 "
    "efficientnet_v2_s mobilenet_v3_small mnasnet0_5 resnext50_32x4d wide_resnet50_2 alexnet googlenet "
    "inception_v3 convnext_tiny vit_b_16 swin_t maxvit_t resnet18 mobilenet_v2"
).split()
SIZES = {"inception_v3": 96, "maxvit_t": 224, "vit_b_16": 224}  # the smallest that they take; others: 64


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two convolutions (He et al. 2016, identity mappings)."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        other = stride > 1 or c_in != c_out
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if other else None

    def forward(self, x):
        out = F.relu(self.norm1(x))
        x = self.shortcut(out) if self.shortcut else x
        return x + self.conv2(F.relu(self.norm2(self.conv1(out))))


def pre_activation(widths, blocks, first) -> nn.Module:
    """A network of such blocks; every stage but the first halves the map."""
    layers, c_in = [nn.Conv2d(3, first, 3, 1, 1, bias=False)], first
    for stage, width in enumerate(widths):
        for i in range(blocks):
            layers.append(PreActivationBlock(c_in, width, 2 if stage and not i else 1))
            c_in = width
    end = nn.BatchNorm2d(c_in), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, 10)
    return nn.Sequential(*layers, *end)


OTHERS = {
    "wide_resnet28_2": lambda: pre_activation([32, 64, 128], 4, 16),
    "preact_resnet18": lambda: pre_activation([64, 128, 256, 512], 2, 64),
}


def build(name: str) -> nn.Module:
    if name in OTHERS:
        return OTHERS[name]()
    options = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    options |= {"init_weights": True} if options else {}
    return torchvision.models.get_model(name, weights=None, **options)


@torch.no_grad()
def start_of_difference(network: nn.Module, x: torch.Tensor) -> dict:
    """The first layer whose input's integers differ between the simulation and float32 sums."""
    seen = {}

    def note(layer, inputs, name):
        step = layer.input_quantizer.step if hasattr(layer, "input_quantizer") else layer.a_step
        bits, signed = layer.a_bits, getattr(layer, "signed", None)
        signed = bool(layer.input_quantizer.signed) if signed is None else signed
        integers = models.quantize(inputs[0], step, *models.integer_range(bits, signed))
        seen.setdefault(name, []).append((integers, inputs[0] / step))

    for some in (network, models.integer_network(network, backends=("float32",))):
        for name, layer in models.quant_layers(some).items():
            layer.register_forward_pre_hook(lambda layer, inputs, name=name: note(layer, inputs, name))
        some(x)
    for name, ((simulated, exact), (found, _)) in seen.items():
        differ = simulated != found
        if differ.any():
            nearest = float((exact - exact.floor() - 0.5).abs()[differ].min())
            count = f"{int(differ.sum())} of {differ.numel():,}"
            return {"layer": name, "integers": count, "from a boundary": nearest}
    return {}


@torch.no_grad()
def tried(name: str) -> dict:
    """A row of the table: what came of one network."""
    torch.manual_seed(0)
    size, start = SIZES.get(name, 32 if name in OTHERS else 64), time.monotonic()
    network = models.Classifier(build(name), *models.IMAGENET).eval()
    x = torch.rand(16, 3, size, size)
    row = {"network": name, "image_size": size}
    try:
        table = models.quantize_model(network, size)
        row |= {"layers": len(table), "macs": sum(layer.macs for layer in table)}
        models.calibrate(network, [x])
        models.set_policy(network, models.uniform_policy(table, 4))
        simulated, integers = network(x), models.integer_network(network)
        found = integers(x)
        spread = float(simulated.std(0).mean()) or 1.0
        difference = (found - simulated).abs().amax(1) / spread
        row |= {"backend": integers.backend, "largest": float(difference.max())}
        row |= {"median": float(difference.median())}
        if row["largest"] > 0.01:
            row["starts"] = start_of_difference(network, x)
    except (ValueError, RuntimeError) as error:
        row["refused"] = str(error)
    row["seconds"] = round(time.monotonic() - start, 1)
    return row


@torch.no_grad()
def trained(file: Path, data: str, count: int = 2500) -> dict:
    """How many noisy test images a packed network sees differently on int8 and on float32."""
    network, _, saved = models.load_model(file)
    options = f"--dataset {saved['dataset']} --data {data} --images {count}".split()
    images = arq.load_images(arq.parse_config(options), train=False)
    x = images.batch(arq.evenly_spaced(count, len(images)))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    x += saved["sigma"] * noise
    integers = models.integer_network(network)
    plain, found = network(x), integers(x)
    differ = {
        "logits": int((plain != found).any(1).sum()),
        "class": int((plain.argmax(1) != found.argmax(1)).sum()),
    }
    return {"images": count, "backend": integers.backend, "images that differ": differ}


def report(rows: list[dict]) -> str:
    lines = [
        f"{'network':<20}{'size':>5}{'layers':>8}{'MACs':>16}  {'backend':<14}largest and median difference"
    ]
    for row in rows:
        lines.append(f"{row['network']:<20}{row['image_size']:>5}")
        if "refused" in row:
            lines[-1] += f"  refused: {row['refused']}"
        else:
            cells = f"{row['layers']:>8}{row['macs']:>16,}  {row['backend']:<14}"
            lines[-1] += f"{cells}{row['largest']:.4f} {row['median']:.4f}"
        if row.get("starts"):
            lines[-1] += "  {layer}: {integers} integers, {from a boundary:.1e} away".format(**row["starts"])
    return "\n".join(lines) + "\n"


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--only", nargs="+", choices=[*TORCHVISION, *OTHERS], default=[*TORCHVISION, *OTHERS])
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", default="data")
    options = parser.parse_args(argv)
    if options.model:
        found = trained(options.model, options.data)
        arq.write_whole(options.out / "backends.json", found)
        print(json.dumps(found))
        return
    warnings.filterwarnings("ignore")
    rows = []
    for name in options.only:
        rows.append(tried(name))
        print(report(rows[-1:]).split("\n")[1], flush=True)
    arq.write_whole(options.out / "networks.json", rows)
    (options.out / "networks.txt").write_text(report(rows))
    print(json.dumps({"quantized": sum("refused" not in row for row in rows), "of": len(rows)}))


if __name__ == "__main__":
    main()
