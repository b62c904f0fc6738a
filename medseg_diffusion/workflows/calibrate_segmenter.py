"""`medseg calibrate-segmenter`: fit the calibration of a trained segmenter to labelled scans of other patients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from medseg_diffusion.data.cases import Case, digest, find_cases
from medseg_diffusion.data.file_lists import Data, folder_or_files
from medseg_diffusion.data.mask_examples import CaseFormat, read_case
from medseg_diffusion.device import choose_device, keep_freed_memory, tune
from medseg_diffusion.diffusion.noise import derive_seed
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.files import require_new_folder
from medseg_diffusion.methods.calibration import Calibration, CalibrationFit
from medseg_diffusion.models.card import render_card
from medseg_diffusion.models.segmenter import MaskSegmenter
from medseg_diffusion.models.store import load_model_files, save_model
from medseg_diffusion.training.progress import OnProgress, count_of, silent

OnPrepare = Callable[[str, int, int], None]
"""Called with (what is done, done, total)."""


def calibrate_segmenter(
    model: str | Path,
    data: Data,
    output: str | Path,
    *,
    device: str = "auto",
    on_progress: OnProgress = silent,
) -> Calibration:
    """Fit the calibration of a trained segmenter to the labelled scans, and write it as a new model.

    The calibration holds for the model's default sampler, steps, ensemble and fusion. In the folder of the model's
    training, only scans that were held out for calibration are used, or else those held out for testing.

    Args:
        model: Folder or installed name.
        data: Folder or list of labelled scans, as for `train_segmenter`, of patients that the model was not trained
            on.
        output: The new model directory.
        device: auto, cpu, cuda, cuda:N or mps.
        on_progress: Called with a text and the share done, 0 to 1.

    Raises:
        ModelError: No usable model.
        InputError: Unusable scans, scans of several readers, or none that may be used.
        UsageError: An output that exists, or a model that is no mask segmenter.
    """
    output, files = Path(output), folder_or_files(data)
    require_new_folder(output)
    chosen = choose_device(device)
    tune(chosen)
    if chosen.type == "cpu":
        keep_freed_memory()
    saved = load_model_files(model)
    if saved.card.get("task") != "mask":
        raise UsageError(f"{saved.path}: is no model of `medseg train-segmenter`; only those are calibrated")
    folder = find_cases(files)
    cases = _unseen(folder.cases, saved.card["training"].get("held_out", {}))
    if not cases:
        seen = "only scans that the model was trained or chosen on"
        raise InputError(str(files), seen, "scans of other patients", "choose another folder")
    if several := [case for case in cases if case.further_labels]:
        raise InputError(
            several[0].image, "several readers", "one label file a scan", "copy one reader's masks to labels/"
        )
    calibration = _fitted(saved.path, cases, folder.labels, device, count_of(on_progress))
    calibrated_on = {
        "scans": len(cases),
        "patients": len({case.patient for case in cases}),
        "digests": sorted(digest(case.name) for case in cases),
    }
    card: dict[str, Any] = {**saved.card, "calibration": asdict(calibration), "calibrated_on": calibrated_on}
    save_model(output, card, saved.weights, render_card(card))
    return calibration


def _unseen(cases: Sequence[Case], held_out: Mapping[str, Sequence[str]]) -> list[Case]:
    """The cases that neither trained a model nor chose its weights; those of the test side only if there are no others.

    A folder with any of the held-out cases is that of the training, where all others were trained on.
    """
    sides = {name: side for side, names in held_out.items() for name in names}
    of = {case: sides.get(digest(case.name)) for case in cases}
    if not any(of.values()):
        return list(cases)
    calibration, test = ([case for case in cases if of[case] == side] for side in ("calibration", "test"))
    return calibration or test


def store_calibration(
    model: Path,
    cases: Sequence[Case],
    named_labels: Collection[int],
    device: str,
    on_prepare: OnPrepare = lambda what, done, total: None,
) -> Calibration:
    """Calibrate the model directory ``model`` on ``cases``, and store the calibration in it.

    ``named_labels`` are the label values that have a name in the folder of the cases, see `CaseFormat`.
    """
    calibration = _fitted(model, cases, named_labels, device, on_prepare)
    saved = load_model_files(model)
    card = {**saved.card, "calibration": asdict(calibration)}
    save_model(model, card, saved.weights, render_card(card))
    return calibration


def _fitted(
    path: Path, cases: Sequence[Case], named_labels: Collection[int], device: str, on_prepare: OnPrepare
) -> Calibration:
    """Segment the cases exactly as `medseg segment` does without options, and fit a calibration to the results."""
    saved = load_model_files(path)
    uncalibrated = {name: value for name, value in saved.card.items() if name != "calibration"}
    model = MaskSegmenter(replace(saved, card=uncalibrated), choose_device(device))
    expected = CaseFormat(model.channels, len(model.labels), model.merge_labels, named_labels)
    fit = CalibrationFit(model.sampling)
    for done, case in enumerate(cases):
        on_prepare("scans of the calibration", done, len(cases))
        volume, labels = read_case(case, expected)
        segmentation = model.segment(volume, derive_seed(0, case.name), maps=["probabilities"])
        assert segmentation.probabilities is not None
        agreement = [dice for dice in segmentation.agreement.values() if dice == dice]
        pairwise = fmean(agreement) if agreement else None
        fit.add(case.patient, segmentation.probabilities, segmentation.labels, labels.data[0], pairwise)
    on_prepare("scans of the calibration", len(cases), len(cases))
    return fit.result()
