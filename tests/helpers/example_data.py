"""The files that the commands in the documentation name, small enough for a command to take seconds."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from PIL import Image

from medseg_diffusion.volumes.dicom_seg import Algorithm, Segment, SegmentationFile
from medseg_diffusion.volumes.io import read_volume

from . import anomaly, dicom_series, generators, pixel_classifiers, segmenters, tiny_imagenet

HIPPOCAMPUS = {1: "anterior hippocampus", 2: "posterior hippocampus"}


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)


def crop(seed: int, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """A bright structure of one or two parts in noise, and its mask."""
    rng = np.random.default_rng(seed)
    label = np.zeros((14, 18, 12), np.uint8)
    label[3 : 8 + seed % 3, 4:9, 3:8] = 1
    label[3 : 8 + seed % 3, 9:14, 3:8] = classes
    return (40 * label + rng.normal(50, 5, label.shape)).astype(np.float32), label


def head() -> np.ndarray:
    """A ball that is brighter inside, as T1 shows a brain."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in (32, 36, 28)], indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    rng = np.random.default_rng(0)
    image = 40.0 * (radius < 0.9) + 40 * (radius < 0.75) + 40 * (radius < 0.5) + rng.normal(0, 2, radius.shape)
    return image.astype(np.float32)


def write_labelled(root: Path) -> None:
    """Decathlon's and nnU-Net's folders of a hippocampus, a folder of one's own, and a folder of other patients."""
    names = [f"hippocampus_{i:03d}" for i in range(8)]
    decathlon, nnunet = root / "Task04_Hippocampus", root / "Dataset004_Hippocampus"
    for i, name in enumerate(names):
        image, label = crop(i)
        write(decathlon / "imagesTr" / f"{name}.nii.gz", image)
        write(decathlon / "labelsTr" / f"{name}.nii.gz", label)
        write(nnunet / "imagesTr" / f"{name}_0000.nii.gz", image)
        write(nnunet / "labelsTr" / f"{name}.nii.gz", label)
        for folder, first in (("my-data", "case"), ("other-scans", "other")):
            write(root / folder / "images" / f"{first}-{i}.nii.gz", image)
            write(root / folder / "labels" / f"{first}-{i}.nii.gz", label)
    for i in (1, 2):
        image, label = crop(20 + i)
        write(nnunet / "imagesTs" / f"test_{i}_0000.nii.gz", image)
        write(nnunet / "labelsTs" / f"test_{i}.nii.gz", label)
        write(root / "nnunet-predictions" / f"test_{i}.nii.gz", label)
    pairs = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names]
    labels = {"0": "background"} | {str(value): name for value, name in HIPPOCAMPUS.items()}
    (decathlon / "dataset.json").write_text(
        json.dumps({"modality": {"0": "MRI"}, "labels": labels, "numTraining": len(names), "training": pairs})
    )
    (nnunet / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "MRI"},
                "labels": {name: int(value) for value, name in labels.items()},
                "numTraining": len(names),
                "file_ending": ".nii.gz",
            }
        )
    )


def write_test_set(root: Path) -> None:
    """Two cases of my-data/ in a folder of their own."""
    for kind in ("images", "labels"):
        files = sorted((root / "my-data" / kind).iterdir())[:2]
        (root / "official-test" / kind).mkdir(parents=True)
        for path in files:
            shutil.copy(path, root / "official-test" / kind)


def write_readers(root: Path) -> None:
    """Slices of six patients with the masks of two readers, and one nodule alone."""
    rows = ["case,patient"]
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 60, (128, 128), dtype=np.uint8)
        pixels[56:72, 56 : 68 + i] += 120
        for folder, image in (("images", pixels), ("raters/1", (pixels > 100)), ("raters/2", 0 * pixels)):
            path = root / "nodules" / folder / f"n{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.astype(np.uint8)).save(path)
        rows.append(f"n{i},p{i}")
    (root / "nodules" / "patients.csv").write_text("\n".join(rows) + "\n")
    shutil.copy(root / "nodules" / "images" / "n0.png", root / "nodule.png")


def write_dicom(root: Path) -> None:
    """A DICOM series, as a folder and zipped, and a reference of it as a DICOM segmentation."""
    series = dicom_series.series(root / "series")
    with zipfile.ZipFile(root / "series.zip", "w") as archive:
        for path in sorted(series.iterdir()):
            archive.write(path, f"series/{path.name}")
    scan = read_volume(series)
    labels = torch.zeros(scan.shape, dtype=torch.uint8)
    labels[1:4, 2:5, 2:4] = 1
    SegmentationFile(scan, [Segment("bright")], Algorithm("reader", "0", {})).write(labels, root / "reference.dcm")


def write_scans(root: Path) -> None:
    """Scans and masks for the commands that segment, score and compare."""
    write(root / "brain.nii.gz", head())
    write(root / "crop.nii.gz", crop(9)[0])
    for name in "ab":
        write(root / f"{name}.nii.gz", crop(3)[0])
    boxes = root / "boxes"
    boxes.mkdir()
    pixel_classifiers.write_scans(boxes)
    shutil.copytree(boxes / "images", root / "scans")
    pairs = [{"image": f"images/s{i}.nii.gz", "label": f"labels/s{i}.nii.gz"} for i in range(8)]
    labels = {"0": "background", "1": "box"}
    (boxes / "dataset.json").write_text(json.dumps({"modality": {"0": "MRI"}, "labels": labels, "training": pairs}))
    boxes.rename(root / "labelled")
    shutil.copy(root / "scans" / "s0.nii.gz", root / "scan.nii.gz")
    (root / "references").mkdir()
    for i in range(4):
        shutil.copy(root / "labelled" / "labels" / f"s{i}.nii.gz", root / "references")
    for folder in ("results", "model-a", "model-b"):
        for path in sorted((root / "references").glob("*.nii.gz")):
            copy = root / folder / path.name.replace(".nii.gz", "_seg.nii.gz")
            copy.parent.mkdir(exist_ok=True)
            label = np.asarray(nib.load(path).dataobj).astype(np.uint8)
            write(copy, np.roll(label, 1, axis=0) if folder == "model-b" else label)
    names = [path.name.removesuffix(".nii.gz") for path in sorted((root / "references").glob("*.nii.gz"))]
    rows = [f"{name},p{i // 2}" for i, name in enumerate(names)]
    (root / "patients.csv").write_text("\n".join(["case,patient", *rows, ""]))


def write_heads(root: Path) -> None:
    """FLAIR-like heads without lesions, of two scanners, with lesions and their masks, and one with a lesion alone."""
    for i in range(8):
        anomaly.write(root / "healthy" / f"h{i}.nii.gz", anomaly.head(i)[0])
        anomaly.write(root / "other-scanner" / f"o{i}.nii.gz", anomaly.head(30 + i)[0])
    anomaly.write_scans(root / "lgg_flair")
    anomaly.write(root / "flair.nii.gz", anomaly.head(20, slice(2, 4), shape=(20, 24, 8))[0])


def prepare(root: Path) -> None:
    """Write everything that the pages start from."""
    write_labelled(root)
    write_test_set(root)
    write_readers(root)
    write_scans(root)
    write_heads(root)
    write_dicom(root)
    images = tiny_imagenet.tiny_imagenet(root, per_class=8)
    for i in range(5, 16):  # scores need ten real images
        (images / "test" / "images" / f"test_{i}.JPEG").write_bytes(tiny_imagenet.jpeg(150 + i))
    with zipfile.ZipFile(root / "tiny-imagenet-200.zip", "w") as archive:
        for path in sorted(images.rglob("*")):
            archive.write(path, path.relative_to(root))
    shutil.rmtree(images)
    generators.save_scoring_network(root / "features.onnx")
    segmenters.make_model(root / "runs" / "tiny", segmenters.tiny_config())
    two_channels = {"labels": ["bright"], "window": [8, 8, 8], "channels": 2}
    segmenters.make_model(root / "runs" / "lesions", segmenters.tiny_config(data=two_channels))
