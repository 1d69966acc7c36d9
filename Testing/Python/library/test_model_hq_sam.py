"""HQ-SAM against its official code: recorded numbers, mutations, and a session."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from goldens import golden
from phantoms import ball_volume
from SAMAdaptLib.cards import ModelCard, Source
from SAMAdaptLib.models.hq_sam import HqMaskDecoder, build_hq_sam
from SAMAdaptLib.models.mask_decoder import SINGLE_MASK, THREE_MASKS
from SAMAdaptLib.models.sam import Sam, SamSlicePredictor
from SAMAdaptLib.models.vit import VIT_B, VIT_H, VIT_L, ViTShape
from SAMAdaptLib.prompts import Point
from SAMAdaptLib.propagation import SliceBySlice
from SAMAdaptLib.session import Session
from SAMAdaptLib.verify import verify
from SAMAdaptLib.verify.golden_sets import to_array
from SAMAdaptLib.verify.hq_sam import tiny_hq_sam
from SAMAdaptLib.weights import load_into, recognise

CARD = ModelCard("hq_sam.golden", "HQ-SAM", "hq_sam", Source("manual"), "", prompts=("point", "box", "mask"))


def loaded() -> Sam:
    network = tiny_hq_sam(golden("hq_sam"))
    load_into(network, golden("hq_sam").tensors(None), "HQ-SAM")
    return network.eval()


def test_every_recorded_number_of_the_official_code_is_met() -> None:
    rows = verify(golden("hq_sam").path)
    assert len(rows) == 12
    assert all(row.passed for row in rows), rows


def answer(network: Sam) -> torch.Tensor:
    """Logits of two prompts that together use every tensor: points with three masks, box with one."""
    arrays = {name: torch.from_numpy(value) for name, value in golden("hq_sam").arrays().items()}
    features = network.image_encoder(arrays["network_input"])
    found = []
    given = (
        ((arrays["points_xy"], arrays["point_labels"], None, None), THREE_MASKS),
        ((None, None, arrays["box_xyxy"], arrays["mask_input"]), SINGLE_MASK),
    )
    for prompts, masks in given:
        sparse, dense = network.prompt_encoder(*prompts)
        logits, score = network.mask_decoder(
            features, network.prompt_encoder.dense_pe(), sparse, dense, masks
        )
        found += [logits.flatten(), score.flatten()]
    return torch.cat(found)


@torch.inference_mode()
def test_every_tensor_counts() -> None:
    network = loaded()
    whole = answer(network)
    generator = torch.Generator().manual_seed(1)
    unseen = set()
    for name, tensor in network.state_dict().items():
        before = tensor.clone()
        tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
        if (answer(network) - whole).abs().max() < 1e-4:
            unseen.add(name)
        tensor.copy_(before)
    # A bias of all keys shifts every logit of a softmax alike.
    unseen -= {name for name in unseen if name.endswith("k_proj.bias")}
    # Of the three candidates the best scored is taken; the hypernetworks of the other two are not read.
    assert {name.split(".")[1] for name in unseen} == {"output_hypernetworks_mlps"}
    assert {name.split(".")[2] for name in unseen} == {"1", "3"}


@torch.inference_mode()
def test_the_hq_mask_is_added_to_sams_and_not_put_in_its_place() -> None:
    network = loaded()
    arrays = {name: torch.from_numpy(value) for name, value in golden("hq_sam").arrays().items()}
    features = network.image_encoder(arrays["network_input"])
    sparse, dense = network.prompt_encoder(None, None, arrays["box_xyxy"], None)
    decoder = network.mask_decoder
    assert isinstance(decoder, HqMaskDecoder)
    pe = network.prompt_encoder.dense_pe()
    both, _ = decoder(features, pe, sparse, dense, slice(0, 1))
    decoder.hq_only = True
    alone, _ = decoder(features, pe, sparse, dense, slice(0, 1))
    np.testing.assert_allclose(
        to_array(alone), golden("hq_sam").arrays()["box_hq_only/low_res_logits"], atol=1e-4
    )
    assert float((both - alone).abs().max()) > 0.1


@pytest.mark.parametrize(("shape", "vit_dim"), [(VIT_B, 768), (VIT_L, 1024), (VIT_H, 1280)])
def test_published_sizes_have_the_keys_that_hq_sam_adds(shape: ViTShape, vit_dim: int) -> None:
    with torch.device("meta"):
        state = build_hq_sam(shape).state_dict()
    sizes = {name: tuple(value.shape) for name, value in state.items()}
    assert sizes["mask_decoder.hf_token.weight"] == (1, 256)
    assert sizes["mask_decoder.hf_mlp.layers.2.weight"] == (32, 256)
    assert sizes["mask_decoder.compress_vit_feat.0.weight"] == (vit_dim, 256, 2, 2)
    assert sizes["mask_decoder.compress_vit_feat.3.weight"] == (256, 32, 2, 2)
    assert sizes["mask_decoder.embedding_encoder.0.weight"] == (256, 64, 2, 2)
    assert sizes["mask_decoder.embedding_maskfeature.0.weight"] == (64, 32, 3, 3)
    assert "HQ-SAM" in recognise(state)


def test_normalisations_have_the_official_eps() -> None:
    network = loaded()
    assert isinstance(network.mask_decoder, HqMaskDecoder)
    for part in ("compress_vit_feat", "embedding_encoder", "embedding_maskfeature"):
        assert getattr(network.mask_decoder, part)[1].eps == 1e-6


def test_a_session_runs_with_the_pair_of_features() -> None:
    volume, _ = ball_volume(shape_kji=(3, 30, 36))
    predictor = SliceBySlice(SamSlicePredictor(loaded(), CARD, "0" * 64))
    session = Session(volume, predictor, "K")
    session.add(Point((17, 14, 1)))
    session.add(Point((5, 5, 1), positive=False))
    session.undo()
    assert list(session.confidence) == [1]
    assert predictor.embeddings.held_bytes > 0
