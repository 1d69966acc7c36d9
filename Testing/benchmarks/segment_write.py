"""How long it takes to write a prediction into a segment, against Slicer's own writer, in one process.

A 512 x 512 x 300 volume and an object of about 2.0 million voxels that changes a little with every write.
Medians over the given number of writes, after one that does not count; every way is checked to have written:

    fast path           write_mask: crop to the object, SetBinaryLabelmapToSegment
    fast path, box      the same when only one slice of the object changed
    full array          SetBinaryLabelmapToSegment with the whole array
    slicer.util         slicer.util.updateSegmentBinaryLabelmapFromArray
    by rules            SegmentWriter with another segment in the way, and a state for undo
    editor alone        its ModifySegmentByLabelmap ("set") with the cropped mask, other segment, no undo

    python Testing/benchmarks/segment_write.py [--repeats 9] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "SAMAdapt"))

import slicer.util

from SAMAdaptLib.files import atomic_path
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.volume import Volume
from SAMAdaptSlicer.editing import SegmentWriter
from SAMAdaptSlicer.headless import boot
from SAMAdaptSlicer.labelmaps import Patch, patch_of_mask, patch_to_image
from SAMAdaptSlicer.segments import add_segment, grid_in_segmentation, new_segmentation, read_mask, write_mask

SHAPE = (300, 512, 512)
CENTRE = (150, 240, 260)
HALF_AXES = (60, 90, 90)
SLICE = (slice(150, 151), slice(None), slice(None))
Mask = NDArray[np.uint8]


class Bench:
    """A volume, an edited and an other segment, and masks that differ from write to write."""

    def __init__(self) -> None:
        scene = boot().scene
        matrix = np.diag([-0.8, -0.8, 1.5, 1.0])
        voxels = np.zeros(SHAPE, dtype=np.int16)
        self.volume_node = boot().add_volume_node(Volume(voxels, Geometry(SHAPE, matrix)))
        self.segmentation_node = new_segmentation(self.volume_node)
        self.edited, self.other = (add_segment(self.segmentation_node, name) for name in ("edited", "other"))
        self.affine = grid_in_segmentation(self.volume_node, self.segmentation_node)
        self.masks = (ellipsoid(0), ellipsoid(1))
        editor_node = scene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
        editor_node.SetOverwriteMode(editor_node.OverwriteAllSegments)
        logic = slicer.vtkSlicerSegmentEditorLogic()
        logic.SetMRMLScene(scene)
        self.logic = logic
        self.writer = SegmentWriter(logic, editor_node)

    def fast(self, mask: Mask) -> None:
        write_mask(self.segmentation_node, self.edited, mask, self.volume_node)

    def fast_one_slice(self, mask: Mask) -> None:
        write_mask(self.segmentation_node, self.edited, mask, self.volume_node, SLICE)

    def by_rules(self, mask: Mask) -> None:
        self.writer.write(self.segmentation_node, self.edited, mask, self.volume_node)

    def editor_alone(self, mask: Mask) -> None:
        patch = patch_of_mask(mask)
        if patch is None:
            raise RuntimeError("an object was wanted, but the mask is empty")
        image = patch_to_image(patch, self.affine)
        mode = self.logic.ModificationModeSet
        self.logic.ModifySegmentByLabelmap(self.segmentation_node, self.edited, image, mode, False, False)

    def by_slicer(self, mask: Mask) -> None:
        slicer.util.updateSegmentBinaryLabelmapFromArray(
            mask, self.segmentation_node, self.edited, self.volume_node
        )

    def full_array(self, mask: Mask) -> None:
        image = patch_to_image(Patch(mask, (0, 0, 0)), self.affine)
        slicer.vtkSlicerSegmentationsModuleLogic.SetBinaryLabelmapToSegment(
            image, self.segmentation_node, self.edited
        )

    def neighbour(self) -> None:
        """Put the other segment beside the object, inside its box, so that overwriting has work."""
        write_mask(self.segmentation_node, self.other, np.roll(self.masks[0], 120, axis=2), self.volume_node)

    def measure(self, write: Callable[[Mask], None], repeats: int) -> float:
        """Median milliseconds; every write is checked to have arrived."""
        times = []
        for mask in alternating(self.masks, repeats + 1):
            start = time.perf_counter()
            write(mask)
            times.append(1000 * (time.perf_counter() - start))
        found = read_mask(self.segmentation_node, self.edited, self.volume_node)
        if write == self.fast_one_slice:  # only this slice was to be replaced
            found, mask = found[SLICE], mask[SLICE]
        if not np.array_equal(found, mask != 0):
            raise RuntimeError(f"{write.__name__} did not write the mask that it was given")
        return statistics.median(times[1:])


def alternating(masks: tuple[Mask, Mask], count: int) -> Iterator[Mask]:
    return (masks[n % 2] for n in range(count))


def ellipsoid(grown: int) -> Mask:
    k, j, i = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    axes = [half + grown for half in HALF_AXES]
    return (
        ((k - CENTRE[0]) / axes[0]) ** 2 + ((j - CENTRE[1]) / axes[1]) ** 2 + ((i - CENTRE[2]) / axes[2]) ** 2
        <= 1
    ).astype(np.uint8)


def run(repeats: int) -> dict[str, Any]:
    bench = Bench()
    milliseconds = {
        "fast path": bench.measure(bench.fast, repeats),
        "fast path, box": bench.measure(bench.fast_one_slice, repeats),
        "full array": bench.measure(bench.full_array, repeats),
        "slicer.util": bench.measure(bench.by_slicer, repeats),
    }
    bench.neighbour()
    milliseconds["by rules"] = bench.measure(bench.by_rules, repeats)
    bench.neighbour()
    milliseconds["editor alone"] = bench.measure(bench.editor_alone, repeats)
    return {
        "shape_kji": SHAPE,
        "object_voxels": int(bench.masks[0].sum()),
        "repeats": repeats,
        "milliseconds": milliseconds,
        "times_faster_than_slicer_util": {
            name: milliseconds["slicer.util"] / value for name, value in milliseconds.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    result = run(arguments.repeats)
    print(f"{'way to write':18s} {'median ms':>10s} {'against slicer.util':>20s}")
    for name, value in sorted(result["milliseconds"].items(), key=lambda item: item[1]):
        ratio = result["times_faster_than_slicer_util"][name]
        print(f"{name:18s} {value:10.1f} {ratio:18.1f} x")
    if arguments.json is not None:
        with atomic_path(arguments.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
