import pickle

import pytest

import sp_fx
from sp_fx.gates.rules import KINDS, NORMS
from sp_fx.gates.table import KINKED, TABLE, THRESHOLDLESS, rule_of


def test_every_kind_of_the_table_has_a_rule_with_its_default():
    inner = {"mix", "linear", "conv", "affine_norm", "written", "surrogate"}  # parts of gates, and affine maps
    assert set(KINDS) == {rule_of(row) for row in set(TABLE) - inner}
    rules = {row: getattr(sp_fx.Rules(), rule_of(row)) for row in set(TABLE) - inner}
    assert rules == {row: TABLE[row].default for row in rules}


def test_the_kinds_of_the_families():
    norms = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "local_response_norm", "normalize")
    assert norms == NORMS and all(getattr(sp_fx.Rules(), kind) == "frozen" for kind in NORMS)
    assert set("relu leaky_relu prelu hardtanh elu hardshrink softshrink abs max_pool".split()) == KINKED
    assert {"gelu", "silu", "quick_gelu", "hardswish", "mish", "attention", *norms} == THRESHOLDLESS
    assert KINKED | THRESHOLDLESS | {"product"} == set(KINDS)


def test_the_papers_rules():
    rules = sp_fx.Rules.paper()
    assert (rules.relu, rules.gelu, rules.silu, rules.max_pool, rules.attention, rules.scale) == (
        0.6,
        1.0,
        1.6,
        0.3,
        1.0,
        "absolute",
    )
    assert rules.layer_norm == rules.group_norm == rules.rms_norm == rules.instance_norm == "frozen"
    assert rules.elu is None and rules.hardswish is None


@pytest.mark.parametrize("tau", [0, -1, 0.0, float("inf"), float("nan"), True, "hard", "soft", [1]])
def test_bad_temperatures(tau):
    with pytest.raises(ValueError, match=r"relu.*finite temperature above 0, 'frozen'.*None.*got"):
        sp_fx.Rules(relu=tau)


def test_bad_rules():
    with pytest.raises(ValueError, match="no temperature"):
        sp_fx.Rules(layer_norm=0.5)
    with pytest.raises(ValueError, match="'absolute', 'sample' or a mapping from places to numbers above 0, got 'batch'"):
        sp_fx.Rules(scale="batch")
    with pytest.raises(ValueError, match="kind 'rellu'; the kinds are relu"):
        sp_fx.Rules(overrides={"layer1.*": {"rellu": 1.0}})
    with pytest.raises(ValueError, match=r"override 'layer1\.\*'"):
        sp_fx.Rules(overrides={"layer1.*": -1.0})
    with pytest.raises(TypeError):
        sp_fx.Rules(rellu=1.0)


def test_rules_print_what_was_changed_and_pickle():
    rules = sp_fx.Rules(relu=0.5, overrides={"a.*": None})
    assert str(rules) == "Rules(relu=0.5, overrides={'a.*': None})"
    assert pickle.loads(pickle.dumps(rules)) == rules


def test_the_last_pattern_wins_and_numbers_pass_over_norms():
    rules = sp_fx.Rules(overrides={"*": 2.0, "b": {"relu": 3.0}})
    assert rules.temperature("relu", "a") == 2.0
    assert rules.temperature("relu", "b") == 3.0
    assert rules.temperature("gelu", "b") == 2.0
    assert rules.temperature("layer_norm", "a") == "frozen"
