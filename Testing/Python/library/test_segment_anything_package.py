"""Our SAM against the package `segment-anything`, at sizes that no golden has."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from SAMAdaptLib.models.framing import LongestSide
from SAMAdaptLib.models.mask_decoder import EVERY_MASK, MaskDecoder
from SAMAdaptLib.models.prompt_encoder import PromptEncoder
from SAMAdaptLib.models.sam import Sam
from SAMAdaptLib.models.vit import ImageEncoderViT, ViTShape


@dataclass(frozen=True)
class Official:
    """The parts of the package that are compared."""

    modeling: ModuleType
    transforms: ModuleType


@pytest.fixture(scope="module")
def official() -> Iterator[Official]:
    """Import the package with stand-ins for torchvision, whose functions used here only call Pillow."""
    if importlib.util.find_spec("segment_anything") is None:
        pytest.skip("the package segment-anything is not here; the test extra holds it")

    def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
        return image.resize(size[::-1], Image.Resampling.BILINEAR)

    names = ("torchvision", "torchvision.ops", "torchvision.ops.boxes", "torchvision.transforms")
    names += ("torchvision.transforms.functional",)
    kept = {name: sys.modules.get(name) for name in names}
    stand_ins = {name: ModuleType(name) for name in names}
    vars(stand_ins["torchvision.ops.boxes"]).update(batched_nms=None, box_area=None)
    vars(stand_ins["torchvision.transforms.functional"]).update(resize=resize, to_pil_image=Image.fromarray)
    sys.modules.update(stand_ins)
    try:
        modeling = importlib.import_module("segment_anything.modeling")
        yield Official(modeling, importlib.import_module("segment_anything.utils.transforms"))
    finally:
        for name in [*names, *(n for n in sys.modules if n.startswith("segment_anything"))]:
            sys.modules.pop(name, None)
        sys.modules.update({name: module for name, module in kept.items() if module is not None})


@dataclass(frozen=True)
class Sizes:
    """A small SAM; `grid` not a multiple of `window`, so that windows are padded."""

    grid: int
    window: int
    heads: int
    global_blocks: tuple[int, ...]
    width: int = 24
    out: int = 32

    @property
    def input_size(self) -> int:
        return 16 * self.grid


SIZES = [
    Sizes(grid=5, window=3, heads=2, global_blocks=(1,)),
    Sizes(grid=4, window=7, heads=3, global_blocks=(0, 2)),
    Sizes(grid=6, window=3, heads=1, global_blocks=()),
]


def official_sam(official: Official, sizes: Sizes) -> nn.Module:
    modeling = official.modeling
    encoder = modeling.ImageEncoderViT(
        img_size=sizes.input_size,
        embed_dim=sizes.width,
        depth=3,
        num_heads=sizes.heads,
        out_chans=sizes.out,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=sizes.window,
        global_attn_indexes=sizes.global_blocks,
    )
    prompts = modeling.PromptEncoder(sizes.out, (sizes.grid,) * 2, (sizes.input_size,) * 2, 16)
    decoder = modeling.MaskDecoder(
        transformer_dim=sizes.out,
        transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=sizes.out, num_heads=4, mlp_dim=48),
        iou_head_hidden_dim=24,
    )
    return modeling.Sam(encoder, prompts, decoder).eval()


def our_sam(sizes: Sizes) -> Sam:
    shape = ViTShape(
        embed_dim=sizes.width,
        depth=3,
        heads=sizes.heads,
        global_blocks=sizes.global_blocks,
        input_size=sizes.input_size,
        window=sizes.window,
        out_channels=sizes.out,
    )
    return Sam(
        ImageEncoderViT(shape),
        PromptEncoder(sizes.out, (sizes.grid,) * 2, (sizes.input_size,) * 2, 16),
        MaskDecoder(sizes.out, heads=4, mlp_dim=48, score_width=24),
    ).eval()


def pair(official: Official, sizes: Sizes) -> tuple[nn.Module, Sam]:
    """Both networks with the same random weights, loaded by name."""
    theirs, ours = official_sam(official, sizes), our_sam(sizes)
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(t.shape, generator=generator) * 0.3 for key, t in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    ours.load_state_dict(state)
    return theirs, ours


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@torch.inference_mode()
def test_encoders_agree(official: Official, sizes: Sizes) -> None:
    theirs, ours = pair(official, sizes)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, sizes.input_size, sizes.input_size, generator=generator)
    expected = theirs.image_encoder(pixels)
    torch.testing.assert_close(ours.image_encoder(pixels), expected, atol=2e-5, rtol=1e-5)


PROMPTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "points": {"points": True},
    "boxes": {"boxes": True},
    "mask": {"masks": True},
    "all": {"points": True, "boxes": True, "masks": True},
}


@pytest.mark.parametrize("given", PROMPTS.values(), ids=PROMPTS.keys())
@torch.inference_mode()
def test_prompts_and_masks_agree(official: Official, given: dict[str, bool]) -> None:
    theirs, ours = pair(official, SIZES[0])
    generator = torch.Generator().manual_seed(2)
    points = torch.rand(3, 4, 2, generator=generator) * 80 if "points" in given else None
    labels = torch.tensor([[1, 0, -1, 1]] * 3)
    boxes = torch.rand(3, 4, generator=generator) * 80 if "boxes" in given else None
    masks = torch.randn(3, 1, 20, 20, generator=generator) if "masks" in given else None
    embedding = torch.randn(1, 32, 5, 5, generator=generator)

    sparse, dense = theirs.prompt_encoder(None if points is None else (points, labels), boxes, masks)
    dense_pe = theirs.prompt_encoder.get_dense_pe()
    expected = [theirs.mask_decoder(embedding, dense_pe, sparse, dense, multi) for multi in (False, True)]

    our_sparse, our_dense = ours.prompt_encoder(points, labels, boxes, masks)
    torch.testing.assert_close(our_sparse, sparse, atol=1e-5, rtol=0)
    torch.testing.assert_close(our_dense, dense, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.prompt_encoder.dense_pe(), dense_pe, atol=1e-5, rtol=0)
    logits, scores = ours.mask_decoder(embedding, dense_pe, our_sparse, our_dense, EVERY_MASK)
    (single, single_score), (three, three_scores) = expected
    torch.testing.assert_close(logits, torch.cat([single, three], dim=1), atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(scores, torch.cat([single_score, three_scores], dim=1), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("shape_yx", [(37, 53), (53, 37), (40, 40), (200, 11), (80, 80)])
def test_pictures_enter_and_masks_come_back_alike(official: Official, shape_yx: tuple[int, int]) -> None:
    theirs, framing = official_sam(official, SIZES[0]), LongestSide(80)
    transform = official.transforms.ResizeLongestSide(80)
    rng = np.random.default_rng(3)
    picture = rng.integers(0, 256, (*shape_yx, 3), dtype=np.uint8)
    resized = transform.apply_image(picture)
    np.testing.assert_array_equal(framing.resize(picture), resized)
    pixels = theirs.preprocess(torch.as_tensor(resized).permute(2, 0, 1)[None])
    torch.testing.assert_close(framing.to_input(picture), pixels, atol=1e-6, rtol=0)

    points = (rng.random((6, 2)) * shape_yx[::-1]).astype(np.float32)
    expected_xy = transform.apply_coords(points, shape_yx)
    np.testing.assert_allclose(framing.to_input_xy(points, shape_yx), expected_xy, rtol=1e-5)

    low_res = torch.from_numpy(rng.normal(size=(2, 3, 20, 20)).astype(np.float32))
    masks = theirs.postprocess_masks(low_res, resized.shape[:2], shape_yx)
    torch.testing.assert_close(framing.to_picture(low_res, shape_yx), masks, atol=1e-6, rtol=0)
