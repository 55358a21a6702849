"""Networks have the shapes they promise under any leading batch shape, and say what they cannot do."""

import pytest
import torch

import pyro_vae as pv
from pyro_vae.models import VAE
from pyro_vae.networks import ACTIVATIONS, make_decoder, make_encoder, mlp
from pyro_vae.resnet import ResidualBlock

BATCH_SHAPES = [(), (4,), (3, 4), (2, 1, 3)]
SHAPES = [("mlp", (5,)), ("mlp", (2, 3, 4)), ("conv", (7, 5)), ("conv", (3, 8, 9)), ("conv", (1, 1))]
SHAPES += [("resnet", shape) for shape in [(8, 8), (28, 28), (3, 32, 32), (3, 7, 5), (1, 1)]]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_has_the_layers_it_is_asked_for(activation):
    layers = mlp(3, (4, 5), 2, activation)
    assert [tuple(layer.weight.shape) for layer in layers[::2]] == [(4, 3), (5, 4), (2, 5)]
    assert [type(layer) for layer in layers[1::2]] == 2 * [ACTIVATIONS[activation]]
    assert mlp(3, (), 2, activation)(torch.zeros(6, 3)).shape == (6, 2)


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize(("network", "shape"), SHAPES)
@torch.no_grad()
def test_an_encoder_reads_each_image_on_its_own(network, shape, context_dim):
    encoder = make_encoder(network, shape, (8, 6), "tanh", context_dim)
    assert encoder.out_dim == 6
    for batch_shape in BATCH_SHAPES:
        obs = torch.randn(*batch_shape, *shape)
        context = (torch.randn(*batch_shape, context_dim),) if context_dim else ()
        features = encoder(obs, *context)
        assert features.shape == (*batch_shape, 6)
        one = [part.flatten(0, len(batch_shape) - 1)[-1] if batch_shape else part for part in (obs, *context)]
        last = features.reshape(-1, 6)[-1]
        torch.testing.assert_close(encoder(*one), last, rtol=1e-4, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize(("network", "shape"), SHAPES)
@torch.no_grad()
def test_an_encoder_uses_image_and_context(network, shape):
    encoder = make_encoder(network, shape, (8, 6), "tanh", 2)
    obs, context = torch.randn(3, *shape), torch.randn(3, 2)
    features = encoder(obs, context)
    assert not torch.allclose(encoder(obs, context + 1), features)
    assert not torch.allclose(encoder(obs + 1, context), features)


@pytest.mark.parametrize(("network", "shape"), SHAPES)
@torch.no_grad()
def test_a_decoder_gives_every_parameter_of_every_pixel(network, shape):
    decoder = make_decoder(network, 3, (8, 6), 2, shape, "relu")
    for batch_shape in BATCH_SHAPES:
        code = torch.randn(*batch_shape, 3)
        params = decoder(code)
        assert params.shape == (*batch_shape, 2, *shape)
        last = params.reshape(-1, 2, *shape)[-1]
        torch.testing.assert_close(decoder(code.reshape(-1, 3)[-1]), last, rtol=1e-4, atol=1e-5)  # as above


@pytest.mark.parametrize(("network", "shape"), SHAPES)
@torch.no_grad()
def test_center_moves_the_mean_image_to_what_is_given(network, shape):
    decoder, code, params = (
        make_decoder(network, 3, (8, 6), 2, shape, "tanh"),
        torch.randn(4, 3),
        torch.randn(2, *shape),
    )
    before = decoder(code)
    decoder.center(params)
    torch.testing.assert_close(decoder(code) - before, params.expand(4, *params.shape))  # float32 rounding


@pytest.mark.parametrize(("network", "shape"), SHAPES)
def test_gradients_reach_every_parameter(network, shape):
    encoder, decoder = make_encoder(network, shape, (8, 6), "elu", 2), make_decoder(network, 6, (8, 6), 2, shape, "elu")
    decoder(encoder(torch.randn(3, *shape), torch.randn(3, 2))).square().sum().backward()
    for part in (encoder, decoder):
        for name, value in part.named_parameters():
            assert bool(value.grad.isfinite().all()), name
            assert bool(value.grad.any()), name


@pytest.mark.parametrize(("out_channels", "stride"), [(4, 1), (5, 1), (4, 2), (5, 2)])
@torch.no_grad()
def test_a_residual_block_is_its_shortcut_plus_what_it_learned(out_channels, stride):
    block, images = ResidualBlock(4, out_channels, torch.nn.ELU, stride), torch.randn(3, 4, 7, 6)
    learned = block.residual(images)
    torch.testing.assert_close(block(images) - learned, block.shortcut(images))  # float32 rounding
    for value in block.residual[-1].parameters():
        value.zero_()
    assert block(images).shape == (3, out_channels, -(-7 // stride), -(-6 // stride))
    assert torch.equal(block(images), images) == (out_channels == 4 and stride == 1)  # then the identity


def test_a_residual_vae_learns():
    data = pv.load_data("digits")
    vae = VAE(data.space, latent_dim=8, hidden_dims=(32,), network="resnet", activation="elu")
    first, second = pv.fit(vae, data, num_epochs=2, seed=0, device="cpu").rows
    # ELBOs of images differ by some 15 nats, so that 2 nats are more than 4 standard errors of a mean over 1257
    assert second["train_elbo"] > first["train_elbo"] + 2


@pytest.mark.parametrize("make", [make_encoder, lambda *args: make_decoder(args[0], 3, args[2], 1, args[1], args[3])])
def test_what_does_not_exist_is_refused_by_name(make):
    with pytest.raises(ValueError, match="activation must be one of tanh, relu, silu, elu, got 'sine'"):
        make("mlp", (4, 4), (8,), "sine")
    with pytest.raises(ValueError, match="activation must be one of"):
        make("conv", (4, 4), (8,), "sine")
    with pytest.raises(ValueError, match="network must be one of mlp, conv, resnet, got 'transformer'"):
        make("transformer", (4, 4), (8,), "tanh")
    with pytest.raises(ValueError, match=r"needs images .* got shape \(16,\); take network='mlp'"):
        make("conv", (16,), (8,), "tanh")
    with pytest.raises(ValueError, match=r"needs images .* got shape \(2, 2, 4, 4\)"):
        make("resnet", (2, 2, 4, 4), (8,), "tanh")


@pytest.mark.parametrize(("in_dim", "hidden_dims"), [(0, (4,)), (3, (4, 0)), (3, (2.5,))])
def test_sizes_must_be_positive_whole_numbers(in_dim, hidden_dims):
    with pytest.raises(ValueError, match="layers must have positive whole sizes"):
        mlp(in_dim, hidden_dims, 2, "tanh")


def test_an_encoder_needs_a_layer():
    with pytest.raises(ValueError, match="hidden_dims must hold at least one layer"):
        make_encoder("mlp", (2, 2), (), "tanh")
