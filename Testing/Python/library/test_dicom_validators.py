"""Our segmentations before other people's eyes: the validator dciodvfy and dcmqi's reader."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from SAMAdaptLib.dicom import (
    Code,
    DicomSeries,
    Segment,
    Terminology,
    read_series,
    terminology_for,
    write_segmentation,
    write_torso_phantom,
)
from Testing.dicom_samples import SAGITTAL, Sample, rotated, save


def _dcmqi_reader() -> str | None:
    """Find dcmqi's reader: on the path, or where pip put it."""
    found = shutil.which("segimage2itkimage")
    if found:
        return found
    try:
        files = importlib.metadata.distribution("dcmqi").files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    names = ("segimage2itkimage", "segimage2itkimage.exe")
    inside = [Path(str(file.locate())) for file in files if file.name in names and "dcmqi" in file.parts]
    return str(inside[0]) if inside and sys.platform != "win32" else None


DCIODVFY = shutil.which("dciodvfy")
SEGIMAGE2ITKIMAGE = _dcmqi_reader()

SAMPLES = {
    "axial": Sample(columns=16),
    "sagittal": Sample(SAGITTAL),
    "oblique": Sample(rotated((20, -35, 50))),
    "one slice": Sample(steps=(0,)),
    "tilted": Sample(shift_per_mm=(0, 0.33, 0)),
    "uneven": Sample(steps=(0, 2, 4, 6, 9.5, 13)),
    "multiframe": Sample(rotated((5, 6, 7))),
}
READ_BY_DCMQI = ("axial", "sagittal", "oblique", "multiframe")

SEGMENTS = (
    Segment(1, "Liver", terminology_for("liver"), (221, 130, 101), algorithm_version="1"),
    Segment(2, "Left kidney", terminology_for("left kidney"), (185, 102, 83), "AUTOMATIC", "MA-SAM", "2"),
    Segment(
        3,
        "Knoten 肝臓",
        Terminology(
            Code("SCT", "49755003", "Morphologically Altered Structure"),
            Code("SCT", "4147007", "Mass"),
            None,
            Code("SCT", "39607008", "Lung"),
            Code("SCT", "7771000", "Left"),
        ),
        (200, 90, 11),
        "MANUAL",
        tracking_id="lesion 1",
        tracking_uid="1.2.826.0.1.3680043.8.498.1",
        description="drawn by hand",
    ),
)


def drawn(shape_kji: tuple[int, int, int]) -> NDArray[np.uint8]:
    labels = np.zeros(shape_kji, np.uint8)
    labels[: max(1, shape_kji[0] - 2), 2:5, 1:7] = 1
    labels[-1, 6:9, 3:11] = 2
    labels[shape_kji[0] // 2, 9, 12] = 3
    return labels


@pytest.fixture(params=SAMPLES, name="kind")
def every_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def series_of(kind: str, folder: Path) -> DicomSeries:
    if kind != "multiframe":
        return read_series(SAMPLES[kind].write(folder / "series"))
    save(SAMPLES[kind].enhanced([3, 0, 5, 1, 4, 2], per_frame=True), folder / "multi.dcm")
    return read_series(folder / "multi.dcm")


def validator_errors(path: Path) -> list[str]:
    finished = subprocess.run([str(DCIODVFY), str(path)], capture_output=True, text=True, check=False)
    errors = [line for line in finished.stderr.splitlines() if line.startswith("Error")]
    assert finished.returncode == bool(errors)
    assert "Segmentation" in finished.stderr or "CTImage" in finished.stderr  # it knows what it looks at
    return errors


@pytest.mark.skipif(DCIODVFY is None, reason="dciodvfy (package dicom3tools) is not installed")
def test_dciodvfy_finds_no_error(kind: str, tmp_path: Path) -> None:
    series = series_of(kind, tmp_path)
    write_segmentation(tmp_path / "seg.dcm", drawn(series.volume.geometry.shape_kji), SEGMENTS, series)
    assert validator_errors(tmp_path / "seg.dcm") == []


@pytest.mark.skipif(DCIODVFY is None, reason="dciodvfy (package dicom3tools) is not installed")
def test_dciodvfy_finds_no_error_in_overlapping_segments(tmp_path: Path) -> None:
    series = series_of("oblique", tmp_path)
    labels = drawn(series.volume.geometry.shape_kji)
    write_segmentation(tmp_path / "seg.dcm", [labels == 1, labels > 0], SEGMENTS[:2], series)
    assert validator_errors(tmp_path / "seg.dcm") == []


@pytest.mark.skipif(DCIODVFY is None, reason="dciodvfy (package dicom3tools) is not installed")
def test_dciodvfy_finds_no_error_in_the_phantom(tmp_path: Path) -> None:
    files = write_torso_phantom(tmp_path, shape_kji=(3, 16, 16), spacing_ijk_mm=(20, 20, 40))
    assert [validator_errors(path) for path in files] == [[], [], []]


@pytest.mark.skipif(SEGIMAGE2ITKIMAGE is None, reason="segimage2itkimage (package dcmqi) is not installed")
@pytest.mark.parametrize("kind", READ_BY_DCMQI)
def test_dcmqi_reads_the_same_voxels_and_words(kind: str, tmp_path: Path) -> None:
    series = series_of(kind, tmp_path)
    labels = drawn(series.volume.geometry.shape_kji)
    write_segmentation(tmp_path / "seg.dcm", labels, SEGMENTS, series)
    out = tmp_path / "out"
    out.mkdir()
    command = [
        str(SEGIMAGE2ITKIMAGE),
        "--inputDICOM",
        str(tmp_path / "seg.dcm"),
        "--outputDirectory",
        str(out),
    ]
    environment = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run([*command, "--mergeSegments"], check=True, capture_output=True, env=environment)
    (image_path,) = out.glob("*.nrrd")
    np.testing.assert_array_equal(on_grid_of(series, sitk.ReadImage(str(image_path))), labels)
    (meta_path,) = out.glob("*.json")
    described = [one for group in json.loads(meta_path.read_text())["segmentAttributes"] for one in group]
    assert [one["SegmentLabel"] for one in described] == [segment.name for segment in SEGMENTS]
    kidney, node = described[1:]
    assert kidney["SegmentedPropertyTypeModifierCodeSequence"]["CodeMeaning"] == "Left"
    assert kidney["SegmentAlgorithmName"] == "MA-SAM"
    assert node["AnatomicRegionModifierSequence"]["CodeMeaning"] == "Left"


def on_grid_of(series: DicomSeries, image: sitk.Image) -> NDArray[np.uint8]:
    """Look up every voxel of the series in an image, by place; dcmqi may crop or turn its images."""
    geometry = series.volume.geometry
    k, j, i = np.indices(geometry.shape_kji)
    points_lps = geometry.ijk_to_ras(np.column_stack([i.ravel(), j.ravel(), k.ravel()])) * (-1, -1, 1)
    found = np.zeros(k.size, np.uint8)
    for n, point in enumerate(points_lps.tolist()):
        index = image.TransformPhysicalPointToContinuousIndex(point)
        nearest = [round(value) for value in index]
        if all(0 <= value < size for value, size in zip(nearest, image.GetSize(), strict=True)):
            assert np.abs(np.subtract(index, nearest)).max() < 0.01
            found[n] = image[nearest]
    return found.reshape(geometry.shape_kji)
