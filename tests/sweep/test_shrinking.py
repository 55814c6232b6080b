"""Tiny configurations keep the relations that a family's own checks, or its layers, hold to."""

from __future__ import annotations

import pytest

from sweep.shrinking import Sizes, tiny


def test_a_list_is_as_long_as_the_depth_it_goes_with() -> None:
    config = tiny("dory", Sizes())  # a depth that is the sum of three others
    assert config.num_hidden_layers == config.n_input_layers + config.n_recurrent_layers + config.n_output_layers
    assert len(config.layer_types) == config.num_hidden_layers
    assert set(config.layer_types) == {"full_attention", "sliding_attention"}
    assert config.n_recurrent_loops == 1
    config = tiny("qwen3_asr", Sizes()).get_text_config()  # two depths that are equal by default
    assert len(config.layer_types) == config.num_hidden_layers == 2


@pytest.mark.parametrize("layers", [1, 2, 4, 8])
def test_some_layers_keep_keys_of_their_own_where_others_share_them(layers: int) -> None:
    config = tiny("gemma3n_text", Sizes(layers=layers))
    assert config.num_kv_shared_layers == 15 * layers // 35 < config.num_hidden_layers == layers


def test_rates_by_stage_are_off_by_stage() -> None:
    config = tiny("cvt", Sizes())
    assert list(config.drop_path_rate) == [0.0] * 3
    assert tiny("levit", Sizes()).drop_path_rate == 0  # the class takes no number with a fraction


def test_an_index_keeps_its_heads_so_that_no_two_tokens_score_the_same() -> None:
    config = tiny("deepseek_v32", Sizes())
    assert config.num_attention_heads == 4
    assert config.index_n_heads == 64


def test_what_defaults_leave_open_is_chosen_when_asked() -> None:
    assert tiny("lfm2_moe", Sizes()).layer_types is None
    assert tiny("lfm2_moe", Sizes(layers=3, absent=True)).layer_types == ["full_attention"] * 3
    assert tiny("hunyuan_v1_dense", Sizes(absent=True)).head_dim == 16
