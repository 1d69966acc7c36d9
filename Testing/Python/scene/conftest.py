"""The scene ring: Slicer's real MRML scene without its windows, one per process, emptied before each test."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.volume import Volume

if TYPE_CHECKING:
    from SAMAdaptSlicer.headless import Headless

Array = NDArray[np.float64]
SLICER_IS_HERE = importlib.util.find_spec("slicer") is not None

collect_ignore_glob = [] if SLICER_IS_HERE else ["test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say that a whole ring is missing; silence would read as success."""
    if not SLICER_IS_HERE:
        terminalreporter.line("The scene ring did not run: slicer-core is not installed.", yellow=True)


@pytest.fixture
def headless() -> Headless:
    from SAMAdaptSlicer.headless import boot

    running = boot()
    running.clear()
    return running


@pytest.fixture
def scene(headless: Headless) -> Any:
    return headless.scene


@pytest.fixture
def add_volume(headless: Headless) -> Callable[..., Any]:
    """Make a volume node from a matrix and a size (K, J, I)."""

    def make(
        affine: Array | None = None,
        shape: tuple[int, int, int] = (7, 9, 11),
        voxels: NDArray[Any] | None = None,
    ) -> Any:
        matrix = np.eye(4) if affine is None else affine
        data = np.zeros(shape, dtype=np.int16) if voxels is None else voxels
        return headless.add_volume_node(Volume(data, Geometry(data.shape[:3], matrix)))

    return make


@pytest.fixture
def add_transform(scene: Any) -> Callable[..., Any]:
    """Make a linear transform node, below another one if given."""

    def make(matrix: Array, parent: Any = None) -> Any:
        from SAMAdaptSlicer.transforms import matrix_to_vtk

        node = scene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
        node.SetMatrixTransformToParent(matrix_to_vtk(matrix))
        if parent is not None:
            node.SetAndObserveTransformNodeID(parent.GetID())
        return node

    return make
