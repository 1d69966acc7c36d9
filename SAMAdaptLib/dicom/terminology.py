"""Codes that say what a segment is, and Slicer's one-line form of them.

Slicer stores a segment's terminology as seven parts joined by "~" (context, category, type, type modifier,
region context, region, region modifier), each code as "scheme^value^meaning". Codes are taken from there
and never looked up in another table, since Slicer and DICOM give some concepts different codes (its
"Anatomical Structure" is SCT 123037004).
"""

from __future__ import annotations

from dataclasses import dataclass

from SAMAdaptLib.errors import DicomError

CATEGORY_CONTEXT = "Segmentation category and type - 3D Slicer General Anatomy list"
REGION_CONTEXT = "Anatomic codes - DICOM master list"

_PARTS = 7
_MAX_CHARACTERS = {"scheme": 16, "value": 16, "meaning": 64}


@dataclass(frozen=True)
class Code:
    """A coded concept: coding scheme designator, code value, code meaning."""

    scheme: str
    value: str
    meaning: str

    def problems(self) -> list[str]:
        """List what DICOM readers would not accept; empty for a usable code."""
        found: list[str] = []
        for name, limit in _MAX_CHARACTERS.items():
            text = getattr(self, name)
            if not text.strip():
                found.append(f"its {name} is empty")
            elif len(text) > limit:
                found.append(f"its {name} has {len(text)} characters, more than {limit}")
            elif "\\" in text or not text.isprintable():
                found.append(f"its {name} holds a backslash or a control character")
        return found


@dataclass(frozen=True)
class Terminology:
    """What a segment is.

    Attributes:
        category: Such as Anatomical Structure or Tissue.
        type: Such as Liver or Kidney.
        type_modifier: Laterality of an organ, such as Left.
        region: Where a lesion lies; organs need none.
        region_modifier: Laterality of the region.
    """

    category: Code
    type: Code
    type_modifier: Code | None = None
    region: Code | None = None
    region_modifier: Code | None = None

    @classmethod
    def from_slicer(cls, text: str) -> Terminology:
        """Read Slicer's seven parts joined by "~".

        Raises:
            DicomError: Other than seven parts, or category or type is not set.
        """
        parts = text.split("~")
        if len(parts) != _PARTS:
            raise DicomError(
                f"A terminology of {_PARTS} parts joined by '~' was wanted, but {len(parts)} came. "
                "Choose the segment's terminology again in the Segment Editor."
            )
        category, kind, type_modifier, region, region_modifier = (_parse(parts[n]) for n in (1, 2, 3, 5, 6))
        if category is None or kind is None:
            raise DicomError(
                "A terminology with category and type was wanted, but one of them is not set. "
                "Choose the segment's terminology in the Segment Editor."
            )
        return cls(category, kind, type_modifier, region, region_modifier)

    def to_slicer(self) -> str:
        """Return Slicer's seven parts joined by "~"."""
        codes = (self.category, self.type, self.type_modifier)
        region = (self.region, self.region_modifier)
        return "~".join([CATEGORY_CONTEXT, *map(_format, codes), REGION_CONTEXT, *map(_format, region)])

    def problems(self) -> list[str]:
        """List what is wrong with any of the codes, by the name of the code."""
        named = {
            "category": self.category,
            "type": self.type,
            "type modifier": self.type_modifier,
            "region": self.region,
            "region modifier": self.region_modifier,
        }
        found = [f"of the {name}, {text}" for name, code in named.items() if code for text in code.problems()]
        if self.region_modifier and not self.region:
            found.append("a region modifier stands without a region")
        return found


def _parse(text: str) -> Code | None:
    """Read "scheme^value^meaning"; "^^" and the empty text mean none."""
    fields = text.split("^")
    if not any(fields):
        return None
    scheme, value, meaning = [*fields, "", ""][:3]
    return Code(scheme, value, meaning)


def _format(code: Code | None) -> str:
    return f"{code.scheme}^{code.value}^{code.meaning}" if code else "^^"


_ANATOMICAL_STRUCTURE = Code("SCT", "123037004", "Anatomical Structure")
_LEFT = Code("SCT", "7771000", "Left")
_RIGHT = Code("SCT", "24028007", "Right")

TISSUE = Terminology(Code("SCT", "85756007", "Tissue"), Code("SCT", "85756007", "Tissue"))
"""What Slicer gives a new segment."""


def _organ(value: str, meaning: str, side: Code | None = None) -> Terminology:
    return Terminology(_ANATOMICAL_STRUCTURE, Code("SCT", value, meaning), side)


ORGANS: dict[str, Terminology] = {
    "aorta": _organ("15825003", "Aorta"),
    "bone": _organ("272673000", "Bone"),
    "brain": _organ("12738006", "Brain"),
    "gallbladder": _organ("28231008", "Gallbladder"),
    "heart": _organ("80891009", "Heart"),
    "left kidney": _organ("64033007", "Kidney", _LEFT),
    "left lung": _organ("39607008", "Lung", _LEFT),
    "liver": _organ("10200004", "Liver"),
    "pancreas": _organ("15776009", "Pancreas"),
    "prostate": _organ("41216001", "Prostate"),
    "right kidney": _organ("64033007", "Kidney", _RIGHT),
    "right lung": _organ("39607008", "Lung", _RIGHT),
    "spleen": _organ("78961009", "Spleen"),
    "stomach": _organ("69695003", "Stomach"),
    "urinary bladder": _organ("89837001", "Urinary bladder"),
}
"""Terminology of structures that are segmented often, by lower-case English name."""


def terminology_for(name: str) -> Terminology:
    """Return the terminology of a structure by its English name, and plain tissue for an unknown one."""
    return ORGANS.get(name.strip().lower(), TISSUE)
