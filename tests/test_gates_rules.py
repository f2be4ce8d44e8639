import inspect
import pickle

import pytest
import torch
from torch import nn

import sp_fx
from sp_fx import Rules, Soft
from sp_fx.gates.rules import KINDS, NORMS
from sp_fx.gates.table import KINKED, TABLE, THRESHOLDLESS, rule_of
from sp_fx.rewrite.report import Site


def test_every_kind_of_the_table_has_a_rule_with_its_default():
    inner = {"mix", "linear", "conv", "affine_norm", "written", "surrogate"}  # parts of gates, and affine maps
    assert set(KINDS) == {rule_of(row) for row in set(TABLE) - inner} | {"stride"}  # a rule for some rows "conv"
    rules = {row: getattr(sp_fx.Rules(), rule_of(row)) for row in set(TABLE) - inner}
    assert rules == {row: TABLE[row].default for row in rules}


def test_the_kinds_of_the_families():
    norms = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "local_response_norm", "normalize")
    assert norms == NORMS and all(getattr(sp_fx.Rules(), kind) == "frozen" for kind in NORMS)
    assert set("relu leaky_relu prelu hardtanh elu hardshrink softshrink abs max_pool".split()) == KINKED
    assert {"gelu", "silu", "quick_gelu", "hardswish", "mish", "attention", "stride", *norms} == THRESHOLDLESS
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
    assert rules.elu is None and rules.hardswish is None and rules.hardtanh is None and rules.stride is None


@pytest.mark.parametrize("tau", [0, -1, 0.0, float("inf"), float("nan"), True, "hard", "soft", [1]])
def test_bad_temperatures(tau):
    with pytest.raises(ValueError, match=r"relu.*finite temperature above 0, 'frozen'.*None.*got"):
        sp_fx.Rules(relu=tau)


def test_bad_rules():
    with pytest.raises(ValueError, match="no temperature"):
        sp_fx.Rules(layer_norm=0.5)
    with pytest.raises(
        ValueError, match="'absolute', 'sample', 'channel' or a mapping from places to numbers above 0, got 'batch'"
    ):
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


# -- Soft: a temperature with a margin and a scale

OPENING = ("relu", "leaky_relu", "prelu", "hardtanh")
MARGINS = (*OPENING, "gelu", "quick_gelu", "silu", "hardswish", "mish")


def test_a_soft_stands_where_a_number_stood():
    assert repr(Soft(1.7, margin=0.4, scale="channel")) == "Soft(tau=1.7, margin=0.4, scale='channel', otherwise=None)"
    assert Soft(0.5) == Soft(0.5, 0.0, None, None) and Rules().hardtanh == Soft(1.7, 0.4, "batch_norm", otherwise=1.0)
    rules = Rules(relu=Soft(0.5, 0.2), overrides={"a": Soft(0.7, scale="absolute"), "b": {"relu": Soft(0.9, -1.0, "channel")}})
    assert [rules.temperature("relu", place) for place in "abc"] == [0.7, 0.9, 0.5]
    assert [rules.margin("relu", place) for place in "abc"] == [0.0, -1.0, 0.2]
    assert [rules.scale_of("relu", place, 0.5) for place in "abc"] == ["absolute", "channel", "sample"]
    assert pickle.loads(pickle.dumps(rules)) == rules
    assert str(Rules(relu=Soft(0.5, 0.2))) == "Rules(relu=Soft(tau=0.5, margin=0.2, scale=None, otherwise=None))"


@pytest.mark.parametrize("scale", ["absolute", "sample", "channel"])
def test_the_scale_of_a_soft_beats_that_of_the_rules_and_a_measured_number_both(scale):
    rules = Rules(relu=Soft(0.5, scale="channel"), leaky_relu=Soft(0.5), hardtanh=0.5, scale=scale)
    assert [rules.scale_of(kind, "a", 0.5) for kind in OPENING] == ["channel", scale, scale, scale]
    assert rules.scale_of("elu", "a", 0.6) == "absolute"  # never follows one
    measured = Rules(relu=Soft(0.5, scale=scale), scale={"a": 2.5, "c": "channel"})
    assert [measured.scale_of("relu", place, 0.5) for place in "abc"] == [2.5, scale, "channel"]
    assert Rules(relu=Soft(0.5), scale={"a": 2.5}).scale_of("relu", "b", 0.5) == "missing"


def test_what_a_gate_has_behind_a_batch_norm_and_otherwise():
    values = {"relu": Soft(0.5, 0.2, "batch_norm"), "leaky_relu": Soft(0.5, 0.2, "batch_norm", 0.9),
              "prelu": Soft(0.5, 0.2, "batch_norm", Soft(0.9, 0.1, "channel"))}  # fmt: skip
    rules, kinds = Rules(**values, scale="absolute"), OPENING[:3]
    for normed, temperatures, margins, scales in (
        (True, [0.5, 0.5, 0.5], [0.2, 0.2, 0.2], ["batch_norm", "batch_norm", "batch_norm"]),
        (False, [0.5, 0.9, 0.9], [0.2, 0.0, 0.1], ["absolute", "absolute", "channel"]),
    ):
        assert [rules.temperature(kind, "a", normed) for kind in kinds] == temperatures
        assert [rules.margin(kind, "a", normed) for kind in kinds] == margins
        assert [rules.scale_of(kind, "a", 0.5, normed) for kind in kinds] == scales
    measured = Rules(relu=values["relu"], scale={"a": 2.5})
    assert [measured.scale_of("relu", place, 0.5, True) for place in "ab"] == [2.5, "batch_norm"]
    assert measured.scale_of("relu", "b", 0.5) == "missing"
    assert pickle.loads(pickle.dumps(rules)) == rules


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"relu": Soft(1.0, scale="batch")}, "'channel', 'batch_norm' or None, got 'batch'"),
        ({"abs": Soft(1.0, scale="batch_norm")}, "abs has no one kink that opens it, got scale='batch_norm'"),
        ({"gelu": Soft(1.0, scale="batch_norm")}, "gelu is not the same at every scale"),
        ({"relu": Soft(1.0, otherwise=1.0)}, "otherwise=1.0 goes with scale='batch_norm', got scale=None"),
        ({"relu": Soft(1.0, 0.0, "batch_norm", -1.0)}, "otherwise is a finite temperature above 0, or a Soft"),
        ({"relu": Soft(1.0, 0.0, "batch_norm", "frozen")}, "otherwise is a finite temperature above 0, or a Soft"),
        ({"relu": Soft(1.0, 0.0, "batch_norm", Soft(1.0, 0.0, "batch_norm"))}, "otherwise is a finite temperature above 0"),
        ({"scale": "batch_norm"}, "scale is 'absolute', 'sample', 'channel' or a mapping"),
        *(({"relu": Soft(tau)}, "relu.*temperature.*got") for tau in (0, -1, True, float("nan"), float("inf"), None)),
        ({"relu": Soft("frozen")}, "the temperature of a Soft is a finite number above 0, got 'frozen'"),
        ({"relu": Soft(Soft(1.0))}, "temperature"),
        *(({"relu": Soft(1.0, margin)}, "a margin is a finite number")
          for margin in (True, "wide", None, float("inf"), float("nan"))),
        *(({kind: Soft(1.0, 0.4)}, f"kind {kind} has no margin, got 0.4; kinds that have one are {', '.join(MARGINS)}")
          for kind in ("abs", "elu", "max_pool", "attention", "softshrink")),
        *(({"relu": Soft(1.0, scale=scale)}, "the scale of a Soft is 'absolute', 'sample', 'channel', 'batch_norm' or None, got")
          for scale in ("batch", "", 2.0)),
        *(({kind: Soft(1.0, scale="channel")}, f"the gate of kind {kind} is not the same at every scale")
          for kind in ("elu", "gelu")),
        ({"layer_norm": Soft(1.0)}, "no temperature"),
        ({"stride": Soft(1.0)}, "a stride is 'smooth' or None"),
        *(({"stride": value}, "a stride is 'smooth' or None") for value in ("frozen", 1.0, True)),
        ({"relu": "smooth"}, "finite temperature above 0"),
        ({"overrides": {"a": {"stride": "frozen"}}}, "override 'a': a stride is 'smooth' or None"),
        ({"overrides": {"a": Soft(0.0)}}, "override 'a'"),
        ({"overrides": {"a": {"abs": Soft(1.0, 0.4)}}}, "override 'a': a gate of kind abs has no margin"),
        *(({kind: Soft(1.0, scale="channel")}, f"the gate of kind {kind} has no one kink") for kind in ("abs", "max_pool")),
        ({"scale": {"a": "batch"}}, "scale of 'a' is a finite number above 0, 'sample', 'channel' or 'absolute', got 'batch'"),
    ],
)  # fmt: skip
def test_a_soft_that_a_kind_cannot_have(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rules(**arguments)


def test_overrides_by_soft_reach_the_map_and_the_report():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 5), nn.LeakyReLU(0.1), nn.Linear(5, 3)).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    by_place, by_kind = Rules(overrides={"1": Soft(0.7, 0.5, "channel")}), Rules(relu=Soft(0.7, 0.5, "channel"))
    first, second = (sp_fx.transform(net, rules=rules) for rules in (by_place, by_kind))
    assert torch.equal(first.pullback(x, 1), second.pullback(x, 1))
    assert not torch.allclose(first.pullback(x, 1), sp_fx.transform(net).pullback(x, 1))
    site = first.report().sites[0]
    assert (site.temperature, site.margin, site.scale) == (0.7, 0.5, "channel")
    assert "0.7 x scale by channel, margin 0.5" in str(first.report())
    everywhere = sp_fx.transform(net, rules=Rules(overrides={"*": Soft(0.7, 0.5)})).report()
    assert [(s.kind, s.temperature, s.margin) for s in everywhere.sites] == [
        ("relu", 0.7, 0.5),
        ("layer_norm", "frozen", 0.0),
        ("leaky_relu", 0.7, 0.5),
    ]


def test_an_override_for_all_kinds_gives_no_margin_to_those_without_one():
    """A pattern of places fits gates of every kind: of those without a margin its Soft is the temperature alone."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ELU(), nn.Linear(6, 3)).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    soft, plain = (sp_fx.transform(net, rules=Rules(overrides={"*": value})) for value in (Soft(0.7, 0.5, "channel"), 0.7))
    assert torch.equal(soft.pullback(x, 1), plain.pullback(x, 1))
    assert [(s.margin, s.scale) for s in soft.report().sites] == [(0.0, "absolute")]


@pytest.mark.parametrize("frozen", ["frozen", 1e-9])
def test_a_soft_that_is_all_but_hard_is_the_frozen_gate(frozen):
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU6(), nn.Linear(6, 3)).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    value = Soft(frozen, 0.4, "channel") if frozen != "frozen" else frozen
    got = sp_fx.transform(net, rules=Rules(hardtanh=value)).pullback(x, 1)
    leaf = x.clone().requires_grad_()
    assert torch.allclose(got, torch.autograd.grad(net(leaf)[:, 1].sum(), leaf)[0], rtol=1e-6, atol=1e-9)


def test_a_measured_scale_keeps_the_margin():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU6(), nn.Linear(6, 3)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    clamp = Soft(1.7, 0.4, "channel")
    rules = Rules(hardtanh=clamp, scale={"1": 2.0}), Rules(hardtanh=Soft(3.4, 0.4, "absolute"))
    measured, absolute = (sp_fx.transform(net, rules=r) for r in rules)
    assert torch.allclose(measured.pullback(x, 1), absolute.pullback(x, 1), rtol=1e-12, atol=0)
    assert pickle.loads(pickle.dumps(measured.report().rules)) == measured.report().rules


class Stages(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1, self.layer4 = (nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        return self.layer4(self.layer1(x)).mean((2, 3))


@pytest.mark.parametrize("pattern", ["layer4.*", "layer4", "layer4.?"])
def test_places_of_a_model_that_is_wrapped(pattern):
    """`pixel_space` puts "model." before every place; overrides that are right of the model stay right."""
    rules = sp_fx.Rules(overrides={pattern: 0.3})
    wrapped = sp_fx.pixel_space(Stages(), [0.5] * 3, [0.2] * 3)
    for model in (Stages(), wrapped, nn.Sequential(wrapped)):
        found = {
            site.place: site.temperature for site in sp_fx.transform(model, rules=rules).report().sites if site.kind == "relu"
        }
        assert len(found) == 4 and all((tau == 0.3) == ("layer4" in place) for place, tau in found.items())


def test_places_in_several_wrapped_models():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = Stages(), Stages()

        def forward(self, x):
            return self.left(x) + self.right(x)

    with pytest.raises(ValueError, match=r"'layer4\.\*' fits places in left, right; say which: left\.layer4\.\*"):
        sp_fx.transform(Two(), rules=sp_fx.Rules(overrides={"layer4.*": 0.3}))


def test_an_override_of_gates_that_have_no_temperature():
    """It would change nothing. Where others are among those that it fits, they have one."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.LayerNorm(7))
    x = torch.randn(1, 3, 16, 16)
    for place, value, said in (("0", 0.3, "override '0' at 0: a stride is 'smooth' or None"), ("0", "frozen", "a stride is"),
                               ("2", 0.3, "override '2' at 2: a normalisation has no temperature"),
                               ("2", Soft(0.3, 0.4), "a normalisation has no temperature")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            sp_fx.transform(net, rules=Rules(overrides={place: value}), example_inputs=x)
    for rules in (Rules(overrides={"*": 0.3}), Rules(overrides={"0": None}), Rules(overrides={"2": "frozen"})):
        sp_fx.transform(net, rules=rules, example_inputs=x)
