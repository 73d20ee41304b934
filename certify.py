"""Randomized smoothing: certify any classifier `images -> logits`, from scratch or incrementally.

    g = Smooth(classifier, num_classes=10, sigma=0.25)
    certificates = g.certify(images, labels, n=1000)     # CERTIFY: a class and an l2 radius per image
    classes = g.predict(images)                          # PREDICT: a class per image, or ABSTAIN
    cache = g.certify_and_cache(images, labels)          # CERTIFY, keeping what f predicted
    Smooth(changed, 10, 0.25).certify_incremental(images, cache, n_p=100)            # IRS

This file stands alone (torch and scipy): copy it. Images are float tensors in [0, 1], (B, C, H, W).
Noise has standard deviation sigma in those units; it is added before any normalisation.

    paper     here        meaning
    f, f^P    classifier  base classifier, changed classifier: images (B, C, H, W) -> logits (B, classes)
    g         Smooth      smoothed classifier, g(x) = argmax_c P[f(x + eps) = c], eps ~ N(0, sigma^2 I)
    c_A       selected    class chosen on n0 samples; the bounds use samples this choice did not see
    n_A, n_B  n_a, n_b    votes for c_A, and for the most counted other class, among n samples
    p_A       p_lower     lower confidence bound of P[f(x + eps) = c_A]
    p_B       p_upper     upper confidence bound of every other class's probability; 1 - p_A one-sided
    n_p       n_p         samples of f^P per image in the incremental certificate
    zeta      zeta        upper confidence bound of P[f(x + eps) != f^P(x + eps)]
    R         radius      certified l2 radius: g is constant on the ball of this radius around x

Sources: Cohen, Rosenfeld and Kolter, ICML 2019 (CERTIFY, PREDICT); Ugare et al., ICLR 2024 (IRS).
"""

import hashlib
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import NamedTuple, TextIO

import torch
from scipy.stats import beta, binomtest, norm
from torch import Tensor

ABSTAIN = -1
CHUNK = 100  # noise is drawn this many samples at a time, whatever the batch size
Classifier = Callable[[Tensor], Tensor]


# ---- bounds and radii ----


def lower_confidence_bound(k, n, alpha):
    """One-sided Clopper-Pearson lower bound on a probability, from k successes in n trials.

    P[bound <= true probability] >= 1 - alpha for independent trials. Numbers give a float; arrays
    broadcast and give a float64 tensor. Raises ValueError unless 0 <= k <= n, n >= 1, 0 < alpha < 1.
    """
    k, n, alpha = _as_array(k), _as_array(n), _as_array(alpha)
    if not ((alpha > 0) & (alpha < 1)).all():
        raise ValueError(f"alpha must lie strictly between 0 and 1, not {alpha}")
    if not ((k >= 0) & (k <= n) & (n >= 1)).all():
        raise ValueError("counts must satisfy 0 <= k <= n and n >= 1")
    positive = k > 0  # k = 0 has no beta quantile: its bound is 0
    return _as_tensor(beta.ppf(alpha, k + ~positive, n - k + 1) * positive)


def upper_confidence_bound(k, n, alpha):
    """One-sided Clopper-Pearson upper bound: P[bound >= true probability] >= 1 - alpha."""
    return 1 - lower_confidence_bound(_as_array(n) - _as_array(k), n, alpha)


def certified_radius(p_a, sigma: float, p_b=None):
    """Certified l2 radius R = sigma/2 (Phi^-1(p_A) - Phi^-1(p_B)), in [0, 1] pixels (ARQ, Theorem 2.1).

    p_a bounds the predicted class's probability from below, p_b every other class's from above.
    Without p_b, 1 - p_a takes its place: R = sigma Phi^-1(p_A), the one-sided radius of published
    tables. Numbers or arrays; 0 where nothing is certified. Raises ValueError unless sigma > 0 and
    0 <= p_a, p_b <= 1.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, not {sigma}")
    p_a = torch.as_tensor(p_a, dtype=torch.float64).cpu()
    p_b = 1 - p_a if p_b is None else torch.as_tensor(p_b, dtype=torch.float64).cpu()
    if not ((p_a >= 0) & (p_a <= 1) & (p_b >= 0) & (p_b <= 1)).all():
        raise ValueError("probabilities must lie between 0 and 1")
    certified = p_a > p_b
    # Elsewhere 1/2 stands for both: infinite quantiles may have no difference.
    quantile_a = norm.ppf(torch.where(certified, p_a, 0.5).numpy())
    quantile_b = norm.isf(torch.where(certified, p_b, 0.5).numpy())  # -Phi^-1(p_B), precise near 0
    return _as_tensor(_as_array(sigma / 2 * (quantile_a + quantile_b)))


def can_certify(n: int, alpha: float) -> bool:
    """Whether n samples that all agree give a radius above 0 (at alpha = 0.001 it takes 10)."""
    return lower_confidence_bound(n, n, alpha) > 0.5


def _as_array(value):
    return torch.as_tensor(value, dtype=torch.float64).cpu().numpy()


def _as_tensor(array):
    return torch.from_numpy(array) if array.ndim else float(array)


# ---- noise ----


class NoiseKey(NamedTuple):
    """Names one source of noise. Equal keys replay it; another seed or purpose gives fresh noise."""

    seed: int
    purpose: str

    def derive(self, part: str) -> "NoiseKey":
        return NoiseKey(self.seed, f"{self.purpose}/{part}")


def estimate_key(key: NoiseKey, n: int) -> NoiseKey:
    """Noise behind a bound. n is part of it: asked for more samples, a run draws all of them anew."""
    return key.derive(f"estimate{n}")


def draw_noise(key: NoiseKey, image_id: int, chunk: int, shape: Sequence[int], device) -> Tensor:
    """Standard normal noise (CHUNK, *shape): samples CHUNK * chunk onwards of one image.

    It depends on the arguments and the device type alone, so that predictions can be replayed in
    any batch size.
    """
    name = f"{key.seed}|{key.purpose}|{image_id}"
    start = hashlib.sha256(name.encode()).digest()
    # A CPU generator keeps 32 bits of its seed. Counting chunks up from the image's own start keeps
    # them apart; 1,000 independent seeds would repeat one in 1 of 8,600 images, noise included.
    seed = (int.from_bytes(start[:4], "little") + chunk) % 2**32
    generator = torch.Generator(device).manual_seed(seed)
    # Contiguous: drawing in channels_last order is several times slower on a CPU.
    return torch.randn(CHUNK, *shape, generator=generator, device=device)


def noisy_copies(image: Tensor, image_id: int, first: int, last: int, sigma: float, key: NoiseKey):
    """Copies first .. last - 1 of image (C, H, W) plus noise, in pieces (up to CHUNK, C, H, W)."""
    for chunk in range(first // CHUNK, math.ceil(last / CHUNK)):
        noise = draw_noise(key, image_id, chunk, image.shape, image.device)
        start = max(0, first - chunk * CHUNK)
        stop = max(0, last - chunk * CHUNK)
        yield noise[start:stop].mul_(sigma).add_(image)


# ---- certificates ----


@dataclass
class Certificate:
    """One certified image. predict is ABSTAIN (-1) and radius 0 where the bound does not exceed 1/2.

    Existing tools read the first six fields; the rest is what the radius was computed from.
    """

    idx: int
    label: int
    predict: int
    radius: float
    correct: int
    time: str
    selected: int | None = None
    n_a: int | None = None
    n_b: int | None = None
    n: int | None = None
    n0: int | None = None
    sigma: float | None = None
    alpha: float | None = None


@dataclass
class ReplayCache:
    """f's certificates for a set of images, and what it predicted for every sample behind them.

    predictions: (B, n) uint8 (int16 beyond 256 classes), zeros where nothing was sampled
    key: the noise of those samples
    """

    certificates: list[Certificate]
    predictions: Tensor
    key: NoiseKey


@dataclass
class IncrementalCertificate:
    """One image certified for f^P. method: replayed, fresh or none; passes: samples of f^P."""

    idx: int
    label: int
    predict: int
    radius: float
    correct: int
    method: str
    passes: int
    zeta: float  # nan unless replayed


class Smooth:
    """The smoothed classifier g(x) = argmax_c P[f(x + eps) = c], eps ~ N(0, sigma^2 I).

    classifier: f, any callable from images (B, C, H, W) to logits (B, num_classes)
    sigma: standard deviation of the noise, in [0, 1] pixels
    seed, purpose: name the noise; equal names draw equal noise
    batch_size: samples per forward pass; results do not depend on it

    Guarantees hold in real, not in floating-point arithmetic, as in all common code (Voracek and
    Hein, 2023).
    """

    def __init__(
        self,
        classifier: Classifier,
        num_classes: int,
        sigma: float,
        seed=0,
        batch_size=100,
        purpose="certificate",
    ):
        self.classifier = classifier
        self.num_classes = num_classes
        self.sigma = sigma
        self.key = NoiseKey(seed, purpose)
        self.batch_size = batch_size

    def certify(
        self, images: Tensor, labels: Sequence[int], ids=None, n0: int = 100, n: int = 1000, alpha=0.001
    ) -> list[Certificate]:
        """CERTIFY (Cohen et al., section 3.2.2) for a block of images (B, C, H, W) in [0, 1].

        For each image, with probability at least 1 - alpha over the noise: unless the certificate
        abstains, g predicts `predict` everywhere closer than `radius` in l2. alpha is spent per
        image: about alpha * B certificates may be wrong. ids name the images' noise (default:
        their positions). Raises ValueError for impossible n or alpha.
        """
        start = time.monotonic()
        ids = range(len(images)) if ids is None else ids
        # counts0 <- SampleUnderNoise(f, x, n0, sigma)
        counts0 = self.sample_under_noise(images, ids, n0, self.key.derive("select"))
        # c_A <- top index in counts0
        selected = counts0.argmax(1)
        # counts <- SampleUnderNoise(f, x, n, sigma)
        counts = self.sample_under_noise(images, ids, n, estimate_key(self.key, n))
        return self._certificates(ids, labels, selected, counts, n0, alpha, start)

    def _certificates(self, ids, labels, selected, counts, n0, alpha, start) -> list[Certificate]:
        """Certificates from selected classes (B,) and votes (B, classes); without votes, ABSTAIN."""
        n = counts.sum(1)
        n_a = counts.gather(1, selected[:, None]).squeeze(1)
        n_b = counts.scatter(1, selected[:, None], 0).amax(1)
        # p_A <- LowerConfBound(counts[c_A], n, 1 - alpha)
        p_lower = lower_confidence_bound(n_a, n.clamp(min=1), alpha)
        # if p_A > 1/2 return prediction c_A and radius sigma Phi^-1(p_A), else return ABSTAIN
        predicted = torch.where(p_lower > 0.5, selected, ABSTAIN)
        radius = certified_radius(p_lower, self.sigma)
        seconds = (time.monotonic() - start) / len(labels)
        return [
            Certificate(
                idx=int(ids[i]),
                label=int(labels[i]),
                predict=int(predicted[i]),
                radius=float(radius[i]),
                correct=int(predicted[i] == labels[i]),
                time=str(timedelta(seconds=seconds)),
                selected=int(selected[i]),
                n_a=int(n_a[i]),
                n_b=int(n_b[i]),
                n=int(n[i]),
                n0=n0,
                sigma=self.sigma,
                alpha=alpha,
            )
            for i in range(len(labels))
        ]

    def predict(self, images: Tensor, ids=None, n: int = 1000, alpha: float = 0.001) -> list[int]:
        """PREDICT (Cohen et al., section 3.2.1): g's class for each image (B, C, H, W) in [0, 1].

        Each class is wrong with probability at most alpha. ABSTAIN where a two-sided binomial test
        cannot tell the two most voted classes apart.
        """
        ids = range(len(images)) if ids is None else ids
        # counts <- SampleUnderNoise(f, x, n, sigma)
        counts = self.sample_under_noise(images, ids, n, self.key.derive("predict"))
        # c_A, c_B <- top two indices in counts; n_A, n_B <- their counts
        votes, classes = counts.topk(2, dim=1)
        found = []
        for (n_a, n_b), c_a in zip(votes.tolist(), classes[:, 0].tolist()):
            # if BinomPValue(n_A, n_A + n_B, 0.5) <= alpha return c_A, else return ABSTAIN
            found.append(c_a if binomtest(n_a, n_a + n_b, 0.5).pvalue <= alpha else ABSTAIN)
        return found

    # ---- incremental randomized smoothing (IRS) ----

    def certify_and_cache(
        self, images: Tensor, labels: Sequence[int], ids=None, n0: int = 100, n: int = 1000, alpha=0.001
    ) -> ReplayCache:
        """CERTIFY for the base classifier f, keeping each sample's prediction; guarantee as there.

        An image whose selected class is wrong adds 0 to the ACR of f and of f^P: it is not sampled
        further, and abstains.
        """
        start = time.monotonic()
        ids = range(len(images)) if ids is None else ids
        counts0 = self.sample_under_noise(images, ids, n0, self.key.derive("select"))
        selected = counts0.argmax(1)
        sizes = torch.where(selected == torch.as_tensor(labels), n, 0)
        key = estimate_key(self.key, n)
        found = self.predictions(images, ids, sizes, key)
        predictions = torch.zeros(len(images), n, dtype=found.dtype)
        predictions[:, : found.shape[1]] = found
        counts = torch.stack([row.long().bincount(minlength=self.num_classes) for row in predictions])
        counts = torch.where(sizes[:, None] > 0, counts, 0)
        rows = self._certificates(ids, labels, selected, counts, n0, alpha, start)
        return ReplayCache(rows, predictions, key)

    def certify_incremental(
        self, images: Tensor, cache: ReplayCache, n_p: int, alpha_zeta: float = 0.001, gamma: float = 0.99
    ) -> list[IncrementalCertificate]:
        """IRS (Ugare et al., Algorithm 2): certify a changed f^P with n_p samples per image, not n.

        `self` smooths f^P; images (B, C, H, W) are those of f's cache. For each image, with
        probability at least 1 - (alpha + alpha_zeta), g^P predicts `predict` within `radius`
        (one-sided), for an f^P fixed without looking at this noise. A search that compares many
        f^P on one cache scores them; its winner needs a certificate of its own.

        Why alpha + alpha_zeta (the published fresh branch is bounded at that sum; here at alpha):
        if truly p_A >= gamma, a replay has a valid p_A and fails by zeta alone, a fresh bound by
        alpha; if p_A < gamma, a fresh branch means that f's bound failed, as it may with alpha, and
        a replay fails by that or by zeta. p_A and zeta may share samples: a union bound.

        An image whose cached class is wrong costs nothing and counts 0. Raises ValueError for
        impossible alphas, for n_p beyond the cached samples and for another sigma than f's.
        """
        rows = cache.certificates
        n = cache.predictions.shape[1]
        alpha = rows[0].alpha
        if not (alpha_zeta > 0 and alpha + alpha_zeta < 1):
            raise ValueError(f"alpha + alpha_zeta = {alpha} + {alpha_zeta} must stay between 0 and 1")
        if n_p > n:
            raise ValueError(f"n_p = {n_p} exceeds the {n} cached samples")
        selected, right, ids = self._cached(cache)
        n_a = torch.tensor([row.n_a for row in rows])
        # c_A, p_A <- what f was certified with
        p_a = lower_confidence_bound(n_a, n, alpha)

        # if p_A < gamma: replay the first n_p cached samples
        replay = right & (p_a < gamma)
        new = self.predictions(images, ids, torch.where(replay, n_p, 0), cache.key)
        # n_delta <- how often f^P and f disagree on them
        n_delta = (new != cache.predictions[:, : new.shape[1]]).sum(1)
        # zeta <- UpperConfBound(n_delta, n_p, alpha_zeta); p <- p_A - zeta
        zeta = upper_confidence_bound(torch.where(replay, n_delta, 0), n_p, alpha_zeta)
        p_replayed = (p_a - zeta).clamp(min=0)

        # else: counts <- SampleUnderNoise(f^P, x, n_p, sigma); p <- LowerConfBound(counts[c_A], n_p, alpha)
        fresh = right & ~replay
        new = self.predictions(images, ids, torch.where(fresh, n_p, 0), cache.key.derive("fresh"))
        votes = (new == selected[:, None]).sum(1)
        p_fresh = lower_confidence_bound(votes, n_p, alpha)

        # if p > 1/2 return prediction c_A and radius sigma Phi^-1(p), else return ABSTAIN
        p_lower = torch.where(replay, p_replayed, p_fresh)
        radius = torch.where(right, certified_radius(p_lower, self.sigma), 0.0)
        return [
            IncrementalCertificate(
                idx=row.idx,
                label=row.label,
                predict=row.selected if radius[i] > 0 else ABSTAIN,
                radius=float(radius[i]),
                correct=int(radius[i] > 0),
                method="replayed" if replay[i] else "fresh" if right[i] else "none",
                passes=n_p if right[i] else 0,
                zeta=float(zeta[i]) if replay[i] else math.nan,
            )
            for i, row in enumerate(rows)
        ]

    def estimate_radii(self, images: Tensor, cache: ReplayCache, n_p: int) -> Tensor:
        """For ranking, no certificates: g^P's radii (B,) if its votes go on as in n_p samples.

        f^P's share of votes among the first n_p cached samples is taken for its share of all n.
        Candidates see the same noise, which largely cancels between them; few samples bias the
        radius upwards.
        """
        selected, right, ids = self._cached(cache)
        n = cache.predictions.shape[1]
        new = self.predictions(images, ids, torch.where(right, n_p, 0), cache.key)
        votes = (new == selected[:, None]).sum(1) * (n / n_p)
        p_lower = lower_confidence_bound(votes.clamp(max=n), n, cache.certificates[0].alpha)
        return torch.where(right, certified_radius(p_lower, self.sigma), 0.0)

    def _cached(self, cache: ReplayCache) -> tuple[Tensor, Tensor, list[int]]:
        """Selected classes (B,), whether they are the labels (B,), and the images' ids."""
        rows = cache.certificates
        if rows[0].sigma != self.sigma:
            raise ValueError(f"the cache has sigma {rows[0].sigma}, this classifier {self.sigma}")
        selected = torch.tensor([row.selected for row in rows])
        labels = torch.tensor([row.label for row in rows])
        return selected, selected == labels, [row.idx for row in rows]

    # ---- sampling ----

    def sample_under_noise(self, images: Tensor, ids: Sequence[int], n: int, key: NoiseKey) -> Tensor:
        """How often each class is predicted in n noisy copies per image: (B, classes), int64."""
        counts = torch.zeros(len(images) * self.num_classes, dtype=torch.int64)
        for rows, classes in self._stream(images, ids, [n] * len(images), key):
            places = rows * self.num_classes + classes
            counts += torch.bincount(places, minlength=len(counts))
        return counts.view(-1, self.num_classes)

    def predictions(
        self, images: Tensor, ids: Sequence[int], sizes: Tensor, key: NoiseKey, first: int = 0
    ) -> Tensor:
        """Classes of noisy copies first .. first + sizes[i] - 1 of images[i]: (B, largest size).

        uint8 (int16 beyond 256 classes); the rest of a row is 0.
        """
        dtype = torch.uint8 if self.num_classes <= 256 else torch.int16
        stream = self._stream(images, ids, sizes.tolist(), key, first)
        found = torch.cat([torch.zeros(0, dtype=dtype), *[classes.to(dtype) for _, classes in stream]])
        table = torch.zeros(len(sizes), int(sizes.max()), dtype=dtype)
        table[torch.arange(table.shape[1]) < sizes[:, None]] = found
        return table

    @torch.inference_mode()
    def _stream(self, images, ids, sizes, key, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Classify sizes[i] noisy copies of images[i], image after image, in full batches.

        Yields (rows, classes) of equal length, on the CPU: row i was given class c once.
        """
        batch, rows = [], []
        left = int(sum(sizes))
        for row, (image, image_id, size) in enumerate(zip(images, ids, sizes)):
            for noisy in noisy_copies(image, image_id, first, first + int(size), self.sigma, key):
                while len(noisy):
                    part, noisy = noisy.tensor_split([self.batch_size - len(rows)])
                    batch.append(part)
                    rows += [row] * len(part)
                    left -= len(part)
                    if len(rows) == self.batch_size or left == 0:
                        yield torch.tensor(rows), _classify(self.classifier, torch.cat(batch))
                        batch, rows = [], []


def _classify(classifier: Classifier, batch: Tensor) -> Tensor:
    """Predicted classes (B,), on the CPU. A batch that memory cannot hold is halved, with a warning."""
    try:
        return classifier(batch).argmax(1).cpu()
    except RuntimeError as error:
        exhausted = "out of memory", "allocate memory"  # as GPUs and CPUs say it
        if len(batch) == 1 or not any(text in str(error) for text in exhausted):
            raise
    warnings.warn(f"out of memory with {len(batch)} samples per batch, halved; smaller batches are faster")
    return torch.cat([_classify(classifier, half) for half in batch.chunk(2)])


# ---- aggregates and files ----


def two_sided(rows: Sequence[Certificate]) -> list[Certificate]:
    """The same certificates by Theorem 2.1 in full: p_A and p_B bounded at alpha / 2 each.

    The most counted other class needs no correction over classes: its bound is at least that of the
    true runner-up. The one-sided and the two-sided radius are each wrong with probability at most
    alpha; the larger of them, taken afterwards, with up to 1.5 alpha. Raises ValueError for rows
    without counts.
    """
    if any(row.n_a is None or row.n_b is None for row in rows):
        raise ValueError("these certificates hold no counts; a two-sided radius needs n_a and n_b")
    certificates = []
    for row in rows:
        n = max(row.n, 1)
        p_a = lower_confidence_bound(row.n_a, n, row.alpha / 2)
        p_b = upper_confidence_bound(row.n_b, n, row.alpha / 2)
        predicted = row.selected if p_a > p_b else ABSTAIN
        radius = certified_radius(p_a, row.sigma, p_b)
        correct = int(predicted == row.label)
        certificates.append(replace(row, predict=predicted, radius=radius, correct=correct))
    return certificates


def average_certified_radius(rows) -> float:
    """ACR: mean over images of radius * 1[correct] (ARQ, section 2). Raises ValueError without rows."""
    return statistics.fmean(row.radius * row.correct for row in rows)


def acr_difference(rows, base_rows=None) -> tuple[float, float]:
    """Mean and standard error over images of radius * 1[correct], less base_rows' if given.

    With base_rows, of the same images in the same order, the difference is paired.
    """
    values = torch.tensor([row.radius * row.correct for row in rows], dtype=torch.float64)
    if base_rows is not None:
        base = [row.radius * row.correct for row in base_rows]
        values = values - torch.tensor(base, dtype=torch.float64)
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def certified_accuracy(rows, radius: float) -> float:
    """Share of images that are right, not abstained, and certified at least this l2 radius."""
    return statistics.fmean(bool(row.correct) and row.radius >= radius for row in rows)


COLUMNS = [field.name for field in fields(Certificate)]
PARSERS = dict.fromkeys(COLUMNS, int) | {"radius": float, "time": str, "sigma": float, "alpha": float}


def write_certificates(file: TextIO, rows: Sequence[Certificate]) -> None:
    """Append rows to an open TSV, after the header if it is empty. Radii keep full precision."""
    if file.tell() == 0:
        file.write("\t".join(COLUMNS) + "\n")
    for row in rows:
        cells = ["" if value is None else str(value) for value in vars(row).values()]
        file.write("\t".join(cells) + "\n")
    file.flush()


def read_certificates(path) -> list[Certificate]:
    """Read a TSV of certificates, ours or with only the usual columns idx label predict radius correct time.

    A last line without its end is left out. Raises ValueError, naming the line, for anything else.
    """
    with open(path) as file:
        lines = file.read().split("\n")[:-1]
    names = lines[0].split("\t") if lines else []
    if names[:5] != COLUMNS[:5] or not set(names) <= set(COLUMNS):
        expected = " ".join(COLUMNS[:6])
        raise ValueError(f"{path}: line 1 is not a header of certificates ({expected} ...)")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        try:
            cells = dict(zip(names, line.split("\t"), strict=True))
            present = {name: cell for name, cell in cells.items() if cell or name == "time"}
            rows.append(Certificate(**{name: PARSERS[name](cell) for name, cell in present.items()}))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is not a certificate ({error})") from None
    return rows
