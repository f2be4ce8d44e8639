import inspect
import pickle

import pytest
from torch import nn

import sp_fx
from sp_fx.gates.rules import KINDS, NORMS
from sp_fx.gates.table import KINKED, TABLE, THRESHOLDLESS, rule_of
from sp_fx.rewrite.report import Site


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
    with pytest.raises(ValueError, match=r"override 'layer1\.\*': there is no kind 'rellu'; the nearest are relu"):
        sp_fx.Rules(overrides={"layer1.*": {"rellu": 1.0}})
    with pytest.raises(ValueError, match=r"override 'layer1\.\*'"):
        sp_fx.Rules(overrides={"layer1.*": -1.0})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"rellu": 1.0},
            r"no kind 'rellu'; the nearest are relu, .*registered=\{'rellu': \.\.\.\} sets a gate that register_gate",
        ),
        ({"zzz": 1.0}, "no kind 'zzz'; the kinds are relu, leaky_relu"),
        ({"overrides": {nn.ReLU: 0.4}}, r"keys of overrides are places.*'layer4\.\*'.*Rules\(relu=0\.5\); got <class"),
        ({"overrides": "relu"}, "overrides is a mapping from places or patterns of them to temperatures.*got 'relu'"),
        ({"registered": {nn.ReLU: 0.4}}, "keys of registered are names of registered gates, which are strings"),
        ({"registered": ["snake"]}, "registered is a mapping from names of registered gates"),
        ({"scale": {1: 0.4}}, "keys of scale are places, which are strings"),
    ],
)
def test_rules_of_the_wrong_form(arguments, message):
    with pytest.raises(TypeError, match=message):
        sp_fx.Rules(**arguments)


def test_rules_are_given_by_keyword():
    with pytest.raises(TypeError, match="by keyword, such as Rules"):
        sp_fx.Rules(1.0)
    assert inspect.signature(sp_fx.Rules).parameters["relu"].default == 1.0  # as editors show it


def test_an_override_that_is_a_kind_says_how_kinds_are_set():
    with pytest.raises(ValueError, match=r"'relu' fits no gate.*a kind of gate, and Rules\(relu=0\.5\) sets it at every place"):
        sp_fx.transform(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), rules=sp_fx.Rules(overrides={"relu": 0.5}))


def test_overrides_of_the_same_places_are_refused():
    """`blocks` stands for `blocks.*`, and one of the two would be lost."""
    rules = sp_fx.Rules(overrides={"blocks.*": {"relu": 0.5}, "blocks": {"gelu": 2.0}})
    with pytest.raises(ValueError, match=r"overrides 'blocks\.\*' and 'blocks' are both for 'blocks\.\*'"):
        rules.resolved([Site("blocks.1", "relu", "relu", "kept")])


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
