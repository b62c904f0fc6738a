"""Registration of masks with SimpleITK, by translation, rotation and isotropic scaling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy import ndimage

Array = npt.NDArray[np.float32]


def optimise(fixed: sitk.Image, moving: sitk.Image, transform: sitk.Transform) -> float:
    """Optimise ``transform`` in place to align ``moving`` with ``fixed``; returns their mean squared difference."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMeanSquares()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 100, relaxationFactor=0.7)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([6.0, 3.0])
    method.SetSmoothingSigmasAreSpecifiedInPhysicalUnits(True)
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(fixed, moving)
    return float(method.GetMetricValue())


def moved(moving: sitk.Image, fixed: sitk.Image, transform: sitk.Transform) -> Array:
    """``moving`` resampled by ``transform`` on the grid of ``fixed``; 0 outside ``moving``."""
    return array_of(sitk.Resample(moving, fixed, transform))


def shift(centre: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> sitk.Similarity3DTransform:
    """A similarity transform that moves ``centre`` to ``target`` (mm), and rotates and scales about ``centre``."""
    transform = sitk.Similarity3DTransform()
    transform.SetCenter(centre.tolist())
    transform.SetTranslation((target - centre).tolist())
    return transform


def centre_of(mask: npt.NDArray[np.bool_], spacing_mm: Sequence[float]) -> npt.NDArray[np.float64]:
    """The centre of mass of a mask (I, J, K), in mm from its first voxel."""
    return np.asarray(ndimage.center_of_mass(mask)) * np.asarray(spacing_mm)


def image_of(array: npt.NDArray[np.generic], spacing_mm: Sequence[float]) -> sitk.Image:
    """A SimpleITK image of float32 from an array (I, J, K), whose first axis becomes x."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.astype(np.float32).T))
    image.SetSpacing([float(size) for size in spacing_mm])
    return image


def array_of(image: sitk.Image) -> Array:
    """The voxels (I, J, K) of an image."""
    array: Array = sitk.GetArrayFromImage(image).T
    return array
