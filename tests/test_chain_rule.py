"""The chain rule over pixels: masses that sum to 1, what a pixel sees, and draws, against enumeration and autograd."""

import itertools
import math

import pyro
import pytest
import torch
from pyro.distributions import Normal
from pyro.infer import SVI, Trace_ELBO
from scipy.stats import chi2
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal
from torch.nn.functional import pad

from pyro_vae import traces
from pyro_vae.chain_rule import ChainRule, marginal_logits, pixel_by_logits
from pyro_vae.data import load_data
from pyro_vae.fitting import fit
from pyro_vae.models.independent_pixel import IndependentPixel
from pyro_vae.models.made import MADE
from pyro_vae.models.pixel_cnn import PixelCNN
from pyro_vae.models.pixel_rnn import PixelRNN
from pyro_vae.spaces import Binary, Quantized, Real

MODELS = {
    "made": lambda space: MADE(space, hidden_dims=(24, 24), activation="tanh", num_features=4),
    "made in a random order": lambda space: MADE(space, hidden_dims=(24,), activation="tanh", order_seed=3),
    "pixel_cnn": lambda space: PixelCNN(space, num_channels=6, num_layers=3, first_kernel_size=3),
    "pixel_cnn with holes and coordinates": lambda space: PixelCNN(
        space, num_channels=6, num_layers=4, first_kernel_size=3, dilations=(1, 2), coordinates=True
    ),
    "pixel_rnn": lambda space: PixelRNN(space, hidden_dim=8),
    "pixel_rnn of two lstm": lambda space: PixelRNN(space, cell="lstm", hidden_dim=6, num_layers=2),
}
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


def random_model(name, space, scale=0.5):
    """A model in float64 whose parameters are all random, biases too."""
    model = MODELS[name](space).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, dtype=torch.float64))
    return model


def all_images(space):
    levels = space.levels if isinstance(space, Quantized) else 2
    values = torch.tensor(levels**space.num_dims)
    digits = [values.new_tensor(levels) ** place for place in range(space.num_dims)]
    index = torch.arange(int(values))
    return torch.stack([index // digit % levels for digit in digits], -1).reshape(-1, *space.shape).double()


def order_of(model):
    order = model.distribution().order
    return list(range(model.space.num_dims)) if order is None else order.tolist()


# --- masses -------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize(
    "space",
    [Binary((2, 2)), Binary((3, 4)), Quantized((2, 1), levels=3), Quantized((2, 2), levels=5), Binary((1, 2, 3))],
    ids=lambda space: f"{space}{space.shape}",
)
@torch.no_grad()
def test_masses_of_all_images_sum_to_one(name, space):
    law = random_model(name, space).distribution()
    log_mass = law.log_prob(all_images(space))
    assert log_mass.std() > 0.1  # no uniform law
    assert log_mass.exp().sum().item() == pytest.approx(1, abs=1e-12)  # at most 4,096 masses in float64


@every_model
@torch.no_grad()
def test_log_prob_is_the_sum_of_the_conditionals_one_by_one(name):
    """p(x_d | x_<d) of an enumeration: the mass of all images with x_1..x_d over that of all with x_1..x_{d-1}."""
    space = Quantized((2, 2), levels=3)
    model = random_model(name, space)
    images = all_images(space)
    mass = model.distribution().log_prob(images).exp()
    rows, image = images.flatten(1), model.distribution().sample()
    terms = model.distribution().log_conditionals(image).flatten()
    for place, pixel in enumerate(order_of(model)):
        seen = order_of(model)[:place]
        given = (rows[:, seen] == image.flatten()[seen]).all(-1)
        both = given & (rows[:, pixel] == image.flatten()[pixel])
        assert terms[pixel].item() == pytest.approx(math.log(mass[both].sum() / mass[given].sum()), abs=1e-10)


# --- what a pixel sees --------------------------------------------------------------------------------------------


def sensitivity(model, num=4):
    """Largest |d logits_d / d x_e| over the logits of a pixel at random images, (D, D): a ReLU may be shut at one."""
    size = model.space.num_dims
    points = torch.rand(num, *model.space.shape, dtype=torch.float64)
    slopes = torch.stack([jacobian(model.logits, point.unsqueeze(0)) for point in points])
    return slopes.reshape(num, size, -1, size).abs().amax((0, 2))


@every_model
@pytest.mark.parametrize("space", [Binary((3, 4)), Quantized((3, 4), levels=3)], ids=str)
def test_a_pixel_sees_those_before_it_and_no_other(name, space):
    model = random_model(name, space)
    order = order_of(model)
    slopes = sensitivity(model)[order][:, order]
    assert not slopes.triu().any()  # exactly 0 for the pixel itself and all after it
    before = torch.ones_like(slopes).tril(-1).bool()
    assert (slopes[before] > 0).float().mean() > 0.9


@pytest.mark.parametrize(
    ("name", "rows_up", "to_the_left"), [("pixel_cnn", 4, 3), ("pixel_cnn with holes and coordinates", 6, 5)]
)
def test_a_pixel_cnn_has_no_blind_spot_within_its_reach(name, rows_up, to_the_left):
    """A first kernel of 3 and two more, or three with dilations 1, 2, 1: each adds its dilation to both reaches."""
    model = random_model(name, Binary((7, 9)))
    slopes = sensitivity(model).reshape(7, 9, 7, 9)
    for row, column in [(6, 4), (6, 8), (4, 0), (3, 3)]:
        for above, beside in itertools.product(range(7), range(9)):
            up, left = row - above, column - beside
            in_row, above_row = up == 0 and 1 <= left <= to_the_left, 1 <= up <= rows_up and abs(left) <= 2
            reached = in_row or above_row
            assert slopes[row, column, above, beside] > 0 or not reached, (row, column, above, beside)
            assert slopes[row, column, above, beside] == 0 or 0 <= up <= model.reach


def test_coordinates_are_made_on_the_device_of_the_pixels():
    """Tensors of the meta device mix with those of no other."""
    model = random_model("pixel_cnn with holes and coordinates", Binary((7, 9))).to("meta")
    assert model.logits(torch.zeros(2, 7, 9, dtype=torch.float64, device="meta")).device.type == "meta"


def test_a_random_order_comes_from_its_seed():
    orders = [order_of(MADE(Binary((4, 4)), order_seed=seed)) for seed in (None, 1, 1, 2)]
    assert orders[0] == list(range(16))
    assert orders[1] == orders[2] != orders[3]


# --- draws --------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("space", [Binary((2, 2)), Quantized((1, 2), levels=4)], ids=str)
@torch.no_grad()
def test_draws_have_the_frequencies_of_the_enumerated_masses(name, space):
    law, num = random_model(name, space).distribution(), 4000
    images, draws = all_images(space), law.sample((num,))
    counts = (draws.flatten(1).unsqueeze(1) == images.flatten(1)).all(-1).sum(0)
    expected = num * law.log_prob(images).exp()
    statistic = ((counts - expected).square() / expected).sum().item()
    assert counts.sum() == num
    assert statistic < chi2.isf(1e-4, len(images) - 1)  # seeded; one correct sampler in 10,000 is beyond it


@every_model
@pytest.mark.parametrize("space", [Binary((9, 5)), Quantized((1, 9, 5), levels=5)], ids=str)
@torch.no_grad()
def test_steps_draw_the_digits_of_whole_passes(name, space):
    model = random_model(name, space)
    assert space.shape[-2] > getattr(model, "reach", 0) + 1  # a PixelCNN takes the rows in reach, not all of them
    drawn = []
    for steps in (model.steps, None):
        law = model.distribution()
        law.steps = steps
        torch.manual_seed(1)
        drawn.append(law.sample((6,)))
    assert torch.equal(*drawn)
    assert len(drawn[0].unique(dim=0)) > 1
    step, rows, order = model.steps(), drawn[0].flatten(1), order_of(model)
    logits = torch.stack([step(rows, index) for index in order], 1)
    expected = model.logits(drawn[0]).reshape(6, space.num_dims, -1)[:, order]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


@every_model
@torch.no_grad()
def test_shapes_follow_the_batch_and_the_plates(name):
    model = random_model(name, Binary((2, 3)))
    law = model.distribution()
    assert (law.batch_shape, law.event_shape) == ((), (2, 3))
    assert law.expand((4, 5)).sample((2,)).shape == (2, 4, 5, 2, 3)
    obs = law.sample((5,))
    log_prob = law.log_prob(obs)
    torch.testing.assert_close(law.expand((4, 5)).log_prob(obs), log_prob.expand(4, 5), rtol=0, atol=1e-12)
    torch.testing.assert_close(law.log_prob(obs.expand(3, 1, 5, 2, 3)), log_prob.expand(3, 1, 5), rtol=0, atol=1e-12)
    assert bool(law.support.check(obs).all())
    assert not law.support.check(obs + 0.5).any()
    torch.testing.assert_close(traces.log_weights(traces.as_pair(model), (obs,), 3), log_prob.expand(3, 5))
    many = law.sample((300,))  # more than one block
    torch.testing.assert_close(law.log_prob(many)[290:], law.log_prob(many[290:]), rtol=0, atol=1e-12)


def test_a_bar_counts_the_pixels_when_asked(capsys):
    model = MODELS["pixel_rnn"](Binary((2, 3)))
    model.distribution().sample()
    assert capsys.readouterr().err == ""
    model.distribution(progress=True).expand((2,)).sample()
    assert "6/6" in capsys.readouterr().err


# --- starts, fits, arguments --------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("space", [Binary((2, 3)), Quantized((2, 3), levels=4)], ids=str)
@torch.no_grad()
def test_the_start_has_the_shares_of_each_pixel(name, space):
    model, baseline = MODELS[name](space).double(), IndependentPixel(space).double()
    obs = all_images(space)[torch.randint(64, (40,))]
    baseline.maximum_likelihood(obs)
    for parameter in model.parameters():
        parameter.zero_()
    model.initialize(obs)
    torch.testing.assert_close(model.distribution().log_prob(obs), baseline.distribution().log_prob(obs))


def test_marginal_logits_are_log_shares_with_one_count_spread_over_the_levels():
    obs = torch.tensor([[0.0, 2.0], [0.0, 1.0], [1.0, 2.0]])
    expected = (torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]).double() + 1 / 3) / 4
    torch.testing.assert_close(marginal_logits(Quantized((2,), levels=3), obs).exp(), expected)


@pytest.mark.parametrize(
    ("build", "space", "rate", "least"),
    [
        (lambda space: MADE(space, hidden_dims=(100,)), "binary", 1e-2, 1.5),
        (lambda space: PixelCNN(space, num_channels=8, num_layers=2, first_kernel_size=5), "binary", 2e-2, 1.5),
        (lambda space: PixelRNN(space, hidden_dim=24), "binary", 2e-2, 1.5),
        (lambda space: MADE(space, hidden_dims=(100,)), None, 1e-2, 10),
    ],
    ids=["made", "pixel_cnn", "pixel_rnn", "made on grey levels"],
)
def test_a_short_fit_on_digits_leaves_independent_pixels_behind(build, space, rate, least):
    data = load_data("digits", space=space)
    model, baseline = build(data.space), IndependentPixel(data.space)
    baseline.maximum_likelihood(data.train.obs)
    fit(model, data, num_epochs=4, batch_size=32, learning_rate=rate, validate_every=4, device="cpu", compile=False)
    with torch.no_grad():
        gain = model.distribution().log_prob(data.test.obs) - baseline.distribution().log_prob(data.test.obs)
    # 2 to 3 nats of 27 on bits and 19 of 108 on grey levels, as measured; 4 standard errors of the paired difference
    assert gain.mean() > max(least, 4 * float(gain.std()) / len(gain) ** 0.5)


def test_plain_svi_raises_the_exact_log_p():
    obs = all_images(Binary((2, 2))).float()[[0, 3, 3, 15]]
    model = MADE(Binary((2, 2)), hidden_dims=(8,))
    svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(obs) for _ in range(80)]
    assert -losses[-1] == pytest.approx(model.distribution().log_prob(obs).sum().item(), abs=0.1)
    # the best is the entropy of the shares, -4 (2 · ¼ log 4 + ½ log 2) = -4.16 nats
    assert -losses[0] < -losses[-1] < -4.16


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MADE(Real((2, 2))), "MADE lives on Binary or Quantized, got Real"),
        (lambda: PixelCNN(Real((2, 2))), "PixelCNN lives on Binary or Quantized, got Real"),
        (lambda: PixelRNN(Real((2, 2))), "PixelRNN lives on Binary or Quantized, got Real"),
        (lambda: MADE(Binary((2, 2)), hidden_dims=()), r"hidden_dims must be positive whole numbers.*got \[\]"),
        (lambda: MADE(Binary((2, 2)), hidden_dims=(8, 0)), r"hidden_dims must be positive whole.*got \[8, 0\]"),
        (lambda: MADE(Binary((2, 2)), activation="sine"), "activation must be one of tanh.*got 'sine'"),
        (lambda: MADE(Binary((2, 2)), num_features=0), "num_features must be a whole number of at least 1, got 0"),
        (lambda: PixelCNN(Binary((4,))), r"images \(height, width\) or \(1, height, width\), got shape \(4,\)"),
        (lambda: PixelCNN(Quantized((3, 4, 4))), r"PixelCNN needs images .* got shape \(3, 4, 4\)"),
        (lambda: PixelCNN(Binary((4, 4)), dilations=(1, 0)), r"dilations\[1\] must be a whole number .* got 0"),
        (
            lambda: PixelCNN(Binary((4, 4)), dilations=(1, 8)),
            "layer 3 has dilation 8 where those before it see 4 pixels",
        ),
        (lambda: PixelCNN(Binary((4, 4)), coordinates="no"), "coordinates must be True or False, got 'no'"),
        (lambda: PixelCNN(Binary((4, 4)), dilations=2), "dilations must be a sequence of at least one .* got 2"),
        (lambda: PixelCNN(Binary((4, 4)), kernel_size=4), "kernel_size must be odd, 3 or more, got 4"),
        (lambda: PixelCNN(Binary((4, 4)), first_kernel_size=1), "first_kernel_size must be odd, 3 or more, got 1"),
        (lambda: PixelCNN(Binary((4, 4)), num_layers=0), "num_layers must be a whole number of at least 1, got 0"),
        (lambda: PixelCNN(Binary((4, 4)), num_channels=2.5), "num_channels must be a whole number .* got 2.5"),
        (lambda: PixelRNN(Binary((4, 4)), cell="tanh"), "cell must be one of gru, lstm, got 'tanh'"),
        (lambda: PixelRNN(Binary((4, 4)), hidden_dim=0), "hidden_dim must be a whole number of at least 1, got 0"),
        (lambda: PixelRNN(Binary((4, 4)), num_layers=0), "num_layers must be a whole number of at least 1, got 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- the law with a network of one's own --------------------------------------------------------------------------


def test_a_normal_chain_is_its_multivariate_normal():
    """x_d = 0.7 x_{d-1} + ε_d in an order of its own: covariance L L' with L_de = 0.7^(d-e)."""
    order = torch.tensor([2, 0, 3, 1])

    def means(obs):
        rows = obs.flatten(1)[:, order]
        return torch.empty_like(rows).index_copy(1, order, 0.7 * pad(rows[:, :-1], (1, 0))).reshape(*obs.shape, 1)

    real, template = torch.distributions.constraints.real, torch.zeros(2, 2, dtype=torch.float64)
    law = ChainRule(means, lambda loc: Normal(loc.squeeze(-1), 1.0), real, template, order=order)
    power = torch.arange(4.0).unsqueeze(-1) - torch.arange(4.0)
    factor = (0.7 ** power.double()).tril()
    truth = MultivariateNormal(torch.zeros(4, dtype=torch.float64), scale_tril=factor)
    draws = law.sample((4000,))
    rows = draws.flatten(1)[:, order]
    torch.testing.assert_close(law.log_prob(draws), truth.log_prob(rows), rtol=0, atol=1e-10)
    covariance = factor @ factor.T
    se = ((covariance**2 + covariance.diag().outer(covariance.diag())) / len(rows)).sqrt()
    assert ((rows.T @ rows / len(rows) - covariance).abs() < 4 * se).all()


def law_of(order=None):
    return ChainRule(
        lambda x: torch.zeros(*x.shape, 1),
        pixel_by_logits,
        torch.distributions.constraints.boolean,
        torch.zeros(2, 2),
        order=order,
    )


def test_a_wrong_order_and_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"order must have shape \(4,\), one entry per pixel, got \(3,\)"):
        law_of(torch.arange(3))
    with pytest.raises(ValueError, match=r"order must hold each of 0..3 once, got \[0, 1, 1, 2\]"):
        law_of(torch.tensor([0, 1, 1, 2])).sample()
    with pytest.raises(ValueError, match=r"value must have shape \(..., 2, 2\), got \(5, 4\)"):
        law_of().log_prob(torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"value must have shape \(..., 2, 2\), got \(2,\)"):
        law_of().log_prob(torch.zeros(2))
    assert law_of().log_prob(torch.zeros(2, 2)).item() == pytest.approx(-4 * math.log(2), abs=1e-6)
