"""The DICOM door: series in, segmentations out; the only place besides `image_files` where LPS exists.

>>> from SAMAdaptLib.dicom import Segment, read_series, terminology_for, write_segmentation
>>> series = read_series("folder")  # doctest: +SKIP
>>> liver = Segment(1, "Liver", terminology_for("liver"), (221, 130, 101))
>>> write_segmentation("liver.dcm", labels, [liver], series)  # doctest: +SKIP
"""

from __future__ import annotations

from .finding import FoundSeries, find_series
from .grids import Masks
from .phantom import PHANTOM_ORGANS, PhantomOrgan, torso_truth, write_torso_phantom
from .preflight import Finding, preflight
from .segmentation import WrittenSegment, WrittenSegmentation, write_segmentation
from .segmentation_reading import ReadSegmentation, read_segmentation
from .segments import Segment
from .series import DicomSeries, read_series
from .terminology import ORGANS, TISSUE, Code, Terminology, terminology_for

__all__ = [
    "ORGANS",
    "PHANTOM_ORGANS",
    "TISSUE",
    "Code",
    "DicomSeries",
    "Finding",
    "FoundSeries",
    "Masks",
    "PhantomOrgan",
    "ReadSegmentation",
    "Segment",
    "Terminology",
    "WrittenSegment",
    "WrittenSegmentation",
    "find_series",
    "preflight",
    "read_segmentation",
    "read_series",
    "terminology_for",
    "torso_truth",
    "write_segmentation",
    "write_torso_phantom",
]
