"""Which networks can be quantized, and do their integers compute what training simulates?

    python benchmarks/networks.py  # five minutes, two cores

Networks of torchvision and two pre-activation ones get 4 bits (first and last layer 8) and run
16 random images as simulation and in integers. Differences are those of the logits, over their
spread over images: above 1e-3 a value met a rounding boundary, which random weights multiply
from layer to layer. Prints a table and writes results/networks.json.
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import arq
import models

RESULTS = Path(__file__).resolve().parents[1] / "results" / "networks.json"
TORCHVISION = (
    "vgg11_bn squeezenet1_1 shufflenet_v2_x0_5 regnet_y_400mf regnet_x_400mf densenet121 "
    "efficientnet_b0 efficientnet_v2_s mobilenet_v3_small mnasnet0_5 resnext50_32x4d "
    "wide_resnet50_2 alexnet googlenet inception_v3 convnext_tiny vit_b_16 swin_t maxvit_t "
    "resnet18 mobilenet_v2"
).split()
IMAGE_SIZES = {"inception_v3": 96, "maxvit_t": 224, "vit_b_16": 224}  # the least; others: 64


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two convolutions (He et al., ECCV 2016)."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        changes = stride > 1 or c_in != c_out
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if changes else None

    def forward(self, x):
        out = F.relu(self.norm1(x))
        x = self.shortcut(out) if self.shortcut else x
        return x + self.conv2(F.relu(self.norm2(self.conv1(out))))


def pre_activation(first: int, widths: list[int], blocks: int) -> nn.Module:
    """A network of such blocks for images of 32 pixels; stages but the first halve the map."""
    layers, c_in = [nn.Conv2d(3, first, 3, 1, 1, bias=False)], first
    for width in widths:
        for i in range(blocks):
            stride = 2 if i == 0 and width != widths[0] else 1
            layers.append(PreActivationBlock(c_in, width, stride))
            c_in = width
    layers += [nn.BatchNorm2d(c_in), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(c_in, 10))


PRE_ACTIVATION = {
    "wide_resnet28_2": (16, [32, 64, 128], 4),
    "preact_resnet18": (64, [64, 128, 256, 512], 2),
}


def build(name: str) -> tuple[nn.Module, int]:
    """The network, of random weights, and the size of its images."""
    if name in PRE_ACTIVATION:
        return pre_activation(*PRE_ACTIVATION[name]), 32
    auxiliary = name in ("googlenet", "inception_v3")
    options = {"aux_logits": False, "init_weights": True} if auxiliary else {}
    network = torchvision.models.get_model(name, weights=None, **options)
    return network, IMAGE_SIZES.get(name, 64)


@torch.no_grad()
def compare_arithmetic(name: str) -> dict:
    """A row of the table: what came of one network."""
    torch.manual_seed(0)
    network, size = build(name)
    network = models.Classifier(network, *models.IMAGENET).eval()
    x = torch.rand(16, 3, size, size)
    row = {"network": name, "image_size": size}
    try:
        table = models.quantize_model(network, size)
        models.calibrate(network, [x])
        models.set_policy(network, models.uniform_policy(table, 4))
        integers = models.integer_network(network)
        difference = compare(network(x), integers(x))
        row |= {"layers": len(table), "macs": sum(layer.macs for layer in table)}
        row |= {"backend": integers.backend, "largest": f"{difference.max():.1e}"}
        row |= {"median": f"{difference.median():.1e}"}
    except (ValueError, RuntimeError) as error:
        row["refused"] = str(error)
    return row


def compare(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Largest difference of each image's logits (B, classes), over their spread over images."""
    return (logits - others).abs().amax(1) / logits.std(0).mean().clamp(min=1e-9)


def main(argv=None) -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(argv)
    warnings.filterwarnings("ignore")
    rows = []
    print("network, image size, layers, MACs, backend, largest and median difference")
    for name in [*TORCHVISION, *PRE_ACTIVATION]:
        rows.append(compare_arithmetic(name))
        print(*rows[-1].values(), flush=True)
    arq.write_whole(RESULTS, {"random weights": rows})


if __name__ == "__main__":
    main()
