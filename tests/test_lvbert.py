"""LV-BERT: against arrays of the published code in TensorFlow, a naive loop, and what must hold of any encoder."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from transformers import PreTrainedModel

from distillkit.models.lvbert import (
    ATTENTION,
    CONVOLUTION,
    FEED_FORWARD,
    SEARCHED,
    LayerOrderError,
    LVBertConfig,
    LVBertForMaskedLM,
    LVBertForPreTraining,
    LVBertForSequenceClassification,
    LVBertForTokenClassification,
    LVBertModel,
    LVBertSupernet,
    check_order,
    encoder_parameters,
    interleaved,
    load_tensorflow,
    lvbert_config,
    tensorflow_names,
)
from distillkit.models.lvbert.config import generator_config
from distillkit.models.lvbert.convert import ConversionError
from distillkit.models.lvbert.layers import LVBertConvolution, convolve

GOLDEN = Path(__file__).parent / "golden"
ARRAYS = np.load(GOLDEN / "models_lvbert.npz")
META = json.loads(str(ARRAYS["meta"]))["config"]
COUNTS = json.loads((GOLDEN / "param_counts.json").read_text())["lv_bert"]
SIZES = {
    "vocab_size": META["vocab_size"],
    "hidden_size": META["hidden_size"],
    "embedding_size": META["embedding_size"],
    "intermediate_size": META["intermediate_size"],
    "num_attention_heads": META["heads"],
    "max_position_embeddings": META["max_position_embeddings"],
    "kernel_size": META["kernel"],
}


def tiny(order=(0, 1, 2, 2, 0, 1), **changes):
    return LVBertConfig(**{**SIZES, "layer_order": order, **changes})


def golden(name, dtype=torch.float64):
    array = torch.from_numpy(ARRAYS[name].copy())
    return array.to(dtype) if array.is_floating_point() else array.long()


def variables(case):
    start = f"{case}/sd/"
    return {name.removeprefix(start): ARRAYS[name] for name in ARRAYS.files if name.startswith(start)}


def released(kind, **changes):
    """A model in float64 with the golden weights, in the convention of the release."""
    model = kind(tiny(META["layer_list"], convention="release", **changes)).double().eval()
    arrays = variables("encoder")
    if kind is LVBertForMaskedLM:  # its head stands on the discriminator's encoder in the golden case
        arrays = {name.replace("electra/encoder", "generator/encoder"): a for name, a in arrays.items()}
        arrays = {name.replace("electra/embeddings_project", "generator/embeddings_project"): a
                  for name, a in arrays.items()}  # fmt: skip
    load_tensorflow(model, arrays)
    return model


def encoder_call():
    return {"attention_mask": golden("encoder/mask"), "token_type_ids": golden("encoder/seg")}


# ---- the published code


def test_dynamic_convolution_is_the_published_one():
    layer = LVBertConvolution(tiny()).double()
    sd = {name: torch.from_numpy(a).double() for name, a in variables("dynconv").items()}
    state = layer.state_dict()
    for mine, their in (("values", "glu_l"), ("gate", "glu_g"), ("kernels", "conv_attn_kernel")):
        state[f"{mine}.weight"], state[f"{mine}.bias"] = sd[f"{their}/kernel"].T, sd[f"{their}/bias"]
    state["depthwise.weight"] = sd["conv_attn_key/depthwise_kernel"].permute(1, 2, 0)
    state["pointwise.weight"] = sd["conv_attn_key/pointwise_kernel"][0].T
    state["pointwise.bias"] = sd["conv_attn_key/bias"]
    layer.load_state_dict(state)
    x = golden("dynconv/x").requires_grad_()
    out = layer.inner(x, None)
    kernels = layer.weights(layer.values(x) * layer.gate(x).sigmoid())
    assert (out - golden("dynconv/y64_out")).abs().max() < 1e-6
    assert (kernels.reshape(-1, 9, 1) - golden("dynconv/y64_kernel")).abs().max() < 1e-6
    ((out * golden("dynconv/w_out")).sum() + (kernels.reshape(-1, 9, 1) * golden("dynconv/w_kernel")).sum()).backward()
    assert (x.grad - golden("dynconv/g_x")).abs().max() < 1e-4
    theirs = {
        "glu_l/kernel": layer.values.weight, "glu_g/bias": layer.gate.bias,
        "conv_attn_key/depthwise_kernel": layer.depthwise.weight, "conv_attn_kernel/kernel": layer.kernels.weight,
    }  # fmt: skip
    names = list(ARRAYS["dynconv/pnames"])
    for name, parameter in theirs.items():
        assert parameter.grad.norm().item() == pytest.approx(ARRAYS["dynconv/pgrad_l2"][names.index(name)], rel=1e-4)


def test_encoder_heads_and_losses_are_the_published_ones():
    ids, call = golden("encoder/ids"), encoder_call()
    out = released(LVBertModel)(ids, **call, output_hidden_states=True)
    assert (out.hidden_states[0] - golden("encoder/y64_embeddings")).abs().max() < 1e-6
    assert (torch.stack(out.hidden_states[1:]) - golden("encoder/y64_layers")).abs().max() < 1e-5

    disc = released(LVBertForPreTraining)(ids, labels=golden("encoder/labels"), **call)
    assert (disc.logits.sigmoid() - golden("encoder/y64_disc_probs")).abs().max() < 1e-5
    assert disc.loss.item() == pytest.approx(ARRAYS["encoder/y64_disc_loss"].item(), abs=1e-6)

    logits = released(LVBertForMaskedLM)(ids, **call).logits
    at = golden("encoder/lm_positions")
    assert (logits.gather(1, at[..., None].expand(-1, -1, 23)) - golden("encoder/y64_mlm_logits")).abs().max() < 1e-5


def test_gradients_are_those_of_the_published_code():
    model, mlm = released(LVBertForPreTraining), released(LVBertForMaskedLM)
    mlm.lvbert = model.lvbert
    ids, call = golden("encoder/ids"), encoder_call()
    out = model(ids, labels=golden("encoder/labels"), output_hidden_states=True, **call)
    at = golden("encoder/lm_positions")
    weights = golden("encoder/lm_weights")
    picked = out.hidden_states[-1].gather(1, at[..., None].expand(-1, -1, 8))
    logits = mlm.words(picked)
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), golden("encoder/lm_ids").flatten(), reduction="none")
    mlm_loss = (each.view_as(weights) * weights).sum() / (weights.sum() + 1e-6)
    assert mlm_loss.item() == pytest.approx(ARRAYS["encoder/y_mlm_loss"].item(), abs=1e-5)
    total = (out.hidden_states[0] * golden("encoder/w_embeddings")).sum()
    total = total + (torch.stack(out.hidden_states[1:]) * golden("encoder/w_layers")).sum()
    total = total + (logits * golden("encoder/w_mlm_logits")).sum()
    total = total + (out.logits.sigmoid() * golden("encoder/w_disc_probs")).sum()
    total = total + mlm_loss * ARRAYS["encoder/w_mlm_loss"].item() + out.loss * ARRAYS["encoder/w_disc_loss"].item()
    total.backward()
    wanted = dict(zip(ARRAYS["encoder/pnames"].tolist(), ARRAYS["encoder/pgrad_l2"].tolist(), strict=True))
    parameters = {**dict(mlm.named_parameters()), **dict(model.named_parameters())}
    names = {**tensorflow_names(mlm), **tensorflow_names(model)}
    checked = 0
    for ours, theirs in names.items():
        if theirs in wanted and not theirs.startswith("generator/"):
            assert parameters[ours].grad.norm().item() == pytest.approx(wanted[theirs], rel=1e-3, abs=1e-4), theirs
            checked += 1
    assert checked == len(wanted) == 74


@pytest.mark.parametrize("name", [n for n in COUNTS if n != "_about"])
def test_parameter_counts_are_exact(name):
    counts, size = COUNTS[name], name.split("_")[0]
    config = lvbert_config(size, layer_order=counts["layer_list"])
    share = {"small": 1 / 4}.get(size, 1 / 3)
    generator = generator_config(config, share)
    with torch.device("meta"):
        model, mlm = LVBertForPreTraining(config), LVBertForMaskedLM(generator)

    def count(part):
        return sum(p.numel() for p in part.parameters())

    assert count(model.lvbert) == encoder_parameters(config) == counts["params_encoder_total"]
    assert count(model) - count(model.lvbert) == counts["params_discriminator_head"]
    assert (generator.hidden_size, generator.num_attention_heads) == (
        counts["generator_hidden"],
        counts["generator_heads"],
    )
    assert count(mlm.lvbert) - count(mlm.lvbert.embeddings) == counts["params_generator_own"]
    assert count(mlm.predictions) == counts["params_mlm_head"]


# ---- closed forms and invariances


def test_dynamic_convolution_against_a_loop():
    g = torch.Generator().manual_seed(0)
    v, w = torch.randn(2, 5, 6, generator=g).double(), torch.randn(2, 5, 3, 7, generator=g).double()
    out = convolve(v, w)
    for b in range(2):
        for t in range(5):
            for c in range(6):
                wanted = sum(w[b, t, c // 2, i] * v[b, t + i - 3, c] for i in range(7) if 0 <= t + i - 3 < 5)
                assert out[b, t, c].item() == pytest.approx(float(wanted))


def test_a_kernel_adds_up_to_one_and_leaves_a_constant():
    layer = LVBertConvolution(tiny(hidden_dropout_prob=0.0)).double()
    v = torch.ones(1, 30, 8).double()
    kernels = layer.weights(torch.randn(1, 30, 8).double())
    assert torch.allclose(kernels.sum(-1), torch.ones(1, 30, 2).double())
    assert torch.allclose(convolve(v, kernels)[:, 4:-4], v[:, 4:-4])


def test_a_layer_sees_as_far_as_its_kernel():
    layer = LVBertConvolution(tiny(hidden_dropout_prob=0.0)).double()
    x = torch.randn(1, 41, 8).double().requires_grad_()
    layer.inner(x, None)[0, 20].sum().backward()
    seen = x.grad[0].abs().sum(1).nonzero().flatten().tolist()
    assert (seen[0], seen[-1]) == (20 - 4, 20 + 4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_a_text_is_padded_with_changes_nothing_but_in_the_release(attention):
    torch.manual_seed(0)
    ids = torch.randint(1, 23, (1, 9))
    longer = torch.cat([ids, torch.randint(1, 23, (1, 5))], 1)
    mask = (torch.arange(14) < 9).long()[None]
    for convention, same in (("default", True), ("release", False)):
        model = LVBertModel(tiny(convention=convention)).double().eval()
        torch.manual_seed(1)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        model.set_attn_implementation(attention)
        alone = model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        padded = model(longer, attention_mask=mask).last_hidden_state[:, :9]
        assert ((alone - padded).abs().max() < 1e-9) == same


def test_eager_attention_and_sdpa_are_the_same():
    model = LVBertModel(tiny()).double().eval()
    ids, mask = torch.randint(1, 23, (2, 9)), (torch.arange(9) < torch.tensor([[9], [4]])).long()
    model.set_attn_implementation("eager")
    one = model(ids, attention_mask=mask, output_attentions=True)
    model.set_attn_implementation("sdpa")
    assert (one.last_hidden_state - model(ids, attention_mask=mask).last_hidden_state).abs().max() < 1e-12
    assert len(one.attentions) == 2  # of attention layers alone
    assert torch.allclose(one.attentions[0].sum(-1), torch.ones(2, 2, 9).double())
    assert one.attentions[0][1, :, :, 4:].abs().max() == 0
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        model(ids, output_attentions=True)


def test_gradients_of_each_type_by_finite_differences():
    torch.manual_seed(0)
    for kind in (CONVOLUTION, ATTENTION, FEED_FORWARD):
        model = LVBertModel(tiny((kind, kind))).double().eval()
        keep = torch.ones(1, 5, 1).double()
        keep[0, 4] = 0
        layer, x = model.layers[0], torch.randn(1, 5, 8).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, layer=layer, keep=keep: layer(x, keep), (x,))


def test_initial_weights():
    torch.manual_seed(0)
    model = LVBertForPreTraining(lvbert_config("small", layer_order=[0, 1, 2, 2], vocab_size=100))
    conv = model.lvbert.layers[0]
    assert conv.gate.weight.abs().max() <= 0.04
    assert conv.gate.weight.std().item() == pytest.approx(0.02 * 0.88, rel=0.05)  # a normal cut off at two deviations
    assert conv.depthwise.weight.std().item() == pytest.approx(0.88 / 9, rel=0.05)
    limit = (6 / (256 + 36)) ** 0.5  # Glorot's uniform
    assert 0.95 * limit < conv.kernels.weight.abs().max() <= limit
    assert model.replaced.weight.abs().max() > 0.04
    assert conv.kernels.bias.abs().max() == 0
    assert (conv.norm.weight == 1).all()


# ---- as a model of transformers

HEADS = {
    LVBertForMaskedLM: torch.randint(0, 23, (2, 6)),
    LVBertForPreTraining: torch.randint(0, 2, (2, 6)),
    LVBertForSequenceClassification: torch.tensor([0, 2]),
    LVBertForTokenClassification: torch.randint(0, 3, (2, 6)),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_learn_and_are_saved_and_read(kind, tmp_path):
    torch.manual_seed(0)
    model = kind(tiny(num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    assert isinstance(model, PreTrainedModel)
    ids, mask = torch.randint(1, 23, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        out = model(input_ids=ids, attention_mask=mask, labels=HEADS[kind])
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model.eval()
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert again.config.layer_order == [0, 1, 2, 2, 0, 1]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert isinstance(model(ids, return_dict=False), tuple)


def test_one_label_is_a_regression():
    model = LVBertForSequenceClassification(tiny(num_labels=1)).eval()
    ids = torch.randint(1, 23, (3, 6))
    out = model(ids, labels=torch.tensor([0.1, 0.5, 1.0]))
    assert out.loss.item() == pytest.approx((out.logits[:, 0] - torch.tensor([0.1, 0.5, 1.0])).square().mean().item())


def test_depths_are_those_of_pairs():
    model = LVBertForSequenceClassification(tiny(num_labels=2))
    depths = model.layer_depths()
    assert set(depths) == {name for name, _ in model.named_parameters()}
    assert depths["lvbert.embeddings.norm.bias"] == depths["lvbert.embeddings_project.weight"] == 0
    assert depths["lvbert.layers.1.output.weight"] == 1
    assert depths["lvbert.layers.5.norm.weight"] == 3
    assert depths["classifier.weight"] == 5


# ---- checkpoints of TensorFlow


def test_checkpoints_are_read_from_npz(tmp_path):
    arrays = {**variables("encoder"), "global_step": np.zeros(()), "electra/embeddings/word_embeddings/adam_m": 0.0}
    np.savez(tmp_path / "checkpoint.npz", **arrays)
    model = LVBertForPreTraining(tiny(META["layer_list"], convention="release")).double().eval()
    load_tensorflow(model, tmp_path / "checkpoint.npz")
    probabilities = model(golden("encoder/ids"), **encoder_call()).logits.sigmoid()
    assert (probabilities - golden("encoder/y64_disc_probs")).abs().max() < 1e-5


def test_checkpoints_of_something_else_are_told(tmp_path):
    arrays = variables("encoder")
    model = LVBertForPreTraining(tiny((0, 1, 2, 2, 0, 1)))
    with pytest.raises(ConversionError, match=r"no variable 'electra/encoder/layer_0/first_submodule/attention"):
        load_tensorflow(LVBertForPreTraining(tiny((1, 1, 2, 2, 0, 1))), arrays)
    with pytest.raises(ConversionError, match="has no place in the model"):
        load_tensorflow(LVBertForPreTraining(tiny((0, 1, 2, 2))), arrays)
    with pytest.raises(ConversionError, match=r"becomes \(23, 6\), and .* is \(24, 6\)"):
        load_tensorflow(LVBertForPreTraining(tiny(vocab_size=24)), arrays)
    with pytest.raises(ConversionError, match="hold nothing of a LVBertForTokenClassification"):
        load_tensorflow(LVBertForTokenClassification(tiny()), arrays)
    load_tensorflow(model, {**arrays, "generator/encoder/layer_0/x": np.zeros(1)})  # another model's


def test_a_classifier_keeps_its_head_or_gets_a_tasks():
    model = LVBertForSequenceClassification(tiny(num_labels=2))
    head = {"task_specific/cola/dense/kernel": np.ones((8, 2)), "task_specific/cola/dense/bias": np.zeros(2)}
    before = model.classifier.weight.clone()
    load_tensorflow(model, {**variables("encoder"), **head})
    assert torch.equal(model.classifier.weight, before)
    load_tensorflow(model, {**variables("encoder"), **head}, task="cola")
    assert (model.classifier.weight == 1).all()


# ---- the supernet


def test_each_order_of_a_supernet_is_the_network_of_that_order():
    torch.manual_seed(0)
    net = LVBertSupernet(tiny(interleaved(4))).eval()
    ids = torch.randint(1, 23, (2, 6))
    for order in ((2, 2, 1, 0), (0, 0, 0, 1)):
        net.choose(order)
        alone = net.inherited(order)
        assert torch.equal(net(ids).last_hidden_state, alone(ids).last_hidden_state)
        assert sum(p.numel() for p in alone.parameters()) == encoder_parameters(net.config, order)
        alone.embeddings.word_embeddings.weight.data.zero_()
        assert net.embeddings.word_embeddings.weight.abs().max() > 0  # they share nothing
    with pytest.raises(LayerOrderError, match="order has 2 layers, the supernet 4"):
        net.choose((0, 1))


def test_only_the_chosen_path_takes_gradient():
    net = LVBertSupernet(tiny(interleaved(4)))
    net.choose((2, 2, 1, 0))
    net(torch.randint(1, 23, (2, 6))).last_hidden_state.sum().backward()
    for i, choices in enumerate(net.layers):
        touched = [any(p.grad is not None for p in layer.parameters()) for layer in choices]
        assert touched == [kind == (2, 2, 1, 0)[i] for kind in range(3)]


# ---- bad input


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 2], "has 3 layers; give an even number"),
        ([0, 3], r"layer_order\[1\] is 3, and types of layers are 0 \(dynamic convolution\)"),
        ([], "expected a list of layer types"),
        ("12", "expected a list of layer types"),
        ([0, True], r"layer_order\[1\] is True"),
    ],
)
def test_orders_that_no_network_can_have(order, message):
    with pytest.raises(LayerOrderError, match=message):
        check_order(order)


def test_configs_that_do_not_fit():
    with pytest.raises(LayerOrderError, match="even number"):
        tiny((0, 1, 2))
    with pytest.raises(ValueError, match="cannot be cut into 3 heads"):
        tiny(num_attention_heads=3)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        tiny(kernel_size=8)
    with pytest.raises(ValueError, match="'default' or 'release'"):
        tiny(convention="published")
    with pytest.raises(ValueError, match="size must be one of small"):
        lvbert_config("tiny")
    with pytest.raises(ValueError, match="17 tokens, and the model has 16 positions"):
        LVBertModel(tiny())(torch.ones(1, 17, dtype=torch.long))


def test_counting_needs_no_model():
    sizes = dict(SIZES, vocab_size=23, type_vocab_size=2, layer_order=SEARCHED)
    assert encoder_parameters(SimpleNamespace(**sizes)) == sum(
        p.numel() for p in LVBertModel(tiny(SEARCHED)).parameters()
    )
