"""Slicer's one-line terminologies to codes and back."""

from __future__ import annotations

import pytest
from pydicom.sr.codedict import codes

from SAMAdaptLib.dicom import ORGANS, TISSUE, Code, Terminology, terminology_for
from SAMAdaptLib.errors import DicomError

NEW_SEGMENT = (
    "Segmentation category and type - 3D Slicer General Anatomy list~SCT^85756007^Tissue~"
    "SCT^85756007^Tissue~^^~Anatomic codes - DICOM master list~^^~^^"
)
LESION = (
    "Segmentation category and type - DICOM master list~SCT^49755003^Morphologically Altered Structure~"
    "SCT^4147007^Mass~^^~Anatomic codes - DICOM master list~SCT^39607008^Lung~SCT^7771000^Left"
)


def test_a_new_segment_of_slicer() -> None:
    assert Terminology.from_slicer(NEW_SEGMENT) == TISSUE
    assert TISSUE.to_slicer() == NEW_SEGMENT


def test_a_lesion_with_region_and_side() -> None:
    lesion = Terminology.from_slicer(LESION)
    assert lesion == Terminology(
        Code("SCT", "49755003", "Morphologically Altered Structure"),
        Code("SCT", "4147007", "Mass"),
        None,
        Code("SCT", "39607008", "Lung"),
        Code("SCT", "7771000", "Left"),
    )
    assert Terminology.from_slicer(lesion.to_slicer()) == lesion


@pytest.mark.parametrize("name", ORGANS)
def test_organs_survive_slicers_form(name: str) -> None:
    organ = terminology_for(name.title())
    assert organ.problems() == []
    assert Terminology.from_slicer(organ.to_slicer()) == organ
    assert organ.category == Code("SCT", "123037004", "Anatomical Structure")


def test_codes_of_organs_agree_with_the_standards_table() -> None:
    for name in (
        "Aorta",
        "Brain",
        "Gallbladder",
        "Heart",
        "Liver",
        "Pancreas",
        "Prostate",
        "Spleen",
        "Stomach",
    ):
        assert ORGANS[name.lower()].type.value == getattr(codes.SCT, name).value
    assert ORGANS["left kidney"].type.value == ORGANS["right kidney"].type.value == codes.SCT.Kidney.value
    assert ORGANS["right lung"].type.value == codes.SCT.Lung.value
    assert ORGANS["urinary bladder"].type.value == codes.SCT.Bladder.value
    left, right = ORGANS["left kidney"].type_modifier, ORGANS["right lung"].type_modifier
    assert left is not None
    assert right is not None
    assert (left.value, right.value) == (codes.SCT.Left.value, codes.SCT.Right.value)


def test_unknown_names_are_tissue() -> None:
    assert terminology_for("thing") == TISSUE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "but 1 came"),
        (NEW_SEGMENT + "~", "but 8 came"),
        (NEW_SEGMENT.replace("SCT^85756007^Tissue", "^^"), "is not set"),
    ],
)
def test_damaged_terminologies(text: str, said: str) -> None:
    with pytest.raises(DicomError, match=said):
        Terminology.from_slicer(text)


def test_problems_are_named() -> None:
    odd = Terminology(
        Code("SCT", "1", "m" * 65), Code("", "1", "a\\b"), region_modifier=Code("SCT", "1", "Left")
    )
    assert odd.problems() == [
        "of the category, its meaning has 65 characters, more than 64",
        "of the type, its scheme is empty",
        "of the type, its meaning holds a backslash or a control character",
        "a region modifier stands without a region",
    ]
