"""The tables of benchmarks.seeds: what a row's mean, spread and difference to the first row are made of."""

import json

from benchmarks import seeds
from distillkit.recipe import load


def line(recipe, row, seed, top1, **more):
    made_with = {"commit": "c", "torch": "2", "machine": "m", "date": "2026-01-02", "parameters": 1, "minutes": 1.0}
    key = seeds.cell(recipe, row, seed)
    of_class = dict.fromkeys("ab", top1)
    return (
        made_with | {"cell": key, "row": row.row, "seed": seed, "top1": top1, "top5": 1.0, "classes": of_class} | more
    )


def test_a_table_of_classifiers(tmp_path):
    recipe = load("quickstart_classifier", [])
    alone, distilled = recipe.compare
    scores = ((alone, (0.5, 0.6, 0.7)), (distilled, (0.6, 0.65)))
    lines = [line(recipe, row, seed, top1) for row, of in scores for seed, top1 in enumerate(of)]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    bench = seeds.Bench(recipe, path, "the command")
    bench.write_table()
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in path.with_suffix(".md").read_text().split("\n")
    ]
    assert ["row", "n", "top1", "top5", "top1 less student, same seed"] in rows
    assert ["student", "3", "60.0 ± 10.0", "100.0 ± 0.0", ""] in rows
    assert ["distilled", "2", "62.5 ± 3.5", "100.0 ± 0.0", "+7.5 ± 3.5"] in rows  # of two pairs: 10 and 5
    assert ["distilled", "62.5 ± 3.5", "62.5 ± 3.5"] in rows
    assert bench.line(alone, 2) == lines[2]
    assert bench.line(distilled, 2) is None


def test_a_cell_is_known_by_what_changes_its_numbers():
    def cells(*changes):
        recipe = load("quickstart_classifier", changes)
        return [seeds.cell(recipe, row, 0) for row in recipe.compare]

    alone, distilled = cells()
    assert cells("data.workers=1") == [alone, distilled]
    assert cells("distillers.0.temperature=2")[0] == alone
    assert cells("distillers.0.temperature=2")[1] != distilled
    assert cells("teacher.train.epochs=3")[0] == alone
    assert cells("smoothing=0.1")[0] != alone
    assert cells("train.epochs=5")[0] != alone
