"""Calibration of ensembles: temperatures, agreement and intervals of volumes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from medseg_diffusion.methods.calibration import Calibration, CalibrationFit, Sampling, fit_temperature, not_exceeded
from medseg_diffusion.methods.ensemble import Ensemble, temperature_scaled
from tests.helpers.ensembles import member, normal

SAMPLING = Sampling("dpm++", 5, 5, "mean")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_overconfident_probabilities_is_found(temperature) -> None:
    """Labels drawn from p; the model says p^T: the fit must return T."""
    p = (1.5 * normal(0, 3, 40_000)).softmax(0)
    labels = torch.multinomial(p.T, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    claimed = temperature_scaled(p, 1 / temperature)
    assert fit_temperature((claimed.numpy(), labels.numpy())) == pytest.approx(temperature, rel=0.05)


def test_honest_borders_do_not_make_empty_background_uncertain() -> None:
    """Borders alone would ask for a temperature of 3; far background is certain, right, and stays so."""
    border = (1.5 * normal(0, 2, 20_000)).softmax(0)
    labels = torch.multinomial(border.T, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    claimed = temperature_scaled(border, 1 / 3)
    certain = torch.tensor([[1 - 1e-4], [1e-4]]).expand(2, 20_000).contiguous()
    near, far = (claimed.numpy(), labels.numpy()), (certain.numpy(), np.zeros(20_000, np.int64))
    found = fit_temperature(near, far)
    assert 1 < found < 3
    assert float(temperature_scaled(certain, found)[1, 0]) < 0.03 < float(temperature_scaled(certain, 3)[1, 0])
    assert fit_temperature(near, (np.zeros((2, 0), np.float32), np.zeros(0, np.int64))) == pytest.approx(3, rel=0.05)
    assert fit_temperature() == 1


def added(fit: CalibrationFit, patient: str, members: Tensor, labels: Tensor) -> None:
    ensemble = Ensemble.of(members)
    agreement = float(ensemble.members().pairwise_dice().nanmean()) if len(members) > 1 else None
    fit.add(patient, ensemble.mean, ensemble.mean.argmax(0), labels, agreement)


def test_a_calibration_has_a_temperature_a_usual_agreement_and_volume_errors() -> None:
    several, alone = CalibrationFit(SAMPLING), CalibrationFit(Sampling("", 1, 1, "mean"))
    generator = torch.Generator().manual_seed(0)
    for patient in range(6):
        labels = torch.zeros(16, 16, dtype=torch.int64)
        labels[4:12, 4:12] = 1
        # Certain members that are wrong in 10 % of voxels: overconfident alone, less so together.
        wrong = torch.rand(5, 16, 16, generator=generator) < 0.1 + 0.02 * patient
        members = torch.stack([member(torch.where(w, 1 - labels, labels), certainty=0.999) for w in wrong])
        added(several, f"{patient}", members, labels)
        added(alone, f"{patient}", members[:1], labels)
    result, single = several.result(), alone.result()
    assert (result.sampling, result.cases, result.patients) == (SAMPLING, 6, 6)
    assert single.temperature > 1.5 > result.temperature > 0
    assert result.ece[1] < result.ece[0]
    assert result.agreement is not None and 0.5 < result.agreement < 0.8 and single.agreement is None
    assert result.level == pytest.approx(6 / 7, abs=1e-4) and 0 < result.volume_errors[0] < 1


def test_the_volume_error_of_a_patient_is_the_largest_of_the_scans() -> None:
    """Three scans of two patients: the interval is of two, and its level 2 / 3."""
    fit, labels = CalibrationFit(SAMPLING), torch.zeros(10, 10, dtype=torch.int64)
    labels[:3, :3] = 1  # 9 voxels
    for patient, size in (("a", 3), ("a", 1), ("b", 2)):
        predicted = torch.zeros_like(labels)
        predicted[:size, :size] = 1
        fit.add(patient, member(predicted), predicted, labels, None)
    result = fit.result()
    assert (result.patients, result.cases, result.level) == (2, 3, pytest.approx(2 / 3, abs=1e-4))
    assert result.volume_errors == [pytest.approx(np.log(10 / 2), abs=1e-4)]


def test_cases_without_a_reference_have_no_calibration_error_near_one() -> None:
    fit = CalibrationFit(SAMPLING)
    empty = torch.zeros(16, 16, dtype=torch.int64)
    fit.add("a", member(empty), empty, empty, None)
    assert fit.result().ece == [None, None]


@pytest.mark.parametrize(("cases", "promised"), [(20, 0.95), (10, 10 / 11), (39, 0.95), (1, 0.5)])
def test_intervals_hold_a_further_case_as_often_as_promised(cases: int, promised: float) -> None:
    """Whatever the distribution of errors: here one with a heavy tail."""
    rng = np.random.default_rng(0)
    trials = 4000
    held = 0
    for _ in range(trials):
        errors = rng.standard_cauchy((cases + 1, 1)) ** 2
        bound, level = not_exceeded(errors[:-1], 0.95)
        assert level == pytest.approx(promised)
        held += bool(errors[-1] <= bound)
    expected = min(cases, int(np.ceil(0.95 * (cases + 1)))) / (cases + 1)
    assert held / trials == pytest.approx(expected, abs=0.02) and held / trials > promised - 0.015


def test_the_interval_of_a_volume_is_symmetric_in_the_logarithm() -> None:
    known = Calibration("dpm++", 5, 3, "mean", 1.0, [0.1, 0.1], None, 20, 20, [np.log(2.0), 0.0], 0.95)
    assert known.volume_interval(1, 7.0, 1.0) == pytest.approx((3.0, 15.0))
    assert known.volume_interval(2, 7.0, 1.0) == pytest.approx((7.0, 7.0))
    assert known.volume_interval(1, 0.0, 1.0) == pytest.approx((0.0, 1.0))  # nothing found: at most a voxel
