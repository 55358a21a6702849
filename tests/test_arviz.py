import math

import numpy as np
import pytest
import xarray

from pyro_vae.arviz import GROUP, load_netcdf, save_netcdf, to_arviz
from pyro_vae.comparison import compare
from pyro_vae.estimators.result import ARRAYS, Certificate, LogLikelihood
from pyro_vae.spaces import Binary, Quantized

az = pytest.importorskip("arviz")
IS_OLD = az.__version__.startswith("0.")
EXACTLY = {} if IS_OLD else {"round_to": "none"}
NUM_DATA = 120

pytestmark = [  # what ArviZ 0.23 itself calls in newer pandas and matplotlib
    pytest.mark.filterwarnings("ignore:The inplace keyword"),
    pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping"),
]


def result(log_prob, direction="exact", **changes) -> LogLikelihood:
    fields = {
        "log_prob": np.asarray(log_prob, dtype=np.float64),
        "variance": np.zeros(len(log_prob)),
        "direction": direction,
        "estimator": "exact" if direction == "exact" else "importance_sampling",
        "num_particles": 0 if direction == "exact" else 500,
        "space": Quantized((8, 8), 17),
        "digest": "ab" * 32,
        "seed": 0,
        "seconds": 2.5,
        "bias_bound": 0.0,
    }
    return LogLikelihood(**{**fields, **changes})


def three() -> dict[str, LogLikelihood]:
    """Hundreds of nats, as for images: exp of any of them is 0."""
    rng = np.random.default_rng(0)
    shared = rng.normal(-900, 40, NUM_DATA)
    khat = rng.normal(0.3, 0.2, NUM_DATA)
    vae = result(shared + rng.normal(0.05, 1, NUM_DATA), "lower", khat=khat, ess=np.full(NUM_DATA, 80.0))
    return {"gmm": result(shared), "ppca": result(shared + rng.normal(-9, 3, NUM_DATA)), "vae": vae}


def column(table, *names):
    """The first of these columns that the table has, by model."""
    return next(table[name] for name in names if name in table)


def test_differences_and_their_errors_are_ours_times_the_number_of_data() -> None:
    comparison = compare(three())
    table = az.compare(to_arviz(comparison), method="pseudo-BMA", **EXACTLY)
    assert list(table.index) == [row.model for row in comparison.rows]
    for pair in comparison.pairs:
        if pair.a == comparison.rows[0].model:
            assert abs(table["elpd_diff"][pair.b]) == pytest.approx(NUM_DATA * pair.difference, rel=1e-9)
            error = pair.se * NUM_DATA * math.sqrt((NUM_DATA - 1) / NUM_DATA)  # √(n var d), var without n - 1
            assert table["dse"][pair.b] == pytest.approx(error, rel=1e-9)
    for row in comparison.rows:
        assert column(table, "elpd", "elpd_loo")[row.model] == pytest.approx(NUM_DATA * row.mean, rel=1e-12)
        assert column(table, "p", "p_loo")[row.model] == 0


def test_pseudo_bma_is_the_likelihood_ratio_and_stacking_underflows() -> None:
    """Weights are exp of the total difference, even where each exp(log p(x)) is 0; stacking sees only zeros."""
    models = to_arviz(three())
    weights = az.compare(models, method="pseudo-BMA", **EXACTLY)["weight"]
    (pair,) = [pair for pair in compare(three()).pairs if {pair.a, pair.b} == {"gmm", "vae"}]
    assert weights[pair.b] / weights[pair.a] == pytest.approx(math.exp(-NUM_DATA * pair.difference), rel=1e-6)
    assert weights["ppca"] < 1e-100
    with np.errstate(all="ignore"):
        stacked = az.compare(models, method="stacking", **EXACTLY)["weight"]
    assert not stacked["ppca"] < 0.1  # it is 9 nats below on each of 120 data


def test_arviz_warns_where_we_do() -> None:
    scores = three() | {"is": result(np.zeros(NUM_DATA) - 900.0, "lower", bias_bound=None)}
    assert {name: bool(each["warning"]) for name, each in to_arviz(scores).items()} == {
        "gmm": False,
        "ppca": False,
        "vae": compare(three()).rows[0].warning is not None,
        "is": True,
    }


def test_plots_of_arviz_take_what_they_get() -> None:
    models = to_arviz(three())
    assert az.plot_compare(az.compare(models, method="BB-pseudo-BMA")) is not None
    assert az.plot_khat(models["vae"]) is not None
    assert "Pareto k" in str(models["vae"])
    assert "elpd_loo" in str(models["gmm"])


def test_several_fits_are_their_mean_with_the_largest_khat() -> None:
    fits = [
        result([-1.0, -3], "lower", khat=np.array([0.1, 0.8])),
        result([-3.0, -5], "lower", khat=np.array([0.5, 0.2])),
    ]
    (each,) = to_arviz({"vae": fits}).values()
    assert np.asarray(each["loo_i" if IS_OLD else "elpd_i"]).tolist() == [-2, -4]
    assert np.asarray(each["pareto_k"]).tolist() == [0.5, 0.8]


def rich() -> dict[str, LogLikelihood | list[LogLikelihood]]:
    """Results with all that may stand in one, with values that files are apt to lose."""
    khat = np.array([-np.inf, 0.3, np.nan])
    check = Certificate(True, "no harder", 0.1, 0.01, -80.0, -79.9, 3.0, 3.1, 100)
    full = result(
        [-1.0, -2 / 3, -3e-300],
        "lower",
        khat=khat,
        bad=np.array([True, False, True]),
        elbo=np.array([-np.inf, 1, 2]),
        spread=np.full(3, 0.1),
        certificate=check,
        notes=("a block was halved",),
        shares={"refined": 0.25},
        bias_bound=None,
        seed=7,
    )
    return {"vae": [full, result([-4.0, -5, -6], "lower", seed=8)], "gmm": result([-7.0, -8, -9])}


def test_netcdf_reads_back_digit_for_digit(tmp_path) -> None:
    before = rich()
    path = save_netcdf(before, tmp_path / "comparison.nc")
    after = load_netcdf(path)
    assert compare(after).to_dict(data_name="x") == compare(before).to_dict(data_name="x")
    pairs = zip([*before["vae"], before["gmm"]], [*after["vae"], after["gmm"]], strict=True)  # type: ignore[misc]
    for mine, theirs in pairs:
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
            assert getattr(getattr(mine, name), "dtype", None) == getattr(getattr(theirs, name), "dtype", None)
        assert (mine.certificate, mine.notes, mine.space, mine.seed) == (
            theirs.certificate,
            theirs.notes,
            theirs.space,
            theirs.seed,
        )
    path.unlink()  # nothing holds the file


def test_arviz_opens_the_file_and_sees_every_figure(tmp_path) -> None:
    path = save_netcdf(compare(rich()), tmp_path / "comparison.nc")
    tree = az.from_netcdf(str(path))
    group = tree[GROUP]
    assert group["log_prob"].dims == ("fit", "datum")
    assert group["model"].values.tolist() == ["vae", "vae", "gmm"]
    assert group["direction"].values.tolist() == ["lower", "lower", "exact"]
    assert group["estimator"].values.tolist() == ["importance_sampling", "importance_sampling", "exact"]
    assert np.isnan(group["khat"].values[2]).all()
    assert (group.attrs["space"], group.attrs["sha256"], group.attrs["units"]) == ("Quantized(17)", "ab" * 32, "nats")
    tree.close()


def test_clusters_and_level_are_in_the_file(tmp_path) -> None:
    groups = np.arange(NUM_DATA) // 4
    path = save_netcdf(compare(three(), groups=groups, level=0.9), tmp_path / "clusters.nc")
    with xarray.open_dataset(path, group="held_out", engine="h5netcdf") as dataset:
        np.testing.assert_array_equal(dataset["cluster"].values, groups)
        assert dataset.attrs["level"] == 0.9
    assert set(load_netcdf(path)) == set(three())


def test_unlike_results_do_not_share_a_file(tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot compare 'a' with 'b': space"):
        save_netcdf({"a": result([-1.0]), "b": result([-1.0], space=Binary((8, 8)))}, tmp_path / "comparison.nc")


def test_other_files_are_refused(tmp_path) -> None:
    import xarray

    path = tmp_path / "other.nc"
    xarray.Dataset({"x": ("y", np.zeros(2))}).to_netcdf(path, engine="h5netcdf")
    with pytest.raises(ValueError, match=r"other\.nc must hold the group 'held_out' that save_netcdf writes"):
        load_netcdf(path)
    with pytest.raises(FileNotFoundError):
        load_netcdf(tmp_path / "missing.nc")
