"""Specks and small parts."""

from __future__ import annotations

import numpy as np

from SAMAdaptLib.embeddings import EmbeddingCache
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.postprocess import without_small_parts, without_specks


def picture() -> np.ndarray:
    mask = np.zeros((12, 20), bool)
    mask[2:8, 2:8] = True  # 36 pixels
    mask[10, 10:13] = True  # 3 pixels, less than a tenth
    mask[2:4, 15:18] = True  # 6 pixels
    return mask


def test_specks_go_and_parts_of_some_size_stay() -> None:
    cleaned = without_specks(picture(), np.empty((0, 2)))
    assert cleaned.sum() == 42
    assert not cleaned[10].any()


def test_a_speck_that_was_clicked_on_stays() -> None:
    cleaned = without_specks(picture(), np.array([[11.2, 9.8], [500.0, 3.0]]))
    np.testing.assert_array_equal(cleaned, picture())


def test_small_parts_are_measured_in_mm3() -> None:
    mask = np.zeros((4, 5, 6), bool)
    mask[0, 0, :3] = True
    mask[3, 4, 5] = True
    geometry = Geometry((4, 5, 6), np.diag([0.5, 0.5, 4.0, 1.0]))  # 1 mm3 a voxel
    assert without_small_parts(mask, geometry, 1.0).sum() == 4
    assert without_small_parts(mask, geometry, 1.01).sum() == 3
    assert without_small_parts(mask, geometry, 3.5).sum() == 0


def test_the_cache_keeps_what_was_used_last_and_encodes_once() -> None:
    cache: EmbeddingCache[str] = EmbeddingCache(len, capacity_bytes=7)
    for key in ("a", "b", "a", "c"):  # b is the oldest when c comes
        cache.get(key, lambda key=key: key * 3)
    assert cache.encoded == 3
    assert (len(cache), cache.held_bytes) == (2, 6)
    cache.get("a", lambda: "never")
    cache.get("b", lambda: "bbb")
    assert cache.encoded == 4


def test_an_embedding_larger_than_the_cache_is_still_kept() -> None:
    cache: EmbeddingCache[str] = EmbeddingCache(len, capacity_bytes=2)
    assert cache.get(1, lambda: "large") == "large"
    assert len(cache) == 1
    cache.clear()
    assert (len(cache), cache.held_bytes) == (0, 0)
