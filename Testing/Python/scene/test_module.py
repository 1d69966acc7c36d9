"""The Slicer module: it loads fast from source and install trees, and its logic runs on the real scene."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import slicer

from SAMAdaptLib.errors import PromptError, SAMAdaptError
from SAMAdaptLib.geometry import Axis
from SAMAdaptLib.models.predictor import SliceMask
from SAMAdaptLib.prompts import Box, Point, Prompts
from SAMAdaptLib.volume import IntensityWindow, Volume
from SAMAdaptSlicer.editing import SegmentWriter
from SAMAdaptSlicer.markups import add_prompt_nodes
from SAMAdaptSlicer.segmenting import SceneSegmenter
from SAMAdaptSlicer.segments import add_segment, new_segmentation, read_mask, write_mask

from .phantoms import GRIDS, TRANSFORMS, composed, ellipsoid

PROJECT = Path(__file__).resolve().parents[3]
SHAPE = (9, 12, 14)


class Bright:
    """A model that finds whatever is brighter than 100; refuses negative points."""

    card = SimpleNamespace(name="test.bright")
    checkpoint_sha256 = "0" * 64

    def set_volume(self, volume: Volume, axis: Axis, window: IntensityWindow) -> None:
        self.volume, self.axis = volume, axis

    def predict(self, prompts: Prompts, slices: range | None = None) -> Iterator[SliceMask]:
        prompted = prompts.on_slices(self.volume.geometry, self.axis)
        if any((pixels.labels == 0).any() for pixels in prompted.values()):
            raise PromptError("This model takes positive points only.")
        for index in slices if slices is not None else prompted:
            picture = self.volume.geometry.plane(self.axis, index).extract(self.volume.voxels)
            yield SliceMask(index, (picture > 100).astype(np.uint8), 0.9)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("above", TRANSFORMS)
def test_prompt_nodes_become_a_segment(
    scene: Any, add_volume: Any, add_transform: Any, grid: str, above: str
) -> None:
    to_world = composed(TRANSFORMS[above]) @ GRIDS[grid]
    centre, _, truth = ellipsoid(SHAPE, to_world)
    volume_node = add_volume(GRIDS[grid], voxels=np.where(truth, 200, -50).astype(np.int16))
    parent = None
    for matrix in TRANSFORMS[above]:
        parent = add_transform(matrix, parent)
    volume_node.SetAndObserveTransformNodeID(parent.GetID() if parent is not None else None)
    segmentation_node = new_segmentation(volume_node)
    segment_id = add_segment(segmentation_node, "object")
    nodes = add_prompt_nodes(scene, Prompts((Point(tuple(centre)),)), volume_node)
    count = SHAPE[{"K": 0, "J": 1, "I": 2}[Volume(truth, geometry_of(to_world)).geometry.acquisition_axis]]
    session = SceneSegmenter(Bright).segment(
        volume_node, nodes, segmentation_node, segment_id, slices=range(count)
    )
    assert np.array_equal(read_mask(segmentation_node, segment_id, volume_node), truth)
    assert len(session.confidence) == count
    assert session.record()["model"] == "test.bright"


def geometry_of(matrix: Any) -> Any:
    from SAMAdaptLib.geometry import Geometry

    return Geometry(SHAPE, matrix)


def test_writer_brings_rules_and_undo(scene: Any, add_volume: Any) -> None:
    truth = ellipsoid(SHAPE, GRIDS["oblique"])[2]
    volume_node = add_volume(GRIDS["oblique"], voxels=np.where(truth, 200, 0).astype(np.int16))
    segmentation_node = new_segmentation(volume_node)
    done, wanted = (add_segment(segmentation_node, name) for name in ("done", "wanted"))
    half = truth.copy()
    half[:, :, 7:] = False
    write_mask(segmentation_node, done, half, volume_node)
    editor_node = scene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
    editor_node.SetMaskMode(slicer.vtkMRMLSegmentationNode.EditAllowedOutsideAllSegments)
    logic = slicer.vtkSlicerSegmentEditorLogic()
    logic.SetMRMLScene(scene)
    writer = SegmentWriter(logic, editor_node)
    box = Box(tuple(ellipsoid(SHAPE, GRIDS["oblique"])[0]), (8, 8, 12))
    nodes = add_prompt_nodes(scene, Prompts((box,)))
    SceneSegmenter(Bright).segment(
        volume_node, nodes, segmentation_node, wanted, slices=range(SHAPE[0]), writer=writer
    )
    assert np.array_equal(read_mask(segmentation_node, wanted, volume_node), truth & ~half)
    assert np.array_equal(read_mask(segmentation_node, done, volume_node), half)
    assert writer.undo_stack.undo()
    assert not read_mask(segmentation_node, wanted, volume_node).any()


def test_failure_leaves_the_segment_as_it_was(scene: Any, add_volume: Any) -> None:
    truth = ellipsoid(SHAPE, np.eye(4))[2]
    volume_node = add_volume(voxels=np.where(truth, 200, 0).astype(np.int16))
    segmentation_node = new_segmentation(volume_node)
    segment_id = add_segment(segmentation_node, "object")
    write_mask(segmentation_node, segment_id, truth, volume_node)
    loads: list[int] = []

    def load() -> Bright:
        loads.append(1)
        return Bright()

    segmenter = SceneSegmenter(load)
    inside, outside = Point((6, 6, 4), positive=False), Point((600, 6, 4))
    for prompt in (inside, outside):
        nodes = add_prompt_nodes(scene, Prompts((prompt,)))
        with pytest.raises(PromptError):
            segmenter.segment(volume_node, nodes, segmentation_node, segment_id)
    with pytest.raises(SAMAdaptError, match="segment to write into"):
        segmenter.segment(volume_node, nodes, segmentation_node, "gone")
    assert len(loads) == 1  # loaded once, not per try
    assert np.array_equal(read_mask(segmentation_node, segment_id, volume_node), truth)


@pytest.fixture
def base_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the parts of Slicer that slicer-core does not carry."""
    base = ModuleType("slicer.ScriptedLoadableModule")

    class ScriptedLoadableModule:
        def __init__(self, parent: Any) -> None:
            self.parent = parent

    class ScriptedLoadableModuleLogic:
        def __init__(self, parent: Any = None) -> None:
            self.parent = parent

    import unittest

    class ScriptedLoadableModuleTest(unittest.TestCase):
        pass

    for kind in (ScriptedLoadableModule, ScriptedLoadableModuleLogic, ScriptedLoadableModuleTest):
        setattr(base, kind.__name__, kind)
    words = ModuleType("slicer.i18n")
    words.__dict__.update(tr=lambda text: text, translate=lambda context, text: text)
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.setitem(sys.modules, words.__name__, words)


def load_module() -> Any:
    spec = importlib.util.spec_from_file_location("SAMAdapt", PROJECT / "SAMAdapt" / "SAMAdapt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_module_describes_itself(base_classes: None) -> None:
    parent = SimpleNamespace()
    load_module().SAMAdapt(parent)
    assert parent.title == "SAMAdapt"
    assert parent.categories == ["Segmentation"]
    assert parent.hidden
    assert "not a medical device" in parent.helpText


def test_self_test_of_the_module(base_classes: None, headless: Any) -> None:
    load_module().SAMAdaptTest().runTest()


IMPORT = """
import json, sys, types
for name, words in {names}.items():
    module = types.ModuleType(name)
    module.__dict__.update({{word: type(word, (), {{}}) for word in words}})
    sys.modules[name] = module
sys.path[:] = [{folder!r}] + [path for path in sys.path if path != {project!r}]
before = set(sys.modules)
import SAMAdapt
loaded = sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})
import SAMAdaptLib, SAMAdaptSlicer
print(json.dumps([loaded, SAMAdaptLib.__file__, SAMAdaptSlicer.__file__]))
"""


@pytest.mark.parametrize("tree", ["source", "install"])
def test_start_up_imports_nothing_slow(tmp_path: Path, tree: str) -> None:
    """As Slicer starts: only the module's own folder is on the path, and every module is imported."""
    folder = PROJECT / "SAMAdapt"
    library = PROJECT
    if tree == "install":
        folder = library = tmp_path / "qt-scripted-modules"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / "SAMAdapt", folder, ignore=ignored)
        shutil.copytree(PROJECT / "SAMAdaptLib", folder / "SAMAdaptLib", ignore=ignored)
    names = {
        "slicer": [],
        "slicer.i18n": ["tr", "translate"],
        "slicer.ScriptedLoadableModule": [
            "ScriptedLoadableModule",
            "ScriptedLoadableModuleLogic",
            "ScriptedLoadableModuleTest",
        ],
    }
    code = IMPORT.format(names=names, project=str(PROJECT), folder=str(folder))
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    loaded, library_file, scene_file = json.loads(done.stdout)
    slow = {"torch", "scipy", "skimage", "SimpleITK", "pydicom", "highdicom", "numpy", "vtk", "SAMAdaptLib"}
    assert not slow & set(loaded)
    assert Path(library_file).is_relative_to(library / "SAMAdaptLib")
    assert Path(scene_file).is_relative_to(folder / "SAMAdaptSlicer")


def test_only_the_module_lies_in_the_module_folder() -> None:
    """Slicer takes every Python file there for a module of its own."""
    assert [path.name for path in (PROJECT / "SAMAdapt").glob("*.py")] == ["SAMAdapt.py"]


def test_scene_layer_never_imports_torch() -> None:
    modules = [path.stem for path in (PROJECT / "SAMAdapt" / "SAMAdaptSlicer").glob("*.py")]
    code = f"import sys; sys.path[:0] = {[str(PROJECT), str(PROJECT / 'SAMAdapt')]!r}\n"
    code += "".join(f"import SAMAdaptSlicer.{name}\n" for name in modules if name != "__init__")
    code += "print('torch' in sys.modules, 'slicer' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "False"], done.stderr
