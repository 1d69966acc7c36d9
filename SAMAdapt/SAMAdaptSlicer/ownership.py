"""Which nodes are ours: only these are ever changed without being asked for, or removed."""

from __future__ import annotations

from typing import Any

_ATTRIBUTE = "SAMAdapt.owner"  # node attributes are saved with the scene


def mark_as_ours(node: Any) -> None:
    """Note on a node that SAMAdapt made it."""
    node.SetAttribute(_ATTRIBUTE, "SAMAdapt")


def is_ours(node: Any) -> bool:
    """Tell whether SAMAdapt made a node, in this or an earlier run."""
    return node is not None and node.GetAttribute(_ATTRIBUTE) == "SAMAdapt"


def remove_ours(node: Any) -> bool:
    """Remove a node from its scene if SAMAdapt made it.

    Returns:
        Whether it was removed; a node of somebody else stays, and one that is gone already is no error.
    """
    scene = node.GetScene() if is_ours(node) else None
    if scene is None:
        return False
    scene.RemoveNode(node)
    return True
