"""What is known of each segment, and its item in a DICOM segmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import highdicom as hd
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code as PydicomCode

from .terminology import TISSUE, Code, Terminology

AlgorithmType = Literal["AUTOMATIC", "SEMIAUTOMATIC", "MANUAL"]

_ARTIFICIAL_INTELLIGENCE = PydicomCode("123110", "DCM", "Artificial Intelligence")


@dataclass(frozen=True)
class Segment:
    """One segment to write, or as it was read.

    Nothing is checked here: `preflight` names everything that is wrong at once.

    Attributes:
        label_value: Its number in the label map; with one mask per segment only its place in the list counts.
        name: 1 to 64 characters.
        terminology: What it is.
        colour_rgb: 0 to 255 each.
        algorithm_type: SEMIAUTOMATIC for prompted, AUTOMATIC for batch, MANUAL only for hand-drawn segments.
        algorithm_name: Model (and adapter) that made it; needed unless MANUAL.
        algorithm_version: Version or checkpoint hash of it.
        tracking_id: With `tracking_uid`, follows the same structure over time; both or neither.
        tracking_uid: A DICOM UID, kept for the segment when it is written again.
        description: Free text.
    """

    label_value: int
    name: str
    terminology: Terminology = TISSUE
    colour_rgb: tuple[int, int, int] = (128, 174, 128)
    algorithm_type: AlgorithmType = "SEMIAUTOMATIC"
    algorithm_name: str = "SAMAdapt"
    algorithm_version: str = "unspecified"
    tracking_id: str | None = None
    tracking_uid: str | None = None
    description: str = ""


def segment_item(segment: Segment, number: int) -> hd.seg.SegmentDescription:
    """Describe a segment for the Segment Sequence under the given SegmentNumber."""
    terminology = segment.terminology
    manual = segment.algorithm_type == "MANUAL"
    item = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=segment.name,
        segmented_property_category=_code(terminology.category),
        segmented_property_type=_code(terminology.type),
        algorithm_type=segment.algorithm_type,
        algorithm_identification=None if manual else _algorithm(segment),
        tracking_uid=segment.tracking_uid,
        tracking_id=segment.tracking_id,
        anatomic_regions=[_code(terminology.region)] if terminology.region else None,
        display_color=hd.color.CIELabColor.from_rgb(*segment.colour_rgb),
    )
    if terminology.type_modifier:
        kind = item.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [_concept(terminology.type_modifier)]
    if terminology.region and terminology.region_modifier:
        region = item.AnatomicRegionSequence[0]
        region.AnatomicRegionModifierSequence = [_concept(terminology.region_modifier)]
    if segment.description:
        item.SegmentDescription = segment.description
    return item


def segment_from_item(item: Dataset, label_value: int) -> Segment:
    """Read a segment back from an item of the Segment Sequence, ours or another writer's."""
    kind = item.SegmentedPropertyTypeCodeSequence[0]
    region = _first(item, "AnatomicRegionSequence")
    algorithm = _first(item, "SegmentationAlgorithmIdentificationSequence") or Dataset()
    return Segment(
        label_value=label_value,
        name=str(item.get("SegmentLabel") or ""),
        terminology=Terminology(
            category=_read_code(item.SegmentedPropertyCategoryCodeSequence[0]),
            type=_read_code(kind),
            type_modifier=_optional_code(_first(kind, "SegmentedPropertyTypeModifierCodeSequence")),
            region=_optional_code(region),
            region_modifier=_optional_code(region and _first(region, "AnatomicRegionModifierSequence")),
        ),
        colour_rgb=_read_colour(item),
        algorithm_type=_read_algorithm_type(str(item.get("SegmentAlgorithmType") or "")),
        algorithm_name=str(item.get("SegmentAlgorithmName") or ""),
        algorithm_version=str(algorithm.get("AlgorithmVersion") or ""),
        tracking_id=item.get("TrackingID"),
        tracking_uid=item.get("TrackingUID"),
        description=str(item.get("SegmentDescription") or ""),
    )


def _algorithm(segment: Segment) -> hd.AlgorithmIdentificationSequence:
    return hd.AlgorithmIdentificationSequence(
        name=segment.algorithm_name, family=_ARTIFICIAL_INTELLIGENCE, version=segment.algorithm_version
    )


def _code(code: Code) -> PydicomCode:
    return PydicomCode(code.value, code.scheme, code.meaning)


def _concept(code: Code) -> hd.sr.CodedConcept:
    return hd.sr.CodedConcept(code.value, code.scheme, code.meaning)


def _first(item: Dataset, name: str) -> Dataset | None:
    sequence = item.get(name)
    return sequence[0] if sequence else None


def _read_code(item: Dataset) -> Code:
    value = item.get("CodeValue") or item.get("LongCodeValue") or ""
    return Code(str(item.get("CodingSchemeDesignator") or ""), str(value), str(item.get("CodeMeaning") or ""))


def _optional_code(item: Dataset | None) -> Code | None:
    return _read_code(item) if item is not None else None


def _read_algorithm_type(text: str) -> AlgorithmType:
    if text == "AUTOMATIC":
        return "AUTOMATIC"
    return "SEMIAUTOMATIC" if text == "SEMIAUTOMATIC" else "MANUAL"


def _read_colour(item: Dataset) -> tuple[int, int, int]:
    value = item.get("RecommendedDisplayCIELabValue")
    if not value:
        return Segment.colour_rgb
    red, green, blue = hd.color.CIELabColor.from_dicom_value(tuple(value)).to_rgb()
    return int(red), int(green), int(blue)
