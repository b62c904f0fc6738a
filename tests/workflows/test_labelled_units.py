"""Which cases or slices are labelled, and which stay held out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medseg_diffusion.config.load import load_config
from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.methods.seen import Seen
from medseg_diffusion.workflows.labelled_units import Labelling, _diverse, labelled_units
from tests.helpers.pixel_classifiers import in_memory, quick, with_labels


def test_diverse_selection_spreads_and_the_hash_is_nested(box_scans, box_generators, tmp_path: Path) -> None:
    generator = in_memory(box_generators[2])

    def labelled(*labelling: Any) -> list[str]:
        chosen = labelled_units(quick(), generator, box_scans, Labelling(*labelling), tmp_path / "cache")
        return [unit.name for unit in chosen.units]

    one, three = labelled(1), labelled(3)
    assert three[:1] == one and len(set(three)) == 3
    assert len(set(labelled(3, "case", "diverse"))) == 3


def test_diverse_units_are_one_of_each_cluster() -> None:
    draw = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    points = [centres[i % 3] + 0.1 * torch.randn(2, generator=draw, dtype=torch.float64) for i in range(12)]
    for seed in range(5):
        assert {i % 3 for i in _diverse(points, 3, seed)} == {0, 1, 2}


def test_what_the_generator_has_seen_is_not_scored(box_scans, box_generators, tmp_path: Path) -> None:
    """The preset holds out what the generator did; of an imported one nothing is known."""
    preset = load_config("label-efficient", ["data.labels=[box]"])
    generator = in_memory(box_generators[2])
    assert len(labelled_units(preset, generator, box_scans, Labelling(1), tmp_path / "cache").split.test) == 2
    few = quick(test_cases=1)
    assert len(labelled_units(few, generator, box_scans, Labelling(1), tmp_path / "cache").split.test) == 1
    section = generator.config.data
    unknown = type(section)(size=section.size, channels=section.channels)
    imported = replace(generator, config=generator.config.model_copy(update={"data": unknown}), held_out=None)
    more = quick(test_cases=4, validation_cases=1)
    assert len(labelled_units(more, imported, box_scans, Labelling(1), tmp_path / "cache").split.test) == 4


def test_a_part_of_the_generators_scans_and_others_are_split_as_it_was(
    box_scans, box_generators, tmp_path: Path
) -> None:
    """The smallest hashes of a part are not the smallest of all: ranked anew, scans of training would be tested on."""
    generator = in_memory(box_generators[2])
    every = labelled_units(quick(), generator, box_scans, Labelling(1), tmp_path / "cache").split
    assert len(every.test) == 2
    part = tmp_path / "part"
    shutil.copytree(box_scans, part)
    for kind in ("images", "labels"):
        (part / kind / f"{every.test[0]}.nii.gz").unlink()
        shutil.copy(box_scans / kind / f"{every.train[0]}.nii.gz", part / kind / "another.nii.gz")
    found = labelled_units(quick(), generator, part, Labelling(1), tmp_path / "cache2").split
    assert set(found.test) - {"another"} == set(every.test[1:])
    assert set(found.train) - {"another"} == set(every.train)
    with pytest.raises(
        UsageError, match=r"data.test_cases=3: the generator held out only \d of the 8 patients in .*part"
    ):
        labelled_units(quick(test_cases=3), generator, part, Labelling(1), tmp_path / "cache3")


def test_what_is_measured_of_the_images(box_scans, box_generators, tmp_path: Path) -> None:
    """Whole cases tell volumes. Of single slices nothing is known about the others of their scans."""
    generator = in_memory(box_generators[2])

    def seen(*labelling: Any) -> Seen | None:
        return labelled_units(quick(), generator, box_scans, Labelling(*labelling), tmp_path / "cache").seen

    cases, slices = seen(5), seen(2, "slice")
    assert cases is not None and cases.scans == 5 and set(cases.volume_ml) == {"box"} and cases.volume_ml["box"][0] > 0
    assert slices is not None and slices.scans >= 5 and not slices.volume_ml and slices.voxel_mm == cases.voxel_mm
    assert seen(2) is None, "two scans tell no range"


def test_a_generator_of_volumes_refuses_pictures(box_generators, tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for i in range(5):
            picture = np.random.default_rng(i).integers(0, 255 if kind == "images" else 2, (14, 12), np.uint8)
            Image.fromarray(picture).save(tmp_path / "data" / kind / f"p{i}.png")
    with pytest.raises(InputError, match=r"found a 2D image \(12 x 14\); expected volumes"):
        labelled_units(quick(), in_memory(box_generators[3]), tmp_path / "data", Labelling(1), tmp_path / "cache")


def test_slices_that_show_too_little_are_not_labelled(box_scans, box_generators, tmp_path: Path) -> None:
    """On the grid of 16 x 16 a slice shows its 30 positions; all but slice 2 are cut down to 12."""

    def edit(name: str, label: np.ndarray) -> None:
        x, y, _ = (axis.min() for axis in np.nonzero(label))
        label[..., [1, 3, 4]] = 0
        label[x : x + 4, y : y + 3, [1, 3, 4]] = 1

    data, generator = with_labels(box_scans, tmp_path / "data", edit), in_memory(box_generators[2])
    for select in ("hash", "diverse"):
        found = labelled_units(quick(), generator, data, Labelling(5, "slice", select), tmp_path / "cache")
        assert {one.name.partition(", ")[2] for one in found.units} == {"slice 2"}
    with pytest.raises(InputError, match="found 5 labelled slices that show a class to choose from; expected at least"):
        labelled_units(quick(), generator, data, Labelling(6, "slice"), tmp_path / "cache")


def test_a_volume_beyond_the_generators_is_refused(box_scans, box_generators, tmp_path: Path) -> None:
    generator = in_memory(box_generators[3])
    section = generator.config.data.model_copy(update={"size": (16, 12, 8)})
    config = generator.config.model_copy(update={"data": section})
    narrow = replace(generator, config=config, shape=(1, 16, 12, 8))
    with pytest.raises(
        InputError, match="found 16 x 14 x 6 voxels on the generator's grid; expected at most 16 x 12 x 8"
    ):
        labelled_units(quick(), narrow, box_scans, Labelling(1), tmp_path / "cache")


@pytest.mark.parametrize(("names", "message"), [([], "classes are 0 to 2"), (["box"], "data.labels names 0 to 1")])
def test_labels_with_gaps_are_refused(names, message, box_scans, box_generators, tmp_path: Path) -> None:
    """Numbered anew, label 3 would be none of the classes."""
    cases = [{"image": f"images/s{i}.nii.gz", "label": f"labels/s{i}.nii.gz"} for i in range(8)]
    known = {"labels": {"0": "background", "1": "box", "3": "other"}, "training": cases}
    data = with_labels(box_scans, tmp_path / "data")
    (data / "dataset.json").write_text(json.dumps(known))
    with pytest.raises(UsageError, match=f"dataset.json names labels 0, 1, 3, but {message}; number them without gaps"):
        labelled_units(quick(labels=names), in_memory(box_generators[2]), data, Labelling(1), tmp_path / "cache")
