import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from scipy import stats
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_vae.distributions import discretized_normal_moments
from pyro_vae.em import expectation_maximization
from pyro_vae.k_means import k_means_plus_plus
from pyro_vae.models.bernoulli_mixture import BernoulliMixture
from pyro_vae.models.gmm import GaussianMixture
from pyro_vae.normal_em import principal_components
from pyro_vae.spaces import Binary, Quantized, Real

COVARIANCES = ["diagonal", "spherical", "full", "low_rank"]
PLANE = Real((2, 1))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def real_mixture(covariance: str, space: Real = PLANE, num_components: int = 3, **options: float) -> GaussianMixture:
    """A mixture in float64 with seeded parameters."""
    mixture = GaussianMixture(space, num_components=num_components, covariance=covariance, rank=1, **options).double()
    randomize(mixture)
    return mixture


def randomize(mixture: torch.nn.Module, seed: int = 0) -> None:
    source = generator(seed)
    with torch.no_grad():
        for value in mixture.parameters():
            value.copy_(0.5 * torch.randn(value.shape, generator=source, dtype=torch.float64))


def covariance_of(mixture: GaussianMixture, k: int) -> Tensor:
    """Σ_k written out from the parameters."""
    dim = mixture.loc.shape[-1]
    scale = mixture.min_scale + mixture.log_scale[k].detach().exp()
    if mixture.covariance == "full":
        lower = torch.zeros(dim, dim, dtype=torch.float64)
        for i, j in itertools.product(range(dim), repeat=2):
            lower[i, j] = scale[i] if i == j else mixture.lower[k, i, j].detach() if i > j else 0.0
        return lower @ lower.T
    if mixture.covariance == "low_rank":
        loadings = mixture.loadings[k].detach()
        return loadings @ loadings.T + scale**2 * torch.eye(dim, dtype=torch.float64)
    return torch.diag((scale**2).expand(dim))


def clusters(num: int = 300, dim: int = 3, seed: int = 0) -> Tensor:
    """Three correlated clusters in `dim` dimensions."""
    source = generator(seed)
    mix = torch.randn(3, dim, dim, generator=source, dtype=torch.float64)
    loc = 4 * torch.randn(3, dim, generator=source, dtype=torch.float64)
    index = torch.randint(3, (num,), generator=source)
    noise = torch.randn(num, dim, generator=source, dtype=torch.float64)
    return loc[index] + torch.einsum("nij,nj->ni", 0.7 * mix[index], noise)


def templates(num: int = 400, seed: int = 0) -> Tensor:
    """Binary 3 x 2 images of two templates."""
    source = generator(seed)
    prob = torch.tensor([[0.9, 0.9, 0.8, 0.1, 0.2, 0.1], [0.2, 0.1, 0.1, 0.9, 0.7, 0.9]], dtype=torch.float64)
    index = (torch.rand(num, generator=source) < 0.4).long()
    return prob[index].bernoulli(generator=source).view(num, 3, 2)


def grey(num: int = 300, levels: int = 5, seed: int = 0) -> Tensor:
    """Grey 2 x 2 images of two templates; the last pixel is always black."""
    source = generator(seed)
    loc = torch.tensor([[0.0, 2.0, 3.5, -9.0], [3.0, 1.0, 0.5, -9.0]], dtype=torch.float64)
    index = (torch.rand(num, generator=source) < 0.4).long()
    noise = torch.randn(num, 4, generator=source, dtype=torch.float64)
    return (loc[index] + 0.7 * noise).round().clamp(0, levels - 1).view(num, 2, 2)


def all_images(levels: int, shape: tuple[int, ...]) -> Tensor:
    values = itertools.product(range(levels), repeat=math.prod(shape))
    return torch.tensor(list(values), dtype=torch.float64).view(-1, *shape)


def log_sum_exp(terms: list[float]) -> float:
    top = max(terms)
    return top + math.log(sum(math.exp(term - top) for term in terms))


def never_falls(trace: list[float]) -> bool:
    return all(after >= before - 1e-10 for before, after in itertools.pairwise(trace))


# --- log p(x) against enumeration -------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_real_log_prob_equals_a_loop_over_components(covariance: str) -> None:
    mixture = real_mixture(covariance)
    obs = torch.randn(7, 2, 1, generator=generator(1), dtype=torch.float64)
    weights = mixture.logits.softmax(0).tolist()
    expected = [
        log_sum_exp(
            [
                math.log(weights[k])
                + float(MultivariateNormal(mixture.loc[k].detach(), covariance_of(mixture, k)).log_prob(x.flatten()))
                for k in range(3)
            ]
        )
        for x in obs
    ]
    actual = mixture.distribution().log_prob(obs).detach()
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


def test_quantized_log_prob_equals_a_loop_over_components_and_pixels() -> None:
    mixture = GaussianMixture(Quantized((2, 1), levels=4), num_components=3).double()
    randomize(mixture)
    weights, scale = mixture.logits.softmax(0).tolist(), mixture.min_scale + mixture.log_scale.detach().exp()
    for x in all_images(4, (2, 1)):
        terms = []
        for k in range(3):
            term = math.log(weights[k])
            for d, value in enumerate(x.flatten().tolist()):
                law = stats.norm(mixture.loc[k, d].item(), scale[k, d].item())
                low = 0.0 if value == 0 else law.cdf(value - 0.5)
                high = 1.0 if value == 3 else law.cdf(value + 0.5)
                term += math.log(high - low)
            terms.append(term)
        actual = mixture.distribution().log_prob(x).item()
        assert actual == pytest.approx(log_sum_exp(terms), abs=1e-9)  # the truth's difference of CDFs cancels


def test_bernoulli_log_prob_equals_a_loop_over_components_and_pixels() -> None:
    mixture = BernoulliMixture(Binary((2, 2)), num_components=3).double()
    randomize(mixture)
    weights, prob = mixture.logits.softmax(0).tolist(), mixture.pixel_logits.sigmoid().tolist()
    for x in all_images(2, (2, 2)):
        terms = [
            math.log(weights[k])
            + sum(math.log(p if v else 1 - p) for p, v in zip(prob[k], x.flatten().tolist(), strict=True))
            for k in range(3)
        ]
        assert mixture.distribution().log_prob(x).item() == pytest.approx(log_sum_exp(terms), abs=1e-12)


def test_masses_of_all_images_sum_to_one() -> None:
    binary = BernoulliMixture(Binary((2, 2)), num_components=3).double()
    quantized = GaussianMixture(Quantized((2,), levels=3), num_components=3).double()
    for mixture, images in ((binary, all_images(2, (2, 2))), (quantized, all_images(3, (2,)))):
        randomize(mixture)
        assert mixture.distribution().log_prob(images).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_density_integrates_to_one(covariance: str) -> None:
    mixture = real_mixture(covariance)
    axis = torch.linspace(-15, 15, 601, dtype=torch.float64)  # the trapezoid rule is exact to rounding here
    obs = torch.cartesian_prod(axis, axis).view(-1, 2, 1)
    integral = mixture.distribution().log_prob(obs).exp().sum() * (axis[1] - axis[0]) ** 2
    assert integral.item() == pytest.approx(1, abs=1e-6)


def test_float32_agrees_with_float64_where_scales_are_small() -> None:
    mixture = real_mixture("diagonal", Real((784,)))
    with torch.no_grad():
        mixture.log_scale.fill_(-5)
    obs = (mixture.loc[0] + 0.007 * torch.randn(4, 784, generator=generator(1))).detach().float()
    single = GaussianMixture(mixture.space, num_components=3)
    single.load_state_dict(mixture.state_dict())
    exact = single.distribution().log_prob(obs)
    double = single.double().distribution().log_prob(obs)
    torch.testing.assert_close(exact.double(), double, rtol=1e-6, atol=0)  # float32 rounding of the answer itself


@pytest.mark.parametrize(
    "mixture",
    [
        GaussianMixture(PLANE, num_components=2),
        GaussianMixture(Quantized((2, 1), levels=4), num_components=2),
        BernoulliMixture(Binary((2, 1)), num_components=2),
    ],
)
def test_batch_shapes_broadcast_like_any_distribution(mixture: GaussianMixture | BernoulliMixture) -> None:
    law, obs = mixture.distribution(), torch.ones(5, 2, 1)
    assert (law.batch_shape, law.event_shape) == ((), (2, 1))
    assert law.log_prob(obs).shape == (5,)
    assert law.expand((3, 5)).log_prob(obs).shape == (3, 5)
    assert law.expand((5,)).sample((4,)).shape == (4, 5, 2, 1)
    assert law.sample().dtype == torch.float32


# --- sampling -----------------------------------------------------------------------------------------------------


def sample_agrees(mixture: GaussianMixture | BernoulliMixture, mean: Tensor, num: int = 20_000) -> bool:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = mixture.distribution().sample((num,)).flatten(1)
    return bool(((draws.mean(0) - mean).abs() < 4 * draws.std(0) / num**0.5).all())


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_samples_of_real_mixtures_have_their_mean(covariance: str) -> None:
    mixture = real_mixture(covariance)
    assert sample_agrees(mixture, (mixture.logits.softmax(0) @ mixture.loc).detach())


@pytest.mark.parametrize("levels", [2, 4])
def test_samples_of_discrete_mixtures_have_their_mean(levels: int) -> None:
    space = Binary((2,)) if levels == 2 else Quantized((2,), levels=levels)
    mixture = (BernoulliMixture if levels == 2 else GaussianMixture)(space, num_components=3).double()
    randomize(mixture)
    images = all_images(levels, (2,))
    assert sample_agrees(mixture, mixture.distribution().log_prob(images).exp().detach() @ images)


# --- EM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_real_objective_never_falls_and_ends_at_log_prob(covariance: str) -> None:
    obs = clusters()
    mixture = real_mixture(covariance, Real((3,)), num_components=4)
    trace = mixture.maximum_likelihood(obs, num_iterations=60, num_restarts=2, tolerance=1e-9)
    assert len(trace) > 15
    assert never_falls(trace)
    assert trace[-1] == pytest.approx(mixture.distribution().log_prob(obs).mean().item(), abs=1e-9)


@pytest.mark.parametrize("pseudo_count", [0.0, 1.5])
def test_bernoulli_objective_never_falls(pseudo_count: float) -> None:
    obs = templates()
    mixture = BernoulliMixture(Binary((3, 2)), num_components=4, pseudo_count=pseudo_count).double()
    trace = mixture.maximum_likelihood(obs, num_iterations=60, num_restarts=2, tolerance=1e-9)
    prior = pseudo_count * (
        torch.distributions.Bernoulli(logits=mixture.pixel_logits)
        .log_prob(torch.ones(6, dtype=torch.float64))
        .mul((obs.sum(0).flatten() + 0.5) / 401)
        .add(
            torch.distributions.Bernoulli(logits=mixture.pixel_logits)
            .log_prob(torch.zeros(6, dtype=torch.float64))
            .mul(1 - (obs.sum(0).flatten() + 0.5) / 401)
        )
        .sum()
    )
    expected = (mixture.distribution().log_prob(obs).sum() + prior) / 400
    assert len(trace) > 10
    assert never_falls(trace)
    assert trace[-1] == pytest.approx(expected.item(), abs=1e-10)


@pytest.mark.parametrize("pseudo_count", [0.0, 2.0])
def test_quantized_objective_never_falls(pseudo_count: float) -> None:
    space = Quantized((2, 2), levels=5)
    mixture = GaussianMixture(space, num_components=3, pseudo_count=pseudo_count).double()
    trace = mixture.maximum_likelihood(grey(), num_iterations=60, num_restarts=2, tolerance=1e-9)
    assert len(trace) > 10
    assert never_falls(trace)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_one_component_is_the_closed_form(covariance: str) -> None:
    obs = clusters()
    mixture = GaussianMixture(Real((3,)), num_components=1, covariance=covariance, rank=1).double()
    mixture.maximum_likelihood(obs)
    empirical = torch.from_numpy(np.cov(obs.numpy().T, bias=True))
    values, vectors = np.linalg.eigh(empirical.numpy())
    noise = values[:2].mean()
    low_rank = vectors[:, 2:] @ vectors[:, 2:].T * (values[2] - noise) + noise * np.eye(3)
    expected = {
        "diagonal": empirical.diag().diag(),
        "spherical": empirical.trace() / 3 * torch.eye(3, dtype=torch.float64),
        "full": empirical,
        "low_rank": torch.from_numpy(low_rank),
    }[covariance]
    torch.testing.assert_close(mixture.loc[0].detach(), obs.mean(0))
    torch.testing.assert_close(covariance_of(mixture, 0), expected)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_gradient_vanishes_at_the_real_optimum(covariance: str) -> None:
    obs = clusters()
    mixture = GaussianMixture(Real((3,)), num_components=3, covariance=covariance, rank=1).double()
    mixture.maximum_likelihood(obs, num_iterations=2000, tolerance=1e-15)
    mixture.distribution().log_prob(obs).mean().backward()
    assert max(float(value.grad.abs().max()) for value in mixture.parameters()) < 1e-5


def test_gradient_vanishes_at_the_binary_optimum() -> None:
    obs = templates()
    mixture = BernoulliMixture(Binary((3, 2)), num_components=2, pseudo_count=0.0).double()
    mixture.maximum_likelihood(obs, num_iterations=2000, tolerance=1e-15)
    mixture.distribution().log_prob(obs).mean().backward()
    assert max(float(value.grad.abs().max()) for value in mixture.parameters()) < 1e-5


def test_gradient_vanishes_at_the_grey_optimum() -> None:
    obs = grey().flatten(1)[:, :3]  # not the black pixel, whose likelihood rises forever as μ falls
    mixture = GaussianMixture(Quantized((3,), levels=5), num_components=2).double()
    trace = mixture.maximum_likelihood(obs, num_iterations=300, tolerance=1e-14)
    counts = torch.stack([(obs == level).double().sum(0) for level in range(5)], -1)
    pseudo = mixture.pseudo_count * (counts + 1 / 5) / (len(obs) + 1)  # (D, L)
    law = mixture.distribution()
    objective = law.log_prob(obs).mean() + (pseudo * law.components.log_mass).sum() / len(obs)
    assert objective.item() == pytest.approx(trace[-1], abs=1e-10)
    objective.backward()
    assert max(float(value.grad.abs().max()) for value in mixture.parameters()) < 1e-6


def test_gaussian_em_recovers_separated_components() -> None:
    source = generator(3)
    num, loc = 4000, torch.tensor([[-10.0, 0.0], [10.0, 5.0]], dtype=torch.float64)
    scale = torch.tensor([[1.0, 2.0], [0.5, 1.5]], dtype=torch.float64)
    index = (torch.rand(num, generator=source) < 0.3).long()
    obs = loc[index] + scale[index] * torch.randn(num, 2, generator=source, dtype=torch.float64)
    mixture = GaussianMixture(Real((2,)), num_components=2).double()
    mixture.maximum_likelihood(obs)
    order = mixture.loc[:, 0].argsort()
    share = torch.tensor([0.7, 0.3], dtype=torch.float64)
    fitted = mixture.log_scale[order].exp() + mixture.min_scale
    se = scale / (num * share.unsqueeze(-1)).sqrt()
    assert ((mixture.loc[order] - loc).abs() < 4 * se).all()
    assert ((fitted - scale).abs() < 4 * se / 2**0.5).all()
    assert (mixture.logits.softmax(0)[order] - share).abs().max() < 4 * (0.21 / num) ** 0.5


def test_bernoulli_em_recovers_separated_components() -> None:
    source = generator(4)
    num = 4000
    prob = torch.cat([torch.full((1, 30), 0.2), torch.full((1, 30), 0.8)]).double()  # misclassified: about e^-7
    index = (torch.rand(num, generator=source) < 0.3).long()
    obs = prob[index].bernoulli(generator=source)
    mixture = BernoulliMixture(Binary((30,)), num_components=2, pseudo_count=0.0).double()
    mixture.maximum_likelihood(obs, tolerance=1e-8)
    order = mixture.pixel_logits[:, 0].argsort()
    se = (0.16 / (num * torch.tensor([[0.7], [0.3]]))).sqrt()
    assert ((mixture.pixel_logits.sigmoid()[order] - prob).abs() < 4 * se).all()


def test_grey_em_recovers_the_law_before_rounding() -> None:
    source = generator(5)
    num, loc, scale = 4000, torch.tensor([0.4, 7.3]).double(), torch.tensor([1.0, 2.0]).double()
    obs = (loc + scale * torch.randn(num, 2, generator=source, dtype=torch.float64)).round().clamp(0, 15)
    mixture = GaussianMixture(Quantized((2,), levels=16), num_components=1, pseudo_count=0.0).double()
    mixture.maximum_likelihood(obs, num_iterations=500, tolerance=1e-10)
    se = 1.5 * scale / num**0.5  # 1.5: half of the first pixel's law is censored at 0
    assert ((mixture.loc[0] - loc).abs() < 4 * se).all()
    assert ((mixture.log_scale[0].exp() + mixture.min_scale - scale).abs() < 4 * se).all()


def test_variance_floor_holds_on_constant_pixels() -> None:
    obs = torch.zeros(50, 3, dtype=torch.float64)
    obs[:, 0] = torch.arange(50) / 50
    for covariance in COVARIANCES:
        mixture = GaussianMixture(Real((3,)), num_components=2, covariance=covariance, rank=1, min_scale=0.01).double()
        assert never_falls(mixture.maximum_likelihood(obs))
        least = torch.stack([torch.linalg.eigvalsh(covariance_of(mixture, k))[0] for k in range(2)])
        assert (least >= 1e-4 * (1 - 1e-6)).all()
        assert covariance == "spherical" or (least <= 1e-4 * (1 + 1e-6)).all()


def test_an_empty_component_is_kept_without_nan() -> None:
    class Stubborn:
        """One-dimensional unit normals; the second one starts so far away that its responsibilities are 0."""

        block_rows, log_prior = 4096, 0.0

        def law(self, params: dict[str, Tensor] | None) -> "Stubborn":
            self.loc = None if params is None else params["loc"]
            return self

        def features(self, rows: Tensor) -> Tensor:
            return rows

        def log_prob(self, rows: Tensor) -> Tensor:
            return -0.5 * (rows - self.loc) ** 2

        def statistics(self, rows: Tensor, resp: Tensor) -> tuple[Tensor, ...]:
            return (resp.T @ rows.squeeze(-1),)

        def joined(self, sums: list[Tensor]) -> list[Tensor]:
            return sums

        def maximize(self, counts: Tensor, sums: list[Tensor], params: dict[str, Tensor] | None) -> dict:
            start = torch.tensor([0.0, 1e3], dtype=torch.float64)
            return {"loc": start if params is None else sums[0] / counts}

    rows = torch.linspace(-1, 2, 20, dtype=torch.float64).unsqueeze(-1)
    params, trace = expectation_maximization(Stubborn(), rows, 2, num_iterations=5, tolerance=-1.0)
    assert never_falls(trace)
    assert params["loc"].tolist() == pytest.approx([0.5, 1e3])
    assert params["logits"].exp().tolist() == pytest.approx([1.0, 0.0])


def test_a_fit_is_seeded_and_leaves_the_global_random_state() -> None:
    mixture, obs = BernoulliMixture(Binary((3, 2)), num_components=3), templates().float()
    state = torch.get_rng_state()
    calls: list[tuple[int, float]] = []
    traces = [mixture.maximum_likelihood(obs, seed=seed, num_restarts=2) for seed in (0, 0, 1)]
    last = mixture.maximum_likelihood(obs, num_restarts=2, progress=lambda i, value: calls.append((i, value)))
    assert torch.equal(state, torch.get_rng_state())
    assert traces[0] == traces[1] == last
    assert traces[0] != traces[2]
    assert calls[-1] == (len(last) - 1, last[-1])


# --- the pieces of EM -----------------------------------------------------------------------------------------------


def test_k_means_plus_plus_picks_distinct_rows_by_squared_distance() -> None:
    obs = torch.tensor([[0.0], [0.0], [1.0], [3.0]], dtype=torch.float64)
    source, counts = generator(), torch.zeros(4)
    for _ in range(2000):
        first, second = k_means_plus_plus(obs, 2, source).flatten().tolist()
        if first == 0:
            counts[int(second)] += 1
    share = counts[3] / counts.sum()  # the odds of 3 against 1 are 9 to 1
    assert abs(share - 0.9) < 4 * (0.09 / counts.sum()) ** 0.5
    assert counts[0] == 0


def test_k_means_plus_plus_says_when_data_are_too_few() -> None:
    obs = torch.tensor([0.0, 1.0, 1.0, 0.0]).unsqueeze(-1)
    with pytest.raises(ValueError, match="3 components need 3 distinct observations, got 2"):
        k_means_plus_plus(obs, 3, generator())
    with pytest.raises(ValueError, match="distinct"):
        BernoulliMixture(Binary((1,)), num_components=3).maximum_likelihood(obs)


@pytest.mark.parametrize(("loc", "scale"), [(1.2, 0.8), (-6.0, 1.0), (2.0, 0.05), (1.0, 30.0)])
def test_moments_before_rounding_equal_truncated_normals(loc: float, scale: float) -> None:
    mu, sigma = torch.tensor([loc], dtype=torch.float64), torch.tensor([scale], dtype=torch.float64)
    first, second = discretized_normal_moments(mu, sigma, 4)
    edges = [-math.inf, 0.5, 1.5, 2.5, math.inf]
    for level, (low, high) in enumerate(itertools.pairwise(edges)):
        if max(low - loc, loc - high) / scale > 8:  # beyond scipy's own accuracy: y sits at the near edge
            edge = (low if low > loc else high) - loc
            assert first[0, level].item() == pytest.approx(edge, rel=0.02)
            assert second[0, level].item() == pytest.approx(edge**2, rel=0.04)
            continue
        law = stats.truncnorm((low - loc) / scale, (high - loc) / scale, loc=0, scale=scale)
        assert first[0, level].item() == pytest.approx(law.mean(), abs=1e-7 * scale + 1e-9)
        assert second[0, level].item() == pytest.approx(law.moment(2), rel=1e-6, abs=1e-9)


def test_principal_components_of_a_spherical_covariance_have_no_loadings() -> None:
    loadings, scale = principal_components(4 * torch.eye(3, dtype=torch.float64), 2, 1e-3)
    assert loadings.abs().max() < 1e-7
    assert scale.item() == pytest.approx(2)


# --- gradients, constructors --------------------------------------------------------------------------------------


def train(mixture: GaussianMixture | BernoulliMixture, obs: Tensor, steps: int, lr: float) -> float:
    pyro.clear_param_store()
    svi = SVI(mixture.model, mixture.guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO())
    for _ in range(steps):
        loss = svi.step(obs)
    pyro.clear_param_store()
    return -loss / len(obs)


@pytest.mark.parametrize("kind", [*COVARIANCES, "binary", "grey"])
def test_plain_svi_reaches_what_em_reaches(kind: str) -> None:
    obs = {"binary": templates, "grey": grey}.get(kind, lambda num: clusters(num) / 3)(200).float()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if kind == "binary":
            mixture = BernoulliMixture(Binary((3, 2)), num_components=2, pseudo_count=0.0)
        elif kind == "grey":
            mixture = GaussianMixture(Quantized((2, 2), levels=5), num_components=2, pseudo_count=0.0)
        else:
            mixture = GaussianMixture(Real((3,)), num_components=1, covariance=kind, rank=1)
    best = type(mixture)(mixture.space, num_components=mixture.num_components, **_options(mixture))
    best.maximum_likelihood(obs, num_iterations=1000, tolerance=1e-7)
    target = best.distribution().log_prob(obs).mean().item()
    assert train(mixture, obs, steps=400, lr=0.1) == pytest.approx(target, abs=0.03)


def _options(mixture: GaussianMixture | BernoulliMixture) -> dict:
    names = ("covariance", "rank", "min_scale", "pseudo_count")
    return {name: getattr(mixture, name) for name in names if hasattr(mixture, name)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": Binary((2,))}, "lives on Real or Quantized, got Binary"),
        ({"covariance": "banded"}, "covariance must be one of diagonal, full, spherical, low_rank, got 'banded'"),
        ({"space": Quantized((2,)), "covariance": "full"}, "must be 'diagonal' on Quantized"),
        ({"num_components": 0}, "num_components must be at least 1, got 0"),
        ({"covariance": "low_rank", "rank": 2}, "rank must be from 1 to 1, got 2"),
        ({"min_scale": 0.0}, "need min_scale > 0"),
        ({"pseudo_count": 1.0}, "pseudo_count is for histograms"),
    ],
)
def test_gaussian_mixture_rejects(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**{"space": Real((2,)), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": Real((2,))}, "lives on Binary, got Real"),
        ({"num_components": 0}, "num_components must be at least 1, got 0"),
        ({"pseudo_count": -1.0}, "pseudo_count must not be negative, got -1"),
    ],
)
def test_bernoulli_mixture_rejects(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BernoulliMixture(**{"space": Binary((2,)), **options})


def test_a_fit_rejects_data_of_another_space_and_no_iterations() -> None:
    mixture = BernoulliMixture(Binary((2,)), num_components=1)
    with pytest.raises(ValueError, match="must hold 0 and 1 only"):
        mixture.maximum_likelihood(torch.full((3, 2), 0.5))
    with pytest.raises(ValueError, match="num_iterations must be at least 1, got 0"):
        mixture.maximum_likelihood(torch.eye(2), num_iterations=0)


def test_a_non_finite_objective_is_named() -> None:
    mixture = GaussianMixture(Real((1,)), num_components=1).double()
    with pytest.raises(FloatingPointError, match=r"the objective of EM is .* at iteration 0"):
        mixture.maximum_likelihood(torch.tensor([[1e300], [-1e300]], dtype=torch.float64))
