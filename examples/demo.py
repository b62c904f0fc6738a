"""Segment a whole head-sized volume without any download: the ICBM152 T1 template that nilearn carries in its package.

Writes ./demo-output: the scan, a reference, the segmentation with its uncertainty, a preview, and two pages in which
the scan can be scrolled through. It prints the paths of these pages at the end.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

OUTPUT = Path("demo-output")
LABELS = {1: "CSF", 2: "grey matter", 3: "white matter"}


def write_scan_and_reference(folder: Path) -> tuple[Path, Path]:
    """Write the template and its tissue labels (197 x 233 x 189 voxels of 1 mm) as NIfTI files."""
    template = load_mni152_template(resolution=1)
    image = np.asarray(template.dataobj, dtype=np.float32)
    grey = np.asarray(load_mni152_gm_template(resolution=1).dataobj)
    white = np.asarray(load_mni152_wm_template(resolution=1).dataobj)

    # nilearn's template is already skull-stripped: every voxel outside the brain is exactly 0, so the brain mask is
    # "intensity above 0" (1.89 litres, inner and outer CSF included). The tissue maps are probabilities and reach a
    # little beyond that mask; what is neither grey nor white matter inside it is taken as CSF.
    brain = image > 0
    tissues = np.stack([1 - grey - white, grey, white])
    labels = np.where(brain, tissues.argmax(axis=0) + 1, 0).astype(np.uint8)

    folder.mkdir(parents=True, exist_ok=True)
    scan, reference = folder / "scan.nii.gz", folder / "reference.nii.gz"
    for path, data in ((scan, image), (reference, labels)):
        file = nib.Nifti1Image(data, template.affine)
        file.header.set_xyzt_units("mm")
        nib.save(file, path)
    return scan, reference


def medseg(*arguments: str | Path) -> None:
    """Run the installed command line; stop with its exit code if it fails."""
    script = Path(sysconfig.get_path("scripts")) / "medseg"
    print("$ medseg", *arguments, flush=True)
    code = subprocess.run([script, *arguments], check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    """Make the files, segment, evaluate, print the numbers."""
    scan, reference = write_scan_and_reference(OUTPUT)
    mask, report = OUTPUT / "scan_seg.nii.gz", OUTPUT / "report.html"
    start = time.perf_counter()
    extras = ["--ensemble", "3", "--save-uncertainty", "--preview", "--report", str(report)]
    medseg("segment", scan, "-o", mask, *extras)
    print(f"segmented in {time.perf_counter() - start:.0f} s\n")

    names = [option for label, name in LABELS.items() for option in ("--label", f"{label}={name}")]
    medseg("evaluate", mask, reference, "-o", OUTPUT / "evaluation", "--images", scan, *names)
    print("\nfiles:")
    for path in sorted(path for path in OUTPUT.rglob("*") if path.is_file()):
        print(f"  {path}")
    pages = [report, OUTPUT / "evaluation" / "report.html"]
    print("\nopen in a browser, offline:")
    for page in pages:
        print(f"  {page.resolve()}")


if __name__ == "__main__":
    main()
