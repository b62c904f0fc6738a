"""Brain scans synthesised from label maps: training without a single real image.

After Billot et al. 2023 (SynthSeg, Medical Image Analysis 86): a label map is deformed, every structure gets a random
intensity, and the result passes through a random scanner (resolution, bias field, noise). Here most images are like T1,
because the model is for T1; the rest has arbitrary contrast, so that the model looks at shapes, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.io import read_labels
from medseg_diffusion.volumes.paths import scan_name
from medseg_diffusion.volumes.preprocessing import bend

from .tissue import TISSUE_OF

Range = tuple[float, float]


@dataclass(frozen=True)
class SynthesisConfig:
    """Ranges of everything that is random; lengths in millimetres of the label map, angles in degrees.

    Intensities of T1-like images are relative to cerebral white matter, which is 1.

    Attributes:
        t1_share: share of T1-like images; the rest draws every structure's mean from 0 to 1.
        rotation: rotations about each axis, uniform in +- this.
        scale: zoom of each axis, uniform in this range.
        shear: shears, uniform in +- this.
        coarse_warp: (node distance, largest standard deviation) of the smooth deformation.
        fine_warp: the same of the fine one.
        pieces: probability that the tissue outside the brain is cut into pieces of other intensities.
        texture: largest standard deviation of the smooth log-texture outside the brain.
        bias: largest standard deviation of the log bias field.
        noise: largest standard deviation of Rician noise.
        spacing: acquisition voxel size; half of the images are isotropic.
        strip: probability that skull and scalp are removed.
        rims: probability that such a removal leaves rests behind.
        crop: probability that a part of the field of view is missing.
        atrophy: probability that cortex gives way to CSF.
        ventricles: probability that the lateral ventricles are enlarged.
        lesions: probability of dark white-matter lesions.
        gain: factor on the scaled image of a training window.
        shift: what is added to it.
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


@dataclass(frozen=True, eq=False)
class LabelMap:
    """An anatomy, RAS, 1 mm, cut to its box: ``index`` (I, J, K) uint8 into `LABELS`; some ``brain`` voxels (N, 3)."""

    name: str
    index: Tensor
    brain: Tensor


LABELS: tuple[int, ...] = tuple(sorted(TISSUE_OF))
_TISSUE = torch.tensor([TISSUE_OF[label] for label in LABELS], dtype=torch.uint8)
_OUTSIDE = torch.tensor([TISSUE_OF[label] == 0 for label in LABELS])
_SOFT = torch.tensor([label in (507, 509, 511, 514, 516) for label in LABELS])
_CORTEX = torch.tensor([label in (3, 42) for label in LABELS])
_WHITE = torch.tensor([label in (2, 41) for label in LABELS])
_VENTRICLE = torch.tensor([label in (4, 43) for label in LABELS])

_PAIRS = (
    *((2, 41), (3, 42), (8, 47), (7, 46), (4, 43), (10, 49), (11, 50), (12, 51), (13, 52), (17, 53), (18, 54)),
    *((26, 58), (28, 60), (25, 57), (31, 63), (30, 62), (136, 163), (137, 164)),
)

# T1-like means relative to cerebral white matter: (low, high), or (low, high) of the way from grey to white.
_GREY, _CSF = (0.55, 0.85), (0.03, 0.45)
_BETWEEN: dict[tuple[int, ...], Range] = {
    (3, 42): (0.0, 0.0),
    (8, 47): (-0.1, 0.15),
    (17, 53, 18, 54): (-0.05, 0.15),
    (11, 50, 12, 51, 26, 58): (-0.05, 0.3),
    (10, 49): (0.2, 0.7),
    (13, 52): (0.4, 1.0),
    (28, 60): (0.5, 1.0),
    (16,): (0.7, 1.1),
    (7, 46): (0.8, 1.1),
    (25, 57, 77): (-0.3, 0.8),
}
_OTHER: dict[tuple[int, ...], Range] = {
    (136, 137, 163, 164, 31, 63): (0.2, 0.8),
    (30, 62): (0.1, 0.9),
    (507,): (0.25, 1.1),
    (511,): (0.3, 1.8),
    (515,): (0.02, 0.5),
    (516,): (0.2, 1.6),
    (85, 512, 530): (0.6, 1.1),
}


def tissues(anatomy: LabelMap) -> Tensor:
    """The tissue (I, J, K) uint8 of every voxel (`medseg_diffusion.data.tissue.TISSUES`)."""
    return _TISSUE[anatomy.index.long()]


def load_label_map(file: Path) -> LabelMap:
    """Reads a label map of 1 mm.

    Raises:
        InputError: an unusable file, another voxel size, or a label without a tissue.
    """
    volume = read_labels(file).oriented("RAS")
    if not np.allclose(volume.spacing, 1.0, atol=0.01):
        size = " x ".join(f"{side:.3g}" for side in volume.spacing)
        raise InputError(file, f"voxels of {size} mm", "a label map of 1 mm", "resample it with nearest neighbours")
    labels = volume.data[0]
    unknown = sorted(set(torch.unique(labels).tolist()) - set(LABELS))
    if unknown:
        raise InputError(
            file,
            f"labels {unknown}",
            "FreeSurfer labels with a known tissue",
            "map them in medseg_diffusion/data/tissue.py",
        )
    table = torch.zeros(max(LABELS) + 1, dtype=torch.uint8)
    table[list(LABELS)] = torch.arange(len(LABELS), dtype=torch.uint8)
    places = torch.nonzero(labels)
    first, last = places.amin(0).tolist(), places.amax(0).tolist()
    labels = labels[tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))]
    index = table[labels.long()]
    return LabelMap(scan_name(file), index, torch.nonzero(_TISSUE[index.long()])[::50].int())


class SyntheticBrains:
    """Training windows of synthetic scans, ``per_map`` a label map and epoch.

    Args:
        maps: the anatomies.
        window: size of an example in voxels.
        spacing_mm: voxel size of an example.
        per_map: examples of each anatomy in an epoch.
        config: ranges of the synthesis.
    """

    def __init__(
        self,
        maps: Sequence[LabelMap],
        window: Sequence[int],
        spacing_mm: float = 1.0,
        per_map: int = 1,
        config: SynthesisConfig = SynthesisConfig(),
    ) -> None:
        self.maps = list(maps)
        self.window = tuple(window)
        self.spacing_mm = spacing_mm
        self.per_map = per_map
        self.config = config

    def __len__(self) -> int:
        return len(self.maps) * self.per_map

    def example(self, index: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """The example's "image" (1, *window) float32, scaled as at inference, and "label" (*window) int64 tissues."""
        anatomy = self.maps[index % len(self.maps)]
        draw = _Draw(generator)
        if draw.chance(0.6):
            centre = anatomy.brain[draw.integer(len(anatomy.brain))].double() + draw.uniform(-20, 20, 3)
        else:  # anywhere in the head, and in the neck below it
            centre = torch.tensor(anatomy.index.shape) * draw.uniform(0, 1, 3)
            centre[2] -= 60 * draw.uniform(0, 1)
        image, tissue, low, high = _render(
            anatomy, draw, self.config, centre, self.window, self.spacing_mm, upsample=True
        )
        scaled = 2 * (image - low) / (high - low) - 1
        # A window does not know its scan's percentiles; neither do fat near a coil or a tilted field of view.
        scaled = bend(draw.uniform(*self.config.gain) * scaled + draw.uniform(*self.config.shift))
        return {"image": scaled[None], "label": tissue.long()}


def synthetic_scan(
    anatomy: LabelMap, generator: torch.Generator, config: SynthesisConfig = SynthesisConfig()
) -> tuple[Tensor, Tensor, npt.NDArray[np.float64]]:
    """A whole head at a random resolution: image (I, J, K) float32, tissue (I, J, K) uint8, affine (4, 4)."""
    draw = _Draw(generator)
    size = tuple(int(1.1 * n) // 8 * 8 + 8 for n in anatomy.index.shape)
    centre = (torch.tensor(anatomy.index.shape) - 1) / 2.0
    image, tissue, _, _ = _render(anatomy, draw, config, centre.double(), size, 1.0, upsample=False)
    shares = F.one_hot(tissue.long(), 4).movedim(-1, 0).float()
    if image.shape != tissue.shape:
        shares = F.adaptive_avg_pool3d(shares, (image.shape[0], image.shape[1], image.shape[2]))
    affine = np.diag([*(n / m for n, m in zip(size, image.shape, strict=True)), 1.0])
    return 1000 * image, shares.argmax(0).to(torch.uint8), affine


def _render(
    anatomy: LabelMap,
    draw: _Draw,
    config: SynthesisConfig,
    centre: Tensor,
    window: Sequence[int],
    spacing: float,
    upsample: bool,
) -> tuple[Tensor, Tensor, float, float]:
    """Image, tissue (*window), and the percentiles 0.5 and 99.5 of the whole head's intensities.

    ``upsample`` brings the image from the acquisition's resolution back to the window's grid.
    """
    labels = _deformed(anatomy, draw, config, centre, window, spacing)
    tissue = _TISSUE[labels]
    if draw.chance(config.atrophy):
        fluid = _blur((tissue == 1).float(), draw.uniform(0.8, 1.6).item() / spacing)
        eroded = _CORTEX[labels] & (fluid > draw.uniform(0.2, 0.5).item())
        labels = torch.where(eroded, LABELS.index(24), labels)
        tissue = torch.where(eroded, 1, tissue)
    if draw.chance(config.ventricles):
        near = _blur(_VENTRICLE[labels].float(), draw.uniform(2.0, 5.0).item() / spacing)
        grown = (_WHITE[labels] | (tissue == 2) & ~_CORTEX[labels]) & (near > draw.uniform(0.15, 0.4).item())
        labels = torch.where(grown, LABELS.index(4), labels)
        tissue = torch.where(grown, 1, tissue)
    means, deviations = _intensities(draw, config)
    stripped = draw.chance(config.strip)
    if stripped:
        kept = ~_OUTSIDE[labels]
        if draw.chance(config.rims):
            near = _blur(kept.float(), draw.uniform(1.5, 4.0).item() / spacing)
            kept |= (near > 0.05) & (draw.field(window, spacing, 12.0) > draw.uniform(0.3, 1.5).item())
        if draw.chance(0.7):  # most brain extractions follow the brain closely and lose the outer CSF
            near = _blur((tissue >= 2).float(), draw.uniform(2.0, 5.0).item() / spacing)
            kept &= (labels != LABELS.index(24)) | (near > draw.uniform(0.05, 0.4).item())
    else:
        kept = torch.ones_like(tissue, dtype=torch.bool)
    if draw.chance(config.crop):
        axis = draw.integer(3)
        edge = draw.integer(max(1, window[axis] // 3)) + 1
        cut = kept.narrow(axis, 0, edge) if draw.chance(0.5) else kept.narrow(axis, kept.shape[axis] - edge, edge)
        cut.fill_(False)
    tissue = torch.where(kept, tissue, 0).to(torch.uint8)

    image = means[labels] + deviations[labels] * draw.normal(window)
    outside = _OUTSIDE[labels]
    texture = (draw.uniform(0, config.texture) * draw.field(window, spacing, draw.uniform(3, 12).item())).exp()
    if draw.chance(config.pieces):
        image = _in_pieces(image, labels, means, draw, spacing)
    image = torch.where(outside, image * texture, image)
    if draw.chance(config.lesions):
        field = draw.field(window, spacing, draw.uniform(5, 15).item())
        dark = 1 - draw.uniform(0.1, 0.45) * ((field - draw.uniform(0.5, 1.5)) * 4).clamp(0, 1)
        image = torch.where(_WHITE[labels], image * dark, image)
    image = (image * (draw.uniform(0, config.bias) * draw.field(window, spacing, 60.0)).exp()).clamp(min=0)
    image = torch.where(kept, image, 0.0)

    # The scanner: point spread, voxel size, noise.
    low, high = config.spacing
    isotropic = float(torch.exp(draw.uniform(np.log(low), np.log(high))))
    voxel = [isotropic] * 3
    if draw.chance(0.4):
        voxel = [draw.uniform(max(low, 0.7), max(low, min(high, 1.2))).item()] * 3
        voxel[draw.integer(3)] = draw.uniform(min(high, 1.0), high).item()
    sigma = [draw.uniform(0.4, 0.6).item() * max(size / spacing, 1.0) for size in voxel]
    image = _blur(image, sigma)
    if stripped:
        image = torch.where(kept, image, 0.0)  # the extraction is done on the finished image: its edge is sharp
    acquired = [max(2, round(n * min(1.0, spacing / size))) for n, size in zip(window, voxel, strict=True)]
    if acquired != list(window):
        image = F.interpolate(image[None, None], acquired, mode="trilinear", align_corners=False)[0, 0]
    level = float(draw.uniform(0, config.noise))
    noisy = ((image + level * draw.normal(image.shape)) ** 2 + (level * draw.normal(image.shape)) ** 2).sqrt()
    air_is_zero = stripped or draw.chance(0.3)
    image = torch.where(image > 0.01, noisy, 0.0) if air_is_zero else noisy
    gamma = float(torch.exp(0.25 * draw.normal(())))
    image = image**gamma
    if upsample and acquired != list(window):
        image = F.interpolate(image[None, None], list(window), mode="trilinear", align_corners=False)[0, 0]

    # At inference the percentiles are those of the whole scan: estimate them on a thinned-out head.
    thin = anatomy.index[::7, ::7, ::7].long()
    whole = (means[thin] + deviations[thin] * draw.normal(thin.shape)).clamp(min=0) ** gamma
    whole = whole[_TISSUE[thin] > 0] if stripped else whole[thin > 0] if air_is_zero else whole.flatten()
    ends = torch.quantile(whole, torch.tensor([0.005, 0.995]))
    return image, tissue, float(ends[0]), max(float(ends[1]), float(ends[0]) + 1e-3)


def _deformed(
    anatomy: LabelMap, draw: _Draw, config: SynthesisConfig, centre: Tensor, window: Sequence[int], spacing: float
) -> Tensor:
    """Label indices (*window) int64 of the randomly deformed anatomy, nearest neighbour; beyond the map is air.

    Only below the map the neck goes on as its lowest slice, without the brain: most real heads show more of it.
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
    sides = torch.tensor([-1.0 if draw.chance(0.5) else 1.0, 1.0, 1.0], dtype=torch.float64)
    matrix = spacing * matrix @ shear @ torch.diag(draw.uniform(*config.scale, 3).double() * sides)
    lines = [torch.arange(n) - (n - 1) / 2 for n in window]
    warps = [(nodes, draw.uniform(0, strongest)) for nodes, strongest in (config.coarse_warp, config.fine_warp)]
    flat = torch.zeros(tuple(window), dtype=torch.int64)
    inside = torch.ones(tuple(window), dtype=torch.bool)
    below = torch.zeros_like(inside)
    for axis, size in enumerate(anatomy.index.shape):
        i, j, k = (float(matrix[axis, b]) * line for b, line in enumerate(lines))
        place = (i + float(centre[axis])).reshape(-1, 1, 1) + j.reshape(-1, 1) + k
        for nodes, strength in warps:
            place = place + strength * draw.field(window, spacing, nodes)
        voxel = place.round().long()
        inside &= voxel < size
        if axis == 2:
            below = voxel < 0
        else:
            inside &= voxel >= 0
        flat = flat * size + voxel.clamp(0, size - 1)
    found = anatomy.index.reshape(-1)[flat.reshape(-1)].reshape(flat.shape).long()
    found = torch.where(below & ~_OUTSIDE[found], LABELS.index(516), found)
    return torch.where(inside, found, 0)


def _intensities(draw: _Draw, config: SynthesisConfig) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (len(LABELS),) of every label; air is 0."""
    means = draw.uniform(0.0, 1.0, len(LABELS))
    if draw.chance(config.t1_share):
        grey, fluid = float(draw.uniform(*_GREY)), float(draw.uniform(*_CSF))
        for group, (low, high) in _BETWEEN.items():
            share = float(draw.uniform(low, high))
            means[[LABELS.index(label) for label in group]] = grey + share * (1 - grey)
        means[[LABELS.index(label) for label in (2, 41, 251, 252, 253, 254, 255)]] = 1.0
        means[[LABELS.index(label) for label in (24, 4, 5, 14, 15, 43, 44, 72)]] = fluid
        for group, (low, high) in _OTHER.items():
            means[[LABELS.index(label) for label in group]] = float(draw.uniform(low, high))
        if draw.chance(0.5):  # fat near a receiving coil: in many whole heads it is 2 to 3 times as bright as the brain
            for fat in (507, 511, 516):
                if draw.chance(0.5):
                    means[LABELS.index(fat)] = float(draw.uniform(1.2, 2.5))
        deviations = draw.uniform(0.01, 0.06, len(LABELS))
    else:
        # Left and right share their contrast: a coin decides nothing about sides.
        for pair in _PAIRS:
            means[[LABELS.index(label) for label in pair]] = float(means[LABELS.index(pair[0])])
        means[[LABELS.index(label) for label in (4, 5, 14, 15, 43, 44)]] = float(means[LABELS.index(24)])
        deviations = draw.uniform(0.01, 0.1, len(LABELS))
    means[LABELS.index(0)] = deviations[LABELS.index(0)] = 0.0
    return means, deviations


def _in_pieces(image: Tensor, labels: Tensor, means: Tensor, draw: _Draw, spacing: float) -> Tensor:
    """``image`` (I, J, K) with the soft tissue outside the brain in pieces with sharp borders, of any intensity.

    The maps have one label for tongue, muscle, fat, marrow and glands. Pieces, some as bright as a tissue of the brain,
    teach that intensity alone does not make a brain.
    """
    window, count = image.shape, 8
    piece = torch.zeros(window, dtype=torch.int64)
    for _ in range(3):  # three random cuts make eight pieces
        field = draw.field(window, spacing, draw.uniform(6, 30).item())
        piece = 2 * piece + (field > draw.uniform(-0.7, 0.7).item()).long()
    brain = means[[LABELS.index(label) for label in (2, 3, 24)]][[draw.integer(3) for _ in range(count)]]
    like_brain = draw.uniform(0, 1, count) < 0.4
    levels = torch.where(like_brain, brain * draw.uniform(0.9, 1.1, count), draw.uniform(0.03, 1.5, count))
    spread = draw.uniform(0.0, 0.08, count)
    soft = _SOFT[labels] & (draw.field(window, spacing, 40.0) > draw.uniform(-2.0, 0.3).item())
    return torch.where(soft, levels[piece] + spread[piece] * draw.normal(window), image)


class _Draw:
    """Random numbers from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator)

    def chance(self, probability: float) -> bool:
        return float(torch.rand((), generator=self.generator)) < probability

    def integer(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))

    def field(self, window: Sequence[int], spacing: float, nodes_mm: float) -> Tensor:
        """A smooth random field (*window), about standard normal at its nodes, which are ``nodes_mm`` apart."""
        coarse = [max(2, round(n * spacing / nodes_mm) + 1) for n in window]
        small = self.normal((1, 1, *coarse))
        return F.interpolate(small, tuple(window), mode="trilinear", align_corners=True)[0, 0]


def _blur(image: Tensor, sigma: float | Sequence[float]) -> Tensor:
    """Gaussian smoothing of (I, J, K), sigma in voxels, edges repeated."""
    sigmas = [sigma] * 3 if isinstance(sigma, int | float) else list(sigma)
    result = image[None, None]
    for axis, width in enumerate(sigmas):
        reach = max(1, round(3 * width))
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / width) ** 2)
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = -1
        pad = [0] * 6
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = reach
        result = F.conv3d(F.pad(result, pad, mode="replicate"), (kernel / kernel.sum()).reshape(shape))
    return result[0, 0]
