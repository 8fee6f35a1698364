"""Cleaning: what the rules say of each language, and the pipeline on planted duplicates."""

import json
import random
from dataclasses import replace

import pytest

from jaxlm.config import CleanConfig, DataConfig
from jaxlm.data import contamination, masking, quality, shards
from jaxlm.data.units import is_spaceless, units
from jaxlm.schema import UserError

EN = (
    "The old harbour lies between two hills, and the road that leads to it is narrow. In the "
    "morning the boats come back with their catch, while the people of the town wait on the quay. "
    "They have known each other for years, and they talk about the weather and the price of fish. "
    "Nothing of this has changed in a century, although the young ones have left for the city."
)
JA = (
    "古い港は二つの丘の間にあり、そこへ続く道は狭い。朝になると船が魚を積んで戻り、町の人々は岸壁で待っている。"
    "彼らは長年の知り合いで、天気や魚の値段について話す。若い者たちは都会へ出て行ったが、"
    "この百年の間、ここでは何も変わっていない。夕方には店の灯りがともり、波の音だけが聞こえる。"
)


# ------------------------------------------------------------------------------- pure functions


def test_units_are_words_or_single_letters():
    assert units("Ｈｅｌｌｏ, World_2!") == ["hello", "world", "2"]
    assert units("東京タワーgo") == [*"東京タワ", "ー", "go"]
    assert is_spaceless(JA) and not is_spaceless(EN) and not is_spaceless("123")


@pytest.mark.parametrize(
    ("text", "language", "fault"),
    [
        (EN, "en", ""),
        (JA, "ja", ""),  # one 'word', which every rule about words would drop
        ("Home\nAbout\nLogin\nNews\nShop\n" * 3, "en", "repeated lines"),
        ("Too short.", "en", "too short"),
        ("短い。", "ja", "too short"),
        (f"Lorem ipsum dolor. {EN}", "en", "placeholder text"),
        ("".join(f"- item {i} is here\n" for i in range(30)), "en", "mostly bullets"),
        ("ab " * 200, "en", "mean length of words"),
        ("buy cheap watches " * 40, "", "repeated phrase"),
        ("今日は特売です。" * 40, "ja", "repeated phrase"),
        ("＋－×÷" * 90 + "計算記号と数字だけの頁です" * 9, "ja", "too few letters"),
        ("x = 1\nfor i in range(3):\n    print(i)\n", "python", ""),
        ("x" * 2000, "python", "lines too long for code"),
    ],
)  # fmt: skip
def test_the_rules_keep_prose_of_any_language_and_drop_the_rest(text, language, fault):
    assert quality.fault(text, language) == fault


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("mail me: a.b+c@example.co.jp!", "mail me: <EMAIL>!"),
        ("call +81 3-1234-5678 or 090-1234-5678", "call <PHONE> or <PHONE>"),
        ("(555) 123-4567", "<PHONE>"),
        ("pay 4111 1111 1111 1111 now", "pay <CARD> now"),
        ("order 4111 1111 1111 1112 now", "order 4111 1111 1111 1112 now"),  # no check digit
        ("8.8.8.8, not 192.168.1.1 nor v1.2.3", "<IP_ADDRESS>, not 192.168.1.1 nor v1.2.3"),
        ("key AKIAIOSFODNN7EXAMPLE", "key <SECRET>"),
        ("password = 'hunter2hunter2'", "password = '<SECRET>'"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "<SECRET>"),
        ("2026-11-25 10:20:30, pages 100-1234", "2026-11-25 10:20:30, pages 100-1234"),
    ],
)  # fmt: skip
def test_what_has_the_form_of_a_secret_is_masked(text, masked):
    found, counts = masking.mask(text)
    assert found == masked
    assert bool(counts) == (found != text)


def test_every_planted_evaluation_text_is_found():
    pytest.importorskip("xxhash")
    rng = random.Random(0)
    words = EN.replace(",", "").replace(".", "").split()
    sentences = [" ".join(rng.choices(words, k=rng.randint(5, 40))) for _ in range(200)]
    japanese = ["".join(rng.sample(JA, rng.randint(8, 60))) for _ in range(200)]
    found = contamination.grams([*sentences, *japanese])
    for sentence in sentences:  # in other case and punctuation
        assert found.found_in(f"{JA} {sentence.upper().replace(' ', ', ')}! {EN}")
    for sentence in japanese:
        assert found.found_in(f"{EN}{sentence}{JA}")
    assert not found.found_in("An entirely different text about mountains, snow and silence.")


# ------------------------------------------------------------------------------------ pipeline


def corpus(rng, n, language):
    """Documents of random sentences over a vocabulary of common words."""
    if language == "en":
        first, last = "ba de fi go hu ka lo mi no pu re su", "bert cast dell fund gram hold jump"
        vocabulary = [a + b + c for a in first.split() for b in last.split() for c in ("", "s")]
    else:
        vocabulary = list(map(chr, [*range(0x4E00, 0x4F80), *range(0x3042, 0x3094)]))
    join = " " if language == "en" else ""
    out = []
    for _ in range(n):
        sentences = [join.join(rng.choices(vocabulary, k=rng.randint(12, 25))) for _ in range(12)]
        out.append([s + (". " if join else "。") for s in sentences])
    return out, vocabulary, join


def near(rng, sentences, vocabulary, join):
    """An edited, a reordered and a truncated copy."""
    edited = []
    for sentence in sentences:
        items = sentence.split(join) if join else list(sentence)
        edited.append(
            join.join(rng.choice(vocabulary) if rng.random() < 0.03 else i for i in items)
        )
    shuffled = rng.sample(sentences, len(sentences))
    return ["".join(edited), "".join(shuffled), "".join(sentences[:10])]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(sources, groups): texts of a group are near-duplicates of each other."""
    rng, folder = random.Random(1), tmp_path_factory.mktemp("planted")
    rows, groups = [], []
    for language in ("en", "ja"):
        documents, vocabulary, join = corpus(rng, 200, language)
        for i, sentences in enumerate(documents):
            text = "".join(sentences)
            copies = near(rng, sentences, vocabulary, join) if i < 50 else []
            groups.append([text, *copies])
            rows += [{"text": t, "language": language} for t in groups[-1]]
    rng.shuffle(rows)
    for part in range(4):
        lines = [json.dumps(r, ensure_ascii=False) for r in rows[part::4]]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return (str(folder),), groups


def contents(folder):
    paths = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def texts_of(out):
    from jaxlm.data import tokenizer

    manifest, words, found = shards.read_manifest(out), tokenizer.load(out / "tokenizer"), set()
    for piece in (*manifest.train.shards, *manifest.eval.shards):
        tokens = shards.open_array(out, manifest, piece, "tokens")
        found |= set(words.decode(tokens).split("\0")) - {""}
    return found


def test_planted_near_duplicates_are_dropped_and_nothing_else(planted, tmp_path):
    pytest.importorskip("datatrove")
    sources, groups = planted
    data = DataConfig(sources=sources, clean=CleanConfig(near_duplicates=True), workers=2)
    manifest = shards.build(data, 256, tmp_path / "out")
    left = texts_of(tmp_path / "out")
    copies = sum(len(g) - 1 for g in groups)
    found = sum(len(g) - len(left & set(g)) for g in groups if left & set(g))
    lost = sum(not left & set(g) for g in groups)  # a text gone with all that is like it
    recall, precision = found / copies, found / (found + lost)
    assert recall >= 0.95 and precision >= 0.95, (recall, precision)
    funnel = json.loads((tmp_path / "out" / "clean.json").read_text())
    dropped = sum(map(len, groups)) - len(left)
    assert funnel["steps"][0]["documents"] == sum(map(len, groups))
    assert funnel["steps"][-1]["documents"] == len(left)
    assert manifest.dropped == {"near_duplicates: near-duplicate": dropped}
    samples = [json.loads(x) for x in (tmp_path / "out" / "dropped.jsonl").open()]
    assert {s["reason"] for s in samples[1:]} == {"near-duplicate", "kept"}
    assert not (tmp_path / "out" / ".clean").exists()


def test_each_step_says_what_it_dropped(tmp_path):
    for module in ("datatrove", "lingua", "ftfy"):
        pytest.importorskip(module)
    rows = [
        {"text": EN, "licence": "MIT"},
        {"text": JA + " a@b.example.org", "licence": "MIT"},
        {"text": EN.replace("harbour", "market"), "licence": "CC-BY-NC-4.0"},
        {"text": "Der Hafen liegt zwischen zwei Hügeln, die Straße ist schmal. " + "Ja. " * 9},
        {"text": "This is a rather short text."},
        {"text": f"{EN} What is the capital of the small country of Ruritania today?"},
        {"text": EN.replace("'", "").replace("town", "cafÃ© town")},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    (tmp_path / "eval.txt").write_text(
        "What is the capital of the small country of Ruritania?\n"
        "The capital of the small country of Ruritania today"
    )
    clean = CleanConfig(
        refused_licences=("*-NC-*",),
        repair=True,
        language_id=True,
        languages=("en", "ja"),
        quality=True,
        evaluation_sets=(str(tmp_path / "eval.txt"),),
        mask=True,
    )
    data = DataConfig(sources=(str(tmp_path / "x.jsonl"),), clean=clean)
    manifest = shards.build(data, 256, tmp_path / "out")
    funnel = json.loads((tmp_path / "out" / "clean.json").read_text())
    left = [(s["step"], s["documents"]) for s in funnel["steps"]]
    assert left == [("read", 7), ("licence", 6), ("repair", 6), ("language", 5), ("quality", 4),
                    ("decontaminate", 3), ("mask", 3)]  # fmt: skip
    assert funnel["changed"] == {"masked mail address": 1, "repaired": 1}
    found = texts_of(tmp_path / "out")
    assert any("café town" in t for t in found) and JA + " <EMAIL>" in found
    assert {o.language for o in manifest.origins if o.documents} == {"en", "ja"}
    again = replace(data, clean=replace(clean, mask=False))
    with pytest.raises(UserError, match="was built for clean="):
        shards.build(again, 256, tmp_path / "out")
