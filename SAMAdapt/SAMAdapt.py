"""SAMAdapt in 3D Slicer: the module's description, its logic and its self-test.

Nothing slow is imported here: Slicer loads every module at start-up.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
)

# An installed extension has SAMAdaptLib beside this file. In the source tree it lies one folder up, and
# Slicer puts only this folder on the path.
if importlib.util.find_spec("SAMAdaptLib") is None:
    sys.path.append(str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from SAMAdaptLib.models.predictor import VolumePredictor
    from SAMAdaptLib.session import Session


class SAMAdapt(ScriptedLoadableModule):
    """What Slicer shows of the module."""

    def __init__(self, parent: Any) -> None:
        super().__init__(parent)
        parent.title = "SAMAdapt"
        parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        parent.dependencies = ["Segmentations", "Markups"]
        parent.contributors = ["The SAMAdapt authors"]
        parent.helpText = _(
            "Segments organs and lesions in CT, MR and ultrasound volumes from a few clicks or boxes, with "
            "adapted Segment Anything models that run on this computer. For research use; "
            "not a medical device."
        )
        parent.acknowledgementText = _("Built on the published work that each model names on its card.")
        parent.hidden = True  # it has no panel yet


class SAMAdaptLogic(ScriptedLoadableModuleLogic):
    """Segments volume nodes; works without a window.

    Args:
        load_predictor: Gives the model when it is first needed; None for the default model.
    """

    def __init__(self, load_predictor: Callable[[], VolumePredictor] | None = None) -> None:
        super().__init__()
        from SAMAdaptSlicer.segmenting import SceneSegmenter

        self._segmenter = SceneSegmenter(load_predictor)

    def segment(
        self,
        volume_node: Any,
        prompt_nodes: Iterable[Any],
        segmentation_node: Any,
        segment_id: str,
        slices: range | None = None,
        writer: Any = None,
    ) -> Session:
        """Segment an object from prompt nodes into a segment, as `SceneSegmenter.segment`."""
        return self._segmenter.segment(
            volume_node, prompt_nodes, segmentation_node, segment_id, slices, writer
        )


class SAMAdaptTest(ScriptedLoadableModuleTest):
    """Runs inside Slicer ("Reload and Test") and, with stand-ins for Slicer's base classes, without it."""

    def setUp(self) -> None:
        """Start from an empty scene."""
        import slicer

        slicer.mrmlScene.Clear()

    def runTest(self) -> None:
        """Run every test of this class."""
        self.setUp()
        self.test_box_becomes_a_segment()

    def test_box_becomes_a_segment(self) -> None:
        """A model that fills its box fills the voxels of a region of interest, slice by slice."""
        import numpy as np
        import slicer
        from vtk.util.numpy_support import numpy_to_vtk

        from SAMAdaptLib.prompts import Box, Prompts
        from SAMAdaptSlicer.markups import add_prompt_nodes
        from SAMAdaptSlicer.segments import add_segment, new_segmentation, read_mask

        shape = (6, 20, 30)
        image = slicer.vtkOrientedImageData()
        image.SetDimensions(*shape[::-1])
        image.GetPointData().SetScalars(numpy_to_vtk(np.zeros(np.prod(shape), dtype=np.int16), deep=True))
        volume_node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode")
        volume_node.SetAndObserveImageData(image)
        volume_node.SetSpacing(0.8, 0.8, 3.0)
        volume_node.SetIJKToRASDirections(-1, 0, 0, 0, -1, 0, 0, 0, 1)
        prompts = Prompts(
            (Box.from_corners((-4.0, -3.2, 3.0), (-12.0, -9.6, 12.0)),)
        )  # I 5..15, J 4..12, K 1..4
        nodes = add_prompt_nodes(slicer.mrmlScene, prompts, volume_node)
        segmentation_node = new_segmentation(volume_node)
        segment_id = add_segment(segmentation_node, "box")
        logic = SAMAdaptLogic(_BoxFiller)
        logic.segment(volume_node, nodes, segmentation_node, segment_id, slices=range(1, 5))
        expected = np.zeros(shape, dtype=bool)
        expected[1:5, 4:13, 5:16] = True
        assert np.array_equal(read_mask(segmentation_node, segment_id, volume_node), expected)


class _BoxFiller:
    """A model for the self-test: the object is the box. It needs no torch and no file."""

    checkpoint_sha256 = ""

    def set_volume(self, volume: Any, axis: Any, window: Any) -> None:
        self._geometry, self._axis = volume.geometry, axis

    def predict(self, prompts: Any, slices: range | None = None) -> Any:
        import numpy as np

        from SAMAdaptLib.models.predictor import SliceMask

        ((index, pixels),) = prompts.on_slices(self._geometry, self._axis).items()
        x0, y0, x1, y1 = np.rint(pixels.box_xyxy).astype(int)
        for k in slices if slices is not None else [index]:
            labels = np.zeros(self._geometry.plane(self._axis, k).shape_yx, dtype=np.uint8)
            labels[y0 : y1 + 1, x0 : x1 + 1] = 1
            yield SliceMask(k, labels, 1.0)
