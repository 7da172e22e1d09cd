"""Vocabularies, corpora, tasks on sentences with their metrics, and distillation between encoders of text."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from rich.console import Console
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import BertConfig, BertForSequenceClassification

import distillkit
from distillkit.core.views import Features
from distillkit.distillers.text import AttentionMaps, HiddenStates
from distillkit.models.lvbert import LVBertConfig, LVBertForSequenceClassification
from distillkit.recipe import RecipeError, load
from distillkit.schema import AdamW
from distillkit.text.corpus import Corpus, lines_of, write_tokens
from distillkit.text.glue import GLUE, both_ways, glue_rows
from distillkit.text.metrics import METRICS, text_metrics
from distillkit.text.sentences import Sentence, Sentences, TextTask, as_call, padded, read_rows
from distillkit.text.vocabulary import SPECIAL, TextError, Vocabulary, learn_vocabulary
from distillkit.training.check import check
from distillkit.training.errors import RunError
from distillkit.training.optim import build_optimizer
from distillkit.training.predict import predict
from distillkit.training.run import run

VOCABULARY = Vocabulary([*SPECIAL, "the", "cat", "sat", "##s", "dog", "a"])


# ---- vocabularies


def test_pieces_of_words():
    assert VOCABULARY.tokens(VOCABULARY.encode(["The cats SAT, ok"])[0]) == [
        "the",
        "cat",
        "##s",
        "sat",
        "[UNK]",
        "[UNK]",
    ]
    assert (VOCABULARY.pad, VOCABULARY.start, VOCABULARY.end, VOCABULARY.mask) == (0, 2, 3, 4)


def test_the_most_frequent_pairs_are_merged_first():
    learned = learn_vocabulary(["aab aab aab bc"], 13)
    letters = [*SPECIAL, "##a", "##b", "##c", "a", "b"]
    # a ##a and ##a ##b are equally frequent, ##a ##b is first by the alphabet; then a ##ab; b ##c comes last
    assert learned.pieces == [*letters, "##ab", "aab", "bc"]
    assert learned.tokens(learned.encode(["aab bc cab"])[0]) == ["aab", "bc", "[UNK]"]


def test_the_same_texts_give_the_same_vocabulary_and_read_what_was_written(tmp_path):
    texts = ["some words that are cut into pieces", "and other words, and some that are not"] * 3
    learned = learn_vocabulary(texts, 50)
    assert learned.pieces == learn_vocabulary(iter(texts), 50).pieces
    assert len(learned) == 50
    learned.write(tmp_path / "vocab.txt")
    assert Vocabulary.read(tmp_path / "vocab.txt").encode(texts) == learned.encode(texts)


def test_vocabularies_that_are_none(tmp_path):
    with pytest.raises(TextError, match=r"\[SEP\] is missing"):
        Vocabulary([piece for piece in SPECIAL if piece != "[SEP]"])
    with pytest.raises(TextError, match="the piece 'a' comes twice"):
        Vocabulary([*SPECIAL, "a", "b", "a"])
    with pytest.raises(TextError, match=r"none.txt: expected a vocabulary"):
        Vocabulary.read(tmp_path / "none.txt")
    with pytest.raises(TextError, match="no text to learn"):
        learn_vocabulary(["  "], 50)
    with pytest.raises(TextError, match="has no room for the 3 letters"):
        learn_vocabulary(["abc"], 7)


# ---- corpora


def corpus(tmp_path, *contents, **options):
    files = []
    for i, text in enumerate(contents):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
        files.append(tmp_path / f"{i}.txt")
    return Corpus(write_tokens(files, VOCABULARY, tmp_path / "tokens"), VOCABULARY, **options)


def test_samples_are_rows_of_tokens_across_lines_and_files(tmp_path):
    data = corpus(tmp_path, "the cat sat\n\nthe dog\n", "a dog sat\n", length=6, shift=False)
    assert [VOCABULARY.tokens(data[0, i][0].tolist()) for i in range(len(data))] == [
        ["[CLS]", "the", "cat", "sat", "[SEP]", "[SEP]"],
        ["[CLS]", "the", "dog", "[SEP]", "a", "[SEP]"],
    ]


def test_samples_are_cut_elsewhere_in_every_epoch_and_depend_on_nothing_else(tmp_path):
    data = corpus(tmp_path, "the cat sat the dog a\n" * 20, length=8, seed=3)
    cuts = {tuple(data[epoch, 0][0].tolist()) for epoch in range(8)}
    assert len(cuts) > 1
    again = Corpus(tmp_path / "tokens" / "index.json", VOCABULARY, length=8, seed=3)
    for key in ((5, 2), (0, 1), (5, len(data) - 1)):
        assert torch.equal(data[key][0], again[key][0])
    inside = [t for i in range(len(data)) for t in data[4, i][0][1:-1].tolist()]
    row = [t for line in ["the cat sat the dog a"] * 20 for t in [*VOCABULARY.encode([line])[0], VOCABULARY.end]]
    starts = [s for s in range(6) if row[s : s + len(inside)] == inside]
    assert starts  # one row without a gap, begun somewhere in the first sample


def test_files_are_read_once_and_a_killed_reading_goes_on(tmp_path, monkeypatch):
    for i, text in enumerate(["the cat\n" * 9, "a dog\n" * 9]):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    files = [tmp_path / "0.txt", tmp_path / "1.txt"]
    read = []

    def counted(self, texts):
        read.extend(texts)
        if read.count("a dog") == 9:
            raise KeyboardInterrupt
        return encode(self, texts)

    encode = Vocabulary.encode
    with monkeypatch.context() as patch:
        patch.setattr(Vocabulary, "encode", counted)
        with pytest.raises(KeyboardInterrupt):
            write_tokens(files, VOCABULARY, tmp_path / "tokens")
    read.clear()
    monkeypatch.setattr(Vocabulary, "encode", lambda self, texts: read.extend(texts) or encode(self, texts))
    index = write_tokens(files, VOCABULARY, tmp_path / "tokens")
    assert read == ["a dog"] * 9  # the first file was done
    assert Corpus(index, VOCABULARY, length=6).tokens == 54
    read.clear()
    write_tokens(files, VOCABULARY, tmp_path / "tokens")
    assert read == []


def test_texts_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.txt").write_text("\n  \n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"good\nbad \xe9t\xe9\n")
    with pytest.raises(TextError, match=r"empty.txt: the file is empty"):
        write_tokens([tmp_path / "empty.txt"], VOCABULARY, tmp_path / "tokens")
    with pytest.raises(TextError, match=r"latin.txt:\d+: not UTF-8"):
        list(lines_of(tmp_path / "latin.txt"))
    with pytest.raises(TextError, match=r"none.txt: no such file"):
        write_tokens([tmp_path / "none.txt"], VOCABULARY, tmp_path / "tokens")
    with pytest.raises(TextError, match="no text file is given"):
        write_tokens([], VOCABULARY, tmp_path / "tokens")
    with pytest.raises(TextError, match="3 tokens are not enough for a sample of 128"):
        corpus(tmp_path, "the cat\n")
    index = tmp_path / "tokens" / "index.json"
    with pytest.raises(TextError, match="written with 11 pieces, the vocabulary has 12"):
        Corpus(index, Vocabulary([*VOCABULARY.pieces, "new"]), length=4)


# ---- tasks

FILES = {
    "cola": "gj04\t1\t\tthe cat sat\ngj04\t0\t*\tsat the cat\n",
    "sst2": "sentence\tlabel\nthe cat \t1\na dog\t0\n",
    "mrpc": 'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tthe "cat\t a cat\n0\t7\t9\tthe cat\ta dog\n',
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    "0\tx\tx\tx\tx\tx\tx\tthe cat\ta cat\t5.000\n1\tx\tx\tx\tx\tx\tx\tthe dog\ta cat\t1.25\n",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tthe cat\ta cat\t1\n",
    "mnli": "index\tsentence1\tsentence2\tgold_label\n0\tthe cat\ta cat\tneutral\n",
    "qnli": "index\tquestion\tsentence\tlabel\n0\tthe cat\ta cat\tentailment\n",
    "rte": "index\tsentence1\tsentence2\tlabel\n0\tthe cat\ta cat\tnot_entailment\n",
    "wnli": "index\tsentence1\tsentence2\tlabel\n0\tthe cat\ta cat\t1\n",
}


def test_files_of_each_task_of_glue(tmp_path):
    assert FILES.keys() == GLUE.keys()
    for name, text in FILES.items():
        for file in ("train.tsv", GLUE[name].dev):
            (tmp_path / file).write_text(text, encoding="utf-8")
        rows = glue_rows(name, tmp_path, "train")
        assert rows == [Sentence(r.texts, r.label, r.where) for r in rows]
        assert all(len(row.texts) == len(GLUE[name].texts) for row in rows)
        assert all(0 <= GLUE[name].task.value(row) <= 2 for row in rows)
        assert [r.texts for r in glue_rows(name, tmp_path, "val")] == [r.texts for r in rows]
    (tmp_path / "train.tsv").write_text(FILES["stsb"], encoding="utf-8")
    values = [GLUE["stsb"].task.value(row) for row in glue_rows("stsb", tmp_path, "train")]
    assert values == [1.0, 0.25]  # as shares of 5
    (tmp_path / "train.tsv").write_text(FILES["mrpc"], encoding="utf-8")
    doubled = both_ways(glue_rows("mrpc", tmp_path, "train"))
    assert [row.texts for row in doubled[::2]] == [('the "cat', "a cat"), ("a cat", 'the "cat')]


def test_labels_outside_of_a_task_are_told_with_file_and_line(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("1\tthe cat\n2\ta dog\n", encoding="utf-8")
    rows = read_rows(path, 0, [1], header=False)
    with pytest.raises(TextError, match=r"train.tsv:2: the label '2' is none of the task's: 0, 1"):
        Sentences(rows, TextTask(("0", "1")), VOCABULARY)
    with pytest.raises(TextError, match=r"x:1: the label 'five' is no number from 0 to 5"):
        TextTask(None).value(Sentence(("a",), "five", "x:1"))
    with pytest.raises(TextError, match=r"x:1: the label '5.1' is no number from 0 to 5"):
        TextTask(None).value(Sentence(("a",), "5.1", "x:1"))
    path.write_text("1\tthe cat\n0\n", encoding="utf-8")
    with pytest.raises(TextError, match=r"train.tsv:2: 1 columns, expected at least 2"):
        read_rows(path, 0, [1], header=False)
    path.write_text("text\tlabels\na\t1\n", encoding="utf-8")
    with pytest.raises(TextError, match=r"train.tsv:1: no column 'label'; there are text, labels"):
        read_rows(path, "label", ["text"], header=True)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(TextError, match=r"train.tsv: the file is empty"):
        read_rows(path, 0, [1], header=False)
    with pytest.raises(TextError, match="GLUE has no task 'sst'"):
        glue_rows("sst", tmp_path, "train")


def test_samples_of_pairs_and_batches():
    rows = [Sentence(("the cat sat", "a dog"), "1", "x:1"), Sentence(("the cat",), "0", "x:2")]
    data = Sentences(rows, TextTask(("0", "1")), VOCABULARY, length=7)
    ids, target = data[0, 0]
    assert VOCABULARY.tokens(ids.tolist()) == ["[CLS]", "the", "cat", "[SEP]", "a", "dog", "[SEP]"]  # cut by one
    assert target["segments"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    ids, rest = padded([data[0, 0], data[0, 1]])
    assert ids[1].tolist()[4:] == [0, 0, 0]
    assert rest["attention_mask"].tolist() == [[1] * 7, [1] * 4 + [0] * 3]
    assert rest["labels"].tolist() == [1, 0]
    assert as_call(ids, rest)[1].keys() == {"input_ids", "attention_mask", "token_type_ids", "labels"}


# ---- metrics


def test_metrics_are_those_of_others():
    g = np.random.default_rng(0)
    said, wanted = g.integers(0, 2, 60), g.integers(0, 2, 60)
    assert METRICS["f1"](said, wanted) == pytest.approx(f1_score(wanted, said))
    assert METRICS["matthews"](said, wanted) == pytest.approx(matthews_corrcoef(wanted, said))
    x = np.array([1.0, 2.0, 3.0, 10.0])
    assert METRICS["spearman"](x, x**3) == pytest.approx(1)
    assert METRICS["pearson"](x, -2 * x + 1) == pytest.approx(-1)
    for name in ("matthews", "pearson", "spearman"):
        assert METRICS[name](np.zeros(4), x) == 0  # a model that says one thing of all
    assert METRICS["f1"](np.zeros(4), np.zeros(4)) == 0


def test_results_of_classes_and_of_regressions():
    found = [{"logits": torch.tensor(row), "label": label} for row, label in
             (([2.0, 0.0], 0), ([0.0, 1.0], 1), ([1.0, 0.0], 1), ([float("nan"), 0.0], 0))]  # fmt: skip
    numbers = text_metrics(found, TextTask(("0", "1"), ("accuracy", "f1"))).numbers
    assert numbers["accuracy"] == 0.5  # what is no number is no answer
    assert numbers["f1"] == pytest.approx(2 * 1 / (2 + 2))
    assert numbers["score"] == pytest.approx((0.5 + 0.5) / 2)
    found = [{"logits": torch.tensor([v]), "label": w} for v, w in ((0.1, 0.0), (0.4, 0.5), (0.9, 1.0))]
    result = text_metrics(found, GLUE["stsb"].task)
    assert result.numbers["spearman"] == pytest.approx(1)
    assert result.numbers["loss"] == pytest.approx(0.01)
    assert result.classes == {}
    with pytest.raises(ValueError, match="no prediction"):
        text_metrics([], GLUE["stsb"].task)


# ---- distillation


def lvbert(width, order, heads=2, **options):
    sizes = {"vocab_size": 30, "hidden_size": width, "embedding_size": 8, "num_attention_heads": heads}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 16}
    config = LVBertConfig(layer_order=order, num_labels=3, **sizes, **quiet)
    config._attn_implementation = "eager"
    return LVBertForSequenceClassification(config)


def bert(width, layers):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 32}
    config = BertConfig(vocab_size=30, max_position_embeddings=16, num_labels=3, attn_implementation="eager", **sizes)
    return BertForSequenceClassification(config)


def batch():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 30, (4, 9), generator=g)
    mask = (torch.arange(9) < torch.tensor([[9], [6], [4], [9]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 0])}


DISTILLERS = [
    distillkit.LogitKD(temperature=2),
    HiddenStates(["lvbert.layers.1", "lvbert.layers.3"], ["lvbert.layers.3", "lvbert.layers.5"]),
    AttentionMaps("lvbert.layers.1.attention[1]", "lvbert.layers.5.attention[1]"),
]


def test_a_student_of_other_depth_and_width_learns_from_its_teacher():
    torch.manual_seed(0)
    student, teacher = lvbert(16, (0, 1, 2, 2)), lvbert(32, (0, 1, 2, 1, 2, 1), heads=4)
    for p in teacher.lvbert.parameters():
        torch.nn.init.normal_(p, std=0.6)  # a teacher that looks somewhere
    keys = list(student.state_dict())
    model = distillkit.wrap(student, teacher, DISTILLERS).train()
    assert [tuple(p.weight.shape) for p in model.distillers["hidden"].projections] == [(32, 16), (32, 16)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for _ in range(60):
        losses = model(**batch())
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: losses[name].item() for name in ("task", "kd", "hidden", "attention_maps")})
    assert all(history[-1][name] < 0.9 * history[0][name] for name in ("task", "hidden", "attention_maps"))
    assert sum(history[-1].values()) < 0.9 * sum(history[0].values())
    assert list(model.unwrap().state_dict()) == keys


def test_a_bert_teaches_an_lvbert():
    torch.manual_seed(0)
    distillers = [
        HiddenStates("lvbert.layers.3", "bert.encoder.layer.1"),
        AttentionMaps("lvbert.layers.1.attention[1]", "bert.encoder.layer.1.attention.self[1]"),
    ]
    losses = distillkit.wrap(lvbert(16, (0, 1, 2, 2)), bert(32, 2), distillers).train()(**batch())
    losses.total.backward()
    assert list(losses) == ["task", "hidden", "attention_maps", "output"]
    assert losses["hidden"] > 0 < losses["attention_maps"]


def test_padding_takes_no_part():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    s, t = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    distiller = HiddenStates("a", "b")
    loss = distiller(Features((s,)), Features((t,)), {"attention_mask": mask})
    assert loss.item() == pytest.approx((s - t).square().mean(-1)[mask.bool()].mean().item())
    other = t.masked_fill(mask[..., None] == 0, 100.0)
    assert torch.equal(loss, distiller(Features((s,)), Features((other,)), {"attention_mask": mask}))
    assert distiller(Features((s,)), Features((t,)), None).item() == pytest.approx((s - t).square().mean().item())


def test_attention_by_head_and_by_their_mean():
    a, b = torch.randn(2, 3, 5, 5).softmax(-1), torch.randn(2, 3, 5, 5).softmax(-1)
    each = AttentionMaps("a", "b", heads="each")(Features((a,)), Features((b,)), None)
    assert each.item() == pytest.approx((b * (b / a).log()).sum(-1).mean().item(), rel=1e-5)
    mean = AttentionMaps("a", "b")(Features((a,)), Features((b[:, :2],)), None)
    p, q = a.mean(1), b[:, :2].mean(1)
    assert mean.item() == pytest.approx((q * (q / p).log()).sum(-1).mean().item(), rel=1e-5)
    assert AttentionMaps("a", "b")(Features((a,)), Features((a,)), None).abs() < 1e-6
    hidden = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]], requires_grad=True)
    AttentionMaps("a", "b")(Features((hidden,)), Features((hidden.detach(),)), None).backward()
    assert hidden.grad.isfinite().all()  # weights of padding are 0 on both sides
    with pytest.raises(ValueError, match="heads='each', as many heads"):
        AttentionMaps("a", "b", heads="each")(Features((a,)), Features((b[:, :2],)), None)
    with pytest.raises(ValueError, match="heads must be"):
        AttentionMaps("a", "b", heads="max")


def test_layers_that_cannot_be_compared():
    with pytest.raises(ValueError, match="one vocabulary for both"):
        HiddenStates("a", "b")(Features((torch.zeros(2, 3, 4),)), Features((torch.zeros(2, 5, 4),)), None)
    with pytest.raises(ValueError, match="1 feature maps of the student, 2 of the teacher"):
        HiddenStates("a", "b")(Features((torch.zeros(2, 3, 4),)), Features((torch.zeros(2, 3, 4),) * 2), None)


def test_learning_rates_fall_from_pair_to_pair():
    model = lvbert(16, (0, 1, 2, 2))
    optimizer = build_optimizer(model, AdamW(kind="adamw", lr=1.0, layer_decay=0.5))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    # of two pairs: the head 4, the layers 2 and 1, the embeddings 0
    assert rates[id(named["classifier.weight"])] == 1
    assert rates[id(named["lvbert.layers.3.output.weight"])] == 0.5**2
    assert rates[id(named["lvbert.layers.0.gate.bias"])] == 0.5**3
    assert rates[id(named["lvbert.embeddings.word_embeddings.weight"])] == 0.5**4


# ---- recipes

RECIPE = """
task: text
data: {kind: tsv, train: TRAIN, val: VAL, vocabulary: 60, length: 16, batch: 4}
teacher:
  kind: transformers
  model_type: lvbert
  options: {vocab_size: 60, hidden_size: 16, embedding_size: 16, num_attention_heads: 2, layer_order: [0, 1, 2, 2]}
  train: {}
student:
  kind: transformers
  model_type: lvbert
  options: {vocab_size: 60, hidden_size: 8, embedding_size: 8, num_attention_heads: 2, layer_order: [1, 2]}
distillers:
  - {kind: logit-kd}
  - {kind: hidden-states, student_at: lvbert.layers.1, teacher_at: lvbert.layers.3}
train: {epochs: 2, optimizer: {kind: adamw, lr: 5e-3, layer_decay: 0.8}, schedule: {kind: constant, warmup: 0}}
"""


def recipe(tmp_path, *overrides, text=RECIPE):
    for name in ("train", "val"):
        rows = [
            f"{label}\t{a} {b} {label}" for label in ("good", "bad") for a in ("a", "the") for b in ("film", "play")
        ]
        (tmp_path / f"{name}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    file = tmp_path / "small.yaml"
    file.write_text(text.replace("TRAIN", f"{tmp_path}/train.tsv").replace("VAL", f"{tmp_path}/val.tsv"))
    return load(file, [f"output={tmp_path / 'runs'}", *overrides])


def test_a_run_from_start_to_end(tmp_path):
    small = recipe(tmp_path)
    findings = list(check(small))
    assert [f for f in findings if f.level == "error"] == []
    folder = run(small, console=Console(quiet=True))
    table = json.loads((folder / "table.json").read_text())
    assert [row["row"] for row in table] == ["teacher", "student", "distilled"]
    assert all(0 <= row["accuracy"] <= 1 for row in table)
    kept = LVBertForSequenceClassification.from_pretrained(folder / "distilled" / "pretrained")
    assert kept.config.id2label == {0: "bad", 1: "good"}
    assert len(Vocabulary.read(folder / "distilled" / "pretrained" / "vocab.txt")) <= 60
    (tmp_path / "new.txt").write_text("a good play\nthe bad film\n")
    rows = predict(small, "distilled", [tmp_path / "new.txt"], tmp_path / "said")
    assert [row["text"] for row in rows] == ["a good play", "the bad film"]
    assert {c["class"] for c in rows[0]["classes"]} == {"good", "bad"}


def test_pretrained_weights_and_regressions(tmp_path):
    lvbert(8, (1, 2)).save_pretrained(tmp_path / "weights")
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / file).write_text(FILES["stsb"] + "2\tx\tx\tx\tx\tx\tx\ta cat\ta dog\t2.0\n", encoding="utf-8")
    VOCABULARY.write(tmp_path / "vocab.txt")
    (tmp_path / "sts.yaml").write_text(
        f"task: text\ndata: {{kind: glue, root: {tmp_path}, task: stsb, vocabulary: {tmp_path}/vocab.txt, length: 16}}"
        "\n"
        f"student: {{kind: transformers, pretrained: {tmp_path}/weights}}\n"
        "train: {epochs: 1, schedule: {kind: constant, warmup: 0}}\n"
    )
    folder = run(load(tmp_path / "sts.yaml", [f"output={tmp_path / 'runs'}"]), console=Console(quiet=True))
    (row,) = json.loads((folder / "table.json").read_text())
    assert row["score"] == pytest.approx((row["pearson"] + row["spearman"]) / 2)


def test_recipes_that_cannot_be_run(tmp_path):
    with pytest.raises(RunError, match="layer_order has 3 layers; give an even number"):
        run(recipe(tmp_path, "student.options.layer_order=[0,1,2]"), console=Console(quiet=True))
    with pytest.raises(RunError, match=r"knows 20 words, data.vocabulary has"):
        run(recipe(tmp_path, "teacher.options.vocab_size=20"), console=Console(quiet=True), fresh=True)
    with pytest.raises(RecipeError, match="the vocabulary is learned from it"):
        recipe(tmp_path, "compare=[{row: half, data: {train: half.tsv}}]")
    with pytest.raises(RecipeError, match="is one for all rows"):
        recipe(tmp_path, "compare=[{row: other, data: {vocabulary: 70}}]")
    bad = recipe(tmp_path, "data.labels=[good, fair]")
    with pytest.raises(TextError, match=r"val.tsv:5: the label 'bad' is none of the task's: good, fair"):
        run(bad, console=Console(quiet=True))
    with pytest.raises(RecipeError, match=r"is test, but data.test is not given"):
        recipe(tmp_path, "evaluate.split=test")


@pytest.mark.skipif(
    "DISTILLKIT_DATA" not in os.environ, reason="set DISTILLKIT_DATA to the folder that holds text_mini"
)
def test_the_real_files_are_read():
    root = Path(os.environ["DISTILLKIT_DATA"]) / "text_mini"
    labels = tuple(lines_of(root / "banking77" / "labels.txt"))
    rows = read_rows(root / "banking77" / "val.tsv", 0, [1], header=False)
    assert (len(labels), len(rows)) == (77, 996)
    data = Sentences(rows, TextTask(labels), learn_vocabulary([row.texts[0] for row in rows], 500), 32)
    assert max(len(data[0, i][0]) for i in range(len(data))) == 32
    polarity = read_rows(root / "polarity" / "test.tsv", 0, [1], header=False)
    assert {row.label for row in polarity} == {"0", "1"}
