from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from goldens import arrays, golden, published_keys
from SAMAdaptLib.cards import ModelCard, Source, find_card
from SAMAdaptLib.errors import PromptError, VolumeError, WeightsError
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.models import build_predictor, med_sa_predictors
from SAMAdaptLib.models.mask_decoder import MaskDecoder
from SAMAdaptLib.models.med_sa import (
    BottleneckAdapter,
    Depth,
    Dialect,
    MedSa,
    MedSaBlock,
    ResidualTwoWayBlock,
    attend_on_grid,
    depth_grid,
    load_into_med_sa,
    load_med_sa,
    published_tensors,
)
from SAMAdaptLib.models.med_sa_predictors import (
    MedSaSlicePredictor,
    MedSaVolumePredictor,
    PlacedRegion,
    Region,
    Squeezed,
    territories,
)
from SAMAdaptLib.models.prompt_encoder import PromptEncoder
from SAMAdaptLib.models.two_way_transformer import TwoWayBlock
from SAMAdaptLib.models.vit import VIT_B, Attention, ViTShape, blocks_of
from SAMAdaptLib.prompts import Box, PixelPrompts, Point, Prompts
from SAMAdaptLib.propagation import SliceBySlice
from SAMAdaptLib.session import Session
from SAMAdaptLib.verify import verify
from SAMAdaptLib.verify.med_sa import tiny_med_sa
from SAMAdaptLib.volume import IntensityWindow, Volume
from SAMAdaptLib.weights import Checkpoint, recognise

CPU = torch.device("cpu")
SHAPE = ViTShape(embed_dim=16, depth=2, heads=2, global_blocks=(1,), input_size=64, window=3, out_channels=16)
CARD = ModelCard("med_sa.golden", "Med-SA", "med_sa", Source("manual"), "", prompts=("point",))
CARD_3D = replace(CARD, dimensions=3, options={"window": [-175, 250], "side": 32, "spacing_mm": [2, 2, 2]})
DIALECTS = {
    "2023": Dialect("rel_pos_", residual_decoder=False),
    "first days of 2024": Dialect("rel_pos_"),
    "January 2024": Dialect(""),
    "today": Dialect("rel_"),
}


def tiny(dialect: Dialect | None = None, depth: Depth | None = None, seed: int = 0) -> MedSa:
    prompt_encoder = PromptEncoder(16, (4, 4), (64, 64), 8)
    decoder = MaskDecoder(16, heads=2, mlp_dim=24, score_width=12)
    network = MedSa(SHAPE, dialect, depth, 0.25, prompt_encoder, decoder)
    generator = torch.Generator().manual_seed(seed)
    for tensor in network.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return network.eval()


def file_of(network: MedSa) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in published_tensors(network).items()}


def golden_network() -> MedSa:
    tensors = golden("med_sa_3d").tensors(None)
    return load_into_med_sa(tiny_med_sa(golden("med_sa_3d"), Dialect.of(tensors)), tensors)


@torch.inference_mode()
def golden_difference(network: MedSa) -> float:
    """Of logits or scores from the recorded ones, whichever is larger; one click on each slice."""
    z = arrays("med_sa_3d")
    pixels = torch.from_numpy(z["image_b1hwd"])[0].permute(3, 0, 1, 2).expand(-1, 3, -1, -1)
    embedding = network.image_encoder(Squeezed(96).standardised(pixels))
    clicks = torch.from_numpy(z["pt_b2"])[:, None], torch.from_numpy(z["pt_label_b"])[:, None]
    sparse, dense = network.prompt_encoder(*clicks)
    logits, scores = network.mask_decoder(
        embedding, network.prompt_encoder.dense_pe(), sparse, dense, slice(1)
    )
    found = {"low_res_logits": logits, "iou": scores}
    return max(float(np.abs(value.numpy() - z[name]).max()) for name, value in found.items())


def test_a_chunk_of_slices_gives_the_official_numbers() -> None:
    rows = verify(golden("med_sa_3d").path)
    assert {row.output for row in rows} == set(arrays("med_sa_3d")) - {"image_b1hwd", "pt_b2", "pt_label_b"}
    for row in rows:
        assert row.passed, row


@pytest.mark.parametrize(("name", "outputs"), [("med_sa_2d", 16), ("med_sa_3d", 16)])
def test_all_that_was_recorded_comes_out(shared_data: Path, name: str, outputs: int) -> None:
    folder = shared_data.parent / "goldens" / name
    if not folder.is_dir():
        pytest.skip(f"the recorded set {name} is not beside the shared data")
    rows = verify(folder)
    assert len(rows) == outputs
    for row in rows:
        assert row.passed, row


@pytest.mark.parametrize("size", [256, 1024])
def test_a_file_has_exactly_the_official_keys_and_shapes(size: int) -> None:
    with torch.device("meta"):
        named = published_tensors(MedSa(replace(VIT_B, input_size=size)))
    found = {key: list(tensor.shape) for key, tensor in named.items()}
    assert found.pop("image_encoder.pos_embed") == [1, size // 16, size // 16, 768]
    official = published_keys(f"med_sa_vit_b_{size}")
    assert official.pop("image_encoder.pos_embed") == [1, 64, 64, 768]
    assert found == official


def test_every_norm_has_the_epsilon_of_the_official_code() -> None:
    network = tiny()
    assert {m.eps for m in network.image_encoder.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {m.eps for m in network.mask_decoder.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


def test_every_adapter_counts() -> None:
    network = golden_network()
    assert golden_difference(network) < 1e-4
    for block in blocks_of(network.image_encoder):
        for name in ("space_adapter", "mlp_adapter", "depth_adapter"):
            adapter = block.get_submodule(name)
            setattr(block, name, nn.Identity() if name == "space_adapter" else _Nothing())
            assert golden_difference(network) > 1e-3, name
            setattr(block, name, adapter)


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_every_tensor_of_the_file_counts() -> None:
    """Each is perturbed in the file, so that a tensor loaded to the wrong place or not at all is found."""
    tensors = golden("med_sa_3d").tensors(None)
    network = tiny_med_sa(golden("med_sa_3d"), Dialect.of(tensors))
    silent = set()
    for key, kept in list(tensors.items()):
        noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(0))
        tensors[key] = kept + 0.1 * noise
        if golden_difference(load_into_med_sa(network, tensors)) < 1e-3:
            silent.add(key)
        tensors[key] = kept
    shifts = {key for key in tensors if key.endswith("k_proj.bias")}  # the softmax takes them out
    assert silent == set(golden("med_sa_3d").facts["tensors_with_no_effect"]) | shifts


@pytest.mark.parametrize(
    ("slices", "grid"), [(96, (8, 12)), (6, (2, 3)), (4, (1, 4)), (9, (1, 9)), (5, (1, 5)), (1, (1, 1))]
)
def test_slices_are_laid_out_as_the_official_search_does(slices: int, grid: tuple[int, int]) -> None:
    assert depth_grid(slices) == grid


def test_the_depth_branch_counts_chunks_through_windows_first() -> None:
    """Two volumes of 4 slices, 4 windows each: a chunk of 4 is the windows of one slice, not a depth."""
    block = blocks_of(tiny(depth=Depth(4)).image_encoder)[0]
    assert isinstance(block, MedSaBlock)
    windows = torch.randn(8 * 4, 3, 3, 16, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        found = block._through_depth(windows, 4)
        for group in range(8):
            for row, column in ((0, 0), (1, 2)):
                column_of_windows = windows[4 * group : 4 * group + 4, row, column]  # 4, C
                seen = attend_on_grid(block.attn, block.norm1(column_of_windows)[None, None])  # 1 x 4
                expected = block.depth_adapter(seen)[0, 0]
                torch.testing.assert_close(
                    found[4 * group : 4 * group + 4, row, column], expected, atol=1e-6, rtol=0
                )


def test_without_a_chunk_all_that_comes_is_one_depth() -> None:
    whole, stated = tiny(depth=Depth(None)), tiny(depth=Depth(4 * 2))
    block, other = whole.image_encoder.blocks[0], stated.image_encoder.blocks[0]
    x = torch.randn(2, 4, 4, 16, generator=torch.Generator().manual_seed(4))  # 4 windows each
    with torch.inference_mode():
        torch.testing.assert_close(block(x), other(x), atol=0, rtol=0)


def test_attention_on_a_grid_is_that_of_the_encoder_and_resizes_its_tables() -> None:
    torch.manual_seed(0)
    attention = Attention(SHAPE, 3)
    for table in (attention.rel_pos_h, attention.rel_pos_w):
        assert table is not None
        nn.init.normal_(table)
    x = torch.randn(5, 3, 3, 16)
    torch.testing.assert_close(attend_on_grid(attention, x), attention(x), atol=1e-5, rtol=0)
    line = attend_on_grid(attention, x[:, :1])  # 1 x 3: one distance of rows, whose value is the middle's
    assert attention.rel_pos_h is not None
    with torch.no_grad():
        attention.rel_pos_h[[0, 1, 3, 4]] += 7
    torch.testing.assert_close(attend_on_grid(attention, x[:, :1]), line, atol=1e-5, rtol=0)


def test_windows_are_filled_up_before_the_normalisation() -> None:
    """What fills a window up is the bias of the normalisation: with another bias it would be another map."""
    network = tiny()
    block = blocks_of(network.image_encoder)[0]
    x = torch.randn(1, 4, 4, 16, generator=torch.Generator().manual_seed(5))
    padded = nn.functional.pad(x, (0, 0, 0, 2, 0, 2))
    with torch.inference_mode():
        corner = padded[:, 3:6, 3:6]  # the last window: one token and eight that fill it up
        y = block.attn(block.norm1(corner))
        y = y + block.get_submodule("space_adapter")(y) - y  # the adapter adds what it was given
        grown = corner + y
        normed = block.norm2(grown)
        expected = grown + block.mlp(normed) + 0.5 * block.get_submodule("mlp_adapter")(normed)
        torch.testing.assert_close(block(x)[:, 3, 3], expected[:, 0, 0], atol=1e-5, rtol=0)


def test_an_adapter_is_a_bottleneck_of_a_quarter_with_an_exact_gelu() -> None:
    adapter = BottleneckAdapter(16)
    x = torch.randn(3, 16)
    hidden = x @ adapter.down.weight.T + adapter.down.bias
    assert hidden.shape[1] == 4
    exact = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(adapter(x), exact @ adapter.up.weight.T + adapter.up.bias, atol=1e-6, rtol=0)


def test_the_decoder_adds_the_positions_for_good() -> None:
    torch.manual_seed(1)
    tokens, pe = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    for first in (True, False):
        block = ResidualTwoWayBlock(16, 2, 24, first)
        placed = tokens if first else tokens + pe
        expected = placed + block.self_attn(placed, placed, placed)
        torch.testing.assert_close(block.among_themselves(tokens, pe), expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_is_recognised_and_loads_where_it_belongs(name: str) -> None:
    dialect = DIALECTS[name]
    network = tiny(dialect)
    file = file_of(network)
    assert Dialect.of(file) == dialect
    loaded = load_into_med_sa(tiny(dialect, seed=1), file)
    for key, tensor in network.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], tensor, atol=1e-6, rtol=0)
    blocks = list(loaded.mask_decoder.transformer.layers)
    assert all(
        type(block) is (ResidualTwoWayBlock if dialect.residual_decoder else TwoWayBlock) for block in blocks
    )


def test_the_dialects_differ_in_names_only_where_their_time_did() -> None:
    keys = {name: set(file_of(tiny(dialect))) for name, dialect in DIALECTS.items()}
    prefix, mlp = "image_encoder.blocks.0.attn", "mask_decoder.transformer.layers.1.mlp"
    assert {f"{prefix}.rel_pos_h", f"{mlp}.lin1.weight", f"{mlp}.lin2.bias"} <= keys["2023"]
    assert {f"{prefix}.rel_pos_h", f"{mlp}.layers.0.0.weight", f"{mlp}.fc.bias"} <= keys["first days of 2024"]
    assert not any(".rel_" in key for key in keys["January 2024"])
    assert {f"{prefix}.rel_h", f"{mlp}.layers.0.0.weight", f"{mlp}.fc.bias"} <= keys["today"]
    assert "image_encoder.blocks.1.mlp.lin1.weight" in keys["today"]


def test_positions_of_any_grid_are_resized_bicubically() -> None:
    network = tiny()
    file = file_of(network)
    file["image_encoder.pos_embed"] = torch.randn(1, 64, 64, 16, generator=torch.Generator().manual_seed(2))
    loaded = load_into_med_sa(network, file).image_encoder.pos_embed
    picture = file["image_encoder.pos_embed"].permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(picture, (4, 4), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(loaded, expected, atol=0, rtol=0)


def test_adapters_alone_are_refused_with_the_reason() -> None:
    zoo = {key: torch.zeros(1) for key in published_keys("med_sa_vit_b_256_adapter_only")}
    assert len(zoo) == 144
    with pytest.raises(
        WeightsError, match=r"adapters alone.*decoder trained with them is missing.*reproduced"
    ):
        load_med_sa(zoo, 256)
    assert "Medical SAM Adapter file without its decoder" in recognise(zoo)


@pytest.mark.parametrize("name", ["med_sa_vit_b.own", "med_sa_vit_b_3d.own"])
def test_every_card_builds_its_network_from_a_file_of_the_official_training(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At full size on the meta device, which holds names and shapes and no numbers."""
    keys = published_keys("med_sa_vit_b_256")
    built = []

    def copied(targets: dict[str, Tensor], tensors: dict[str, Tensor], *_: object) -> None:
        assert {key: t.shape for key, t in targets.items()} == {key: t.shape for key, t in tensors.items()}
        built.append(len(targets))

    tensors = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    monkeypatch.setattr("SAMAdaptLib.models.med_sa.copy_into", copied)
    monkeypatch.setattr(med_sa_predictors, "read_checkpoint", lambda path: Checkpoint(tensors, "00", "f.pth"))
    with torch.device("meta"):
        predictor = build_predictor(find_card(name), Path("f.pth"), None, torch.device("meta"))
    assert built == [458]
    assert isinstance(predictor, MedSaVolumePredictor if "3d" in name else MedSaSlicePredictor)


def test_a_file_as_the_official_training_writes_it_is_read(tmp_path: Path) -> None:
    network = tiny_med_sa(golden("med_sa_3d"), Dialect())
    tensors = golden("med_sa_3d").tensors(None)
    adam = torch.optim.Adam(network.parameters()).state_dict()
    file = tmp_path / "best_dice_checkpoint.pth"
    path_helper = {"prefix": "logs", "ckpt_path": "logs/Model"}
    nested = {"epoch": 3, "model": "sam", "state_dict": tensors, "optimizer": adam, "best_tol": 0.1}
    torch.save(nested | {"path_helper": path_helper}, file)
    assert all(row.passed for row in verify(golden("med_sa_3d").path, file))


def test_the_input_size_is_read_off_the_positions_or_must_be_stated() -> None:
    with torch.device("meta"):
        keys = published_keys("med_sa_vit_b_256")
        tensors = {key: torch.empty(shape) for key, shape in keys.items()}
        without = {key: tensor for key, tensor in tensors.items() if ".rel_" not in key}
        with pytest.raises(WeightsError, match="State input_size in the model's card"):
            load_med_sa(without)
    sam = {key: torch.zeros(shape) for key, shape in published_keys("sam_vit_b").items()}
    with pytest.raises(WeightsError, match=r"Medical SAM Adapter was wanted.*looks like SAM or MedSAM"):
        load_med_sa(sam)


def test_pictures_enter_as_they_did_in_their_time() -> None:
    picture = np.arange(48, dtype=np.uint8).reshape(6, 8)
    today, older = Squeezed(4, 8), Squeezed(4, 8, older=True)
    grey = torch.from_numpy(today.resize(picture)).float()
    assert grey.shape == (4, 4)
    torch.testing.assert_close(older.to_input(picture)[0, 1], grey / 255)
    torch.testing.assert_close(today.to_input(picture)[0, 1], (grey - 116.28) / 57.12)
    click = np.array([[4, 1.5]], dtype=np.float32)
    np.testing.assert_allclose(today.to_input_xy(click, (6, 8)), [[2, 1]])
    np.testing.assert_allclose(older.to_input_xy(click, (6, 8)), [[1, 2]])
    low_res = torch.tensor([[[[-1.0, 1.0], [-1.0, 1.0]]]])
    assert set(older.to_official_size(low_res).unique().tolist()) == {-1.0, 1.0}
    assert len(today.to_official_size(low_res).unique()) > 2
    assert today.to_picture(low_res, (6, 8)).shape == (1, 1, 6, 8)


def phantom(shape: tuple[int, int, int] = (9, 30, 34)) -> Volume:
    """A ball of 60 HU in air, 3 mm slices."""
    geometry = Geometry(shape, np.diag([2.0, 2.0, 3.0, 1.0]))
    z, y, x = np.indices(shape)
    ball = ((z - 4) * 3) ** 2 + ((y - 15) * 2) ** 2 + ((x - 17) * 2) ** 2 < 11**2
    return Volume(np.where(ball, 60, -1000).astype(np.int16), geometry, "CT")


def test_a_session_segments_slices_by_clicks_and_refuses_boxes() -> None:
    network = tiny()
    predictor = SliceBySlice(MedSaSlicePredictor(network, CARD, "00", Squeezed(64, 32), CPU))
    session = Session(phantom(), predictor)
    session.add(Point((34.0, 30.0, 12.0)))
    with torch.inference_mode():
        slices = MedSaSlicePredictor(network, CARD, "00", Squeezed(64, 32), CPU)
        picture = session.window.apply(phantom().geometry.plane("K", 4).extract(phantom().voxels))
        (click,) = phantom().geometry.plane("K", 4).ras_to_xy([[34.0, 30.0, 12.0]])
        prediction = slices.decode(slices.encode(picture), PixelPrompts.of([click], [1]))
    assert prediction.logits.shape == (30, 34)
    assert (prediction.logits > 0).any() == session.mask.any()
    session.propagate(range(9))  # carries a click, as the network takes no boxes
    with pytest.raises(PromptError, match="takes point prompts, but a box was"):
        session.add(Box.from_corners((10.0, 10.0, 12.0), (40.0, 40.0, 12.0)))


def test_a_region_shows_the_patient_as_the_official_code_does() -> None:
    """Slices to superior, rows to the right, columns to anterior, whatever way the voxels are stored."""
    shape = (12, 20, 24)
    z, y, x = np.indices(shape)
    ras_affine = np.diag([2.0, 3.0, 2.0, 1.0])
    values = (100 * z + 10 * y + x).astype(np.float64)
    flipped = np.diag([-2.0, -3.0, -2.0, 1.0])
    flipped[:3, 3] = [23 * 2.0, 19 * 3.0, 11 * 2.0]
    stored = [
        Volume(values, Geometry(shape, ras_affine)),
        Volume(values[::-1, ::-1, ::-1], Geometry(shape, flipped)),
    ]
    region = Region(4, 6, (2.0, 3.0, 2.0))
    window = IntensityWindow(0.0, 2000.0)
    for volume in stored:
        index = 5 if volume is stored[0] else 6
        plane = volume.geometry.plane("K", index)
        (centre_xy,) = plane.ras_to_xy([[12 * 2.0, 9 * 3.0, 5 * 2.0]])
        placed = PlacedRegion(region, volume, "K", index, centre_xy)
        seen = placed.values(window) * 2000
        for s, i, j in ((2, 3, 3), (0, 3, 3), (2, 5, 3), (2, 3, 0), (3, 4, 5)):
            assert seen[s, i, j] == pytest.approx(100 * (5 + s - 2) + 10 * (9 + j - 3) + 12 + i - 3, abs=0.01)
        click = plane.ras_to_xy([[(12 + 2) * 2.0, (9 - 1) * 3.0, 10.0]]).astype(np.float32)
        np.testing.assert_allclose(placed.to_region_ij(click), [[5, 2]], atol=1e-5)  # row, column
        back = placed.to_picture(seen.astype(np.float32), index)
        shown = plane.extract(volume.voxels)
        inside = back > 0
        assert inside.sum() == 36
        np.testing.assert_allclose(back[inside], shown[inside], atol=0.05)
        assert len(placed.slices) == 4


def test_outside_of_the_volume_a_region_is_empty() -> None:
    volume = phantom()
    placed = PlacedRegion(Region(4, 16, (2.0, 2.0, 3.0)), volume, "K", 0, np.array([0.0, 0.0]))
    seen = placed.values(IntensityWindow(-2000.0, 2000.0))
    assert seen.shape == (4, 16, 16)
    assert not seen[:2].any()  # below the first slice
    assert not seen[2, 9:].any()  # rows beyond the right border
    assert seen[2, 3, 3] == pytest.approx(0.25)


def test_a_region_of_the_network_is_segmented_as_the_official_code_does() -> None:
    """All that surrounds the network, against the network called by hand; the click is row and column."""
    network = golden_network()
    card = replace(CARD_3D, options={"side": 48})
    predictor = MedSaVolumePredictor(network, card, "00", CPU)
    values = np.random.default_rng(0).random((6, 48, 48), dtype=np.float32)
    logits, scores = predictor.segment(values, np.array([[10.0, 20.0]], np.float32), np.array([1]))
    with torch.inference_mode():
        grey = nn.functional.interpolate(torch.from_numpy(values)[:, None], (96, 96), mode="bilinear")
        embedding = network.image_encoder(Squeezed(96).standardised(grey.expand(-1, 3, -1, -1)))
        click = torch.tensor([[[10.0, 20.0]]]).expand(6, -1, -1)
        sparse, dense = network.prompt_encoder(click, torch.ones(6, 1))
        pe = network.prompt_encoder.dense_pe()
        low_res, expected = network.mask_decoder(embedding, pe, sparse, dense, slice(1))
        full = nn.functional.interpolate(low_res, (48, 48), mode="bilinear")
    np.testing.assert_allclose(logits, full[:, 0], atol=1e-5)
    np.testing.assert_allclose(scores, expected[:, 0], atol=1e-6)


def test_older_networks_get_one_prompt_of_all_clicks_and_plain_values() -> None:
    network = golden_network()
    predictor = MedSaVolumePredictor(
        network, replace(CARD_3D, options={"side": 48, "older_inputs": True}), "00", CPU
    )
    values = np.random.default_rng(0).random((6, 96, 96), dtype=np.float32)
    logits, _ = predictor.segment(values, np.array([[10.0, 20.0]], np.float32), np.array([1]))
    with torch.inference_mode():
        embedding = network.image_encoder(torch.from_numpy(values)[:, None].expand(-1, 3, -1, -1))
        clicks = torch.tensor([[[10.0, 20.0]]]).expand(-1, 6, -1)
        sparse, dense = network.prompt_encoder(clicks, torch.ones(1, 6))
        pe = network.prompt_encoder.dense_pe()
        low_res, _ = network.mask_decoder(embedding, pe, sparse, dense, slice(1))
        full = nn.functional.interpolate(low_res, (48, 48), mode="nearest")
    np.testing.assert_allclose(logits, full[:, 0], atol=1e-5)


class _Inside(MedSaVolumePredictor):
    """Finds whatever is brighter than air: what a trained network would do, to test what surrounds it."""

    def segment(
        self, values: np.ndarray, points: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        return np.where(values > 0.2, 5.0, -5.0).astype(np.float32), np.full(len(values), 0.8, np.float32)


def test_a_session_follows_an_object_from_chunk_to_chunk() -> None:
    volume = phantom()
    session = Session(volume, _Inside(golden_network(), CARD_3D, "00", CPU))
    session.add(Point((34.0, 30.0, 12.0)))
    truth = volume.voxels > 0
    np.testing.assert_array_equal(session.mask[4], truth[4])
    assert not session.mask[[3, 5]].any()
    session.propagate(range(9))
    np.testing.assert_array_equal(session.mask, truth)
    assert session.confidence[4] == pytest.approx(0.8)


def test_thick_slices_are_followed_too() -> None:
    geometry = Geometry((5, 30, 34), np.diag([2.0, 2.0, 20.0, 1.0]))
    voxels = np.full((5, 30, 34), -1000, np.int16)
    voxels[1:4, 10:20, 12:22] = 60
    session = Session(Volume(voxels, geometry, "CT"), _Inside(golden_network(), CARD_3D, "00", CPU))
    session.add(Point((34.0, 30.0, 40.0)))
    session.propagate(range(5))
    np.testing.assert_array_equal(session.mask, voxels > 0)


def test_slices_are_shared_half_way() -> None:
    assert territories([3, 8], range(12)) == {3: range(6), 8: range(6, 12)}
    assert territories([3, 8], None) == {3: range(3, 4), 8: range(8, 9)}


def test_a_volume_is_segmented_by_the_network_itself_and_refuses_what_it_cannot_do() -> None:
    predictor = MedSaVolumePredictor(golden_network(), CARD_3D, "00", CPU)
    volume, window = phantom(), IntensityWindow(-175.0, 250.0)
    with pytest.raises(VolumeError, match="A volume must be set"):
        next(predictor.predict(Prompts((Point((34.0, 30.0, 12.0)),))))
    predictor.set_volume(volume, "K", window)
    (result,) = predictor.predict(Prompts((Point((34.0, 30.0, 12.0)),)))
    assert result.index == 4
    assert result.labels.shape == (30, 34)
    assert 0 <= result.confidence <= 1
    with pytest.raises(PromptError, match="needs a click"):
        next(predictor.predict(Prompts(())))
    box = Box.from_corners((10.0, 10.0, 12.0), (40.0, 40.0, 12.0))
    with pytest.raises(PromptError, match="takes point prompts, but a box was placed"):
        next(predictor.predict(Prompts((box,))))
    colour = Volume(np.zeros((2, 4, 4, 3), np.uint8), Geometry((2, 4, 4), np.eye(4)))
    with pytest.raises(VolumeError, match="in colour"):
        predictor.set_volume(colour, "K", window)
