"""What metrics do not measure is counted and said; words in every script."""

import random

import pytest

from llava_min.evaluation.metrics import blind
from llava_min.evaluation.metrics.words import words
from llava_min.evaluation.score import score

SACREBLEU = "what computes this metric; pip install -e '.[metrics]'"


def scored(metric: str, *pairs: tuple[str, str | list[str]]) -> dict:
    """The metric's entry for predictions and their references."""
    rows = [{"prediction": p, "references": r if isinstance(r, list) else [r]} for p, r in pairs]
    return score(rows, [metric])[metric]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The red-ish ring_2, don't!", "the red ish ring 2 don t"),
        ("一只猫坐在沙发上。", "一 只 猫 坐 在 沙 发 上"),
        ("3只Cats在左", "3 只 cats 在 左"),
        ("ねこがソファー", "ね こ が ソ フ ァ ー"),
        ("สวัสดี", "ส วั ส ดี"),  # a character with the marks over it
        ("قِطَّة على الأريكة", "قِطَّة على الأريكة"),
        ("Красный Круг", "красный круг"),
        ("हिन्दी में", "हिन्दी में"),
        ("빨간 원", "빨간 원"),
        ("Café", "café"),
        ("Cafe\u0301", "café"),
        ("ＡＢＣ　１２", "abc 12"),
        ("می\u200cخواهم", "میخواهم"),
        ("🙂 —", ""),
    ],
)
def test_words_are_those_of_the_script(text, expected):
    assert " ".join(words(text)) == expected


def test_words_of_ascii_texts_are_rouge_scores():
    tokenize = pytest.importorskip("rouge_score.tokenize", reason=SACREBLEU).tokenize
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(chr(rng.randrange(128)) for _ in range(40))
        assert list(words(text)) == tokenize(text, None) == list(words(text + "—"))


RIGHT = ["一只猫坐在沙发上。", "左上角有一个蓝色的三角形。", "สวัสดีครับ", "قطة على الأريكة"]


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_measures_answers_in_every_script(name):
    pytest.importorskip("rouge_score", reason=SACREBLEU)
    found = scored(name, *((text, text) for text in RIGHT))
    assert found["score"] == 1
    assert [line.split(",")[0] for line in found["remarks"]] == [
        "4 of 4 examples have letters beyond a to z"
    ]
    assert "remarks" not in scored(name, ("a red ring", "the red ring"))


def test_rouge_counts_characters_where_there_is_no_space():
    pytest.importorskip("rouge_score", reason=SACREBLEU)
    assert scored("rouge1", ("一只猫", "一只狗"))["score"] == pytest.approx(2 / 3)
    assert scored("rouge1", ("красный круг", "красный квадрат"))["score"] == pytest.approx(1 / 2)


# metric, right answers that it does not measure, an answer that it does, its score of the first,
# what is said of them
BLIND = [
    ("bleu", ["purple", "a ring.", "3"], "there is a red ring", 0, "fewer than 4 words"),
    ("bleu", RIGHT[:2], "there is a red ring", 0, "without Latin letters"),
    ("rouge1", ["🙂", "?!"], "red", 0, "no letter or digit"),
    ("rouge2", ["purple", "3"], "red ring", 0, "fewer than 2 words"),
    ("token_f1", ["a", "The", "?!"], "red", 100, "nothing but articles and punctuation"),
    ("token_f1", RIGHT[:3], "red", 100, "a script without spaces"),
    ("multiple_choice", ["?", "the"], "B", 0, "no letter and no word in any reference"),
]


@pytest.mark.parametrize("name, texts, seen, expected, says", BLIND)
def test_what_a_metric_does_not_measure_is_counted(name, texts, seen, expected, says):
    if name[0] in "br":
        pytest.importorskip("sacrebleu" if name == "bleu" else "rouge_score", reason=SACREBLEU)
    n = len(texts)
    found = scored(name, *((text, text) for text in texts))
    assert found["score"] == expected
    assert [
        says in line and line.startswith(f"{n} of {n} examples ") for line in found["remarks"]
    ].count(True) == 1
    assert all("; use " in line or "or use " in line for line in found["remarks"])
    found = scored(name, *((text, text) for text in texts), (seen, seen))
    assert any(
        line.startswith(f"{n} of {n + 1} examples ") and says in line for line in found["remarks"]
    )
    assert "remarks" not in scored(name, (seen, seen))


def test_an_empty_prediction_is_no_fault_of_the_metric():
    for name in ("token_f1", "multiple_choice", "pope"):
        assert "remarks" not in scored(name, ("", {"pope": "no"}.get(name, "B red")))


def test_either_side_alone_hides_an_example():
    assert "1 of 2" in scored("token_f1", ("the", "red"), ("red", "red"))["remarks"][0]
    assert "1 of 2" in scored("token_f1", ("red", ["a", "an"]), ("red", ["a", "red"]))["remarks"][0]


@pytest.mark.parametrize("name", ["vqa", "textvqa"])
def test_what_the_vqa_normaliser_drops_is_counted(name):
    found = scored(name, ("the", ["a"] * 10), ("red", ["red"] * 10))
    assert (
        found["score"] == 100 and "1 of 2 examples have nothing but articles" in found["remarks"][0]
    )
    assert "remarks" not in scored(name, ("red", ["a"] + ["red"] * 9))


def test_answers_that_choose_nothing_are_counted():
    found = scored("multiple_choice", ("Two dogs", "B"), ("A cat", "A"), ("C", "B"), ("", "B"))
    assert "2 of 4 examples choose no letter" in found["remarks"][0]
    assert "remarks" not in scored("multiple_choice", ("Two dogs", ["B", "two dogs"]))
    found = scored(
        "pope", ("是", "yes"), ("I see nothing", "no"), ("Yes, there is.", "yes"), ("no", "no")
    )
    assert "2 of 4 examples say neither yes nor no" in found["remarks"][0]


def test_bleu_of_mostly_long_answers_is_bleu():
    pytest.importorskip("sacrebleu", reason=SACREBLEU)
    long, short = ("there is a red ring",) * 2, ("red",) * 2
    assert "remarks" not in scored("bleu", long, long, short)
    assert (
        "2 of 4 examples have fewer than 4"
        in scored("bleu", long, short, long, short)["remarks"][0]
    )
    # 13a parts the period
    assert scored("bleu", ("a ring. red", "a ring. red"))["score"] == pytest.approx(100)


def test_a_remark_is_said_once():
    line, other = "2 of 3 examples see nothing; use eyes", "1 of 3 examples are odd; use even"
    table = {
        "x": {"remarks": [line]},
        "y": {"remarks": [line, other]},
        "z": {},
        "x left": {"remarks": ["1 of 1 examples see nothing; use eyes"]},
        "z left": {"remarks": [line]},
    }
    assert blind.remark_lines(table) == [f"x, y, z left: {line}", f"y: {other}"]


def test_the_english_models_are_said_to_be_english():
    (check,) = blind.CHECKS["nli"]
    assert check.unmeasured("一只猫", ["a cat"]) and check.unmeasured("cat", ["Кот"])
    assert not check.unmeasured("the café 3", ["été"]) and not check.unmeasured("3", ["?"])
