"""Do images that a generator draws of masks help a segmenter? Trains with few and many patients, with and without them.

    python benchmarks/studies/synthetic_data.py DATA OUT --generator mask-lgg-flair-small \
        --segmenter baseline-flair-small [--patients 5 20 0] [--seeds 0 1 2] [--generator-steps 6000] \
        [--segmenter-steps 1500] [--per-mask 4] [--guidance 1.5] [--set training.precision=bf16]

For every number of training patients (0: all) one generator is trained on the images and masks of these patients, and
draws --per-mask images of each of their masks. Then the segmenter is trained for the same number of steps on

"real"                  their scans, without augmentation
"augmented"             the same, with the augmentation of the preset
"augmented + synthetic" their scans and the drawn ones, with this augmentation
"synthetic"             the drawn ones alone, with this augmentation

Test and validation patients are the same real ones for all. They are the first in the order of the hash of their
names, so that no arm sees them. Smaller sets of patients are parts of larger ones.

OUT holds scores.csv (one row for each test case of each run), table.md and generators.csv. The latter says whether the
images obey their masks (Dice of the segmenter of all patients on drawn images), and has the FID of pairs of image and
mask against those of the test patients, beside that of the validation patients. A repeated call goes on with an
interrupted one.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from medseg_diffusion.config.generator import GeneratorConfig
from medseg_diffusion.config.load import load_config, load_segmenter_config
from medseg_diffusion.data.cases import CaseFolder, find_cases, split_by_hash
from medseg_diffusion.data.image_cache import PackedImages
from medseg_diffusion.metrics.generation import frechet_distance
from medseg_diffusion.metrics.overlap import label_overlap
from medseg_diffusion.metrics.statistics import mean_interval
from medseg_diffusion.models.generator import restore_generator
from medseg_diffusion.models.image_source import SampleOptions
from medseg_diffusion.models.store import load_model_files
from medseg_diffusion.networks.extractors import extractor
from medseg_diffusion.volumes.io import read_labels
from medseg_diffusion.workflows.image_features import features_of
from medseg_diffusion.workflows.real_images import labelled_images_of_training
from medseg_diffusion.workflows.sample import sample
from medseg_diffusion.workflows.segment import SegmentOptions, segment
from medseg_diffusion.workflows.train_generator import train_generator
from medseg_diffusion.workflows.train_segmenter import train_segmenter

ARMS = ("real", "augmented", "augmented + synthetic", "synthetic")
SCORES = ("patients", "arm", "seed", "case", "patient", "dice", "minutes")


@dataclass(frozen=True)
class Study:
    """The data, its split, and the options of the call."""

    data: Path
    out: Path
    folder: CaseFolder
    test: tuple[str, ...]
    validation: tuple[str, ...]
    training: tuple[str, ...]
    options: argparse.Namespace

    def chosen(self, count: int) -> tuple[str, ...]:
        """The first ``count`` of the training patients, in the order of the hash; 0 for all."""
        return self.training[: count or None]


def labelled_folder(
    out: Path, folder: CaseFolder, patients: Sequence[str], synthetic: Path | None = None, real: bool = True
) -> Path:
    """A labelled folder of links to the cases of ``patients``, and to those of a folder of drawn images."""
    shutil.rmtree(out, ignore_errors=True)
    rows: list[tuple[str, str]] = []
    for name in ("imagesTr", "labelsTr"):
        (out / name).mkdir(parents=True)
    sources = [(case, case.name) for case in folder.cases if real and case.patient in patients]
    if synthetic is not None:
        sources += [(case, f"synthetic-{case.name}") for case in find_cases(synthetic).cases]
    for case, name in sources:
        for part, file in (("imagesTr", case.image), ("labelsTr", case.label)):
            (out / part / f"{name}.nii.gz").symlink_to(file.resolve())
        rows.append((name, case.patient))
    labels = {str(value): name for value, name in folder.labels.items()}
    listed = [{"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"} for name, _ in rows]
    about = {"labels": labels, "modality": dict(enumerate(folder.channels)), "training": listed}
    (out / "dataset.json").write_text(json.dumps(about))
    with (out / "patients.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("case", "patient"), *rows])
    return out


def joined(out: Path, study: Study, count: int, synthetic: Path | None, real: bool) -> Path:
    """The folder of an arm: test and validation patients, and its training cases."""
    held_out = labelled_folder(out / "held-out", study.folder, (*study.test, *study.validation))
    training = labelled_folder(out / "training", study.folder, study.chosen(count), synthetic, real)
    for name in ("imagesTr", "labelsTr"):
        for file in (held_out / name).iterdir():
            (training / name / file.name).symlink_to(file.resolve())
    both = [json.loads((part / "dataset.json").read_text()) for part in (training, held_out)]
    both[0]["training"] += both[1]["training"]
    (training / "dataset.json").write_text(json.dumps(both[0]))
    rows = (held_out / "patients.csv").read_text().splitlines(keepends=True)[1:]
    with (training / "patients.csv").open("a") as stream:
        stream.writelines(rows)
    return training


def drawn(study: Study, count: int) -> tuple[Path, Path]:
    """The generator of ``count`` patients, and the folder of its images of their masks."""
    options, out = study.options, study.out / str(count)
    run, images = out / "generator", out / "synthetic"
    data = joined(out / "generator-data", study, count, None, True)
    if not (run / "done").exists():
        steps = options.generator_steps
        changes = [
            *options.overrides, f"training.max_steps={steps}", f"training.validate_every={-(-steps // 3)}",
            f"data.test_images={len(study.test)}", f"data.validation_images={len(study.validation)}",
        ]  # fmt: skip
        config = load_config(options.generator, changes)
        assert isinstance(config, GeneratorConfig)
        started = time.monotonic()
        train_generator(config, data, run, resume=run.exists(), device="cpu", seed=0)
        (run / "done").write_text(f"{(time.monotonic() - started) / 60:.1f} minutes\n")
    masks = labelled_folder(out / "masks", study.folder, study.chosen(count))
    drawing = SampleOptions(count=options.per_mask, guidance=options.guidance, device="cpu")
    sample(run, images, drawing, masks=masks)
    return run / "model", images


def score_segmenter(study: Study, count: int, arm: str, seed: int, synthetic: Path) -> Path:
    """Train the segmenter of one arm, unless it is trained; write the Dice of every test case; return the model."""
    options = study.options
    out = study.out / str(count) / f"{arm.replace(' + ', '-')}-{seed}"
    table = out / "scores.csv"
    if table.exists():
        return out / "run" / "model"
    data = joined(out / "data", study, count, synthetic if "synthetic" in arm else None, arm != "synthetic")
    steps = options.segmenter_steps
    changes = [
        *options.overrides, f"training.max_steps={steps}", f"training.validate_every={-(-steps // 3)}",
        f"data.test_cases={len(study.test)}", f"data.validation_cases={len(study.validation)}",
        "data.calibration_cases=0", *(["augmentation.probability=0"] if arm == "real" else []),
    ]  # fmt: skip
    started = time.monotonic()
    config = load_segmenter_config(options.segmenter, changes)
    model = train_segmenter(config, data, out / "run", resume=(out / "run").exists(), device="cpu", seed=seed)
    minutes = (time.monotonic() - started) / 60
    rows = []
    for name, patient, dice in dice_of(model, out / "masks", study.folder, study.test):
        rows.append((count, arm, seed, name, patient, f"{dice:.5f}", f"{minutes:.1f}"))
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows([SCORES, *rows])
    return model


def dice_of(model: Path, out: Path, folder: CaseFolder, patients: Sequence[str]) -> list[tuple[str, str, float]]:
    """Name, patient and Dice, the mean over the classes, of the cases of ``patients``."""
    cases = [case for case in folder.cases if case.patient in patients]
    found = segment([case.image for case in cases], SegmentOptions(model=str(model), output=out, device="cpu"))
    values = [value for value in folder.labels if value]
    scored = []
    for case, result in zip(cases, found, strict=True):
        mask, label = (read_labels(path).data[0].numpy() for path in (result.outputs["segmentation"], case.label))
        overlap = label_overlap(mask, label, values)
        scored.append((case.name, case.patient, float(np.nanmean([overlap[value].dice for value in values]))))
    return scored


def pairs(packed: PackedImages, part: str, classes: int) -> np.ndarray:
    """Images and masks as the colours of one image: (N, H, W, 3), or volumes (N, I, J, K, 3)."""
    positions = packed.part(part)  # type: ignore[arg-type]
    assert packed.masks is not None
    images, masks = packed.images[positions][..., :1], packed.masks[positions][..., None]
    return np.concatenate([images, (masks * (255 // max(1, classes - 1))).astype(np.uint8), images], axis=-1)


def silent(done: int, total: int) -> None:
    """Show no progress."""


def pair_distances(study: Study, count: int, model: Path, images: Path) -> dict[str, float]:
    """FID of drawn pairs, and of real pairs of the validation patients, against those of the test patients."""
    generator = restore_generator(load_model_files(model))
    real = labelled_images_of_training(generator, study.out / str(count) / "generator-data" / "training", silent)
    synthetic = labelled_images_of_training(generator, images, silent)
    extract, classes = extractor("efficientnet-lite0"), len(real.mask_classes)
    sides = {
        "test": pairs(real, "test", classes),
        "validation": pairs(real, "validation", classes),
        "drawn": np.concatenate([pairs(synthetic, part, classes) for part in ("train", "validation", "test")]),
    }
    features = {}
    for name, side in sides.items():
        found = features_of(side, extract, lambda done, total: None)
        features[name] = getattr(found, "middle", None)
        if features[name] is None:
            features[name] = found.pooled  # type: ignore[union-attr]
    return {
        name: frechet_distance(torch.as_tensor(features[name]), torch.as_tensor(features["test"]))
        for name in ("drawn", "validation")
    }


def write_table(study: Study) -> None:
    """OUT/scores.csv of all runs, and OUT/table.md: the mean over seeds, with an interval over patients."""
    rows: list[Mapping[str, str]] = []
    for file in sorted(study.out.glob("*/*/scores.csv")):
        with file.open(newline="") as stream:
            rows += list(csv.DictReader(stream))
    with (study.out / "scores.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, SCORES)
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| patients | arm | Dice | each seed | minutes |", "|---|---|---|---|---|"]
    for count in dict.fromkeys(row["patients"] for row in rows):
        for arm in ARMS:
            own = [row for row in rows if (row["patients"], row["arm"]) == (count, arm)]
            if not own:
                continue
            by_seed: dict[str, dict[str, float]] = {}
            for row in own:
                by_seed.setdefault(row["seed"], {})[row["case"]] = float(row["dice"])
            patients = {row["case"]: row["patient"] for row in own}
            means = [float(np.mean([scores[case] for scores in by_seed.values()])) for case in patients]
            each = ", ".join(f"{np.mean(list(scores.values())):.3f}" for scores in by_seed.values())
            interval = mean_interval(means, patients=list(patients.values()))
            lines.append(f"| {count} | {arm} | {interval} | {each} | {own[0]['minutes']} |")
    (study.out / "table.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run all arms, small numbers of patients first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--generator", required=True)
    parser.add_argument("--segmenter", required=True)
    parser.add_argument("--patients", type=int, nargs="+", default=[5, 20, 0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--generator-steps", type=int, default=6000)
    parser.add_argument("--segmenter-steps", type=int, default=1500)
    parser.add_argument("--per-mask", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    folder, section = find_cases(options.data), load_segmenter_config(options.segmenter).data
    if not folder.labels:  # a folder of images and masks does not name them
        folder = replace(folder, labels=dict(enumerate(("background", *section.labels))))
    split = split_by_hash(folder.cases, section.test_cases, section.validation_cases)
    owner = {case.name: case.patient for case in folder.cases}
    sides = [tuple(sorted({owner[name] for name in names})) for names in (split.test, split.validation)]
    rest = sorted({owner[name] for name in split.train}, key=_hashed)
    study = Study(options.data, options.out, folder, sides[0], sides[1], tuple(rest), options)
    generators = []
    for count in options.patients:
        model, images = drawn(study, count)
        for seed in options.seeds:
            for arm in ARMS:
                score_segmenter(study, count, arm, seed, images)
                write_table(study)
        generators.append((count, model, images))
    judge = score_segmenter(study, 0, "augmented", options.seeds[0], generators[-1][2])
    with (options.out / "generators.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["patients", "dice_of_drawn", "fid_of_drawn_pairs", "fid_of_validation_pairs"])
        for count, model, images in generators:
            found = dice_of(judge, options.out / str(count) / "obeyed", find_cases(images), study.training)
            distances = pair_distances(study, count, model, images)
            obeyed = float(np.mean([dice for _, _, dice in found]))
            writer.writerow([count, f"{obeyed:.4f}", f"{distances['drawn']:.2f}", f"{distances['validation']:.2f}"])
    print((options.out / "table.md").read_text() + (options.out / "generators.csv").read_text())


def _hashed(patient: str) -> str:
    return hashlib.sha256(patient.encode()).hexdigest()


if __name__ == "__main__":
    main()
