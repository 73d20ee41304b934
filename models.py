"""Networks, the quantizer, and what a bit-width policy costs.

A policy is plain data, {layer name: [w_bits, a_bits]}, as in policy.json. `quantize_model` makes any network
of convolutions and linear layers quantizable in place; `set_policy` changes all widths at any time. Training
simulates them (QuantLayer); what is certified is `integer_network`, whose integers `pack_model` saves.

    paper        here           meaning                                             shape
    b_w, b_a     w_bits, a_bits widths of a layer's weights and of its input        2..8, or both 32 (float)
    s_w, s_a     w_step, a_step learned step sizes                                  (c_out,) and ()
    q            quantize(v)    integer round(v / s) within [q_min, q_max]          as v
    MACs[l]      Layer.macs     multiply-accumulates of a layer for one image
    BitOPs(P)    bitops         sum over layers of MACs * w_bits * a_bits
    size(P)      size_bytes     sum over layers of weights * w_bits, in bytes

Sources: LSQ (Esser et al., ICLR 2020), learned steps; He et al. (2016), section 4.2, CIFAR ResNets."""

import copy
import functools
import hashlib
import json
import math
import operator
import struct
from collections import namedtuple
from pathlib import Path
from typing import Optional, Sequence

import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

MIN_BITS, MAX_BITS, FLOAT_BITS, END_BITS = 2, 8, 32, 8
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (8, 20, 32, 44, 56, 110)}
TORCHVISION_NETS = ("resnet18", "resnet50", "mobilenet_v2")
Policy = dict[str, list[int]]


# ---- networks ----

class PaddedShortcut(nn.Module):
    """Option A: every second pixel, and channels of zeros on both sides, instead of a 1x1 convolution."""
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for small images: three stages of n blocks with 16, 32 and 64 channels."""
    def __init__(self, depth: int, num_classes: int, option_a: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1 = nn.Sequential(*[BasicBlock(16, 16) for _ in range(blocks)])
        for stage, c_out in ((2, 32), (3, 64)):
            shortcut = PaddedShortcut() if option_a else nn.Sequential(
                nn.Conv2d(c_out // 2, c_out, 1, 2, bias=False), nn.BatchNorm2d(c_out))
            layer = [BasicBlock(c_out // 2, c_out, 2, shortcut)]
            layer += [BasicBlock(c_out, c_out) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*layer))
        self.fc = nn.Linear(64, num_classes)
        for conv in [module for module in self.modules() if isinstance(module, nn.Conv2d)]:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
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


def build_classifier(arch: str, num_classes: int, mean=None, std=None, option_a: bool = False) -> Classifier:
    """A float Classifier by name: a CIFAR ResNet or one of torchvision's networks, normalised as is usual."""
    if arch in CIFAR_RESNETS:
        net = CifarResNet(CIFAR_RESNETS[arch], num_classes, option_a)
        return Classifier(net, mean or CIFAR10_MEAN, std or CIFAR10_STD)
    if arch not in TORCHVISION_NETS:
        raise ValueError(f"unknown network {arch!r}; there are {[*CIFAR_RESNETS, *TORCHVISION_NETS]}")
    net = getattr(torchvision.models, arch)(weights=None, num_classes=num_classes)
    return Classifier(net, mean or IMAGENET_MEAN, std or IMAGENET_STD)


def load_pretrained(classifier: Classifier, arch: str) -> None:
    """torchvision's weights, downloaded; if the classes differ, all but the last layer. Raises ValueError."""
    weights, own = torchvision.models.get_model_weights(arch).DEFAULT, classifier.net.state_dict()
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network; a download that was cut
        raise ValueError(f"{weights.url} could not be downloaded ({error}); put that file into "
                         f"{torch.hub.get_dir()}/checkpoints") from None
    own.update({name: value for name, value in state.items() if value.shape == own[name].shape})
    classifier.net.load_state_dict(own)


def load_base_checkpoint(path, arch: str, num_classes: int, mean=None, std=None) -> Classifier:
    """A float Classifier from a file in a layout in public use; mean and std override what that implies.
    Taken: a bare state dict; {"state_dict": ...} with prefixes `module.` and `1.` (behind a normalise layer)
    in any order; our own bases; CIFAR ResNets with shortcuts named `shortcut`, or none (option A), whose last
    layer is `linear`, trained with ImageNet's normalisation. Raises ValueError for others, saying why."""
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for files that are no checkpoints
        raise ValueError(f"{path}: not a PyTorch checkpoint of tensors and plain values; save its state_dict "
                         f"alone ({str(error).splitlines()[0][:60]})") from None
    state = raw.get("state_dict", raw) if isinstance(raw, dict) else {}
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    own = [state.pop(name).flatten().tolist() if name in state else None for name in ("mean", "std")]
    mean, std = mean or own[0], std or own[1]  # a base that this program trained
    for prefix in ("module.", "1.", "module.", "net."):  # `0.` are the numbers of a normalise layer in front
        if state and all(key.startswith((prefix, "0.")) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key[:2] != "0."}
    linear = "linear.weight" in state
    state = {k.replace("linear.", "fc.").replace(".shortcut.", ".downsample."): v for k, v in state.items()}
    option_a = arch in CIFAR_RESNETS and not any("downsample" in key for key in state)
    if linear and option_a:
        mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
    classifier = build_classifier(arch, num_classes, mean, std, option_a)
    try:
        classifier.net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold a {arch} with {num_classes} classes; give the --arch it was "
                         f"trained with ({str(error).splitlines()[1].strip()[:80]})") from None
    return classifier


# ---- quantizer ----

def integer_range(bits: int, signed: bool, symmetric: bool = False) -> tuple[int, int]:
    """[q_min, q_max]: 0..2^b - 1 unsigned, -2^(b-1)..2^(b-1) - 1 signed, without the lowest if symmetric."""
    if not signed:
        return 0, 2 ** bits - 1
    q_max = 2 ** (bits - 1) - 1
    return (-q_max if symmetric else -q_max - 1), q_max


def quantize(v: Tensor, step: Tensor, q_min: int, q_max: int) -> Tensor:
    """Integers (as floats) round(v / step), clipped."""
    return (v / step).round_().clamp_(q_min, q_max)


class FakeQuantize(torch.autograd.Function):
    """step * round(clip(v / step)) with LSQ's gradients (Esser et al., section 2.1): for v 1 inside the clip
    range, else 0; for the step q - v/step inside and q outside, times 1 / sqrt(N Q), with N elements per step
    (of one sample for activations) and Q = q_max."""
    @staticmethod
    def forward(ctx, v, step, q_min, q_max, elements):
        scaled = v / step
        ctx.save_for_backward(scaled, step)
        ctx.q_min, ctx.q_max, ctx.gradient_scale = q_min, q_max, 1 / math.sqrt(elements * max(q_max, 1))
        return torch.round(scaled).clamp_(q_min, q_max).mul_(step)

    @staticmethod
    def backward(ctx, grad):
        scaled, step = ctx.saved_tensors
        q = torch.round(scaled).clamp_(ctx.q_min, ctx.q_max)
        inside = (scaled >= ctx.q_min) & (scaled <= ctx.q_max)
        grad_v = grad * inside
        grad_step = torch.addcmul(grad * q, grad_v, scaled, value=-1).sum_to_size(step.shape)
        return grad_v, grad_step * ctx.gradient_scale, None, None, None


@torch.no_grad()
def best_step(v: Tensor, q_min: int, q_max: int) -> Tensor:
    """Step with the least squared quantization error for each row of v (rows, elements): (rows,)."""
    largest = v.abs().amax(1, keepdim=True).clamp_min(1e-8)
    steps = [fraction * largest / q_max for fraction in torch.linspace(0.15, 1.0, 32).tolist()]
    errors = [(quantize(v, step, q_min, q_max) * step - v).square_().sum(1, keepdim=True) for step in steps]
    best = torch.cat(errors, 1).argmin(1, keepdim=True)
    return torch.cat(steps, 1).gather(1, best).squeeze(1)


class QuantLayer(nn.Module):
    """A convolution or linear layer with its BatchNorm, quantizing its own weights and its own input.
    At 32 bits it is the float layer. In training it simulates: fake-quantized input and weights, BatchNorm in
    float. Frozen, it is integers and one float32 epilogue per channel, acc * scale + shift with acc =
    conv(q_a, q_w) and steps, bias and BatchNorm folded into both; `integer_network` chooses how it runs."""
    def __init__(self, layer: nn.Module, norm: nn.Module, in_shape: tuple):
        super().__init__()
        self.weight, self.bias, self.norm = layer.weight, layer.bias, norm
        self.in_shape = (*in_shape, 1, 1)[:3]
        self.linear = isinstance(layer, nn.Linear)
        conv = dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)  # what a linear layer does
        self.conv = {name: getattr(layer, name, value) for name, value in conv.items()}
        self.w_step = nn.Parameter(torch.ones(len(layer.weight)))
        self.a_step = nn.Parameter(torch.ones(()))
        self.register_buffer("calibrated_steps", torch.ones(MAX_BITS + 1))  # activation step, by width
        self.signed = False  # a Python value, so that a GPU need not be asked for it at every layer
        self.w_bits, self.a_bits, self.frozen = FLOAT_BITS, FLOAT_BITS, False
        self.limit, self.ready = None, False  # in an integer network: of a merged ReLU; if integers come in

    def get_extra_state(self) -> bool:  # carries `signed` in the state dict
        return self.signed

    def set_extra_state(self, signed: bool) -> None:
        self.signed = signed

    def set_bits(self, w_bits: int, a_bits: int) -> None:
        """Change the widths and give the steps their initial values for them (see `calibrate`)."""
        self.w_bits, self.a_bits = w_bits, a_bits
        if w_bits != FLOAT_BITS:
            self.w_step.data.copy_(best_step(self.weight.flatten(1), *integer_range(w_bits, True, True)))
            self.a_step.data.copy_(self.calibrated_steps[a_bits])

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        if self.frozen:
            return self._integers(x, residual)
        w, a = self.weight, x
        if self.w_bits != FLOAT_BITS:
            step = self.w_step.view(-1, *[1] * (w.ndim - 1))
            w = FakeQuantize.apply(w, step, *integer_range(self.w_bits, True, True), w[0].numel())
            low, high = integer_range(self.a_bits, self.signed)
            a = FakeQuantize.apply(x.float(), self.a_step, low, high, x[0].numel())
        return self.norm(F.linear(a, w, self.bias) if self.linear else F.conv2d(a, w, self.bias, **self.conv))

    @torch.no_grad()
    def freeze(self) -> None:
        """Replace weights, steps and BatchNorm by integers, activation step, scale and shift."""
        if self.frozen or self.w_bits == FLOAT_BITS:
            return
        step = self.w_step.view(-1, *[1] * (self.weight.ndim - 1))
        scale, norm = self.w_step * self.a_step, self.norm
        shift = torch.zeros_like(scale) if self.bias is None else self.bias
        if not isinstance(norm, nn.Identity):
            gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            scale, shift = scale * gain, (shift - norm.running_mean) * gain + norm.bias
        weight = quantize(self.weight, step, *integer_range(self.w_bits, True, True)).to(torch.int8)
        self.set_integers(weight, self.a_step.data, scale, shift)

    def set_integers(self, weight: Tensor, a_step: Tensor, scale: Tensor, shift: Tensor) -> None:
        """Freeze with int8 weight in its float shape, a_step (), scale and shift (c_out,)."""
        del self.weight, self.w_step, self.a_step
        self.bias, self.norm, self.frozen = None, nn.Identity(), True
        for name, value in dict(weight=weight, a_step=a_step, scale=scale, shift=shift).items():
            self.register_buffer(name, value.clone())

    def use_path(self, path: str, batch: int) -> bool:
        """Make a frozen layer run on one of PATHS; whether its sums are exact there, on this device.
        int8: oneDNN, uint8 inputs (zero point 2^(b-1) if signed). Without VNNI it adds pairs of products in
        int16, which saturates: where a pair can reach that, weights are halved and channels doubled.
        float32: integers in floats, over as many channels at a time as keep every partial sum below 2^24.
        float64: where float32 fails the comparison below, on a device with Winograd's or Fourier's way."""
        self.path, groups = path, self.conv["groups"]
        self.low, self.high = integer_range(self.a_bits, self.signed)
        weight = self.weight[:, :, None, None] if self.linear else self.weight
        generator = torch.Generator().manual_seed(0)
        q = torch.randint(self.low, self.high + 1, (2, *self.in_shape), generator=generator)
        q[1, :, (self.in_shape[1] + 1) // 2:], q[1, :, :(self.in_shape[1] + 1) // 2] = self.low, self.high
        copies = max(1, batch // 2)
        exact = F.conv2d(q.double(), weight.double().cpu(), **self.conv).float().repeat(copies, 1, 1, 1)
        q = q.float().to(weight.device, memory_format=torch.channels_last).repeat(copies, 1, 1, 1)
        try:
            if path == "int8":
                pair = 2 * (self.high - self.low) * int(weight.abs().max())
                self.doubled = int8_saturates() and pair >= 2 ** 15 and groups == 1
                if self.doubled:
                    weight = torch.cat([weight // 2, weight - weight // 2], 1)
                self.options = *(list(self.conv[name]) for name in ("stride", "padding", "dilation")), groups
                self.ones, self.zeros = torch.ones(len(weight)), torch.zeros(len(weight)).long()
                self.packed = torch.ops.onednn.qconv_prepack(weight, self.ones, 1.0, -self.low, *self.options)
            else:
                norm = weight.double().abs().sum((2, 3)) * max(-self.low, self.high)    # c_out, channels
                limit = 2 ** 24 if path == "float32" else 2 ** 53
                self.part = next(size for size in range(norm.shape[1], 0, -1)
                                 if all(some.sum(1).max() < limit for some in norm.split(size, 1)))
                self.parts = weight.to(getattr(torch, path)).split(self.part, 1)
            return torch.equal(self.sums(q).cpu(), exact)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, AttributeError):  # not in this torch or device, or groups in parts
            return False

    def join(self, target: Optional["QuantLayer"]) -> None:
        """Fix what follows the sums: floats; or, if target alone reads them, its step, rounding and range."""
        self.rounds, self.zero, self.epilogue = target is not None, 0, (self.scale, self.shift)
        self.least, self.most = (-math.inf, math.inf) if self.limit is None else (0.0, self.limit)
        if self.rounds:
            self.epilogue = self.scale / target.a_step, self.shift / target.a_step
            self.zero = -target.low if self.path == "int8" else 0
            self.least = int(max(target.low, self.least)) + self.zero  # uint8 takes no floats
            self.most = int(min(target.high, float(torch.round(self.most / target.a_step)))) + self.zero
        done = (-math.inf, math.inf)
        if self.path == "int8":  # the kernel rounds, saturates at 0 and 255, and has a ReLU
            done = (0, 255) if self.rounds else (self.least, math.inf)
        else:
            self.epilogue = tuple(part[:, None, None] for part in self.epilogue)
        self.clips = (self.least, self.most) != done

    def _integers(self, x: Tensor, residual: Optional[Tensor]) -> Tensor:
        """The frozen layer. residual is added to the epilogue, and may be overwritten."""
        x = x[:, :, None, None] if self.linear else x
        if not self.ready:
            x = quantize(x, self.a_step, self.low, self.high)
            x = self._to_uint8(x) if self.path == "int8" else x
        if self.path == "int8":
            out = self._int8(x, *self.epilogue, residual, self.limit is not None, self.rounds)
        else:
            out = self._floats(x).mul_(self.epilogue[0]).add_(self.epilogue[1])
            out = out if residual is None else out.add_(residual)
            out = out.round_() if self.rounds else out
        out = out.clamp_(self.least, self.most) if self.clips else out
        return out.flatten(1) if self.linear else out

    def sums(self, q: Tensor) -> Tensor:
        """conv(q, weight) for integers q given as floats: exact, rounded to float32 once."""
        return self._int8(self._to_uint8(q), self.ones, None) if self.path == "int8" else self._floats(q)

    def _to_uint8(self, q: Tensor) -> Tensor:
        # By way of int8 or int16: torch converts float32 to uint8 one value at a time, five times slower.
        q = (q - self.low if self.low else q).to(torch.int8 if self.high - self.low < 128 else torch.int16)
        return q.view(torch.uint8) if q.dtype == torch.int8 else q.to(torch.uint8)

    def _floats(self, q: Tensor) -> Tensor:
        if len(self.parts) == 1:
            return F.conv2d(q.to(self.parts[0].dtype), self.parts[0], **self.conv).float()
        pairs = zip(q.split(self.part, 1), self.parts)
        return sum(F.conv2d(some, part, **self.conv).to(torch.int32) for some, part in pairs).float()

    def _int8(self, q: Tensor, scale: Tensor, shift, residual=None, relu=False, rounds=False) -> Tensor:
        q, op = torch.cat([q, q], 1) if self.doubled else q, torch.ops.onednn.qconv2d_pointwise
        begin = q, 1.0, -self.low, self.packed, scale, self.zeros
        middle = shift, *self.options, 1.0, *((self.zero, torch.uint8) if rounds else (0, torch.float32))
        end = "relu" if relu else "none", [], ""
        if residual is None:
            return op(*begin, *middle, *end)
        return op.binary(*begin, residual, *middle, 1.0, 0, "sum", 1.0, *end)


@functools.cache
def int8_saturates() -> bool:
    """Whether oneDNN's int8 convolution saturates in int16 on this processor (those without VNNI)."""
    q, weight = torch.full((1, 16, 4, 4), 255), torch.full((16, 16, 3, 3), 127, dtype=torch.int8)
    ones, settings = torch.ones(16), ([1, 1], [0, 0], [1, 1], 1)
    packed = torch.ops.onednn.qconv_prepack(weight, ones, 1.0, 0, *settings)
    sums = torch.ops.onednn.qconv2d_pointwise(q.to(torch.uint8), 1.0, 0, packed, ones, 0 * ones.long(), None,
                                              *settings, 1.0, 0, torch.float32, "none", [], "")
    return bool((sums != 16 * 9 * 255 * 127).any())


# ---- the layer table and what a policy costs ----

# One row of the layer table, in order of execution; kernel, stride and map_size (the input's) count one side.
Layer = namedtuple("Layer", "name c_in c_out kernel stride map_size weights macs depthwise")


@torch.no_grad()
def quantize_model(classifier: nn.Module, image_size: int) -> list[Layer]:
    """Replace every convolution and linear layer, and the BatchNorm it feeds, by a QuantLayer at 32 bits.
    Layers, shapes and BatchNorms are read off one forward pass at (3, image_size, image_size). Returns the
    layer table in execution order; names are module paths inside `classifier.net` (or the module itself).
    Raises ValueError unless each layer runs exactly once and 32 bits compute what the float network did."""
    body = getattr(classifier, "net", classifier)
    names = {module: name for name, module in body.named_modules()}
    layers = [module for module in names if isinstance(module, (nn.Conv2d, nn.Linear))]
    norms = [module for module in names if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
             and module.affine and module.track_running_stats]
    calls, norm_of = [], {}  # (layer, input, output) as they run; the BatchNorm of a layer

    def record(module, inputs, output):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            calls.append((module, inputs[0], output))
        else:
            norm_of.update({layer: module for layer, _, out in calls if out is inputs[0]})

    hooks = [module.register_forward_hook(record) for module in layers + norms]
    was_training, device = classifier.training, next(classifier.parameters()).device
    probe = torch.rand(1, 3, image_size, image_size, device=device)
    expected = classifier.eval()(probe)
    for hook in hooks:
        hook.remove()
    ran = sorted(names[module] for module, x, _ in calls if x.ndim == 2 or not isinstance(module, nn.Linear))
    if ran != sorted(names[module] for module in layers):
        raise ValueError("each layer must run exactly once a forward pass, linear ones on (batch, features)")
    table = []
    for module, x, out in calls:
        layer = QuantLayer(module, norm_of.get(module, nn.Identity()), x.shape[1:]).to(device)
        kernel, stride = 1 if layer.linear else module.kernel_size[0], layer.conv["stride"][0]
        c_in, weights, depthwise = x.shape[1], module.weight.numel(), layer.conv["groups"] == x.shape[1] > 1
        table.append(Layer(names[module], c_in, out.shape[1], kernel, stride, layer.in_shape[-1], weights,
                           weights * out[0, 0].numel(), depthwise))
        body.set_submodule(names[module], layer)
        if module in norm_of:
            body.set_submodule(names[norm_of[module]], nn.Identity())
    if not torch.equal(classifier(probe), expected):
        raise ValueError("BatchNorm cannot be folded: a convolution's output is used before it or changed in "
                         "place, or a convolution does not pad with zeros")
    classifier.train(was_training)
    return table


def quant_layers(classifier: nn.Module) -> dict[str, QuantLayer]:
    """The quantizable layers by name."""
    body = getattr(classifier, "net", classifier)
    return {name: module for name, module in body.named_modules() if isinstance(module, QuantLayer)}


def set_policy(classifier: nn.Module, policy: Policy) -> None:
    """Set every layer's widths. Raises ValueError unless the policy names exactly the network's layers."""
    layers = quant_layers(classifier)
    if layers.keys() != policy.keys():
        raise ValueError(f"the policy's layers are others: {sorted(layers.keys() ^ policy.keys())[:3]} ...")
    for name, (w_bits, a_bits) in policy.items():
        both_float = w_bits == a_bits == FLOAT_BITS
        if not both_float and not (MIN_BITS <= w_bits <= MAX_BITS and MIN_BITS <= a_bits <= MAX_BITS):
            raise ValueError(f"layer {name}: widths are {MIN_BITS} to {MAX_BITS} bits, or both {FLOAT_BITS}")
        layers[name].set_bits(w_bits, a_bits)


def keep_steps_positive(classifier: nn.Module) -> None:
    """After an optimizer's update: a step size must stay above 0 to mean anything."""
    for layer in quant_layers(classifier).values():
        layer.w_step.data.clamp_(min=1e-6)
        layer.a_step.data.clamp_(min=1e-6)


@torch.no_grad()
def calibrate(classifier: nn.Module, batches: Sequence[Tensor], values: int = 65536) -> None:
    """Find, on the float network, each layer's activation step per width and whether its input is signed.
    batches: images (B, 3, H, W) as the network will see them, noise included. Steps have the least squared
    error on about `values` inputs a layer; the input is unsigned if none is below zero."""
    seen: dict[QuantLayer, list[Tensor]] = {layer: [] for layer in quant_layers(classifier).values()}

    def keep(layer, inputs):
        flat = inputs[0].flatten()
        stride = max(1, len(flat) * len(batches) // values)
        layer.signed |= bool((flat < 0).any())
        seen[layer].append(flat[::stride].clone())

    hooks = [layer.register_forward_pre_hook(keep) for layer in seen]
    classifier.eval()
    for layer in seen:
        layer.w_bits = layer.a_bits = FLOAT_BITS
    for batch in batches:
        classifier(batch)
    for hook in hooks:
        hook.remove()
    for layer, parts in seen.items():
        sample = torch.cat(parts)[None]
        for bits in range(MIN_BITS, MAX_BITS + 1):
            layer.calibrated_steps[bits] = best_step(sample, *integer_range(bits, layer.signed))[0]


def bitops(table: list[Layer], policy: Policy) -> int:
    """BitOPs(P) = sum of MACs * w_bits * a_bits for one image (PAPER section 1)."""
    return sum(layer.macs * policy[layer.name][0] * policy[layer.name][1] for layer in table)


def bitops_ratio(table: list[Layer], policy: Policy) -> float:
    """BitOPs(P) / BitOPs(FP32)."""
    return bitops(table, policy) / bitops(table, uniform_policy(table, FLOAT_BITS, FLOAT_BITS))


def size_bytes(table: list[Layer], policy: Policy) -> int:
    """size(P): the weights' bits, rounded up to bytes."""
    return math.ceil(sum(layer.weights * policy[layer.name][0] for layer in table) / 8)


def size_ratio(table: list[Layer], policy: Policy) -> float:
    """size(P) / size(FP32)."""
    return size_bytes(table, policy) / size_bytes(table, uniform_policy(table, FLOAT_BITS, FLOAT_BITS))


def uniform_policy(table: list[Layer], bits: int, end_bits: int = END_BITS) -> Policy:
    """The same width everywhere but in the first and the last layer."""
    ends = (table[0].name, table[-1].name)
    return {layer.name: [end_bits, end_bits] if layer.name in ends else [bits, bits] for layer in table}


def enforce_budget(table: list[Layer], policy: Policy, budget: float, size_budget: float = None) -> Policy:
    """The policy, forced under fractions of the float network's BitOPs and weight bits (HAQ, section 3.3).
    From the last layer back, each visit takes one bit from the weights, then one from the input, until the
    policy fits; the ends keep 8 bits. Raises ValueError if the narrowest policy is over the budget."""
    policy = {name: list(bits) for name, bits in policy.items()}

    def over(kind: int) -> bool:
        """Whether a bit must go from weights (kind 0) or inputs (1): both cost BitOPs, weights size too."""
        too_large = size_budget is not None and size_ratio(table, policy) > size_budget
        return bitops_ratio(table, policy) > budget or kind == 0 and too_large

    while over(0):
        before = copy.deepcopy(policy)
        for layer in reversed(table[1:-1]):
            for kind in (0, 1):
                if policy[layer.name][kind] > MIN_BITS and over(kind):
                    policy[layer.name][kind] -= 1
        if policy == before:
            needs = [math.ceil(ratio(table, policy) * 1e6) / 1e6 for ratio in (bitops_ratio, size_ratio)]
            raise ValueError(f"{'--budget' if over(1) else '--size-budget'} is below what {MIN_BITS} bits "
                             f"cost (ends {END_BITS}): {needs[0]} of float BitOPs and {needs[1]} of the size")
    return policy


# ---- the integer network ----

PATHS = ("int8", "float32", "float64")
RELUS = {F.relu: math.inf, torch.relu: math.inf, nn.ReLU: math.inf, nn.ReLU6: 6.0}
ADDS = (operator.add, operator.iadd, torch.add)


def integer_network(classifier: nn.Module, batch: int = 2) -> nn.Module:
    """The network as it is evaluated and certified: a frozen copy, in evaluation mode, on the same device.

    All quantized layers run on the first of PATHS that is exact for all (`network.path`; "float" if there are
    none: then this is the float network). A layer takes over the sum and the ReLU behind it, and rounds to
    the next layer's integers where that alone reads its output; networks that torch.fx cannot trace run layer
    by layer. Predictions do not depend on the batch size. Exactness is checked at batches of `batch`, by
    which GPUs choose kernels. Raises RuntimeError where no path is exact."""
    network = copy.deepcopy(classifier).eval()
    for layer in quant_layers(network).values():
        layer.freeze()
    layers = [layer for layer in quant_layers(network).values() if layer.frozen]
    path = next((path for path in PATHS if all(layer.use_path(path, batch) for layer in layers)), None)
    if path is None:
        raise RuntimeError("no way to convolve integers exactly on this device; use --device cpu")
    targets, tracer = {}, fx.Tracer()
    leaf = tracer.is_leaf_module
    tracer.is_leaf_module = lambda module, name: isinstance(module, QuantLayer) or leaf(module, name)
    try:
        graph = tracer.trace(network)
    except Exception:  # torch.fx raises many kinds, for networks that it cannot follow
        graph = None
    if graph is not None and layers:
        targets, hooks = merge(graph, network), network._forward_pre_hooks
        network = fx.GraphModule(network, graph).eval()
        network._forward_pre_hooks = hooks  # whoever counts the images counts on
    for layer in layers:
        layer.join(targets.get(layer))
    network.path = path if layers else "float"
    return network


def merge(graph: fx.Graph, network: nn.Module) -> dict[QuantLayer, QuantLayer]:
    """Merge the sum and the ReLU behind it into each frozen layer. Returns {layer: its only reader}."""
    modules, targets = dict(network.named_modules()), {}

    def frozen(node) -> Optional[QuantLayer]:
        layer = modules.get(node.target)
        return layer if isinstance(layer, QuantLayer) and layer.frozen else None

    def only_user(node):
        return next(iter(node.users)) if len(node.users) == 1 else None

    def replace(old, new) -> None:
        old.replace_all_uses_with(new)
        graph.erase_node(old)

    for node in list(graph.nodes):
        if type(modules.get(node.target)) in (nn.Identity, nn.Dropout):  # nothing, in evaluation
            replace(node, node.args[0])
    for node in filter(frozen, list(graph.nodes)):
        after = only_user(node)
        if after and after.target in ADDS and len(after.all_input_nodes) == 2 and not after.kwargs:
            other = next(part for part in after.all_input_nodes if part is not node)
            # The sum overwrites the other part: nobody may read that later, nor may it be someone's view.
            fresh = frozen(other) or other.target in (*ADDS, F.pad, F.relu) or isinstance(
                modules.get(other.target), (nn.MaxPool2d, nn.ReLU))
            if fresh and max(other.users) is after:
                after.prepend(node)  # runs once both parts are there
                node.args = (node.args[0], other)
                replace(after, node)
                after = only_user(node)
        kind = after and (after.target if after.target in RELUS else type(modules.get(after.target)))
        if kind in RELUS:
            frozen(node).limit = RELUS[kind]
            replace(after, node)
    for node in filter(frozen, graph.nodes):
        reader = only_user(node)
        if reader and frozen(reader) and reader.args[0] is node and len(node.args) == 1:
            targets[frozen(node)] = frozen(reader)
            frozen(reader).ready = True
    return targets


# ---- saved networks ----

MAGIC, VERSION = b"ARQ\n", 1


def pack_bits(values: Tensor, bits: int) -> bytes:
    """Symmetric integers, shifted to start at 0, so many bits each, lowest bit first."""
    shifted = values.flatten().cpu().to(torch.int16) + (2 ** (bits - 1) - 1)
    planes = (shifted[:, None] >> torch.arange(bits, dtype=torch.int16)) & 1
    octets = F.pad(planes.flatten(), (0, -planes.numel() % 8)).view(-1, 8)
    return (octets << torch.arange(8, dtype=torch.int16)).sum(1).to(torch.uint8).numpy().tobytes()


def unpack_bits(data: bytes, count: int, bits: int) -> Tensor:
    """What pack_bits packed: int8 (count,)."""
    octets = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(torch.int16)
    planes = ((octets[:, None] >> torch.arange(8, dtype=torch.int16)) & 1).flatten()[:count * bits]
    shifted = (planes.view(count, bits) << torch.arange(bits, dtype=torch.int16)).sum(1)
    return (shifted - (2 ** (bits - 1) - 1)).to(torch.int8)


def pack_model(classifier: Classifier, table: list[Layer], description: dict) -> bytes:
    """A quantized network as one file: integers at their own widths, their epilogues and a description.
    description: arch, image_size, sigma, dataset and classes; the rest is read off the network. In order:
    MAGIC; version and length of the header; the header, JSON; for each layer of the table packed weights,
    a_step, scale and shift in float32; SHA-256 of all that. Raises ValueError for a layer of 32 bits."""
    classifier = copy.deepcopy(classifier)
    layers = [quant_layers(classifier)[row.name] for row in table]
    if any(layer.w_bits == FLOAT_BITS for layer in layers):
        raise ValueError("a layer of 32 bits has no integers; keep the float network's state_dict instead")
    header = {**description, "policy": [[layer.w_bits, layer.a_bits] for layer in layers],
              "signed": [int(layer.signed) for layer in layers],
              "mean": classifier.mean.flatten().tolist(), "std": classifier.std.flatten().tolist(),
              "option_a": any(isinstance(module, PaddedShortcut) for module in classifier.modules())}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    data = [MAGIC, struct.pack("<HI", VERSION, len(text)), text]
    for layer in layers:
        layer.freeze()
        data.append(pack_bits(layer.weight, layer.w_bits))
        floats = torch.cat([layer.a_step.view(1), layer.scale, layer.shift]).cpu()
        data.append(floats.numpy().astype("<f4").tobytes())
    data.append(hashlib.sha256(b"".join(data)).digest())
    return b"".join(data)


def read_packed(path) -> Optional[tuple[dict, bytes]]:
    """Header and tensors of a file of pack_model, None for others. Raises ValueError for a broken one."""
    data = Path(path).read_bytes()
    if data[:4] != MAGIC:
        return None
    version, length = struct.unpack_from("<HI", data.ljust(10, b"\0"), 4)
    if version > VERSION:
        raise ValueError(f"{path} was altered or is of version {version}, not {VERSION}; use a newer program")
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise ValueError(f"{path} was truncated or altered: its checksum is wrong; copy it again")
    return json.loads(data[10:10 + length]), data[10 + length:-32]


def load_model(path) -> tuple[Classifier, list[Layer], dict]:
    """What pack_model made of a network: frozen classifier (for `integer_network`), layer table, description
    (policy by layer name). Raises ValueError unless the file is whole and of this version."""
    saved, data = read_packed(path) or ({}, b"")
    if not saved:
        raise ValueError(f"{path}: not a network saved by this program")
    classifier = build_classifier(saved["arch"], len(saved["classes"]), saved["mean"], saved["std"],
                                  saved["option_a"])
    table = quantize_model(classifier, saved["image_size"])
    for row, (w_bits, a_bits), signed in zip(table, saved["policy"], saved["signed"]):
        layer, size = quant_layers(classifier)[row.name], math.ceil(row.weights * w_bits / 8)
        layer.w_bits, layer.a_bits, layer.signed = w_bits, a_bits, bool(signed)
        floats = torch.frombuffer(bytearray(data[size:]), dtype=torch.float32, count=1 + 2 * row.c_out)
        layer.set_integers(unpack_bits(data[:size], row.weights, w_bits).view(layer.weight.shape), floats[0],
                           *floats[1:].split(row.c_out))
        data = data[size + 4 * len(floats):]
    saved["policy"] = dict(zip((row.name for row in table), saved["policy"]))
    return classifier.eval(), table, saved
