"""Every label of a brain belongs to a tissue."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg_diffusion.data.tissue import TISSUE_OF, TISSUES, to_tissue


def test_every_tissue_has_labels_and_unknown_ones_are_refused() -> None:
    assert set(TISSUE_OF.values()) == set(range(len(TISSUES)))
    assert to_tissue(np.array([0, 24, 42, 41, 515])).tolist() == [0, 1, 2, 3, 0]
    with pytest.raises(ValueError, match="999"):
        to_tissue(np.array([2, 999]))


@pytest.mark.data
def test_every_label_of_the_real_maps_has_a_tissue(data_folder: Path) -> None:
    files = sorted((data_folder / "brain_labelmaps").glob("*.nii.gz"))
    assert len(files) == 20
    for file in files:
        to_tissue(np.asarray(nib.load(file).dataobj).astype(np.int64))
