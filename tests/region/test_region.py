"""Regions with closed forms, and regions made of others: against their definitions."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpmath import expm1, log, mp, mpf, sqrt
from scipy.special import lambertw

import bandpo
import bandpo.plot
import bandpo.spec
from bandpo import Band, BandTable, Clip, Dcpo, Region, sides
from bandpo.error import ClipWarning, InvalidTypeError, InvalidValueError
from bandpo.region import from_description
from bandpo.schedule import Bapo, Constant

CLOSED_FORM = 2e-15
"""Relative tolerance of a log bound from a closed form: a few roundings of 1.1e-16 each."""

ROOT = 4e-8
"""If 1 - 4 eps/p is below the square of this, its square root magnifies a rounding of p."""

TABLE = 1e-6
"""Max absolute error of a table, beyond one float32 ulp of the bound."""

LOGP = np.concatenate([-np.logspace(-18, 2.5, 83), [0.0, -0.3, -700.0, -5e4]])


def dcpo(logp: float, eps: float, upper: bool) -> mpf:
    """The bound of DCPO (arXiv 2509.02333, Eq. 4) as a 60-digit logarithm."""
    with mp.workdps(60):
        p = mp.exp(mpf(logp))
        if upper:
            return log((1 + sqrt(1 + 4 * mpf(eps) / p)) / 2)
        return log((1 + sqrt(max(1 - 4 * mpf(eps) / p, mpf(0)))) / 2)


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 0.16, 0.2, 0.25, 3.0])
def test_dcpo_bounds_equal_their_closed_form(eps: float) -> None:
    log_lower, log_upper = Dcpo(eps, eps).log_bounds(LOGP)
    for logp, lower, upper in zip(LOGP, log_lower, log_upper, strict=True):
        assert upper == pytest.approx(float(dcpo(logp, eps, True)), rel=CLOSED_FORM, abs=0)
        if abs(1 - 4 * eps * math.exp(min(-logp, 600.0))) > ROOT**2:
            # The square root of 1 - 4 eps/p has the relative error of that, halved.
            lost = 1 / max(1 - 4 * eps * math.exp(min(-logp, 600.0)), ROOT)
            expected = float(dcpo(logp, eps, False))
            assert lower == pytest.approx(expected, rel=CLOSED_FORM * max(1.0, lost), abs=0)


def test_dcpo_has_its_published_points() -> None:
    """Figure 4 and appendix A.9 of arXiv 2509.02333, with epsilons 0.16 and 0.2."""
    region = Dcpo()
    p = np.array([0.1, 0.01, 1 / 1.2])
    np.testing.assert_allclose(region.bounds(np.log(p))[1], [2.0, 5.0, 1.2], rtol=1e-14, atol=0)
    lower, _ = region.bounds(np.log([1.0, 4 * 0.16, 0.01, 1e-300]))
    np.testing.assert_allclose(lower, [0.8, 0.5, 0.5, 0.5], rtol=ROOT, atol=0)
    # The point (0.002, 10) is drawn there to one digit: 10 is reached at eps / 90.
    _, upper = region.cap(10).bounds(np.log([0.2 / 90, 1e-3, 1e-9]))
    np.testing.assert_allclose(upper, 10.0, rtol=1e-14, atol=0)


def test_dcpo_has_its_limits_at_the_ends() -> None:
    log_lower, log_upper = Dcpo().log_bounds([-np.inf, np.nan, 0.03])
    np.testing.assert_array_equal(log_lower, [math.log(0.5), np.nan, Dcpo().log_bounds(0.0)[0]])
    np.testing.assert_array_equal(log_upper, [np.inf, np.nan, Dcpo().log_bounds(0.0)[1]])


def test_dcpo_slopes_are_derivatives() -> None:
    region = Dcpo(0.1, 0.2)
    for logp in [-1e-9, -0.01, -0.5, -0.9, -3.0, -40.0]:
        for upper, eps in ((True, 0.2), (False, 0.1)):
            _, slope = region._sample(upper, np.array([logp]))
            with mp.workdps(40):
                exact = mp.diff(lambda y, eps=eps, upper=upper: dcpo_at(y, eps, upper), mpf(logp))
            if not upper and logp < math.log(0.4):
                exact = mpf(0)
            assert slope[0] == pytest.approx(float(exact), rel=1e-12, abs=0)


def dcpo_at(logp: mpf, eps: float, upper: bool) -> mpf:
    sign = 1 if upper else -1
    inside = 1 + sign * 4 * mpf(eps) / mp.exp(logp)
    return log((1 + sqrt(max(inside, mpf(0)))) / 2)


@pytest.mark.parametrize(
    "region",
    [
        Dcpo(),
        Dcpo().cap(10),
        Dcpo(0.3, 0.2),
        Dcpo(0.25 * (1 - 1e-12), 1.0),
        Dcpo(1e-3, 1e-3),
        Dcpo(0.05, 0.1) & Band("kl", 0.1),
        Dcpo(0.05, 0.1) | Clip(0.2, 0.28),
        sides(lower=Dcpo(), upper=Band("kl", 0.05)).at_least(0.3),
        sides(lower=Clip(0.2), upper=Band("kl", 0.05)),
        Clip.kl3(0.05).cap(10),
    ],
    ids=repr,
)
def test_tables_of_regions_are_small_and_within_the_target(region: Region, tmp_path: Path) -> None:
    table = region.table()
    table.save(tmp_path / "region.safetensors")
    assert BandTable.load(tmp_path / "region.safetensors") == table
    assert table.region == region
    assert table.nbytes <= 32 * 1024
    assert max(table.verify(200_000).max_error) <= TABLE


@pytest.mark.parametrize("delta", [1e-300, 1e-12, 1e-6, 0.05, 1.0, 30.0, 1e5, 1e308])
def test_kl3_solves_its_equation(delta: float) -> None:
    """arXiv 2602.05494: the ratios with r - 1 - ln r <= delta, by Lambert's W."""
    region = Clip.kl3(delta)
    with mp.workdps(400):  # e^t - 1 - t loses 300 digits at the min delta
        for log_bound in (region.log_lower, region.log_upper):
            t = mpf(log_bound)
            nearer = t - (expm1(t) - t - mpf(delta)) / expm1(t)
            assert log_bound == pytest.approx(float(nearer), rel=CLOSED_FORM, abs=0)
    if 1e-3 < delta < 100:  # where scipy's own error is negligible
        lower, upper = region.bounds(-1.0)
        branches = [-lambertw(-math.exp(-1 - delta), k).real for k in (0, -1)]
        assert (lower, upper) == pytest.approx(tuple(branches), rel=1e-12, abs=0)


def test_kl3_has_known_values() -> None:
    lower, upper = Clip.kl3(0.05).bounds(0.0)
    # Half a unit in the last digit.
    assert (lower, upper) == pytest.approx((0.7161895, 1.3504033), rel=0, abs=5e-8)


def test_a_clip_of_the_log_ratio_keeps_its_widths() -> None:
    clip = Clip.from_log_ratio(0.4)
    assert (clip.log_lower, clip.log_upper) == (-0.4, 0.4)
    assert clip.contains(-1.0, [-0.4, 0.4]).all()
    assert not clip.contains(-1.0, np.nextafter([-0.4, 0.4], [-1, 1])).any()
    wide = Clip.from_log_ratio(40.0, math.inf)
    assert (wide.log_lower, wide.log_upper) == (-40.0, math.inf)
    assert from_description(wide.describe()) == wide != Clip(1.0, math.inf)
    assert repr(wide) == "Clip.from_log_ratio(40.0, inf)"
    assert Clip.from_log_ratio(0.0) == Clip(0.0)


KINDS = [Clip(0.2, 0.28), Dcpo(), Band("kl", 0.05), Band("tv", (0.01, 0.2)), Clip.kl3(0.05)]


@pytest.mark.parametrize("lower", KINDS, ids=repr)
@pytest.mark.parametrize("upper", KINDS, ids=repr)
def test_sides_take_each_bound_from_its_region(lower: Region, upper: Region) -> None:
    region = sides(lower=lower, upper=upper)
    rng = np.random.default_rng(5)
    logp, log_ratio = -rng.exponential(3, 5000), rng.normal(0, 1.5, 5000)
    np.testing.assert_array_equal(region.log_bounds(logp)[0], lower.log_bounds(logp)[0])
    np.testing.assert_array_equal(region.log_bounds(logp)[1], upper.log_bounds(logp)[1])
    chosen = np.where(
        log_ratio < 0, lower.contains(logp, log_ratio), upper.contains(logp, log_ratio)
    )
    np.testing.assert_array_equal(region.contains(logp, log_ratio), chosen)
    assert region.contains(logp, 0.0).all()
    assert not region.contains(-1.0, np.nan)
    again = from_description(region.describe())
    assert again == region
    assert hash(again) == hash(region)
    assert pickle.loads(pickle.dumps(region)) == region  # noqa: S301 -- our own bytes
    assert eval(repr(region), dict(vars(bandpo))) == region  # noqa: S307 -- our own text


def test_sides_are_per_token_if_a_part_is() -> None:
    per_token = sides(lower=Clip(0.2), upper=Band("kl", np.array([0.1, 0.2])))
    assert per_token.per_token
    np.testing.assert_allclose(
        per_token.bounds([-1.0, -1.0])[1],
        [Band("kl", delta).bounds(-1.0)[1] for delta in (0.1, 0.2)],
        rtol=CLOSED_FORM,
        atol=0,
    )
    assert not sides(lower=Clip(0.2), upper=Band("kl", 0.1)).per_token


def test_a_minimum_width_is_a_union_with_a_clip() -> None:
    assert Band("kl", 0.05).at_least(0.2, 0.28) == Band("kl", 0.05) | Clip(0.2, 0.28)
    assert Dcpo().at_least(0.2) == Dcpo() | Clip(0.2)


def test_sides_accept_a_table() -> None:
    table = Band("kl", 0.05).table()
    assert isinstance(table, BandTable)
    lower, upper = sides(lower=Clip(0.2), upper=table).bounds(-3.0)
    assert lower == pytest.approx(0.8, rel=CLOSED_FORM, abs=0)
    assert upper == table.bounds(-3.0)[1]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Clip(-0.2), InvalidValueError, r"eps_low must be in \[0, 1\], got -0.2"),
        (lambda: Clip(1.2), InvalidValueError, r"eps_low must be in \[0, 1\]"),
        (lambda: Clip(0.2, -0.1), InvalidValueError, "eps_high must be at least 0, got -0.1"),
        (lambda: Clip(math.nan), InvalidValueError, "eps_low must be .* got nan"),
        (lambda: Clip.from_log_ratio(-0.4), InvalidValueError, "log_low must be a width"),
        (lambda: Clip.from_log_ratio(0.4, math.nan), InvalidValueError, "log_high .* got nan"),
        (
            lambda: from_description({"ring": [1, 2]}),
            InvalidValueError,
            "kind 'ring' are not known",
        ),
        (lambda: Clip.kl3(0.0), InvalidValueError, "delta must be finite and above 0, got 0.0"),
        (lambda: Clip.kl3(math.inf), InvalidValueError, "delta must be finite .* got inf"),
        (lambda: Clip.kl3("0.1"), InvalidTypeError, "delta must be a real number, got str"),  # type: ignore[arg-type]
        (lambda: Dcpo(0.0), InvalidValueError, "eps_low must be finite and above 0, got 0.0"),
        (lambda: Dcpo(0.1, math.inf), InvalidValueError, "eps_high must be finite .* got inf"),
        (lambda: Dcpo([0.1]), InvalidTypeError, "eps_low must be one number"),  # type: ignore[arg-type]
        (lambda: Dcpo().cap(0.9), InvalidValueError, "upper must be at least 1, got 0.9"),
        (lambda: Dcpo().cap(math.nan), InvalidValueError, "upper must be at least 1, got nan"),
        (lambda: Dcpo().at_least(-1), InvalidValueError, "eps_low must be in"),
        (lambda: sides(lower=0.2, upper=Clip(0.2)), InvalidTypeError, "lower must be a Region"),  # type: ignore[arg-type]
        (lambda: sides(lower=Clip(0.2), upper=1.2), InvalidTypeError, "upper .* got float"),  # type: ignore[arg-type]
        (
            lambda: sides(lower=Clip(0.2), upper=Bapo()),  # type: ignore[arg-type]
            InvalidTypeError,
            "upper must be a Region, got Bapo; .*within=lambda band",
        ),
        (lambda: Clip(0.2) | Bapo(), InvalidTypeError, "Bapo is no Region .*within=lambda band"),
        (lambda: Bapo() & Clip(0.2), InvalidTypeError, "Bapo is no Region .*within=lambda band"),
        (
            lambda: Band("kl", Constant(0.1)),  # type: ignore[arg-type]
            InvalidTypeError,
            "delta must be a number, .* got Constant; bandpo.schedule.ScheduledBand",
        ),
    ],
)
def test_bad_input_is_refused_with_the_argument(
    make: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_tensor_of_deltas_is_refused() -> None:
    torch = pytest.importorskip("torch")
    for delta in (
        torch.tensor(0.1, requires_grad=True),
        torch.tensor(0.1, dtype=torch.bfloat16),
        torch.tensor(0.1, device="meta"),
    ):
        with pytest.raises(InvalidTypeError, match=r"delta must be a number.* got Tensor"):
            Band("kl", delta)
    with pytest.raises(InvalidTypeError, match=r"a number, .* or a numpy array, got Tensor"):
        Band("kl", torch.full((3,), 0.1))


def region_of_contributing() -> Any:
    """The class that CONTRIBUTING shows, executed as it stands there."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## To add a region")[2].partition("\n## ")[0]
    [example] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "CONTRIBUTING.md", "exec"), names)  # noqa: S102 -- our own text
    return names["LogitStep"]


def logit_step(logp: float, step: float) -> mpf:
    """The log-ratio that moves the logit of a probability by a step."""
    with mp.workdps(60):
        p = mp.exp(mpf(logp))
        moved = p / (1 - p) * mp.exp(mpf(step))
        return log(moved / (1 + moved) / p)


def test_a_region_of_a_user_has_bounds_a_table_and_combines() -> None:
    region = region_of_contributing()(0.3, 0.5)
    for logp in (-1e-3, -0.7, -30.0):
        expected = [float(logit_step(logp, step)) for step in (-0.3, 0.5)]
        np.testing.assert_allclose(region.log_bounds(logp), expected, rtol=1e-12, atol=0)
    table = region.table()
    assert max(table.max_error) <= TABLE
    for tabulated, exact in zip(table.bounds(LOGP), region.bounds(LOGP), strict=True):
        np.testing.assert_allclose(tabulated, exact, rtol=0, atol=TABLE)
    capped = (region | Clip(0.1)).cap(1.5)
    assert capped.bounds([-10.0])[1] == pytest.approx(1.5, rel=CLOSED_FORM)
    assert region.contains(-1.0, 0.0)


def test_a_region_of_a_user_needs_log_bounds_alone() -> None:
    class Halved(Region):
        def log_bounds(self, logp: Any) -> tuple[Any, Any]:
            return Clip(0.5).log_bounds(logp)

    region = Halved()
    assert region.per_token
    assert region.contains(-1.0, [math.log(0.6), math.log(1.6)]).tolist() == [True, False]
    assert (region & Clip(0.1)).bounds(-1.0)[1] == pytest.approx(1.1, rel=CLOSED_FORM)
    for use in (region.table, region.describe, lambda: region.curves(True)):
        with pytest.raises(InvalidValueError, match=r"Halved.* cannot be (tabulated|described)"):
            use()


def test_a_file_restores_a_region_whose_kind_has_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logit_step_region = region_of_contributing()
    logit_step_region(0.3, 0.5).table().save(tmp_path / "table.safetensors")
    table = BandTable.load(tmp_path / "table.safetensors")
    with pytest.raises(InvalidValueError, match="kind 'logit-step' are not known"):
        _ = table.region
    monkeypatch.setitem(bandpo.region.description._WIDTHS, "logit-step", logit_step_region)
    assert vars(table.region) == {"low": 0.3, "high": 0.5}


@pytest.mark.parametrize(
    ("lower", "upper", "clip"),
    [
        (0.8, 1.28, Clip(0.2, 0.28)),
        (0, math.inf, Clip(1.0, math.inf)),
        (1, 1, Clip(0.0)),
        (np.float32(0.5), 3, Clip(0.5, 2.0)),
    ],
)
def test_between_takes_the_ends_of_an_interval(lower: float, upper: float, clip: Clip) -> None:
    assert Clip.between(lower, upper) == clip


@pytest.mark.parametrize(
    ("lower", "upper", "error", "message"),
    [
        (0.2, 0.28, InvalidValueError, "upper must be at least 1, got 0.28"),
        (1.2, 2.0, InvalidValueError, r"lower must be in \[0, 1\], got 1.2"),
        (math.nan, 2.0, InvalidValueError, r"lower must be in \[0, 1\], got nan"),
        (0.5, math.nan, InvalidValueError, "upper must be at least 1, got nan"),
        ("0.5", 2.0, InvalidTypeError, "lower must be a real number, got str"),
    ],
)
def test_between_refuses_an_interval_without_1(
    lower: Any, upper: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Clip.between(lower, upper)


ENDS = [(0.8, 1.28), (0.9, 1.1), (0.999, 1.002), (0.51, 1.99)]


@pytest.mark.parametrize(("low", "high"), ENDS)
def test_widths_that_are_more_likely_ends_warn_at_the_line_of_the_caller(
    low: float, high: float
) -> None:
    message = rf"from {low} to {high} write {re.escape(repr(Clip.between(low, high)))}"
    makers: list[Callable[[], Region]] = [
        lambda: Clip(low, high),
        lambda: bandpo.spec.region_from_spec(f"kl@0.1|clip@{low},{high}"),
        lambda: Band("kl", 0.1).at_least(low, high),
    ]
    for make in makers:
        with pytest.warns(ClipWarning, match=message) as caught:
            make()
        assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.2, 0.28), (0.8, 4.0), (0.5, 1.0), (1.0, 1.0), (1.0, 1.28), (0.8, 2.0), (0.8, 0.8)],
)
def test_wide_constants_do_not_warn(low: float, high: float) -> None:
    assert Clip(low, high).eps_low == low
    bandpo.spec.region_from_spec(f"clip@{low},{high}")


@pytest.mark.parametrize(("low", "high"), ENDS)
def test_a_clip_that_was_meant_does_not_warn_again(low: float, high: float) -> None:
    clip = Clip.between(1.0 - low, 1.0 + high)
    assert clip.eps_low == pytest.approx(low, rel=1e-15)
    assert bandpo.spec.region_from_spec(bandpo.spec.spec_from_region(clip)) == clip
    assert from_description(clip.describe()) == clip
    assert pickle.loads(pickle.dumps(clip)) == clip  # noqa: S301
    assert clip.table().region == clip


def test_a_pair_of_deltas_may_be_a_list() -> None:
    assert Band("kl", [0.05, 0.1]) == Band("kl", (0.05, 0.1))
    with pytest.raises(InvalidValueError, match=r"pair \(low, high\), got 3 values"):
        Band("kl", [0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    "module",
    [
        bandpo.schedule,
        bandpo.presets,
        bandpo.region,
        bandpo.divergence,
        bandpo.table,
        bandpo.error,
        bandpo.spec,
        bandpo.plot,
    ],
)
def test_dir_of_a_public_module_lists_public_names(module: Any) -> None:
    names = dir(module)
    assert all(hasattr(module, name) for name in names)
    assert not {"annotations", "np", "math", "Any", "TYPE_CHECKING"} & set(names)
    public = {
        n for n, x in vars(module).items() if getattr(x, "__module__", "").startswith("bandpo")
    }
    assert {n for n in names if not n.startswith("_")} <= public | set(vars(module))
