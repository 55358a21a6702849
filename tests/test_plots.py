import math
import sys

import numpy as np
import pytest
import torch

from pyro_vae import plots
from pyro_vae.comparison import Comparison, compare
from pyro_vae.estimators.result import LogLikelihood
from pyro_vae.spaces import Binary

PNG = b"\x89PNG\r\n\x1a\n"


def scores(num_models: int, num_data: int = 100, num_fits: int = 1, bias_bound: float | None = None) -> Comparison:
    rng = np.random.default_rng(0)
    shared = rng.normal(-100, 20, num_data)
    directions = ["lower", "exact", "unbiased", "upper"]
    results = {
        f"model {i} with a long name": [
            LogLikelihood(
                log_prob=shared - 2 * i + rng.normal(0, 0.5, num_data),
                variance=np.full(num_data, 0.1),
                direction=directions[i % 4],
                estimator="importance_sampling",
                num_particles=10,
                space=Binary((28, 28)),
                digest="ab" * 32,
                seed=0,
                seconds=1.0,
                bias_bound=0.0 if directions[i % 4] == "exact" else bias_bound,
            )
            for _ in range(num_fits)
        ]
        for i in range(num_models)
    }
    return compare(results)


def assert_png(path, smallest: int = 2000) -> None:
    contents = path.read_bytes()
    assert contents.startswith(PNG)
    assert len(contents) > smallest


def test_every_plot_writes_a_png_and_leaves_pyplot_alone(tmp_path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    images = torch.rand(6, 8, 8, requires_grad=True)
    history = [{"epoch": i, "train_elbo": -100 / i, "valid_elbo": None} for i in range(1, 5)]
    assert_png(plots.plot_images(images, tmp_path / "images.png", title="samples"))
    assert_png(plots.plot_images(torch.rand(4, 3, 8, 8), str(tmp_path / "colours.png")))
    assert_png(plots.plot_reconstructions(images, images.detach().numpy(), tmp_path / "reconstructions.png"))
    assert_png(plots.plot_history(history, tmp_path / "history.png"), 10_000)
    assert_png(plots.plot_comparison(scores(3), tmp_path / "comparison.png"), 10_000)
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_images_keep_their_order_colours_and_texts() -> None:
    images = np.random.default_rng(0).random((5, 3, 4, 6))
    figure = plots._images_figure(plots._pixels(images), list("abcde"), 3, ["first", "second"], "all")
    assert len(figure.axes) == 6
    for ax, image, text in zip(figure.axes, images, "abcde", strict=False):
        np.testing.assert_array_equal(ax.images[0].get_array(), image.transpose(1, 2, 0))
        assert ax.get_title() == text
    assert not figure.axes[5].images
    assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["first", "second"]


def test_grey_is_drawn_on_the_fixed_scale_from_0_to_1() -> None:
    """A dim image stays dim: the scale does not follow the image."""
    figure = plots._images_figure(plots._pixels(np.full((1, 4, 4), 0.25)), None, None, None, None)
    assert figure.axes[0].images[0].get_clim() == (0, 1)


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4, 3), (0, 4, 4)])
def test_images_of_another_shape_are_refused(shape, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"images must have shape \(n, height, width\) or \(n, 3, height, width\)"):
        plots.plot_images(np.zeros(shape), tmp_path / "images.png")


def test_wrong_numbers_of_texts_and_reconstructions_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="titles must hold 4 texts, got 1"):
        plots.plot_images(np.zeros((4, 2, 2)), tmp_path / "images.png", titles=["a"])
    with pytest.raises(ValueError, match="row_labels must hold 2 texts, got 3"):
        plots.plot_images(np.zeros((4, 2, 2)), tmp_path / "images.png", row_labels=list("abc"))
    with pytest.raises(ValueError, match=r"reconstructions must have shape \(4, 2, 2\), got \(3, 2, 2\)"):
        plots.plot_reconstructions(np.zeros((4, 2, 2)), np.zeros((3, 2, 2)), tmp_path / "images.png")


def test_history_marks_the_best_validation_epoch() -> None:
    valid = {2: -5.0, 4: -3.0, 6: -4.0}
    rows = [{"epoch": i, "train_elbo": -6.0 + 0.5 * i, "valid_elbo": valid.get(i, math.nan)} for i in range(1, 7)]
    (ax,) = plots._history_figure(rows).axes
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["validation"].get_xydata().tolist() == [[2, -5], [4, -3], [6, -4]]
    assert lines["best: -3.00 at epoch 4"].get_xydata().tolist() == [[4, -3]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "ELBO (nats per image)")
    (ax,) = plots._history_figure(rows, "log p(x)").axes
    assert ax.get_ylabel() == "log p(x) (nats per image)"


def test_history_from_csv_without_validation() -> None:
    rows = [{"epoch": "1", "train_elbo": "-5.5", "valid_elbo": ""}, {"epoch": "2", "train_elbo": "-4.5"}]
    (ax,) = plots._history_figure(rows).axes
    assert "best: -4.50 at epoch 2" in [line.get_label() for line in ax.lines]
    with pytest.raises(ValueError, match="at least one epoch"):
        plots._history_figure([])


def test_first_epochs_do_not_squash_the_rest() -> None:
    """-100 - 500/i²: after 20 epochs all moves less than 1.3 nats; these get a third of the frame, and it says so."""
    rows = [{"epoch": i, "train_elbo": -100 - 500 / i**2, "valid_elbo": None} for i in range(1, 101)]
    (ax,) = plots._history_figure(rows).axes
    low, high = ax.get_ylim()
    assert high > -100.05
    assert 1.25 / (high - low) > 1 / 3
    assert "-600.0" in ax.get_title(loc="left")


@pytest.mark.parametrize("num_models", [2, 5, 10])
def test_comparison_draws_means_and_paired_differences_with_their_intervals(num_models) -> None:
    comparison = scores(num_models)
    left, right = plots._comparison_figure(comparison).axes
    names = [text.get_text() for text in left.get_yticklabels()]
    assert names == [row.model for row in comparison.rows]
    assert "mean log p(x) (nats per datum), 100 data" in left.get_xlabel()
    assert "nats" in right.get_xlabel()
    bars = [bar.lines[2][0].get_segments()[0][:, 0] for bar in left.containers]
    for row, bar in zip(comparison.rows, bars, strict=True):
        np.testing.assert_allclose(bar, [row.interval.low, row.interval.high])
        assert bar[1] - row.mean > 1.96 * row.result.test_se  # t(99) is above the normal quantile
    with_best = [pair for pair in comparison.pairs if pair.a == names[0]]
    bars = [bar.lines[2][0].get_segments()[0][:, 0] for bar in right.containers]
    for pair, bar in zip(with_best, bars, strict=True):
        np.testing.assert_allclose(bar, [-pair.high, -pair.low])


def test_intervals_hold_the_bias_and_so_are_not_symmetric() -> None:
    """A lower bound's truth lies up to .5 above: to the right of its mean, left of a difference to it."""
    comparison = scores(3, bias_bound=0.5)
    left, right = plots._comparison_figure(comparison).axes
    low, high = left.containers[0].lines[2][0].get_segments()[0][:, 0]  # model 0 is a lower bound
    mean = comparison.rows[0].mean
    assert (high - mean) - (mean - low) == pytest.approx(0.5)
    low, high = right.containers[0].lines[2][0].get_segments()[0][:, 0]  # exact less lower
    difference = -comparison.pairs[0].difference
    assert (difference - low) - (high - difference) == pytest.approx(0.5)


def test_fits_are_points_and_warnings_are_dotted() -> None:
    comparison = scores(3, num_fits=4)
    left = plots._comparison_figure(comparison).axes[0]
    assert [text.get_text() for text in left.get_yticklabels()] == [f"{r.model} (4 fits)" for r in comparison.rows]
    marks = [line for line in left.lines if line.get_marker() == "|" and len(line.get_xdata()) == 4]
    for row, line in zip(comparison.rows, marks, strict=True):
        assert sorted(line.get_xdata()) == pytest.approx(sorted(fit.mean for fit in row.fits))
    dotted = [bar.lines[2][0].get_linestyle()[0][1] is not None for bar in left.containers]
    assert dotted == [row.warning is not None for row in comparison.rows] == [True, False, True]
    legend = [text.get_text() for text in left.figure.legends[0].get_texts()]
    assert {"single fits", "not to be trusted, see the remarks"} <= set(legend)
    assert "95% over draws of the test set, differences all at once" in legend


def test_bounds_are_open_and_exact_values_are_filled() -> None:
    assert plots._marker("exact")["mfc"] == plots._marker("unbiased")["mfc"] != "white"
    assert {plots._marker(name)["mfc"] for name in ("lower", "upper", "unknown")} == {"white"}
    assert (plots._marker("lower")["marker"], plots._marker("upper")["marker"]) == (">", "<")


def test_a_model_far_below_stands_at_the_edge_with_its_number() -> None:
    dots = [plots._Dot(i, -x, (-x - 0.5, -x + 0.5), (-x, -x), "exact") for i, x in enumerate([1.0, 2, 3, 500])]
    figure = plots._comparison_figure(scores(1))
    (ax,) = figure.axes  # one model has no differences, and so one panel
    ax.clear()
    plots._draw_dots(ax, dots)
    assert "← = -500.00 [-500.50, -499.50]" in [text.get_text() for text in ax.texts]
    assert ax.get_xlim()[0] > -10


def test_one_datum_has_a_dot_but_no_bar() -> None:
    left, right = plots._comparison_figure(scores(2, num_data=1)).axes
    assert not left.containers
    assert not right.containers
