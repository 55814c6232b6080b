"""What `surgeon inspect` is given to show."""

from __future__ import annotations

import json
from typing import Any

from surgeon.anatomy import rows, summary
from surgeon.anatomy.report import spans


def test_rows_are_plain_data_in_graph_order(read: Any) -> None:
    anatomy = read("gpt2", "causal").anatomy
    found = rows(anatomy)
    assert json.loads(json.dumps(found)) == found
    assert len(found) == len(anatomy.sites())
    assert [r["role"] for r in found[:3]] == ["embedding.token", "embedding.position", "norm.pre"]
    key = next(r for r in found if r["role"] == "attention.key")
    assert (key["shape"], key["features"], key["layer"], key["path"]) == (
        "32->32",
        "32:64",
        0,
        "transformer.h.0.attn.c_attn",
    )


def test_grouped_heads_are_shown(read: Any) -> None:
    core = next(r for r in rows(read("llama", "causal").anatomy) if r["kind"] == "attention")
    assert core["shape"] == "4 heads of 8, 2 for keys and values"


def test_the_summary_counts_roles_and_names_shared_weights(read: Any) -> None:
    told = summary(read("albert", "classes").anatomy)
    assert json.loads(json.dumps(told)) == told
    assert told["layers"] == {"encoder": 2}
    assert told["roles"]["attention.query"] == 2
    assert told["shared_weights"]["albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight"] == 2
    assert summary(read("gpt2", "causal").anatomy)["shared_weights"] == {"transformer.wte.weight": 2}


def test_spans_are_half_open_runs() -> None:
    assert spans((0, 1, 2, 8, 9)) == "0:3, 8:10"
    assert spans((0, 2, 4, 6)) == "0:1, 2:3, … (4 runs)"
