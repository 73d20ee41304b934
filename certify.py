"""Randomized smoothing: certify any classifier `images -> logits`, from scratch or incrementally.

This file stands alone (torch and scipy): copy it into your own project. Images are float tensors in [0, 1]
of shape (channels, height, width); noise has standard deviation sigma in those units and is added there,
before any normalisation.

    paper     here          meaning
    f         classifier    base classifier: (batch, channels, height, width) -> logits (batch, classes)
    g         -             smoothed classifier, g(x) = argmax_c P[f(x + eps) = c] with eps ~ N(0, sigma^2 I)
    f^P       classifier    the changed (quantized) classifier, in functions that also take a ReplayCache of f
    c_A       selected      the class chosen on n0 samples; the bounds use samples this choice did not see
    n_A, n_B  n_a, n_b      votes for c_A, and for the most counted other class, among n samples
    p_A       p_lower       lower confidence bound of P[f(x + eps) = c_A]
    n_p       n_p           samples of f^P per image in the incremental certificate
    zeta      zeta          upper confidence bound of P[f(x + eps) != f^P(x + eps)]
    R         radius        certified l2 radius: g is constant on the ball of this radius around x

Sources: Cohen, Rosenfeld and Kolter, ICML 2019 (CERTIFY, PREDICT); Ugare et al., ICLR 2024 (IRS).
"""

import hashlib
import math
import time
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Callable, Iterator, NamedTuple, Optional, Sequence, TextIO

import torch
from scipy.stats import beta, binomtest, norm
from torch import Tensor

ABSTAIN = -1
CHUNK = 100  # noise is drawn this many samples at a time: a sample's noise must not depend on the batch size
Classifier = Callable[[Tensor], Tensor]


# ---- bounds and radii ----

def lower_confidence_bound(k, n, alpha: float):
    """One-sided Clopper-Pearson lower bound on a probability, from k successes in n independent trials.

    P[bound <= true probability] >= 1 - alpha. k and n may be arrays of equal shape, or one a number.
    Raises ValueError unless 0 <= k <= n, n >= 1 and 0 < alpha < 1.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1, not {alpha}")
    k, n = _as_array(k), _as_array(n)
    if not ((k >= 0) & (k <= n) & (n >= 1)).all():
        raise ValueError("counts must satisfy 0 <= k <= n and n >= 1")
    bound = beta.ppf(alpha, k.clip(1), n - k + 1)  # k = 0 has no beta quantile: its bound is 0
    return _as_number(bound * (k > 0))


def upper_confidence_bound(k, n, alpha: float):
    """One-sided Clopper-Pearson upper bound: P[bound >= true probability] >= 1 - alpha. Same arguments."""
    return 1 - lower_confidence_bound(_as_array(n) - _as_array(k), n, alpha)


def certified_radius(p_a, sigma: float, p_b=None):
    """Certified l2 radius sigma/2 (Phi^-1(p_A) - Phi^-1(p_B)) (ARQ, Theorem 2.1), in pixels of [0, 1] images.

    p_a is a lower bound on the probability of the predicted class and p_b an upper bound on that of every
    other class; without p_b, 1 - p_a takes its place (the one-sided radius, sigma Phi^-1(p_A), of published
    tables). Arrays are welcome. Returns 0 where nothing is certified. Raises ValueError unless sigma > 0.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, not {sigma}")
    p_a = _as_array(p_a)
    if p_b is None:
        radius = sigma * norm.ppf(p_a)
    else:
        radius = sigma / 2 * (norm.ppf(p_a) - norm.ppf(_as_array(p_b)))
    return _as_number(radius.clip(0))


def can_certify(n: int, alpha: float) -> bool:
    """Whether n samples that all agree give a radius above 0 at this alpha (10 needed at alpha = 0.001)."""
    return lower_confidence_bound(n, n, alpha) > 0.5


def _as_array(value):
    return torch.as_tensor(value, dtype=torch.float64).cpu().numpy()


def _as_number(array):
    return float(array) if array.ndim == 0 else array


# ---- noise and sampling ----

class NoiseKey(NamedTuple):
    """Names one source of noise. Equal keys replay it; another seed or purpose gives fresh noise."""
    seed: int
    purpose: str

    def derive(self, part: str) -> "NoiseKey":
        return NoiseKey(self.seed, f"{self.purpose}/{part}")


def draw_noise(key: NoiseKey, image_id: int, chunk: int, shape: Sequence[int], device) -> Tensor:
    """Standard normal noise (CHUNK, *shape): samples CHUNK * chunk onwards of one image under one key.

    Depends on the arguments and device type alone, so cached predictions can be replayed in any batch size.
    """
    digest = hashlib.sha256(f"{key.seed}|{key.purpose}|{image_id}".encode()).digest()
    # A CPU generator keeps 32 bits of its seed. Counting chunks up from the image's own start keeps them
    # apart, where 1,000 independent seeds would repeat one, and with it the noise, in 1 of 8,600 images.
    seed = (int.from_bytes(digest[:4], "little") + chunk) % 2 ** 32
    # Contiguous: drawing in channels_last order is several times slower on a CPU.
    return torch.randn(CHUNK, *shape, generator=torch.Generator(device).manual_seed(seed), device=device)


@torch.inference_mode()
def noisy_predictions(classifier: Classifier, images: Tensor, ids: Sequence[int], sizes: Sequence[int],
                      sigma: float, key: NoiseKey, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Classify sizes[i] noisy copies of images[i] (B, C, H, W), in order; batches span images and are full.

    Yields pairs (rows, classes) of equal length, on the CPU: row i of `images` was given class c once.
    """
    batch, rows, filled = [], [], 0
    total, done = sum(sizes), 0
    for row, (image, image_id, size) in enumerate(zip(images, ids, sizes)):
        for chunk in range(math.ceil(size / CHUNK)):
            noise = draw_noise(key, image_id, chunk, image.shape, image.device)[:size - chunk * CHUNK]
            noisy = noise.mul_(sigma).add_(image)
            while len(noisy):
                part = noisy[:batch_size - filled]
                noisy = noisy[len(part):]
                batch.append(part)
                rows += [row] * len(part)
                filled += len(part)
                done += len(part)
                if filled == batch_size or done == total:
                    yield torch.tensor(rows), classifier(torch.cat(batch)).argmax(1).cpu()
                    batch, rows, filled = [], [], 0


def class_counts(classifier: Classifier, images: Tensor, ids: Sequence[int], n: int, num_classes: int,
                 sigma: float, key: NoiseKey, batch_size: int) -> Tensor:
    """How often each class was predicted among n noisy copies of every image: (B, num_classes), int64."""
    counts = torch.zeros(len(images) * num_classes, dtype=torch.int64)
    for rows, classes in noisy_predictions(classifier, images, ids, [n] * len(ids), sigma, key, batch_size):
        counts += torch.bincount(rows * num_classes + classes, minlength=len(counts))
    return counts.view(-1, num_classes)


# ---- certificates ----

@dataclass
class Certificate:
    """One certified image. predict is ABSTAIN (-1) with radius 0 where the bound does not exceed 1/2.

    The first six fields are the columns existing tools read; files others published hold only those. The
    rest is what the radius was computed from: the selected class, its votes n_a, those of the most counted
    other class n_b, the sample sizes, sigma (in [0, 1] pixels) and the one-sided alpha.
    """
    idx: int
    label: int
    predict: int
    radius: float
    correct: int
    time: str
    selected: Optional[int] = None
    n_a: Optional[int] = None
    n_b: Optional[int] = None
    n: Optional[int] = None
    n0: Optional[int] = None
    sigma: Optional[float] = None
    alpha: Optional[float] = None


def certify(classifier: Classifier, images: Tensor, labels: Sequence[int], ids: Sequence[int],
            num_classes: int, sigma: float, n0: int, n: int, alpha: float, key: NoiseKey,
            batch_size: int = 100) -> list[Certificate]:
    """CERTIFY (Cohen et al., section 3.2.2) for a block of images (B, C, H, W) in [0, 1].

    For each image, with probability at least 1 - alpha over the noise: if the certificate does not abstain,
    the smoothed classifier predicts `predict` everywhere within l2 distance `radius`. The guarantee holds
    image by image, so about alpha * B certificates of a block may be wrong. `ids` name the images in the
    noise key.
    """
    start = time.monotonic()
    counts0 = class_counts(classifier, images, ids, n0, num_classes, sigma, key.derive("select"), batch_size)
    selected = counts0.argmax(1)                                      # c_A, on samples the bound does not use
    counts = class_counts(classifier, images, ids, n, num_classes, sigma, estimate_key(key, n), batch_size)
    return _certificates(ids, labels, selected, counts, n0, sigma, alpha, start)


def estimate_key(key: NoiseKey, n: int) -> NoiseKey:
    """Noise behind the bound. n is part of it: asked for more samples, a run draws all of them anew."""
    return key.derive(f"estimate{n}")


def _certificates(ids, labels, selected, counts, n0, sigma, alpha, start) -> list[Certificate]:
    """Certificates from selected classes (B,) and votes (B, classes); an image without votes abstains."""
    n = counts.sum(1)
    n_a = counts.gather(1, selected[:, None]).squeeze(1)
    n_b = counts.scatter(1, selected[:, None], 0).amax(1)
    p_lower = lower_confidence_bound(n_a, n.clamp(min=1), alpha)
    radius = certified_radius(p_lower, sigma)
    seconds = str(timedelta(seconds=(time.monotonic() - start) / len(labels)))
    rows = []
    for i, label in enumerate(labels):
        top = int(selected[i]) if p_lower[i] > 0.5 else ABSTAIN
        rows.append(Certificate(int(ids[i]), int(label), top, float(radius[i]), int(top == label), seconds,
                                int(selected[i]), int(n_a[i]), int(n_b[i]), int(n[i]), n0, sigma, alpha))
    return rows


def predict(classifier: Classifier, images: Tensor, ids: Sequence[int], num_classes: int, sigma: float,
            n: int, alpha: float, key: NoiseKey, batch_size: int = 100) -> list[int]:
    """PREDICT (Cohen et al., section 3.2.1): g's class for each image (B, C, H, W), or ABSTAIN.

    Abstains where a two-sided binomial test cannot tell the two most voted classes apart at level alpha, so
    the returned class differs from g(x) with probability at most alpha.
    """
    counts = class_counts(classifier, images, ids, n, num_classes, sigma, key.derive("predict"), batch_size)
    votes, classes = counts.topk(2, dim=1)
    return [int(top[0]) if binomtest(int(vote[0]), int(vote.sum()), 0.5).pvalue <= alpha else ABSTAIN
            for vote, top in zip(votes, classes)]


# ---- incremental randomized smoothing (IRS) ----

@dataclass
class ReplayCache:
    """f's certificates for a set of images, and what f predicted for every sample behind them.

    predictions: (B, n) uint8, one byte a sample (int16 beyond 256 classes); key: the noise to replay.
    """
    certificates: list[Certificate]
    predictions: Tensor
    key: NoiseKey

    @property
    def p_lower(self) -> Tensor:
        """p_A at alpha, (B,) float64; 0 where the selected class is wrong and nothing was sampled."""
        n_a, n = [row.n_a for row in self.certificates], [max(row.n, 1) for row in self.certificates]
        return torch.as_tensor(lower_confidence_bound(n_a, n, self.certificates[0].alpha))


def certify_and_cache(classifier: Classifier, images: Tensor, labels: Sequence[int], ids: Sequence[int],
                      num_classes: int, sigma: float, n0: int, n: int, alpha: float, key: NoiseKey,
                      batch_size: int = 100) -> ReplayCache:
    """CERTIFY for the base classifier f, keeping each sample's prediction for `certify_incremental`.

    An image whose selected class is wrong adds 0 to the ACR of f and of every f^P, so it gets no samples
    beyond n0, and abstains. Guarantee and arguments as in `certify`.
    """
    start = time.monotonic()
    counts0 = class_counts(classifier, images, ids, n0, num_classes, sigma, key.derive("select"), batch_size)
    selected = counts0.argmax(1)
    right = selected == torch.as_tensor(labels)
    key = estimate_key(key, n)
    predictions = torch.zeros(len(images), n, dtype=torch.uint8 if num_classes <= 256 else torch.int16)
    counts = torch.zeros(len(images), num_classes, dtype=torch.int64)
    if right.any():
        sampled = _predictions(classifier, images, ids, right, n, sigma, key, batch_size)
        predictions[right] = sampled.to(predictions.dtype)
        counts[right] = torch.stack([row.bincount(minlength=num_classes) for row in sampled])
    rows = _certificates(ids, labels, selected, counts, n0, sigma, alpha, start)
    return ReplayCache(rows, predictions, key)


class IncrementalCertificate(NamedTuple):
    """One image certified for f^P by IRS; zeta is None where fresh samples were drawn, or none at all."""
    idx: int
    label: int
    predict: int
    radius: float
    correct: int
    zeta: Optional[float]


def certify_incremental(classifier: Classifier, cache: ReplayCache, images: Tensor, n_p: int,
                        alpha_zeta: float, gamma: float,
                        batch_size: int = 100) -> list[IncrementalCertificate]:
    """IRS (Ugare et al., Algorithm 2): certify the changed classifier f^P with n_p samples an image.

    images: (B, C, H, W), those the cache was made of. For each image, with probability at least 1 - (alpha +
    alpha_zeta), g^P predicts `predict` within `radius`: p_A and zeta fail with probability at most alpha and
    alpha_zeta, and if neither fails, P[f^P = c_A] >= p_A - zeta. Taken for granted, as published: that
    choosing the branch by the cached p_A spoils no bound. Images whose cached class is wrong cost nothing
    and count 0. Raises ValueError if n_p exceeds the cached samples.
    """
    rows = cache.certificates
    sigma, alpha = rows[0].sigma, rows[0].alpha
    if n_p > cache.predictions.shape[1]:
        raise ValueError(f"n_p = {n_p} exceeds the {cache.predictions.shape[1]} cached samples an image")
    ids = [row.idx for row in rows]
    selected = torch.tensor([row.selected for row in rows])
    right = selected == torch.tensor([row.label for row in rows])
    p_lower = cache.p_lower
    replayed = right & (p_lower < gamma)
    fresh = right & ~replayed
    p_new = torch.zeros(len(rows), dtype=torch.float64)  # lower bound of P[f^P(x + eps) = c_A]
    zeta = torch.full((len(rows),), math.nan, dtype=torch.float64)

    if replayed.any():
        new = _predictions(classifier, images, ids, replayed, n_p, sigma, cache.key, batch_size)
        n_delta = (new != cache.predictions[replayed, :n_p]).sum(1)
        zeta[replayed] = torch.as_tensor(upper_confidence_bound(n_delta, n_p, alpha_zeta))
        p_new[replayed] = p_lower[replayed] - zeta[replayed]
    if fresh.any():
        new = _predictions(classifier, images, ids, fresh, n_p, sigma, cache.key.derive("fresh"), batch_size)
        n_a = (new == selected[fresh][:, None]).sum(1)
        p_new[fresh] = torch.as_tensor(lower_confidence_bound(n_a, n_p, alpha + alpha_zeta))

    radius = certified_radius(p_new.clamp(min=0), sigma)
    return [IncrementalCertificate(row.idx, row.label, row.selected if p > 0.5 else ABSTAIN, float(r),
                                   int(p > 0.5), None if math.isnan(z) else z)
            for row, p, r, z in zip(rows, p_new.tolist(), radius, zeta.tolist())]


def _predictions(classifier, images, ids, mask, n, sigma, key, batch_size) -> Tensor:
    """Predicted classes (mask.sum(), n) of the masked images' first n noisy copies."""
    chosen = mask.nonzero().squeeze(1)
    stream = noisy_predictions(classifier, images[chosen.to(images.device)],
                               [ids[i] for i in chosen.tolist()], [n] * len(chosen), sigma, key, batch_size)
    return torch.cat([classes for _, classes in stream]).view(-1, n)


# ---- aggregates and files ----

def average_certified_radius(rows) -> float:
    """ACR: mean over images of radius * 1[correct]; wrong and abstained images count 0 (ARQ, section 2).

    Raises ValueError without rows, as certified_accuracy does.
    """
    if not rows:
        raise ValueError("no certificates to average")
    return sum(row.radius * row.correct for row in rows) / len(rows)


def acr_standard_error(rows) -> float:
    """Standard error of the ACR over images (nan below two): what another draw of images would change."""
    values = torch.tensor([row.radius * row.correct for row in rows], dtype=torch.float64)
    return float(values.std() / math.sqrt(len(values)))


def acr_difference(rows, base_rows) -> tuple[float, float]:
    """ACR of rows less that of base_rows, on the same images in the same order; its paired standard error."""
    gains = [row.radius * row.correct - base.radius * base.correct
             for row, base in zip(rows, base_rows, strict=True)]
    gains = torch.tensor(gains, dtype=torch.float64)
    return float(gains.mean()), float(gains.std() / math.sqrt(len(gains)))


def certified_accuracy(rows, radius: float) -> float:
    """Share of images that are right, not abstained, and certified at least this l2 radius."""
    if not rows:
        raise ValueError("no certificates to count")
    return sum(bool(row.correct) and row.radius >= radius for row in rows) / len(rows)


COLUMNS = [field.name for field in fields(Certificate)]


def write_certificates(file: TextIO, rows: Sequence[Certificate]) -> None:
    """Append rows to an open TSV, after the header if it is empty, and flush. Radii keep full precision."""
    if file.tell() == 0:
        file.write("\t".join(COLUMNS) + "\n")
    for row in rows:
        values = [getattr(row, name) for name in COLUMNS]
        file.write("\t".join("" if value is None else str(value) for value in values) + "\n")
    file.flush()


def read_certificates(path) -> list[Certificate]:
    """Read a TSV of certificates, ours or with only the usual columns idx label predict radius correct time.

    A last line without its end (an interrupted run) is left out. Raises ValueError, naming file and line, for
    anything else that is not a certificate.
    """
    with open(path) as file:
        lines = file.read().split("\n")[:-1]
    names = lines[0].split("\t") if lines else []
    if names[:5] != COLUMNS[:5] or not set(names) <= set(COLUMNS):
        raise ValueError(f"{path}: line 1 is not a header of certificates ({' '.join(COLUMNS[:6])} ...)")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        try:
            cells = dict(zip(names, line.split("\t"), strict=True))
            rows.append(Certificate(**{name: _parse(name, text) for name, text in cells.items()}))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is not a certificate ({error})") from None
    return rows


def _parse(name: str, text: str):
    if name == "time":
        return text
    if text == "":
        return None
    return float(text) if name in ("radius", "sigma", "alpha") else int(text)
