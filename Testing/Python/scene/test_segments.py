"""Writing one segment: exactly, only the changed box, and nothing of its neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import slicer
from numpy.typing import NDArray

from SAMAdaptLib.dicom.terminology import terminology_for
from SAMAdaptLib.errors import GeometryError, VolumeError
from SAMAdaptSlicer import labelmaps
from SAMAdaptSlicer.labelmaps import Patch, patch_of_mask, patch_to_image
from SAMAdaptSlicer.segments import (
    SegmentDescription,
    add_segment,
    describe_segment,
    labelmap_of,
    new_segmentation,
    read_mask,
    write_mask,
)

from .phantoms import GRIDS, apply

SHAPE = (7, 9, 11)


def block(k: slice, j: slice, i: slice) -> NDArray[np.bool_]:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[k, j, i] = True
    return mask


FIRST = block(slice(1, 5), slice(2, 6), slice(3, 9))
SECOND = block(slice(3, 7), slice(4, 9), slice(0, 5))


@pytest.fixture
def volume_node(add_volume: Any) -> Any:
    return add_volume(GRIDS["left-handed oblique"], SHAPE)


@pytest.fixture
def segmentation_node(volume_node: Any) -> Any:
    return new_segmentation(volume_node)


def extent(segmentation_node: Any, segment_id: str) -> tuple[int, ...]:
    return tuple(labelmap_of(segmentation_node.GetSegmentation().GetSegment(segment_id)).GetExtent())


def test_only_the_changed_box_is_replaced(segmentation_node: Any, volume_node: Any) -> None:
    segment_id = add_segment(segmentation_node, "a")
    write_mask(segmentation_node, segment_id, FIRST, volume_node)
    new = np.random.default_rng(0).random(SHAPE) < 0.5
    box = (slice(2, 4), slice(0, 5), slice(4, 11))
    write_mask(segmentation_node, segment_id, new, volume_node, box)
    expected = FIRST.copy()
    expected[box] = new[box]
    assert np.array_equal(read_mask(segmentation_node, segment_id, volume_node), expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_slice_is_replaced_while_others_stay(segmentation_node: Any, volume_node: Any, axis: int) -> None:
    segment_id = add_segment(segmentation_node, "a")
    write_mask(segmentation_node, segment_id, FIRST, volume_node)
    for index in (4, 0, 3):  # inside the object, outside of it, inside again
        box: list[slice] = [slice(None)] * 3
        box[axis] = slice(index, index + 1)
        write_mask(segmentation_node, segment_id, SECOND, volume_node, (box[0], box[1], box[2]))
    expected = np.moveaxis(FIRST.copy(), axis, 0)
    for index in (4, 0, 3):
        expected[index] = np.moveaxis(SECOND, axis, 0)[index]
    expected = np.moveaxis(expected, 0, axis)
    assert np.array_equal(read_mask(segmentation_node, segment_id, volume_node), expected)


def test_voxels_beyond_the_volume_survive_a_write_inside_it(segmentation_node: Any, volume_node: Any) -> None:
    segment_id = add_segment(segmentation_node, "a")
    outside = Patch(np.ones((2, 2, 2), dtype=np.uint8), (-3, -2, 9))  # somebody painted past the edge
    slicer.vtkSlicerSegmentationsModuleLogic.SetBinaryLabelmapToSegment(
        patch_to_image(outside, GRIDS["left-handed oblique"]), segmentation_node, segment_id
    )
    write_mask(segmentation_node, segment_id, FIRST, volume_node, (slice(None), slice(None), slice(None)))
    assert np.array_equal(read_mask(segmentation_node, segment_id, volume_node), FIRST)
    assert extent(segmentation_node, segment_id) == (3, 10, -2, 5, -3, 4)


def test_empty_mask_clears_the_segment(segmentation_node: Any, volume_node: Any) -> None:
    segment_id = add_segment(segmentation_node, "a")
    write_mask(segmentation_node, segment_id, FIRST, volume_node)
    assert write_mask(segmentation_node, segment_id, np.zeros(SHAPE, dtype=bool), volume_node) is None
    assert not read_mask(segmentation_node, segment_id, volume_node).any()


def test_only_the_objects_box_is_kept_and_copied(add_volume: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (60, 100, 120)
    node = add_volume(GRIDS["sheared"], shape)
    segmentation_node = new_segmentation(node)
    segment_id = add_segment(segmentation_node, "a")
    mask = np.zeros(shape, dtype=np.uint8)
    mask[10:14, 20:50, 30:37] = 1
    copied: list[int] = []
    copy = labelmaps.numpy_to_vtk

    def counting(array: NDArray[Any], **options: Any) -> Any:
        copied.append(array.nbytes)
        return copy(array, **options)

    monkeypatch.setattr(labelmaps, "numpy_to_vtk", counting)
    patch = write_mask(segmentation_node, segment_id, mask, node)
    assert patch is not None
    assert patch.box_kji == (slice(10, 14), slice(20, 50), slice(30, 37))
    assert copied == [4 * 30 * 7]
    assert extent(segmentation_node, segment_id) == (30, 36, 20, 49, 10, 13)

    mask[12] = 0
    mask[12, 20:22, 30:32] = 1
    write_mask(segmentation_node, segment_id, mask, node, (slice(12, 13), slice(15, 60), slice(25, 40)))
    assert copied == [4 * 30 * 7] * 2
    assert np.array_equal(read_mask(segmentation_node, segment_id, node), mask != 0)


def test_mask_of_any_nonzero_value_counts(segmentation_node: Any, volume_node: Any) -> None:
    segment_id = add_segment(segmentation_node, "a")
    labels = FIRST.astype(np.uint8) * 200
    write_mask(segmentation_node, segment_id, labels, volume_node)
    assert np.array_equal(read_mask(segmentation_node, segment_id, volume_node), FIRST)


@pytest.mark.parametrize("mask", [SECOND, np.zeros(SHAPE, dtype=bool)])
def test_segments_of_a_shared_layer_are_not_touched(
    segmentation_node: Any, volume_node: Any, mask: NDArray[np.bool_]
) -> None:
    ids = [add_segment(segmentation_node, name) for name in "abc"]
    masks = [FIRST, SECOND & ~FIRST, ~(FIRST | SECOND)]
    for segment_id, part in zip(ids, masks, strict=True):
        write_mask(segmentation_node, segment_id, part, volume_node)
    segmentation = segmentation_node.GetSegmentation()
    segmentation.CollapseBinaryLabelmaps(False)
    assert segmentation.GetNumberOfLayers() == 1
    write_mask(segmentation_node, ids[0], mask, volume_node)
    for segment_id, part in zip(ids, [mask, *masks[1:]], strict=True):
        assert np.array_equal(read_mask(segmentation_node, segment_id, volume_node), part)


@pytest.mark.parametrize("first", ["new", "emptied", "written and emptied"])
def test_merging_layers_with_an_empty_segment_moves_nobody(
    segmentation_node: Any, volume_node: Any, first: str
) -> None:
    ids = [add_segment(segmentation_node, name) for name in "abc"]
    if first == "written and emptied":
        write_mask(segmentation_node, ids[0], FIRST, volume_node)
    if first != "new":
        write_mask(segmentation_node, ids[0], np.zeros(SHAPE, dtype=bool), volume_node)
    write_mask(segmentation_node, ids[1], SECOND, volume_node)
    segmentation_node.GetSegmentation().CollapseBinaryLabelmaps(False)
    assert np.array_equal(read_mask(segmentation_node, ids[1], volume_node), SECOND)


def test_segment_of_another_grid_is_read_by_nearest_voxel(add_volume: Any) -> None:
    coarse = add_volume(np.diag([2.0, 2.0, 2.0, 1.0]), (4, 5, 6))
    fine = add_volume(np.diag([1.0, 1.0, 1.0, 1.0]), (8, 10, 12))
    segmentation_node = new_segmentation(coarse)
    segment_id = add_segment(segmentation_node, "a")
    mask = np.random.default_rng(1).random((4, 5, 6)) < 0.4
    write_mask(segmentation_node, segment_id, mask, coarse)
    k, j, i = np.indices((8, 10, 12))
    nearest = np.floor(np.stack([k, j, i]) / 2 + 0.5).astype(int)  # voxel centres coincide at even indices
    padded = np.pad(mask, 1)
    expected = padded[tuple(nearest + 1)]
    assert np.array_equal(read_mask(segmentation_node, segment_id, fine), expected)


def test_writing_on_another_grid_keeps_the_neighbours_grid(add_volume: Any) -> None:
    node = add_volume(GRIDS["oblique"], SHAPE)
    segmentation_node = new_segmentation(node)
    ids = [add_segment(segmentation_node, name) for name in "ab"]
    write_mask(segmentation_node, ids[0], FIRST, node)
    write_mask(segmentation_node, ids[1], SECOND & ~FIRST, node)
    segmentation_node.GetSegmentation().CollapseBinaryLabelmaps(False)
    other = add_volume(GRIDS["oblique"] @ np.diag([2.0, 2.0, 2.0, 1.0]), (4, 5, 6))
    mask = np.zeros((4, 5, 6), dtype=bool)
    mask[0, 1:3, 4:] = True  # where the neighbour has no voxel, so that Slicer sees no overlap
    write_mask(segmentation_node, ids[0], mask, other)
    assert np.array_equal(read_mask(segmentation_node, ids[0], other), mask)
    assert np.array_equal(read_mask(segmentation_node, ids[1], node), SECOND & ~FIRST)


def test_patches_agree_with_plain_arrays() -> None:
    rng = np.random.default_rng(5)
    frame = Patch(np.zeros((12, 13, 14), dtype=np.uint8), (-2, -1, -3))
    for _ in range(60):
        parts = []
        for _ in range(2):
            mask = np.zeros((8, 9, 10), dtype=np.uint8)
            mask[tuple(rng.integers(0, 8, 3))] = 1
            mask[tuple(rng.integers(0, 8, 3))] = 7
            found = patch_of_mask(mask)
            assert found is not None
            shift = rng.integers(-2, 3, 3)
            parts.append(Patch(found.voxels, tuple(int(v) for v in np.add(found.start_kji, shift))))
        a, b = (labelmaps.within(part, frame) for part in parts)
        assert np.array_equal(labelmaps.within(labelmaps.union(*parts), frame), a | b)
        box = tuple(slice(int(low), int(low + 4)) for low in rng.integers(-2, 5, 3))
        inside = tuple(slice(p.start - s, p.stop - s) for p, s in zip(box, frame.start_kji, strict=True))
        cleared = a.copy()
        cleared[tuple(slice(max(p.start, 0), p.stop) for p in inside)] = 0
        assert np.array_equal(labelmaps.within(labelmaps.without_box(parts[0], box), frame), cleared)


def test_terminology_and_colour(segmentation_node: Any) -> None:
    line = terminology_for("left kidney").to_slicer()
    segment_id = add_segment(segmentation_node, "Left kidney", (0.2, 0.4, 1.0), line)
    assert describe_segment(segmentation_node, segment_id) == SegmentDescription(
        "Left kidney", (51, 102, 255), line
    )
    assert "64033007^Kidney" in segmentation_node.GetSegmentation().GetSegment(segment_id).GetTerminology()


def test_slicer_understands_the_terminology(segmentation_node: Any) -> None:
    terminology = terminology_for("right kidney")
    segment_id = add_segment(segmentation_node, "Right kidney", terminology=terminology.to_slicer())
    entry = slicer.vtkSlicerTerminologyEntry()
    line = segmentation_node.GetSegmentation().GetSegment(segment_id).GetTerminology()
    assert slicer.vtkSlicerTerminologiesModuleLogic().DeserializeTerminologyEntry(line, entry)
    found = [
        (part.GetCodingSchemeDesignator(), part.GetCodeValue(), part.GetCodeMeaning())
        for part in (entry.GetCategoryObject(), entry.GetTypeObject(), entry.GetTypeModifierObject())
    ]
    wanted = [
        (code.scheme, code.value, code.meaning)
        for code in (terminology.category, terminology.type, terminology.type_modifier)
        if code is not None
    ]
    assert found == wanted


def test_written_segment_is_in_progress_and_a_finished_one_stays_finished(
    segmentation_node: Any, volume_node: Any
) -> None:
    logic = slicer.vtkSlicerSegmentationsModuleLogic
    first, second = (add_segment(segmentation_node, name) for name in "ab")
    segmentation = segmentation_node.GetSegmentation()
    logic.SetSegmentStatus(segmentation.GetSegment(second), logic.Completed)
    write_mask(segmentation_node, first, FIRST, volume_node)
    write_mask(segmentation_node, second, SECOND, volume_node)
    assert logic.GetSegmentStatus(segmentation.GetSegment(first)) == logic.InProgress
    assert logic.GetSegmentStatus(segmentation.GetSegment(second)) == logic.Completed


def test_new_segmentation_takes_the_volume_as_reference(segmentation_node: Any, volume_node: Any) -> None:
    role = segmentation_node.GetReferenceImageGeometryReferenceRole()
    assert segmentation_node.GetNodeReference(role) is volume_node
    corner = apply(GRIDS["left-handed oblique"], np.array([10.0, 8.0, 6.0]))
    image = slicer.vtkOrientedImageData()
    name = slicer.vtkSegmentationConverter.GetReferenceImageGeometryParameterName()
    text = segmentation_node.GetSegmentation().GetConversionParameter(name)
    slicer.vtkSegmentationConverter.DeserializeImageGeometry(text, image, False)
    np.testing.assert_allclose(
        apply(labelmaps.image_matrix(image), np.array([10.0, 8, 6])), corner, atol=1e-6
    )
    assert image.GetExtent() == (0, 10, 0, 8, 0, 6)


def test_bad_input_is_refused_and_nothing_is_written(segmentation_node: Any, volume_node: Any) -> None:
    segment_id = add_segment(segmentation_node, "a")
    write_mask(segmentation_node, segment_id, FIRST, volume_node)
    with pytest.raises(GeometryError, match=r"\(7, 9, 11\).*\(9, 7, 11\)"):
        write_mask(segmentation_node, segment_id, np.ones((9, 7, 11), dtype=bool), volume_node)
    with pytest.raises(VolumeError, match="segment to write into"):
        write_mask(segmentation_node, "gone", FIRST, volume_node)
    with pytest.raises(VolumeError, match="removed"):
        write_mask(None, segment_id, FIRST, volume_node)
    assert np.array_equal(read_mask(segmentation_node, segment_id, volume_node), FIRST)


def test_removed_nodes_are_not_written_to(scene: Any, segmentation_node: Any, volume_node: Any) -> None:
    """What a prediction finds when the user closed the scene or deleted a node while it ran."""
    segment_id = add_segment(segmentation_node, "a")
    write_mask(segmentation_node, segment_id, FIRST, volume_node)
    scene.RemoveNode(volume_node)
    with pytest.raises(VolumeError, match="removed"):
        write_mask(segmentation_node, segment_id, SECOND, volume_node)
    scene.RemoveNode(segmentation_node)
    with pytest.raises(VolumeError, match="removed"):
        write_mask(segmentation_node, segment_id, SECOND, volume_node)
    image = labelmap_of(segmentation_node.GetSegmentation().GetSegment(segment_id))
    assert image.GetExtent() == (3, 8, 2, 5, 1, 4)


def test_segmentation_of_surfaces_is_refused(segmentation_node: Any, volume_node: Any) -> None:
    segment_id = add_segment(segmentation_node, "a")
    write_mask(segmentation_node, segment_id, FIRST, volume_node)
    segmentation_node.CreateClosedSurfaceRepresentation()
    converter = slicer.vtkSegmentationConverter
    segmentation_node.GetSegmentation().SetSourceRepresentationName(
        converter.GetClosedSurfaceRepresentationName()
    )
    with pytest.raises(VolumeError, match="Binary labelmap"):
        write_mask(segmentation_node, segment_id, SECOND, volume_node)


def test_volume_without_voxels_is_refused(scene: Any, segmentation_node: Any) -> None:
    segment_id = add_segment(segmentation_node, "a")
    empty = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode")
    with pytest.raises(VolumeError, match="voxels"):
        write_mask(segmentation_node, segment_id, FIRST, empty)
