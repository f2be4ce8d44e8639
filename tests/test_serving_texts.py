"""The service of a package of texts: token ids come in, shares of the tokens go out."""

import pytest
import torch
from torch import nn

import sp_fx
from helpers import relative
from test_capture_sizes import Text, tokens
from test_program_lengths import masks
from test_serving_service import Running, packaged


class Embeds(Text):
    def forward(self, ids):
        return nn.functional.normalize(super().forward(ids), dim=-1)


def program_of(model, example, **options):
    explainer = sp_fx.transform(model.eval(), example_inputs=example)
    return explainer, explainer.compile("tokens", example_inputs=example, inductor=False, **options)


@pytest.fixture(scope="module", params=[True, False], ids=["any batch", "a batch of two"])
def classes(request):
    ids = tokens(2, 9)
    explainer, program = program_of(Text(), {"ids": ids, "mask": masks(ids)}, dynamic_batch=request.param)
    service = Running(packaged(program))
    yield explainer, service
    service.stop()


def instance(ids, mask):
    return {"ids": ids[0].tolist(), "mask": mask[0].tolist()}


def test_texts_of_several_lengths_in_one_request(classes):
    explainer, service = classes
    texts = [(ids := tokens(1, length), masks(ids)) for length in (3, 9, 3, 40, 1)]
    body = {"instances": [instance(*text) for text in texts], "parameters": {"target": ["b", 0, None, 2, 1]}}
    found = service.post("explain", body).json()
    predictions = service.post("predict", {"instances": body["instances"]}).json()["predictions"]
    for text, target, prediction, explanation in zip(texts, (1, 0, None, 2, 1), predictions, found["explanations"]):
        logits = explainer(*text).detach()
        assert relative(torch.tensor([prediction["logits"]]), logits) <= 1e-5
        assert prediction["class"] == int(logits.argmax()) and prediction["confidence"] == pytest.approx(
            float(logits.softmax(1).max()), rel=1e-4
        )
        target = int(logits.argmax()) if target is None else target
        assert explanation["target"] == target and explanation["label"] == "abc"[target]
        assert relative(torch.tensor([explanation["shares"]]), explainer.tokens(text, target).shares) <= 1e-4


def test_what_is_refused(classes):
    _, service = classes
    ids = tokens(1, 4)[0].tolist()
    for bad, said in (
        ({"ids": ids}, "an object of ids, mask"),
        (ids, "an object of ids, mask; got list"),
        ({"ids": ids, "mask": [1, 1]}, "one number"),
        ({"ids": [0.5] * 4, "mask": [1] * 4}, "ids is a list of whole numbers: got float64"),
        ({"ids": [True] * 4, "mask": [1] * 4}, "whole numbers"),
        ({"ids": [99] * 4, "mask": [1] * 4}, "0 to 29"),
        ({"ids": [10**300] * 4, "mask": [1] * 4}, "whole numbers"),
        ({"ids": [], "mask": []}, "length"),
        ({"ids": [1] * 65, "mask": [1] * 65}, "length 1 to 64"),
        ({"b64": "aGVsbG8="}, "an object of ids, mask"),
    ):
        reply = service.post("explain", {"instances": [bad]})
        assert reply.status_code == 400 and said in reply.json()["error"], (bad, reply.text)
    reply = service.post("explain", {"instances": [{"ids": ids, "mask": [1] * 4}], "parameters": {"format": "png"}})
    assert reply.status_code == 400 and "array" in reply.json()["error"]
    picture = service.client.post("/v1/models/small:explain", content=b"x", headers={"Content-Type": "image/png"})
    assert picture.status_code == 415 and "token ids" in picture.json()["error"]


def test_embeddings_and_directions():
    explainer, program = program_of(Embeds(), tokens(2, 6), target="direction")
    service = Running(packaged(program, None))
    try:
        ids, aim = tokens(1, 11), [0.5, -1.0, 2.0]
        body = {"instances": ids.tolist(), "parameters": {"target": aim}}
        found = service.post("explain", body).json()
        assert relative(torch.tensor(found["predictions"][0]["embedding"]), explainer(ids)[0].detach()) <= 1e-5
        expected = explainer.tokens(ids, lambda out: out @ torch.tensor(aim)).shares
        assert relative(torch.tensor([found["explanations"][0]["shares"]]), expected) <= 1e-4
        for target, said in ((None, "got none"), ([1.0], "got shape"), ("b", "numbers of shape [3]"), ([1.0, None, 2.0], "[3]")):
            reply = service.post("explain", {**body, "parameters": {"target": target}})
            assert reply.status_code == 400 and said in reply.json()["error"], (target, reply.text)
        assert service.post("predict", {"instances": ids.tolist()}).status_code == 200
    finally:
        service.stop()


def test_packages_whose_scores_are_chosen_are_refused():
    _, program = program_of(Text(), tokens(2, 6), target=lambda out: out.flip(1))
    with pytest.raises(ValueError, match="wrap the model"):
        Running(packaged(program))
