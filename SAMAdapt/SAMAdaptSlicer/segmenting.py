"""One object from prompt nodes to a segment: the scene on one side, a library session on the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .markups import prompts_from_nodes
from .segments import grid_in_segmentation, require_segment, write_mask
from .volumes import volume_from_node

if TYPE_CHECKING:
    from SAMAdaptLib.models.predictor import SliceMask, VolumePredictor
    from SAMAdaptLib.session import Session

    from .editing import SegmentWriter


def load_predictor(name: str | None = None) -> VolumePredictor:
    """Load a model of the library by its card's name; None for the default model."""
    from SAMAdaptLib import load_model  # torch takes seconds to start: not before somebody segments

    return load_model(name)


class SceneSegmenter:
    """Segments volume nodes with one model, which is loaded when it is first needed.

    Args:
        load: Gives the model; None for the library's default one.
    """

    def __init__(self, load: Callable[[], VolumePredictor] | None = None) -> None:
        self._load = load or load_predictor
        self._predictor: VolumePredictor | None = None

    def segment(
        self,
        volume_node: Any,
        prompt_nodes: Iterable[Any],
        segmentation_node: Any,
        segment_id: str,
        slices: range | None = None,
        writer: SegmentWriter | None = None,
        on_slice: Callable[[SliceMask], bool | None] | None = None,
    ) -> Session:
        """Segment the prompted slices, carry the object over `slices` and write it into a segment.

        Args:
            volume_node: What is segmented.
            prompt_nodes: Markups in the order in which they were given.
            segmentation_node: Holds the segment.
            segment_id: The segment to replace.
            slices: Slices to propagate over; None leaves it at the prompted ones.
            writer: Writes by the Segment Editor's rules, with undo; None replaces the segment as it is.
            on_slice: Called with each propagated slice; returns False to cancel, which keeps what came.

        Returns:
            The session, for corrections, confidence and record.

        Raises:
            SAMAdaptError: What cannot be read, segmented or written; the segment is unchanged then.
        """
        from SAMAdaptLib.session import Session

        require_segment(segmentation_node, segment_id)
        grid_in_segmentation(volume_node, segmentation_node)
        session = Session(volume_from_node(volume_node), self._model())
        session.add(*prompts_from_nodes(prompt_nodes))
        if slices is not None:
            session.propagate(slices, on_slice)
        write = writer.write if writer is not None else write_mask
        write(segmentation_node, segment_id, session.mask, volume_node)
        return session

    def _model(self) -> VolumePredictor:
        if self._predictor is None:
            self._predictor = self._load()
        return self._predictor
