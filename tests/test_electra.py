"""ELECTRA pretraining: what is masked, what is learned from, that it goes on after a kill; the search over orders."""

import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from distillkit.models.lvbert import LayerOrderError, LVBertConfig, LVBertForPreTraining, encoder_parameters
from distillkit.schema import AdamW, Train
from distillkit.search import Evolution, SearchError
from distillkit.text.corpus import Corpus, write_tokens
from distillkit.text.electra import Electra, judge
from distillkit.text.masking import mask_tokens, write
from distillkit.text.pretrain import (
    Pretraining,
    build_electra,
    electra_training,
    judged_batches,
    pretrain,
    release_adam,
    scores_over_steps,
)
from distillkit.text.search import InheritedAccuracy, OrderSpace, search_orders, with_order
from distillkit.text.vocabulary import Vocabulary, learn_vocabulary
from distillkit.training.loop import Run
from distillkit.training.optim import build_optimizer

LINES = [
    f"the {a} {b} sees a {c}" for a in ("old", "new", "red") for b in ("cat", "dog", "fox") for c in ("hill", "sea")
]
WORDS = [letter + digit for letter in "abcdefghij" for digit in "0123456789"]
NUMBERED = Vocabulary(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(LINES * 4), encoding="utf-8")
    vocabulary = learn_vocabulary(LINES, 60)
    index = write_tokens([tmp_path / "a.txt"], vocabulary, tmp_path / "tokens")
    return Corpus(index, vocabulary, length=16)


def tiny(words, order=(0, 1, 2, 2), **changes):
    sizes = {"hidden_size": 16, "embedding_size": 16, "num_attention_heads": 2, "max_position_embeddings": 16}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return LVBertConfig(vocab_size=words, layer_order=order, **{**sizes, **quiet, **changes})


def pretraining(corpus, steps=6, **changes):
    train = electra_training(steps, len(corpus), 4, lr=5e-3, save_every=2)
    plain = {"share": 0.5, "batch": 4, "data": corpus, "judged": corpus, "train": train, "most": 2}
    return Pretraining(config=changes.pop("config", tiny(len(corpus.vocabulary))), **{**plain, **changes})


# ---- masking


def texts(rows=400, length=128, real=128):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 105, (rows, length), generator=g)
    ids[:, 0], ids[:, real - 1] = NUMBERED.start, NUMBERED.end
    ids[:, real:] = NUMBERED.pad
    return ids, (torch.arange(length) < real).long().expand(rows, -1)


@pytest.mark.parametrize("convention", ["default", "release"])
def test_a_share_of_the_real_tokens_is_masked(convention):
    ids, keep = texts()
    g = torch.Generator().manual_seed(1)
    masked = mask_tokens(ids, keep, NUMBERED, convention=convention, generator=g)
    assert masked.positions.shape == (400, 19)
    assert (masked.weights.sum(1) == 19).all()  # round(0.15 * 128), and no more than int(0.155 * 128)
    asked = ids.gather(1, masked.positions)
    assert not torch.isin(asked, torch.tensor([0, 2, 3, 4])).any()
    changed = masked.inputs != ids
    assert (masked.inputs[changed] == NUMBERED.mask).all()
    assert changed.sum() / masked.writes.sum() == pytest.approx(0.85, abs=0.02)
    twice = [len(row) - len(set(row)) for row in masked.positions.tolist()]
    assert (sum(twice) == 0) == (convention == "default")
    assert masked.writes.sum(1).tolist() == [19 - n for n in twice]


def test_short_texts_and_padding():
    ids, keep = texts(rows=20, real=12)
    masked = mask_tokens(ids, keep, NUMBERED)
    assert (masked.weights.sum(1) == 2).all()  # 15 % of 12
    assert (masked.inputs[:, 12:] == NUMBERED.pad).all()
    ids, keep = texts(rows=3, real=2)  # nothing but [CLS] and [SEP]
    for convention in ("default", "release"):
        nothing = mask_tokens(ids, keep, NUMBERED, convention=convention)
        assert nothing.weights.sum() == 0
        assert torch.equal(nothing.inputs, ids)


def test_only_what_is_to_be_written_is_written():
    ids = torch.arange(8).view(1, 8)
    out = write(
        ids, torch.tensor([[2, 2, 0, 5]]), torch.tensor([[20, 21, 22, 23]]), torch.tensor([[1, 0, 0, 1]]).bool()
    )
    assert out.tolist() == [[0, 1, 20, 3, 4, 23, 6, 7]]


# ---- the networks


def test_losses_are_those_of_the_parts():
    torch.manual_seed(0)
    model = Electra(tiny(105), NUMBERED, share=0.5).eval()
    ids, _ = texts(rows=3, length=16, real=14)
    out = model(ids, torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(3)
    keep = (ids != 0).long()
    masked = mask_tokens(ids, keep, NUMBERED, generator=g)
    logits = model.generator(masked.inputs, attention_mask=keep).logits.gather(
        1, masked.positions[..., None].expand(-1, -1, 105)
    )
    words = ids.gather(1, masked.positions)
    nll = -logits.log_softmax(-1).gather(-1, words[..., None])[..., 0]
    assert out["mlm"].item() == pytest.approx(
        (nll * masked.weights).sum().item() / masked.weights.sum().item(), rel=1e-4
    )
    drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=g).view_as(words)
    corrupt = ids.clone()
    for b in range(3):
        for m in range(masked.positions.shape[1]):
            if masked.writes[b, m]:
                corrupt[b, masked.positions[b, m]] = drawn[b, m]
    z, y = model.discriminator(corrupt, attention_mask=keep).logits, (corrupt != ids).float()
    each = z.clamp(min=0) - z * y + (1 + (-z.abs()).exp()).log()
    assert out["rtd"].item() == pytest.approx(50 * (each * keep).sum().item() / keep.sum().item(), rel=1e-4)
    assert out["rtd_accuracy"].item() == pytest.approx(
        (((z > 0) == (y > 0)) & (keep > 0)).sum().item() / keep.sum().item()
    )


def test_embeddings_are_shared_and_the_generator_learns_nothing_from_the_discriminator():
    torch.manual_seed(0)
    model = Electra(tiny(105), NUMBERED, share=0.5)
    assert model.generator.lvbert.embeddings is model.discriminator.lvbert.embeddings
    ids, _ = texts(rows=3, length=16, real=16)
    model(ids)["rtd"].backward()
    assert all(p.grad is None for p in model.generator.predictions.parameters())
    assert model.discriminator.lvbert.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="the model has 104 words, the vocabulary 105 pieces"):
        Electra(tiny(104), NUMBERED)


def test_a_sample_that_is_the_texts_own_token_is_not_replaced():
    model = Electra(tiny(105), NUMBERED, share=0.5).eval()
    torch.nn.init.zeros_(model.generator.predictions.dense.weight)
    ids = torch.full((2, 16), 7)
    with torch.no_grad():
        model.generator.predictions.bias[7] = 100.0  # every sample is token 7
    out = model(ids, torch.Generator().manual_seed(0))
    assert out["mlm_accuracy"] == pytest.approx(1)
    assert out["rtd_recall"] == 0  # there is none to find


def test_a_discriminator_that_names_all_replaced_has_full_recall():
    model = Electra(tiny(105), NUMBERED, share=0.5).eval()
    torch.nn.init.zeros_(model.discriminator.replaced.weight)
    torch.nn.init.ones_(model.discriminator.replaced.bias)
    ids, _ = texts(rows=8, length=16, real=16)
    out = model(ids, torch.Generator().manual_seed(0))
    assert out["rtd_recall"] == 1
    assert 0 < out["rtd_accuracy"] < 0.3


# ---- pretraining


def test_it_learns(corpus, tmp_path):
    train = electra_training(70, len(corpus), 4, lr=1e-2, save_every=1000)
    how = pretraining(corpus, train=train.model_copy(update={"evaluate_every": 5}), most=None)
    before = judge(build_electra(how), judged_batches(how))
    pretrain(how, tmp_path / "run")
    rows = scores_over_steps(tmp_path / "run")
    assert rows[-1]["mlm"] < 0.8 * before["mlm"]
    assert rows[-1]["rtd"] < 0.8 * before["rtd"]
    read = LVBertForPreTraining.from_pretrained(tmp_path / "run" / "discriminator")
    assert read.config.layer_order == [0, 1, 2, 2]


@pytest.mark.parametrize("supernet", [False, True])
def test_killed_and_gone_on_with_it_ends_with_the_same_weights(corpus, tmp_path, monkeypatch, supernet):
    how = pretraining(corpus, steps=14, supernet=supernet)
    whole = pretrain(how, tmp_path / "whole")
    step = Run.step

    def killed(run, window):
        if run.at.step == 5:
            raise RuntimeError("killed")
        step(run, window)

    monkeypatch.setattr(Run, "step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        pretrain(how, tmp_path / "broken")
    monkeypatch.setattr(Run, "step", step)
    again = pretrain(how, tmp_path / "broken")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    names = ("final.safetensors", "metrics.jsonl")
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "broken" / n).read_bytes() for n in names)


def test_what_is_judged_is_the_same_every_time_and_leaves_the_generators_alone(corpus):
    model = build_electra(pretraining(corpus)).train()
    batches = judged_batches(pretraining(corpus))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert judge(model, batches) == judge(model, batches) != judge(model, batches, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_the_release_does_not_correct_adam():
    """m / (sqrt(v) + eps) and decoupled decay, written out."""
    layer = torch.nn.Linear(3, 1, bias=False).double()
    optimizer = AdamW(kind="adamw", lr=0.1, weight_decay=0.5, eps=1e-3)
    train = release_adam(Train(optimizer=optimizer))
    stepper = build_optimizer(layer, train.optimizer)
    p, m, v = layer.weight.detach().clone(), torch.zeros(1, 3).double(), torch.zeros(1, 3).double()
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        grad = torch.randn(1, 3, generator=g).double()
        layer.weight.grad = grad.clone()
        stepper.step()
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        p = p - 0.1 * (m / (v.sqrt() + 1e-3) + 0.5 * p)
        assert torch.allclose(layer.weight, p, atol=1e-12)
    assert stepper.param_groups[0]["lr"] == 0.1


# ---- the search


def test_operators_make_orders():
    space, rng = OrderSpace(6), random.Random(0)
    a, b = (0,) * 6, (1,) * 6
    for _ in range(50):
        space.check(space.random(rng))
        changed = space.mutate(a, rng)
        assert changed != a
        assert set(space.crossover(a, b, rng)) <= {0, 1}
    with pytest.raises(ValueError, match="has 4 layers, expected 6"):
        space.check((0, 1, 2, 2))
    with pytest.raises(LayerOrderError, match="an order has 7 layers; give an even number"):
        OrderSpace(7)


def test_a_search_is_killed_and_goes_on(corpus, tmp_path):
    how = pretraining(corpus, steps=6, supernet=True)
    supernet = pretrain(how, tmp_path / "supernet")
    batches, evolution = judged_batches(how), Evolution(population=6, generations=3, tournament=2)
    whole = search_orders(supernet, batches, evolution, log=tmp_path / "whole.jsonl")
    fitness, seen = InheritedAccuracy.__call__, []

    def killed(self, order):
        seen.append(order)
        if len(seen) == 9:
            raise RuntimeError("killed")
        return fitness(self, order)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InheritedAccuracy, "__call__", killed)
        with pytest.raises(RuntimeError, match="killed"):
            search_orders(supernet, batches, evolution, log=tmp_path / "broken.jsonl")
    again = search_orders(supernet, batches, evolution, log=tmp_path / "broken.jsonl")
    assert again.best == whole.best
    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "broken.jsonl").read_bytes()
    limit = encoder_parameters(how.config, (1, 2, 1, 2))
    assert all(c.costs["parameters"] <= limit for c in whole.candidates)
    assert len({c.genome for c in whole.candidates}) == len(whole.candidates)
    winner = pretrain(pretraining(corpus, steps=2, config=with_order(how.config, whole.best.genome)), tmp_path / "best")
    assert tuple(winner.discriminator.config.layer_order) == whole.best.genome


def test_a_budget_below_the_smallest_network(corpus, tmp_path):
    how = pretraining(corpus, supernet=True)
    with pytest.raises(SearchError, match="parameters"):
        search_orders(build_electra(how), judged_batches(how), Evolution(population=4, generations=1), most=100)
    with pytest.raises(ValueError, match="supernet=True"):
        InheritedAccuracy(build_electra(pretraining(corpus)), [])


def test_a_candidate_is_judged_as_its_own_network_is(corpus):
    how = pretraining(corpus, supernet=True)
    supernet, batches, order = build_electra(how), judged_batches(how), (2, 0, 1, 0)
    single = build_electra(pretraining(corpus, config=with_order(how.config, order)))
    embeddings = single.discriminator.lvbert.embeddings
    embeddings.load_state_dict(supernet.discriminator.lvbert.embeddings.state_dict())
    for mine, theirs in ((single.generator, supernet.generator), (single.discriminator, supernet.discriminator)):
        inherited = theirs.lvbert.inherited(order)
        mine.lvbert.load_state_dict(inherited.state_dict())
        heads = {k: v for k, v in theirs.state_dict().items() if not k.startswith("lvbert.")}
        mine.load_state_dict(heads, strict=False)
    assert InheritedAccuracy(supernet, batches)(order)["fitness"] == judge(single, batches)["accuracy"]


def test_files_of_a_pretraining(corpus, tmp_path):
    pretrain(pretraining(corpus, steps=2), tmp_path / "run")
    assert {p.name for p in Path(tmp_path / "run").iterdir()} >= {"discriminator", "result.json", "metrics.jsonl"}
