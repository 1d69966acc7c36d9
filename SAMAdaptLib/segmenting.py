"""The main job without a window: segment the objects of a task list in one volume."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from SAMAdaptLib.dicom.terminology import CATEGORY_CONTEXT, REGION_CONTEXT
from SAMAdaptLib.errors import JobError
from SAMAdaptLib.geometry import Axis
from SAMAdaptLib.models.predictor import SliceMask, VolumePredictor
from SAMAdaptLib.prompt_files import PALETTE, ObjectTask
from SAMAdaptLib.prompts import Prompts
from SAMAdaptLib.session import Session
from SAMAdaptLib.volume import IntensityWindow, Volume

RESULT_FORMAT = "samadapt-record-1"
_MOST_OBJECTS = 255


@dataclass(frozen=True, eq=False)
class SegmentedObject:
    """One finished object.

    Args:
        task: What was asked for.
        label: Its value in the label map.
        session: Holds the mask, the confidence and the record.
        seconds: How long it took.
    """

    task: ObjectTask
    label: int
    session: Session
    seconds: float


@dataclass(frozen=True, eq=False)
class Segmentation:
    """All objects of one volume.

    Args:
        volume: What was segmented.
        predictor: The model that did it.
        labels: (K, J, I) uint8; where objects overlap the first of the list stays.
        objects: In the order of the list.
    """

    volume: Volume
    predictor: VolumePredictor
    labels: NDArray[np.uint8]
    objects: tuple[SegmentedObject, ...]

    def record(self) -> dict[str, Any]:
        """Return everything that is needed to make the same masks again, as plain JSON values."""
        objects = [
            {
                "name": item.task.name,
                "colour_rgb": list(item.task.colour_rgb),
                "session": item.session.record(),
            }
            for item in self.objects
        ]
        return {"format": RESULT_FORMAT, "objects": objects}


def segment_objects(
    volume: Volume,
    predictor: VolumePredictor,
    tasks: Sequence[ObjectTask],
    *,
    axis: Axis | None = None,
    window: IntensityWindow | None = None,
    on_slice: Callable[[ObjectTask, SliceMask], bool | None] | None = None,
) -> Segmentation:
    """Segment objects one after the other; a finished one is never altered by the next.

    Args:
        volume: What to segment.
        predictor: From `load_model`.
        tasks: The objects; for a model that takes no prompts leave it empty, its classes are the objects.
        axis: Axis across the slices; None for that of each object's first box, else of acquisition.
        window: Grey values the network sees; None for the default of the volume.
        on_slice: Called with each slice as it is ready; returns False to stop propagating this object.

    Raises:
        JobError: More objects than a label map can number.
        PromptError: A prompt that does not fit the volume or the model.
    """
    if predictor.card.is_automatic:
        return _segment_classes(volume, predictor, axis, window, on_slice)
    if len(tasks) > _MOST_OBJECTS:
        raise JobError(
            f"At most {_MOST_OBJECTS} objects fit into one label map, but {len(tasks)} came. Split the list."
        )
    labels = np.zeros(volume.geometry.shape_kji, dtype=np.uint8)
    finished = []
    for label, task in enumerate(tasks, start=1):
        started = time.perf_counter()
        session = Session(volume, predictor, axis, window)
        session.add(*task.prompts)
        if task.propagate:
            session.propagate(task.slices, _told(on_slice, task))
        labels[session.mask & (labels == 0)] = label
        finished.append(SegmentedObject(task, label, session, time.perf_counter() - started))
    return Segmentation(volume, predictor, labels, tuple(finished))


def replay_record(record: Any, volume: Volume, predictor: VolumePredictor) -> NDArray[np.uint8]:
    """Make the label map of a `Segmentation.record` again, (K, J, I) uint8.

    Raises:
        JobError: Not a record, or one of another volume, model or checkpoint.
    """
    if not isinstance(record, dict) or record.get("format") != RESULT_FORMAT:
        raise JobError(
            f"A record of format {RESULT_FORMAT} was wanted, but this is none. Give the JSON file that was "
            "written "
            "with the segmentation."
        )
    labels = np.zeros(volume.geometry.shape_kji, dtype=np.uint8)
    for label, item in enumerate(record["objects"], start=1):
        session = Session.replay(item["session"], volume, predictor)
        if predictor.card.is_automatic:
            return session.labels
        labels[session.mask & (labels == 0)] = label
    return labels


def _segment_classes(
    volume: Volume,
    predictor: VolumePredictor,
    axis: Axis | None,
    window: IntensityWindow | None,
    on_slice: Callable[[ObjectTask, SliceMask], bool | None] | None,
) -> Segmentation:
    session = Session(volume, predictor, axis, window)
    whole = ObjectTask(predictor.card.title, Prompts())
    started = time.perf_counter()
    session.propagate(None, _told(on_slice, whole))
    seconds = time.perf_counter() - started
    labels = session.labels
    found = np.flatnonzero(np.bincount(labels.ravel(), minlength=2)[1:]) + 1
    names = {item.value: item for item in predictor.card.classes}
    objects = []
    for value in found.tolist():
        known = names.get(value)
        terminology = "" if known is None else _slicer_terminology(known.category, known.type, known.modifier)
        task = replace(
            whole,
            name=known.name if known else f"class {value}",
            colour_rgb=PALETTE[(value - 1) % len(PALETTE)],
            terminology=terminology,
        )
        objects.append(SegmentedObject(task, value, session, seconds))
    return Segmentation(volume, predictor, labels, tuple(objects))


def _slicer_terminology(category: str, type_code: str, modifier: str) -> str:
    if not (category and type_code):
        return ""
    return "~".join([CATEGORY_CONTEXT, category, type_code, modifier or "^^", REGION_CONTEXT, "^^", "^^"])


def _told(
    on_slice: Callable[[ObjectTask, SliceMask], bool | None] | None, task: ObjectTask
) -> Callable[[SliceMask], bool | None] | None:
    return None if on_slice is None else lambda result: on_slice(task, result)
