"""Vision Permutator: agreement with the published layers and sizes, and what timm asks of a model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distillkit.models.vip import Permutator, PermuteMLP, VisionPermutator, checkpoint_filter_fn, segment_dims

GOLDEN = np.load(Path(__file__).parent / "golden" / "models_vip.npz")
CASES = json.loads(str(GOLDEN["meta"]))["cases"]
COUNTS = json.loads((Path(__file__).parent / "golden" / "param_counts.json").read_text())["vision_permutator"]
NAMES = ("vip_s14", "vip_s7", "vip_m7", "vip_l7")


def golden_state(case: str) -> dict[str, Tensor]:
    prefix = f"{case}/sd/"
    return {k.removeprefix(prefix): torch.from_numpy(GOLDEN[k]) for k in GOLDEN.files if k.startswith(prefix)}


def golden_model(case: str) -> nn.Module:
    facts = CASES[case]
    made: dict[str, Any] = {
        "wpm_4": lambda: PermuteMLP(facts["dim"], facts["segment_dim"]),
        "wpm_2_bias": lambda: PermuteMLP(facts["dim"], facts["segment_dim"], qkv_bias=facts["qkv_bias"]),
        "block": lambda: Permutator(facts["dim"], facts["segment_dim"], facts["mlp_ratio"]),
        "tiny": tiny,
    }
    model = made[case]()
    model.load_state_dict(golden_state(case))  # every name of the release, and no other
    return model.double().eval()


def tiny(**options: Any) -> VisionPermutator:
    """The stages of the golden model: 8x8 tokens, halved after the first stage, then 4x4."""
    facts = CASES["tiny"]
    sizes = {
        key: facts[key] for key in ("layers", "img_size", "patch_size", "num_classes", "embed_dims", "transitions")
    }
    return VisionPermutator(**{**sizes, "mlp_ratio": 3, **options})


def pictures(n: int = 2, side: int = 56, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: np.ndarray, tolerance: float) -> None:
    """Equal up to ``tolerance`` of the largest entry."""
    assert np.abs(got.detach().double().numpy() - want).max() <= tolerance * np.abs(want).max()


# ---- as published


@pytest.mark.parametrize("case", list(CASES))
def test_outputs_and_gradients_are_the_published_ones(case: str) -> None:
    model = golden_model(case)
    x = torch.from_numpy(GOLDEN[f"{case}/x0"]).double().requires_grad_()
    y = model(x)
    close(y, GOLDEN[f"{case}/y0"], 1e-5)
    (y * torch.from_numpy(GOLDEN[f"{case}/w0"])).sum().backward()
    assert x.grad is not None
    close(x.grad, GOLDEN[f"{case}/gx0"], 1e-4)
    parameters = dict(model.named_parameters())
    names = [str(name) for name in GOLDEN[f"{case}/pnames"]]
    assert set(names) == set(parameters)
    gradients = [parameters[name].grad for name in names]
    close(torch.stack([g.sum() for g in gradients]), GOLDEN[f"{case}/pgrad_sum"], 1e-4)
    close(torch.stack([g.norm() for g in gradients]), GOLDEN[f"{case}/pgrad_l2"], 1e-4)


@pytest.mark.parametrize("case", ["wpm_4", "wpm_2_bias"])
def test_the_plain_sum_is_the_same_layer_without_its_weights(case: str) -> None:
    facts = CASES[case]
    layer = PermuteMLP(facts["dim"], facts["segment_dim"], facts.get("qkv_bias", False), weighted=False)
    layer.load_state_dict({k: v for k, v in golden_state(case).items() if not k.startswith("reweight")})
    close(layer.double()(torch.from_numpy(GOLDEN[f"{case}/x0"]).double()), GOLDEN[f"{case}/plain_y"], 1e-5)


def test_weights_that_are_equal_are_a_third_of_the_plain_sum() -> None:
    torch.manual_seed(0)
    weighted, plain = PermuteMLP(16, 4), PermuteMLP(16, 4, weighted=False)
    for parameter in weighted.reweight.parameters():
        nn.init.zeros_(parameter)
    plain.load_state_dict({k: v for k, v in weighted.state_dict().items() if not k.startswith("reweight")})
    x = torch.randn(2, 4, 4, 16)
    torch.testing.assert_close(3 * (weighted(x) - weighted.proj.bias), plain(x) - plain.proj.bias)


def test_each_branch_mixes_along_its_own_line() -> None:
    """Of one changed token the height branch moves its column, the width branch its row, the channel branch itself."""
    layer = PermuteMLP(12, 4, weighted=False).double()
    x = torch.randn(1, 4, 4, 12, dtype=torch.float64)
    other = x.clone()
    other[0, 1, 2] += 1
    for kept, moved in {"mlp_h": (slice(None), 2), "mlp_w": (1, slice(None)), "mlp_c": (1, 2)}.items():
        branch = PermuteMLP(12, 4, weighted=False).double()
        branch.load_state_dict(layer.state_dict())
        for name in {"mlp_h", "mlp_w", "mlp_c"} - {kept}:
            nn.init.zeros_(getattr(branch, name).weight)
        changed = (branch(other) - branch(x)).abs().amax(-1)[0] > 1e-9
        expected = torch.zeros(4, 4, dtype=torch.bool)
        expected[moved] = True
        assert torch.equal(changed, expected), kept


@pytest.mark.parametrize("name", NAMES)
def test_parameters_tensors_and_multiplications_are_the_published_ones(name: str) -> None:
    want = COUNTS[f"{name}@224"]
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, want["resolution"], want["resolution"]))
    assert sum(p.numel() for p in model.parameters()) == want["params"]
    assert len(model.state_dict()) == want["tensors"]
    assert len(list(model.buffers())) == want["buffers"]
    assert round(counter.get_total_flops() / 2e9, 4) == want["macs_G"]
    assert f"{want['params']:,}" in str(timm.model_entrypoint(name).__doc__)


@pytest.mark.parametrize(
    ("name", "transitions", "stages"),
    [("vip_s14", [], 4), ("vip_s7", [1], 5), ("vip_m7", [2], 5), ("vip_l7", [1], 5)],
)
def test_stages_and_transitions_are_numbered_as_published(name: str, transitions: list[int], stages: int) -> None:
    with torch.device("meta"):
        names = set(timm.create_model(name).state_dict())
    assert {
        int(n.split(".")[1]) for n in names if n.startswith("network.") and ".proj." in n and n.count(".") == 3
    } == set(transitions)
    assert {n.split(".")[1] for n in names if n.startswith("network.")} == {str(i) for i in range(stages)}
    block = {n.removeprefix("network.0.0.") for n in names if n.startswith("network.0.0.")}
    biased = ("norm1", "attn.reweight.fc1", "attn.reweight.fc2", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    mixing = {f"attn.mlp_{branch}.weight" for branch in "chw"}
    assert block == {f"{layer}.{kind}" for layer in biased for kind in ("weight", "bias")} | mixing


def test_initialisation_and_stochastic_depth_follow_the_published_rules() -> None:
    torch.manual_seed(0)
    model = tiny(embed_dims=(64, 64, 64), drop_path_rate=0.3)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15)
            assert module.bias is None or not module.bias.any()
    blocks = [m for m in model.modules() if isinstance(m, Permutator)]
    rates = [b.drop_path.drop_prob if isinstance(b.drop_path, DropPath) else 0 for b in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


# ---- as one of timm's


def test_timm_makes_it_by_name_and_knows_how_pictures_are_prepared() -> None:
    with torch.device("meta"):
        model = timm.create_model("vip_s7", num_classes=7, in_chans=1, img_size=112)
        assert model(torch.empty(2, 1, 112, 112)).shape == (2, 7)
    assert set(NAMES) <= set(timm.list_models("vip_*", module="vip"))
    prepared = timm.data.resolve_data_config({}, model=model)
    assert (prepared["crop_pct"], prepared["interpolation"]) == (0.9, "bicubic")
    assert timm.get_pretrained_cfg("vip_l7").crop_pct == 0.875


def test_features_head_and_classifier() -> None:
    model = tiny().eval()
    x = pictures()
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 16, 32)
    embedding = model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(embedding, tokens.mean(1))
    torch.testing.assert_close(model(x), model.get_classifier()(embedding))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(3, "")
    assert model(x).shape == (2, 16, 3)
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(x), embedding)
    with pytest.raises(ValueError, match="global_pool must be 'avg'"):
        model.reset_classifier(3, "token")


def test_intermediates_are_the_stages_maps() -> None:
    model = tiny().eval()
    x = pictures()
    tokens, maps = model.forward_intermediates(x)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 8, 8), (2, 32, 4, 4), (2, 32, 4, 4)]
    torch.testing.assert_close(tokens, model.forward_features(x))
    torch.testing.assert_close(model.norm(maps[-1].flatten(2).mT), tokens)
    (last,) = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True, output_fmt="NHWC")
    torch.testing.assert_close(last.flatten(1, 2), tokens)
    stopped, (first,) = model.forward_intermediates(x, indices=[0], stop_early=True)
    torch.testing.assert_close(first, maps[0])
    assert stopped.shape == (2, 64, 16)
    with pytest.raises(ValueError, match="output_fmt must be"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (0, 3), (0,), (1, 2)])
def test_features_only_gives_maps_and_leaves_no_parameter_without_use(indices: tuple[int, ...]) -> None:
    options = {"img_size": 56, "embed_dims": (16, 32, 32, 32), "layers": (1, 1, 1, 1)}
    torch.manual_seed(0)
    model = timm.create_model("vip_s7", features_only=True, out_indices=indices, **options)
    maps = model(pictures())
    assert [m.shape[1] for m in maps] == model.feature_info.channels() == [(16, 32, 32, 32)[i] for i in indices]
    assert [56 // m.shape[-1] for m in maps] == model.feature_info.reduction() == [(7, 14, 14, 14)[i] for i in indices]
    sum(m.square().sum() for m in maps).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_a_graph_with_recomputed_activations_can_be_walked_twice() -> None:
    model = tiny().train()
    model.set_grad_checkpointing(True)
    loss = model(pictures()).square().sum()
    first = torch.autograd.grad(loss, model.patch_embed.proj.weight, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, model.patch_embed.proj.weight), first)


def test_checkpointing_changes_no_gradient() -> None:
    torch.manual_seed(0)
    model = tiny().train()
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(pictures()).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("weighted", [True, False])
def test_it_compiles_whole_and_exports(weighted: bool) -> None:
    model = tiny(weighted=weighted).eval()
    x = pictures()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(pictures(5)), model(pictures(5)))


def test_a_training_step_compiles_whole() -> None:
    model = tiny(drop_path_rate=0.1).train()
    torch.compile(model, fullgraph=True, backend="eager")(pictures()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_layer_decay_knows_every_parameter_and_its_depth() -> None:
    model = tiny()
    names = {id(p): n for n, p in model.named_parameters()}
    scale = {
        names[id(p)]: group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.5)
        for p in group["params"]
    }
    assert set(scale) == set(names.values())
    order = ("patch_embed", "network.0.0", "network.0.1", "network.1", "network.2", "network.3", "head")
    by_depth = [{s for n, s in scale.items() if n.startswith(prefix)} for prefix in order]
    assert by_depth == [{0.5**i} for i in reversed(range(len(order)))]
    assert scale["norm.weight"] == 0.5  # with the last block


@pytest.mark.parametrize("wrapper", ["state_dict", "state_dict_ema", None])
@pytest.mark.parametrize("way", ["file", "checkpoint_path"])
def test_checkpoints_load_in_every_wrapping(tmp_path: Path, wrapper: str | None, way: str) -> None:
    options = {"img_size": 56, "embed_dims": (16, 32, 32, 32), "layers": (1, 1, 1, 1)}
    source = timm.create_model("vip_s7", **options)
    weights = {f"module.{name}": value for name, value in source.state_dict().items()}
    torch.save({wrapper: weights} if wrapper else weights, tmp_path / "vip_s7.pth")
    assert checkpoint_filter_fn({wrapper: weights} if wrapper else weights, source).keys() == source.state_dict().keys()
    if way == "file":
        found = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "vip_s7.pth")}}
    else:
        found = {"checkpoint_path": str(tmp_path / "vip_s7.pth")}
    loaded = timm.create_model("vip_s7", **options, **found)
    for name, value in source.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_another_number_of_classes_is_named_or_gets_a_new_head(tmp_path: Path) -> None:
    options = {"img_size": 56, "embed_dims": (16, 32, 32, 32), "layers": (1, 1, 1, 1)}
    source = timm.create_model("vip_s7", num_classes=6, **options)
    torch.save(source.state_dict(), tmp_path / "six.pth")

    def loaded(classes: int, **overlay: Any) -> nn.Module:
        file = {"file": str(tmp_path / "six.pth"), **overlay}
        return timm.create_model("vip_s7", True, pretrained_cfg_overlay=file, num_classes=classes, **options)

    with pytest.raises(ValueError, match="6 classes as the model has, but timm would leave its heads out"):
        loaded(6)
    with pytest.raises(ValueError, match="has 6 classes and the model 1000"):
        loaded(1000)
    assert torch.equal(loaded(6, num_classes=6).head.weight, source.head.weight)
    assert loaded(7).head.out_features == 7


# ---- sizes


@pytest.mark.parametrize(("name", "size", "sides"), [("vip_s7", 112, (16, 8)), ("vip_m7", 448, (64, 64, 32, 32))])
def test_another_size_has_other_segments_and_the_same_weights(name: str, size: int, sides: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model, released = timm.create_model(name, img_size=size), timm.create_model(name)
    found = [m.segment_dim for m in model.modules() if isinstance(m, PermuteMLP)]
    assert found[0] == sides[0]
    assert found[-1] == sides[-1]
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, released)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": (224, 112)}, r"img_size=\(224, 112\): pictures must be square"),
        ({"img_size": 231}, "a multiple of 14"),
        ({"img_size": 280}, "img_size=280 makes 40 tokens a side in stage 0, which do not divide its 192 channels"),
        ({"layers": (1, 2)}, "one entry a stage, got 2, 4 and 4"),
        ({"global_pool": "max"}, "global_pool must be 'avg' or ''"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        VisionPermutator(**options)


def test_pictures_and_maps_of_another_size_are_named() -> None:
    model = tiny()
    for height, width in ((224, 224), (56, 112), (63, 63)):
        with pytest.raises(ValueError, match=rf"{height}x{width}, this model takes 56x56.*img_size="):
            model(torch.rand(1, 3, height, width))
    with pytest.raises(ValueError, match="img_size=112: this model stays with pictures of 56x56"):
        model.set_input_size(img_size=112)
    with pytest.raises(ValueError, match="2x8 tokens, this layer mixes 4x4"):
        PermuteMLP(16, 4)(torch.rand(1, 2, 8, 16))
    with pytest.raises(ValueError, match="10 channels cannot be cut into 4 segments"):
        PermuteMLP(10, 4)
    assert segment_dims(224, 7, (192, 384, 384, 384), (True, False, False, False)) == [32, 16, 16, 16]
