"""Real DICOM series stand in the scene where their headers say, and masks survive its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from SAMAdaptLib.dicom import read_series
from SAMAdaptSlicer.segments import add_segment, new_segmentation, read_mask, write_mask
from SAMAdaptSlicer.transforms import copy_parent_transform
from SAMAdaptSlicer.volumes import geometry_from_node, volume_from_node


@pytest.mark.parametrize("name", ["ct_head_gantry_tilt", "mr_brain_tumour_oblique"])
def test_real_series_in_the_scene(headless: Any, shared_data: Path, tmp_path: Path, name: str) -> None:
    volume = read_series(shared_data / "dicom" / name).volume
    node = headless.add_volume_node(volume)
    assert geometry_from_node(node).same_grid(volume.geometry, 1e-6)
    assert np.array_equal(volume_from_node(node).voxels, volume.voxels)

    voxels = volume.voxels.astype(np.float64)
    mask = voxels > np.percentile(voxels, 90)
    segmentation_node = new_segmentation(node)
    segment_id = add_segment(segmentation_node, "bright")
    write_mask(segmentation_node, segment_id, mask, node)
    assert np.array_equal(read_mask(segmentation_node, segment_id, node), mask)
    headless.save_segmentation(segmentation_node, tmp_path / "bright.seg.nrrd")
    loaded = headless.load_segmentation(tmp_path / "bright.seg.nrrd")
    copy_parent_transform(node, loaded)  # a segmentation file holds no transform
    loaded_id = loaded.GetSegmentation().GetNthSegmentID(0)
    assert np.array_equal(read_mask(loaded, loaded_id, node), mask)
