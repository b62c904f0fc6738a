"""Brain scans synthesised from label maps: training without a single real image.

After Billot et al. 2023 (SynthSeg, Medical Image Analysis 86): a label map is deformed, every structure gets a random
intensity, and a random scanner adds its resolution, bias field and noise. Unlike there, most images are like T1,
because the model is for T1. The others have arbitrary contrast, so that the model also learns shapes.

Images are made by the device that trains: by a GPU in whole batches, otherwise by the workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg_diffusion.volumes.preprocessing import bend

from .brain_classes import TISSUES, BrainClasses
from .draws import UNFINISHED
from .label_maps import LABELS, MIRRORED, ON_THE_RIGHT, TISSUE, LabelMap, class_values
from .random_fields import Draw, blur, resized
from .synthetic_contrast import in_pieces, structure_intensities

Range = tuple[float, float]


@dataclass(frozen=True)
class SynthesisConfig:
    """Ranges of all random parameters. Lengths are in millimetres of the label map, angles in degrees.

    Intensities of T1-like images are relative to cerebral white matter, which is 1.

    Attributes:
        t1_share: share of T1-like images; in the others the mean of every structure is uniform from 0 to 1.
        rotation: rotation about each axis, uniform in +- this value.
        scale: zoom of each axis, uniform in this range.
        shear: shears, uniform in +- this value.
        coarse_warp: (node distance, largest standard deviation) of the coarse deformation.
        fine_warp: (node distance, largest standard deviation) of the fine deformation.
        pieces: probability that the tissue outside the brain is cut into pieces of other intensities.
        texture: largest standard deviation of the smooth log-texture outside the brain.
        bias: largest standard deviation of the log bias field.
        noise: largest standard deviation of the Rician noise.
        spacing: range of the acquisition voxel size; 40 % of the images are anisotropic.
        strip: probability of a brain extraction.
        rims: probability that a brain extraction leaves parts of the rim.
        crop: probability that a part of the field of view is missing.
        atrophy: probability that CSF replaces a part of the cortex.
        ventricles: probability that the lateral ventricles are enlarged.
        lesions: probability of dark white-matter lesions.
        gain: range of the factor on the scaled image of a training window.
        shift: range of the offset that is added to it.
    """

    t1_share: float = 0.9
    rotation: float = 20.0
    scale: Range = (0.85, 1.15)
    shear: float = 0.1
    coarse_warp: Range = (30.0, 4.0)
    fine_warp: Range = (12.0, 1.5)
    pieces: float = 0.6
    texture: float = 0.5
    bias: float = 0.3
    noise: float = 0.06
    spacing: Range = (0.5, 3.0)
    strip: float = 0.35
    rims: float = 0.3
    crop: float = 0.15
    atrophy: float = 0.35
    ventricles: float = 0.3
    lesions: float = 0.35
    gain: Range = (0.7, 1.2)
    shift: Range = (-0.3, 0.2)


_OUTSIDE = TISSUE == 0
_CORTEX = torch.tensor([label in (3, 42) for label in LABELS])
_DEEP_GREY = (TISSUE == 2) & ~_CORTEX
_WHITE = torch.tensor([label in (2, 41) for label in LABELS])
_VENTRICLE = torch.tensor([label in (4, 43) for label in LABELS])


class SyntheticBrains:
    """Training windows of synthetic scans.

    Args:
        maps: the anatomies.
        window: size of an example in voxels.
        spacing_mm: voxel size of an example.
        per_map: examples of each anatomy in an epoch.
        config: ranges of the synthesis.
        classes: what the labels of an example tell apart.
        margin_mm: the middles of examples lie in the box of the brain with this margin, and intensities are scaled by
            the box, as behind a finder; with None they lie anywhere in the head.
        in_batches: leaves the synthesis to `finish`, which is called with batches on the training's device.
    """

    # many: the anatomies, the grid, and what is made of them
    def __init__(
        self,
        maps: Sequence[LabelMap],
        window: Sequence[int],
        spacing_mm: float = 1.0,
        per_map: int = 1,
        config: SynthesisConfig = SynthesisConfig(),
        classes: BrainClasses = TISSUES,
        margin_mm: float | None = None,
        in_batches: bool = False,
    ) -> None:
        self.maps = list(maps)
        self.window = tuple(window)
        self.spacing_mm = spacing_mm
        self.per_map = per_map
        self.config = config
        self.margin_mm = margin_mm
        self.values = class_values(classes)
        self.in_batches = in_batches
        self._moved: dict[tuple[int, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self.maps) * self.per_map

    def example(self, index: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """The "image" (1, *window) float32, scaled as at inference, and the "label" (*window) int64, class values.

        With ``in_batches`` instead what `finish` makes them from: the number of the anatomy and a seed.
        """
        number, seed = index % len(self.maps), int(torch.randint(2**31, (), generator=generator))
        if self.in_batches:
            return {UNFINISHED: torch.tensor([number, seed])}
        image, label = self._synthesised(number, seed, torch.device("cpu"))
        return {"image": image, "label": label}

    def finish(self, batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The images and labels of a batch, each the same in any batch."""
        finished = {name: value for name, value in batch.items() if name != UNFINISHED}
        if UNFINISHED not in batch:
            return finished
        made = [self._synthesised(number, seed, device) for number, seed in batch[UNFINISHED].tolist()]
        images, labels = zip(*made, strict=True)
        return {**finished, "image": torch.stack(images), "label": torch.stack(labels)}

    def _synthesised(self, number: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        anatomy = self.maps[number]
        draw = Draw(torch.Generator().manual_seed(seed), device)
        seen = None
        if self.margin_mm is not None:
            seen = _box(anatomy, [self.margin_mm + draw.uniform(-8, 8).item() for _ in range(6)])
            centre = torch.tensor([float(draw.uniform(side.start, side.stop)) for side in seen]).double()
        elif draw.chance(0.6):
            centre = anatomy.brain[draw.integer(len(anatomy.brain))].double() + draw.uniform(-20, 20, 3)
        else:  # anywhere in the head, and in the neck below it
            centre = torch.tensor(anatomy.index.shape) * draw.uniform(0, 1, 3)
            centre[2] -= 60 * draw.uniform(0, 1)
        if (number, device) not in self._moved:
            self._moved[number, device] = anatomy.index.to(device)
        index = self._moved[number, device]
        image, labels, low, high = _render(
            index, draw, self.config, centre, self.window, self.spacing_mm, upsample=True, seen=seen
        )
        scaled = 2 * (image - low) / (high - low) - 1
        # The percentiles of real scans differ, for example with fat near a coil or a tilted field of view.
        scaled = bend(draw.uniform(*self.config.gain) * scaled + draw.uniform(*self.config.shift))
        return scaled[None], self.values.to(device)[labels].long()


def synthetic_scan(
    anatomy: LabelMap,
    generator: torch.Generator,
    config: SynthesisConfig = SynthesisConfig(),
    classes: BrainClasses = TISSUES,
    spacing_mm: float = 1.0,
    part: tuple[Sequence[int], Tensor] | None = None,
) -> tuple[Tensor, Tensor, npt.NDArray[np.float64]]:
    """A scan at a random resolution: image (I, J, K) float32, class (I, J, K) uint8, affine (4, 4).

    Args:
        anatomy: the label map.
        generator: source of everything that is drawn.
        config: ranges of the synthesis.
        classes: what the labels tell apart.
        spacing_mm: voxel size at which the scan is made; its own resolution is this or coarser.
        part: size in voxels and centre, (3,) position in the label map, of the part that is made; None for all of it.
    """
    draw = Draw(generator)
    whole_size = [int(1.1 * n / spacing_mm) // 8 * 8 + 8 for n in anatomy.index.shape]
    size, centre = part or (whole_size, (torch.tensor(anatomy.index.shape) - 1) / 2.0)
    image, labels, _, _ = _render(anatomy.index, draw, config, centre.double(), size, spacing_mm, upsample=False)
    values = class_values(classes)[labels]
    if image.shape != values.shape:
        shape, whole = (image.shape[0], image.shape[1], image.shape[2]), values
        best, values = torch.full(shape, -1.0), torch.zeros(shape, dtype=torch.uint8)
        for value in range(len(classes.names)):  # one after the other: all at once would take gigabytes
            share = F.adaptive_avg_pool3d((whole == value).float()[None], shape)[0]
            values[share > best] = value
            best = torch.maximum(best, share)
    affine = np.diag([*(spacing_mm * n / m for n, m in zip(size, image.shape, strict=True)), 1.0])
    return 1000 * image, values, affine


def _render(
    index: Tensor,
    draw: Draw,
    config: SynthesisConfig,
    centre: Tensor,
    window: Sequence[int],
    spacing: float,
    upsample: bool,
    seen: Sequence[slice] | None = None,
) -> tuple[Tensor, Tensor, float, float]:
    """One synthetic image of a window.

    Args:
        index: the label map, on the device that makes the image.
        draw: source of all random numbers. Their order is fixed: it decides the image.
        config: ranges of the synthesis.
        centre: position of the window's centre in the label map, in voxels.
        window: size in voxels.
        spacing: voxel size of the window in millimetres.
        upsample: resample the image from the acquisition's voxel size to the window's grid.
        seen: the part of the label map from which intensities are scaled at inference; None for the whole head.

    Returns:
        Image, label indices (*window), and the percentiles 0.5 and 99.5 of the intensities of ``seen``.
    """
    labels = _diseased(_deformed(index, draw, config, centre, window, spacing), draw, config, spacing)
    means, deviations = structure_intensities(draw, config.t1_share)
    stripped = draw.chance(config.strip)
    visible = _stripped(labels, draw, config, spacing) if stripped else torch.ones_like(labels, dtype=torch.bool)
    if draw.chance(config.crop):
        axis = draw.integer(3)
        edge = draw.integer(max(1, window[axis] // 3)) + 1
        first = 0 if draw.chance(0.5) else visible.shape[axis] - edge
        visible.narrow(axis, first, edge).fill_(False)
    contrast = means.to(draw.device), deviations.to(draw.device)
    image = torch.where(visible, _signal(labels, *contrast, draw, config, spacing), 0.0)
    # Brain extraction is applied to the finished image, so that its edge is sharp.
    image = _acquired(image, visible if stripped else None, draw, config, spacing)

    level = draw.uniform(0, config.noise).item()
    noisy = ((image + level * draw.normal(image.shape)) ** 2 + (level * draw.normal(image.shape)) ** 2).sqrt()
    air_is_zero = stripped or draw.chance(0.3)
    image = torch.where(image > 0.01, noisy, 0.0) if air_is_zero else noisy
    gamma = float(np.exp(0.25 * draw.gauss()))
    image = image**gamma
    if upsample and list(image.shape) != list(window):
        image = resized(image, window)

    # At inference the percentiles are those of the scan, or of a finder's box. Here every 7th voxel estimates them.
    thin = (index if seen is None else index[tuple(seen)])[::7, ::7, ::7].long()
    whole = (contrast[0][thin] + contrast[1][thin] * draw.normal(thin.shape)).clamp(min=0) ** gamma
    whole = whole[_of(TISSUE, thin) > 0] if stripped else whole[thin > 0] if air_is_zero else whole.flatten()
    ends = torch.quantile(whole, torch.tensor([0.005, 0.995], device=draw.device)).tolist()
    return image, torch.where(visible, labels, 0), ends[0], max(ends[1], ends[0] + 1e-3)


def _box(anatomy: LabelMap, margins: Sequence[float]) -> list[slice]:
    """The box of the brain with margins in millimetres, a pair for each axis, within the label map."""
    first, last = anatomy.brain.amin(0).tolist(), anatomy.brain.amax(0).tolist()
    return [
        slice(max(0, round(low - before)), min(size, round(high + 1 + after)))
        for low, high, size, before, after in zip(
            first, last, anatomy.index.shape, margins[::2], margins[1::2], strict=True
        )
    ]


def _diseased(labels: Tensor, draw: Draw, config: SynthesisConfig, spacing: float) -> Tensor:
    """Labels (I, J, K), perhaps with an atrophied cortex or enlarged ventricles."""
    tissue = _of(TISSUE, labels)
    if draw.chance(config.atrophy):
        fluid = blur((tissue == 1).float(), draw.uniform(0.8, 1.6).item() / spacing)
        eroded = _of(_CORTEX, labels) & (fluid > draw.uniform(0.2, 0.5).item())
        labels = torch.where(eroded, LABELS.index(24), labels)
    if draw.chance(config.ventricles):
        near = blur(_of(_VENTRICLE, labels).float(), draw.uniform(2.0, 5.0).item() / spacing)
        grown = _of(_WHITE | _DEEP_GREY, labels) & (near > draw.uniform(0.15, 0.4).item())
        fluid_of_side = torch.where(_of(ON_THE_RIGHT, labels), LABELS.index(43), LABELS.index(4))
        labels = torch.where(grown, fluid_of_side, labels)
    return labels


def _of(table: Tensor, labels: Tensor) -> Tensor:
    """The entry of a table, (len(LABELS),), for every label."""
    return table.to(labels.device)[labels]


def _stripped(labels: Tensor, draw: Draw, config: SynthesisConfig, spacing: float) -> Tensor:
    """The voxels (I, J, K) that an imperfect brain extraction leaves, bool."""
    tissue, brain = _of(TISSUE, labels), ~_of(_OUTSIDE, labels)
    if draw.chance(config.rims):
        near = blur(brain.float(), draw.uniform(1.5, 4.0).item() / spacing)
        brain |= (near > 0.05) & (draw.field(labels.shape, spacing, 12.0) > draw.uniform(0.3, 1.5).item())
    if draw.chance(0.7):  # most brain extractions follow the brain closely and lose the outer CSF
        near = blur((tissue >= 2).float(), draw.uniform(2.0, 5.0).item() / spacing)
        brain &= (labels != LABELS.index(24)) | (near > draw.uniform(0.05, 0.4).item())
    return brain


def _signal(
    labels: Tensor, means: Tensor, deviations: Tensor, draw: Draw, config: SynthesisConfig, spacing: float
) -> Tensor:
    """Intensities (I, J, K) before the scanner: structures, texture, white-matter lesions and the bias field."""
    window = labels.shape
    image = means[labels] + deviations[labels] * draw.normal(window)
    texture = (draw.uniform(0, config.texture) * draw.field(window, spacing, draw.uniform(3, 12).item())).exp()
    if draw.chance(config.pieces):
        image = in_pieces(image, labels, means, draw, spacing)
    image = torch.where(_of(_OUTSIDE, labels), image * texture, image)
    if draw.chance(config.lesions):
        field = draw.field(window, spacing, draw.uniform(5, 15).item())
        dark = 1 - draw.uniform(0.1, 0.45) * ((field - draw.uniform(0.5, 1.5)) * 4).clamp(0, 1)
        image = torch.where(_of(_WHITE, labels), image * dark, image)
    return (image * (draw.uniform(0, config.bias) * draw.field(window, spacing, 60.0)).exp()).clamp(min=0)


def _acquired(image: Tensor, visible: Tensor | None, draw: Draw, config: SynthesisConfig, spacing: float) -> Tensor:
    """The image at a random acquisition resolution: smoothed by the point spread, masked, and resampled."""
    low, high = config.spacing
    isotropic = float(torch.exp(draw.uniform(np.log(low), np.log(high))))
    voxel = [isotropic] * 3
    if draw.chance(0.4):
        voxel = [draw.uniform(max(low, 0.7), max(low, min(high, 1.2))).item()] * 3
        voxel[draw.integer(3)] = draw.uniform(min(high, 1.0), high).item()
    window = list(image.shape)
    image = blur(image, [draw.uniform(0.4, 0.6).item() * max(size / spacing, 1.0) for size in voxel])
    if visible is not None:
        image = torch.where(visible, image, 0.0)
    size = [max(2, round(n * min(1.0, spacing / side))) for n, side in zip(window, voxel, strict=True)]
    if size == window:
        return image
    return resized(image, size)


def _deformed(
    index: Tensor, draw: Draw, config: SynthesisConfig, centre: Tensor, window: Sequence[int], spacing: float
) -> Tensor:
    """Label indices (*window) int64 of the randomly deformed anatomy, by nearest neighbour.

    Beyond the map is air, except below it: most real scans show more of the neck, so the lowest slice is continued
    there, without its brain.
    """
    angles = torch.deg2rad(draw.uniform(-config.rotation, config.rotation, 3)).tolist()
    matrix = torch.eye(3, dtype=torch.float64)
    for axis, angle in enumerate(angles):
        turn, (a, b) = torch.eye(3, dtype=torch.float64), [i for i in range(3) if i != axis]
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    shear = torch.eye(3, dtype=torch.float64)
    shear[0, 1], shear[0, 2], shear[1, 2] = draw.uniform(-config.shear, config.shear, 3).tolist()
    mirrored = draw.chance(0.5)
    sides = torch.tensor([-1.0 if mirrored else 1.0, 1.0, 1.0], dtype=torch.float64)
    matrix = spacing * matrix @ shear @ torch.diag(draw.uniform(*config.scale, 3).double() * sides)
    lines = [torch.arange(n, device=draw.device) - (n - 1) / 2 for n in window]
    warps = [(nodes, draw.uniform(0, strongest)) for nodes, strongest in (config.coarse_warp, config.fine_warp)]
    flat = torch.zeros(tuple(window), dtype=torch.int64, device=draw.device)
    inside = torch.ones(tuple(window), dtype=torch.bool, device=draw.device)
    below = torch.zeros_like(inside)
    for axis, size in enumerate(index.shape):
        i, j, k = (float(matrix[axis, b]) * line for b, line in enumerate(lines))
        position = (i + float(centre[axis])).reshape(-1, 1, 1) + j.reshape(-1, 1) + k
        for nodes, strength in warps:
            position = position + strength * draw.field(window, spacing, nodes)
        voxel = position.round().long()
        inside &= voxel < size
        if axis == 2:
            below = voxel < 0
        else:
            inside &= voxel >= 0
        flat = flat * size + voxel.clamp(0, size - 1)
    labels = index.reshape(-1)[flat.reshape(-1)].reshape(flat.shape).long()
    labels = torch.where(below & ~_of(_OUTSIDE, labels), LABELS.index(516), labels)
    labels = torch.where(inside, labels, 0)
    return _of(MIRRORED, labels) if mirrored else labels
