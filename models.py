"""Networks, the quantizer, and what a bit-width policy costs.

    table = quantize_model(classifier, image_size)       # every layer becomes a QuantLayer, in place
    calibrate(classifier, batches)                       # step sizes for every bit-width
    set_policy(classifier, uniform_policy(table, 4))     # bit-widths change at any time; then train
    network = integer_network(classifier)                # what is evaluated and certified
    data = pack_model(classifier, table, description)    # the same integers as a file

Sources: LSQ (Esser et al., ICLR 2020), learned steps; He et al. (2016), section 4.2, CIFAR ResNets.
"""

import copy
import functools
import hashlib
import json
import math
import operator
import re
import struct
import warnings
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

MIN_BITS, MAX_BITS, FLOAT_BITS = 2, 8, 32
FIRST_LAST_BITS = 8  # the first and the last layer keep them in every policy
Policy = dict[str, list[int]]
MAGIC, VERSION = b"ARQ\n", 2  # of packed files
WRAPPED = "state_dict", "net", "model", "model_state_dict", "model_ema"  # where checkpoints keep weights
PREFIXES = "module.", "_orig_mod.", "model.", "net.", "1."  # of what wraps a network in checkpoints
NORMALISE = "mean means mu std stds sds sigma".split()  # what their layers call its numbers
LAYERS, NORMS = (nn.Conv2d, nn.Linear), (nn.BatchNorm1d, nn.BatchNorm2d)
ADDS = (operator.add, operator.iadd, torch.add)
warnings.filterwarnings("ignore", "torch.quantize_per_tensor")  # without it, layers leave int8 for float32
KERNEL = "template <typename T> T quantize(T v, T step, T low, T high)"
KERNEL += "{ T q = rint(v / step); return q < low ? low : q > high ? high : q; }"
fused_quantize = torch.cuda.jiterator._create_jit_fn(KERNEL, low=0, high=0)  # is compiled when a GPU runs it
RELUS = {F.relu: math.inf, torch.relu: math.inf, nn.ReLU: math.inf, nn.ReLU6: 6.0}  # and their limits


def refuse(wrong, message: str) -> None:
    if wrong:
        raise ValueError(message)


def require(condition, message: str) -> None:
    if not condition:
        raise ValueError(message)


# ---- networks ----
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # mean, standard deviation
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PaddedShortcut(nn.Module):
    """Option A: every second pixel, and channels of zeros on both sides, instead of a 1x1 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for small images: three stages of n blocks with 16, 32 and 64 channels."""

    def __init__(self, depth: int, num_classes: int, option_a: bool = False):
        super().__init__()

        def shortcut(c_in: int, c_out: int) -> nn.Module:
            conv = nn.Conv2d(c_in, c_out, 1, 2, bias=False)
            return PaddedShortcut() if option_a else nn.Sequential(conv, nn.BatchNorm2d(c_out))

        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(BasicBlock(16, 16))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2, shortcut(16, 32)))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2, shortcut(32, 64)))
        for channels, layer in ((16, self.layer1), (32, self.layer2), (64, self.layer3)):
            layer.extend([BasicBlock(channels, channels) for _ in range((depth - 2) // 6 - 1)])
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class Classifier(nn.Module):
    """Images in [0, 1], noisy or not, to logits: normalisation, then the network `net`."""

    def __init__(self, net: nn.Module, mean=CIFAR10[0], std=CIFAR10[1]):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)


# Another network is another line: its constructor, which takes num_classes, and its usual normalisation.
NETWORKS = {
    "resnet18": (torchvision.models.resnet18, IMAGENET),
    "resnet50": (torchvision.models.resnet50, IMAGENET),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, IMAGENET),
}
for depth in (8, 20, 32, 44, 56, 110):
    NETWORKS[f"resnet{depth}"] = (functools.partial(CifarResNet, depth), CIFAR10)


def build_classifier(arch: str, num_classes: int, mean=None, std=None, **options) -> Classifier:
    """A float Classifier by name, normalised as is usual for it unless mean and std are given."""
    refuse(arch not in NETWORKS, f"unknown network {arch!r}; there are {', '.join(NETWORKS)}")
    constructor, usual = NETWORKS[arch]
    return Classifier(constructor(num_classes=num_classes, **options), mean or usual[0], std or usual[1])


def load_pretrained(classifier: Classifier, arch: str) -> None:
    """torchvision's weights, downloaded; if the classes differ, all but the last layer. Raises OSError."""
    state = torchvision.models.get_model_weights(arch).DEFAULT.get_state_dict(progress=False, check_hash=True)
    own = classifier.net.state_dict()
    own.update({name: value for name, value in state.items() if value.shape == own[name].shape})
    classifier.net.load_state_dict(own)


def read_state_dict(path) -> dict[str, Tensor]:
    """The one state dict in a checkpoint file, bare or wrapped. Raises ValueError, naming what is there."""
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for files that are no checkpoints
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds {unsafe[1]}" if unsafe else (str(error) or "it is empty").splitlines()[0][:60]
        saving = f"torch.save(torch.load({str(path)!r}, weights_only=False)['state_dict'], 'new.pt')"
        reason = f"not a PyTorch checkpoint of tensors and plain values ({what}); if you trust it, {saving}"
        raise ValueError(f"{path}: {reason}") from None
    raw = raw if isinstance(raw, dict) else {}
    states = [raw[key] for key in WRAPPED if isinstance(raw.get(key), dict)] or [raw]
    state = {key: value for key, value in states[0].items() if isinstance(value, Tensor)}
    clear = len(states) == 1 and state and all(isinstance(key, str) for key in state)
    refuse(not clear, f"{path} holds {list(raw)[:6]}, not one state dict of named tensors; save that alone")
    return state


def load_base_checkpoint(path, arch: str, num_classes: int, mean=None, std=None) -> Classifier:
    """A float Classifier from a file in a layout in public use; mean and std override what that implies.
    Taken: a state dict, bare or wrapped, behind any of PREFIXES, with the numbers of a normalise layer (in
    [0, 1] or 0..255); CIFAR ResNets with shortcuts named `shortcut`, or with none (option A; with a last
    layer `linear`, ImageNet's normalisation is meant). Raises ValueError for others."""
    state = read_state_dict(path)
    numbers = sorted(key for key in state if key.rpartition(".")[2] in NORMALISE)  # the mean comes first
    values = [state.pop(key).flatten().float() for key in numbers]
    if values and not (mean and std):
        one = len(values) == 2 and {len(value) for value in values} <= {1, 3}
        refuse(not one, f"{path}: {numbers} are no one normalisation; give --mean and --std")
        unit = 255 if max(map(torch.max, values)) > 2 else 1
        mean, std = (own or (v / unit).expand(3).tolist() for own, v in zip((mean, std), values))
    while state and (prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), "")):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    options = {}
    if getattr(NETWORKS[arch][0], "func", None) is CifarResNet:
        if not any(".shortcut." in key or ".downsample." in key for key in state):
            options["option_a"] = True
            if "linear.weight" in state:
                mean, std = mean or IMAGENET[0], std or IMAGENET[1]
        for old, new in (("linear.", "fc."), (".shortcut.", ".downsample.")):
            state = {key.replace(old, new): value for key, value in state.items()}
    classifier = build_classifier(arch, num_classes, mean, std, **options)
    try:
        classifier.net.load_state_dict(state)
    except RuntimeError as error:
        reason = f"give the --arch it was trained with ({str(error).splitlines()[1].strip()[:80]})"
        raise ValueError(f"{path} holds no {arch} with {num_classes} classes; {reason}") from None
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
    if v.is_cuda:  # one kernel, which passes over memory once
        return fused_quantize(v, step, low=q_min, high=q_max)
    return (v / step).round_().clamp_(q_min, q_max)


class FakeQuantize(torch.autograd.Function):
    """step * round(clip(v / step)) with LSQ's gradients (Esser et al., section 2.1).
    For v: 1 inside the clip range, else 0. For the step: q - v/step inside and q outside, over Q^2 sqrt(N),
    with N elements per step (of one sample, for an input) and Q = q_max; LSQ has sqrt(N Q): departure 1."""

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
        grad_v = torch.ops.aten.hardtanh_backward(grad, scaled, *ctx.range)  # grad inside, else 0
        if step.ndim > 0:
            q = torch.round(scaled).clamp_(*ctx.range)
            grad_step = (grad * q - grad_v * scaled).sum_to_size(step.shape)
        else:  # the same as dot products: no product is kept; channels last, as memory lies
            grad, inside, scaled = (x.movedim(1, -1).reshape(-1) for x in (grad, grad_v, scaled))
            grad_step = -inside.dot(scaled) + grad.dot(scaled.round_().clamp_(*ctx.range))
        return grad_v, grad_step * ctx.gradient_scale, None, None, None


@torch.no_grad()
def best_step(v: Tensor, q_min: int, q_max: int) -> Tensor:
    """Step with the least squared quantization error for each row of v (rows, elements): (rows,)."""
    largest = v.abs().amax(1, keepdim=True).clamp_min(1e-8)
    steps = [fraction * largest / q_max for fraction in torch.linspace(0.15, 1.0, 32).tolist()]
    errors = [(quantize(v, step, q_min, q_max) * step - v).square_().sum(1, keepdim=True) for step in steps]
    best = torch.cat(errors, 1).argmin(1, keepdim=True)
    return torch.cat(steps, 1).gather(1, best).squeeze(1)


class LSQ(nn.Module):
    """The quantizer of one operand: learned step sizes, simulated bits in training.
    channels: of a weight, with a step for each and a symmetric range; None for an input, with one step.
    Another quantizer is a subclass: `initial_step`, `forward`, `integers`; certified is step * integers(v)"""

    initial_step = staticmethod(best_step)  # (v (rows, elements), q_min, q_max) -> (rows,)

    def __init__(self, channels: int | None = None):
        super().__init__()
        self.is_weight, self.bits = channels is not None, FLOAT_BITS
        self.register_buffer("signed", torch.tensor(self.is_weight))  # of an input: found by `calibrate`
        shape = (channels,) if self.is_weight else ()
        self.step = nn.Parameter(torch.ones(shape))
        self.register_buffer("initial_steps", torch.zeros(MAX_BITS + 1, *shape))  # by bit-width

    @torch.no_grad()
    def observe(self, v: Tensor) -> None:
        """Find the initial step for every bit-width from values v (rows, elements), one row per step."""
        for bits in range(MIN_BITS, MAX_BITS + 1):
            step = self.initial_step(v, *integer_range(bits, bool(self.signed), self.is_weight))
            self.initial_steps[bits] = step.view(self.step.shape)

    def set_bits(self, bits: int) -> None:
        """Change the bit-width, and start at its initial step. Raises ValueError before `calibrate`."""
        if bits != FLOAT_BITS:
            refuse(not self.initial_steps[bits].all(), "no step sizes yet: call calibrate before set_policy")
            self.q_min, self.q_max = integer_range(bits, bool(self.signed), self.is_weight)
            self.step.data.copy_(self.initial_steps[bits])
        self.bits = bits

    def forward(self, v: Tensor) -> Tensor:
        """v (channels or B, ...) as its integers say, with gradients for v and the step."""
        if self.bits == FLOAT_BITS:
            return v
        return FakeQuantize.apply(v.float(), self.step_for(v), self.q_min, self.q_max, v[0].numel())

    def integers(self, v: Tensor) -> Tensor:
        """The integers behind `forward`, as floats."""
        return quantize(v, self.step_for(v), self.q_min, self.q_max)

    def step_for(self, v: Tensor) -> Tensor:
        """The step, shaped to divide v. Whatever an optimizer made of it, it stays positive."""
        self.step.data.clamp_(min=1e-6)
        return self.step.view(-1, *[1] * (v.ndim - 1)) if self.is_weight else self.step


class QuantLayer(nn.Module):
    """A convolution or linear layer with its BatchNorm; quantizes its own weights and its own input.
    At 32 bits it is the float layer. At fewer it simulates them, with BatchNorm in float."""

    def __init__(self, layer: nn.Module, norm: nn.Module, in_shape: tuple, quantizer=LSQ):
        super().__init__()
        self.weight, self.bias, self.norm = layer.weight, layer.bias, norm
        self.is_linear, self.in_shape = isinstance(layer, nn.Linear), (*in_shape, 1, 1)[:3]
        as_conv = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}  # a linear layer
        self.conv = {name: getattr(layer, name, value) for name, value in as_conv.items()}
        self.weight_quantizer, self.input_quantizer = quantizer(len(layer.weight)), quantizer()
        self.w_bits = self.a_bits = FLOAT_BITS

    def set_bits(self, w_bits: int, a_bits: int) -> None:
        """Change the bit-widths; step sizes start anew."""
        self.weight_quantizer.set_bits(w_bits)
        self.input_quantizer.set_bits(a_bits)
        self.w_bits, self.a_bits = w_bits, a_bits

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight_quantizer(self.weight)
        a = self.input_quantizer(x)
        out = F.linear(a, w, self.bias) if self.is_linear else F.conv2d(a, w, self.bias, **self.conv)
        return self.norm(out)

    @torch.no_grad()
    def freeze(self) -> "Integers":
        """norm(conv(a, w) + bias) with a = s_a q_a, w = s_w q_w as conv(q_a, q_w) * scale + shift."""
        w, a, norm = self.weight_quantizer, self.input_quantizer, self.norm
        refuse(w.bits == FLOAT_BITS, "a layer of 32 bits has no integers; keep its state_dict instead")
        weight = w.integers(self.weight).to(torch.int8)
        scale = w.step * a.step_for(weight)
        shift = torch.zeros_like(scale) if self.bias is None else self.bias.detach()
        if not isinstance(norm, nn.Identity):
            gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            scale, shift = scale * gain, (shift - norm.running_mean) * gain + norm.bias
        weight = weight[:, :, None, None] if self.is_linear else weight
        of = weight, a.step.detach(), scale, shift, w.bits, a.bits, bool(a.signed)
        return Integers(*of, self.conv, self.in_shape)


# A frozen layer as data: what is packed, what every backend runs. weight: int8 (c_out, c_in / groups, h, w),
# of a linear layer as a 1x1 convolution; a_step: (); scale, shift: (c_out,); conv: stride and so on.
Integers = namedtuple("Integers", "weight a_step scale shift w_bits a_bits signed conv in_shape")


class IntegerLayer(nn.Module):
    """A frozen layer in plain float arithmetic: out = conv(round(x / a_step), weight) * scale + shift.
    float32 holds integers exactly below 2^24; a layer whose sums can get larger takes float64."""

    backend = "float32"

    def __init__(self, integers: Integers):
        super().__init__()
        for name in ("weight", "a_step", "scale", "shift"):
            self.register_buffer(name, getattr(integers, name).clone())
        self.w_bits, self.a_bits, self.signed, self.conv, self.in_shape = integers[4:]
        self.q_min, self.q_max = integer_range(self.a_bits, self.signed)
        largest = max(-self.q_min, self.q_max) * self.weight.flatten(1).cpu().double().abs().sum(1).max()
        self.sum_type = torch.float32 if largest < 2**24 else torch.float64

    def freeze(self) -> Integers:
        return Integers(*(getattr(self, name) for name in Integers._fields))

    def forward(self, x: Tensor) -> Tensor:
        q = quantize(x, self.a_step, self.q_min, self.q_max)
        acc = self.accumulate(q[:, :, None, None] if x.ndim == 2 else q)
        out = torch.addcmul(self.shift[:, None, None], acc, self.scale[:, None, None])
        return out.flatten(1) if x.ndim == 2 else out

    def accumulate(self, q: Tensor) -> Tensor:
        """conv(q, weight) for integers q given as floats: exact, rounded to float32 once."""
        return F.conv2d(q.to(self.sum_type), self.weight.to(self.sum_type), **self.conv).float()


def exact_layer(kind: type, integers: Integers, batch: int) -> IntegerLayer | None:
    """A layer of this kind if its sums on this device are those of integers, for random and extreme inputs.
    Processors without VNNI saturate the sum of two products; the largest inputs show that."""
    generator = torch.Generator().manual_seed(0)
    q_min, q_max = integer_range(integers.a_bits, integers.signed)
    q = torch.randint(q_min, q_max + 1, (2, *integers.in_shape), generator=generator)
    q[1, :, (integers.in_shape[1] + 1) // 2 :] = q_min
    q[1, :, : (integers.in_shape[1] + 1) // 2] = q_max
    exact = F.conv2d(q.double(), integers.weight.cpu().double(), **integers.conv).float()
    exact, q = exact.to(integers.weight.device), q.float().to(integers.weight.device)
    copies = max(1, batch // 2), 1, 1, 1
    try:
        layer = kind(integers)
        many = q.repeat(copies).contiguous(memory_format=torch.channels_last)
        return layer if torch.equal(layer.accumulate(many), exact.repeat(copies)) else None
    except (RuntimeError, ValueError, TypeError, AttributeError):  # not on this device, or another torch
        return None


# ---- the layer table and what a policy costs ----
# One row of the layer table, in order of execution; kernel, stride and map_size (the input's) count one side;
# name: the module's path inside `classifier.net`, or inside the module itself.
Layer = namedtuple("Layer", "name c_in c_out kernel stride map_size weights macs depthwise")


@torch.no_grad()
def quantize_model(classifier: nn.Module, image_size: int, quantizer=LSQ) -> list[Layer]:
    """Replace every convolution and linear layer, and the BatchNorm it feeds, by a QuantLayer at 32 bits.
    Shapes are read off one forward pass of a random square image. Where BatchNorms do not simply follow
    layers (pre-activation networks), all stay float layers. quantizer: a class as LSQ. Returns the layer
    table. Raises ValueError, which names the layer, and leaves the network as it was, unless each layer runs
    exactly once, nothing else has weights, and 32 bits compute what the float network did."""
    for name, module in classifier.named_modules():
        parametrized = isinstance(module, LAYERS) and "weight" not in module._parameters
        refuse(parametrized, f"layer {name} has a parametrized weight; remove the parametrization first")
        other = any(p.numel() > max(p.shape, default=1) for p in module.parameters(recurse=False))
        kind = f"layer {name}, {type(module).__name__}, has weights that cannot be quantized"
        refuse(other and not isinstance(module, LAYERS), f"{kind}; Conv2d's and Linear's can")
    twin = copy.deepcopy(classifier).eval()  # all is tried on copies
    body, some = twin.net if isinstance(twin, Classifier) else twin, next(twin.parameters())
    refuse(some.dtype != torch.float32, f"the network is in {some.dtype}; call its float() first")
    names = {module: name for name, module in body.named_modules()}
    everything = [module for _, module in body.named_modules(remove_duplicate=False)]
    layers = [module for module in names if isinstance(module, LAYERS)]
    norms = [m for m in names if isinstance(m, NORMS) and m.affine and m.track_running_stats]
    calls, channels = [], getattr(layers[0], "in_channels", 3)
    for module in layers + norms:
        module.register_forward_hook(lambda module, inputs, out: calls.append((module, inputs[0], out)))
    probe = torch.rand(1, channels, image_size, image_size, device=some.device)
    expected = twin(probe)
    refuse(not isinstance(expected, Tensor), f"the network returns a {type(expected).__name__}, not logits")
    refuse(not expected.isfinite().all(), "the network's logits are not finite: check its normalisation")
    for layer in layers:
        times = [module for module, *_ in calls].count(layer)
        runs = f"layer {names[layer]} runs {times} times in a pass, not once"
        refuse(times != 1, f"{runs} (if never: torchvision has aux_logits=False for that)")
        refuse(everything.count(layer) > 1, f"layer {names[layer]} has a second name; register it once")

    table, producer, norm_of = [], {}, {}  # id of an output -> its layer -> its BatchNorm
    for module, x, out in calls:
        if module in norms:
            norm_of[producer.get(id(x))] = names[module]
            continue
        name = producer[id(out)] = names[module]
        is_linear, shape = isinstance(module, nn.Linear), tuple(x.shape)
        refuse(is_linear and x.ndim > 2, f"layer {name} is linear on {shape}, not on (batch, features)")
        side = (1, 1, 1) if is_linear else (module.kernel_size[0], module.stride[0], shape[-1])
        weights, depthwise = module.weight.numel(), getattr(module, "groups", 1) == shape[1] > 1
        macs = weights * out[0, 0].numel()  # weights times output positions
        table.append(Layer(name, shape[1], out.shape[1], *side, weights, macs, depthwise))

    def replace(network: nn.Module, norm_of: dict) -> nn.Module:
        body = network.net if isinstance(network, Classifier) else network
        for row in table:
            layer, norm = body.get_submodule(row.name), nn.Identity()
            if row.name in norm_of:
                norm = body.get_submodule(norm_of[row.name])
                body.set_submodule(norm_of[row.name], nn.Identity())
            quantized = QuantLayer(layer, norm, (row.c_in, *[row.map_size] * 2), quantizer)
            body.set_submodule(row.name, quantized.train(layer.training).to(some.device))
        return network

    for folded in (norm_of, {}):
        if torch.equal(replace(copy.deepcopy(classifier).eval(), folded)(probe), expected):
            replace(classifier, folded)
            return table
    raise ValueError("the network computes something else with QuantLayers; does it pad with zeros?")


def quant_layers(classifier: nn.Module) -> dict[str, QuantLayer | IntegerLayer]:
    """The quantizable layers, or what they were frozen to, by name."""
    body = classifier.net if isinstance(classifier, Classifier) else classifier
    return {name: m for name, m in body.named_modules() if isinstance(m, (QuantLayer, IntegerLayer))}


def check_policy(names, policy: Policy) -> None:
    differ = sorted(set(names) ^ policy.keys())
    refuse(differ, f"the policy's layers are others: {differ[:3]} ...")
    for name, (w_bits, a_bits) in policy.items():
        possible = {w_bits, a_bits} <= {*range(MIN_BITS, MAX_BITS + 1)} or w_bits == a_bits == FLOAT_BITS
        refuse(not possible, f"layer {name}: bits are 2 to 8, or both 32, not {w_bits} and {a_bits}")


def set_policy(classifier: nn.Module, policy: Policy) -> None:
    """Set every layer's bit-widths. Raises ValueError unless the policy names exactly the layers."""
    layers = quant_layers(classifier)
    check_policy(layers, policy)
    for name, bits in policy.items():
        layers[name].set_bits(*bits)


@torch.no_grad()
def calibrate(classifier: nn.Module, batches: Sequence[Tensor], values: int = 65536) -> None:
    """Find, on the float network, initial step sizes for every bit-width, and which inputs are signed.
    batches: images (B, 3, H, W) as the network will see them, noise included. Steps have the least squared
    error on weights and about `values` inputs per layer; inputs never below 0 are unsigned. Leaves 32 bits"""
    layers = quant_layers(classifier).values()
    seen: dict[QuantLayer, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer, inputs):
        flat = inputs[0].flatten()
        layer.input_quantizer.signed |= (flat < 0).any()
        seen[layer].append(flat[:: max(1, len(flat) * len(batches) // values)].clone())

    classifier.eval()
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    for layer in layers:
        layer.set_bits(FLOAT_BITS, FLOAT_BITS)
        layer.input_quantizer.signed.fill_(False)
    for batch in batches:
        classifier(batch)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        layer.input_quantizer.observe(torch.cat(seen[layer])[None])
        layer.weight_quantizer.observe(layer.weight.flatten(1))


def bitops_ratio(table: list[Layer], policy: Policy) -> float:
    """BitOPs(P) / BitOPs(FP32), where BitOPs(P) = sum over layers of MACs * w_bits * a_bits."""
    bitops = sum(layer.macs * math.prod(policy[layer.name]) for layer in table)
    return bitops / sum(layer.macs * FLOAT_BITS**2 for layer in table)


def size_bytes(table: list[Layer], policy: Policy) -> int:
    """size(P): the weights' bits, rounded up to bytes."""
    return math.ceil(sum(layer.weights * policy[layer.name][0] for layer in table) / 8)


def uniform_policy(table: list[Layer], bits: int, first_last_bits: int = FIRST_LAST_BITS) -> Policy:
    """The same bit-width everywhere but in the first and the last layer."""
    widths = [first_last_bits, *[bits] * (len(table) - 2), first_last_bits]
    return {layer.name: [width, width] for layer, width in zip(table, widths)}


def enforce_budget(table: list[Layer], policy: Policy, budget: float) -> Policy:
    """The policy, forced under a fraction of the float network's BitOPs (HAQ, section 3.3).
    From the last layer back, each visit takes one bit from the input, then one from the weights, until the
    policy fits; the first and last layer keep theirs. Raises ValueError if 2 bits everywhere do not fit."""
    policy = {name: list(bits) for name, bits in policy.items()}
    while bitops_ratio(table, policy) > budget:
        before = copy.deepcopy(policy)
        for layer in reversed(table[1:-1]):
            for kind in (1, 0):  # input, weights
                if policy[layer.name][kind] > MIN_BITS and bitops_ratio(table, policy) > budget:
                    policy[layer.name][kind] -= 1
        least = f"2 bits, first and last layer 8, cost {bitops_ratio(table, policy):.6f} of the float BitOPs"
        refuse(policy == before, f"--budget {budget:g} is too low: {least}")
    return policy


# ---- saved networks ----
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
    description: arch, image_size, sigma, dataset and classes, else ValueError. In order: MAGIC; version;
    size of header; header (JSON); per layer weights, a_step, scale, shift in float32; SHA-256 of that."""
    missing = {"arch", "image_size", "sigma", "dataset", "classes"} - description.keys()
    refuse(missing, f"the description of the network lacks {sorted(missing)}")
    refuse(len(description["classes"]) != table[-1].c_out, "the description names more or fewer classes")
    frozen = [quant_layers(classifier)[row.name].freeze() for row in table]
    inside = tuple(f"{row.name}." for row in table)
    rest = {key: v for key, v in classifier.net.state_dict().items() if not key.startswith(inside)}
    header = {
        **description,
        "policy": [[layer.w_bits, layer.a_bits] for layer in frozen],
        "signed": [int(layer.signed) for layer in frozen],
        "mean": classifier.mean.flatten().tolist(),
        "std": classifier.std.flatten().tolist(),
        "float": {key: value.tolist() for key, value in rest.items()},  # BatchNorms of their own
        "option_a": any(isinstance(m, PaddedShortcut) for m in classifier.modules()),
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
    newer, whole = version > VERSION, hashlib.sha256(data[:-32]).digest() == data[-32:]
    refuse(newer, f"{path} was altered or is of version {version}, not {VERSION}; use a newer program")
    refuse(not whole, f"{path} was truncated or altered: its checksum is wrong; copy it again")
    return json.loads(data[10 : 10 + length]), data[10 + length : -32]


def load_model(path) -> tuple[Classifier, list[Layer], dict]:
    """What pack_model saved: the frozen classifier, its layer table, its description.
    `integer_network` makes the classifier fast. Raises ValueError for a file that is broken or newer."""
    saved, data = read_packed(path) or ({}, b"")
    refuse(not saved, f"{path}: not a network saved by this program")
    options = {"option_a": True} if saved["option_a"] else {}
    of = saved["arch"], len(saved["classes"]), saved["mean"], saved["std"]
    classifier = build_classifier(*of, **options)
    table = quantize_model(classifier, saved["image_size"])
    for row, (w_bits, a_bits), signed in zip(table, saved["policy"], saved["signed"], strict=True):
        layer = quant_layers(classifier)[row.name]
        size = math.ceil(row.weights * w_bits / 8)
        count = 1 + 2 * row.c_out
        weight = unpack_bits(data[:size], row.weights, w_bits).view(*layer.weight.shape[:2], row.kernel, -1)
        floats = torch.frombuffer(bytearray(data[size:]), dtype=torch.float32, count=count)
        of = weight, floats[0], *floats[1:].split(row.c_out), w_bits, a_bits, bool(signed)
        classifier.net.set_submodule(row.name, IntegerLayer(Integers(*of, layer.conv, layer.in_shape)))
        data = data[size + 4 * count :]
    rest = {key: torch.tensor(value) for key, value in saved.get("float", {}).items()}
    classifier.net.load_state_dict(rest, strict=False)
    saved["policy"] = {row.name: bits for row, bits in zip(table, saved["policy"])}
    return classifier.eval(), table, saved


# ---- the integer network ----
def integer_network(classifier: nn.Module, batch: int = 2, backends=("int8", "float32")) -> nn.Module:
    """The network as it is evaluated and certified: a frozen copy, in evaluation mode, on the same device.
    Every quantized layer runs on the first of `backends` that is exact for it at batches of `batch`, by which
    GPUs choose kernels; layers of 32 bits stay. `network.backend` names it. RuntimeError if none is exact."""
    network = copy.deepcopy(classifier).eval()
    body = network.net if isinstance(network, Classifier) else network
    used = set()
    for name, layer in quant_layers(network).items():
        if layer.w_bits == FLOAT_BITS:
            continue
        kinds, integers = {"int8": Int8Layer, "float32": IntegerLayer}, layer.freeze()
        broken = not (integers.scale * integers.shift).isfinite().all()
        refuse(broken, f"layer {name}: its weights or its BatchNorm are not finite")
        found = (exact_layer(kinds[backend], integers, batch) for backend in backends)
        frozen = next(filter(None, found), None)
        if frozen is None:
            raise RuntimeError(f"layer {name}: no sums are exact here, or memory is short; use --device cpu")
        body.set_submodule(name, frozen)
        used.add(frozen.backend)
    if "int8" in used and body is network:
        network = fuse(network)
    elif "int8" in used:
        network.net = fuse(body)
    network.backend = "+".join(sorted(used, reverse=True)) or "float"
    return network.eval()


# ---- faster, same integers: skip at first reading ----
class Int8Layer(IntegerLayer):
    """The same integers on oneDNN: inputs are floats, or its integers as uint8 with zero point -q_min."""

    backend = "int8"

    def __init__(self, integers: Integers):
        super().__init__(integers)
        refuse(self.weight.device.type != "cpu", "int8 layers run on CPUs")
        places = (list(self.conv[name]) for name in ("stride", "padding", "dilation"))
        self.settings = *places, self.conv["groups"]
        self.step, self.ones = float(self.a_step), torch.ones(len(self.weight))
        self.zero_points = torch.zeros(len(self.weight), dtype=torch.int64)
        self.packed = torch.ops.onednn.qconv_prepack(self.weight, self.ones, 1.0, -self.q_min, *self.settings)
        self.fused()

    def fused(self, relu: float | None = None, reader: "Int8Layer | None" = None) -> None:
        """Fix what follows the sums: a ReLU up to `relu`; floats, or requantization to reader's integers."""
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
        q = x if x.dtype == torch.uint8 else self._to_uint8(x, self.step)
        q = q[:, :, None, None] if x.ndim == 2 else q
        out = self._convolve(q, *self.epilogue, residual, self.relu, *self.output)
        if self.limits:
            out.clamp_(*self.limits)
        return out.flatten(1) if x.ndim == 2 else out

    def accumulate(self, q: Tensor) -> Tensor:
        return self._convolve(self._to_uint8(q, 1.0), self.ones, None)

    def _to_uint8(self, x: Tensor, step: float) -> Tensor:
        """round(x / step) - q_min, clipped: one pass over floats, four times as fast as a division first."""
        packed = torch.quantize_per_tensor(x, step, -self.q_min, torch.quint8)
        q = torch.empty(0, dtype=torch.uint8)
        q.set_(packed.untyped_storage(), 0, packed.shape, packed.stride())  # its bytes, not copied
        return q.clamp_(max=self.q_max - self.q_min)

    def _convolve(self, q, scale, shift, residual=None, relu="none", zero_point=0, dtype=torch.float32):
        op = torch.ops.onednn.qconv2d_pointwise
        operands = q, 1.0, -self.q_min, self.packed, scale, self.zero_points
        output = shift, *self.settings, 1.0, zero_point, dtype
        if residual is None:
            return op(*operands, *output, relu, [], "")
        residual = residual.contiguous(memory_format=torch.channels_last)  # as the kernel's own output is
        return op.binary(*operands, residual, *output, 1.0, 0, "sum", 1.0, relu, [], "")


def fuse(network: nn.Module) -> nn.Module:
    """The network with sums and ReLUs moved into the int8 layers in front of them; a layer that only another
    int8 layer reads writes that one's integers. What cannot be traced, or fails, comes back as it is."""
    modules, layers, tracer = dict(network.named_modules()), (QuantLayer, IntegerLayer), fx.Tracer()
    is_leaf = tracer.is_leaf_module
    tracer.is_leaf_module = lambda module, name: isinstance(module, layers) or is_leaf(module, name)
    try:
        graph = tracer.trace(network)
        first = next(modules[n.target] for n in graph.nodes if isinstance(modules.get(n.target), layers))
        probe = torch.zeros(2, *first.in_shape)
        ShapeProp(fx.GraphModule(network, graph)).propagate(probe)
    except Exception:  # torch.fx raises many kinds, for networks that it cannot follow
        return network

    def module(node, kind=nn.Module) -> nn.Module | None:
        found = modules.get(node.target) if node.op == "call_module" else None
        return found if isinstance(found, kind) else None

    def only_user(node):
        return next(iter(node.users)) if len(node.users) == 1 else None

    def replace(old, new) -> None:
        old.replace_all_uses_with(new)
        graph.erase_node(old)

    int8 = functools.partial(module, kind=Int8Layer)
    for node in list(graph.nodes):
        if type(module(node)) in (nn.Identity, nn.Dropout):  # nothing, in evaluation
            replace(node, node.args[0])
    relu, overwritten = {}, set()
    for node in filter(int8, list(graph.nodes)):
        after = only_user(node)
        if after and after.target in ADDS and len(after.all_input_nodes) == 2 and not after.kwargs:
            other = next(part for part in after.all_input_nodes if part is not node)
            # The sum overwrites the other part: nobody may read that later, nor may it be a view.
            owned = module(other, (IntegerLayer, nn.MaxPool2d)) or other.target in (*ADDS, F.pad, F.relu)
            owned = owned or module(other, nn.ReLU) and only_user(other.args[0])  # it may be in place
            shapes = [part.meta["tensor_meta"].shape for part in (node, other)]
            alike = shapes[0] == shapes[1] and len(shapes[0]) == 4 and node.args[0] not in overwritten
            if owned and alike and max(other.users) is after:
                overwritten.add(other)
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
    fused = fx.GraphModule(network, graph).eval()
    try:
        fused(probe.clone())
        return fused
    except RuntimeError:  # what the graph does not show
        for layer in filter(lambda module: isinstance(module, Int8Layer), modules.values()):
            layer.fused()
        return network
