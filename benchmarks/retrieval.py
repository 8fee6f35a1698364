"""How often `--documents` finds the passage that answers a question about this project.

    python benchmarks/retrieval.py --embedder=all-MiniLM-L6-v2 [--documents=docs]

Each of 20 questions, written before anything was measured, has words that only the passage which
answers it holds. Counted: is it the nearest, is it among the nearest three, and is anything near
enough (`documents.NEAR`, which was chosen on these questions); and of 20 questions that the
documents do not answer, for how many nothing is. `--all` prints each. The embedder is any model
that `jaxlm.from_pretrained` reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jaxlm
from jaxlm.serve.documents import MOST, NEAR, Documents

ANSWERED = (
    ("How do I stop other people on the network from using my server?", "Another `--host` wants"),
    ("What becomes of requests under way when the server is stopped?", "have `--grace` seconds"),
    ("Which status does a client get when too many are waiting?", "a full queue 429"),
    ("Where does the web page keep my conversations?", "stays in the browser"),
    ("Can the model fill in code between a beginning and an end?", "`suffix` fills in the middle"),
    ("How can I make the answer valid JSON?", "tells between two steps which tokens may come"),
    ("Does a small draft model change what the big one says?", "the draft only decides"),
    ("How much memory do 8 bit weights save?", "a quarter of their memory"),
    ("What does typical sampling do?", "whose information is nearest to the entropy"),
    ("Is contrastive search supported?", "There is no contrastive search"),
    ("How are near duplicate documents removed?", "MinHash on datatrove"),
    ("What happens to files that cannot be read?", "`quarantine.jsonl`"),
    ("Which tokenizers can be trained?", "`chars`, `wordpiece`"),
    ("May a data URL point at a machine in my private network?", "may not reach a private address"),
    ("How do I find out how many hours and dollars training on a TPU takes?", "`--price`"),
    ("How can I bring my own optimizer?", "`(config) -> optax.GradientTransformation`"),
    ("How do I train with low-rank adapters?", "low-rank adapters on weights by name"),
    ("How do people vote which of two answers is better?", "jaxlm judge --answers"),
    ("How does one notice a training process that hangs?", "its heartbeat"),
    ("Are the results bitwise the same on more devices?", "16 virtual shards"),
)
NOT_ANSWERED = (
    "How do I return a pair of shoes?", "What is the capital of Mongolia?",
    "When does the last train to Kyoto leave?", "How long do I boil an egg?",
    "Who won the football world cup in 1998?", "Can my dog eat chocolate?",
    "How do I reset the password of my e-mail account?", "What is the tax on wine in France?",
    "Which vaccine do I need for Brazil?", "How do I prune an apple tree?",
    "What does a parking ticket cost?", "How do I repair a flat bicycle tyre?",
    "Is the museum open on Mondays?", "How many calories has a banana?",
    "Who wrote Pride and Prejudice?", "How do I cancel my subscription?",
    "What is the weather like in Oslo?", "How do I descale the coffee machine?",
    "When is the rent due?", "How tall is Mount Fuji?",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--embedder", required=True)
    parser.add_argument("--documents", type=Path, default=Path(__file__).parents[1] / "docs")
    parser.add_argument("--all", action="store_true")
    asked = parser.parse_args()
    held = Documents(asked.documents, jaxlm.from_pretrained(asked.embedder).embed)
    for question, words in ANSWERED:
        if not any(words in p.text for p in held.passages):
            raise SystemExit(f"no passage says {words!r}, which answers {question!r}")
    first = among = near = quiet = 0
    for question, words in ANSWERED:
        found = held.nearest(question, near=-1.0)
        right = [words in one.passage.text for one in found]
        first, among = first + right[0], among + any(right)
        near += found[0].nearness >= NEAR
        if asked.all:
            place = right.index(True) + 1 if any(right) else "-"
            print(f"{found[0].nearness:.2f} {place} {question}")
    for question in NOT_ANSWERED:
        [best] = held.nearest(question, most=1, near=-1.0)
        quiet += best.nearness < NEAR
        if asked.all:
            print(f"{best.nearness:.2f}   {question} ({best.passage.document})")
    n, m = len(ANSWERED), len(NOT_ANSWERED)
    print(f"{len(held.passages)} passages of {asked.documents}")
    print(f"hit@1 {first}/{n}, hit@{MOST} {among}/{n}; near enough ({NEAR}) {near}/{n}")
    print(f"of questions that they do not answer, nothing near enough {quiet}/{m}")


if __name__ == "__main__":
    main()
