"""LV-ViT, DeepViT and Refiner-ViT: agreement with the published networks, sizes, timm's interface, attention maps."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import distillkit.models.classifiers  # noqa: F401  (registers the models)
from distillkit.evaluation.attention import (
    adjacent_similarity,
    attention_maps,
    attention_similarity,
    plot_similarity,
    recorded_attention,
)
from distillkit.losses.attention import attention_cosine
from distillkit.models import deepvit
from distillkit.models.deepvit import DeepViT, ReAttention
from distillkit.models.lvvit import LVViT
from distillkit.models.refiner import DLA, ConvDLA, LinearDLA, RefinedAttention, RefinerViT
from distillkit.models.vit import checkpoint_filter_fn, resize_grid, resize_pos_embed

GOLDEN = Path(__file__).parent / "golden"
SIZES = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 16, "num_heads": 4}
TINY = {
    "lvvit": lambda **o: LVViT(**{**SIZES, "depth": 3, "stem_width": 4, **o}),
    "deepvit": lambda **o: DeepViT(**{**SIZES, "depth": 3, "re_attention": [False, True, True], **o}),
    "plain": lambda **o: DeepViT(**{**SIZES, "depth": 3, "re_attention": False, "conv_stem": True, **o}),
    "refiner": lambda **o: RefinerViT(**{**SIZES, "depth": 4, **o}),
    "refiner-paper": lambda **o: RefinerViT(**{**SIZES, "depth": 3, "convention": "paper", **o}),
}
families = pytest.mark.parametrize("family", TINY)


def tiny(family: str, **options) -> nn.Module:
    """A small model with weights of every size, so that no branch is lost in rounding."""
    torch.manual_seed(0)
    model = TINY[family](**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def images(size: int = 32, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def close(ours: Tensor, theirs: np.ndarray, tolerance: float = 1e-5, least: float = 1e-12) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours.detach().numpy() - theirs).max() <= tolerance * max(np.abs(theirs).max(), least)


# ---- agreement with the published networks


@pytest.fixture
def lvvit(request) -> tuple[LVViT, dict[str, np.ndarray]]:
    golden = dict(np.load(GOLDEN / f"dense_lvvit_{request.param}_a.npz"))
    config = json.loads(str(golden["meta"]))["config"]
    config["stem_width"] = 64 if config.pop("p_emb") == "4_2" else 0
    config["dense_head"] = config.pop("return_dense")
    del config["mix_token"]
    model = LVViT(**config)
    state = {k.removeprefix("state/"): torch.from_numpy(v) for k, v in golden.items() if k.startswith("state/")}
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model, golden


@pytest.mark.parametrize("lvvit", ["lv_a", "naive_b"], indirect=True)
def test_lvvit_agrees_with_the_published_network(lvvit):
    model, golden = lvvit
    image = torch.from_numpy(golden["x"]).float()
    model.eval()
    close(model.patch_embed(image), golden["eval/embeddings"])
    close(model.forward_features(image), golden["eval/features"])
    close(model(image), golden["eval/out"])


@pytest.mark.parametrize("run", [0, 1])
@pytest.mark.parametrize("lvvit", ["lv_a", "naive_b"], indirect=True)
def test_lvvit_with_mixed_tokens_agrees_with_the_published_training(lvvit, run):
    """MixToken outside of the model, through hooks, is the published MixToken inside of it."""
    model, golden = lvvit
    expected = {k.removeprefix(f"train{run}/"): v for k, v in golden.items() if k.startswith(f"train{run}/")}
    x1, y1, x2, y2 = expected["bbox"].tolist()
    seen: dict[str, Tensor] = {}

    def mix(grid: Tensor) -> Tensor:
        mixed = grid.clone()
        mixed[:, :, x1:x2, y1:y2] = grid.flip(0)[:, :, x1:x2, y1:y2]
        return mixed

    def hook(name, transform=lambda y: y):
        def run_hook(module, inputs, output):
            seen[name], seen[f"{name}/in"] = output, inputs[0]
            return transform(output)

        model.get_submodule(name).register_forward_hook(run_hook)

    hook("patch_embed", mix)
    for name in ("norm", "head", "aux_head"):
        hook(name)
    model.train()(torch.from_numpy(golden["x"]).float())
    grid = model.patch_embed.grid_size
    tokens = seen["aux_head"].transpose(1, 2).unflatten(2, grid)  # (B, classes, h, w)
    unmixed = mix(tokens).flatten(2).transpose(1, 2)

    close(seen["patch_embed"], expected["embeddings"])
    close(mix(seen["patch_embed"]).flatten(2).transpose(1, 2), expected["tokens_mixed"])
    close(seen["norm"], expected["tokens_out"])
    close(seen["head"], expected["x_cls"])
    close(unmixed, expected["x_aux"])

    target = torch.from_numpy(expected["target"])
    lam = 1 - (x2 - x1) * (y2 - y1) / (grid[0] * grid[1])
    classes = lam * target[:, :, 1] + (1 - lam) * target[:, :, 1].flip(0)
    loss = cross_entropy(seen["head"], classes) + 0.5 * cross_entropy(unmixed, target[:, :, 2:].transpose(1, 2))
    close(loss, expected["loss"])
    loss.backward()
    for name in ("head.weight", "aux_head.weight", "pos_embed", "cls_token"):
        close(model.get_parameter(name).grad, expected[f"grad/{name}"], 1e-4)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * logits.log_softmax(-1)).sum(-1).mean()


def test_position_embeddings_are_resized_as_published():
    golden = np.load(GOLDEN / "dense_tl_posembed_a.npz")
    for name, prefix in (("with_cls", 1), ("no_cls", 0)):
        resized = resize_pos_embed(torch.from_numpy(golden[name]), (4, 4), (6, 6), prefix)
        close(resized, golden[f"{name}_out"], 1e-6)
    close(resize_grid(torch.from_numpy(golden["map4d"]), (6, 6)), golden["map4d_out"], 1e-6)


def half_block() -> deepvit.Block:
    """Stored alone, with LayerNorm's own eps; the networks have another."""
    block = deepvit.Block(16, 4, scale_adjustment=0.5)
    block.norm1.eps = block.norm2.eps = 1e-5
    return block


REFERENCE = {
    ("deepvit", "reattn"): lambda: ReAttention(16, 4),
    ("deepvit", "reattn_train"): lambda: ReAttention(16, 4),
    ("deepvit", "reattn_scaled"): lambda: ReAttention(16, 4, transform_scale=True),
    ("deepvit", "reattn_off"): lambda: ReAttention(16, 4, re_attention=False),
    ("deepvit", "block_half"): lambda: half_block(),
    ("deepvit", "tiny_eval"): lambda: DeepViT(16, 4, 3, 5, embed_dim=16, depth=3, num_heads=4, re_attention=[0, 1, 1]),
    ("refiner", "dla_eval"): lambda: DLA(4),
    ("refiner", "dla_train"): lambda: DLA(4),
    ("refiner", "dla_conv_only"): lambda: ConvDLA(4),
    ("refiner", "attn_plain"): lambda: RefinedAttention(16, 4),
    ("refiner", "attn_plain_prev"): lambda: RefinedAttention(16, 4),
    ("refiner", "attn_share"): lambda: RefinedAttention(16, 4, form="share"),
    ("refiner", "attn_transform"): lambda: RefinedAttention(16, 4, form="transform", ratio=2),
    ("refiner", "tiny_eval"): lambda: RefinerViT(16, 4, 3, 5, embed_dim=16, depth=4, num_heads=4),
    ("refiner", "tiny_cls_only"): lambda: RefinerViT(16, 4, 3, 5, embed_dim=16, depth=4, num_heads=4, dense_head=False),
}
WEIGHTS_OF = {"reattn_train": "reattn", "dla_train": "dla_eval", "tiny_cls_only": "tiny_eval"}


@pytest.mark.parametrize(("family", "case"), REFERENCE)
def test_operators_agree_with_the_published_ones(family, case):
    """Outputs, maps, and the gradients of inputs and of every parameter, in float64."""
    golden = np.load(GOLDEN / f"models_{family}.npz")
    module = REFERENCE[family, case]().double().train(case.endswith("_train"))
    weights = f"{WEIGHTS_OF.get(case, case)}/sd/"
    state = {k.removeprefix(weights): torch.from_numpy(golden[k]) for k in golden.files if k.startswith(weights)}
    names = list(module.state_dict())
    module.load_state_dict({k: v for k, v in state.items() if k in names or case != "tiny_cls_only"})

    inputs = [torch.from_numpy(golden[k]).double().requires_grad_() for k in files(golden, f"{case}/x")]
    if isinstance(module, (ReAttention, deepvit.Block)):
        with recorded_attention(module) as maps:
            outputs = [module(*inputs), *maps]
    else:
        found = module(*inputs)
        outputs = list(found) if isinstance(found, tuple) else [found]
    expected = [golden[k] for k in files(golden, f"{case}/y")]
    for ours, theirs in zip(outputs, expected, strict=True):
        close(ours, theirs, 1e-9)
    sum((y * torch.from_numpy(golden[k])).sum() for y, k in zip(outputs, files(golden, f"{case}/w"))).backward()
    for x, k in zip(inputs, files(golden, f"{case}/gx"), strict=True):
        close(x.grad, golden[k], 1e-8)
    named = golden[f"{case}/pnames"].tolist()
    assert sorted(named) == sorted(n for n, _ in module.named_parameters())
    largest = np.abs(golden[f"{case}/pgrad_l2"]).max()
    for name, total, norm in zip(named, golden[f"{case}/pgrad_sum"], golden[f"{case}/pgrad_l2"]):
        gradient = module.get_parameter(name).grad
        close(gradient.sum(), total, 1e-8, least=largest)
        close(gradient.norm(), norm, 1e-8, least=largest)


def files(golden, prefix: str) -> list[str]:
    return sorted(k for k in golden.files if k.startswith(prefix) and k.removeprefix(prefix).isdigit())


def test_the_papers_refinement_is_three_linear_steps():
    torch.manual_seed(0)
    refine = LinearDLA(4, ratio=2)
    maps = torch.rand(2, 4, 7, 7)
    expanded = torch.einsum("ei,bixy->bexy", refine.conv_exp.weight[:, :, 0, 0], maps)
    local = torch.stack(
        [F.conv2d(expanded[:, i : i + 1], refine.depth_sep_conv.weight[i : i + 1], padding=1)[:, 0] for i in range(8)],
        1,
    )
    torch.testing.assert_close(refine(maps), torch.einsum("he,bexy->bhxy", refine.conv_pro.weight[:, :, 0, 0], local))
    torch.testing.assert_close(refine(3 * maps), 3 * refine(maps))


def test_in_the_papers_convention_every_block_refines_its_own_maps():
    blocks = tiny("refiner-paper").blocks
    assert all(isinstance(b.attn.DLA, LinearDLA) and b.attn.qkv.out_features == 48 for b in blocks)
    with torch.no_grad():
        x = torch.randn(2, 5, 16)
        _, handed_on = blocks[1](x, None)
    assert handed_on is None
    names = tiny("refiner-paper").state_dict()
    assert not any("adapt_bn" in n or "DLA.bn" in n for n in names)


# ---- sizes


COUNTS = json.loads((GOLDEN / "param_counts.json").read_text())
PUBLISHED = {
    "Refiner_ViT_S": "refiner_vit_s",
    "Refiner_ViT_M": "refiner_vit_m",
    "Refiner_ViT_L": "refiner_vit_l",
    "deepvit_patch16_224_re_attn_16b": "deepvit_16b",
    "deepvit_patch16_224_re_attn_24b": "deepvit_24b",
    "deepvit_patch16_224_re_attn_32b": "deepvit_32b",
    "deepvit_S": "deepvit_s",
    "deepvit_L": "deepvit_l",
    "deepvit_L_384": "deepvit_l",
    "vit_384_12b": "deepvit_16b",
    "vit_384_16b": "deepvit_16b",
    "vit_384_24b": "deepvit_24b",
    "vit_384_32b": "deepvit_32b",
}
SIZED = [(group, key) for group in ("refiner", "deepvit", "deepvit_plain_vit") for key in COUNTS[group]]


@pytest.mark.parametrize(("group", "key"), SIZED)
def test_presets_have_the_published_sizes(group, key):
    expected = COUNTS[group][key]
    options = {"re_attention": False} if group == "deepvit_plain_vit" else {}
    if key.startswith("vit_384_12b"):
        options["depth"] = 12
    model, macs = counted(PUBLISHED[key.partition("@")[0]], expected["resolution"], **options)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == expected["params"]
    assert parameters - aux_parameters(model) == expected["params_no_aux"]
    assert len(model.state_dict()) == expected["tensors"]
    if "buffers" in expected:
        assert sum(b.numel() for b in model.buffers()) == expected["buffers"]
    assert round(macs, 4) == expected["macs_G"]


@pytest.mark.parametrize(
    ("name", "size", "parameters", "without_aux", "macs"),
    [
        ("lvvit_t", 224, 8.535, 8.294, 2.87),
        ("lvvit_s", 224, 26.152, 25.767, 6.57),
        ("lvvit_s", 384, 26.298, 25.913, 22.17),
        ("lvvit_m", 224, 55.831, 55.318, 12.74),
        ("lvvit_l", 224, 150.022, 149.253, 34.78),
        ("lvvit_l", 448, 150.474, 149.705, 157.0),
    ],
)
def test_lvvit_has_the_published_sizes(name, size, parameters, without_aux, macs):
    model, counted_macs = counted(name, size)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 3) == parameters
    assert round((count - aux_parameters(model)) / 1e6, 3) == without_aux
    assert 0.98 * macs < counted_macs < macs  # the published count has the softmax in it


def counted(name: str, size: int, **options) -> tuple[nn.Module, float]:
    """A preset without memory, and its GMACs in convolutions, linear layers and matrix products."""
    with torch.device("meta"):
        model = timm.create_model(name, img_size=size, **options).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size))
    return model, counter.get_total_flops() / 2e9


def aux_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.aux_head.parameters()) if model.aux_head is not None else 0


@pytest.mark.parametrize("name", ["lvvit_t", "refiner_vit_s"])
def test_without_the_dense_head_its_parameters_are_gone(name):
    with torch.device("meta"):
        model, whole = timm.create_model(name, dense_head=False), timm.create_model(name)
    assert set(whole.state_dict()) - set(model.state_dict()) == {"aux_head.weight", "aux_head.bias"}


# ---- timm's interface


def test_models_are_made_by_name():
    names = {"lvvit_t", "lvvit_s", "lvvit_m", "lvvit_l", "deepvit_16b", "deepvit_24b", "deepvit_32b", "deepvit_s"}
    names |= {"deepvit_l", "refiner_vit_s", "refiner_vit_m", "refiner_vit_l"}
    assert names <= set(timm.list_models())
    with torch.device("meta"):
        for name in names:
            model = timm.create_model(name, num_classes=7, in_chans=1)
            assert model.pretrained_cfg["architecture"] == name
            first = model.get_submodule(model.pretrained_cfg["first_conv"])
            assert first.in_channels == 1
            assert model.get_classifier().out_features == model.num_classes == 7
    with pytest.raises(RuntimeError, match="No pretrained weights exist for lvvit_t"):
        timm.create_model("lvvit_t", pretrained=True)


@families
def test_the_logits_are_those_of_both_heads_in_training_too(family):
    model, calls = tiny(family), []
    heads = [h for h in (model.head, model.aux_head) if h is not None]
    for head in heads:
        head.register_forward_hook(lambda module, inputs, output: calls.append((inputs[0], output)))
    for training in (False, True):
        logits = model.train(training)(images())
        assert [tuple(x.shape) for x, _ in calls] == [(2, 16), (2, 16, 16)][: len(heads)]
        expected = calls[0][1] + (0.5 * calls[1][1].amax(1) if len(heads) == 2 else 0)
        torch.testing.assert_close(logits, expected)
        calls.clear()


@families
def test_features_in_between(family):
    model = tiny(family).eval()
    depth = len(model.blocks)
    behind = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, i, y: behind.append(y[0] if isinstance(y, tuple) else y))
    features = model.forward_features(images())
    whole = list(behind)
    last, maps = model.forward_intermediates(images())
    torch.testing.assert_close(last, features)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 4, 4)] * depth
    for found, tokens in zip(maps, whole, strict=True):
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens[:, 1:])
    behind.clear()
    ((patches, prefix),) = model.forward_intermediates(
        images(), [1], return_prefix_tokens=True, norm=True, stop_early=True, output_fmt="NLC", intermediates_only=True
    )
    assert len(behind) == 2
    torch.testing.assert_close(torch.cat([prefix, patches], 1), model.norm(whole[1]))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 0])
    with pytest.raises(ValueError, match="'NCHW' or 'NLC'"):
        model.forward_intermediates(images(), output_fmt="NHWC")
    named = model.forward_intermediates(images(), [1], return_prefix_tokens=True, output_dict=True)
    assert list(named) == ["image_intermediates", "image_intermediates_prefix", "image_features"]
    torch.testing.assert_close(named["image_features"], features)
    torch.testing.assert_close(named["image_intermediates"][0], maps[1])
    torch.testing.assert_close(named["image_intermediates_prefix"][0], whole[1][:, :1])
    assert list(model.forward_intermediates(images(), output_dict=True, intermediates_only=True)) == [
        "image_intermediates"
    ]


@pytest.mark.parametrize("name", ["lvvit_t", "deepvit_16b", "refiner_vit_s"])
def test_features_only(name):
    sizes = {"img_size": 64, "embed_dim": 16, "num_heads": 4, "depth": 6}
    features = timm.create_model(name, features_only=True, out_indices=(1, 3), **sizes)
    assert features.feature_info.channels() == [16, 16]
    assert features.feature_info.reduction() == [16, 16]
    maps = features(images(64))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 4, 4)] * 2
    assert len(features.model.blocks) == 4
    sum(m.square().sum() for m in maps).backward()
    assert [n for n, p in features.named_parameters() if p.grad is None] == []
    assert len(timm.create_model(name, features_only=True, **sizes)(images(64))) == 3


@families
def test_heads_can_be_exchanged_and_left_out(family):
    model = tiny(family).eval()
    features = model.forward_features(images())
    dense = model.aux_head is not None
    model.reset_classifier(9)
    assert model(images()).shape == (2, 9)
    assert (model.aux_head is not None) == dense
    model.reset_classifier(0)
    torch.testing.assert_close(model(images()), features[:, 0])
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(images()), features)
    with pytest.raises(ValueError, match=r"global_pool='' keeps all tokens.* or reset_classifier\(9, \"token\"\)"):
        model.reset_classifier(9)
    model.reset_classifier(9, "token")
    assert model(images()).shape == (2, 9)
    with pytest.raises(ValueError, match="global_pool must be 'token', 'avg' or '', got 'max'"):
        tiny(family, global_pool="max")


@families
def test_patch_tokens_can_be_averaged_where_no_dense_head_reads_them(family):
    options = {} if family in ("deepvit", "plain") else {"dense_head": False}
    model = tiny(family, global_pool="avg", **options).eval()
    features = model.forward_features(images())
    torch.testing.assert_close(model(images()), model.head(features[:, 1:].mean(1)))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 1:].mean(1))
    if options:
        with pytest.raises(ValueError, match=r"'avg' cannot stand beside a dense head.*dense_head=False"):
            tiny(family, global_pool="avg")


@families
def test_recomputed_activations_change_neither_gradients_nor_statistics(family):
    gradients, statistics = [], []
    for recompute in (False, True):
        model = tiny(family).train()
        model.set_grad_checkpointing(recompute)
        model(images()).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        statistics.append({n: b.clone() for n, b in model.named_buffers()})
    for ours, theirs in ((gradients[1], gradients[0]), (statistics[1], statistics[0])):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, msg=name)


@families
def test_a_graph_with_recomputed_activations_can_be_walked_twice(family):
    model = tiny(family).train()
    model.set_grad_checkpointing()
    loss = model(images()).square().sum()
    once = {n: b.clone() for n, b in model.named_buffers()}
    first = torch.autograd.grad(loss, model.pos_embed, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, model.pos_embed), first)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, once[name], msg=name)


@families
def test_every_parameter_takes_part(family):
    model = tiny(family).train()
    model(images()).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@families
def test_export_keeps_the_output_for_any_number_of_images(family):
    model = tiny(family).eval()
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(model, (images(),), dynamic_shapes=shapes).module()
    for count in (2, 5):
        torch.testing.assert_close(exported(images(count=count)), model(images(count=count)))


@pytest.mark.parametrize(
    ("family", "backend", "recompute"), [*((f, "eager", False) for f in TINY), ("deepvit", "aot_eager", True)]
)
def test_compiles_whole(family, backend, recompute):
    torch.compiler.reset()
    model, plain = tiny(family).train(), tiny(family).train()
    model.set_grad_checkpointing(recompute)
    logits, expected = torch.compile(model, fullgraph=True, backend=backend)(images()), plain(images())
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(model.pos_embed.grad, plain.pos_embed.grad)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer)


@families
def test_first_weights_are_the_published_ones(family):
    torch.manual_seed(0)
    model = TINY[family](embed_dim=64, num_classes=200)
    for name, parameter in model.named_parameters():
        if name.endswith("scale_channel"):
            assert (parameter == 1e-5).all()
        elif name in ("cls_token", "pos_embed") or isinstance(owner(model, name), nn.Linear):
            spread = 0.0 if name.endswith("bias") else 0.02
            assert parameter.std().item() == pytest.approx(spread, rel=0.3), name
        elif isinstance(owner(model, name), nn.LayerNorm | nn.BatchNorm2d):
            assert (parameter == float(name.endswith("weight"))).all()


def owner(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


@families
def test_stochastic_depth(family):
    depth = len(tiny(family).blocks)
    model = tiny(family, drop_path_rate=0.6)
    rates = [b.drop_path.drop_prob for b in model.blocks]
    assert rates == pytest.approx([0.6 * i / (depth - 1) for i in range(depth)])
    model.eval()
    torch.testing.assert_close(model(images()), tiny(family).eval()(images()))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert not torch.allclose(model(images()), model(images()))


@families
def test_decay_groups_hold_every_parameter_once_and_rise_with_depth(family):
    model = tiny(family)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    grouped = [(names[id(p)], g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]]
    assert sorted(n for n, _, _ in grouped) == sorted(names.values())
    scale = {n: s for n, s, _ in grouped}
    depth = len(model.blocks)
    assert scale["cls_token"] == scale["pos_embed"] == scale["patch_embed.proj.weight"] == 0.5 ** (depth + 1)
    assert [scale[f"blocks.{i}.norm1.weight"] for i in range(depth)] == [0.5 ** (depth - i) for i in range(depth)]
    assert scale["norm.weight"] == 0.5
    assert scale["head.weight"] == 1
    assert {n for n, _, w in grouped if w == 0} >= {"cls_token", "pos_embed", "head.bias"}


@families
def test_other_image_sizes(family):
    model = tiny(family).eval()
    with pytest.raises(ValueError, match=r"64 x 64 pixels.* takes 32 x 32: .*img_size=\(64, 64\) or dynamic_img_size"):
        model(images(64))
    dynamic = tiny(family, dynamic_img_size=True).eval()
    torch.testing.assert_close(dynamic(images()), model(images()))
    with pytest.raises(ValueError, match=r"60 x 60 pixels .* patches of 8 x 8: .*multiples of 8"):
        dynamic(images(60))
    with pytest.raises(ValueError, match=r"img_size=\(30, 32\) is not a multiple of the patch size, 8"):
        TINY[family](img_size=(30, 32))
    # the position embedding is resized as that of a checkpoint is
    built = tiny(family, img_size=48).eval()
    built.load_state_dict(checkpoint_filter_fn(model.state_dict(), built))
    torch.testing.assert_close(dynamic(images(48)), built(images(48)))
    moved = tiny(family).eval()
    moved.pos_embed.requires_grad_(False)
    before = moved.pos_embed
    moved.set_input_size(32)
    assert moved.pos_embed is before
    moved.set_input_size(img_size=48)
    torch.testing.assert_close(moved(images(48)), built(images(48)))
    assert isinstance(moved.pos_embed, nn.Parameter)
    assert not moved.pos_embed.requires_grad
    with pytest.raises(ValueError, match=r"img_size=\(50, 50\) is not a multiple"):
        moved.set_input_size(50)
    oblong = tiny(family, img_size=(32, 48)).eval()
    oblong.load_state_dict(checkpoint_filter_fn(model.state_dict(), oblong))
    _, maps = oblong.forward_intermediates(images(48)[:, :, :32])
    assert maps[-1].shape == (2, 16, 4, 6)
    torch.testing.assert_close(dynamic(images(48)[:, :, :32]), oblong(images(48)[:, :, :32]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TINY["lvvit"](num_heads=5), "embed_dim=16 cannot be split into num_heads=5"),
        (lambda: TINY["deepvit"](num_heads=5), "embed_dim=16 cannot be split into num_heads=5"),
        (lambda: TINY["refiner"](num_heads=5), "embed_dim=16 cannot be split into num_heads=5"),
        (lambda: TINY["deepvit"](re_attention=[True]), "has 1 flags for depth=3 blocks: give re_attention= too"),
        (lambda: TINY["deepvit"](re_attention=0), "re_attention must be True, False or a list .*, got 0"),
        (lambda: TINY["lvvit"](img_size=35, patch_size=7), "patch_size=7 must be even"),
        (lambda: TINY["plain"](patch_size=1), "patch_size=1 must be even"),
        (lambda: TINY["refiner"](kernel=2), "kernel=2 must be odd"),
        (lambda: TINY["refiner"](expansion=0.1), "expansion=0.1 leaves no maps of num_heads=4"),
        (lambda: TINY["refiner"](convention="linear"), "convention must be 'release' or 'paper', got 'linear'"),
        (lambda: RefinedAttention(16, 4, form="share")(torch.zeros(1, 5, 16)), "needs those of a block before it"),
    ],
)
def test_impossible_options_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_plain_attention_is_the_same_with_its_maps_and_without():
    model = tiny("plain").double().eval()
    fused = model(images().double())
    with recorded_attention(model) as maps:
        torch.testing.assert_close(model(images().double()), fused)
    assert len(maps) == 3
    seen = []
    handle = model.blocks[0].attn.attn_map.register_full_backward_hook(lambda m, inputs, outputs: seen.append(m))
    model(images().double()).sum().backward()
    handle.remove()
    assert seen == [model.blocks[0].attn.attn_map]
    ran = []
    model.blocks[0].attn.attn_drop.register_forward_hook(lambda m, inputs, output: ran.append(m))
    model(images().double())
    assert not ran  # no map is made


@pytest.mark.parametrize("convention", ["release", "paper"])
def test_expansion_and_kernel_of_the_refinement_can_be_chosen(convention):
    model = tiny("refiner", convention=convention, expansion=2, kernel=5).eval()
    refinements = [b.attn.DLA for b in model.blocks if b.attn.form != "plain"]
    assert len(refinements) == (2 if convention == "release" else 4)
    assert {tuple(r.depth_sep_conv.weight.shape) for r in refinements} == {(8, 1, 5, 5)}
    assert model(images()).shape == (2, 5)


# ---- checkpoints


PRESET = {"img_size": 32, "embed_dim": 16, "num_heads": 4, "depth": 2}


def published(name: str, **options) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return timm.create_model(name, **{**PRESET, "num_classes": 6, **options}).state_dict()


@pytest.mark.parametrize("name", ["lvvit_t", "deepvit_16b", "refiner_vit_s"])
@pytest.mark.parametrize("wrapper", ["state_dict_ema", "state_dict", None])
def test_a_published_checkpoint_loads_at_another_image_size(tmp_path, name, wrapper):
    weights = {f"module.{k}": v for k, v in published(name).items()}
    content = weights if wrapper is None else {"epoch": 300, wrapper: weights}
    torch.save(content, tmp_path / "published.pth.tar")
    overlay = {"file": str(tmp_path / "published.pth.tar"), "num_classes": 6}
    sizes = {**PRESET, "img_size": 64, "num_classes": 6}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **sizes)
    state = model.state_dict()
    for key, value in published(name).items():
        expected = resize_pos_embed(value, (2, 2), (4, 4)) if key == "pos_embed" else value
        assert torch.equal(state[key], expected), key
    torch.testing.assert_close(state["pos_embed"][:, 0], published(name)["pos_embed"][:, 0])


def test_the_averaged_weights_come_first_and_no_tensor_is_left_out():
    model = timm.create_model("lvvit_t", num_classes=6, pretrained_cfg_overlay={"num_classes": 6}, **PRESET)
    weights, averaged = published("lvvit_t"), {**published("lvvit_t"), "surplus": torch.ones(1)}
    averaged["head.bias"] = torch.full((6,), 2.0)
    found = checkpoint_filter_fn({"state_dict": weights, "state_dict_ema": averaged}, model)
    assert found.keys() == averaged.keys()
    assert torch.equal(found["head.bias"], averaged["head.bias"])
    with pytest.raises(RuntimeError, match="surplus"):
        model.load_state_dict(found)


def test_another_number_of_classes_is_named_or_gets_new_heads(tmp_path):
    torch.save(published("lvvit_t"), tmp_path / "six.pth")
    file = {"file": str(tmp_path / "six.pth")}
    options = {"pretrained": True, "pretrained_cfg_overlay": file, **PRESET}
    with pytest.raises(ValueError, match=r"6 classes as the model has, but timm would leave its heads out.*=6\)"):
        timm.create_model("lvvit_t", num_classes=6, **options)
    with pytest.raises(ValueError, match=r"has 6 classes and the model 1000: say so in .*=6\)"):
        timm.create_model("lvvit_t", **options)
    assert timm.create_model("lvvit_t", num_classes=7, **options).head.out_features == 7  # others are left out anyway
    known = {**file, "num_classes": 6}  # timm exchanges the heads
    model = timm.create_model("lvvit_t", pretrained=True, pretrained_cfg_overlay=known, num_classes=7, **PRESET)
    assert torch.equal(model.cls_token, published("lvvit_t")["cls_token"])
    assert model(images()).shape == (2, 7)
    features = timm.create_model("lvvit_t", pretrained=True, pretrained_cfg_overlay=file, num_classes=0, **PRESET)
    assert torch.equal(features.cls_token, published("lvvit_t")["cls_token"])


@pytest.mark.parametrize("name", ["lvvit_t", "refiner_vit_s"])
def test_a_model_without_dense_head_leaves_that_of_a_checkpoint_out(tmp_path, name):
    torch.save(published(name), tmp_path / "six.pth")
    overlay = {"file": str(tmp_path / "six.pth"), "num_classes": 6}
    options = {"pretrained_cfg_overlay": overlay, "num_classes": 6, "dense_head": False, **PRESET}
    model = timm.create_model(name, pretrained=True, **options)
    assert torch.equal(model.head.weight, published(name)["head.weight"])
    assert model.aux_head is None


def test_a_square_position_embedding_is_resized_for_an_oblong_model_of_as_many_tokens():
    square, oblong = tiny("lvvit", img_size=64), tiny("lvvit", img_size=(32, 128))
    found = checkpoint_filter_fn(square.state_dict(), oblong)["pos_embed"]
    torch.testing.assert_close(found, resize_pos_embed(square.pos_embed, (8, 8), (4, 16)))
    same = tiny("lvvit", img_size=(32, 48))  # 24 patches, in no square
    assert torch.equal(checkpoint_filter_fn(same.state_dict(), same)["pos_embed"], same.pos_embed)


def test_a_position_embedding_of_no_square_grid_is_named():
    model = timm.create_model("lvvit_t", num_classes=6, pretrained_cfg_overlay={"num_classes": 6}, **PRESET)
    weights = published("lvvit_t", img_size=(32, 48))
    with pytest.raises(ValueError, match=r"\(1, 7, 16\) has positions for 6 patches.*model for 2 x 2: .*img_size"):
        checkpoint_filter_fn(weights, model)


# ---- attention maps


def test_similarity_of_blocks_agrees_with_the_stored_one():
    golden = np.load(GOLDEN / "models_deepvit.npz")
    model = REFERENCE["deepvit", "tiny_eval"]().double().eval()
    prefix = "tiny_eval/sd/"
    model.load_state_dict({k.removeprefix(prefix): torch.from_numpy(golden[k]) for k in golden.files if prefix in k})
    with torch.no_grad():
        maps = attention_maps(model, torch.from_numpy(golden["tiny_eval/x0"]).double())
    assert len(maps) == 3
    for i, found in enumerate(maps):
        close(found, golden[f"similarity/map{i}"], 1e-9)
    similarity = adjacent_similarity(maps, threshold=0.05)
    for i, pair in enumerate(("01", "12")):
        close(similarity.values[i], golden[f"similarity/M{pair}"], 1e-9)
        close(similarity.mean[i], golden[f"similarity/mean{pair}"], 1e-9)
        assert similarity.similar[i] == (golden[f"similarity/M{pair}"] > 0.05).mean()
    assert not any(m._forward_hooks for m in model.modules())


def test_similarity_compares_what_a_key_gives_to_all_queries():
    first = torch.rand(1, 2, 5, 5)
    scaled = first * torch.rand(1, 2, 1, 5).add(0.5)  # columns, each by a factor of its own
    torch.testing.assert_close(attention_similarity(first, scaled), torch.ones(1, 2, 5))
    assert attention_similarity(first, first.transpose(-1, -2)).max() < 1
    assert adjacent_similarity([first, scaled, -first]).similar.tolist() == [1, 0]
    with pytest.raises(ValueError, match="two of one shape"):
        attention_similarity(first, first[:, :1])
    with pytest.raises(ValueError, match="two maps at least, got 1"):
        adjacent_similarity([first])


@pytest.mark.parametrize("family", ["deepvit", "plain", "refiner", "refiner-paper"])
def test_maps_of_every_block_are_seen(family):
    model = tiny(family).eval()
    maps = attention_maps(model, images())
    assert [tuple(m.shape) for m in maps] == [(2, 4, 17, 17)] * len(model.blocks)
    if family == "plain":
        for found in maps:
            torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, 17))


def test_a_model_that_shows_no_maps_is_named():
    with pytest.raises(ValueError, match="LVViT shows no attention maps: no module in it is named 'attn_map'"):
        attention_maps(tiny("lvvit"), images())


def test_recomputed_maps_are_not_recorded_again():
    model = tiny("deepvit").train()
    model.set_grad_checkpointing()
    with recorded_attention(model) as maps:
        model(images()).sum().backward()
    assert len(maps) == 3


def test_a_compiled_model_is_named():
    torch.compiler.reset()
    model = tiny("deepvit").eval()
    compiled = torch.compile(model, backend="eager")
    compiled(images())
    with pytest.raises(ValueError, match=r"is compiled.* measure the uncompiled model \(model\._orig_mod"):
        attention_maps(compiled, images())
    assert len(attention_maps(compiled._orig_mod, images())) == 3
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="DeepViT is compiled"):
        attention_maps(model, images())


def test_maps_of_timms_transformers_run_through_another_module():
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 3}
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    finally:
        timm.layers.set_fused_attn(before)
    maps = attention_maps(model, images(), point="attn_drop")
    assert [tuple(m.shape) for m in maps] == [(2, 3, 5, 5)] * 3
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 3, 5))
    fused = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    for block in fused.blocks:
        block.attn.fused_attn = True
    with pytest.raises(ValueError, match=r"ran no module named 'attn_drop'.*set_fused_attn\(False\)"):
        attention_maps(fused, images(), point="attn_drop")


def test_the_cosine_regulariser_agrees_with_the_published_loss():
    golden = np.load(GOLDEN / "models_deepvit.npz")
    maps = [torch.from_numpy(golden[f"cosreg/map{i}"]) for i in range(4)]
    for pairs in (1, 3):
        loss = torch.from_numpy(golden["cosreg/ce"]) + 0.1 * attention_cosine(maps, pairs)
        close(loss, golden[f"cosreg/loss_n{pairs}"], 1e-9)
    assert attention_cosine(maps) == attention_cosine(maps, 3)
    for given, pairs, message in (
        (maps[:1], None, "1 pairs of neighbours need 2 maps at least, got 1"),
        (maps, 0, "pairs must be at least 1, got 0"),
        (maps, 4, "4 pairs of neighbours need 5 maps at least, got 4"),
        ([maps[0], maps[1][:1]], None, "one shape"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_cosine(given, pairs)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_regulariser_trains_through_the_maps_of_one_forward(recompute):
    model = tiny("deepvit").train()
    model.set_grad_checkpointing(recompute)
    with recorded_attention(model) as maps:
        logits = model(images())
    (logits.sum() * 0 + attention_cosine(maps)).backward()
    assert len(maps) == 3
    gradient = model.blocks[2].attn.reatten_matrix.weight.grad
    assert gradient.abs().max() > 0
    numeric = []
    for step in (-1e-3, 1e-3):
        moved = tiny("deepvit").train()
        with torch.no_grad():
            moved.blocks[2].attn.reatten_matrix.weight[0, 0] += step
            numeric.append(attention_cosine(attention_maps(moved.double(), images().double())))
    assert gradient[0, 0].item() == pytest.approx((numeric[1] - numeric[0]).item() / 2e-3, rel=1e-2, abs=1e-5)


def test_the_plot_has_a_line_for_each_model(tmp_path):
    with torch.no_grad():
        lines = {f: adjacent_similarity(attention_maps(tiny(f).eval(), images())) for f in ("deepvit", "plain")}
    figure = plot_similarity(lines)
    (axis,) = figure.axes
    assert [line.get_label() for line in axis.lines] == ["deepvit", "plain"]
    for line, similarity in zip(axis.lines, lines.values()):
        assert line.get_xdata().tolist() == [2, 3]
        assert line.get_ydata().tolist() == similarity.mean.tolist()
    shares = plot_similarity(lines, value="similar").axes[0]
    assert shares.lines[0].get_ydata().tolist() == lines["deepvit"].similar.tolist()
    assert shares.get_ylabel() == "share of similar tokens"
    figure.savefig(tmp_path / "similarity.png")
    assert (tmp_path / "similarity.png").stat().st_size > 1000
