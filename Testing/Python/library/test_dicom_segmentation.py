"""DICOM segmentations: what was drawn, where it was drawn, and nothing that must not leave."""

from __future__ import annotations

import dataclasses
import string
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.sequence import Sequence
from pydicom.uid import generate_uid

from SAMAdaptLib.dicom import (
    Code,
    DicomSeries,
    Segment,
    Terminology,
    preflight,
    read_segmentation,
    read_series,
    terminology_for,
    write_segmentation,
)
from SAMAdaptLib.errors import DicomError
from SAMAdaptLib.geometry import Geometry
from Testing.dicom_samples import SAGITTAL, Sample, rotated, save

SAMPLES = {
    "axial": Sample(),
    "sagittal": Sample(SAGITTAL, steps=(15, 12, 9, 6, 3, 0)),
    "oblique": Sample(rotated((20, -35, 50))),
    "tilted": Sample(shift_per_mm=(0, 0.33, 0)),
    "uneven": Sample(steps=(0, 2, 4, 6, 9.5, 13)),
}
LIVER = Segment(3, "Liver", terminology_for("liver"), (221, 130, 101), algorithm_version="1")
KIDNEY = Segment(7, "Left kidney", terminology_for("left kidney"), (0, 0, 0), "AUTOMATIC", "MA-SAM", "2.1")
NODE = Segment(
    12,
    "Knoten 肝臓",
    Terminology(
        Code("SCT", "49755003", "Morphologically Altered Structure"),
        Code("SCT", "4147007", "Mass"),
        None,
        Code("SCT", "39607008", "Lung"),
        Code("SCT", "7771000", "Left"),
    ),
    (37, 28, 11),
    "MANUAL",
    tracking_id="lesion 1",
    tracking_uid="1.2.826.0.1.3680043.8.498.1",
    description="drawn by hand",
)
SEGMENTS = (LIVER, KIDNEY, NODE)


def drawn() -> NDArray[np.uint8]:
    """Labels with odd shapes: asymmetric in every axis, so that no flip or exchange of axes survives."""
    labels = np.zeros((6, 10, 13), np.uint8)
    labels[1:4, 2:5, 1:7] = 3
    labels[2, 2, 1] = labels[5, 9, 12] = 7
    labels[4, 6:9, 8:12] = 12
    labels[0, 0, 0] = 12
    return labels


@pytest.fixture(params=SAMPLES, name="series")
def series_of_every_kind(request: pytest.FixtureRequest, tmp_path: Path) -> DicomSeries:
    return read_series(SAMPLES[request.param].write(tmp_path / "series"))


@pytest.fixture(params=[False, True], ids=["shared groups", "groups of every frame"])
def multiframe(request: pytest.FixtureRequest, tmp_path: Path) -> DicomSeries:
    save(SAMPLES["tilted"].enhanced([3, 0, 5, 1, 4, 2], per_frame=request.param), tmp_path / "multi.dcm")
    return read_series(tmp_path / "multi.dcm")


@pytest.fixture
def axial(tmp_path: Path) -> DicomSeries:
    return read_series(SAMPLES["axial"].write(tmp_path / "series"))


def assert_frames_in_place(path: Path, series: DicomSeries, labels: NDArray[Any]) -> None:
    """Check the file without our reader: position, reference and pixels of every frame."""
    dataset = dcmread(path)
    pixels = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    numbers = {item.SegmentNumber: item.SegmentLabel for item in dataset.SegmentSequence}
    seen = np.zeros_like(labels)
    for frame, picture in zip(dataset.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        position = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        (k,) = np.flatnonzero(np.all(series.stack.positions_lps == position, axis=1))
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        header = series.headers[series.slices[k].header_index]
        assert source.ReferencedSOPInstanceUID == header.SOPInstanceUID
        assert source.ReferencedSOPClassUID == header.SOPClassUID
        assert source.get("ReferencedFrameNumber") == series.slices[k].frame_number
        assert source.SpatialLocationsPreserved == "YES"
        groups = [*dataset.SharedFunctionalGroupsSequence, frame]
        (identified,) = (group for group in groups if "SegmentIdentificationSequence" in group)
        name = numbers[identified.SegmentIdentificationSequence[0].ReferencedSegmentNumber]
        seen[k][picture == 1] = next(one.label_value for one in SEGMENTS if one.name == name)
    np.testing.assert_array_equal(seen, labels)


def test_round_trip_on_every_grid(series: DicomSeries, tmp_path: Path) -> None:
    written = write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, series)
    assert_frames_in_place(tmp_path / "seg.dcm", series, drawn())
    back = read_segmentation(tmp_path / "seg.dcm", series)
    for number, segment in enumerate(SEGMENTS, start=1):
        np.testing.assert_array_equal(back.mask(number), drawn() == segment.label_value)
    assert [(one.number, one.label_value, one.voxels) for one in written.segments] == [
        (1, 3, 53),
        (2, 7, 2),
        (3, 12, 13),
    ]
    assert written.frames == 7
    assert written.dropped == ()


def test_round_trip_on_a_multiframe_source(multiframe: DicomSeries, tmp_path: Path) -> None:
    write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, multiframe)
    assert_frames_in_place(tmp_path / "seg.dcm", multiframe, drawn())
    dataset = dcmread(tmp_path / "seg.dcm")
    (whole,) = dataset.ReferencedSeriesSequence
    assert whole.SeriesInstanceUID == multiframe.series_uid
    assert [one.ReferencedSOPInstanceUID for one in whole.ReferencedInstanceSequence] == [
        multiframe.headers[0].SOPInstanceUID
    ]
    assert len(dataset.SourceImageSequence) == 1


def test_highdicom_sees_the_same_voxels(axial: DicomSeries, tmp_path: Path) -> None:
    write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, axial)
    found = hd.seg.segread(tmp_path / "seg.dcm").get_pixels_by_source_instance(
        [header.SOPInstanceUID for header in axial.headers],
        combine_segments=True,
        assert_missing_frames_are_empty=True,
    )
    numbered = np.select([drawn() == 3, drawn() == 7, drawn() == 12], [1, 2, 3])
    np.testing.assert_array_equal(found, numbered)


def test_segments_come_back_as_described(axial: DicomSeries, tmp_path: Path) -> None:
    write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, axial)
    back = read_segmentation(tmp_path / "seg.dcm", axial).segments
    for number, (before, after) in enumerate(zip(SEGMENTS, back, strict=True), start=1):
        manual = before.algorithm_type == "MANUAL"
        wanted = dataclasses.replace(
            before,
            label_value=number,
            algorithm_name="" if manual else before.algorithm_name,
            algorithm_version="" if manual else before.algorithm_version,
        )
        assert np.abs(np.subtract(after.colour_rgb, before.colour_rgb)).max() <= 1  # CIELab has 16 bits
        assert dataclasses.replace(after, colour_rgb=before.colour_rgb) == wanted


def test_codes_and_attributes_of_the_file(axial: DicomSeries, tmp_path: Path) -> None:
    written = write_segmentation(
        tmp_path / "seg.dcm", drawn(), SEGMENTS, axial, series_description="Livers of all sizes"
    )
    dataset = dcmread(tmp_path / "seg.dcm")
    assert dataset.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"
    assert dataset.SOPClassUID == "1.2.840.10008.5.1.4.1.1.66.4"
    assert (dataset.Modality, dataset.SegmentationType, dataset.SegmentsOverlap) == ("SEG", "BINARY", "NO")
    assert dataset.SpecificCharacterSet == "ISO_IR 192"
    assert dataset.SeriesNumber == written.series_number == 104
    assert dataset.SeriesDescription == "Livers of all sizes"
    assert (dataset.SeriesDate, dataset.SeriesTime) == (dataset.ContentDate, dataset.ContentTime)
    source = axial.headers[0]
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID", "AccessionNumber"):
        assert dataset[keyword].value == source[keyword].value
    assert dataset.SeriesInstanceUID != source.SeriesInstanceUID
    kidney, node = dataset.SegmentSequence[1:]
    kind = kidney.SegmentedPropertyTypeCodeSequence[0]
    assert kind.CodeValue == "64033007"
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert kidney.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "123037004"
    assert kidney.SegmentAlgorithmName == "MA-SAM"
    algorithm = kidney.SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmVersion == "2.1"
    assert algorithm.AlgorithmFamilyCodeSequence[0].CodeValue == "123110"
    assert node.SegmentLabel == "Knoten 肝臓"
    region = node.AnatomicRegionSequence[0]
    assert region.AnatomicRegionModifierSequence[0].CodeMeaning == "Left"
    assert "SegmentAlgorithmName" not in node
    assert (node.TrackingID, node.TrackingUID) == ("lesion 1", "1.2.826.0.1.3680043.8.498.1")
    (whole,) = dataset.ReferencedSeriesSequence
    assert [one.ReferencedSOPInstanceUID for one in whole.ReferencedInstanceSequence] == [
        header.SOPInstanceUID for header in axial.headers
    ]


def test_two_exports_are_two_series(axial: DicomSeries, tmp_path: Path) -> None:
    first = write_segmentation(tmp_path / "a.dcm", drawn(), SEGMENTS, axial)
    second = write_segmentation(tmp_path / "b.dcm", drawn(), SEGMENTS, axial)
    assert first.series_instance_uid != second.series_instance_uid
    assert first.sop_instance_uid != second.sop_instance_uid


def test_empty_segments_are_left_out_and_named(axial: DicomSeries, tmp_path: Path) -> None:
    labels = drawn()
    labels[labels == 3] = 0
    written = write_segmentation(tmp_path / "seg.dcm", labels, SEGMENTS, axial)
    assert written.dropped == ("Liver",)
    assert [(one.number, one.name) for one in written.segments] == [(1, "Left kidney"), (2, "Knoten 肝臓")]
    assert "left out: Liver" in str(written.findings[0])
    back = read_segmentation(tmp_path / "seg.dcm", axial)
    assert [segment.name for segment in back.segments] == ["Left kidney", "Knoten 肝臓"]
    np.testing.assert_array_equal(back.mask(1), labels == 7)


def test_overlapping_segments(axial: DicomSeries, tmp_path: Path) -> None:
    masks = [drawn() == 3, drawn() > 0, np.zeros((6, 10, 13), bool)]
    written = write_segmentation(tmp_path / "seg.dcm", masks, SEGMENTS, axial)
    assert written.dropped == ("Knoten 肝臓",)
    assert dcmread(tmp_path / "seg.dcm").SegmentsOverlap == "YES"
    back = read_segmentation(tmp_path / "seg.dcm", axial)
    np.testing.assert_array_equal(back.mask(1), masks[0])
    np.testing.assert_array_equal(back.mask(2), masks[1])
    assert back.overlaps
    with pytest.raises(DicomError, match="segments of this file overlap"):
        back.labels()


def test_masks_that_do_not_overlap_are_one_label_map(axial: DicomSeries, tmp_path: Path) -> None:
    masks = [drawn() == one.label_value for one in SEGMENTS]
    write_segmentation(tmp_path / "seg.dcm", masks, SEGMENTS, axial)
    assert dcmread(tmp_path / "seg.dcm").SegmentsOverlap == "NO"
    labels = read_segmentation(tmp_path / "seg.dcm", axial).labels()
    np.testing.assert_array_equal(labels, np.select(masks, [1, 2, 3]))


def test_more_than_255_segments(axial: DicomSeries, tmp_path: Path) -> None:
    labels = np.zeros((6, 10, 13), np.uint16)
    labels.reshape(-1)[:300] = np.arange(1, 301)
    segments = [Segment(n, f"part {n}") for n in range(1, 301)]
    write_segmentation(tmp_path / "seg.dcm", labels, segments, axial)
    np.testing.assert_array_equal(read_segmentation(tmp_path / "seg.dcm", axial).labels(), labels)


def flipped_and_turned(geometry: Geometry) -> tuple[NDArray[np.uint8], Geometry]:
    """The same voxels stored with k backwards and rows and columns exchanged."""
    labels = drawn()[::-1].transpose(0, 2, 1)
    affine = geometry.affine_ijk_to_ras[:, [1, 0, 2, 3]].copy()
    affine[:, 3] += affine[:, 2] * (geometry.shape_kji[0] - 1)
    affine[:, 2] *= -1
    return labels, Geometry(labels.shape, affine)  # type: ignore[arg-type]


def test_masks_stored_in_another_order_are_moved_exactly(axial: DicomSeries, tmp_path: Path) -> None:
    labels, geometry = flipped_and_turned(axial.volume.geometry)
    written = write_segmentation(tmp_path / "seg.dcm", labels, SEGMENTS, axial, geometry=geometry)
    assert written.findings == ()
    assert_frames_in_place(tmp_path / "seg.dcm", axial, drawn())


def test_masks_on_another_grid_are_sampled_and_say_so(axial: DicomSeries, tmp_path: Path) -> None:
    fine = np.repeat(np.repeat(drawn(), 2, axis=1), 2, axis=2)
    affine = axial.volume.geometry.affine_ijk_to_ras.copy()
    affine[:3, :2] /= 2
    affine[:3, 3] -= affine[:3, 0] / 2 + affine[:3, 1] / 2
    geometry = Geometry((6, 20, 26), affine)
    written = write_segmentation(tmp_path / "seg.dcm", fine, SEGMENTS, axial, geometry=geometry)
    assert "does not lie on the voxels of the series" in str(written.findings[0])
    assert_frames_in_place(tmp_path / "seg.dcm", axial, drawn())


def test_masks_between_the_voxels_go_to_the_nearest(axial: DicomSeries, tmp_path: Path) -> None:
    affine = axial.volume.geometry.affine_ijk_to_ras.copy()
    affine[:3, 3] += 0.4 * affine[:3, 0] - 0.4 * affine[:3, 1]
    shifted = Geometry((6, 10, 13), affine)
    write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, axial, geometry=shifted)
    assert_frames_in_place(tmp_path / "seg.dcm", axial, drawn())


def test_masks_of_another_patient_are_not_written(axial: DicomSeries, tmp_path: Path) -> None:
    affine = axial.volume.geometry.affine_ijk_to_ras.copy()
    affine[:3, 3] += 500
    elsewhere = Geometry((6, 10, 13), affine)
    with pytest.raises(DicomError, match="no voxel of it lies there"):
        write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, axial, geometry=elsewhere)
    assert not (tmp_path / "seg.dcm").exists()


# --- headers of real life ---


def test_the_headers_of_the_series_are_not_touched(axial: DicomSeries, tmp_path: Path) -> None:
    before = [header.to_json() for header in axial.headers]
    write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, axial)
    assert [header.to_json() for header in axial.headers] == before


@pytest.mark.parametrize(
    "keyword",
    [
        "PatientBirthDate",
        "PatientSex",
        "PatientID",
        "PatientName",
        "AccessionNumber",
        "StudyID",
        "StudyDate",
        "StudyTime",
        "SliceThickness",
        "ReferringPhysicianName",
        "PositionReferenceIndicator",
        "SpecificCharacterSet",
        "Manufacturer",
        "SeriesNumber",
    ],
)
@pytest.mark.parametrize("empty", [False, True], ids=["absent", "empty"])
def test_missing_attributes_of_the_source_do_no_harm(keyword: str, empty: bool, tmp_path: Path) -> None:
    def drop(dataset: Dataset, _: int) -> None:
        if empty:
            setattr(dataset, keyword, None)
        else:
            delattr(dataset, keyword)

    series = read_series(SAMPLES["oblique"].write(tmp_path / "series", drop))
    write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, series)
    assert_frames_in_place(tmp_path / "seg.dcm", series, drawn())
    dataset = dcmread(tmp_path / "seg.dcm")
    measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert measures.SliceThickness == pytest.approx(3)
    assert dataset.SeriesNumber == (100 if keyword == "SeriesNumber" else 104)


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        (None, "Test^Anna"),
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 144", "Иванова^Юлия"),
        ("GB18030", "王^小东"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
    ],
)
def test_names_in_every_script_survive(charset: Any, name: str, tmp_path: Path) -> None:
    def rename(dataset: Dataset, _: int) -> None:
        dataset.SpecificCharacterSet, dataset.PatientName = charset, name

    series = read_series(SAMPLES["axial"].write(tmp_path / "series", rename))
    write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, series)
    dataset = dcmread(tmp_path / "seg.dcm")
    assert str(dataset.PatientName) == name
    assert dataset.SegmentSequence[2].SegmentLabel == "Knoten 肝臓"


def test_noise_in_the_text_of_directions(tmp_path: Path) -> None:
    def add_noise(dataset: Dataset, k: int) -> None:
        dataset.ImageOrientationPatient[1] = f"{float(dataset.ImageOrientationPatient[1]) + k * 1e-7:.12g}"

    series = read_series(SAMPLES["oblique"].write(tmp_path / "series", add_noise))
    write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, series)
    assert_frames_in_place(tmp_path / "seg.dcm", series, drawn())


def test_the_thickness_is_that_of_the_source(tmp_path: Path) -> None:
    def thin(dataset: Dataset, _: int) -> None:
        dataset.SliceThickness = "2.5"

    series = read_series(SAMPLES["axial"].write(tmp_path / "series", thin))
    write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, series)
    measures = dcmread(tmp_path / "seg.dcm").SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert (measures.SliceThickness, measures.SpacingBetweenSlices) == (2.5, 3)
    assert list(measures.PixelSpacing) == [0.7, 0.9]


def test_lossy_sources_are_told(tmp_path: Path) -> None:
    def lossy(dataset: Dataset, _: int) -> None:
        dataset.LossyImageCompression, dataset.LossyImageCompressionRatio = "01", "12.5"
        dataset.LossyImageCompressionMethod = "ISO_10918_1"

    series = read_series(SAMPLES["axial"].write(tmp_path / "series", lossy))
    written = write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, series)
    dataset = dcmread(tmp_path / "seg.dcm")
    assert (dataset.LossyImageCompression, dataset.LossyImageCompressionRatio) == ("01", 12.5)
    assert any("compressed with losses" in str(finding) for finding in written.findings)


def secrets() -> dict[str, str]:
    """A word for every text attribute that may name a person or place and must stay behind."""
    keywords = [
        "PatientComments",
        "AdditionalPatientHistory",
        "AdmittingDiagnosesDescription",
        "PhysiciansOfRecord",
        "NameOfPhysiciansReadingStudy",
        "IssuerOfPatientID",
        "PatientAddress",
        "PatientTelephoneNumbers",
        "OperatorsName",
        "InstitutionName",
        "InstitutionAddress",
        "InstitutionalDepartmentName",
        "StationName",
        "DeviceSerialNumber",
        "PerformingPhysicianName",
        "PatientMotherBirthName",
        "MedicalRecordLocator",
        "EthnicGroup",
        "Occupation",
        "ClinicalTrialSubjectID",
        "ClinicalTrialSponsorName",
        "SeriesDescription",
        "ProtocolName",
        "RequestingPhysician",
        "RequestedProcedureDescription",
        "ImageComments",
        "OtherPatientNames",
        "CountryOfResidence",
        "PatientReligiousPreference",
        "ResponsiblePerson",
    ]
    return {keyword: f"SECRET{string.ascii_uppercase[n % 26]}{n}" for n, keyword in enumerate(keywords)}


@pytest.mark.parametrize("source", ["classic", "multiframe"])
def test_nothing_private_leaves_with_the_segmentation(source: str, tmp_path: Path) -> None:
    def plant(dataset: Dataset, _: int = 0) -> None:
        for keyword, word in secrets().items():
            setattr(dataset, keyword, word)
        dataset.PatientAge, dataset.PatientWeight, dataset.PatientSize = "047Y", "81.25", "1.875"
        dataset.private_block(0x0011, "SECRET BLOCK", create=True).add_new(1, "LO", "SECRET private")
        item = Dataset()
        item.PersonName = item.InstitutionName = "SECRETITEM"
        dataset.ContributingEquipmentSequence = Sequence([item])

    sample = SAMPLES["axial"]
    if source == "classic":
        sample.write(tmp_path / "series", plant)
    else:
        (tmp_path / "series").mkdir()
        dataset = sample.enhanced()
        plant(dataset)
        save(dataset, tmp_path / "series" / "multi.dcm")
    series = read_series(tmp_path / "series")
    written = write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, series)
    content = (tmp_path / "seg.dcm").read_bytes()
    assert b"Test^Anna" in content  # the search does find what is there
    for word in (b"SECRET", b"047Y", b"81.25", b"1.875", str(tmp_path).encode()):
        assert word not in content
    for printed in (repr(written), repr(series), repr(series.volume)):
        assert "Anna" not in printed
        assert "SECRET" not in printed


def test_patients_marked_anonymous_stay_marked(tmp_path: Path) -> None:
    def mark(dataset: Dataset, _: int) -> None:
        dataset.PatientIdentityRemoved, dataset.DeidentificationMethod = "YES", "by rule 7"

    series = read_series(SAMPLES["axial"].write(tmp_path / "series", mark))
    write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, series)
    assert dcmread(tmp_path / "seg.dcm").DeidentificationMethod == "by rule 7"
    for header in series.headers:
        header.DeidentificationMethod = None  # the mark alone breaks the standard
    write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, series)
    assert "PatientIdentityRemoved" not in dcmread(tmp_path / "seg.dcm")


def test_odd_values_reach_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """pydicom quotes values that break a rule of the standard; such a value may be the patient's."""
    sample = SAMPLES["axial"]
    sample.write(tmp_path / "series")
    for path in (tmp_path / "series").iterdir():
        content = path.read_bytes()
        assert content.count(b"19700101") == 1
        path.write_bytes(content.replace(b"19700101", b"1970SECR"))
    series = read_series(tmp_path / "series")
    write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, series)
    read_segmentation(tmp_path / "seg.dcm", series)
    assert caplog.text == ""
    assert dcmread(tmp_path / "seg.dcm").PatientBirthDate == ""


# --- pre-flight ---


def errors(masks: Any, segments: Any, series: DicomSeries, **options: Any) -> list[str]:
    found = preflight(masks, segments, series, **options)
    assert all(finding.sentence.endswith(".") and finding.fix for finding in found)
    return [finding.sentence for finding in found if finding.severity == "error"]


def test_nothing_to_say_about_a_good_segmentation(axial: DicomSeries, tmp_path: Path) -> None:
    assert preflight(drawn(), SEGMENTS, axial, path=tmp_path / "seg.dcm") == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": ""}, "its name must have 1 to 64"),
        ({"name": "x" * 65}, "its name must have 1 to 64"),
        ({"name": "a\\b"}, "its name must have 1 to 64"),
        ({"name": "a\x07b"}, "its name must have 1 to 64"),
        ({"colour_rgb": (0.5, 0.2, 0.9)}, "three whole numbers from 0 to 255"),
        ({"colour_rgb": (0, 0, 256)}, "three whole numbers from 0 to 255"),
        ({"algorithm_name": ""}, "needs name and version"),
        ({"algorithm_type": "MAGIC"}, "must be AUTOMATIC, SEMIAUTOMATIC or MANUAL"),
        ({"tracking_id": "one"}, "belong together"),
        ({"tracking_id": "one", "tracking_uid": "1.02.x"}, "no valid DICOM UID"),
        ({"description": "a\\b"}, "its description must have"),
        (
            {"terminology": Terminology(Code("SCT", "1" * 17, "x"), Code("SCT", "1", "x"))},
            "of the category, its value has 17 characters, more than 16",
        ),
        (
            {"terminology": Terminology(Code("SCT", "1", "x"), Code("SCT", "1", ""))},
            "of the type, its meaning is empty",
        ),
    ],
)
def test_faults_of_a_segment(change: dict[str, Any], said: str, axial: DicomSeries) -> None:
    segments = [dataclasses.replace(LIVER, **change), KIDNEY, NODE]
    (sentence,) = errors(drawn(), segments, axial)
    assert sentence.startswith("Segment 1: ")
    assert said in sentence


def test_faults_of_the_mask(axial: DicomSeries) -> None:
    assert "type float32" in errors(drawn().astype(np.float32), SEGMENTS, axial)[0]
    assert "negative" in errors(drawn().astype(np.int16) - 1, SEGMENTS, axial)[0]
    assert "(6, 10, 13) voxels" in errors(drawn().transpose(0, 2, 1), SEGMENTS, axial)[0]
    assert "(6, 10, 13) voxels" in errors(drawn()[1:], SEGMENTS, axial)[0]
    assert "above 65535" in errors(drawn().astype(np.int32) * 10000, SEGMENTS, axial)[0]
    assert errors(drawn(), [LIVER, KIDNEY], axial) == ["The mask holds labels without a segment: 12."]
    assert errors(drawn(), [*SEGMENTS, LIVER], axial) == ["Several segments have the label 3."]
    assert errors(np.zeros_like(drawn()), SEGMENTS, axial) == ["All segments are empty."]
    assert "There are 2 masks for 3 segments." in errors([drawn() == 3, drawn() == 7], SEGMENTS, axial)
    assert "There is no segment to write." in errors(drawn(), [], axial)


@pytest.mark.parametrize(
    "keyword", ["SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"]
)
def test_sources_that_cannot_be_referred_to(keyword: str, tmp_path: Path) -> None:
    sample = SAMPLES["axial"]
    sample.write(tmp_path)
    for path in tmp_path.iterdir():
        dataset = dcmread(path)
        delattr(dataset, keyword)
        dataset.save_as(path)
    (sentence,) = errors(drawn(), SEGMENTS, read_series(tmp_path))
    assert f"no {keyword} (in 6 of 6 files)" in sentence


@pytest.mark.parametrize(
    ("keyword", "said"),
    [("PatientID", "2 patients"), ("StudyInstanceUID", "2 studies"), ("FrameOfReferenceUID", "2 frames")],
)
def test_sources_that_do_not_belong_together(keyword: str, said: str, tmp_path: Path) -> None:
    other = str(generate_uid())

    def mix(dataset: Dataset, k: int) -> None:
        if k == 3:
            setattr(dataset, keyword, other)

    (sentence,) = errors(drawn(), SEGMENTS, read_series(SAMPLES["axial"].write(tmp_path, mix)))
    assert said in sentence


def test_places_that_cannot_be_written_to(axial: DicomSeries, tmp_path: Path) -> None:
    assert "does not exist" in errors(drawn(), SEGMENTS, axial, path=tmp_path / "no" / "seg.dcm")[0]
    assert "the path is a folder" in errors(drawn(), SEGMENTS, axial, path=tmp_path)[0]


@pytest.mark.parametrize("text", ["", "x" * 300, "a\\b"])
def test_descriptions_that_readers_would_not_take(text: str, axial: DicomSeries) -> None:
    (sentence,) = errors(drawn(), SEGMENTS, axial, series_description=text)
    assert "series description must have 1 to 64" in sentence


def test_tilted_and_uneven_series_warn_about_slicer(series: DicomSeries) -> None:
    found = [str(finding) for finding in preflight(drawn(), SEGMENTS, series)]
    unusual = series.volume.geometry.is_sheared or not series.volume.geometry.is_regular
    assert any("importer cannot open" in text for text in found) == unusual


def test_all_errors_come_at_once_and_nothing_is_written(axial: DicomSeries, tmp_path: Path) -> None:
    segments = [dataclasses.replace(LIVER, name=""), KIDNEY]
    with pytest.raises(DicomError) as caught:
        write_segmentation(tmp_path / "seg.dcm", drawn(), segments, axial)
    assert "Segment 1" in str(caught.value)
    assert "without a segment: 12" in str(caught.value)
    assert list(tmp_path.glob("*.dcm")) == []
    assert list(tmp_path.glob(".samadapt*")) == []


def test_a_failed_write_leaves_the_older_file(
    axial: DicomSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, axial)
    before = (tmp_path / "seg.dcm").read_bytes()

    def full(self: Dataset, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hd.seg.Segmentation, "save_as", full)
    with pytest.raises(DicomError, match=r"could not be written \(No space left on device\)"):
        write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, axial)
    assert (tmp_path / "seg.dcm").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seg.dcm", "series"]


# --- reading ---


def test_files_that_are_no_segmentation(axial: DicomSeries, tmp_path: Path) -> None:
    (tmp_path / "text.dcm").write_text("no segmentation" * 50)
    for path in (tmp_path / "text.dcm", axial.paths[0], tmp_path / "absent.dcm"):
        with pytest.raises(DicomError, match="A DICOM segmentation was wanted"):
            read_segmentation(path, axial)


def test_damaged_segmentations_give_masks_or_a_sentence(axial: DicomSeries, tmp_path: Path) -> None:
    write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, axial)
    sound = (tmp_path / "seg.dcm").read_bytes()
    random_bytes = np.random.default_rng(4)
    refusals = 0
    for _ in range(120):
        damaged = bytearray(sound)
        start = int(random_bytes.integers(128, len(sound) - 200))
        damaged[start : start + 1] = random_bytes.bytes(int(random_bytes.integers(0, 5)))
        (tmp_path / "seg.dcm").write_bytes(damaged)
        try:
            read_segmentation(tmp_path / "seg.dcm", axial)
        except DicomError:
            refusals += 1
    assert 0 < refusals < 120


def test_segmentations_of_another_series(axial: DicomSeries, tmp_path: Path) -> None:
    write_segmentation(tmp_path / "seg.dcm", drawn(), SEGMENTS, axial)
    larger = read_series(Sample(rows=12, uids=dict(SAMPLES["axial"].uids)).write(tmp_path / "larger"))
    with pytest.raises(DicomError, match="12 x 13 pixels was wanted"):
        read_segmentation(tmp_path / "seg.dcm", larger)
    moved = Sample(origin=(-12.25, 31.5, -40.125), uids=dict(SAMPLES["axial"].uids))
    with pytest.raises(DicomError, match=r"lies 1\.00 mm from the nearest"):
        read_segmentation(tmp_path / "seg.dcm", read_series(moved.write(tmp_path / "moved")))
    turned = Sample(((0, 1, 0), (-1, 0, 0)), uids=dict(SAMPLES["axial"].uids))
    with pytest.raises(DicomError, match=r"lies 0\.00 mm from the nearest one or is turned"):
        read_segmentation(tmp_path / "seg.dcm", read_series(turned.write(tmp_path / "turned")))
    with pytest.raises(DicomError, match="frame of reference"):
        read_segmentation(tmp_path / "seg.dcm", read_series(Sample().write(tmp_path / "other")))


@pytest.mark.parametrize("kind", ["LABELMAP", "FRACTIONAL"])
def test_other_kinds_of_segmentation_are_read(kind: str, axial: DicomSeries, tmp_path: Path) -> None:
    numbered = np.select([drawn() == 3, drawn() == 7, drawn() == 12], [1, 2, 3]).astype(np.uint8)
    pixels: NDArray[Any] = numbered
    if kind == "FRACTIONAL":
        pixels = np.stack([np.where(numbered == n, 0.75, 0.25) for n in (1, 2, 3)], axis=-1)
    descriptions = [
        hd.seg.SegmentDescription(
            n, f"s{n}", hd.sr.CodedConcept("1", "X", "y"), hd.sr.CodedConcept("1", "X", "y"), "MANUAL"
        )
        for n in (1, 2, 3)
    ]
    dataset = hd.seg.Segmentation(
        [*axial.headers], pixels, kind, descriptions, hd.UID(), 1, hd.UID(), 1, "a", "b", "c", "d"
    )
    dataset.save_as(tmp_path / "seg.dcm")
    back = read_segmentation(tmp_path / "seg.dcm", axial)
    np.testing.assert_array_equal(back.labels(), numbered)
    assert bool(back.warnings) == (kind == "FRACTIONAL")
