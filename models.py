"""Networks, the quantizer, and what a bit-width policy costs.

In order: quantize_model, calibrate, set_policy, training, integer_network or pack_model.

    paper       here            shape, meaning
    P           policy          {layer: [b_w, b_a]}
    b_w, b_a    w_bits, a_bits  bit-widths of a layer's weights and of its input
    s           step            step size: (c_out,) of weights, () of an input
    q           integers        round(v / s), clipped to [q_min, q_max]
    Q           q_max           the largest integer of an operand
    MACs        macs            multiplications for one image
    BitOPs(P)   bitops_ratio    sum of MACs * b_w * b_a, over that of 32-bit floats
    size(P)     size_bytes      sum of weights * b_w, in bytes
"""

import contextlib
import copy
import functools
import hashlib
import json
import math
import os
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.mobilenetv2 import InvertedResidual, MobileNetV2, mobilenet_v2
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet, resnet18, resnet50
from torchvision.ops import Conv2dNormActivation

MIN_BITS, MAX_BITS, FLOAT_BITS = 2, 8, 32
FIRST_LAST_BITS = 8  # the first and the last layer keep them in every policy
Policy = dict[str, list[int]]


def require(condition, message: str) -> None:
    if not condition:
        raise ValueError(message)


# ---- networks ----
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # mean, deviation
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 (He et al., 2016, 4.2): n blocks each of 16, 32, 64."""

    def __init__(self, depth: int, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        for index, (c_in, c_out) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            shortcut = None
            if index > 1:
                shortcut = Conv2dNormActivation(c_in, c_out, 1, 2, activation_layer=None)
            first = BasicBlock(c_in, c_out, min(index, 2), shortcut)
            others = [BasicBlock(c_out, c_out) for _ in range((depth - 2) // 6 - 1)]
            setattr(self, f"layer{index}", nn.Sequential(first, *others))
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class Classifier(nn.Module):
    """Images in [0, 1], noisy or not, to logits: normalisation, then `net`."""

    def __init__(self, net: nn.Module, mean=CIFAR10[0], std=CIFAR10[1]):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)


# Another network is one line: its constructor, its normalisation.
NETWORKS = {
    "resnet18": (resnet18, IMAGENET),
    "resnet50": (resnet50, IMAGENET),
    "mobilenet_v2": (mobilenet_v2, IMAGENET),
}
for depth in (8, 20, 32, 44, 56, 110):
    NETWORKS[f"resnet{depth}"] = (functools.partial(CifarResNet, depth), CIFAR10)


def build_classifier(arch: str, num_classes: int, *normalisation) -> Classifier:
    """A float Classifier by name, normalised as usual or by mean and std."""
    require(arch in NETWORKS, f"unknown network {arch!r}, not of {', '.join(NETWORKS)}")
    constructor, usual = NETWORKS[arch]
    return Classifier(constructor(num_classes=num_classes), *(normalisation or usual))


def load_base_checkpoint(path, arch: str, num_classes: int) -> Classifier:
    """A float Classifier from a state dict, bare or under state_dict, net or model.
    Prefixes are dropped, `linear` and `shortcut` renamed. ValueError: another network."""
    classifier = build_classifier(arch, num_classes)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "net", "model"):
            state = state.get(key, state)
        target = classifier if "mean" in state else classifier.net
        if state.keys() != target.state_dict().keys():
            prefix = os.path.commonprefix([*state]).rfind(".") + 1
            state = {k[prefix:].replace("linear.", "fc."): state[k] for k in state}
            state = {k.replace("shortcut.", "downsample."): state[k] for k in state}
        target.load_state_dict(state)
    except Exception as error:  # of many kinds, as files are
        reason = " ".join(str(error).partition("\x1b")[0].split())[:200] or "it is empty"
        message = f"{path} is no state dict of {arch} with {num_classes} classes"
        raise ValueError(f"{message}; give its --dataset and --arch ({reason})") from None
    return classifier


# ---- quantizer ----
def integer_range(bits: int, signed: bool, symmetric=False) -> tuple[int, int]:
    """[0, 2^b - 1], or [-2^(b-1), 2^(b-1) - 1]; symmetric: without the lowest."""
    q_max = 2 ** (bits - signed) - 1
    q_min = -q_max - 1 + symmetric if signed else 0
    return q_min, q_max


def quantize(v: Tensor, step: Tensor, q_min: int, q_max: int) -> Tensor:
    """Integers (as floats) round(v / step), clipped to [q_min, q_max]."""
    return (v / step).round_().clamp_(q_min, q_max)


class FakeQuantize(torch.autograd.Function):
    """step * round(clip(v / step)) with LSQ's gradients (Esser et al., ICLR 2020, 2.1).
    For v: 1 inside the clip range, else 0. For the step: q - v/step inside, q outside,
    over Q^2 sqrt(N), with N elements per step (of one sample); LSQ has sqrt(N Q)."""

    @staticmethod
    def forward(ctx, v, step, q_min, q_max, elements):
        ctx.save_for_backward(v, step)
        ctx.range = q_min, q_max
        ctx.gradient_scale = 1 / (math.sqrt(elements) * q_max**2)
        return quantize(v, step, q_min, q_max).mul_(step)

    @staticmethod
    def backward(ctx, grad):
        v, step = ctx.saved_tensors
        scaled = v / step
        grad_v = torch.ops.aten.hardtanh_backward(grad, scaled, *ctx.range)
        grad_step = scaled.round().clamp_(*ctx.range).mul_(grad)  # grad * q
        grad_step.addcmul_(grad_v, scaled, value=-1)  # - grad_v * v / step
        grad_step = grad_step.sum_to_size(step.shape) * ctx.gradient_scale
        return grad_v, grad_step, None, None, None


class LSQ(nn.Module):
    """The quantizer of one operand: learned step sizes, simulated bits in training.
    channels: of a weight, a step for each, a symmetric range; None: an input, one step.
    Another is a subclass with `initial_step`, `forward` and, of weights, `integers`:
    step * integers(v) is certified; of inputs, step * round(v / step), clipped."""

    def __init__(self, channels: int | None = None):
        super().__init__()
        self.is_weight = channels is not None
        shape = (channels,) if self.is_weight else ()
        self.register_buffer("signed", torch.tensor(self.is_weight))  # inputs: calibrate
        self.step = nn.Parameter(torch.ones(shape))
        self.register_buffer("initial_steps", torch.zeros(MAX_BITS + 1, *shape))  # by bits

    @staticmethod
    def initial_step(v: Tensor, q_min: int, q_max: int) -> Tensor:
        """Step of the least squared error of each row of v (rows, n)."""
        largest = v.abs().amax(1, keepdim=True).clamp_min(1e-8)
        steps = [s * largest / q_max for s in torch.linspace(0.15, 1.0, 32).tolist()]
        errors = [(quantize(v, s, q_min, q_max) * s - v).square_().sum(1) for s in steps]
        best = torch.stack(errors).argmin(0)
        return torch.cat(steps, 1).gather(1, best[:, None]).squeeze(1)

    @torch.no_grad()
    def observe(self, v: Tensor) -> None:
        """Find the initial step for every bit-width; v has a row per step."""
        for bits in range(MIN_BITS, MAX_BITS + 1):
            bounds = integer_range(bits, bool(self.signed), self.is_weight)
            self.initial_steps[bits] = self.initial_step(v, *bounds).view(self.step.shape)

    def set_bits(self, bits: int) -> None:
        require(self.initial_steps[bits].all(), "calibrate before set_policy")
        self.bits = bits
        self.q_min, self.q_max = integer_range(bits, bool(self.signed), self.is_weight)
        self.step.data.copy_(self.initial_steps[bits])

    def forward(self, v: Tensor) -> Tensor:
        step, elements = self.step_for(v), v[0].numel()
        return FakeQuantize.apply(v.float(), step, self.q_min, self.q_max, elements)

    def integers(self, v: Tensor) -> Tensor:
        """The integers behind `forward`, as floats."""
        return quantize(v, self.step_for(v), self.q_min, self.q_max)

    def step_for(self, v: Tensor) -> Tensor:
        """The step, shaped to divide v, and kept positive."""
        self.step.data.clamp_(min=1e-6)
        return self.step.view(-1, *[1] * (v.ndim - 1)) if self.is_weight else self.step


# ---- layers ----
def check_input(name: str, x: Tensor) -> None:
    """ValueError unless x is finite floats (B, C, H, W) or (B, features)."""
    require(x.is_floating_point(), f"layer {name}: its input is not of floats")
    require(x.ndim in (2, 4), f"layer {name}: its input {(*x.shape,)} has no batch axis")
    require(x.sum().isfinite(), f"layer {name}: its input is not finite")


class QuantLayer(nn.Module):
    """A layer and its BatchNorm: float at 32 bits, else with simulated operands."""

    def __init__(self, row: "Layer", layer, norm, quantizer):
        super().__init__()
        self.name, self.in_shape = row.name, row.in_shape
        self.weight, self.bias, self.norm = layer.weight, layer.bias, norm
        usual = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
        self.conv = {key: getattr(layer, key, value) for key, value in usual.items()}
        self.weight_quantizer = quantizer(len(layer.weight))
        self.input_quantizer = quantizer()
        self.w_bits = self.a_bits = FLOAT_BITS

    def set_bits(self, w_bits: int, a_bits: int) -> None:
        if w_bits != FLOAT_BITS:
            self.weight_quantizer.set_bits(w_bits)
            self.input_quantizer.set_bits(a_bits)
        self.w_bits, self.a_bits = w_bits, a_bits

    def forward(self, x: Tensor) -> Tensor:
        w, a = self.weight, x
        if self.w_bits != FLOAT_BITS:
            w, a = self.weight_quantizer(w), self.input_quantizer(a)
        if w.ndim == 2:
            return self.norm(F.linear(a, w, self.bias))
        return self.norm(F.conv2d(a, w, self.bias, **self.conv))

    @torch.no_grad()
    def freeze(self) -> "IntegerLayer":
        """norm(conv(s_a q_a, s_w q_w) + bias) as conv(q_a, q_w) * scale + shift."""
        w, a, norm = self.weight_quantizer, self.input_quantizer, self.norm
        require(self.w_bits != FLOAT_BITS, "a layer of 32 bits has no integers")
        weight = w.integers(self.weight).to(torch.int8)
        scale = w.step * a.step_for(weight)
        shift = torch.zeros_like(scale) if self.bias is None else self.bias
        if not isinstance(norm, nn.Identity):
            gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            scale, shift = scale * gain, (shift - norm.running_mean) * gain + norm.bias
        return IntegerLayer(self, weight, a.step, scale, shift)


class IntegerLayer(nn.Module):
    """A frozen layer in floats: conv(round(x / a_step), weight) * scale + shift.
    weight: int8 (c_out, c_in / groups, h, w); a_step: (); scale, shift: (c_out,)."""

    def __init__(self, layer: QuantLayer, weight, a_step, scale, shift):
        super().__init__()
        self.name, self.conv, self.in_shape = layer.name, layer.conv, layer.in_shape
        self.w_bits, self.a_bits = layer.w_bits, layer.a_bits
        self.signed = bool(layer.input_quantizer.signed)
        self.reads_kernel = False  # its input is finite
        self.q_min, self.q_max = integer_range(self.a_bits, self.signed)
        weight = weight[:, :, None, None] if weight.ndim == 2 else weight
        tensors = {"weight": weight, "a_step": a_step, "scale": scale, "shift": shift}
        for key, value in tensors.items():
            self.register_buffer(key, value.detach().clone())
        largest = float(weight.cpu().double().abs().sum((1, 2, 3)).max())
        self.largest_sum = largest * (self.q_max - self.q_min)  # with int8's zero point
        self.sum_type = torch.float32 if self.largest_sum < 2**24 else torch.float64

    def freeze(self) -> "IntegerLayer":
        return self

    def forward(self, x: Tensor, *fused) -> Tensor:
        if x.ndim == 2:
            return self.forward(x[:, :, None, None], *fused).flatten(1)
        if not self.reads_kernel:
            check_input(self.name, x)
        return self.compute(x, *fused)

    def compute(self, x: Tensor) -> Tensor:
        q = quantize(x, self.a_step, self.q_min, self.q_max)
        scale, shift = self.scale[:, None, None], self.shift[:, None, None]
        return torch.addcmul(shift, self.accumulate(q), scale)

    def accumulate(self, q: Tensor) -> Tensor:
        """conv(q, weight) for integers q, as floats: exact, rounded once."""
        q, weight = q.to(self.sum_type), self.weight.to(self.sum_type)
        return F.conv2d(q, weight, **self.conv).float()


# ---- the layer table and what a policy costs ----
class Layer(NamedTuple):
    """One row of the layer table, which is in order of execution."""

    name: str  # its path inside `classifier.net`
    c_in: int
    c_out: int
    kernel: int  # of one side, as stride and map_size
    stride: int
    map_size: int  # of the input
    weights: int
    macs: int
    depthwise: bool
    in_shape: tuple = ()  # (c_in, height, width)
    norm: str = ""  # the path of its BatchNorm


LAYERS = nn.Conv2d, nn.Linear


def body_of(classifier) -> nn.Module:
    """The module that layers are named in."""
    return classifier.net if isinstance(classifier, Classifier) else classifier


@torch.no_grad()
def quantize_model(classifier: nn.Module, image_size: int, quantizer=LSQ) -> list[Layer]:
    """Put QuantLayers, at 32 bits, for layers and their BatchNorms; the layer table.
    ValueError, and the network as it was, unless each layer runs once, nothing else has
    weights, and 32 bits compute what the float network did."""
    for name, module in classifier.named_modules():
        plain = all(p.numel() <= max(p.shape, default=1) for p in module.parameters(False))
        if isinstance(module, LAYERS):
            usual = type(module).forward in (nn.Conv2d.forward, nn.Linear.forward)
            zeros = getattr(module, "padding_mode", "zeros") == "zeros"
            plain = usual and zeros and "weight" in module._parameters
        require(plain, f"layer {name}, {type(module).__name__}: own forward, padding, weights")
    first = next((m for m in classifier.modules() if isinstance(m, LAYERS)), None)
    require(first is not None, "no convolution and no linear layer is there")
    channels, weight = getattr(first, "in_channels", 3), first.weight
    require(weight.dtype == torch.float32, f"the network is in {weight.dtype}")
    probe = torch.rand(2, channels, image_size, image_size, device=weight.device)
    expected, table = trace(copy.deepcopy(classifier).eval(), probe)
    for rows in (table, [row._replace(norm="") for row in table]):
        trial = copy.deepcopy(classifier).eval()
        replace_layers(trial, rows, quantizer)
        if torch.equal(trial(probe), expected):
            replace_layers(classifier, rows, quantizer)
            return rows
    raise ValueError("QuantLayers compute otherwise: hooks?")


def trace(classifier, probe: Tensor) -> tuple[Tensor, list[Layer]]:
    """Logits of a probe, and the layer table."""
    body, layers = body_of(classifier), {}  # rows by output, kept alive

    def keep(name, module, inputs, out):
        require(inputs, f"layer {name} is called by keyword")
        x = inputs[0]
        if isinstance(module, nn.BatchNorm2d):
            usual = module.affine and module.track_running_stats
            if usual and x in layers and x._version == 0:  # no ReLU changed it in place
                layers[x] = layers[x]._replace(norm=name)
            return
        weight, shape = module.weight, (*x.shape[1:], 1, 1)[:3]
        batch = x.ndim == weight.ndim and len(x) == 2
        require(batch, f"layer {name} is on {tuple(x.shape)}, not (B, features) or maps")
        kernel, stride = (*weight.shape, 1)[2], getattr(module, "stride", (1,))[0]
        sizes = shape[0], out.shape[1], kernel, stride, shape[2], weight.numel()
        macs = weight.numel() * out[0, 0].numel()  # times positions
        depthwise = getattr(module, "groups", 1) == shape[0] > 1
        layers[out] = Layer(name, *sizes, macs, depthwise, shape)

    for name, module in body.named_modules():
        if isinstance(module, (*LAYERS, nn.BatchNorm2d)):
            module.register_forward_hook(functools.partial(keep, name))
    logits = classifier(probe)
    is_logits = isinstance(logits, Tensor) and logits.ndim == 2
    require(is_logits, f"the network returns a {type(logits).__name__}, not logits")
    require(logits.isfinite().all(), "logits are not finite: check the network")
    called = [row.name for row in layers.values()]
    for name, module in body.named_modules(remove_duplicate=False):
        times = called.count(name) if isinstance(module, LAYERS) else 1
        require(times == 1, f"layer {name} runs {times} times by this name (aux_logits?)")
    return logits, [*layers.values()]


def replace_layers(classifier, table: list[Layer], quantizer) -> None:
    """Put QuantLayers in place, in the same mode."""
    body = body_of(classifier)
    for row in table:
        layer, norm = body.get_submodule(row.name), nn.Identity()
        if row.norm:
            norm = body.get_submodule(row.norm)
            body.set_submodule(row.norm, nn.Identity())
        quantized = QuantLayer(row, layer, norm, quantizer).train(layer.training)
        body.set_submodule(row.name, quantized.to(layer.weight.device))


def quant_layers(classifier, kinds=QuantLayer | IntegerLayer) -> dict:
    """QuantLayers, or what they froze to, by name. ValueError: none."""
    modules = body_of(classifier).named_modules()
    layers = {name: layer for name, layer in modules if isinstance(layer, kinds)}
    require(layers, "no layers of quantize_model, or frozen to integers")
    return layers


def check_policy(names, policy: Policy) -> None:
    """ValueError unless the policy gives each layer two bit-widths."""
    is_policy = isinstance(policy, dict) and set(policy) == set(names)
    require(is_policy, f"a policy names exactly the layers {list(names)[:3]} ...")
    for name, bits in policy.items():
        pair = isinstance(bits, list | tuple) and [type(b) for b in bits] == [int, int]
        narrow = pair and MIN_BITS <= min(bits) and max(bits) <= MAX_BITS
        possible = narrow or (pair and set(bits) == {FLOAT_BITS})
        require(possible, f"layer {name}: bits are 2 to 8, or both 32, not {bits}")


def set_policy(classifier: nn.Module, policy: Policy) -> None:
    """Set every layer's bit-widths; steps start at those of `calibrate`.
    Learned steps are loaded last: calibrate, set_policy, load_state_dict."""
    layers = quant_layers(classifier, QuantLayer)
    check_policy(layers, policy)
    for name, bits in policy.items():
        layers[name].set_bits(*bits)


@torch.no_grad()
def calibrate(classifier: nn.Module, batches, values: int = 65536) -> None:
    """Find signed inputs, and steps of least squared error for each width; leaves 32 bits.
    batches: noisy images (B, C, H, W), split anyhow; about `values` inputs are drawn."""
    layers, batches = quant_layers(classifier, QuantLayer).values(), list(batches)
    images, seen = sum(map(len, batches)), {layer: [] for layer in layers}
    require(images > 0, "calibrate needs images")
    generator = torch.Generator().manual_seed(0)

    def keep(layer, inputs):
        check_input(layer.name, inputs[0])
        flat = inputs[0].flatten()
        layer.input_quantizer.signed |= (flat < 0).any()
        count = math.ceil(values * len(inputs[0]) / images)
        if count < len(flat):
            drawn = torch.randint(len(flat), (count,), generator=generator)
            flat = flat[drawn.to(flat.device)]
        seen[layer].append(flat.clone())

    classifier.eval()
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            layer.set_bits(FLOAT_BITS, FLOAT_BITS)
            layer.input_quantizer.signed.fill_(False)
            layer.input_quantizer.initial_steps.zero_()  # until all is seen
            hooks.enter_context(layer.register_forward_pre_hook(keep))
        for batch in batches:
            classifier(batch)
    for layer in layers:
        layer.input_quantizer.observe(torch.cat(seen[layer])[None])
        layer.weight_quantizer.observe(layer.weight.flatten(1))


def bitops_ratio(table: list[Layer], policy: Policy) -> float:
    """The sum of MACs * b_w * b_a, over that of 32-bit floats."""
    bitops = sum(layer.macs * math.prod(policy[layer.name]) for layer in table)
    return bitops / sum(layer.macs * FLOAT_BITS**2 for layer in table)


def size_bytes(table: list[Layer], policy: Policy) -> int:
    """size(P): the weights' bits, in whole bytes."""
    return math.ceil(sum(layer.weights * policy[layer.name][0] for layer in table) / 8)


def uniform_policy(table: list[Layer], bits: int, first_last_bits=FIRST_LAST_BITS) -> Policy:
    """The same bit-width everywhere but in the first and the last layer."""
    widths = [first_last_bits, *[bits] * (len(table) - 2), first_last_bits]
    return {layer.name: [width, width] for layer, width in zip(table, widths)}


def enforce_budget(table: list[Layer], policy: Policy, budget: float) -> Policy:
    """The policy, forced under a fraction of the float BitOPs (HAQ, 3.3).
    Rounds from the last inner layer back take a bit from an input, then its weights."""
    policy = {name: list(bits) for name, bits in policy.items()}
    operands = [(policy[row.name], i) for row in reversed(table[1:-1]) for i in (1, 0)]
    for bits, i in operands * (MAX_BITS - MIN_BITS):
        if bits[i] > MIN_BITS and bitops_ratio(table, policy) > budget:
            bits[i] -= 1
    ratio = bitops_ratio(table, policy)
    require(ratio <= budget, f"--budget {budget:g} is too low: the least is {ratio:.6f}")
    return policy


# ---- the integer network ----
@torch.no_grad()
def integer_network(classifier: nn.Module, batch: int = 2, backends=("int8", "float32")):
    """The network as it is certified: a frozen copy, in evaluation mode.
    Layers run on the first of `backends` with exact sums at this batch, by which GPUs
    choose kernels. Backends differ only at rounding ties. ValueError: hooks, inexact
    sums, inputs that are not finite; FloatingPointError: such weights."""
    network, used = copy.deepcopy(classifier).eval(), set()
    body, layers = body_of(network), quant_layers(network)
    for name in [name for name in layers if layers[name].w_bits != FLOAT_BITS]:
        require(not is_hooked(layers[name]), f"layer {name} has hooks")
        layer = layers[name].freeze()
        if not (layer.scale.abs() + layer.shift.abs() < 1e20).all():  # sums stay finite
            raise FloatingPointError(f"layer {name}: weights are not finite")
        backend = next((b for b in backends if has_exact_sums(layer, b, batch)), None)
        require(backend, f"layer {name}: no sums are exact here; use --device cpu")
        body.set_submodule(name, BACKENDS[backend](layer).eval())
        used.add(backend)
    network.backend = "+".join(sorted(used, reverse=True)) or "float"
    if not is_hooked(network) and {*map(type, body.modules())} <= FINITE:
        for layer in list(quant_layers(network).values())[1:]:
            layer.reads_kernel = True
        if type(body) is CifarResNet and "int8" in used:
            fuse_blocks(body)
    return network


def has_exact_sums(layer, backend: str, batch: int) -> bool:
    """Whether random and largest inputs (saturated without VNNI) add up exactly."""
    generator, shape = torch.Generator().manual_seed(0), (2, *layer.in_shape)
    q = torch.randint(layer.q_min, layer.q_max + 1, shape, generator=generator)
    q[1] = layer.q_min
    q[1, :, : (shape[2] + 1) // 2] = layer.q_max
    exact = F.conv2d(q.double(), layer.weight.cpu().double(), **layer.conv).float()
    copies, device = ((batch + 1) // 2, 1, 1, 1), layer.weight.device
    many = q.float().repeat(copies).to(device, memory_format=torch.channels_last)
    try:
        sums = BACKENDS[backend](layer).accumulate(many)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError):  # not here
        return False
    return torch.equal(sums, exact.to(device).repeat(copies))


# ---- saved networks ----
MAGIC, VERSION = b"ARQ\n", 2


def regroup(numbers: Tensor, bits: int, new_bits: int) -> Tensor:
    """Unsigned numbers as numbers of other bits, lowest first."""
    planes = (numbers.short()[:, None] >> torch.arange(bits, dtype=torch.int16)) & 1
    planes = F.pad(planes.flatten(), (0, -planes.numel() % new_bits)).view(-1, new_bits)
    return (planes << torch.arange(new_bits, dtype=torch.int16)).sum(1)


@torch.no_grad()
def pack_model(classifier: Classifier, table: list[Layer], description: dict) -> bytes:
    """A quantized network as one file; ValueError: it could not be loaded again.
    MAGIC; version; size of header; header (JSON); per layer weights, then a_step, scale
    and shift in float32; SHA-256 of all that."""
    for key in ("arch", "image_size", "sigma", "dataset", "classes"):
        require(key in description, f"the description lacks {key!r}")
    known = isinstance(classifier, Classifier) and description["arch"] in NETWORKS
    require(known, f"{description['arch']!r}: only a Classifier of NETWORKS loads")
    require(len(description["classes"]) == table[-1].c_out, "more or fewer classes")
    inside, names = tuple(f"{row.name}." for row in table), classifier.net.state_dict()
    outside = [name for name in names if not name.startswith(inside)]
    require(not outside, f"only layers are packed, not {outside[:3]}")
    frozen = [quant_layers(classifier)[row.name].freeze() for row in table]
    header = {**description, "signed": [int(layer.signed) for layer in frozen]}
    header["policy"] = [[layer.w_bits, layer.a_bits] for layer in frozen]
    header["mean"] = classifier.mean.flatten().tolist()
    header["std"] = classifier.std.flatten().tolist()
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    data = MAGIC + struct.pack("<HI", VERSION, len(text)) + text
    for layer in frozen:
        unsigned = layer.weight.flatten().cpu().short() + 2 ** (layer.w_bits - 1) - 1
        octets = regroup(unsigned, layer.w_bits, 8).to(torch.uint8)
        floats = torch.cat([layer.a_step.view(1), layer.scale, layer.shift]).cpu()
        data += octets.numpy().tobytes() + floats.numpy().tobytes()
    return data + hashlib.sha256(data).digest()


def read_packed(path) -> tuple[dict, bytes]:
    """Header and tensors of a packed file. ValueError: another, or broken."""
    data = Path(path).read_bytes()
    require(data[:4] == MAGIC, f"{path}: no packed network")
    version, length = struct.unpack_from("<HI", data.ljust(10, b"\0"), 4)
    require(version <= VERSION, f"{path} is of version {version}: update this program")
    whole = hashlib.sha256(data[:-32]).digest() == data[-32:]
    require(whole, f"{path} is truncated or altered: copy it again")
    return json.loads(data[10 : 10 + length]), data[10 + length : -32]


def load_model(path) -> tuple[Classifier, list[Layer], dict]:
    """What pack_model saved: frozen classifier, table, description."""
    saved, data = read_packed(path)
    numbers = len(saved["classes"]), saved["mean"], saved["std"]
    classifier = build_classifier(saved["arch"], *numbers)
    table = quantize_model(classifier, saved["image_size"])
    for row, bits, signed in zip(table, saved["policy"], saved["signed"], strict=True):
        layer, count = classifier.net.get_submodule(row.name), 1 + 2 * row.c_out
        layer.w_bits, layer.a_bits = bits
        layer.input_quantizer.signed.fill_(signed)
        size = math.ceil(row.weights * layer.w_bits / 8)
        octets = torch.frombuffer(bytearray(data[:size]), dtype=torch.uint8)
        unsigned = regroup(octets, 8, layer.w_bits)[: row.weights].view_as(layer.weight)
        weight = (unsigned - 2 ** (layer.w_bits - 1) + 1).to(torch.int8)
        floats = torch.frombuffer(bytearray(data[size:]), dtype=torch.float32, count=count)
        scaling = floats[0], *floats[1:].split(row.c_out)
        classifier.net.set_submodule(row.name, IntegerLayer(layer, weight, *scaling))
        data = data[size + 4 * count :]
    whole = not data and len(classifier.net.state_dict()) == 4 * len(table)
    require(whole, f"{path} lacks or adds tensors")
    saved["policy"] = {row.name: bits for row, bits in zip(table, saved["policy"])}
    return classifier.eval(), table, saved


# ---- faster, the same up to rounding ties: skip at first reading ----
class Int8Layer(IntegerLayer):
    """The same on oneDNN; in a FusedBlock from and to uint8, too."""

    def __init__(self, layer: IntegerLayer):
        nn.Module.__init__(self)
        vars(self).update(vars(layer))  # the same tensors
        require(self.largest_sum < 2**31, "int8 layers add up in 32 bits")
        self.step, self.ones = float(self.a_step), torch.ones_like(self.scale)
        self.zero_points = torch.zeros(len(self.weight), dtype=torch.int64)
        prepack = torch.ops.onednn.qconv_prepack
        self.packed = prepack(self.weight, self.ones, 1.0, -self.q_min, *self.conv.values())

    def compute(self, x: Tensor, relu="none", reader=None, residual=None) -> Tensor:
        """A FusedBlock adds and overwrites a residual; a reader gets integers."""
        q = x if x.dtype == torch.uint8 else self._to_uint8(x, self.step)
        if reader is None:
            return self._convolve(q, self.scale, self.shift, relu, torch.float, residual)
        epilogue = self.scale / reader.a_step, self.shift / reader.a_step
        return self._convolve(q, *epilogue, relu, torch.uint8).clamp_(max=reader.q_max)

    def accumulate(self, q: Tensor) -> Tensor:
        return self._convolve(self._to_uint8(q, 1.0), self.ones, None)

    def _to_uint8(self, x: Tensor, step: float) -> Tensor:
        """round(x / step) - q_min, clipped: one pass, fast."""
        packed = torch.quantize_per_tensor(x, step, -self.q_min, torch.quint8)
        q = torch.empty(0, dtype=torch.uint8)
        q.set_(packed.untyped_storage(), 0, packed.shape, packed.stride())  # no copy
        return q.clamp_(max=self.q_max - self.q_min)

    def _convolve(self, q, scale, shift, relu="none", dtype=torch.float, residual=None):
        op = torch.ops.onednn.qconv2d_pointwise
        operands = q, 1.0, -self.q_min, self.packed, scale, self.zero_points
        results = shift, *self.conv.values(), 1.0, 0, dtype
        if residual is None:
            return op(*operands, *results, relu, [], "")
        residual = residual.contiguous(memory_format=torch.channels_last)
        return op.binary(*operands, residual, *results, 1.0, 0, "sum", 1.0, relu, [], "")

    def __reduce_ex__(self, protocol):
        raise ValueError("integer_network made this; pack_model saves it")


warnings.filterwarnings("ignore", "torch.quantize_per_tensor")  # without it: float32
BACKENDS = {"int8": Int8Layer, "float32": IntegerLayer.freeze}
# Of these, only the first layer can read what is not finite.
FINITE = {Int8Layer, IntegerLayer, CifarResNet, BasicBlock, nn.Sequential, nn.Identity}
FINITE |= {nn.ReLU, nn.ReLU6, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Dropout}
FINITE |= {ResNet, Bottleneck, MobileNetV2, InvertedResidual, Conv2dNormActivation}


class FusedBlock(BasicBlock):
    """A BasicBlock in two kernels; the sum overwrites x, which nobody else reads."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.conv1(x, "relu", self.conv2)
        residual = x if self.downsample is None else self.downsample(x)
        return self.conv2(q, "relu", None, residual)


def is_hooked(module: nn.Module) -> bool:
    """Whether a pass does more than the class of some part says."""
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in module.modules()]
    return any(hooks) or any("forward" in vars(m) for m in module.modules())


def fuse_blocks(net: CifarResNet) -> None:
    """Fuse blocks of int8 layers, unless most logits change: ties are few."""
    parts = {Int8Layer, nn.Identity, nn.ReLU, Conv2dNormActivation}
    blocks = [m for m in net.modules() if type(m) is BasicBlock]
    blocks = [block for block in blocks if {*map(type, block.children())} <= parts]
    x = torch.randn(8, *net.conv1.in_shape, generator=torch.Generator().manual_seed(0))
    expected = net(x)
    for block in blocks:
        block.__class__ = FusedBlock
    changed = (net(x) - expected).abs().amax(1) > 1e-4 * expected.abs().max()
    if changed.float().mean() >= 0.5:
        for block in blocks:
            block.__class__ = BasicBlock
