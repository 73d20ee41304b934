"""Properties people rely on. Seeded, real code throughout, no data needed.

Without the tests that start processes or train: python -m pytest -q test_arq.py -m "not slow"
"""

import argparse
import ast
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import pytest

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # spinning threads cost minutes on shared cores
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks: a second thread costs time

import torch
from scipy.stats import binom, binomtest, chi2_contingency, chisquare, norm
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.v2.functional import to_pil_image

import arq
import certify
import models
from certify import ABSTAIN, Certificate, ReplayCache, Smooth
from ddpg import DDPG, DDPGConfig, actor_loss, critic_loss, soft_update

HERE = Path(__file__).parent
LINES = 2060
KEY = "0|test"


# ---- certify.py: bounds and radii ----
def test_radius_worked_by_hand():
    """990 of 1,000 votes at alpha = 0.001: p_A >= 0.97603, R = 0.25 * 1.9780."""
    p_a = certify.lower_confidence_bound(990, 1000, 0.001)
    assert certify.certified_radius(p_a, 0.25) == pytest.approx(0.494502, abs=1e-6)
    both = 0.25 * (norm.ppf(0.9) - norm.ppf(0.05))
    assert certify.certified_radius(0.9, 0.5, 0.05) == pytest.approx(both)
    nothing = certify.certified_radius([0.2, 0.5, 0.0, 1.0], 1.0, [0.8, 0.5, 0.0, 1.0])
    assert nothing.tolist() == [0] * 4
    for k, n, alpha in ((3, 2, 0.1), (-1, 2, 0.1), (0, 0, 0.1), (1, 2, 0.0), (1, 2, 1.0)):
        with pytest.raises(ValueError, match="must"):
            certify.lower_confidence_bound(k, n, alpha)
    with pytest.raises(ValueError, match="between 0 and 1"):
        certify.certified_radius(1.2, 1.0)


# k, n, alpha; the bounds from below and above by mpmath, 40 digits
EXACT_BOUNDS = [
    (990, 1000, 0.001, "0.9760361871553113732242", "0.9970304990695041355851"),
    (9434, 100_000, 0.0001, "0.09093622167886994619712", "0.09782145085115840659102"),
    (51, 100, 1e-6, "0.279947742864776624663", "0.7371036876882908447386"),
    (10**6, 10**6, 1e-9, "0.9999792769488884437903", "1"),
    (3888307, 21468881, 1.087206e-15, "0.180455048765619520664", "0.181773469713646240226"),
    (0, 10**6, 1e-9, "0", "0.0000207230511115562097"),
]
EXACT_QUANTILES = {0.5001: "0.0002506628300880074923889", 0.976036: "1.978006264082972548139"}


def test_bounds_and_radii_are_never_rounded_up():
    """Exact digits are not exceeded (scipy's exceed four), and missed by 1e-11 at most."""
    for k, n, alpha, low, high in EXACT_BOUNDS:
        tiny = Fraction(max(n, 10**6), 10**17)
        low_bound = Fraction(certify.lower_confidence_bound(k, n, alpha))
        high_bound = Fraction(certify.upper_confidence_bound(k, n, alpha))
        assert Fraction(low) * (1 - tiny) <= low_bound <= Fraction(low)
        assert Fraction(high) <= high_bound < Fraction(high) + tiny
    for p, quantile in EXACT_QUANTILES.items():
        radius = Fraction(certify.certified_radius(p, 1.0))
        assert Fraction(quantile) - Fraction(1, 10**11) < radius <= Fraction(quantile)


TRIALS = 2000
ALLOWED = binom.ppf(0.999, TRIALS, 0.05)  # violations that are still chance at 0.05


def radii_of(rows) -> torch.Tensor:
    return torch.tensor([row.radius for row in rows], dtype=torch.float64)


class Outcomes(Smooth):
    """f^P whose predictions, and those of f, have known joint probabilities.

    Trials are images. joint[i][j] = P[f = i, f^P = j]; class 0 is right."""

    def __init__(self, joint, n: int, alpha: float):
        super().__init__(None, len(joint), 1.0, levels=None)
        joint, generator = torch.tensor(joint), torch.Generator().manual_seed(0)
        pairs, self.fresh = (
            torch.multinomial(p, TRIALS * n, True, generator=generator).view(TRIALS, n)
            for p in (joint.flatten(), joint.sum(0))
        )
        old, self.new = pairs // len(joint), pairs % len(joint)
        rows = []
        for i, votes in enumerate((old == 0).sum(1).tolist()):
            rows.append(Certificate(i, 0, 0, 0.0, 1, "", 0, votes, 0, n, 1, 1.0, alpha))
        self.cache = ReplayCache(rows, old.to(torch.uint8), KEY)
        self.truth = certify.certified_radius(float(joint[:, 0].sum()), 1.0)

    def predictions(self, images, ids, sizes, key):
        source = self.new if key == KEY else self.fresh
        source = source[:, : int(sizes.max())]
        return (source * (torch.arange(source.shape[1]) < sizes[:, None])).to(torch.uint8)

    def violations(self, n_p: int, alpha_zeta: float, gamma: float):
        """How many radii exceed the true one; how many were drawn fresh."""
        rows = self.certify_incremental(None, self.cache, n_p, alpha_zeta, gamma)
        assert sum(row.passes for row in rows) == n_p * TRIALS
        radii = radii_of(rows)
        assert radii.mean() > 0.3 * self.truth
        fresh = sum(row.method == "fresh" for row in rows)
        return int((radii > self.truth).sum()), fresh


# P[both say c_A], P[only f], P[only f^P], n, n_p, alpha, alpha_zeta; gamma is 0.95
NEAR_GAMMA = {
    "p_A just above, f^P nearly f": (0.960, 0.004, 0.0, 1000, 200, 0.04, 0.01),
    "p_A a hair above, most replayed": (0.880, 0.0709, 0.0, 4000, 100, 0.01, 0.04),
    "p_A a hair below, most replayed": (0.880, 0.0691, 0.0, 4000, 100, 0.01, 0.04),
    "p_A a hair below, f^P better": (0.900, 0.0491, 0.03, 1000, 200, 0.03, 0.02),
}


@pytest.mark.parametrize("case", NEAR_GAMMA)
def test_irs_spends_its_alphas_and_no_more_where_the_data_choose_the_branch(case):
    """alpha + alpha_zeta = 0.05 covers p_A on either side of gamma; five times it does not."""
    both, lost, gained, n, n_p, alpha, alpha_zeta = NEAR_GAMMA[case]
    joint = ((both, lost), (gained, 1 - both - lost - gained))
    failed, fresh = Outcomes(joint, n, alpha).violations(n_p, alpha_zeta, 0.95)
    assert failed <= ALLOWED and 0 < fresh < TRIALS  # the data did choose
    if both + lost < 0.95:
        assert fresh <= binom.ppf(0.999, TRIALS, alpha)  # only where the bound of f failed
    if case in list(NEAR_GAMMA)[:3]:
        failed, _ = Outcomes(joint, n, 5 * alpha).violations(n_p, 5 * alpha_zeta, 0.95)
        assert failed > ALLOWED


def pictures(*shape):
    """Random images of 8 bits."""
    return torch.randint(256, shape) / 255


def slab(low, high=math.inf):
    """Three classes by the position along the diagonal, from an image of grey, 153 / 255."""

    def classifier(x):
        position = (x - 0.6).flatten(1).sum(1) / math.sqrt(x[0].numel())
        return F.one_hot((position > low).long() + (position > high), 3).float()

    return classifier


def test_coverage_through_sampling():
    """f and f^P with p_A and p_B in closed form: every radius at 0.05, 150 images."""
    edges, sigma, count = (-0.55, 0.95), 0.5, 150
    images, labels = torch.full((count, 3, 32, 32), 0.6), [1] * count
    below, above = norm.cdf(edges[0] / sigma), norm.sf(edges[1] / sigma)
    p_a, p_b = 1 - below - above, max(below, above)
    g, f = Smooth(slab(*edges), 3, sigma), Smooth(slab(-0.6, 0.9), 3, sigma)
    rows = g.certify(images, labels, n0=20, n=300, alpha=0.05)
    cache = f.certify_and_cache(images, labels, n0=20, n=300, alpha=0.03)
    truth = certify.certified_radius(p_a, sigma)
    cases = [(rows, truth)]
    for gamma in (1e-9, 0.99):
        cases.append((g.certify_incremental(images, cache, 60, 0.02, gamma), truth))
    cases.append((certify.two_sided(rows), certify.certified_radius(p_a, sigma, p_b)))
    for rows, truth in cases:
        radii = radii_of(rows)
        assert (radii > truth).sum() <= binom.ppf(0.999, count, 0.05)
        assert radii.max() > 0.3 * truth


def test_two_sided_radius_worked_by_hand():
    """990 votes against 4, alpha / 2 each; it may certify where half is not reached."""
    row = Certificate(0, 3, 3, 0.49, 1, "", 3, 990, 4, 1000, 100, 0.25, 0.001)
    torn = row._replace(n_a=450, n_b=200, predict=ABSTAIN, correct=0)
    certain, torn = certify.two_sided([row, torn])
    p_a = certify.lower_confidence_bound(990, 1000, 0.0005)
    p_b = certify.upper_confidence_bound(4, 1000, 0.0005)
    expected = 0.125 * (norm.ppf(p_a) - norm.ppf(p_b))
    assert certain.radius == pytest.approx(expected, abs=1e-6)
    assert torn.predict == 3 and torn.correct == 1 and torn.radius > 0
    incremental = smooth(BASE).certify_incremental(IMAGES, cached(), 100)
    for rows in ([row._replace(n_b=None)], [row._replace(alpha=None)], incremental):
        with pytest.raises(ValueError, match="counts, sigma and alpha"):
            certify.two_sided(rows)


# ---- certify.py: sampling and certificates ----
def test_noise_and_predictions_do_not_depend_on_the_batch_size():
    images, ids, sizes = pictures(3, 3, 4, 4), [7, 1, 30], torch.tensor([130, 0, 250])

    def sampled(batch_size, some=slice(None)):
        """All noisy images, bit for bit, and their classes; full batches span images."""
        batches = []
        f = lambda x: batches.append(x) or x.flatten(1)[:, :5]  # noqa: E731
        g = Smooth(f, 5, 0.3, 0, batch_size, "test")
        table = g.predictions(images[some], ids[some], sizes[some], KEY)
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert g.samples == sizes[some].sum()
        return torch.cat(batches), table

    noisy, table = sampled(1)
    for batch_size in (33, 100, 1000):
        assert all(map(torch.equal, (noisy, table), sampled(batch_size)))
    classes = noisy.flatten(1)[:, :5].argmax(1)
    assert torch.equal(table[0, :130], classes[:130]) and torch.equal(table[2], classes[130:])
    assert table.shape == (3, 250) and not table[0, 130:].any() and not table[1].any()
    alone = sampled(100, slice(2, 3))
    assert torch.equal(alone[0], noisy[130:]) and torch.equal(alone[1][0], table[2])
    m = certify.draw_noise(KEY, 7, 1, (3, 4, 4), "cpu", 0.3, 255)[29]
    assert torch.equal(noisy[129], ((images[0] * 255).round() + m) / 255)


@pytest.mark.parametrize("levels", [255, None])
def test_noise_is_keyed_by_seed_purpose_image_and_chunk(levels):
    draws = []
    for seed, purpose in ((0, "a"), (0, "b"), (1, "a")):
        key = Smooth(None, 2, 1.0, seed, purpose=purpose).key
        for image, chunk in ((0, 0), (0, 1), (1, 0)):
            which = key, image, chunk, (3, 4, 4), "cpu", 1.0, levels
            draws.append(certify.draw_noise(*which))
            assert torch.equal(draws[-1], certify.draw_noise(*which))
    assert len(torch.cat(draws).flatten(1).unique(dim=0)) == 900


@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_noise_is_gaussian_noise_rounded_to_the_grid(sigma):
    """By its table, far into both tails; by counts of 4.9 million draws; by independence."""
    lowest, ends, _ = certify.noise_table(sigma, 255, "cpu")
    edges = (torch.arange(lowest, 1 - lowest).double() + 0.5) / (255 * sigma)
    for mass, tail in ((ends, norm.cdf(edges)), (2**62 - ends, norm.sf(edges))):
        assert torch.as_tensor(tail).allclose(mass.double() / 2**62, rtol=1e-9, atol=2e-17)
    assert 1e-6 < 0.001 - certify.alpha_after_noise(0.001, 10**6, 3072, sigma) < 1e-5
    draws = [certify.draw_noise(KEY, 0, c, (3, 64, 64), "cpu", sigma, 255) for c in range(4)]
    m, last = torch.cat(draws).long().flatten(), round(4 * 255 * sigma)
    below = norm.cdf((torch.arange(-last, last).double() + 0.5) / (255 * sigma))
    cells = torch.tensor([0, *below, 1], dtype=torch.float64).diff()
    counts = (m.clamp(-last, last) + last).bincount()
    assert 0.001 < chisquare(counts, cells * len(m)).pvalue < 0.999
    quantiles = torch.as_tensor(norm.ppf(torch.arange(1, 8) / 8))
    eighths = torch.bucketize(m / (255 * sigma), quantiles.float())
    for step in (1, 2, 3, 4, 64, 64 * 64 * 3):
        pairs = (8 * eighths[step:] + eighths[:-step]).bincount().view(8, 8)
        assert 0.001 < chi2_contingency(pairs).pvalue < 0.999


def test_a_classifier_that_reads_the_last_bits_gets_no_false_certificate():
    """With float noise, two classes are certified, each farther than the images are apart."""

    def last_bits(x):
        bits = (x.double() * 2**33).frac() != 0
        return F.one_hot((~(bits & (x.abs() < 2**-8))).flatten(1).all(1).long(), 2).float()

    images = torch.tensor([0.0, 1 / 255]).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    for levels in (None, 255):
        rows = Smooth(last_bits, 2, 0.25, levels=levels).certify(images, [0, 1])
        reach = min(radii_of(rows)) > math.sqrt(3 * 32 * 32) / 255
        assert reach and (rows[0].predict != rows[1].predict) == (levels is None)


def test_both_kinds_of_noise_certify_alike():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    images = pictures(60, 3, 8, 8)
    labels = network(images).argmax(1)
    both = [Smooth(network, 3, 0.25, levels=k).certify(images, labels) for k in (255, None)]
    difference, error = certify.acr_difference(*both)
    assert abs(difference) < 2 * error and certify.average_certified_radius(both[0]) > 0.1


class Recorder(Smooth):
    """Notes which noise is drawn, by its key, and how much of it."""

    def predictions(self, images, ids, sizes, key):
        if sizes.sum():
            self.__dict__.setdefault("drawn", []).append((key, int(sizes.sum())))
        return super().predictions(images, ids, sizes, key)


@pytest.mark.filterwarnings("error")  # of numpy's booleans as an index
def test_predict_abstains_exactly_where_the_binomial_test_says():
    for agree, n in ((50, 100), (66, 100), (67, 100), (33, 100), (11, 11), (12, 12)):
        votes = F.one_hot((torch.arange(n) >= agree).long(), 2).float()
        g = Smooth(lambda x, votes=votes: votes[: len(x)], 2, 0.1)
        sure = binomtest(agree, n, 0.5).pvalue <= 0.001
        expected = int(agree < n - agree) if sure else ABSTAIN
        assert g.predict(torch.zeros(1, 1, 1, 1), n=n, alpha=0.001) == [expected]


# ---- certify.py: incremental certificates ----
BASE, CHANGED = slab(-0.5), slab(-0.45)  # some predictions differ
IMAGES = torch.tensor([0.2, 0.4, 1.0, 0.0]).view(4, 1, 1, 1)  # the last on the wrong side


def smooth(classifier, smooth_class=Smooth):
    return smooth_class(classifier, 3, 0.25, batch_size=64, purpose="test")


@functools.cache
def cached() -> ReplayCache:
    return smooth(BASE).certify_and_cache(IMAGES, [1] * 4, n0=100, n=1000, alpha=0.001)


def first_predictions(classifier, i, key, n):
    """What a classifier says of the first n noisy copies of an image, made here."""
    chunks = range(math.ceil(n / certify.CHUNK))
    m = [certify.draw_noise(key, i, c, (1, 1, 1), "cpu", 0.25, 255) for c in chunks]
    return classifier((255 * IMAGES[i] + torch.cat(m)[:n]).round() / 255).argmax(1)


@pytest.mark.parametrize("classifier", [BASE, CHANGED])
def test_incremental_certificates_follow_the_algorithm(classifier):
    """Against counts made here: replayed below gamma, above it fresh and bounded at alpha."""
    cache, g = cached(), smooth(classifier, Recorder)
    rows = g.certify_incremental(IMAGES, cache, 300, 0.002, 0.99)
    assert [row.method for row in rows] == ["replayed", "replayed", "fresh", "none"]
    for i, row in enumerate(rows[:2]):
        new = first_predictions(classifier, i, cache.key, 300)
        n_delta = int((new != cache.predictions[i, :300]).sum())
        assert (n_delta == 0) == (classifier is BASE)
        zeta = certify.upper_confidence_bound(n_delta, 300, 0.002)
        p_a = certify.lower_confidence_bound(cache.certificates[i].n_a, 1000, 0.001)
        expected = certify.certified_radius(max(0.5, p_a - zeta), 0.25)
        assert row.zeta == pytest.approx(zeta) and row.radius == pytest.approx(expected)
    assert rows[1].radius > 0 and all(math.isnan(row.zeta) for row in rows[2:])
    fresh = certify.lower_confidence_bound(300, 300, 0.001)
    assert rows[2].radius == pytest.approx(certify.certified_radius(fresh, 0.25))
    assert rows[3][2:5] == (ABSTAIN, 0, 0)
    rows = g.certify_incremental(IMAGES, cache, 300, 0.002, gamma=1e-9)
    votes = int((first_predictions(classifier, 1, g.drawn[-1][0], 300) == 1).sum())
    fresh = certify.lower_confidence_bound(votes, 300, 0.001)
    expected = certify.certified_radius(fresh, 0.25)
    assert rows[1].radius == pytest.approx(expected) and expected > 0


def test_selection_estimation_of_every_n_and_fresh_samples_share_no_noise():
    base = smooth(BASE, Recorder)
    assert base.certify_and_cache(IMAGES, [1] * 4).key == cached().key
    base.certify(IMAGES, [1] * 4, n=200)
    select, first, select_again, second = (key for key, _ in base.drawn)
    assert select == select_again and len({select, first, second}) == 3

    def keys(gamma):
        g = smooth(CHANGED, Recorder)
        g.certify_incremental(IMAGES, cached(), 200, 0.001, gamma)
        return {key for key, _ in g.drawn}

    (fresh,) = keys(1e-9)
    assert fresh not in {select, first, second}
    assert keys(1 - 1e-9) == {cached().key} and keys(0.99) == {cached().key, fresh}


def test_images_of_the_wrong_class_cost_no_samples():
    """All others are certified in the cache as without one."""
    cache, g = cached(), smooth(BASE)
    rows = g.certify_incremental(IMAGES, cache, 100, 0.001)
    assert g.samples == 300 and [row.passes for row in rows] == [100, 100, 100, 0]
    assert cache.certificates[3].n == 0 and cache.certificates[3].predict == ABSTAIN
    only_wrong = smooth(BASE).certify_and_cache(IMAGES[3:], [1])
    assert only_wrong.predictions.shape == (1, 1000)
    plain = smooth(BASE).certify(IMAGES, [1] * 4)
    for before, row in zip(cache.certificates[:3], plain):
        assert before._replace(time="") == row._replace(time="")
    assert plain[3].n == 1000 and plain[3].n_a > 0
    with pytest.raises(ValueError, match="1000 cached"):
        g.certify_incremental(IMAGES, cache, 1001, 0.001, 0.99)
    with pytest.raises(ValueError, match="alpha"):
        g.certify_incremental(IMAGES, cache, 100, 1.0)
    with pytest.raises(ValueError, match="sigma.*0.25.*0.5"):
        Smooth(BASE, 3, 0.5).certify_incremental(IMAGES, cache, 100)
    with pytest.raises(ValueError, match="levels.*255.*None"):
        Smooth(BASE, 3, 0.25, levels=None).certify_incremental(IMAGES, cache, 100)


# ---- certify.py: aggregates and files ----
def test_certificates_survive_a_round_trip_and_a_cut(tmp_path):
    rows, header = cached().certificates, "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
    path = tmp_path / "certificates.tsv"
    for part in (rows[:2], rows[2:]):
        with path.open("a") as file:
            certify.write_certificates(file, part)
    whole = path.read_text()
    assert whole.startswith(header[:-1]) and certify.read_certificates(path) == rows
    path.write_text(whole, encoding="utf-8-sig")  # as spreadsheets save it
    assert certify.read_certificates(path) == rows
    path.write_text(header + "3\t1\t1\t0.5\t1\t1s\n")  # as other tools have it
    assert certify.read_certificates(path) == [Certificate(3, 1, 1, 0.5, 1, "1s")]
    broken = {whole[:-3]: "line 5.*cut", whole[:-1]: "line 5.*cut", whole[10:]: "line 1"}
    broken |= {"": "line 1", whole + "\n": "line 6"}
    for radius in ("x", "nan", "inf", "-0.1"):
        broken[f"{header}4\t1\t1\t{radius}\t1\t1s\n"] = "line 2"
    for text, words in broken.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=f"certificates.tsv: {words}"):
            certify.read_certificates(path)
    path.write_text(whole, encoding="utf-16")
    with pytest.raises(ValueError, match="certificates.tsv.*UTF-8"):
        certify.read_certificates(path)


def test_aggregates_worked_by_hand():
    def certificates(*pairs):
        return [Certificate(0, 0, 0, radius, correct, "") for radius, correct in pairs]

    rows = certificates((0.5, 1), (0.25, 1), (0.9, 0), (0.0, 0))
    assert certify.average_certified_radius(rows) == pytest.approx(0.1875)
    accuracies = [certify.certified_accuracy(rows, radius) for radius in (0, 0.25, 0.3, 0.6)]
    assert accuracies == [0.5, 0.5, 0.25, 0]
    base_rows = certificates((0.25, 1), (0.0, 0), (0.3, 1), (0.0, 0))
    difference, error = certify.acr_difference(rows, base_rows)
    assert difference == pytest.approx(0.05) and error == pytest.approx(0.1307, abs=1e-4)
    assert certify.acr_difference(rows[:1]) == (0.5, None)
    with pytest.raises(ValueError, match="same images"):
        certify.acr_difference(rows, base_rows[:1])


def predict(g, images, labels, ids=None, n0=10, n=50, alpha=0.001):
    return g.predict(images, ids, n, alpha)


METHODS = {"certify": Smooth.certify, "cache": Smooth.certify_and_cache, "predict": predict}


def constant(*logits):
    return lambda x: torch.tensor(logits).expand(len(x), -1)


@pytest.mark.parametrize("method", METHODS)
def test_what_names_no_class_and_wrong_arguments_are_refused(method):
    """NaN, tied infinities, one logit, other outputs; a lone infinity is an answer."""
    x, nan, inf, f = pictures(2, 3, 4, 4), math.nan, math.inf, constant(0.0, 0.0, 1.0)
    dropout = nn.Sequential(nn.Flatten(), nn.Linear(48, 3), nn.Dropout()).eval()
    dropout[2].train()  # a part of it
    norm = nn.BatchNorm1d(48, track_running_stats=False)
    by_batch = nn.Sequential(nn.Flatten(), norm).eval()
    cases = [
        (constant(*[nan] * 10), None, x, [0, 1], None, "not finite"),
        (constant(inf, 0.0, inf), None, x, [0, 1], None, "not finite"),
        (constant(1.0), None, x, [0, 1], None, "1 logits"),
        (lambda x: (x, x), None, x, [0, 1], None, "no logits.*tuple"),
        (lambda x: x, None, x, [0, 1], None, "no logits.*10, 3, 4, 4"),
        (lambda x: f(x).numpy(), None, x, [0, 1], None, "no logits.*ndarray"),
        (f, 2, x, [0, 1], None, "2 classes, but .*3 logits"),
        (f, None, x * 255, [0, 1], None, r"floats in \[0, 1\]"),
        (f, None, (x * 255).byte(), [0, 1], None, r"floats in \[0, 1\]"),
        (f, None, x * math.nan, [0, 1], None, r"floats in \[0, 1\]"),
        (f, None, x.numpy(), [0, 1], None, "images must be a tensor"),
        (f, None, x[0], [0, 1], None, "images must be a tensor"),
        (f, None, x[:0], [], None, "images.*not empty"),
        (f, None, 0.999 * x, [0, 1], None, "off the grid: round images"),
        (f, None, x, [0, 1], [4, 4], "2 images need as many different ids"),
        (f, None, x, [0, 1], [0.5, 1.5], "2 images need as many different ids"),
        (f, None, x, [0, 1], [[0], [1]], "2 images need as many different ids"),
        (dropout, None, x, [0, 1], None, "training mode"),
        (by_batch, None, x, [0, 1], None, "BatchNorm without running statistics"),
    ]
    if method != "predict":
        for labels in ([0], [0, 3], [-1, 0], [[0, 1]], [0.0, 1.0]):
            cases.append((f, None, x, labels, None, "2 images need as many labels below 3"))
    for classifier, classes, images, labels, ids, words in cases:
        with pytest.raises(ValueError, match=words):
            g = Smooth(classifier, classes, 0.25, batch_size=10)
            METHODS[method](g, images, labels, ids, 10, 50)
    for answer in (constant(0.0, inf, 1.0), constant(-inf, 0.0, -inf)):
        METHODS[method](Smooth(answer, None, 0.25), x, [0, 1], None)
    METHODS[method](Smooth(f, None, 0.25), (255 * x).round() * (1 / 255), [0, 1], None)
    for n, alpha in ((9, 0.001), (1000, 1e-13), (1000, 2.0)):
        with pytest.raises(ValueError, match=f"{n} samples need alpha"):
            METHODS[method](Smooth(f, 3, 0.25), x, [0, 1], None, 10, n, alpha)
    with pytest.raises(ValueError, match="0 samples select no class"):
        Smooth(f, None, 0.25).certify(x, [0, 1], n0=0)
    for sigma, batch_size in ((0.25, 0), (0.001, 1), (math.nan, 1)):
        with pytest.raises(ValueError, match="sigma|batch_size"):
            Smooth(f, 3, sigma, batch_size=batch_size)
    with pytest.raises(ValueError, match="sigma = inf"):
        Smooth(f, 3, math.inf, levels=None)


def test_the_classifier_gives_the_number_of_classes_and_the_type():
    """Noise is the same in every type; many classes keep their numbers."""
    images = pictures(2, 3, 4, 4)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval()
    rows = Smooth(network, None, 0.25).certify(images, [0, 1], n=50)
    double = Smooth(copy.deepcopy(network).double(), 5, 0.25).certify(images, [0, 1], n=50)
    assert [row.n_a for row in double] == [row.n_a for row in rows]
    for dtype in (torch.half, torch.bfloat16):
        Smooth(copy.deepcopy(network).to(dtype), None, 0.25).certify(images, [0, 1], n=50)
    for classes in (256, 40_000):
        last = F.one_hot(torch.tensor(classes - 1), classes).float()
        g = Smooth(lambda x, last=last: last.expand(len(x), -1), None, 0.25)
        cache = g.certify_and_cache(images, [classes - 1] * 2, n=50)
        assert (cache.predictions == classes - 1).all()


# ---- models.py ----
@functools.cache
def calibrated(arch, size, quantizer=models.LSQ):
    """BatchNorm scales of any sign, spread logits: calibrated, at 32 bits; table, images."""
    torch.manual_seed(0)
    classifier = models.build_classifier(arch, 10).train()
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # running statistics are those of the images below
            scales = torch.tensor([1.0, -0.7, 0.0, 1.3]).repeat(len(module.weight) // 4)
            module.weight.data.mul_(scales)
            nn.init.normal_(module.bias, 0, 0.2)
    images = arq.draw_shapes(100, seed=0, size=size).batch(range(100))
    images += 0.25 * torch.randn(images.shape)
    with torch.no_grad():
        classifier(images)
    table = models.quantize_model(classifier, size, quantizer)
    models.calibrate(classifier, [images])
    return classifier, table, images


def quantized(arch="resnet8", size=32, bits=4, quantizer=models.LSQ):
    """One's own copy of it, set to one width, or to "mixed" ones; table, images."""
    classifier, table, images = calibrated(arch, size, quantizer)
    if bits == "mixed":
        draw = random.Random(4).choices
        policy = {row.name: draw(range(2, 9), k=2) for row in table}
    else:
        policy = models.uniform_policy(table, bits, 32 if bits == 32 else 8)
    classifier = copy.deepcopy(classifier)
    models.set_policy(classifier, policy)
    return classifier, table, images


def set_up(network, x, bits, first_last_bits=8):
    """Quantize a network of one's own by these images, at one width; the table."""
    table = models.quantize_model(network, x.shape[-1])
    models.calibrate(network, [x])
    models.set_policy(network, models.uniform_policy(table, bits, first_last_bits))
    return table


def agree(networks, x, share):
    """Whether two networks' logits differ by less than a share of their spread."""
    with torch.no_grad():
        expected, found = (network(x) for network in networks)
    return (found - expected).abs().max() < share * expected.std()


def test_costs_worked_by_hand():
    """Strided layers count the positions that are left: 33 -> 17 -> 9."""
    table = calibrated("resnet20", 32)[1]
    assert len(table) == 22 and sum(layer.macs for layer in table) == 40_813_184
    ends = 3 * 16 * 9 * 1024 + 640
    by_hand = (ends * 64 + (40_813_184 - ends) * 16) / (40_813_184 * 1024)
    ratio = models.bitops_ratio(table, models.uniform_policy(table, 4))
    assert ratio == pytest.approx(by_hand) == pytest.approx(0.0161, abs=5e-5)
    ratio = models.bitops_ratio(table, models.uniform_policy(table, 2))
    assert ratio == pytest.approx(0.00454, abs=5e-6)
    assert models.bitops_ratio(table, models.uniform_policy(table, 32, 32)) == 1
    assert models.uniform_policy(table, 4, 6)["conv1"] == [6, 6]
    assert sum(layer.weights for layer in table) == 270_896
    assert models.size_bytes(table, models.uniform_policy(table, 8)) == 270_896
    table = models.quantize_model(models.build_classifier("resnet20", 10), 33)
    layers = {layer.name: layer for layer in table}
    assert layers["layer2.0.conv1"].macs == 16 * 32 * 9 * 17 * 17
    assert layers["layer3.0.downsample.0"].macs == 32 * 64 * 9 * 9
    assert [*layers][:2] == ["conv1", "layer1.0.conv1"] and [*layers][-1] == "fc"


class MinMax(models.LSQ):
    """Another quantizer: uniform from the largest value, its step not learned."""

    @staticmethod
    def initial_step(v, q_min, q_max):
        return v.abs().amax(1).clamp_min(1e-8) / q_max

    def forward(self, v):
        return v + (self.integers(v) * self.step_for(v) - v).detach()


@pytest.mark.parametrize("arch, size", [("resnet20", 32), ("mobilenet_v2", 64)])
def test_32_bits_are_exactly_the_float_network(arch, size):
    """Before calibration, too, when other widths are refused."""
    torch.manual_seed(0)
    classifier = models.build_classifier(arch, 10).eval()
    quick = type("Quick", (models.LSQ,), {"initial_step": staticmethod(MinMax.initial_step)})
    x = torch.rand(4, 3, size, size)
    with torch.no_grad():
        before = classifier(x)
        table = models.quantize_model(classifier, size, quick)
        floats, narrow = (models.uniform_policy(table, bits, bits) for bits in (32, 3))
        models.set_policy(classifier, floats)
        assert torch.equal(classifier(x), before)
        with pytest.raises(ValueError, match="calibrate"):
            models.set_policy(classifier, narrow)
        models.calibrate(classifier, [x])
        models.set_policy(classifier, narrow)
        assert not torch.equal(classifier(x), before)
        models.set_policy(classifier, floats)
        network = models.integer_network(classifier)
        assert network.backend == "float" and torch.equal(network(x), before)


# ---- models.py: the integer network ----
def on_backend(classifier, name):
    """The integer network on one backend; int8 shares with float32 where it saturates."""
    shared = name == "int8" and saturates()
    return models.integer_network(classifier, backends=(name, "float32") if shared else (name,))


@functools.cache
def backends() -> list[str]:
    """Those that run on this machine."""
    used = models.integer_network(quantized()[0]).backend
    return [name for name in ("int8", "float32") if name in used or name == "float32"]


@functools.cache
def saturates() -> bool:
    """Whether this processor adds pairs of products in int16: 8 x 8 bits are not exact."""
    return models.integer_network(quantized(bits=8)[0]).backend != "int8"


needs_int8 = pytest.mark.skipif("int8" not in backends(), reason="torch has no int8 here")


def patches(layer, q):
    """What each output position sees, in float64: (B, c_in, kernel, positions)."""
    conv, kernel = layer.conv, layer.weight.shape[2:]
    columns = F.unfold(q.double(), kernel, conv["dilation"], conv["padding"], conv["stride"])
    return columns.unflatten(1, (q.shape[1], -1))


def reference(layer, q):
    """conv(q, weight) in float64 by sums of products: nothing of torch's convolutions."""
    groups = layer.conv["groups"]
    columns = patches(layer, q).unflatten(1, (groups, -1))
    weight = layer.weight.double().flatten(2).unflatten(0, (groups, -1))
    sums = torch.einsum("bgckp,gock->bgop", columns, weight).flatten(1, 2)
    return sums.unflatten(2, [math.isqrt(sums.shape[2])] * 2)


@pytest.mark.parametrize("arch", ["resnet20", "mobilenet_v2"])
@pytest.mark.parametrize("bits", [2, 8, "mixed"])
def test_sums_are_those_of_integer_arithmetic(arch, bits):
    """Strided, depthwise; inputs random and extreme, signed where they can be negative."""
    classifier, _, _ = quantized(arch, 16, bits)
    networks = [models.quant_layers(on_backend(classifier, name)) for name in backends()]
    signed = [name for name, layer in networks[0].items() if layer.signed]
    if arch == "resnet20":
        assert signed == ["conv1"]
    else:  # linear outputs are inputs of the next layer
        assert "features.3.conv.0.0" in signed and "features.3.conv.1.0" not in signed
    for name, layer in networks[0].items():
        assert layer.weight.abs().max() <= 2 ** (layer.w_bits - 1) - 1
        low, high = models.integer_range(layer.a_bits, layer.signed)
        q = torch.randint(low, high + 1, (3, *layer.in_shape)).float()
        q[1], q[2] = high, low
        exact = reference(layer, q).float()
        assert all(torch.equal(layers[name].accumulate(q), exact) for layers in networks)


@pytest.mark.parametrize("backend", backends())
def test_sums_beyond_32_bits_are_exact(backend):
    """150,528 products of up to 255 * 127: more than 2^31, rounded once to a float."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(150_528, 2)), torch.rand(3, 3, 224, 224)
    x[0] = (net[1].weight[0] > 0).view(3, 224, 224)
    net[1].weight.data = net[1].weight.data.sign() / 1000
    set_up(net, x, 8)
    network = models.integer_network(net, backends=(backend, "float32"))
    assert network(x)[0, 0] > 75 and agree((net, network), x, 1e-3)
    layer, q = network[1], torch.randint(252, 256, (3, 150_528, 1, 1)).float()
    q[0] *= layer.weight[0] > 0
    exact = reference(layer, q)
    assert exact.max() > 2**31 and (exact.float().double() != exact).any()
    assert torch.equal(layer.accumulate(q), exact.float())


@needs_int8
@pytest.mark.slow
def test_sums_are_exact_where_int8_saturates():
    """Where pairs are added in int16, 8 x 8 bits run on float32, and 6 x 6 do not; tests of
    sums and epilogues with oneDNN held to AVX2."""
    tests = "8-resnet20 or mixed-resnet20 or resnet20-int8 or test_sums_beyond"
    options = ["-q", "-p", "no:cacheprovider", __file__, "-k", tests, "-m", "not slow"]
    code = "import pytest, test_arq as t; print(t.saturates());"
    code += "print(t.models.integer_network(t.quantized(bits=6)[0]).backend);"
    code += f"exit(pytest.main({options}))"
    held = {"env": {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, "cwd": HERE, "text": True}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, **held)
    if not done.stdout.startswith("True"):
        pytest.skip("this oneDNN cannot be held to AVX2")
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout
    assert done.stdout.splitlines()[1] == "int8+float32"


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("arch", ["resnet20", "mobilenet_v2"])
def test_the_fused_network_computes_the_epilogues(arch, backend):
    """Layer by layer in float64, from the integers that the layer before wrote."""
    classifier, _, images = quantized(arch)
    network = on_backend(classifier, backend)
    layers = models.quant_layers(network)
    checked, written, read, before = [], [], [], {}

    def keep_residual(layer, inputs):
        if len(inputs) == 4:
            before[layer] = inputs[3].clone()  # the sum overwrites it

    def check(layer, inputs, output):
        x, output = (v if v.ndim == 4 else v[:, :, None, None] for v in (inputs[0], output))
        low, high = models.integer_range(layer.a_bits, layer.signed)
        if x.dtype == torch.uint8:  # integers that another layer wrote, from this exact value
            q = x.long() + low
            exact = next(exact for tensor, exact in written if tensor is inputs[0])
            expected = (exact / layer.a_step.double()).clamp(low, high)
            assert (q - expected).abs().max() <= 0.5001
            read.append(layer)
        else:
            q = models.quantize(x, layer.a_step, low, high)
        scale, shift = (v.double()[:, None, None] for v in (layer.scale, layer.shift))
        out = reference(layer, q) * scale + shift
        out = out + before[layer] if layer in before else out
        if "relu" in inputs[1:]:
            out = out.clamp(min=0)
        if output.dtype == torch.uint8:
            written.append((output, out))
        else:
            assert (output - out).abs().max() <= 1e-5 * (1 + out.abs().max())
        checked.append(layer)

    for layer in layers.values():
        layer.register_forward_pre_hook(keep_residual)
        layer.register_forward_hook(check)
    with torch.inference_mode():
        network(images[:2])
    assert len(checked) == len(layers) == len(models.quant_layers(classifier))
    assert len(read) == len(written)
    if backend == "int8" and arch == "resnet20":
        assert len(read) == 9 and before


@pytest.mark.parametrize("backend", backends())
def test_predictions_do_not_depend_on_batch_size_or_threads(backend):
    classifier, _, images = quantized("resnet20")
    network, threads = on_backend(classifier.train(), backend), torch.get_num_threads()
    assert not any(module.training for module in network.modules())
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for size in (1, 7, 100):
                with torch.inference_mode():
                    found.append(torch.cat([network(part) for part in images.split(size)]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)


class Formed(nn.Module):
    """A network whose body is a function of it and of its input."""

    def __init__(self, body):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.block, self.fc, self.body = BasicBlock(8, 8), nn.Linear(8, 4), body

    def forward(self, x):
        return self.fc(self.body(self, x).mean((2, 3)))


def changed_in_place(net, x):
    y = F.max_pool2d(net.a(x), 2)
    r = F.relu(y, inplace=True)
    y += net.b(r)
    return net.block(y) + r + y


def read_after_the_sum(net, x):
    y = F.relu(net.a(x))
    z = F.relu(net.b(y) + y)
    view = y.flatten(1)
    return z + net.block(z) + y + view.view(y.shape)


def block_whose_input_is_read_again(net, x):
    y = F.relu(net.a(x))
    return net.block(y) + net.b(y)


class OtherBlock(BasicBlock):
    def forward(self, x):
        return 2 * x + super().forward(x)


BODIES = changed_in_place, read_after_the_sum, block_whose_input_is_read_again
CHANGES = {  # of a CifarResNet and its first block
    "hook": lambda net, block: block.register_forward_hook(lambda module, x, out: 0.5 * out),
    "pre-hook": lambda net, block: block.register_forward_pre_hook(lambda module, x: 2 * x[0]),
    "first": lambda net, block: net.register_forward_pre_hook(lambda module, x: 4 * x[0] - 2),
    "block": lambda net, block: setattr(block, "__class__", OtherBlock),
    "relu": lambda net, block: setattr(block, "relu", nn.Hardtanh(0, 0.1)),
}


@pytest.mark.parametrize("form", [*BODIES, *CHANGES])
@pytest.mark.parametrize("backend", backends())
def test_shared_and_changed_tensors_give_what_the_simulation_does(backend, form):
    """Blocks are fused only where nobody else reads their input, and they are as built."""
    torch.manual_seed(0)
    x = torch.rand(6, 3, 16, 16)
    if form in CHANGES:
        net = models.CifarResNet(8, 10).eval()
        CHANGES[form](net, net.layer1[0])
    else:
        net = Formed(form).eval()
    set_up(net, x, 8)
    network, before = on_backend(net, backend), x.clone()
    assert agree((net, network), x, 0.02)
    assert agree((network, network), x, 1e-9) and torch.equal(x, before)


def test_layers_that_integers_do_not_stand_for_are_refused_by_name():
    """Hooks would be lost; int8 would turn NaN into numbers; sums must be exact somewhere."""
    classifier, _, _ = quantized()
    with pytest.raises(ValueError, match="no convolution"):
        models.quantize_model(nn.Flatten(), 8)
    with pytest.raises(ValueError, match="layer conv1: no sums are exact"):
        models.integer_network(classifier, backends=())
    layer = models.quant_layers(classifier)["layer1.0.conv2"]
    hook = layer.register_forward_hook(lambda module, inputs, out: 0.5 * out)
    with pytest.raises(ValueError, match="layer layer1.0.conv2 has hooks"):
        models.integer_network(classifier)
    hook.remove()
    layer.norm.bias.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="layer layer1.0.conv2.*not finite"):
        models.integer_network(classifier)


def test_a_fused_network_that_differs_is_not_handed_out(monkeypatch):
    forward = BasicBlock.forward
    monkeypatch.setattr(BasicBlock, "forward", lambda block, x: 0.5 * forward(block, x))
    classifier, _, x = quantized(bits=6)
    network = models.integer_network(classifier)
    assert agree((classifier, network), x, 0.02)
    assert not any(isinstance(module, models.FusedBlock) for module in network.modules())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("backend", backends())
def test_what_is_not_finite_never_becomes_an_integer(backend, value):
    """Not where it comes in between layers, either."""
    net, x = Formed(lambda net, x: net.block(net.factor * net.a(x))), torch.rand(2, 3, 8, 8)
    net.b, net.factor = nn.Identity(), 1.0
    set_up(net, x, 8)
    network = on_backend(net, backend)
    net.factor = network.factor = value
    for call in (lambda: network(x), lambda: models.calibrate(net, [x])):
        with pytest.raises(ValueError, match="^layer block.conv1: its input is not finite$"):
            call()
    with pytest.raises(ValueError, match="calibrate before"):  # half of it does not count
        models.set_policy(net, dict.fromkeys(models.quant_layers(net), [8, 8]))
    network = on_backend(quantized()[0], backend)  # fused
    with pytest.raises(ValueError, match="^layer conv1: its input is not of floats$"):
        network.net((255 * x).byte())
    x[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match="^layer conv1: its input is not finite$"):
        network(x)


@pytest.mark.parametrize("backend", backends())
def test_maps_need_not_be_square_but_have_a_batch_axis(backend):
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3, (1, 8), padding=(0, 2)), nn.ReLU(), nn.ZeroPad2d((0, 1, 2, 0))]
    squeeze = type("Squeeze", (nn.Module,), {"forward": lambda self, x: x.squeeze()})()
    parts += [nn.Conv2d(8, 8, (7, 1)), nn.AdaptiveAvgPool2d(1), squeeze, nn.Linear(8, 4)]
    net, x = nn.Sequential(), torch.rand(4, 3, 16, 16)
    for name, part in zip("net relu pad conv pool squeeze fc".split(), parts):
        net.add_module(name, part)
    macs = {row.name: row.macs for row in set_up(net, x, 8)}
    assert macs == {"net": 216 * 14 * 3, "conv": 448 * 10 * 4, "fc": 32}
    network = on_backend(net, backend)
    assert agree((net, network), x, 0.02)
    with pytest.raises(ValueError, match=r"^layer fc: its input \(8,\) has no batch axis$"):
        network(x[:1])


def test_calibration_sees_all_pixels_however_images_are_split():
    """Every second column is 0, as is a border; step sizes do not notice it."""
    torch.manual_seed(0)
    net, x = models.CifarResNet(8, 10), torch.zeros(64, 3, 32, 32)
    x[:, :, 4:, 1::2] = torch.rand(64, 3, 28, 16)
    steps, whole, _ = [], models.LSQ(), models.quantize_model(net, 32)
    for size in (64, 50, 3):
        models.calibrate(net, x.split(size), values=32768)
        layers = models.quant_layers(net).values()
        steps.append(torch.stack([layer.input_quantizer.initial_steps for layer in layers]))
    whole.observe(x.flatten()[None])
    assert torch.allclose(steps[0][0], whole.initial_steps, rtol=0.1)
    assert all(torch.allclose(other, steps[0], rtol=0.3) for other in steps[1:])


def test_what_is_frozen_stays_so(tmp_path):
    """One line for what cannot be: other bits, calibration, pickles, integers of integers."""
    classifier, table, x = quantized()
    policy = models.uniform_policy(table, 4)
    frozen, _, _ = packed_and_loaded(classifier, table, tmp_path)
    network = models.integer_network(frozen)
    for refused, given in ((models.set_policy, policy), (models.calibrate, [x])):
        with pytest.raises(ValueError, match="frozen"):
            refused(frozen, given)
    with pytest.raises(ValueError, match="integer_network made"):
        models.integer_network(network)
    if "int8" in network.backend:
        with pytest.raises(ValueError, match="pack_model"):
            torch.save(network, tmp_path / "network.pt")
    with pytest.raises(ValueError, match="exactly the layers"):
        models.set_policy(classifier, {"conv1": [8, 8]})
    for wrong in (4, [4, 4.0], [True, 4], "44", [4], [32, 4], [9, 8], None):
        with pytest.raises(ValueError, match="^layer conv1: bits are"):
            models.set_policy(classifier, policy | {"conv1": wrong})


class PreActivation(nn.Module):
    """BatchNorm first: what the first convolution gives meets a BatchNorm and a sum."""

    def __init__(self, num_classes, channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, 1, 1, bias=False)
        self.conv2 = nn.Conv2d(8, 16, 3, 2, 1, bias=False)
        self.conv3 = nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(8, 16, 1, 2, bias=False)
        self.norm1, self.norm2, self.norm3 = map(nn.BatchNorm2d, (8, 16, 16))
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        x = self.conv1(x)
        out = self.conv2(F.relu(self.norm1(x)))
        x = self.shortcut(x) + self.conv3(F.relu(self.norm2(out)))
        return self.fc(F.relu(self.norm3(x)).mean((2, 3)))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("channels", [1, 3])
def test_pre_activation_networks_of_any_channels_are_quantized(backend, channels):
    """BatchNorms that follow no layer stay float; integers agree with the simulation."""
    torch.manual_seed(0)
    network, x = PreActivation(5, channels), torch.rand(64, channels, 16, 16)
    for part in (network.norm1, network.norm2, network.norm3):
        nn.init.uniform_(part.running_mean, -0.2, 0.2)
        nn.init.uniform_(part.weight, -1.5, 1.5)
    floats = copy.deepcopy(network.eval())
    table = set_up(network, x, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(x), floats(x)) and len(table) == 5
        models.set_policy(network, models.uniform_policy(table, 6, 6))
        assert agree((network, on_backend(network, backend)), x, 0.05)
        assert (network(x) - floats(x)).std() < 0.2 * floats(x).std()


def test_a_norm_behind_an_activation_in_place_is_not_the_layers():
    """New BatchNorms hardly compute anything, so that their place shows only after training."""
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(8), nn.Flatten()
    net = nn.Sequential(*layers, nn.Linear(8 * 14 * 14, 4))
    table = models.quantize_model(net, 16)
    assert [row.norm for row in table] == ["", ""] and net[2] is layers[2]


class With(nn.Module):
    """A convolution, something else, a linear layer."""

    def __init__(self, extra, call=lambda extra, x: extra(x)):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.extra, self.call, self.fc = extra, call, nn.Linear(4, 2)

    def forward(self, x):
        x = self.call(self.extra, F.relu(self.norm(self.conv(x))))
        return self.fc(x.mean((2, 3))) if isinstance(x, torch.Tensor) else x


POINT = nn.Conv2d(4, 4, 1)
REFUSED = {
    "ConvTranspose2d": With(nn.ConvTranspose2d(4, 4, 3)),
    "MultiheadAttention": With(
        nn.MultiheadAttention(4, 2), lambda extra, x: extra(*[x.flatten(2).mT] * 3)[0]
    ),
    "ParameterList": With(
        nn.ParameterList([torch.rand(4, 4, 1, 1)]), lambda extra, x: F.conv2d(x, extra[0])
    ),
    "layer extra is on": With(
        nn.Linear(4, 4), lambda extra, x: extra(x.flatten(2).mT).mT[..., None]
    ),
    "layer extra, Parametrized.* weight": With(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    ),
    "layer extra, Conv2d.*padding": With(nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1)),
    "layer extra, Mine.*forward": With(type("Mine", (nn.Linear,), {"forward": F.relu})(4, 4)),
    "layer extra is called by keyword": With(POINT, lambda extra, x: extra(input=x)),
    "layer extra runs 2 times": With(POINT, lambda extra, x: extra(extra(x))),
    "layer extra runs 0 times.*aux_logits": With(POINT, lambda extra, x: x),
    "layer extra.1 runs 0 times by this name": With(
        nn.Sequential(POINT, POINT), lambda e, x: e[0](x)
    ),
    "returns a dict": With(nn.Identity(), lambda extra, x: {"out": x}),
    "bfloat16": With(nn.Identity()).bfloat16(),
    "not finite: check": models.Classifier(With(nn.Identity()), std=(0.0, 1.0, 1.0)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_refused_network_stays_as_it_was(words):
    network = copy.deepcopy(REFUSED[words]).train()
    getattr(network, "net", network).norm.eval()  # a mode of its own

    def modules():
        return [(name, type(m), m.training) for name, m in network.named_modules()]

    weights, before = copy.deepcopy(network.state_dict()), modules()
    with pytest.raises(ValueError, match=words):
        models.quantize_model(network, 8)
    after = network.state_dict()
    assert modules() == before and list(after) == list(weights)
    assert all(torch.equal(after[key], weights[key]) for key in weights)


# ---- models.py: the quantizer ----
@pytest.mark.parametrize("q_min, q_max", [(0, 15), (-8, 7), (-7, 7)])
@pytest.mark.parametrize(
    "shape, steps", [((6, 5, 4, 4), ()), ((6, 40), ()), ((6, 5, 3, 3), (6, 1, 1, 1))]
)
def test_gradients_are_the_plain_formula(q_min, q_max, shape, steps):
    """Values inside, outside and on the clip limits; LSQ's equation 3, but for its scale."""
    generator = torch.Generator().manual_seed(0)
    step = 0.25 + torch.zeros(steps, dtype=torch.float64)
    scaled = torch.randint(-40, 40, shape, generator=generator).double() / 2 + 0.1
    edges = [q_min, q_max, q_min - 1, q_max + 1, q_min + 0.5, q_max - 0.5]
    scaled.view(-1)[:6] = torch.tensor(edges)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    for kept in (torch.contiguous_format, torch.channels_last)[: 1 + (len(shape) == 4)]:
        v = (scaled * step).to(memory_format=kept).requires_grad_()
        s = step.clone().requires_grad_()
        out = models.FakeQuantize.apply(v, s, q_min, q_max, 40)
        out.backward(grad)
        inside = (scaled > q_min) & (scaled < q_max)
        q = scaled.round().clamp(q_min, q_max)
        of_step = torch.where(inside, q - scaled, q) * grad / (math.sqrt(40) * q_max**2)
        assert torch.equal(out, q * step)
        assert torch.equal(v.grad, torch.where(inside, grad, 0.0))
        assert torch.allclose(s.grad, of_step.sum_to_size(step.shape), rtol=1e-9, atol=1e-9)


def test_no_step_leaps_in_training():
    """By LSQ's own gradient scale, steps of 8-bit layers grew a thousandfold here."""
    torch.manual_seed(0)
    classifier, images = models.build_classifier("resnet8", 10), arq.draw_shapes(1000, 0, 16)
    config = arq.parse_config("--batch-size 50 --image-size 16 --device cpu".split())
    arq.train(classifier, images, config, 60, 0.1)
    classifier, table = arq.prepare(classifier, images, config)
    models.set_policy(classifier, models.uniform_policy(table, 4))
    arq.train(classifier, images, config, 20, arq.FINETUNE_LR)
    for name, layer in models.quant_layers(classifier).items():
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            moved = quantizer.step / quantizer.initial_steps[quantizer.bits]
            assert 0.5 < moved.min() and moved.max() < 2, name
        assert layer.freeze().weight.flatten(1).any(1).all(), name


def test_best_step_beats_its_neighbours_and_widths_change_at_any_time():
    classifier, _, _ = quantized("resnet20")
    layer = models.quant_layers(classifier)["layer2.1.conv1"]
    errors = []

    def error(step, bits):
        step = step[:, None, None, None]
        q = models.quantize(layer.weight, step, *models.integer_range(bits, True, True)) * step
        return (q - layer.weight).detach().square().mean((1, 2, 3))

    for bits in range(2, 9):
        layer.set_bits(bits, bits)
        step = layer.weight_quantizer.step.detach()
        assert (layer.w_bits, layer.a_bits) == (bits, bits)
        for factor in (0.8, 1.25):
            assert (error(step, bits) <= error(factor * step, bits)).all()
        errors.append(float(error(step, bits).mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-2 * errors[0]


@needs_int8
def test_backends_give_other_integers_only_at_rounding_ties():
    """True for every network: float error decides only where x / step is half an integer."""
    classifier, _, images = quantized("resnet20", 32, "mixed")
    network, seen = models.integer_network(classifier, backends=("float32",)), []

    def compare(layer, inputs):
        x, fast = inputs[0], models.Int8Layer(layer)
        q = models.quantize(x, layer.a_step, layer.q_min, layer.q_max)
        other = fast._to_uint8(x, fast.step).float() + layer.q_min
        exact = (x.double() / layer.a_step.double())[q != other]
        assert ((exact - exact.floor() - 0.5).abs() < 1e-4).all()
        seen.append((q - other).abs().max())

    for layer in models.quant_layers(network).values():
        layer.register_forward_pre_hook(compare)
    network(images)
    assert len(seen) == 22 and max(seen) <= 1


def test_another_quantizer_is_one_class(tmp_path):
    """Calibrated, set to 4 bits, trained for a step, frozen, packed: nothing else knows it."""
    classifier, table, images = quantized(quantizer=MinMax)
    layer = models.quant_layers(classifier)["layer2.0.conv1"]
    largest = layer.weight.detach().flatten(1).abs().amax(1)
    assert torch.equal(layer.weight_quantizer.step.detach(), largest / 7)
    config = arq.parse_config(["--batch-size", "32", "--device", "cpu"])
    arq.train(classifier, arq.draw_shapes(64, seed=0, size=32), config, 1, 0.1)
    assert torch.equal(layer.weight_quantizer.step.detach(), largest / 7)  # not learned
    network = models.integer_network(classifier)
    again, _, _ = packed_and_loaded(classifier, table, tmp_path)
    assert agree((network, models.integer_network(again)), images, 1e-9)


# ---- models.py: files ----
DESCRIPTION = {"arch": "resnet8", "image_size": 32, "sigma": 0.25, "dataset": "cifar10"}
DESCRIPTION["classes"] = list("abcdefghij")


def packed_and_loaded(classifier, table, tmp_path, **description):
    data = models.pack_model(classifier, table, DESCRIPTION | description)
    (tmp_path / "m.arq").write_bytes(data)
    return models.load_model(tmp_path / "m.arq")


@pytest.mark.parametrize("bits", [2, "mixed"])
def test_a_packed_network_comes_back(tmp_path, bits):
    """The same logits, the same bytes again, and the size promised."""
    classifier, table, x = quantized("resnet20", 16, bits)
    about = DESCRIPTION | {"arch": "resnet20", "image_size": 16}
    again, table_again, saved = packed_and_loaded(classifier, table, tmp_path, **about)
    with torch.no_grad():
        one, two = (models.integer_network(network)(x) for network in (classifier, again))
    assert torch.equal(one, two) and len(one.unique()) > 100
    layers = models.quant_layers(classifier).items()
    policy = {name: [layer.w_bits, layer.a_bits] for name, layer in layers}
    assert table_again == table and saved["policy"] == policy
    assert {name: saved[name] for name in about} == about
    data = (tmp_path / "m.arq").read_bytes()
    assert models.pack_model(again, table, about) == data
    counted = models.size_bytes(table, policy) + 8 * sum(row.c_out for row in table)
    assert counted < len(data) < 1.05 * counted


def test_nothing_is_packed_that_could_not_be_loaded_again(tmp_path, monkeypatch):
    """A description with less or fewer than all; and nothing loads as another network."""
    classifier, table, _ = quantized("resnet20")
    for name in DESCRIPTION:
        rest = {key: value for key, value in DESCRIPTION.items() if key != name}
        with pytest.raises(ValueError, match=name):
            models.pack_model(classifier, table, rest)
    for wrong, words in (({"classes": [1]}, "fewer classes"), ({"arch": "mine"}, "'mine'")):
        with pytest.raises(ValueError, match=words):
            models.pack_model(classifier, table, DESCRIPTION | wrong)
    with pytest.raises(ValueError, match="32 bits"):
        models.pack_model(*quantized(bits=32)[:2], DESCRIPTION)
    with pytest.raises(ValueError, match="'resnet8': only a Classifier"):
        models.pack_model(classifier.net, table, DESCRIPTION)
    monkeypatch.setitem(models.NETWORKS, "pre", (PreActivation, models.CIFAR10))
    with pytest.raises(ValueError, match="only layers are packed, not .'norm1.weight'"):
        models.pack_model(*quantized("pre", 16)[:2], DESCRIPTION | {"arch": "pre"})
    more = nn.Sequential(models.CifarResNet(8, 10), nn.BatchNorm1d(10))
    monkeypatch.setitem(models.NETWORKS, "resnet8", (lambda **_: more, models.CIFAR10))
    with pytest.raises(ValueError, match="m.arq lacks or adds tensors"):
        packed_and_loaded(*quantized()[:2], tmp_path)
    monkeypatch.undo()
    for arch in ("resnet8", "resnet32"):
        with pytest.raises(ValueError):
            packed_and_loaded(classifier, table, tmp_path, arch=arch)


def test_no_corrupted_file_is_taken_for_a_network(tmp_path):
    """200 flipped bits and cuts: one ValueError that names the file."""
    path, draw = tmp_path / "model.arq", random.Random(0)
    data = models.pack_model(*quantized(bits=3)[:2], DESCRIPTION)
    for i in range(200):
        place = draw.randrange(len(data)) if i % 4 else i // 4
        flipped = data[:place] + bytes([data[place] ^ 1 << i % 8]) + data[place + 1 :]
        path.write_bytes(flipped if i % 2 else data[:place])
        with pytest.raises(ValueError, match="model.arq"):
            models.load_model(path)
    path.write_bytes(data[:4] + b"\x09" + data[5:])
    with pytest.raises(ValueError, match="version 9"):
        models.load_model(path)


def test_packed_bits_by_hand():
    """0, 6, 3: 3-bit numbers, lowest bit first, are 9 bits of two octets."""
    octets = models.regroup(torch.tensor([0, 6, 3]), 3, 8)
    assert octets.tolist() == [0b11_110_000, 0b0]
    assert models.regroup(octets.to(torch.uint8), 8, 3)[:3].tolist() == [0, 6, 3]


def test_public_checkpoint_layouts(tmp_path):
    """Wrapped, prefixed, renamed, with numbers of a normalisation; others name the tensors."""
    torch.manual_seed(0)
    net, x = models.CifarResNet(20, 10).eval(), torch.rand(2, 3, 32, 32)
    state = net.state_dict()

    @torch.no_grad()
    def logits(saved):
        torch.save(saved, tmp_path / "c.pt")
        return models.load_base_checkpoint(tmp_path / "c.pt", "resnet20", 10).eval()(x)

    expected = models.Classifier(net).eval()(x)
    assert torch.equal(logits(state), expected)
    for prefix in ("", "1.", "module.", "_orig_mod.module.1."):
        prefixed = {prefix + key: value for key, value in state.items()}
        assert torch.equal(logits({"epoch": 90, "state_dict": prefixed}), expected)
        theirs = {prefix + key.replace("fc.", "linear."): state[key] for key in state}
        theirs = {key.replace("downsample", "shortcut"): theirs[key] for key in theirs}
        assert all(torch.equal(logits({key: theirs}), expected) for key in ("net", "model"))
    ours = models.Classifier(net, (0.5,) * 3, (0.25,) * 3).eval()  # as base.pt has it
    assert torch.equal(logits(ours.state_dict()), ours(x))
    cases = {
        "Weights only": {"args": argparse.Namespace(lr=0.1), "state_dict": state},
        "'NoneType'": {"state_dict": None, "epoch": 3},
        'Unexpected.*"epoch"': state | {"epoch": 3},
        "'list'": [state],
        "not int": {0: x},
        "Missing.*std": {"mean": x[0]} | state,
        "Unexpected.*extra": state | {"extra": x},
        "Missing.*fc.bias": {key: state[key] for key in [*state][:-1]},
    }
    for words, saved in cases.items():
        with pytest.raises(
            ValueError,
            match=f"^[^\n]*c.pt is no state dict of resnet20 with 10 [^\n]*{words}[^\n]*$",
        ):
            logits(saved)


# ---- ddpg.py ----
def best_rewards(seed: int, episodes: int = 60) -> list[float]:
    """The best reward that agent, control and random search find, with equal evaluations.

    The best policy is known: widest weights and narrowest inputs (odd seeds) or the reverse,
    so that no one constant action, which luck and shrinking noise can find, comes near it."""
    table = calibrated("resnet8", 32)[1]
    environment = arq.BitWidthEnvironment(table, budget=1.0)
    target = torch.tensor([8.0, 2.0] if seed % 2 else [2.0, 8.0])
    settings = {"hidden": 32, "actor_lr": 1e-3, "critic_lr": 1e-2, "tau": 0.05}
    settings |= {"warmup_episodes": 40, "noise_final": 0.05, "episodes": episodes}
    generator = torch.Generator().manual_seed(1000 + seed)
    best = []
    for kind in ("agent", "control", "random"):
        agent = DDPG(environment.state_size, seed, DDPGConfig(**settings))
        if kind != "agent":
            agent.update = lambda: None  # explores like the agent, and learns nothing
        if kind == "random":
            agent.act = lambda state: float(torch.rand((), generator=generator))
        rewards = []
        for _ in range(episodes):
            states, actions, policy = environment.rollout(agent.act)
            bits = torch.tensor([policy[layer.name] for layer in table[1:-1]])
            rewards.append(-float((bits - target).square().mean()))
            agent.learn(states, actions, rewards[-1])
        best.append(max(rewards))
    return best


@pytest.mark.slow
def test_the_agent_beats_random_search():
    """In at least 7 of 10 seeds; and as often the control, which shows that it learns."""
    results = [best_rewards(seed) for seed in range(10)]
    against_control = sum(agent > control for agent, control, _ in results)
    against_random = sum(agent > random for agent, _, random in results)
    assert min(against_random, against_control) >= 7, (against_random, against_control)


def test_losses_and_soft_update_worked_by_hand():
    """Linear networks with known weights; after an episode's last decision, Q' is 0."""
    one = torch.ones(2, 1)
    q, mu = nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(q.weight, 2.0)
    nn.init.constant_(mu.weight, 0.5)
    # Q = 4; targets: 1 + 0.5 * Q'(1, 0.5) = 1 + 0.5 * 3 = 2.5, and 1 at the end.
    batch = (one, one, one, one, torch.tensor([[0.0], [1.0]]))
    loss = critic_loss(q, q, mu, batch, discount=0.5)
    assert loss.item() == pytest.approx(((4 - 2.5) ** 2 + 3**2) / 2)
    assert actor_loss(mu, q, batch).item() == pytest.approx(-3.0)
    target = copy.deepcopy(q)
    nn.init.constant_(q.weight, 3.0)
    soft_update(target, q, 0.1)
    assert torch.allclose(target.weight, torch.full((1, 2), 2.1))


def agent_after(rewards, **settings) -> DDPG:
    """A small agent after an episode of four equal decisions per reward."""
    torch.manual_seed(0)
    states, actions = torch.rand(4, 3), torch.rand(4, 1)
    agent = DDPG(3, 0, DDPGConfig(hidden=8, **settings))
    for reward in rewards:
        agent.learn(states, actions, reward)
    return agent


def test_the_baseline_is_halfway_to_each_mini_batchs_mean():
    """Rewards 3, then 1, then 5 in the whole replay: 3, (3 + 1) / 2 = 2, (2 + 5) / 2."""
    agent = agent_after([], replay_episodes=1, warmup_episodes=9)
    baselines = []
    for reward in (3.0, 1.0, 5.0):
        agent.learn(torch.rand(4, 3), torch.rand(4, 1), reward)
        agent.update()
        baselines.append(agent.baseline)
    assert baselines == [3.0, 2.0, 3.5]


def test_the_critic_sees_the_reward_less_the_baseline_in_standard_deviations():
    """Constant rewards teach the same as other constant ones, and scaled as unscaled."""

    def critic(*rewards):
        agent = agent_after(rewards, warmup_episodes=0)
        return torch.cat([p.flatten() for p in agent.critic.parameters()])

    assert torch.equal(critic(5.0, 5.0, 5.0), critic(-70.0, -70.0, -70.0))
    assert torch.allclose(critic(5.0, 5.0, 6.0), critic(40.0, 40.0, 48.0), atol=1e-5)
    assert not torch.allclose(critic(5.0, 5.0, 5.0), critic(5.0, 5.0, 6.0), atol=1e-5)


def test_replay_holds_whole_episodes_without_dummy_rows():
    agent = agent_after([1.0, 2.0, 3.0], replay_episodes=2)
    state, _, reward, next_state, done = map(torch.cat, zip(*agent.replay))
    assert reward.flatten().tolist() == [2.0] * 4 + [3.0] * 4  # the oldest is gone
    assert done.flatten().tolist() == [0, 0, 0, 1] * 2
    assert torch.equal(next_state[:3], state[1:4])


def test_actions_are_uniform_in_warm_up_then_spread_by_a_noise_that_falls():
    """sigma_e: 0.5 until warm-up ends, 0.1 from the last episode on."""
    agent = DDPG(3, 0, DDPGConfig(hidden=8, warmup_episodes=2, episodes=5))
    spread = {}
    for agent.episode in (0, 1, 2, 3, 4, 9):
        actions = torch.tensor([agent.act(torch.zeros(3)) for _ in range(500)])
        assert actions.min() >= 0 and actions.max() <= 1
        spread[agent.episode] = float(actions.std())
    noise = [0.5, 0.5, 0.5, 0.05**0.5, 0.1, 0.1]
    for agent.episode, expected in zip(spread, noise):
        assert agent.noise == pytest.approx(expected)
    assert spread[0] == pytest.approx(12**-0.5, abs=0.02)  # uniform in [0, 1]
    assert spread[4] == pytest.approx(0.1, abs=0.02)


def test_an_agent_continues_from_its_state():
    def episode(agent):
        states = torch.rand(6, 3, generator=torch.Generator().manual_seed(9))
        actions = torch.tensor([[agent.act(state)] for state in states])
        agent.learn(states, actions, float(actions.sum()))
        return actions

    config = DDPGConfig(hidden=16, warmup_episodes=2, episodes=8)
    agent, continued = DDPG(3, 5, config), DDPG(3, 6, config)
    for _ in range(4):
        episode(agent)
    continued.load_state_dict(copy.deepcopy(agent.state_dict()))
    for _ in range(3):
        assert torch.equal(episode(agent), episode(continued))


# ---- arq.py: environment and budget ----
def tiny_table(count=4):
    """Equal layers in a row: 1,000 MACs and 100 weights each."""
    return [models.Layer(f"l{i}", 3, 4, 3, 1, 8, 100, 1000, False) for i in range(count)]


def test_actions_map_to_equal_shares_of_widths():
    bits = [arq.BitWidthEnvironment.bits((i + 0.5) / 7000) for i in range(7000)]
    assert [bits.count(width) for width in range(2, 9)] == [1000] * 7
    assert arq.BitWidthEnvironment.bits(0.0) == 2 and arq.BitWidthEnvironment.bits(1.0) == 8


def test_every_policy_fits_the_budget_and_spends_it():
    table = calibrated("resnet20", 32)[1]
    environment = arq.BitWidthEnvironment(table, 0.015)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        act = lambda state: float(torch.rand((), generator=generator))  # noqa: E731
        states, actions, policy = environment.rollout(act)
        assert states.shape == (40, environment.state_size) and actions.shape == (40, 1)
        assert states.min() >= 0 and states.max() <= 1
        assert policy[table[0].name] == policy[table[-1].name] == [8, 8]
        assert models.bitops_ratio(table, policy) <= 0.015
    widest = environment.rollout(lambda state: 1.0)[2]
    assert models.bitops_ratio(table, widest) > 0.0145
    assert widest != environment.rollout(lambda state: 0.0)[2]


def test_states_are_haqs_features_by_name():
    """Index, c_in, c_out, kernel, stride, map, weights, depthwise, operand; then the bits."""
    table = tiny_table(5)
    table[2] = table[2]._replace(c_in=9, c_out=8, kernel=1, stride=2, map_size=4, weights=50)
    table[3] = table[3]._replace(depthwise=True)
    states, _, _ = arq.BitWidthEnvironment(table, 0.9).rollout(lambda state: 0.5)
    expected = [
        [0.0, 0, 0, 1, 0, 1, 1, 0, 0],
        [0.5, 1, 1, 0, 1, 0, 0, 0, 1],
        [1.0, 0, 0, 1, 0, 1, 1, 1, 0],
    ]
    assert [states[i, :9].tolist() for i in (0, 3, 4)] == expected


def test_a_state_ends_with_the_bits_just_emitted_over_8():
    """2, 5, 8 and 3 bits leave 1, 2/8, 5/8, 8/8. Over budget, inputs lose bits first."""
    as_emitted = {"l0": [8, 8], "l1": [2, 5], "l2": [8, 3], "l3": [8, 8]}
    for budget in (0.05, 0.035):
        emitted = iter([0.0, 0.5, 1.0, 0.25])
        environment = arq.BitWidthEnvironment(tiny_table(), budget)
        states, actions, policy = environment.rollout(lambda state: next(emitted))
        assert states[:, -1].tolist() == [1.0, 0.25, 0.625, 1.0]
        assert actions.flatten().tolist() == [0.0, 0.5, 1.0, 0.25]
        assert (policy == as_emitted) == (budget == 0.05)


def test_a_budget_takes_from_the_last_layer_back_inputs_first():
    """Of 4,096: 162; 154 by l2's input, 152 by its weights, 150 by l1's input; 136 at least."""
    policy = {"l0": [8, 8], "l1": [2, 5], "l2": [8, 3], "l3": [8, 8]}
    for budget, l1, l2 in ((154, [2, 5], [8, 2]), (150, [2, 4], [7, 2]), (136, [2, 2], [2, 2])):
        forced = models.enforce_budget(tiny_table(), policy, budget / 4096)
        assert forced == policy | {"l1": l1, "l2": l2}
    with pytest.raises(ValueError, match="budget.*too low"):
        models.enforce_budget(tiny_table(), policy, 135 / 4096)


# ---- arq.py: Algorithm 1 ----
def base_cache():
    """Two images of radius 0.4 and 0.2: a base ACR of 0.3."""
    rows = [certify.Certificate(i, 0, 0, r, 1, "") for i, r in enumerate((0.4, 0.2))]
    return certify.ReplayCache(rows, torch.zeros(2, 1), "key")


def tiny_search(agent, acrs, seen, **options):
    """Algorithm 1 on a table of four layers, with these ACRs instead of certificates."""
    environment, acrs = arq.BitWidthEnvironment(tiny_table(), 0.04), iter(acrs)

    def evaluate(policy, cache):
        assert cache.key == "key" and models.bitops_ratio(tiny_table(), policy) <= 0.04
        seen.append(policy)
        return next(acrs)

    return arq.search(base_cache(), environment, agent, evaluate, **options)


def test_search_needs_no_command_line():
    """Rewards are gains over the base's ACR; the agent learns before the next episode."""
    settings = DDPGConfig(hidden=8, episodes=5, warmup_episodes=2)
    agent, acrs, seen, records = DDPG(10, 0, settings), [0.15, 0.36, 0.3, 0.33, 0.06], [], []
    for record in tiny_search(agent, acrs, seen):
        records.append(record)
        assert agent.episode == len(records) == len(seen)
    assert [record["policy"] for record in records] == seen
    assert [record["episode"] for record in records] == list(range(5))
    assert [record["acr"] for record in records] == acrs
    rewards = [record["reward"] for record in records]
    assert rewards == pytest.approx([-0.5, 0.2, 0.0, 0.1, -0.8])
    assert [float(episode[2][0]) for episode in agent.replay] == pytest.approx(rewards)
    assert [record["noise"] for record in records][:3] == [0.5] * 3
    assert records[4]["noise"] < 0.5
    assert arq.best_policy(records) == records[1]["policy"]
    assert list(tiny_search(agent, [], seen)) == []  # its episodes are used up
    agent = DDPG(10, 0, settings)
    search = tiny_search(agent, acrs, [], reward=lambda acr, base: acr - 2 * base)
    assert [record["reward"] for record in search] == pytest.approx([a - 0.6 for a in acrs])


@functools.cache
def small_evaluation():
    """What evaluate_policy takes, of an untrained base; images of which some are right."""
    command = "--episode-batches 2 --batch-size 16 --n-p 20 --search-n 40 --device cpu"
    config = arq.parse_config(command.split())
    train_images, search_images = arq.hold_out(arq.draw_shapes(40, seed=0, size=32), 4)
    torch.manual_seed(0)
    base = arq.build_base(config, 10)
    pixels, g = search_images.batch(range(4)), Smooth(base, 10, 0.25, purpose="search")
    labels = g.sample_under_noise(pixels, search_images.ids, 100, "key").argmax(1).tolist()
    cache = g.certify_and_cache(pixels, labels, search_images.ids, 100, 40, 0.001)
    assert sum(row.selected == row.label for row in cache.certificates) >= 2
    start, table = arq.prepare(base, search_images, config)
    shared = {"start": start, "base": base, "images": train_images, "search_pixels": pixels}
    return functools.partial(arq.evaluate_policy, cache=cache, config=config, **shared), table


def test_a_reward_is_what_the_calls_by_hand_certify():
    evaluate, table = small_evaluation()
    policy, given = models.uniform_policy(table, 8), evaluate.keywords
    pixels, cache, config = given["search_pixels"], given["cache"], given["config"]

    network = copy.deepcopy(given["start"])
    models.set_policy(network, policy)
    share = {"teacher": given["base"], "share": 0.7}
    loss = functools.partial(arq.noise_augmentation, **share)
    arq.train(network, given["images"], config, 2, 0.02, "episode", loss=loss)
    g = Smooth(models.integer_network(network), 10, 0.25)
    rows = g.certify_incremental(pixels, cache, 20, 0.001, 0.99)
    acr = evaluate(policy)
    assert acr == pytest.approx(sum(row.radius for row in rows) / 4, abs=1e-9) and acr > 0


def test_a_policys_reward_does_not_depend_on_the_policies_before_it():
    """Same weights, batches and noise; a policy that diverges scores nothing."""
    evaluate, table = small_evaluation()
    policy, start = models.uniform_policy(table, 8), evaluate.keywords["start"]
    before = copy.deepcopy(start.state_dict())
    acrs = [evaluate(p) for p in (policy, models.uniform_policy(table, 3), policy)]
    assert acrs[0] == acrs[2] > 0
    after = start.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    start = copy.deepcopy(start)
    start.state_dict()["net.layer1.0.conv1.norm.running_mean"][0] = math.nan
    assert evaluate(policy, start=start) == 0.0


def search_records(tmp_path, acrs, state=None, save=lambda *_: None):
    """The records of run_search, and the policies that were evaluated."""
    config = arq.parse_config("--episodes 6 --device cpu".split())
    environment, acrs, seen = arq.BitWidthEnvironment(tiny_table(), 0.04), iter(acrs), []

    def evaluate(policy, cache):
        seen.append(policy)
        return next(acrs)

    best = arq.run_search(environment, evaluate, base_cache(), config, tmp_path, state, save)
    lines = (tmp_path / "search.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert best == arq.best_policy(records)
    return records, seen


def test_the_policy_of_the_largest_acr_wins_and_a_stop_loses_no_episode(tmp_path):
    acrs, saved = [0.1, 0.5, 0.3, 0.6, 0.2, 0.4], []
    save = lambda state, *_: saved.append(copy.deepcopy(state))  # noqa: E731
    records, seen = search_records(tmp_path, acrs, save=save)
    assert [r["acr"] for r in records] == acrs and seen == [r["policy"] for r in records]
    assert arq.best_policy(records) == records[3]["policy"]
    continued, again = search_records(tmp_path, acrs[4:], saved[3])
    assert continued == records and again == seen[4:]


# ---- arq.py: images ----
def test_shapes_are_the_same_everywhere_and_balanced():
    images = arq.draw_shapes(50, seed=3, size=32)
    pixels = images.batch(range(50))
    assert torch.equal(pixels, arq.draw_shapes(50, seed=3, size=32).batch(range(50)))
    assert pixels.shape == (50, 3, 32, 32) and 0 <= pixels.min() < pixels.max() <= 1
    assert images.labels == [label for label in range(10) for _ in range(5)]


def test_held_out_images_are_evenly_spaced_and_in_no_training_set():
    images = arq.draw_shapes(50, seed=3, size=16)
    others, held_out = arq.hold_out(images, 10)
    assert held_out.ids == list(range(0, 50, 5)) and held_out.labels == list(range(10))
    assert sorted(others.ids + held_out.ids) == list(range(50))
    assert torch.equal(held_out.batch(range(10)), images.batch(held_out.ids))
    assert torch.equal(others.batch(range(40)), images.batch(others.ids))
    assert held_out.subset([2, 1]).ids == [10, 5]  # the place in the whole set names the noise


def test_augmentation_only_moves_and_flips():
    x = torch.arange(1.0, 1 + 2 * 3 * 8 * 8).view(2, 3, 8, 8)
    torch.manual_seed(0)
    moved = [arq.augment(x, torch.rand(3, 2)) for _ in range(200)]
    assert any(torch.equal(m[0], x[0].flip(2)) for m in moved)
    assert any(torch.equal(m[0], x[0]) for m in moved)
    allowed = set(x[1].flatten().tolist()) | {0.0}
    assert all(set(m[1].flatten().tolist()) <= allowed for m in moved)


def image_tree(root: Path, sizes=None, train=12, test=4, difference=130) -> None:
    """Folders of two classes, one of them lighter, with grey and colour PNGs."""
    sizes = sizes or ((40, 50), (33, 32), (64, 48))
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                shape = (1 if i % 4 == 0 else 3, *sizes[i % len(sizes)])
                low = difference * label
                pixels = torch.randint(low, low + 120, shape, generator=generator)
                image = to_pil_image(pixels.to(torch.uint8))
                image.save(root / split / name / f"{i:02d}.png")


FOLDER = "--dataset folder --image-size 24 --images 8 --search-images 4 --batch-size 8".split()
FOLDER += ["--device", "cpu"]


@pytest.mark.parametrize("mode, dtype", [("I;16", "int16"), ("I", "int32"), ("F", "float32")])
def test_images_of_more_than_8_bits_are_refused(tmp_path, mode, dtype):
    """They have no range by which to scale them; converting would make them white or black."""
    values = (torch.rand(16, 16) * (1 if mode == "F" else 30_000)).numpy().astype(dtype)
    file = tmp_path / "wide.tiff"
    to_pil_image(values, mode=None if mode == "I;16" else mode).save(file)
    with pytest.raises(ValueError, match=f"{file.name}.*mode {mode[0]}.*8 bits"):
        arq.ImageSet([0], ["wide"], 16, [str(file)]).batch([0])


def test_folders_in_any_size_stream(tmp_path, monkeypatch):
    """Grey and colour files come out as RGB of one size, in the order asked for."""
    image_tree(tmp_path)
    options = ["--image-size", "72", "--data", str(tmp_path)]
    config = arq.parse_config([*FOLDER, *options])
    train, test = (arq.load_images(config, train=train) for train in (True, False))
    assert test.classes == ["dark", "light"] and train.labels == [0] * 12 + [1] * 12
    assert all(isinstance(source, str) for source in train.source)
    assert train.batch([23]).mean() > 0.5 > train.batch([0]).mean()
    assert train.batch([3, 0, 20]).shape == (3, 3, 72, 72)
    weights = []  # they do not depend on who decodes
    for workers in (0, 2):
        monkeypatch.setattr(arq, "WORKERS", workers)
        torch.manual_seed(0)
        classifier = models.build_classifier("resnet8", 2)
        weights.append(arq.train(classifier, train, config, 4, 0.1).values())
    assert all(map(torch.equal, *weights))


# ---- arq.py: training ----
@pytest.mark.parametrize("bits", [32, 3])
def test_training_continues_bit_for_bit(bits):
    """From the state of the last whole epoch: 4 batches each, stopped in the second."""
    config = arq.parse_config(["--batch-size", "16", "--device", "cpu"])
    images, calls = arq.draw_shapes(64, seed=0, size=16), []

    def stop_in_batch_7(*batch):
        calls.append(batch)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return arq.noise_augmentation(*batch)

    def train(state=None, loss=arq.noise_augmentation):
        """The network, and the state after each epoch."""
        classifier, states = quantized("resnet8", 16, bits)[0], []

        def save(state, done, total):
            assert state or done < total  # without a state, the work is not done
            states.extend(copy.deepcopy([state] if state else []))

        with contextlib.suppress(KeyboardInterrupt):
            arq.train(classifier, images, config, 12, 0.1, "base", 1e-4, state, save, loss)
        return classifier.state_dict().values(), states

    whole, states = train()
    assert [state["batch"] for state in states] == [4, 8, 12]
    _, states = train(loss=stop_in_batch_7)
    assert [state["batch"] for state in states] == [4] and len(calls) == 7
    assert not torch.equal(calls[0][2], calls[4][2])  # epochs draw noise of their own
    continued, _ = train(states[-1])
    assert all(map(torch.equal, whole, continued))


def test_training_that_diverges_or_has_no_loss_per_image_ends():
    """With nothing saved of it, and whether or not something is to be saved."""
    config = arq.parse_config(["--batch-size", "16", "--device", "cpu"])
    images, saved = arq.draw_shapes(32, seed=0, size=16), []
    for options in ({"save": lambda state, *_: state and saved.append(state)}, {}):
        classifier = models.build_classifier("resnet8", 10)
        with pytest.raises(FloatingPointError, match="diverged by batch 2"):
            arq.train(classifier, images, config, 2, 1e30, **options)
    assert not saved
    mean = lambda *batch: arq.noise_augmentation(*batch).mean()  # noqa: E731
    with pytest.raises(ValueError, match="one value per image"):
        arq.train(models.build_classifier("resnet8", 10), images, config, 2, 0.1, loss=mean)
    with pytest.raises(ValueError, match="--batch-size 16"):
        arq.train(classifier, images.subset(range(8)), config, 2, 0.1)


def test_a_share_of_the_targets_is_the_teachers_under_other_noise():
    """The teacher sees the same images, none under its own noise, and gets no gradient."""
    torch.manual_seed(0)
    network, teacher, seen = nn.Linear(3, 4), nn.Linear(3, 4), []
    x, noise, labels = torch.rand(5, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    plain = F.cross_entropy(network(x + noise), labels, reduction="none")
    assert torch.equal(arq.noise_augmentation(network, x, noise, labels), plain)

    def ask(noisy):
        seen.append(noisy - x)
        return teacher(noisy)

    losses = arq.noise_augmentation(network, x, noise, labels, ask, 0.25)
    soft = teacher(x + seen[0]).softmax(1)
    expected = 0.75 * plain - 0.25 * (soft * network(x + noise).log_softmax(1)).sum(1)
    assert losses.allclose(expected)
    assert seen[0].sum(1).sort().values.allclose(noise.sum(1).sort().values, atol=1e-5)
    assert ((seen[0] - noise).abs().amax(1) > 0.01).all()
    losses.sum().backward()
    assert network.weight.grad is not None and teacher.weight.grad is None


def test_mixed_precision_trains_nearly_as_float32(monkeypatch):
    """In bfloat16 weights and step sizes, kept in float32, move in the same direction."""
    config = arq.parse_config(["--batch-size", "16", "--device", "cpu"])
    images, moves = arq.draw_shapes(64, seed=0, size=32), []
    for fast in (False, True):
        monkeypatch.setitem(arq.BFLOAT16, "cpu", fast)
        classifier = quantized()[0]
        before = [p.detach().clone() for p in classifier.parameters()]
        arq.train(classifier, images, config, 1, 0.1, "base", 0.0)
        assert all(p.dtype == torch.float32 for p in classifier.parameters())
        pairs = zip(classifier.parameters(), before)
        moves.append(torch.cat([(p - b).flatten() for p, b in pairs]))
    assert F.cosine_similarity(*moves, dim=0) > 0.9 and not torch.equal(*moves)


# ---- arq.py: the run folder ----
def test_a_product_is_made_once_and_its_work_continues_from_what_it_saved(tmp_path):
    states = []

    def work(state, save):
        states.append(state)
        save({"batch": 3})
        if state is None:
            raise KeyboardInterrupt
        return {"value": 7}

    def make():
        folder = arq.RunFolder(tmp_path / "run", {"sigma": 0.25})
        folder.make("another", "other.json", lambda state, save: [1])
        return folder.make("work", "work.json", work)

    with pytest.raises(KeyboardInterrupt):
        make()
    assert not (tmp_path / "run/work.json").exists()
    assert json.loads(make().read_text()) == {"value": 7}
    make()
    assert states == [None, {"batch": 3}]
    (tmp_path / "run/other.json").unlink()
    make()  # what another product's work saved is not handed to this one
    assert len(states) == 2 and json.loads((tmp_path / "run/other.json").read_text()) == [1]


def test_a_folder_of_other_options_is_refused_by_name_before_anything_is_touched(tmp_path):
    run, letters = tmp_path / "run", tmp_path / "letters"
    options = {"sigma": 0.25, "out": "here", "n": 1000}
    arq.RunFolder(run, options).lock.close()
    before = (run / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"--n 1000 there, 500 here; give another --out"):
        arq.RunFolder(run, {**options, "n": 500})
    assert (run / "config.json").read_bytes() == before
    arq.RunFolder(run, {**options, "out": "moved"}).lock.close()  # changes no result
    letters.mkdir()
    (letters / "to.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds no run"):
        arq.RunFolder(letters, options)
    assert os.listdir(letters) == ["to.txt"]


def test_a_run_folder_has_one_process_and_a_broken_state_is_named(tmp_path):
    lock = f"import arq, time; folder = arq.RunFolder({str(tmp_path)!r}, {{}})"
    command = [sys.executable, "-c", f"{lock}; print(1, flush=True); time.sleep(60)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=HERE)
    process.stdout.readline()
    with pytest.raises(ValueError, match="another process is at work"):
        arq.RunFolder(tmp_path, {})
    process.kill()
    process.communicate()
    folder = arq.RunFolder(tmp_path, {})  # the lock ends with its process
    (tmp_path / "state.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="state.pt is broken"):
        folder.make("work", "work.json", lambda state, save: 1)


# ---- arq.py: the command ----
def fails(arguments, capsys, *words, code=2) -> bool:
    """This exit code and one line that holds all the words."""
    assert arq.main(arguments) == code
    error = capsys.readouterr().err
    assert code == 130 or error.startswith("arq.py: error: ")
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error
    return True


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--sigma 25", ["--sigma", "from 0.004 to 4", "[0, 1] pixels"]),
        ("--budget 0.004", ["--budget", "0.00"]),
        ("--n 9", ["9 samples", "alpha", "take more"]),
        (f"--checkpoint {__file__}", ["test_arq.py is no state dict", "--arch"]),
        ("--episode-batch 1", ["--episode-batch"]),
        ("--n-p 600", ["--n-p 600", "--search-n 400"]),
        ("--images 2000", ["--images 2000", "1000"]),
        ("--policy 32", ["--policy 32", "2 to 8 bits"]),
        ("--policy /nowhere.json", ["/nowhere.json", "No such file"]),
        ("--policy README.md", ["README.md", "no JSON file"]),
    ],
)
def test_wrong_input_ends_with_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("# no policy")
    assert fails(arguments.split(), capsys, *words)
    assert not (tmp_path / "runs").exists()


def test_files_that_are_no_use_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    """An empty checkpoint; a class without images; options beside a packed network."""
    monkeypatch.chdir(tmp_path)
    Path("empty.pt").touch()
    assert fails(["--checkpoint", "empty.pt"], capsys, "empty.pt", "empty")
    for name in ("train/a", "train/b", "test/a", "test/b"):
        Path("data", name).mkdir(parents=True)
    assert fails("--dataset folder --data data".split(), capsys, "--data data", "classes a, b")
    classifier, table, _ = quantized()
    packed_and_loaded(classifier, table, tmp_path, dataset="mine")
    Path("wide.json").write_text(json.dumps(models.uniform_policy(table, 8)))
    for wrong, reason in (
        ("--checkpoint empty.pt", "--evaluate takes no --checkpoint"),
        ("--policy wide.json", "--evaluate takes no --policy"),
        ("--image-size 16", "omit it"),
        ("--arch resnet20", "omit it"),
        ("--data nowhere", "train/<class>"),  # its own data set is a folder
    ):
        assert fails(f"--evaluate m.arq {wrong}".split(), capsys, wrong.split()[0], reason)
    assert fails("--policy wide.json".split(), capsys, "wide.json", "raise --budget")
    assert fails("--evaluate wide.json".split(), capsys, "wide.json: no packed network")


def test_figures_are_shown_as_they_are_and_never_rounded_up():
    assert [arq.cut(k / 100) for k in range(101)] == [f"{k / 100:.4f}" for k in range(101)]
    values = [0.12349999, -0.00001, 0.9999999]
    assert [arq.cut(value) for value in values] == ["0.1234", "0.0000", "0.9999"]


TREE = Path(tempfile.mkdtemp(prefix="arq-images-"))
SMALL = (
    f"--dataset folder --data {TREE} --arch resnet8 --batch-size 32 --epochs 2 --image-size 12 "
    "--episodes 4 --episode-batches 1 --finetune-epochs 0.5 --images 6 --n 200 --n0 20 "
    "--search-images 12 --search-n 100 --n-p 50 --device cpu --sigma 0.5"
).split()


@pytest.fixture(scope="session", autouse=True)
def tree():
    image_tree(TREE, ((12, 12),), train=150, test=10, difference=10)
    yield
    shutil.rmtree(TREE)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The whole method, once: two epochs of training, four episodes, a little fine-tuning."""
    folder = tmp_path_factory.mktemp("run")
    assert arq.main([*SMALL, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def copied_run(finished_run, tmp_path, monkeypatch):
    """The finished run, to be changed, as `run` in the current folder."""
    shutil.copytree(finished_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return finished_run


def contents(run: Path) -> dict:
    """What a run left, without times."""
    results = json.loads((run / "results.json").read_text())
    rows, predictions, key = arq.read_state(run / "search_cache.pt")
    cached = [row._replace(time="") for row in rows], predictions.tolist(), key
    records = [json.loads(line) for line in (run / "search.jsonl").read_text().splitlines()]
    tables = [run / "certificates.tsv", run / "base_certificates.tsv"]
    tables = [[row._replace(time="") for row in certify.read_certificates(t)] for t in tables]
    return {
        "results": {name: value for name, value in results.items() if name != "seconds"},
        "base": [value.tolist() for value in arq.read_state(run / "base.pt").values()],
        "cache": cached,
        "search": records,
        "policy": (run / "policy.json").read_bytes(),
        "model": (run / "model.arq").read_bytes(),
        "tables": tables,
    }


@pytest.mark.slow
def test_a_run_leaves_what_others_script_against(finished_run, tmp_path):
    """And a network that gives the same certificates again."""
    results = json.loads((finished_run / "results.json").read_text())
    for column in (results, results["base"]):
        names = "acr accuracy certified_accuracy abstained bitops_ratio size_bytes file_bytes"
        assert set(names.split()) <= column.keys()
    assert results["bitops_ratio"] <= 0.015 and results["base"]["bitops_ratio"] == 1
    assert all(seconds > 0 for seconds in results["seconds"].values())
    rows = certify.read_certificates(finished_run / "certificates.tsv")
    assert [row.idx for row in rows] == [i * 20 // 6 for i in range(6)]
    assert results["acr"] == certify.average_certified_radius(rows)
    assert results["accuracy"] == certify.certified_accuracy(rows, 0)
    both_sides = certify.two_sided(rows)
    assert results["two_sided"]["acr"] == certify.average_certified_radius(both_sides)
    lines = (finished_run / "search.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    policy = json.loads((finished_run / "policy.json").read_text())
    assert policy == arq.best_policy(records)
    packed, again = finished_run / "model.arq", tmp_path / "again"
    classifier, table, saved = models.load_model(packed)
    assert results["file_bytes"] == packed.stat().st_size and saved["policy"] == policy
    assert results["bitops_ratio"] == models.bitops_ratio(table, policy)
    assert hashlib.sha256(packed.read_bytes()).hexdigest().startswith(results["network"])
    command = f"--evaluate {packed} --data {TREE} --images 6 --n 200 --n0 20 --device cpu"
    assert arq.main([*command.split(), "--out", str(again)]) == 0
    second = certify.read_certificates(again / "certificates.tsv")
    assert [r._replace(time="") for r in second] == [r._replace(time="") for r in rows]


def run_command(arguments, processes=0, **options) -> subprocess.Popen:
    """arq.py as a process, or as several under torchrun; it prints to one pipe, in lines."""
    start = [sys.executable]
    if processes:
        torchrun = "torch.distributed.run --standalone".split()
        start += ["-m", *torchrun, f"--nproc-per-node={processes}", "--"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*start, str(HERE / "arq.py"), *arguments], **streams, **options)


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the process ended without saying {text!r}")


@pytest.mark.slow
def test_a_run_killed_anywhere_continues_bit_for_bit(finished_run, tmp_path):
    """SIGKILL at a seeded random moment; then every file is that of the finished run."""
    moment = random.Random(5)
    command = [*SMALL, "--out", "run"]
    process = run_command(command, cwd=tmp_path)
    wait_for(process, "run folder")
    for _ in range(moment.randint(1, 4)):
        process.stdout.readline()
    time.sleep(moment.uniform(0, 0.8))
    assert process.poll() is None
    process.kill()
    process.communicate()
    process = run_command(command, cwd=tmp_path)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert contents(tmp_path / "run") == contents(finished_run)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_a_run_stopped_after_any_write_continues(finished_run, monkeypatch, capsys, tmp_path):
    """By Ctrl-C, between a product and the state after it, too; one episode at most is lost."""
    monkeypatch.chdir(tmp_path)
    command, written, seen, stops = [*SMALL, "--out", "run"], [], [], 0
    write, evaluate = arq.write_whole, arq.evaluate_policy

    def stopped(path, value):
        write(path, value)
        written.append(path.name)
        if len(written) == 2 + stops % 2:  # the first is config.json
            raise KeyboardInterrupt

    def noted(policy, cache, **given):
        seen.append(policy)
        return evaluate(policy, cache, **given)

    monkeypatch.setattr(arq, "write_whole", stopped)
    monkeypatch.setattr(arq, "evaluate_policy", noted)
    while stops < 60 and not Path("run/results.json").exists():
        written.clear()
        assert fails(command, capsys, "interrupted", "same command continues", code=130)
        stops += 1
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert arq.main(command) == 0 and 8 < stops < 60
    left = contents(Path("run"))
    assert left == contents(finished_run)
    assert len(seen) > len(left["search"])  # some ran twice, one after the other
    once = [one for one, _ in itertools.groupby(seen)]
    assert once == [record["policy"] for record in left["search"]]


@pytest.mark.slow
def test_a_given_policy_skips_the_search(copied_run, capsys):
    """A bit-width is forced under the budget, a file is taken as it is; both are certified."""
    base = [*SMALL, "--checkpoint", "run/base.pt"]
    assert arq.main([*base, "--policy", "4", "--images", "1", "--out", "four"]) == 0
    table = models.quantize_model(models.build_classifier("resnet8", 10), 12)
    policy = json.loads(Path("four/policy.json").read_text())
    assert policy == models.enforce_budget(table, models.uniform_policy(table, 4), 0.015)
    assert not Path("four/search.jsonl").exists()
    text = Path("four/results.json").read_text()
    results = json.loads(text, parse_constant=lambda name: pytest.fail(name))  # as NaN
    assert results["acr_standard_error"] is None  # one image has none
    assert results["acr_difference"]["standard_error"] is None
    assert "standard error None" in capsys.readouterr().out
    again = [*base, "--policy", "run/policy.json"]
    assert arq.main([*again, "--out", "again"]) == 0
    assert Path("again/model.arq").read_bytes() == Path("run/model.arq").read_bytes()
    policy["layer1.0.conv1"] = [2, 2]
    Path("run/policy.json").write_text(json.dumps(policy))
    capsys.readouterr()
    assert fails([*again, "--out", "again"], capsys, "--policy", "another --out")
    assert fails([*SMALL, "--out", "run"], capsys, "policy.json", "--policy")  # of model.arq


@pytest.mark.slow
def test_another_budget_takes_the_bases_certificates_along(copied_run, capsys):
    """Where images, sigma, seed and counts agree; otherwise they are made again."""
    command = [*SMALL, "--checkpoint", "run/base.pt", "--budget", "0.02"]
    assert arq.main([*command, "--out", "wider"]) == 0
    output = capsys.readouterr().out
    for name in ("search_cache.pt", "base_certificates.tsv"):
        assert f"{name}: taken from run" in output
        assert Path("wider", name).read_bytes() == Path("run", name).read_bytes()
    results = [json.loads(Path(run, "results.json").read_text()) for run in ("run", "wider")]
    assert results[0]["base"]["acr"] == results[1]["base"]["acr"]
    assert results[1]["bitops_ratio"] > 0.015
    config = json.loads(Path("run/config.json").read_text())
    assert len({config["training set"], config["test set"]}) == 2
    for name in ("test set", "device"):  # of other images or noise
        Path("run/config.json").write_text(json.dumps(config | {name: "another"}))
        folder = arq.RunFolder(name, config)
        arq.take_along(arq.parse_config([*command, "--out", name]), folder)
        assert sorted(os.listdir(name)) == ["config.json", "run.lock"]
    assert arq.main([*command, "--n", "300", "--out", "longer"]) == 0
    assert "base_certificates.tsv: taken" not in capsys.readouterr().out
    assert certify.read_certificates("longer/base_certificates.tsv")[0].n == 300


@pytest.mark.slow
def test_a_changed_table_is_refused_and_a_removed_one_made_again(copied_run, capsys):
    file = Path("run/certificates.tsv")
    lines = file.read_text().splitlines(keepends=True)
    for changed, words in (
        (lines[:-1], ["one row per image", "remove it"]),
        ([*lines, lines[-1]], ["one row per image", "remove it"]),
        ([*lines[:-1], lines[-1][:-9]], ["certificates.tsv", "cut"]),
    ):
        file.write_text("".join(changed))
        assert fails([*SMALL, "--out", "run"], capsys, *words)
    file.unlink()
    assert arq.main([*SMALL, "--out", "run"]) == 0
    assert contents(Path("run")) == contents(copied_run)


@pytest.mark.slow
def test_a_full_disk_ends_with_one_line(finished_run, capsys, monkeypatch, tmp_path):
    """The base fits in a megabyte, the agent does not; nothing is lost. Or a locked folder."""
    monkeypatch.chdir(tmp_path)
    command, limits = [*SMALL, "--out", "full"], resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        assert fails(command, capsys, "full", "File too large", "same command continues")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert arq.main(command) == 0
    assert contents(Path("full")) == contents(finished_run)
    Path("locked").mkdir(0o500)
    place = "locked" if os.geteuid() else "/sys"  # root may write elsewhere, but not there
    command = [*SMALL, "--out", f"{place}/run"]
    assert fails(command, capsys, place, "same command continues")


@pytest.mark.slow
def test_an_unreadable_image_in_an_epoch(tmp_path, monkeypatch, capsys):
    """Found by a worker in mid-training: one line; repaired, the run goes on and ends."""
    monkeypatch.chdir(tmp_path)
    image_tree(tmp_path / "data")
    options = (
        "--arch resnet8 --epochs 2 --episodes 1 --episode-batches 1 --finetune-epochs 0.5 "
        "--n 20 --n0 5 --search-n 10 --n-p 10 --image-size 72 --data data --out run "
        "--images 2"
    )
    command = [*FOLDER, *options.split()]
    victim = Path("data/train/dark/08.png")
    whole, write = victim.read_bytes(), arq.write_whole

    def break_after_one_epoch(path, value):
        write(path, value)
        if path.name == "state.pt":
            victim.write_bytes(b"\x89PNG broken")

    monkeypatch.setattr(arq, "write_whole", break_after_one_epoch)
    assert fails(command, capsys, "data/train/dark/08.png", "repair or remove it")
    assert arq.read_state(Path("run/state.pt"))["state"]["batch"] == 2
    monkeypatch.setattr(arq, "write_whole", write)
    victim.write_bytes(whole)
    assert arq.main(command) == 0
    assert "train the base, continued" in capsys.readouterr().out


# ---- arq.py: several processes, large images ----
@pytest.mark.slow
def test_two_processes_give_the_certificates_of_one(copied_run):
    """Without training in between: the same rewards, policies, network and certificates."""
    options = "--checkpoint run/base.pt --episode-batches 0 --finetune-epochs 0 --images 7"
    command = [*SMALL, *options.split()]
    assert arq.main([*command, "--out", "one"]) == 0
    process = run_command([*command, "--out", "two"], processes=2)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert contents(Path("one")) == contents(Path("two"))
    assert output.count("episode ") == 4  # only one of them prints


def one_step(path: Path) -> None:
    """A training batch of a network without BatchNorm, which two processes cannot halve."""
    arq.BFLOAT16["cpu"] = False  # in bfloat16 halves do not add up to the whole
    config = arq.parse_config(["--batch-size", "17", "--device", "cpu"])
    if arq.WORLD > 1:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(arq.RANK)  # all start from the first one's weights
    images = arq.draw_shapes(40, seed=0, size=16)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10))
    classifier = models.Classifier(net)
    arq.train(classifier, images, config, 1, 1.0, "base", 1e-4)
    arq.write_whole(path, classifier.state_dict())
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 14 * 14, 10)
    normed = models.Classifier(nn.Sequential(*layers))
    arq.train(normed, images, config, 2, 0.1, "base", 1e-4)
    states = arq.gather({name: value.tolist() for name, value in normed.state_dict().items()})
    assert all(state == states[0] for state in states)  # BatchNorm's statistics, too
    if arq.WORLD > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_step_as_one(tmp_path):
    one_step(tmp_path / "one.pt")
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node=2".split()
    command = [sys.executable, *torchrun, __file__, str(tmp_path / "two.pt")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    one, two = (arq.read_state(tmp_path / name) for name in ("one.pt", "two.pt"))
    torch.manual_seed(0)
    start = nn.Conv2d(3, 8, 3).weight
    assert (one["net.0.weight"] - start).abs().max() > 0.01
    assert all(value.allclose(two[name], rtol=1e-4, atol=1e-6) for name, value in one.items())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_a_process_that_dies_ends_the_job(tmp_path, monkeypatch, capsys):
    """One process continues where two were."""
    monkeypatch.chdir(tmp_path)
    process = run_command([*SMALL, "--out", "run"], processes=2)
    wait_for(process, "train the base ...")
    while not Path("run/state.pt").exists():
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
    (last,) = [pid for pid, text in environments.items() if b"\0RANK=1\0" in text]
    os.kill(int(last), signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    died = re.search(r"failed \(exitcode: -9\) local_rank: 1", output)
    assert process.returncode != 0 and died, output
    assert arq.main([*SMALL, "--out", "run"]) == 0
    assert "continued" in capsys.readouterr().out


@pytest.mark.slow
def test_large_images_go_through_every_stage(tmp_path, monkeypatch):
    """On MobileNetV2, read by workers; ResNet-50 takes the same way."""
    monkeypatch.chdir(tmp_path)
    image_tree(tmp_path / "data", ((96, 96), (130, 210), (500, 90)), train=3, test=1)
    command = (
        "--dataset imagenet --arch mobilenet_v2 --data data --epochs 1 --batch-size 2 --n0 5 "
        "--search-images 2 --search-n 10 --n-p 10 --images 2 --n 10 --episodes 1 "
        "--episode-batches 1 --finetune-epochs 0.5 --eval-batch 2 --device cpu --out run "
        "--image-size 96"
    )
    assert arq.main(command.split()) == 0
    results = json.loads(Path("run/results.json").read_text())
    assert results["bitops_ratio"] <= 0.015 and results["images"] == 2


# ---- the repository ----
MODULES = {n: (HERE / f"{n}.py").read_text() for n in ("arq", "models", "certify", "ddpg")}


def test_the_modules_are_short():
    lines = [line for text in MODULES.values() for line in text.splitlines()]
    assert len(lines) <= LINES


def test_the_house_rules_hold():
    scripts = [path for path in HERE.glob("*.py") if path.name != "test_arq.py"]
    for path in [*scripts, *HERE.glob("benchmarks/*.py")]:
        assert all(len(line) <= 96 for line in path.read_text().splitlines()), path
    for name, text in MODULES.items():
        lines = [line for line in text.splitlines() if line.strip()]
        assert sum(map(len, lines)) / len(lines) <= 58, name
        imported = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
        ours = set(MODULES) - {"arq"} if name == "arq" else set()
        assert imported & set(MODULES) == ours, name
        others = imported - set(MODULES) - set(sys.stdlib_module_names)
        assert others <= {"torch", "torchvision", "scipy"}, name


def test_benchmarks_set_no_attribute_of_a_module():
    assignment = re.compile(r"^\s*(arq|certify|models|ddpg)(\.\w+)+\s*=[^=]", re.MULTILINE)
    for path in HERE.glob("benchmarks/*.py"):
        match = assignment.search(path.read_text())
        assert match is None, f"{path}: {match.group()}"


def test_the_repository_is_light():
    scripts = list(HERE.glob("benchmarks/*.py"))
    lines = sum(len(path.read_text().splitlines()) for path in scripts)
    assert len(scripts) <= 10 and lines <= 2200
    files = [path for path in HERE.glob("results/**/*") if path.is_file()]
    assert len(files) <= 40 and sum(path.stat().st_size for path in files) <= 2.5e6
    assert len((HERE / "README.md").read_bytes()) <= 12 * 1024
    assert len((HERE / "results/README.md").read_bytes()) <= 18 * 1024


def test_readme_names_only_what_exists():
    """Functions, flags and files that the README mentions are there."""
    readme = (HERE / "README.md").read_text()
    ours = [line for line in readme.splitlines() if "benchmarks/" not in line]
    flags = {arq.flag(name) for name in arq.Config.__dataclass_fields__}
    flags |= {"--help", "--nproc-per-node"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", "\n".join(ours))) <= flags
    for module, name in re.findall(r"`(certify|models|ddpg|arq)\.([A-Za-z_]\w*)", readme):
        assert name == "py" or hasattr(sys.modules[module], name), f"{module}.{name}"
    paths = re.findall(r"(?:benchmarks|results)/[\w./-]*\w", readme)
    assert all((HERE / path).exists() for path in paths)
    depth = (HERE / "results" / "README.md").read_text()
    titles = re.findall(r"^#+ (.*)", depth, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"results/README\.md#([\w-]+)", readme)) <= anchors


def test_the_readmes_example_certifies(tmp_path, monkeypatch):
    """Its python blocks, one after the other in an empty folder, leave certificates."""
    monkeypatch.chdir(tmp_path)
    readme = (HERE / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert blocks
    torch.manual_seed(0)
    names = {}
    for block in blocks:
        exec(block, names)
    assert certify.read_certificates("certificates.tsv")


def test_help_names_every_option_in_groups(capsys):
    with pytest.raises(SystemExit):
        arq.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"{arq.flag(name)} " in text for name in arq.Config.__dataclass_fields__)
    for group in ("data", "method", "training", "certificates", "run"):
        assert f"\n{group}:\n" in text
    assert "None" not in text


if __name__ == "__main__":  # under torchrun, in test_two_processes_step_as_one
    one_step(Path(sys.argv[1]))
