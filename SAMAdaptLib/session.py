"""One object being segmented: prompts in, mask out, with unlimited undo and a record that can be replayed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import JobError, PromptError
from .geometry import AXES, Axis, SlicePlane
from .models.predictor import SliceMask, VolumePredictor
from .prompts import Prompt, Prompts, prompts_from_json, prompts_to_json
from .volume import IntensityWindow, Volume, default_window

RECORD_FORMAT = "samadapt-session-1"
BoxKJI = tuple[slice, slice, slice]


@dataclass(frozen=True, eq=False)
class _Patch:
    """The labels of one slice, cut to what is not background."""

    labels: NDArray[np.uint8]
    first_yx: tuple[int, int]
    confidence: float

    @classmethod
    def of(cls, result: SliceMask) -> _Patch:
        rows, columns = (np.flatnonzero(result.labels.any(axis=axis)) for axis in (1, 0))
        if rows.size == 0:
            return cls(np.zeros((0, 0), dtype=np.uint8), (0, 0), result.confidence)
        inside = result.labels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return cls(inside.copy(), (int(rows[0]), int(columns[0])), result.confidence)

    def paint(self, plane: SlicePlane, voxels_kji: NDArray[np.uint8]) -> None:
        """Write into a (K, J, I) array, this slice only."""
        y, x = self.first_yx
        rows, columns = self.labels.shape
        plane.extract(voxels_kji)[y : y + rows, x : x + columns] = self.labels

    def same_labels(self, other: _Patch | None) -> bool:
        return (
            other is not None
            and self.first_yx == other.first_yx
            and np.array_equal(self.labels, other.labels)
        )


@dataclass(frozen=True)
class _State:
    """Everything that undo brings back."""

    prompts: Prompts = field(default_factory=Prompts)
    patches: dict[int, _Patch] = field(default_factory=dict)
    actions: tuple[dict[str, Any], ...] = ()

    def acted(self, action: dict[str, Any], **changes: Any) -> _State:
        return replace(self, actions=(*self.actions, action), **changes)


class Session:
    """Segments one object of one volume with one model.

    Each call that changes the mask returns the box of voxels that changed, so that a scene writes no more.

    Args:
        volume: What is segmented; never written to.
        predictor: From `load_model`.
        axis: Axis across the slices that are segmented; None for that of the first box, else of acquisition.
        window: Grey values that the network sees as black and white; None for `default_window`.
    """

    def __init__(
        self,
        volume: Volume,
        predictor: VolumePredictor,
        axis: Axis | None = None,
        window: IntensityWindow | None = None,
    ) -> None:
        """Start with no prompts and an empty mask."""
        self.volume = volume
        self.predictor = predictor
        self.window = window or default_window(volume)
        self._axis = axis
        self._opened: Axis | None = None
        self._states = [_State()]
        self._current = 0

    @property
    def prompts(self) -> Prompts:
        """The prompts as they stand."""
        return self._state.prompts

    @property
    def axis(self) -> Axis:
        """Axis across the slices that are segmented; fixed by the first result."""
        return self._axis or self._state.prompts.natural_axis(self.volume.geometry)

    @property
    def confidence(self) -> dict[int, float]:
        """Estimated overlap with the truth for every slice that has a result, 0 to 1."""
        return {index: patch.confidence for index, patch in sorted(self._state.patches.items())}

    @property
    def labels(self) -> NDArray[np.uint8]:
        """The result as a new (K, J, I) array: 0 background, 1 the object or class numbers."""
        voxels = np.zeros(self.volume.geometry.shape_kji, dtype=np.uint8)
        for index, patch in self._state.patches.items():
            patch.paint(self.volume.geometry.plane(self.axis, index), voxels)
        return voxels

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Whether each voxel (K, J, I) belongs to the object or to any class."""
        return self.labels != 0

    def add(self, *prompts: Prompt) -> BoxKJI | None:
        """Add prompts and segment the slices they lie on.

        Returns:
            The box of voxels that changed, None if none did.

        Raises:
            PromptError: A prompt that does not fit; nothing is changed then.
        """
        added = {"action": "add", "prompts": prompts_to_json(Prompts(prompts))}
        return self._predict(self._state.prompts.with_added(*prompts), added)

    def remove(self, index: int) -> BoxKJI | None:
        """Remove the prompt at `index` and segment its slices again.

        Raises:
            PromptError: There is no such prompt.
        """
        if not 0 <= index < len(self._state.prompts):
            raise PromptError(
                f"Prompt {index} should be removed, but there are {len(self._state.prompts)}. Choose one "
                "of them."
            )
        return self._predict(self._state.prompts.without(index), {"action": "remove", "index": index})

    def propagate(
        self,
        slices: range | None = None,
        on_slice: Callable[[SliceMask], bool | None] | None = None,
    ) -> BoxKJI | None:
        """Carry the object from the prompted slices over others; a model without prompts segments all.

        Slices of the range that the object does not reach are emptied; prompted ones keep their own result.

        Args:
            slices: Which; None for the reach of a 3-D box, else the whole volume.
            on_slice: Called with each result as it comes; returns False to cancel, which keeps what came.

        Returns:
            The box of voxels that changed, None if none did.

        Raises:
            PromptError: No prompt for a model that needs one.
        """
        chosen = self._range(slices)
        return self._propagate(chosen, on_slice, None)

    def undo(self) -> BoxKJI | None:
        """Take the last change back; returns the box that changed, None if there was nothing to undo."""
        return self._go(self._current - 1)

    def redo(self) -> BoxKJI | None:
        """Bring back what `undo` took; returns the box that changed, None if there was nothing to redo."""
        return self._go(self._current + 1)

    @property
    def can_undo(self) -> bool:
        """Whether `undo` has something to take back."""
        return self._current > 0

    @property
    def can_redo(self) -> bool:
        """Whether `redo` has something to bring back."""
        return self._current + 1 < len(self._states)

    def record(self) -> dict[str, Any]:
        """Return what made the mask as plain JSON values: model, checkpoint, settings, volume, actions."""
        return {
            "format": RECORD_FORMAT,
            "model": self.predictor.card.name,
            "checkpoint_sha256": self.predictor.checkpoint_sha256,
            "volume_sha256": self.volume.content_hash,
            "axis": self.axis,
            "window": [self.window.lower, self.window.upper],
            "actions": list(self._state.actions),
            "confidence": {str(index): round(value, 4) for index, value in self.confidence.items()},
        }

    @classmethod
    def replay(cls, record: dict[str, Any], volume: Volume, predictor: VolumePredictor) -> Session:
        """Do again what a record tells; on the same device the mask is the same, bit for bit.

        Raises:
            JobError: Not a record, or of another volume, model or checkpoint.
        """
        _check_record(record, volume, predictor)
        session = cls(volume, predictor, record["axis"], IntensityWindow(*record["window"]))
        for action in record["actions"]:
            session._do(action)
        return session

    @property
    def _state(self) -> _State:
        return self._states[self._current]

    def _do(self, action: dict[str, Any]) -> None:
        if action["action"] == "add":
            self.add(*prompts_from_json(action["prompts"]))
        elif action["action"] == "remove":
            self.remove(action["index"])
        else:
            self._propagate(range(*action["slices"]), None, action.get("results"))

    def _open(self, prompts: Prompts) -> None:
        """Give the volume to the predictor when the axis is known, once."""
        axis = self._axis or prompts.natural_axis(self.volume.geometry)
        if self._opened != axis:
            self.predictor.set_volume(self.volume, axis, self.window)
            self._opened = axis

    def _predict(self, prompts: Prompts, action: dict[str, Any]) -> BoxKJI | None:
        self._open(prompts)
        before = self._state.prompts.on_slices(self.volume.geometry, self._opened or self.axis)
        results = list(self.predictor.predict(prompts)) if len(prompts) else []
        patches = {index: patch for index, patch in self._state.patches.items() if index not in before}
        patches |= {result.index: _Patch.of(result) for result in results}
        self._axis = self._opened
        return self._enter(self._state.acted(action, prompts=prompts, patches=patches))

    def _range(self, slices: range | None) -> range:
        geometry = self.volume.geometry
        self._open(self._state.prompts)
        axis = self._opened or self.axis
        whole = range(geometry.shape_ijk[AXES.index(axis)])
        chosen = slices if slices is not None else (self._state.prompts.span(geometry, axis) or whole)
        if len(chosen) == 0 or chosen.step != 1 or chosen.start < 0 or chosen.stop > len(whole):
            raise PromptError(
                f"Slices between 0 and {len(whole) - 1} can be propagated over, but {chosen.start} to "
                f"{chosen.stop - 1} were asked for. Choose a range inside the volume."
            )
        return chosen

    def _propagate(
        self, slices: range, on_slice: Callable[[SliceMask], bool | None] | None, stop_after: int | None
    ) -> BoxKJI | None:
        self._open(self._state.prompts)
        self._axis = self._opened
        patches = dict(self._state.patches)
        reached: set[int] = set()
        cancelled = stop_after == 0
        if not cancelled:
            for result in self.predictor.predict(self._state.prompts, slices):
                patches[result.index] = _Patch.of(result)
                reached.add(result.index)
                refused = on_slice is not None and on_slice(result) is False
                if refused or len(reached) == stop_after:
                    cancelled = True
                    break
        if not cancelled:
            patches = {
                index: patch for index, patch in patches.items() if index not in slices or index in reached
            }
        action: dict[str, Any] = {"action": "propagate", "slices": [slices.start, slices.stop]}
        if cancelled:
            action["results"] = len(reached)
        return self._enter(self._state.acted(action, patches=patches))

    def _enter(self, state: _State) -> BoxKJI | None:
        changed = self._changed(self._state, state)
        self._states[self._current + 1 :] = [state]
        self._current += 1
        return changed

    def _go(self, where: int) -> BoxKJI | None:
        if not 0 <= where < len(self._states):
            return None
        changed = self._changed(self._state, self._states[where])
        self._current = where
        return changed

    def _changed(self, old: _State, new: _State) -> BoxKJI | None:
        """Bounding box in (K, J, I) of all voxels that differ between two states."""
        corners = []
        for index in old.patches.keys() | new.patches.keys():
            before, after = old.patches.get(index), new.patches.get(index)
            if before is not None and before.same_labels(after):
                continue
            plane = self.volume.geometry.plane(self._axis or self.axis, index)
            for patch in (before, after):
                if patch is not None and patch.labels.size:
                    y, x = patch.first_yx
                    rows, columns = patch.labels.shape
                    corners.append(plane.xy_to_ijk([[x, y], [x + columns - 1, y + rows - 1]]))
        if not corners:
            return None
        points = np.concatenate(corners).astype(int)
        lower, upper = points.min(axis=0), points.max(axis=0)
        k, j, i = (slice(int(a), int(b) + 1) for a, b in zip(lower[::-1], upper[::-1], strict=True))
        return (k, j, i)


def record_to_text(record: dict[str, Any]) -> str:
    """Write a record as JSON that a person can read."""
    return json.dumps(record, indent=1) + "\n"


def _check_record(record: dict[str, Any], volume: Volume, predictor: VolumePredictor) -> None:
    if not isinstance(record, dict) or record.get("format") != RECORD_FORMAT:
        raise JobError(
            f"A session record of format {RECORD_FORMAT} was wanted, but this is none. Give the JSON file "
            "that was "
            "written with the segmentation."
        )
    pairs = (
        ("volume", "volume_sha256", volume.content_hash, "Open the volume it was made on"),
        ("model", "model", predictor.card.name, "Choose the model it names"),
        ("checkpoint", "checkpoint_sha256", predictor.checkpoint_sha256, "Install that checkpoint"),
    )
    for what, key, here, remedy in pairs:
        if record[key] != here:
            raise JobError(
                f"The record was made with {what} {str(record[key])[:16]}, but {here[:16]} was given. "
                f"{remedy}."
            )
