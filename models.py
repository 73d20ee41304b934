"""Networks, the quantizer, and what a bit-width policy costs.

A policy is plain data, {layer name: [w_bits, a_bits]}, as in policy.json.

    table = quantize_model(classifier, image_size)       # every layer becomes a QuantLayer, in place
    calibrate(classifier, batches)                       # step sizes for every bit-width
    set_policy(classifier, uniform_policy(table, 4))     # bit-widths change at any time
    ...                                                  # train: QuantLayer simulates the bits
    network = integer_network(classifier)                # what is evaluated and certified
    data = pack_model(classifier, table, description)    # the same integers as a file

    paper       here                 meaning                                            shape
    b_w, b_a    w_bits, a_bits       bit-widths of a layer's weights and of its input   2..8, or both 32 (float)
    s           step                 learned step size                                  (c_out,) or ()
    q           integers(v)          round(v / s), clipped to [q_min, q_max]            as v
    MACs[l]     Layer.macs           multiply-accumulates of a layer per image
    BitOPs(P)   bitops               sum over layers of MACs * w_bits * a_bits
    size(P)     size_bytes           sum over layers of weights * w_bits, in bytes

Sources: LSQ (Esser et al., ICLR 2020), learned steps; He et al. (2016), section 4.2, CIFAR ResNets.
"""

import copy
import functools
import hashlib
import json
import math
import operator
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

MIN_BITS, MAX_BITS, FLOAT_BITS = 2, 8, 32
FIRST_LAST_BITS = 8  # the first and the last layer keep them in every policy
Policy = dict[str, list[int]]


# ---- networks ----

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PaddedShortcut(nn.Module):
    """Option A: every second pixel, and channels of zeros on both sides, instead of a 1x1 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        added = x.shape[1] // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, added, added))


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for small images: three stages of n blocks with 16, 32 and 64 channels."""

    def __init__(self, depth: int, num_classes: int, option_a: bool = False):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[BasicBlock(16, 16) for _ in range(blocks)])
        self.layer2 = self._stage(16, 32, blocks, option_a)
        self.layer3 = self._stage(32, 64, blocks, option_a)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(c_in: int, c_out: int, blocks: int, option_a: bool) -> nn.Sequential:
        """Blocks of which the first halves the image."""
        shortcut = PaddedShortcut()
        if not option_a:
            shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, 2, bias=False), nn.BatchNorm2d(c_out))
        first = BasicBlock(c_in, c_out, 2, shortcut)
        return nn.Sequential(first, *[BasicBlock(c_out, c_out) for _ in range(blocks - 1)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return self.fc(x.mean((2, 3)))


class Classifier(nn.Module):
    """Images in [0, 1], noisy or not, to logits: normalisation, then the network `net`."""

    def __init__(self, net: nn.Module, mean=CIFAR10_MEAN, std=CIFAR10_STD):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)


# Another network is another line: a constructor that takes num_classes.
NETWORKS = {
    "resnet8": functools.partial(CifarResNet, 8),
    "resnet20": functools.partial(CifarResNet, 20),
    "resnet32": functools.partial(CifarResNet, 32),
    "resnet44": functools.partial(CifarResNet, 44),
    "resnet56": functools.partial(CifarResNet, 56),
    "resnet110": functools.partial(CifarResNet, 110),
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
}


def is_cifar_resnet(arch: str) -> bool:
    return isinstance(NETWORKS[arch], functools.partial)


def build_classifier(arch: str, num_classes: int, mean=None, std=None, option_a: bool = False) -> Classifier:
    """A float Classifier by name, normalised as is usual for it unless mean and std are given."""
    if arch not in NETWORKS:
        raise ValueError(f"unknown network {arch!r}; there are {', '.join(NETWORKS)}")
    if is_cifar_resnet(arch):
        net = NETWORKS[arch](num_classes=num_classes, option_a=option_a)
        return Classifier(net, mean or CIFAR10_MEAN, std or CIFAR10_STD)
    net = NETWORKS[arch](num_classes=num_classes)
    return Classifier(net, mean or IMAGENET_MEAN, std or IMAGENET_STD)


def load_pretrained(classifier: Classifier, arch: str) -> None:
    """torchvision's weights, downloaded; if the classes differ, all but the last layer. Raises ValueError."""
    weights = torchvision.models.get_model_weights(arch).DEFAULT
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network; a download that was cut
        place = f"{torch.hub.get_dir()}/checkpoints"
        message = f"{weights.url} could not be downloaded ({error}); put that file into {place}"
        raise ValueError(message) from None
    own = classifier.net.state_dict()
    own.update({name: value for name, value in state.items() if value.shape == own[name].shape})
    classifier.net.load_state_dict(own)


def load_base_checkpoint(path, arch: str, num_classes: int, mean=None, std=None) -> Classifier:
    """A float Classifier from a file in a layout in public use; mean and std override what that implies.

    Taken: a bare state dict; {"state_dict": ...} with prefixes `module.` and `1.` (behind a normalise
    layer) in any order; bases trained by arq.py; CIFAR ResNets with shortcuts named `shortcut`, or none
    (option A), whose last layer is `linear`, trained with ImageNet's normalisation. Raises ValueError
    for others, saying why.
    """
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for files that are no checkpoints
        reason = str(error).splitlines()[0][:60]
        raise ValueError(
            f"{path}: not a PyTorch checkpoint of tensors and plain values; save its state_dict alone ({reason})"
        ) from None
    state = raw.get("state_dict", raw) if isinstance(raw, dict) else {}
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if "mean" in state and "std" in state:  # a base that arq.py trained
        mean = mean or state.pop("mean").flatten().tolist()
        std = std or state.pop("std").flatten().tolist()
        state = {key: value for key, value in state.items() if key not in ("mean", "std")}
    for prefix in ("module.", "1.", "module.", "net."):
        # `0.` holds the numbers of a normalise layer in front.
        if state and all(key.startswith((prefix, "0.")) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key[:2] != "0."}
    option_a = is_cifar_resnet(arch) and not any(
        ".shortcut." in key or ".downsample." in key for key in state
    )
    if option_a and "linear.weight" in state:
        mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
    names = {key: key.replace("linear.", "fc.").replace(".shortcut.", ".downsample.") for key in state}
    state = {names[key]: value for key, value in state.items()}
    classifier = build_classifier(arch, num_classes, mean, std, option_a)
    try:
        classifier.net.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:80]
        raise ValueError(
            f"{path} does not hold a {arch} with {num_classes} classes; "
            f"give the --arch it was trained with ({reason})"
        ) from None
    return classifier


# ---- quantizer ----


def integer_range(bits: int, signed: bool, symmetric: bool = False) -> tuple[int, int]:
    """[q_min, q_max]: 0..2^b - 1 unsigned, -2^(b-1)..2^(b-1) - 1 signed, without the lowest if symmetric."""
    if not signed:
        return 0, 2**bits - 1
    q_max = 2 ** (bits - 1) - 1
    return (-q_max if symmetric else -q_max - 1), q_max


def quantize(v: Tensor, step: Tensor, q_min: int, q_max: int) -> Tensor:
    """Integers (as floats) round(v / step), clipped to [q_min, q_max]."""
    return (v / step).round_().clamp_(q_min, q_max)


class FakeQuantize(torch.autograd.Function):
    """step * round(clip(v / step)) with LSQ's gradients (Esser et al., section 2.1).

    For v: 1 inside the clip range, else 0. For the step: q - v/step inside and q outside, times
    1 / sqrt(N Q), with N elements per step (of one sample, for an input) and Q = q_max.
    """

    @staticmethod
    def forward(ctx, v, step, q_min, q_max, elements):
        scaled = v / step
        ctx.save_for_backward(scaled, step)
        ctx.range = q_min, q_max
        ctx.gradient_scale = 1 / math.sqrt(elements * max(q_max, 1))
        return torch.round(scaled).clamp_(q_min, q_max).mul_(step)

    @staticmethod
    def backward(ctx, grad):
        scaled, step = ctx.saved_tensors
        q_min, q_max = ctx.range
        q = torch.round(scaled).clamp_(q_min, q_max)
        inside = (scaled >= q_min) & (scaled <= q_max)
        grad_v = grad * inside
        grad_step = torch.addcmul(grad * q, grad_v, scaled, value=-1).sum_to_size(step.shape)
        return grad_v, grad_step * ctx.gradient_scale, None, None, None


@torch.no_grad()
def best_step(v: Tensor, q_min: int, q_max: int) -> Tensor:
    """Step with the least squared quantization error for each row of v (rows, elements): (rows,)."""
    largest = v.abs().amax(1, keepdim=True).clamp_min(1e-8)
    steps = [fraction * largest / q_max for fraction in torch.linspace(0.15, 1.0, 32).tolist()]
    errors = []
    for step in steps:
        error = quantize(v, step, q_min, q_max) * step - v
        errors.append(error.square_().sum(1, keepdim=True))
    best = torch.cat(errors, 1).argmin(1, keepdim=True)
    return torch.cat(steps, 1).gather(1, best).squeeze(1)


class LSQ(nn.Module):
    """The quantizer of one operand: learned step sizes, simulated bits in training.

    channels: of a weight, which has one step per output channel and a symmetric range; None for an
    input, which has one step. Another quantizer is a subclass with its own `initial_step` and
    `forward`, handed to `quantize_model`.
    """

    def __init__(self, channels: int | None = None):
        super().__init__()
        shape = () if channels is None else (channels,)
        self.step = nn.Parameter(torch.ones(shape))
        self.register_buffer("initial_steps", torch.zeros(MAX_BITS + 1, *shape))  # by bit-width
        self.symmetric = channels is not None
        self.signed = channels is not None  # of an input: found by `calibrate`
        self.bits = FLOAT_BITS

    initial_step = staticmethod(best_step)  # (v (rows, elements), q_min, q_max) -> (rows,)

    @torch.no_grad()
    def observe(self, v: Tensor) -> None:
        """Find the initial step for every bit-width from values v (rows, elements), one row per step."""
        for bits in range(MIN_BITS, MAX_BITS + 1):
            step = self.initial_step(v, *integer_range(bits, self.signed, self.symmetric))
            self.initial_steps[bits] = step.view(self.step.shape)

    def set_bits(self, bits: int) -> None:
        """Change the bit-width, and start at its initial step. Raises ValueError before `calibrate`."""
        self.bits = bits
        if bits == FLOAT_BITS:
            return
        if not self.initial_steps[bits].all():
            raise ValueError("no step sizes yet: call calibrate(classifier, batches) before set_policy")
        self.q_min, self.q_max = integer_range(bits, self.signed, self.symmetric)
        self.step.data.copy_(self.initial_steps[bits])

    def forward(self, v: Tensor) -> Tensor:
        """v (channels or B, ...) as its integers say, with gradients for v and the step."""
        if self.bits == FLOAT_BITS:
            return v
        return FakeQuantize.apply(v.float(), self.step_for(v), self.q_min, self.q_max, v[0].numel())

    def integers(self, v: Tensor) -> Tensor:
        """The integers behind `forward`, as floats."""
        return quantize(v, self.step_for(v), self.q_min, self.q_max)

    def step_for(self, v: Tensor) -> Tensor:
        """The step, shaped to divide v."""
        return self.step.view(-1, *[1] * (v.ndim - 1)) if self.symmetric else self.step

    def get_extra_state(self) -> bool:  # carries `signed` in the state dict
        return self.signed

    def set_extra_state(self, signed: bool) -> None:
        self.signed = signed


class QuantLayer(nn.Module):
    """A convolution or linear layer with its BatchNorm; quantizes its own weights and its own input.

    At 32 bits it is the float layer. At fewer it simulates them, with BatchNorm in float; `freeze`
    gives the integers.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module, in_shape: tuple, quantizer=LSQ):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.norm = norm
        self.in_shape = (*in_shape, 1, 1)[:3]
        self.conv = None  # a linear layer
        if isinstance(layer, nn.Conv2d):
            names = "stride", "padding", "dilation", "groups"
            self.conv = {name: getattr(layer, name) for name in names}
        self.weight_quantizer = quantizer(len(layer.weight))
        self.input_quantizer = quantizer()

    w_bits = property(lambda self: self.weight_quantizer.bits)
    a_bits = property(lambda self: self.input_quantizer.bits)

    def set_bits(self, w_bits: int, a_bits: int) -> None:
        """Change the bit-widths; step sizes start anew."""
        self.weight_quantizer.set_bits(w_bits)
        self.input_quantizer.set_bits(a_bits)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight_quantizer(self.weight)
        a = self.input_quantizer(x)
        out = F.linear(a, w, self.bias) if self.conv is None else F.conv2d(a, w, self.bias, **self.conv)
        return self.norm(out)

    @torch.no_grad()
    def freeze(self) -> "Integers":
        """The layer as integers and one epilogue per channel: steps, bias and BatchNorm folded in.

        norm(conv(a, w) + bias) with a = s_a q_a and w = s_w q_w is acc * scale + shift, acc = conv(q_a, q_w).
        """
        w, a = self.weight_quantizer, self.input_quantizer
        scale = w.step * a.step
        shift = torch.zeros_like(scale) if self.bias is None else self.bias
        if not isinstance(self.norm, nn.Identity):
            gain = self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)
            scale = scale * gain
            shift = (shift - self.norm.running_mean) * gain + self.norm.bias
        weight = w.integers(self.weight).to(torch.int8)
        step = a.step.detach()
        return Integers(weight, step, scale, shift, w.bits, a.bits, a.signed, self.conv, self.in_shape)


class Integers(NamedTuple):
    """A frozen layer as data: what is packed, and what every backend runs."""

    weight: Tensor  # int8, in the float layer's shape
    a_step: Tensor  # (), step size of the input
    scale: Tensor  # (c_out,)
    shift: Tensor  # (c_out,)
    w_bits: int
    a_bits: int
    signed: bool  # whether the input is
    conv: dict | None  # stride, padding, dilation, groups; None for a linear layer
    in_shape: tuple[int, int, int]  # of one input


class IntegerLayer(nn.Module):
    """A frozen layer in plain float32 arithmetic: out = conv(round(x / a_step), weight) * scale + shift.

    float32 holds integers exactly below 2^24; where a sum can get larger, channels are summed in parts.
    """

    backend = "float32"

    def __init__(self, integers: Integers):
        super().__init__()
        for name in ("weight", "a_step", "scale", "shift"):
            self.register_buffer(name, getattr(integers, name).clone())
        self.w_bits, self.a_bits, self.signed = integers[4:7]
        self.conv, self.in_shape = integers[7:]
        self.q_min, self.q_max = integer_range(self.a_bits, self.signed)

    def freeze(self) -> Integers:
        tensors = self.weight, self.a_step, self.scale, self.shift
        return Integers(*tensors, self.w_bits, self.a_bits, self.signed, self.conv, self.in_shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.conv else x[:, :, None, None]
        acc = self.accumulate(quantize(x, self.a_step, self.q_min, self.q_max))
        out = acc.mul_(self.scale[:, None, None]).add_(self.shift[:, None, None])
        return out if self.conv else out.flatten(1)

    def accumulate(self, q: Tensor) -> Tensor:
        """conv(q, weight) for integers q given as floats: exact, rounded to float32 once."""
        parts = self.kernel.float().split(self.channels_per_part, 1)
        if len(parts) == 1:
            return F.conv2d(q, parts[0], **self.conv or {})
        pairs = zip(q.split(self.channels_per_part, 1), parts)
        return sum(F.conv2d(some, part, **self.conv or {}).to(torch.int32) for some, part in pairs).float()

    @property
    def kernel(self) -> Tensor:
        """The integer weights of a convolution, (c_out, c_in / groups, height, width)."""
        return self.weight if self.conv else self.weight[:, :, None, None]

    @functools.cached_property
    def channels_per_part(self) -> int:
        """As many input channels as keep every partial sum below 2^24."""
        largest = self.kernel.double().abs().sum((2, 3)) * max(-self.q_min, self.q_max)  # c_out, c_in
        size = largest.shape[1]
        while max(part.sum(1).max() for part in largest.split(size, 1)) >= 2**24:
            size -= 1
        return size


def is_exact(layer: IntegerLayer, batch: int) -> bool:
    """Whether the layer's sums are those of integer arithmetic on its device, on random and extreme inputs."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(layer.q_min, layer.q_max + 1, (2, *layer.in_shape), generator=generator)
    half = (layer.in_shape[1] + 1) // 2
    q[1, :, half:] = layer.q_min
    q[1, :, :half] = layer.q_max
    exact = F.conv2d(q.double(), layer.kernel.double().cpu(), **layer.conv or {}).float()
    copies = max(1, batch // 2)
    q = q.float().to(layer.weight.device, memory_format=torch.channels_last)
    try:
        found = layer.accumulate(q.repeat(copies, 1, 1, 1)).cpu()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # not on this device
        return False
    return torch.equal(found, exact.repeat(copies, 1, 1, 1))


# ---- the layer table and what a policy costs ----


class Layer(NamedTuple):
    """One row of the layer table, in order of execution."""

    name: str  # module path inside `classifier.net`, or inside the module itself
    c_in: int
    c_out: int
    kernel: int  # one side
    stride: int
    map_size: int  # one side of the input
    weights: int
    macs: int
    depthwise: bool


@torch.no_grad()
def quantize_model(classifier: nn.Module, image_size: int, quantizer=LSQ) -> list[Layer]:
    """Replace every convolution and linear layer, and the BatchNorm it feeds, by a QuantLayer at 32 bits.

    Layers, shapes and BatchNorms are read off one forward pass at (3, image_size, image_size). quantizer:
    a class as LSQ. Returns the layer table. Raises ValueError unless each layer runs exactly once and 32
    bits compute what the float network did.
    """
    body = getattr(classifier, "net", classifier)
    names = {module: name for name, module in body.named_modules()}
    layers = [module for module in names if isinstance(module, (nn.Conv2d, nn.Linear))]
    norms = [
        module
        for module in names
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
        and module.affine
        and module.track_running_stats
    ]
    calls = []  # (layer, input, output) as they run
    norm_of = {}  # layer -> its BatchNorm

    def record(module, inputs, output):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            calls.append((module, inputs[0], output))
        else:
            norm_of.update({layer: module for layer, _, out in calls if out is inputs[0]})

    hooks = [module.register_forward_hook(record) for module in layers + norms]
    was_training = classifier.training
    device = next(classifier.parameters()).device
    probe = torch.rand(1, 3, image_size, image_size, device=device)
    expected = classifier.eval()(probe)
    for hook in hooks:
        hook.remove()
    ran = [names[module] for module, x, _ in calls if x.ndim == 2 or not isinstance(module, nn.Linear)]
    if sorted(ran) != sorted(names[module] for module in layers):
        raise ValueError(
            "each layer must run exactly once per forward pass, linear ones on (batch, features)"
        )
    table = []
    for module, x, out in calls:
        norm = norm_of.get(module, nn.Identity())
        layer = QuantLayer(module, norm, x.shape[1:], quantizer).to(device)
        body.set_submodule(names[module], layer)
        if module in norm_of:
            body.set_submodule(names[norm], nn.Identity())
        table.append(_table_row(names[module], module, layer, x, out))
    if not torch.equal(classifier(probe), expected):
        raise ValueError(
            "BatchNorm cannot be folded: a convolution's output is used before it or changed in place, "
            "or a convolution does not pad with zeros"
        )
    classifier.train(was_training)
    return table


def _table_row(name: str, module: nn.Module, layer: QuantLayer, x: Tensor, out: Tensor) -> Layer:
    return Layer(
        name=name,
        c_in=x.shape[1],
        c_out=out.shape[1],
        kernel=module.kernel_size[0] if layer.conv else 1,
        stride=module.stride[0] if layer.conv else 1,
        map_size=layer.in_shape[-1],
        weights=module.weight.numel(),
        macs=module.weight.numel() * out[0, 0].numel(),  # weights * output positions
        depthwise=bool(layer.conv) and layer.conv["groups"] == x.shape[1] > 1,
    )


def quant_layers(classifier: nn.Module) -> dict[str, QuantLayer | IntegerLayer]:
    """The quantizable layers, or what they were frozen to, by name."""
    body = getattr(classifier, "net", classifier)
    kinds = QuantLayer, IntegerLayer
    return {name: module for name, module in body.named_modules() if isinstance(module, kinds)}


def set_policy(classifier: nn.Module, policy: Policy) -> None:
    """Set every layer's bit-widths. Raises ValueError unless the policy names exactly the network's layers."""
    layers = quant_layers(classifier)
    if layers.keys() != policy.keys():
        differ = sorted(layers.keys() ^ policy.keys())
        raise ValueError(f"the policy's layers are others: {differ[:3]} ...")
    for name, (w_bits, a_bits) in policy.items():
        quantized = MIN_BITS <= w_bits <= MAX_BITS and MIN_BITS <= a_bits <= MAX_BITS
        if not quantized and not w_bits == a_bits == FLOAT_BITS:
            allowed = f"{MIN_BITS} to {MAX_BITS} bits, or both {FLOAT_BITS}"
            raise ValueError(f"layer {name}: bit-widths are {allowed}, not {w_bits} and {a_bits}")
    for name, bits in policy.items():
        layers[name].set_bits(*bits)


def keep_steps_positive(classifier: nn.Module) -> None:
    """After an optimizer's update: a step size must stay above 0 to mean anything."""
    for layer in quant_layers(classifier).values():
        layer.weight_quantizer.step.data.clamp_(min=1e-6)
        layer.input_quantizer.step.data.clamp_(min=1e-6)


@torch.no_grad()
def calibrate(classifier: nn.Module, batches: Sequence[Tensor], values: int = 65536) -> None:
    """Find, on the float network, initial step sizes for every bit-width, and which inputs are signed.

    batches: images (B, 3, H, W) as the network will see them, noise included. Steps have the least
    squared error on the weights and on about `values` inputs per layer. An input is unsigned if none of
    its values is below zero. Leaves all layers at 32 bits, in evaluation mode.
    """
    layers = quant_layers(classifier).values()
    seen: dict[QuantLayer, list[Tensor]] = {layer: [] for layer in layers}
    signed = dict.fromkeys(layers, False)

    def keep(layer, inputs):
        flat = inputs[0].flatten()
        stride = max(1, len(flat) * len(batches) // values)
        signed[layer] |= bool((flat < 0).any())
        seen[layer].append(flat[::stride].clone())

    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    classifier.eval()
    for layer in layers:
        layer.set_bits(FLOAT_BITS, FLOAT_BITS)
    for batch in batches:
        classifier(batch)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        layer.input_quantizer.signed = signed[layer]
        layer.input_quantizer.observe(torch.cat(seen[layer])[None])
        layer.weight_quantizer.observe(layer.weight.flatten(1))


def bitops(table: list[Layer], policy: Policy) -> int:
    """BitOPs(P) = sum over layers of MACs * w_bits * a_bits, per image."""
    return sum(layer.macs * math.prod(policy[layer.name]) for layer in table)


def bitops_ratio(table: list[Layer], policy: Policy) -> float:
    """BitOPs(P) / BitOPs(FP32)."""
    return bitops(table, policy) / bitops(table, float_policy(table))


def size_bytes(table: list[Layer], policy: Policy) -> int:
    """size(P): the weights' bits, rounded up to bytes."""
    return math.ceil(sum(layer.weights * policy[layer.name][0] for layer in table) / 8)


def size_ratio(table: list[Layer], policy: Policy) -> float:
    """size(P) / size(FP32)."""
    return size_bytes(table, policy) / size_bytes(table, float_policy(table))


def uniform_policy(table: list[Layer], bits: int, first_last_bits: int = FIRST_LAST_BITS) -> Policy:
    """The same bit-width everywhere but in the first and the last layer."""
    policy = {layer.name: [bits, bits] for layer in table}
    for layer in (table[0], table[-1]):
        policy[layer.name] = [first_last_bits, first_last_bits]
    return policy


def float_policy(table: list[Layer]) -> Policy:
    return uniform_policy(table, FLOAT_BITS, FLOAT_BITS)


def enforce_budget(
    table: list[Layer], policy: Policy, budget: float, size_budget: float | None = None
) -> Policy:
    """The policy, forced under fractions of the float network's BitOPs and weight bits (HAQ, section 3.3).

    From the last layer back, each visit takes one bit from the input, then one from the weights, until
    the policy fits; the first and last layer keep theirs. Raises ValueError if the narrowest policy is
    over the budget.
    """
    policy = {name: list(bits) for name, bits in policy.items()}
    WEIGHTS, INPUT = 0, 1

    def over(kind: int) -> bool:
        """Whether a bit of this kind must go: both cost BitOPs, weights cost size, too."""
        too_large = size_budget is not None and size_ratio(table, policy) > size_budget
        return bitops_ratio(table, policy) > budget or (kind == WEIGHTS and too_large)

    while over(WEIGHTS):
        before = copy.deepcopy(policy)
        for layer in reversed(table[1:-1]):
            for kind in (INPUT, WEIGHTS):
                if policy[layer.name][kind] > MIN_BITS and over(kind):
                    policy[layer.name][kind] -= 1
        if policy == before:
            option = "--budget" if over(INPUT) else "--size-budget"
            bitops_needed, size_needed = (
                math.ceil(ratio(table, policy) * 1e6) / 1e6 for ratio in (bitops_ratio, size_ratio)
            )
            raise ValueError(
                f"{option} is below what {MIN_BITS} bits cost (first and last layer {FIRST_LAST_BITS}): "
                f"{bitops_needed} of float BitOPs and {size_needed} of the size"
            )
    return policy


# ---- saved networks ----

MAGIC, VERSION = b"ARQ\n", 1


def pack_bits(values: Tensor, bits: int) -> bytes:
    """Symmetric integers, shifted to start at 0, so many bits each, lowest bit first."""
    shifted = values.flatten().cpu().to(torch.int16) + (2 ** (bits - 1) - 1)
    planes = (shifted[:, None] >> torch.arange(bits, dtype=torch.int16)) & 1
    octets = F.pad(planes.flatten(), (0, -planes.numel() % 8)).view(-1, 8)
    packed = (octets << torch.arange(8, dtype=torch.int16)).sum(1)
    return packed.to(torch.uint8).numpy().tobytes()


def unpack_bits(data: bytes, count: int, bits: int) -> Tensor:
    """What pack_bits packed: int8 (count,)."""
    octets = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(torch.int16)
    planes = ((octets[:, None] >> torch.arange(8, dtype=torch.int16)) & 1).flatten()
    planes = planes[: count * bits].view(count, bits)
    shifted = (planes << torch.arange(bits, dtype=torch.int16)).sum(1)
    return (shifted - (2 ** (bits - 1) - 1)).to(torch.int8)


@torch.no_grad()
def pack_model(classifier: Classifier, table: list[Layer], description: dict) -> bytes:
    """A quantized network as one file: integers at their own bit-widths, epilogues and a description.

    description: arch, image_size, sigma, dataset and classes; the rest is read off the network. In
    order: MAGIC; version and length of the header; the header, JSON; for each layer of the table packed
    weights, then a_step, scale and shift in float32; SHA-256 of all that. Raises ValueError for a layer
    of 32 bits.
    """
    layers = [quant_layers(classifier)[row.name] for row in table]
    if any(layer.w_bits == FLOAT_BITS for layer in layers):
        raise ValueError("a layer of 32 bits has no integers; keep the float network's state_dict instead")
    frozen = [layer.freeze() for layer in layers]
    header = {
        **description,
        "policy": [[layer.w_bits, layer.a_bits] for layer in frozen],
        "signed": [int(layer.signed) for layer in frozen],
        "mean": classifier.mean.flatten().tolist(),
        "std": classifier.std.flatten().tolist(),
        "option_a": any(isinstance(module, PaddedShortcut) for module in classifier.modules()),
    }
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    data = MAGIC + struct.pack("<HI", VERSION, len(text)) + text
    for layer in frozen:
        floats = torch.cat([layer.a_step.view(1), layer.scale, layer.shift]).cpu()
        data += pack_bits(layer.weight, layer.w_bits) + floats.numpy().astype("<f4").tobytes()
    return data + hashlib.sha256(data).digest()


def read_packed(path) -> tuple[dict, bytes] | None:
    """Header and tensors of a file of pack_model, None for others. Raises ValueError for a broken one."""
    data = Path(path).read_bytes()
    if data[:4] != MAGIC:
        return None
    version, length = struct.unpack_from("<HI", data.ljust(10, b"\0"), 4)
    if version > VERSION:
        raise ValueError(f"{path} was altered or is of version {version}, not {VERSION}; use a newer program")
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise ValueError(f"{path} was truncated or altered: its checksum is wrong; copy it again")
    return json.loads(data[10 : 10 + length]), data[10 + length : -32]


def load_model(path) -> tuple[Classifier, list[Layer], dict]:
    """What pack_model saved: the frozen classifier, its layer table, its description.

    The description has the policy by layer name. `integer_network` makes the classifier fast. Raises
    ValueError unless the file is whole and of this version.
    """
    saved, data = read_packed(path) or ({}, b"")
    if not saved:
        raise ValueError(f"{path}: not a network saved by this program")
    classifier = build_classifier(
        saved["arch"], len(saved["classes"]), saved["mean"], saved["std"], saved["option_a"]
    )
    table = quantize_model(classifier, saved["image_size"])
    for row, (w_bits, a_bits), signed in zip(table, saved["policy"], saved["signed"]):
        layer = quant_layers(classifier)[row.name]
        size = math.ceil(row.weights * w_bits / 8)
        count = 1 + 2 * row.c_out
        weight = unpack_bits(data[:size], row.weights, w_bits).view(layer.weight.shape)
        floats = torch.frombuffer(bytearray(data[size:]), dtype=torch.float32, count=count)
        scale, shift = floats[1:].split(row.c_out)
        frozen = Integers(
            weight, floats[0], scale, shift, w_bits, a_bits, bool(signed), layer.conv, layer.in_shape
        )
        classifier.net.set_submodule(row.name, IntegerLayer(frozen))
        data = data[size + 4 * count :]
    saved["policy"] = {row.name: bits for row, bits in zip(table, saved["policy"])}
    return classifier.eval(), table, saved


# ---- the integer network ----


BACKENDS = ("int8", "float32")


def integer_network(classifier: nn.Module, batch: int = 2, backends: Sequence[str] = BACKENDS) -> nn.Module:
    """The network as it is evaluated and certified: a frozen copy, in evaluation mode, on the same device.

    Every quantized layer runs on the first of `backends` that is exact for it; layers of 32 bits stay as
    they are. `network.backend` names what runs ("int8", "float32", "int8+float32", "float"). Predictions
    do not depend on the batch size. Exactness is checked at batches of `batch`, by which GPUs choose
    kernels. Raises RuntimeError, naming the layer, where no backend is exact.
    """
    network = copy.deepcopy(classifier).eval()
    body = getattr(network, "net", network)
    used = set()
    for name, layer in quant_layers(network).items():
        if layer.w_bits == FLOAT_BITS:
            continue
        integers = layer.freeze()
        found = [
            int8_layer(integers) if backend == "int8" else IntegerLayer(integers) for backend in backends
        ]
        frozen = next((layer for layer in found if layer is not None and is_exact(layer, batch)), None)
        if frozen is None:
            raise RuntimeError(f"layer {name}: no integer sums are exact on this device; use --device cpu")
        body.set_submodule(name, frozen)
        used.add(frozen.backend)
    if "int8" in used and body is network:
        network = fuse(network)
    elif "int8" in used:
        network.net = fuse(body)
    network.backend = "+".join(sorted(used, reverse=True)) or "float"
    return network


# ---- faster, same integers: skip at first reading ----


class Int8Layer(IntegerLayer):
    """The same integers on oneDNN's int8 convolution, with the operations behind it fused in.

    Inputs are floats, or already this layer's integers as uint8 with zero point -q_min. `fused` says
    what follows the sums.
    """

    backend = "int8"

    def __init__(self, integers: Integers):
        super().__init__(integers)
        conv = self.conv or {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
        self.settings = [list(conv[name]) for name in ("stride", "padding", "dilation")] + [conv["groups"]]
        self.ones = torch.ones(len(self.weight))
        self.zero_points = torch.zeros(len(self.weight), dtype=torch.int64)
        self.packed = torch.ops.onednn.qconv_prepack(self.kernel, self.ones, 1.0, -self.q_min, *self.settings)
        self.fused()

    def fused(self, relu: float | None = None, reader: "Int8Layer | None" = None) -> None:
        """Fix what follows the sums: a ReLU up to `relu`, and requantization to the integers of `reader`.

        Without a reader the output is float32.
        """
        self.relu = "none" if relu is None else "relu"
        least, most = (-math.inf, math.inf) if relu is None else (0.0, relu)
        if reader is None:
            self.epilogue = self.scale, self.shift
            self.output = 0, torch.float32  # zero point, type
            done = least, math.inf  # the kernel has a ReLU
        else:
            self.epilogue = self.scale / reader.a_step, self.shift / reader.a_step
            self.output = -reader.q_min, torch.uint8
            least = int(max(reader.q_min, least)) - reader.q_min
            most = int(min(reader.q_max, float(torch.round(most / reader.a_step)))) - reader.q_min
            done = 0, 255  # the kernel rounds and saturates
        self.limits = None if (least, most) == done else (least, most)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """residual is added to the epilogue, and overwritten."""
        x = x if self.conv else x[:, :, None, None]
        if x.dtype != torch.uint8:
            x = self._to_uint8(quantize(x, self.a_step, self.q_min, self.q_max))
        out = self._convolve(x, *self.epilogue, residual, self.relu, *self.output)
        if self.limits:
            out.clamp_(*self.limits)
        return out if self.conv else out.flatten(1)

    def accumulate(self, q: Tensor) -> Tensor:
        return self._convolve(self._to_uint8(q), self.ones, None)

    def _to_uint8(self, q: Tensor) -> Tensor:
        q = q - self.q_min if self.q_min else q
        # By way of int8 or int16: torch converts float32 to uint8 one value at a time, five times slower.
        if self.q_max - self.q_min < 128:
            return q.to(torch.int8).view(torch.uint8)
        return q.to(torch.int16).to(torch.uint8)

    def _convolve(
        self, q: Tensor, scale, shift, residual=None, relu="none", zero_point=0, dtype=torch.float32
    ) -> Tensor:
        op = torch.ops.onednn.qconv2d_pointwise
        operands = q, 1.0, -self.q_min, self.packed, scale, self.zero_points
        output = shift, *self.settings, 1.0, zero_point, dtype
        if residual is None:
            return op(*operands, *output, relu, [], "")
        return op.binary(*operands, residual, *output, 1.0, 0, "sum", 1.0, relu, [], "")


def int8_layer(integers: Integers) -> Int8Layer | None:
    """The layer on int8, or None where this torch, this device or this processor cannot run it exactly."""
    if integers.weight.device.type != "cpu":
        return None
    try:
        layer = Int8Layer(integers)
        # Two neighbouring products are added first, in int16 where the processor lacks VNNI.
        pair = 2 * (layer.q_max - layer.q_min) * int(layer.weight.abs().max())
        return None if pair >= 2**15 and int8_saturates() else layer
    except (RuntimeError, TypeError, AttributeError):  # the operator is private to torch: it may change
        return None


@functools.cache
def int8_saturates() -> bool:
    """Whether oneDNN's int8 convolution saturates in int16 on this processor (those without VNNI)."""
    weight = torch.full((16, 16, 3, 3), 127, dtype=torch.int8)
    conv = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    one = torch.ones(16)
    layer = Int8Layer(Integers(weight, one[0], one, one, 8, 8, False, conv, (16, 4, 4)))
    sums = layer.accumulate(torch.full((1, 16, 4, 4), 255.0))
    return bool((sums != 16 * 9 * 255 * 127).any())


RELUS = {F.relu: math.inf, torch.relu: math.inf, nn.ReLU: math.inf, nn.ReLU6: 6.0}
ADDS = (operator.add, operator.iadd, torch.add)


def fuse(network: nn.Module) -> nn.Module:
    """The network with sums and ReLUs moved into the int8 layers in front of them, by torch.fx.

    A layer whose output only another int8 layer reads writes that layer's integers. A network that
    torch.fx cannot trace comes back as it is.
    """
    tracer = fx.Tracer()
    is_leaf = tracer.is_leaf_module
    tracer.is_leaf_module = lambda module, name: isinstance(module, IntegerLayer) or is_leaf(module, name)
    try:
        graph = tracer.trace(network)
    except Exception:  # torch.fx raises many kinds, for networks that it cannot follow
        return network
    modules = dict(network.named_modules())

    def module(node) -> nn.Module | None:
        return modules.get(node.target) if node.op == "call_module" else None

    def int8(node) -> Int8Layer | None:
        return module(node) if isinstance(module(node), Int8Layer) else None

    def only_user(node):
        return next(iter(node.users)) if len(node.users) == 1 else None

    def replace(old, new) -> None:
        old.replace_all_uses_with(new)
        graph.erase_node(old)

    for node in list(graph.nodes):
        if type(module(node)) in (nn.Identity, nn.Dropout):  # nothing, in evaluation
            replace(node, node.args[0])
    relu = {}
    for node in filter(int8, list(graph.nodes)):
        after = only_user(node)
        if after and after.target in ADDS and len(after.all_input_nodes) == 2 and not after.kwargs:
            other = next(part for part in after.all_input_nodes if part is not node)
            # The sum overwrites the other part: nobody may read that later, nor may it be a view.
            owned = isinstance(module(other), (IntegerLayer, nn.MaxPool2d, nn.ReLU))
            owned = owned or other.target in (*ADDS, F.pad, F.relu)
            if owned and max(other.users) is after:
                after.prepend(node)  # runs once both parts are there
                node.args = (node.args[0], other)
                replace(after, node)
                after = only_user(node)
        kind = after and (after.target if after.target in RELUS else type(module(after)))
        if kind in RELUS:
            relu[node] = RELUS[kind]
            replace(after, node)
    for node in filter(int8, graph.nodes):
        after = only_user(node)
        reads = after and int8(after) and after.args[0] is node and len(node.args) == 1
        int8(node).fused(relu.get(node), int8(after) if reads else None)
    return fx.GraphModule(network, graph).eval()
