"""Slicer's own scene without its windows: the `slicer-core` package, started for scripts and tests.

>>> headless = boot()                                            # doctest: +SKIP
>>> node = headless.load_volume("liver.nrrd")                    # doctest: +SKIP
>>> headless.save_scene("liver.mrb")                             # doctest: +SKIP

Inside the desktop application nothing of this is needed: there the scene is already running.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from vtk.util.numpy_support import numpy_to_vtk

from SAMAdaptLib.errors import VolumeError
from SAMAdaptLib.files import atomic_path
from SAMAdaptLib.volume import Volume

from .acquisition import put_under_acquisition_transform
from .transforms import matrix_to_vtk

_LOGIC_CLASSES = {
    "Colors": "vtkSlicerColorLogic",
    "Volumes": "vtkSlicerVolumesLogic",
    "Transforms": "vtkSlicerTransformLogic",
    "SubjectHierarchy": "vtkSlicerSubjectHierarchyModuleLogic",
    "Segmentations": "vtkSlicerSegmentationsModuleLogic",
    "Markups": "vtkSlicerMarkupsLogic",
}
_PRESENT_NODES = ("vtkMRMLCrosshairNode", "vtkMRMLSelectionNode", "vtkMRMLInteractionNode")

_running: Headless | None = None


def boot() -> Headless:
    """Start the scene of this process, or return it when it runs already.

    After this `slicer.mrmlScene`, `slicer.app.applicationLogic()` and `slicer.modules.<name>.logic()` answer
    as in the desktop application, so that `slicer.util` works.
    """
    global _running
    if _running is None:
        _running = Headless()
    return _running


class Headless:
    """One scene with Slicer's application and module logics.

    Attributes:
        scene: The vtkMRMLScene; it stays the same object, also when it is cleared.
    """

    def __init__(self) -> None:
        import slicer

        self.scene: Any = slicer.vtkMRMLScene()
        self._folder = Path(tempfile.mkdtemp(prefix="samadapt-scene-"))
        atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        self.scene.SetRootDirectory(str(self._folder))
        self._application = slicer.vtkSlicerApplicationLogic()
        self._application.SetMRMLScene(self.scene)
        self._application.SetHomeDirectory(str(self._folder))
        self._application.SetShareDirectory("share")
        (self._folder / "share" / "ColorFiles").mkdir(parents=True)
        self._application.SetTemporaryPath(str(self._folder))
        self._remote = self._start_file_transfer()
        self._logics = {name: self._start_logic(name) for name in _LOGIC_CLASSES}
        self._publish()
        self._restore_fixtures()

    def logic(self, name: str) -> Any:
        """Return a module's logic by the module's name, such as "Segmentations"."""
        return self._logics[name]

    def clear(self) -> None:
        """Empty the scene, as Close Scene does, and bring back what every Slicer scene has."""
        self.scene.Clear(False)
        self._restore_fixtures()

    def load_volume(self, path: str | os.PathLike[str]) -> Any:
        """Load an image file (NRRD, NIfTI, MHA, ...) as a scalar volume node.

        Raises:
            VolumeError: No such file, or not an image that Slicer reads.
        """
        file = Path(path)
        node = None
        if _is_readable(file):
            node = self.logic("Volumes").AddArchetypeVolume(str(file), file.name.split(".")[0])
        if node is None or node.GetImageData() is None:
            raise VolumeError(
                f"An image file was wanted, but '{file.name}' cannot be read as one. "
                "Give a NRRD, NIfTI or MHA file."
            )
        return node

    def add_volume_node(self, volume: Volume) -> Any:
        """Put a Volume into the scene; the voxels are copied.

        Slices at uneven positions get an acquisition transform, as Slicer's DICOM importer makes it.

        Returns:
            A vtkMRMLScalarVolumeNode, or a vtkMRMLVectorVolumeNode for colour.
        """
        kind = "vtkMRMLVectorVolumeNode" if volume.is_colour else "vtkMRMLScalarVolumeNode"
        node = self.scene.AddNewNodeByClass(kind, volume.name)
        node.SetAndObserveImageData(_image_of(volume))
        if volume.geometry.is_regular:
            node.SetIJKToRASMatrix(matrix_to_vtk(volume.geometry.affine_ijk_to_ras))
        else:
            put_under_acquisition_transform(node, volume.geometry)
        node.CreateDefaultDisplayNodes()
        return node

    def save_scene(self, path: str | os.PathLike[str]) -> None:
        """Write the whole scene with its data as one file (.mrb).

        Raises:
            VolumeError: Another ending, or Slicer could not write it; nothing is left behind.
        """
        _require_ending(path, ".mrb")
        with atomic_path(path) as temporary:
            if not self.scene.WriteToMRB(str(temporary)) or not temporary.is_file():
                raise _not_written(path)

    def load_scene(self, path: str | os.PathLike[str]) -> None:
        """Replace the scene by that of an .mrb file.

        Raises:
            VolumeError: No such file, or not a scene.
        """
        if not zipfile.is_zipfile(path) or not self.scene.ReadFromMRB(str(path), True):
            raise VolumeError(
                f"A scene file (.mrb) was wanted, but '{Path(path).name}' cannot be read as one. "
                "Choose another file."
            )
        self._restore_fixtures()

    def save_segmentation(self, segmentation_node: Any, path: str | os.PathLike[str]) -> None:
        """Write a segmentation with its segments' names, colours and terminology (.seg.nrrd).

        Raises:
            VolumeError: Another ending, or Slicer could not write it; nothing is left behind.
        """
        _require_ending(path, ".nrrd")
        with atomic_path(path) as temporary:
            storage = self.scene.CreateNodeByClass("vtkMRMLSegmentationStorageNode")
            storage.SetFileName(str(temporary))
            written = storage.WriteData(segmentation_node)
            storage.UnRegister(None)
            if not written or not temporary.is_file():
                raise _not_written(path)

    def load_segmentation(self, path: str | os.PathLike[str]) -> Any:
        """Load a segmentation file (.seg.nrrd) as a vtkMRMLSegmentationNode.

        Raises:
            VolumeError: No such file, or not a segmentation.
        """
        file = Path(path)
        node = None
        if _is_readable(file):
            logic = self.logic("Segmentations")
            node = logic.LoadSegmentationFromFile(str(file), True, file.name.split(".")[0])
        if node is None:
            raise VolumeError(
                f"A segmentation file was wanted, but '{file.name}' cannot be read as one. "
                "Give a .seg.nrrd file."
            )
        return node

    def _start_logic(self, name: str) -> Any:
        import slicer

        logic = getattr(slicer, _LOGIC_CLASSES[name])()
        logic.SetMRMLApplicationLogic(self._application)
        logic.SetMRMLScene(self.scene)
        self._application.SetModuleLogic(name, logic)
        return logic

    def _start_file_transfer(self) -> tuple[Any, Any]:
        """Give the scene the cache folder that unpacking a scene file asks for."""
        import slicer

        remote, manager = slicer.vtkMRMLRemoteIOLogic(), slicer.vtkDataIOManagerLogic()
        cache = self._folder / "cache"
        cache.mkdir()
        (cache / ".slicer-cache").touch()  # without this mark Slicer refuses to tidy the folder
        remote.GetCacheManager().SetRemoteCacheDirectory(str(cache))
        remote.SetMRMLScene(self.scene)
        remote.AddDataIOToScene()
        manager.SetMRMLApplicationLogic(self._application)
        manager.SetAndObserveDataIOManager(self.scene.GetDataIOManager())
        return remote, manager

    def _publish(self) -> None:
        """Set the names that Slicer's own Python code expects on the `slicer` package."""
        import slicer

        slicer.mrmlScene = self.scene
        slicer.app = SimpleNamespace(applicationLogic=lambda: self._application, mrmlScene=lambda: self.scene)
        entries = {
            name.lower(): SimpleNamespace(logic=lambda logic=logic: logic)
            for name, logic in self._logics.items()
        }
        slicer.modules = SimpleNamespace(**entries)

    def _restore_fixtures(self) -> None:
        import slicer

        for kind in _PRESENT_NODES:
            if self.scene.GetFirstNodeByClass(kind) is None:
                node = self.scene.CreateNodeByClass(kind)
                node.SetSingletonTag("default" if kind == "vtkMRMLCrosshairNode" else "Singleton")
                self.scene.AddNode(node)
                node.UnRegister(None)
        slicer.vtkMRMLSliceNode.AddDefaultSliceOrientationPresets(self.scene, True)
        if self.scene.GetFirstNodeByClass("vtkMRMLColorTableNode") is None:
            self.logic("Colors").AddDefaultColorNodes()


def _image_of(volume: Volume) -> Any:
    import vtk

    voxels = np.ascontiguousarray(volume.voxels)
    if voxels.dtype == bool:
        voxels = voxels.astype(np.uint8)
    image = vtk.vtkImageData()
    image.SetDimensions(*volume.geometry.shape_ijk)
    flat = voxels.reshape(-1, 3) if volume.is_colour else voxels.ravel()
    image.GetPointData().SetScalars(numpy_to_vtk(flat, deep=True))
    return image


def _is_readable(file: Path) -> bool:
    """Read an image outside Slicer first: its segmentation reader ends the process on a damaged file."""
    import SimpleITK

    try:
        SimpleITK.ReadImage(str(file))
    except RuntimeError:
        return False
    return True


def _require_ending(path: str | os.PathLike[str], ending: str) -> None:
    if not str(path).endswith(ending):
        raise VolumeError(
            f"A file name that ends in {ending} was wanted, but '{Path(path).name}' came. Change its ending."
        )


def _not_written(path: str | os.PathLike[str]) -> VolumeError:
    return VolumeError(
        f"'{Path(path).name}' was to be written, but Slicer could not write it. "
        "Check the free space and your right to write there."
    )
