"""AutoSpace: cells and files against the published ones, scores against finite differences, spaces and networks."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from distillkit import cli, wrap
from distillkit.losses.kl import kl_divergence
from distillkit.models import autospace
from distillkit.models.autospace import AutoSpaceNet, CellBlock, register, run_cell, without_weights
from distillkit.models.autospace_cells import (
    ALLOWED,
    EDGES,
    IN_NETWORK,
    INVERTED_RESIDUAL,
    KERNELS,
    REFERENCES,
    Cell,
    CellSpace,
    Shape,
    canonical,
    check,
    distance,
    encodings,
    from_graph,
    graph,
)
from distillkit.models.autospace_network import (
    Block,
    Macro,
    Network,
    Stage,
    read_network,
    read_space,
    write_network,
    write_space,
)
from distillkit.recipe import RecipeError, load
from distillkit.schema.search import smallest_network
from distillkit.search import Evolution, evolve
from distillkit.search.autospace.networks import NetworkSpace
from distillkit.search.autospace.population import Member, Population
from distillkit.search.autospace.scoring import BatchNorm, ScoredLayer, ScoringNet
from distillkit.search.autospace.space import _parts, _stream
from distillkit.search.autospace.supernet import Inherited, InPlaceKD, PathBlock, Sandwich, Supernet
from distillkit.search.budgets import multiply_adds, parameters
from distillkit.search.command import said_edges, search, training_recipe
from distillkit.search.log import SearchError, read

GOLDEN = json.loads((Path(__file__).parent / "golden" / "autospace_space.json").read_text())
MACRO = Macro(stem=4, first=4, stages=(Stage(6, 2, 2), Stage(8, 1, 2)), features=16, stem_stride=1)
DENSE = Cell((5, 5, 5, 5, 5), (1, 0))

TINY = """
task: classification
data: {kind: single-digit, size: 32, batch: 8, train: 48, val: 16, test: 16, workers: 0}
search:
  network:
    {stem: 4, stem_stride: 1, first: 4, features: 16,
     stages: [{width: 6, blocks: 2, stride: 2}, {width: 8, blocks: 1, stride: 2}]}
  space: {population: 8, active: 2, tournament: 3, rounds: 4, warmup: 1, steps: 2, expand: 2, learned: 2}
  nas:
    {madds: 400000, kernels: [3, 5], expands: [1, 2], drawn: 1, population: 4, generations: 3, tournament: 2,
     train: {epochs: 2, optimizer: {kind: adamw, lr: 0.002}, save_every: 1}}
student: {kind: timm, model: autospace, options: {network: runs/tiny-search/network.json}}
train: {epochs: 1, threads: 1}
"""


def golden_graph(cell):
    ops = cell["ops"]
    return [
        [0, 0, 0, cell["dim_conv"]],
        [ops["01"], 0, 0, cell["mix"]],
        [ops["02"], ops["12"], 0, 0],
        [ops["03"], ops["13"], ops["23"], 0],
    ]


def golden_space():
    return [[from_graph(golden_graph(cell)) for cell in cells] for cells in GOLDEN["space"]]


def golden_network():
    blocks, width, raw = [], 16, GOLDEN["net_340M"]
    for block in raw["blocks"]:
        if block["type"] == "skip":
            blocks.append(Block(Shape(width, width, 1, 1), None))
            continue
        shape = Shape(block["in"], block["out"], block["stride"], block["expand"])
        cell = from_graph(golden_graph(block["cell"]), IN_NETWORK) if "cell" in block else INVERTED_RESIDUAL
        blocks.append(Block(shape, cell, "cell" not in block))
        width = block["out"]
    return Network(32, tuple(blocks), 1280, 1000, bn_eps=raw["bn"]["eps"], bn_momentum=raw["bn"]["momentum"])


def without_dim(cell):
    return cell._replace(dim_conv=2)


# -- cells ------------------------------------------------------------------------------------------------------------


def test_the_published_space_has_the_statistics_that_are_known_of_it():
    space = golden_space()
    assert (len(space), {len(cells) for cells in space}) == (11, {9})
    assert len({cell for cells in space for cell in cells}) == 65
    assert all(tuple(cells[-3:]) == REFERENCES for cells in space)
    learned = [cell for cells in space for cell in cells[:6]]
    counts = {edge: Counter(cell.ops[i] for cell in learned) for i, edge in enumerate(EDGES)}
    assert counts == {
        "01": {5: 29, 2: 25, 3: 12},
        "02": {5: 26, 3: 17, 2: 17, 1: 6},
        "12": {5: 33, 2: 23, 3: 10},
        "13": {2: 30, 5: 23, 3: 11, 1: 2},
        "23": {5: 39, 2: 18, 3: 9},
    }
    assert Counter(cell.dim_conv for cell in learned) == {0: 26, 1: 19, 2: 21}
    assert Counter(cell.mix for cell in learned) == {(0, 0): 29, (1, 1): 15, (1, 0): 12, (0, 1): 10}
    assert "94 % of their skip edges used" in said_edges(space)


def test_a_space_reads_back_equal_and_a_cell_as_it_is_published(tmp_path):
    assert graph(golden_space()[0][0]) == GOLDEN["space_raw_first_cell"]
    write_space(tmp_path / "space.json", golden_space())
    assert read_space(tmp_path / "space.json") == golden_space()
    raw = json.loads((tmp_path / "space.json").read_text())
    assert raw["blocks"][0][0] == GOLDEN["space_raw_first_cell"]


def test_there_are_5184_encodings_all_valid():
    every = list(encodings())
    assert len(every) == len(set(every)) == 5184
    for cell in every:
        check(cell)
        assert from_graph(graph(cell)) == cell
    # 3^3 * (3 * 2 + 1)^2: a skip edge comes with a mix bit that works, or not at all
    assert len(set(map(canonical, every))) == 27 * 49


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda g: g[1].__setitem__(0, 1), r"edge 0->1 is no edge; expected one of 2, 3, 5"),
        (lambda g: g[2].__setitem__(1, 7), r"edge 1->2 is operation 7; expected one of 2, 3, 5"),
        (lambda g: g[3].__setitem__(0, 5), r"edge 0->3 is operation 5; expected 1"),
        (lambda g: g[1].__setitem__(3, [0, 2]), "mix of node 3 is 2; expected 0 or 1"),
        (lambda g: g[0].__setitem__(3, 3), "dim_conv is 3; expected 0, 1 or 2"),
        (lambda g: g[0].__setitem__(0, 4), r"expected \[\[0, 0, 0, d\]"),
        (lambda g: g.pop(), r"expected \[\[0, 0, 0, d\]"),
    ],
)
def test_an_invalid_cell_is_named_with_its_file_layer_and_place(change, what, tmp_path):
    graphs = [[graph(cell) for cell in cells] for cells in golden_space()]
    change(graphs[3][2])
    path = tmp_path / "space.json"
    path.write_text(json.dumps({"blocks": graphs}))
    with pytest.raises(ValueError, match=rf"{path}: layer 3, cell 2: .*{what}"):
        read_space(path)


@pytest.mark.parametrize("text", ["{", "[]", '{"blocks": []}', '{"blocks": [[]]}'])
def test_a_file_that_is_no_space(text, tmp_path):
    path = tmp_path / "space.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: not "):
        read_space(path)
    with pytest.raises(FileNotFoundError, match="distillkit search"):
        read_space(tmp_path / "none.json")


def test_a_mutation_changes_one_thing_that_works_and_reaches_every_neighbour():
    rng, space = random.Random(0), CellSpace()
    for start in (*REFERENCES, DENSE):
        reached = {space.mutate(start, rng) for _ in range(600)}
        for cell in reached:
            check(cell)
            assert cell == canonical(cell)
            # an edge that vanishes takes a mix bit along
            assert distance(cell, start) - sum(a == 1 != b for a, b in zip(cell.ops, start.ops)) <= 1
            assert cell != canonical(start)
        changed = [edge for i, edge in enumerate(EDGES) for cell in reached if cell.ops[i] != start.ops[i]]
        assert set(changed) == set(EDGES)
    with_other_mix = {cell for cell in reached if cell.ops == DENSE.ops}
    assert with_other_mix == {Cell(DENSE.ops, (0, 0)), Cell(DENSE.ops, (1, 1))}


def test_random_cells_and_crosses_are_valid_and_of_their_parents():
    rng, space = random.Random(0), CellSpace()
    for _ in range(300):
        a, b = space.random(rng), space.random(rng)
        child = space.crossover(a, b, rng)
        check(child)
        assert all(x in pair for x, *pair in zip(child.ops, a.ops, b.ops))
    seen = {edge: {space.random(rng).ops[i] for _ in range(200)} for i, edge in enumerate(EDGES)}
    assert seen == {edge: set(ops) for edge, ops in ALLOWED.items()}


# -- what they compute ------------------------------------------------------------------------------------------------


def test_a_cell_is_the_graph_that_it_is_written_as():
    """Edges that multiply by a prime each: the output says which paths there are, and how nodes merge."""
    primes = dict(zip(EDGES, (2.0, 3.0, 5.0, 7.0, 11.0)))

    def edge(name, op, x):
        return primes[name] * x

    one = torch.ones(())
    assert run_cell(REFERENCES[0], one, edge) == 2 * 5 * 11
    assert run_cell(Cell((5, 5, 5, 5, 5)), one, edge) == (2 * 5 + 3) * 11 + 2 * 7
    assert run_cell(Cell((5, 5, 5, 5, 5), (1, 0)), one, edge) == max(2 * 5, 3) * 11 + 2 * 7
    assert run_cell(Cell((5, 1, 5, 5, 5), (0, 1)), one, edge) == max(2 * 5 * 11, 2 * 7)
    assert run_cell(Cell((5, 5, 5, 1, 5), (0, 1)), one, edge) == (2 * 5 + 3) * 11


def test_the_last_reference_is_the_inverted_residual():
    torch.manual_seed(0)
    block = CellBlock(INVERTED_RESIDUAL, Shape(6, 6, 1, 3), shortcut=True).eval()
    other = timm.layers.ConvNormAct  # timm's own parts, put together as MobileNetV2 has them
    bare = nn.Sequential(
        other(6, 18, 1, act_layer=nn.ReLU6),
        other(18, 18, 3, groups=18, act_layer=nn.ReLU6),
        other(18, 6, 1, apply_act=False),
    ).eval()
    theirs = bare.state_dict()
    bare.load_state_dict(dict(zip(theirs, block.state_dict().values(), strict=True)))
    x = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(block(x), x + bare(x))


@pytest.mark.parametrize("side", [8, 9])
def test_operations_without_weights_have_the_size_of_a_strided_convolution(side):
    x = torch.randn(2, 3, side, side)
    half = F.conv2d(x, torch.zeros(3, 1, 3, 3), None, 2, 1, groups=3).shape
    assert without_weights(2, x, 1) is x
    assert without_weights(2, x, 2).shape == without_weights(3, x, 2).shape == half
    torch.testing.assert_close(without_weights(2, x, 2)[..., 0, 0], x[..., :2, :2].mean((2, 3)))
    torch.testing.assert_close(
        without_weights(3, x, 1)[..., 0, 0], x[..., :2, :2].mean((2, 3))
    )  # nothing beyond the rim


# -- networks ---------------------------------------------------------------------------------------------------------


def test_the_published_network_builds_from_its_file_with_the_known_counts(tmp_path):
    path = tmp_path / "net_340M.config"
    write_network(path, golden_network())
    assert read_network(path) == golden_network()
    model = timm.create_model("autospace", network=str(path))
    assert parameters(model) == golden_network().costs()[0] == 4_507_920  # 4.51 M
    assert multiply_adds(model, torch.zeros(1, 3, 224, 224)) == golden_network().costs()[1] == 336_336_512
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(0.006, 0.1)}
    assert sum(isinstance(block, nn.Identity) for block in model.blocks) == 6


def test_a_file_registers_a_model_of_its_own_name(tmp_path):
    path = tmp_path / "net.json"
    write_network(path, small_network())
    register(path, "autospace_of_the_tests")
    model = timm.create_model("autospace_of_the_tests", num_classes=7)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 7)
    assert model.pretrained_cfg["classifier"] == "head"
    model.reset_classifier(3)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    assert timm.create_model("autospace_of_the_tests", num_classes=0)(torch.zeros(2, 3, 16, 16)).shape == (2, 16)
    assert timm.create_model("autospace_of_the_tests", in_chans=1).stem[0].in_channels == 1
    register(path, "autospace_of_the_tests")
    with pytest.raises(ValueError, match="'resnet18' is a model of timm already"):
        register(path, "resnet18")
    with pytest.raises(ValueError, match="give network=FILE"):
        timm.create_model("autospace")


def small_network():
    space = NetworkSpace(MACRO, [[*REFERENCES, DENSE]] * 3, (3, 5), (1, 2), 5, 16)
    return space.network(space.largest())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda raw: raw.pop("first_conv"), "not a network of AutoSpace in the published form: KeyError"),
        (
            lambda raw: raw["blocks"][1]["mobile_inverted_conv"].update(in_channels=5),
            "block 1: in_channels is 5, the block",
        ),
        (lambda raw: raw["blocks"][1]["mobile_inverted_conv"].update(name="Motive"), "block 1: unknown layer 'Motive'"),
        (lambda raw: raw["blocks"][2].update(shortcut=None), "block 2: has no shortcut"),
        (
            lambda raw: raw["blocks"][2]["mobile_inverted_conv"].update(build_graph="[[0, 0, 0, 2]]"),
            r"block 2: expected \[\[0, 0, 0, d\]",
        ),
        (
            lambda raw: raw["blocks"][0]["mobile_inverted_conv"].update(kernel_size=4),
            "block 0: kernel_size is 4; expected",
        ),
    ],
)
def test_a_network_file_that_is_wrong_names_the_block(change, what, tmp_path):
    path = tmp_path / "net.json"
    write_network(path, small_network())
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"{path}: .*{what}"):
        read_network(path)


def network_space(side=16):
    rng = random.Random(0)
    cells = [[*REFERENCES, DENSE, *(CellSpace().random(rng) for _ in range(3))] for _ in range(3)]
    return NetworkSpace(MACRO, cells, (3, 5, 7), (1, 2), 5, side)


def test_multiply_adds_of_the_table_are_those_that_torch_counts():
    space, rng = network_space(), random.Random(1)
    for genome in [space.smallest(), space.largest(), *(space.random(rng) for _ in range(6))]:
        network = space.network(genome)
        model = AutoSpaceNet(network)
        assert space.madds(genome) == network.costs(16)[1] == multiply_adds(model, torch.zeros(1, 3, 16, 16))
        assert parameters(model) == network.costs(16)[0]


def test_genomes_stay_within_the_space_and_its_extremes():
    space, rng = network_space(), random.Random(2)
    least, most = space.madds(space.smallest()), space.madds(space.largest())
    assert least < most
    for _ in range(200):
        a, b = space.random(rng), space.random(rng)
        for genome in (a, space.mutate(a, rng), space.crossover(a, b, rng)):
            space.check(genome)
            assert least <= space.madds(genome) <= most
            assert [bool(choice) for choice in genome][::2] == [
                True,
                True,
            ]  # of three blocks the second may be left out


@pytest.mark.parametrize(
    ("genome", "what"),
    [
        (((0, 3, 1),), "a choice for each of 3 blocks"),
        (((), (0, 3, 1), (0, 3, 1)), "block 0 is the first of its stage"),
        (((0, 3, 1), (99, 3, 1), (0, 3, 1)), r"block 1 is \(99, 3, 1\)"),
        (((0, 9, 1), (0, 3, 1), (0, 3, 1)), r"block 0 is \(0, 9, 1\)"),
    ],
)
def test_what_is_no_genome(genome, what):
    with pytest.raises(ValueError, match=what):
        network_space().check(genome)


def test_blocks_are_left_out_from_the_end_of_a_stage():
    deep = NetworkSpace(
        Macro(4, 4, (Stage(6, 4, 2), Stage(8, 1, 2)), 16, 1), [[INVERTED_RESIDUAL]] * 3, (3,), (1, 2), 5, 16
    )
    a, b = (0, 3, 1), (0, 3, 2)
    with pytest.raises(ValueError, match="from the end of a stage only"):
        deep.check((a, (), b, (), a))
    rng = random.Random(0)
    for _ in range(100):
        deep.check(deep.crossover((a, a, (), (), a), (b, b, b, b, b), rng))


def test_a_learned_space_must_have_the_layers_of_the_network():
    assert Macro().layers == 11
    with pytest.raises(ValueError, match="the space has 2 layers, the network 3"):
        NetworkSpace(MACRO, [[INVERTED_RESIDUAL]] * 2, (3,), (1,), 5, 16)


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return ScoredLayer(Shape(3, 3, 1, 2)).double()


CELLS = [*REFERENCES, Cell((2, 5, 3, 5, 5), (0, 1)), DENSE]


def loss_of(y):
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + (y**2).sum() / 7


def test_the_gradient_of_a_score_is_the_loss_times_the_cells_output(layer):
    """Equation 4: d L / d a_k = < d L / d y, c_k(x) >; and the same by finite differences."""
    x, a = torch.randn(2, 3, 6, 6, dtype=torch.double), torch.rand(len(CELLS), dtype=torch.double, requires_grad=True)
    y = layer(x, CELLS, a)
    (by_output,) = torch.autograd.grad(loss_of(y), y, retain_graph=True)
    (by_score,) = torch.autograd.grad(loss_of(y), a)
    with torch.no_grad():
        outputs = layer.outputs(x, CELLS)
    torch.testing.assert_close(by_score, torch.stack([(by_output * out).sum() for out in outputs]))
    assert torch.autograd.gradcheck(lambda a: loss_of(layer(x, CELLS, a)), (a,))


def test_scores_of_a_network_are_trained_as_finite_differences_say():
    torch.manual_seed(0)
    net = ScoringNet(MACRO, 5, 2).double()
    x, y = torch.randn(4, 3, 12, 12, dtype=torch.double), torch.arange(4)
    active = [[REFERENCES[0], DENSE], [DENSE, REFERENCES[2]], [REFERENCES[1], CELLS[3]]]
    alphas = torch.randn(3, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda alphas: F.cross_entropy(net(x, active, alphas), y), (alphas,))
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(x, active, alphas), y), alphas)
    assert (gradient.abs() > 0).all()
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(3, dtype=torch.double))  # of a softmax


def test_what_cells_share_is_computed_once_and_comes_out_the_same(layer):
    x = torch.randn(2, 3, 6, 6, dtype=torch.double)
    together = layer.outputs(x, CELLS)
    for cell, out in zip(CELLS, together, strict=True):
        torch.testing.assert_close(layer.outputs(x, [cell])[0], out)
    calls = Counter()
    for name, edge in layer.edges.items():
        edge.register_forward_hook(lambda *_, n=name: calls.update([n]))
    layer.outputs(x, CELLS)
    assert calls["01"] == 1  # four cells have it
    assert calls["02"] == 1


def test_a_child_inherits_the_weights_of_what_it_keeps(layer):
    parent, child = Cell((5, 1, 5, 1, 5)), Cell((5, 5, 5, 1, 5))
    x = torch.randn(2, 3, 6, 6, dtype=torch.double)

    def used(cell):
        layer.zero_grad()
        loss_of(layer.outputs(x, [cell])[0]).backward()
        return {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}

    assert used(parent) < used(child)
    assert {name.split(".")[1] for name in used(child) - used(parent)} == {"02"}


# -- populations ------------------------------------------------------------------------------------------------------


def convolutions(cell):
    return float(cell.ops.count(5))


def test_a_population_begins_around_the_references_without_twins():
    population = Population.begin(30, random.Random(0), convolutions, 0.0, math.inf)
    cells = [m.cell for m in population.members]
    assert tuple(cells[:3]) == REFERENCES
    assert len(set(map(canonical, cells))) == 30
    near = sum(min(distance(c, r) for r in REFERENCES) <= 2 for c in cells)
    everywhere = [CellSpace().random(random.Random(i)) for i in range(30)]
    assert near > sum(min(distance(c, r) for r in REFERENCES) <= 2 for c in everywhere)


def test_drawing_keeps_the_size_replaces_the_worst_and_hands_scores_on():
    rng = random.Random(0)
    population = Population.begin(12, rng, convolutions, 0.0, math.inf)
    for i, member in enumerate(population.members):
        member.score = float(i)
    before = {m.cell: m.score for m in population.members}
    active = population.draw(4, 12, 1.0, rng)
    assert len(population.members) == 12
    assert len({m.cell for m in active}) == 4
    for child in active:  # of a member, or of a child of one
        assert any(distance(child.cell, cell) <= 4 and child.score == score for cell, score in before.items())
    left = [m.score for m in population.members if not any(m is child for child in active)]
    assert sorted(left) == [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]
    assert len({m.cell for m in population.members}) == 12


def test_without_mutation_the_best_are_drawn_and_none_twice():
    population = Population([Member(cell, float(i)) for i, cell in enumerate(CELLS)], convolutions)
    active = population.draw(3, 50, 0.0, random.Random(0))
    assert [m.score for m in active] == [4.0, 3.0, 2.0]


def test_the_budget_term_decides_between_equal_scores_and_the_cap_between_all():
    members = [Member(DENSE, 0.5), Member(REFERENCES[1], 0.4)]
    assert Population(members, convolutions, 0.0).learned(1)[0] == DENSE
    dear = Population([*members, Member(Cell((5, 2, 2, 1, 2)), 0.35)], convolutions, 0.1)
    assert dear.rank(members[0]) == pytest.approx(0.5 - 0.1 * 5)
    assert dear.learned(1) == [Cell((5, 2, 2, 1, 2)), *REFERENCES]
    capped = Population.begin(20, random.Random(0), convolutions, 0.0, 2.0)
    assert all(convolutions(m.cell) <= 2 for m in capped.members)
    for _ in range(20):
        assert all(convolutions(m.cell) <= 2 for m in capped.draw(3, 2, 1.0, random.Random(1)))


def test_weights_and_scores_learn_from_different_pictures_in_whole_epochs():
    one, other = _parts(41, 5, seed=0)
    assert sorted(one + other) == list(range(41))
    stream = _stream(one, 5, 0, 0, 8)
    assert all(len(batch) == 5 for batch in stream)
    assert {epoch for batch in stream for epoch, _ in batch} == {0, 1}
    for epoch in (0, 1):
        seen = [index for batch in stream for at, index in batch if at == epoch]
        assert sorted(seen) == sorted(one)
    assert _stream(one, 5, 0, 3, 5) == stream[3:]  # a function of the step
    with pytest.raises(SearchError, match="less than two batches of 30"):
        _parts(41, 30, 0)


# -- the network that holds all ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("expand", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_path_is_the_block_that_it_stands_for(expand, stride):
    torch.manual_seed(0)
    cell = Cell((7, 5, 3, 5, 2), (0, 1))
    shape = Shape(4, 4 if stride == 1 else 6, stride, 1)
    path = PathBlock(shape, [cell, DENSE], (1, 2))
    block = CellBlock(cell, shape._replace(expand=expand), stride == 1, BatchNorm)
    wide = 4 * expand
    with torch.no_grad():
        if expand > 1:
            block.expand[0].weight.copy_(path.expand.weight[:wide])
        block.project[0].weight.copy_(path.project.weight[:, :wide])
        for edge, op in zip(EDGES, cell.ops):
            if op in KERNELS:
                block.edges[edge][0].weight.copy_(path.edges[f"{edge}_{op}"].weight[:wide])
    x = torch.randn(3, 4, 9, 9)
    torch.testing.assert_close(path(x, cell, expand), block(x))


@pytest.fixture
def sandwich():
    torch.manual_seed(0)
    return Sandwich(Supernet(network_space()), drawn=2, seed=0)


def test_every_other_path_learns_what_the_largest_says_and_not_the_other_way_round(sandwich):
    model = wrap(sandwich, None, [InPlaceKD(4)], criterion=F.cross_entropy)
    x, y = torch.randn(6, 3, 16, 16), torch.arange(6) % 5
    rng = random.Random("0/0")
    space = sandwich.supernet.space
    paths = [space.largest(), space.smallest(), space.random(rng), space.random(rng)]
    with torch.no_grad():
        logits = [sandwich.supernet(x, genome) for genome in paths]
    losses = model(x, y)
    torch.testing.assert_close(losses["task"], F.cross_entropy(logits[0], y))
    expected = torch.stack([kl_divergence(other, logits[0], 1.0, "sum").mean() for other in logits[1:]]).mean()
    torch.testing.assert_close(losses["in_place"], expected)
    losses["in_place"].backward()
    largest = {choice[:2] for choice in paths[0]}
    assert largest
    only = model.student.supernet.blocks[1]
    touched = any(p.grad is not None and p.grad.abs().sum() > 0 for p in only.parameters())
    assert touched == any(genome[1] for genome in paths[1:])
    assert int(model.student.step) == 1
    assert set(model.unwrap().state_dict()) == set(Sandwich(Supernet(network_space()), 2, 0).state_dict())


def test_no_gradient_of_distillation_reaches_the_teachers_own_logits():
    logits = [torch.randn(3, 5, requires_grad=True) for _ in range(3)]
    from distillkit.core.views import Features

    InPlaceKD(3)(Features(tuple(logits)), None, None).backward()
    assert logits[0].grad is None
    assert all(other.grad.abs().sum() > 0 for other in logits[1:])


def test_paths_that_are_drawn_are_a_function_of_the_step(sandwich):
    x = torch.randn(4, 3, 16, 16)
    seen = []
    for path in sandwich.paths:
        path.register_forward_hook(lambda _, inputs, output: seen.append(output.detach()))
    sandwich.train()(x)
    state = sandwich.state_dict()
    sandwich(x)
    second = seen[4:8]
    sandwich.load_state_dict({**state, "step": torch.tensor(1)})
    sandwich(x)
    assert all(torch.equal(a, b) for a, b in zip(second, seen[8:12], strict=True))
    assert not torch.equal(seen[2], second[2])


def test_inherited_fitness_is_the_accuracy_of_the_path(sandwich):
    supernet, space = sandwich.supernet, sandwich.supernet.space
    batches = [(torch.randn(5, 3, 16, 16), torch.arange(5)), (torch.randn(3, 3, 16, 16), torch.arange(3))]
    fitness = Inherited(supernet, batches)
    genome = space.smallest()
    with torch.no_grad():
        logits = [supernet(x, genome) for x, _ in batches]
    right = sum(int((z.argmax(1) == y).sum()) for z, (_, y) in zip(logits, batches, strict=True))
    found = fitness(genome)
    assert found["fitness"] == right / 8
    assert found["loss"] == pytest.approx(float(F.cross_entropy(torch.cat(logits), torch.cat([y for _, y in batches]))))
    assert fitness(genome) == found
    best = evolve(space, fitness, Evolution(6, 2, 2), start=[genome]).best
    assert best.fitness >= found["fitness"]


# -- recipes and the command line -------------------------------------------------------------------------------------


def tiny(folder, *overrides):
    path = folder / "tiny.yaml"
    path.write_text(TINY)
    return load(path, [f"output={folder / 'runs'}", *overrides])


def test_the_smallest_network_is_of_inverted_residuals_alone():
    network = smallest_network(MACRO, [1, 2], 5)
    space = NetworkSpace(MACRO, [[INVERTED_RESIDUAL]] * 3, (3,), (1, 2), 5, 16)
    assert network.costs(16)[1] == space.madds(space.smallest())


def test_mistakes_of_a_search_are_named_with_file_line_and_key(tmp_path):
    space = tmp_path / "space.json"
    graphs = [[graph(cell) for cell in REFERENCES] for _ in range(3)]
    graphs[1][2][1][0] = 1
    space.write_text(json.dumps({"blocks": graphs}))
    path = tmp_path / "tiny.yaml"
    text = TINY.replace("madds: 400000", "madds: 4000").replace("population: 8, active", f"file: {space}, active")
    path.write_text(text.replace("model: autospace", "model: resnet18"))
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert caught.value.mistakes == [
        f"{path}:8: search.space.file: {space}: layer 1, cell 2: edge 0->1 is no edge; expected one of 2, 3, 5",
        f"{path}:10: search.nas.madds: is 4000, below the smallest network of inverted residuals, which has 193936 "
        "multiply-adds at 32x32; raise it, or make search.network smaller",
        f"{path}:12: student.model: is to be autospace where the recipe has the key search: what is found is of that "
        "kind",
    ]
    write_space(space, golden_space())
    with pytest.raises(RecipeError, match=r"space.json has 11 layers, search.network 3"):
        tiny(tmp_path, f"search.space.file={space}")
    with pytest.raises(RecipeError, match="is to be square for a search"):
        tiny(tmp_path, "data.size=[32, 64]")
    with pytest.raises(RecipeError, match=r"search\.space\.population: is less than the cells"):
        tiny(tmp_path, "search.space.population=2")


def test_a_recipe_without_a_search_is_refused(tmp_path):
    with pytest.raises(SearchError, match="has no key search"):
        search(tiny(tmp_path).model_copy(update={"search": None}), Console(quiet=True))


def test_a_search_finds_a_network_that_timm_builds_and_the_recipe_that_trains_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    done = CliRunner().invoke(cli.app, ["search", "tiny.yaml"])
    assert done.exit_code == 0, done.output
    folder = Path("runs/tiny-search")
    space = read_space(folder / "space.json")
    assert [len(cells) for cells in space] == [5, 5, 5]
    rounds = [line for line in read(folder / "space" / "space.jsonl") if line["kind"] == "round"]
    assert [line["round"] for line in rounds] == [0, 1, 2, 3]
    assert "held_out" not in rounds[0]  # the warm-up
    assert rounds[0]["scores"] == [[0.0, 0.0]] * 3
    assert rounds[3]["scores"] != [[0.0, 0.0]] * 3
    candidates = [line for line in read(folder / "networks.jsonl") if line["kind"] == "candidate"]
    assert len(candidates) == 16
    assert all(c["costs"]["multiply-adds"] <= 400_000 for c in candidates)
    network = read_network(folder / "network.json")
    assert network.costs(32)[1] <= 400_000
    recipe = load(folder / "recipe.yaml")
    assert recipe == training_recipe(tiny(tmp_path, "output=runs"), folder / "network.json").model_copy(
        update={"name": "tiny"}
    )
    model = timm.create_model(recipe.student.model, num_classes=10, **recipe.student.options)
    assert parameters(model) == network.costs(32)[0]
    assert {p.name for p in folder.glob("*.png")} == {"space.png", "fitness.png", "front.png"}
    # again: nothing is done, and another search is refused
    before = (folder / "networks.jsonl").read_bytes()
    assert CliRunner().invoke(cli.app, ["search", "tiny.yaml"]).exit_code == 0
    assert (folder / "networks.jsonl").read_bytes() == before
    other = CliRunner().invoke(cli.app, ["search", "tiny.yaml", "search.nas.madds=300000"])
    assert other.exit_code == 2
    assert "another recipe (changed: search.nas.madds): start over with --fresh" in other.output


@pytest.mark.integration
def test_a_search_killed_anywhere_ends_with_the_same_space_network_and_logs(tmp_path):
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tiny.yaml").write_text(TINY)
    command = [sys.executable, "-m", "distillkit", "search", "tiny.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    began = time.monotonic()
    subprocess.run(command, cwd=tmp_path / "straight", env=environment, check=True, capture_output=True)
    whole, rng = time.monotonic() - began, random.Random(time.time_ns())
    for _ in range(2):
        process = subprocess.Popen(command, cwd=tmp_path / "killed", env=environment, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 0.9) * whole)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, cwd=tmp_path / "killed", env=environment, check=True, capture_output=True)
    for name in ("space.json", "space/space.jsonl", "supernet/metrics.jsonl", "networks.jsonl", "network.json"):
        straight, killed = (tmp_path / which / "runs/tiny-search" / name for which in ("straight", "killed"))
        assert straight.read_bytes() == killed.read_bytes(), name


def test_the_timm_entry_point_is_registered_with_the_other_classifiers():
    from distillkit.models import classifiers

    assert classifiers.autospace is autospace
