"""Metrics: golden tables worked by hand from the papers' and scripts' rules, the packages' own
values, intervals.
"""

import json
import math
import random
import sys
import time

import numpy as np
import pytest

from llava_min.errors import UserError
from llava_min.evaluation import metrics
from llava_min.evaluation.metrics import METRICS, find, interval, measure, resampled
from llava_min.evaluation.metrics.text import edit_distance, letter
from llava_min.evaluation.metrics.vqa import APOSTROPHES, normalize
from llava_min.evaluation.metrics.yes_no import says_yes
from llava_min.evaluation.score import score

TEN = ["red"] * 4 + ["dark red"] * 3 + ["crimson"] * 2 + ["blue"]


@pytest.mark.parametrize(
    "name, prediction, references, expected",
    [
        ("exact_match", " red ", ["red"], 1),
        ("exact_match", "Red", ["red"], 0),
        ("exact_match", "", ["x"], 0),
        ("exact_match", "two", ["2", "two"], 1),
        ("exact_match", "red", [" red\n"], 1),
        # SQuAD: words in lower case without articles and punctuation; 2 of 3 words are right, 2 of
        # 2
        # are found: F = 4/5
        ("token_f1", "the red big circle.", ["a Red circle"], 80),
        ("token_f1", "a red circle", ["ring", "red"], 200 / 3),
        ("token_f1", "red red", ["red"], 200 / 3),
        ("token_f1", "the", ["an"], 100),
        ("token_f1", "", ["red"], 0),
        ("token_f1", "the-re", ["there"], 100),
        # Leaving one of ten out: 4 of 4 say it -> 3 others in 4 cases, 4 in 6 -> 1 in all
        ("vqa", "red", TEN, 100),
        ("vqa", "The red.", TEN, 100),
        # 3 say it: 2/3 in 3 cases, 1 in 7; 2: 1/3 in 2, 2/3 in 8; 1: 0 in 1, 1/3 in 9
        ("vqa", "dark red", TEN, 90),
        ("vqa", "crimson", TEN, 60),
        ("vqa", "blue", TEN, 30),
        ("vqa", "green", TEN, 0),
        ("vqa", "Yes", ["yes"] * 10, 100),
        ("vqa", "two", ["2"] * 10, 100),
        ("vqa", "", ["no"] * 10, 0),
        ("textvqa", "dog's", ["dog 's"] * 10, 100),
        ("vqa", "dog's", ["dog 's"] * 10, 0),
        ("textvqa", "a,b", ["ab"] * 10, 100),
        ("textvqa", "a?b", ["ab"] * 10, 100),
        ("vqa", "a,b", ["b"] * 10, 100),
        # ANLS: 1 - distance / longer length, 0 below a half
        ("anls", "Hello  World", ["hello world"], 1),
        ("anls", "helo", ["hello"], 0.8),
        ("anls", "ab", ["ax"], 0.5),
        ("anls", "ab", ["a"], 0.5),
        ("anls", "abc", ["axy", "zzz"], 0),
        ("anls", "", ["a"], 0),
        ("anls", "kitten", ["sitting", "kitchen"], 1 - 2 / 7),
        ("relaxed_accuracy", "105", ["100"], 1),
        ("relaxed_accuracy", "105.1", ["100"], 0),
        ("relaxed_accuracy", "95", ["100"], 1),
        ("relaxed_accuracy", "-95", ["-100"], 1),
        ("relaxed_accuracy", "0.21", ["20%"], 1),
        ("relaxed_accuracy", "21%", ["20%"], 1),
        ("relaxed_accuracy", "20", ["20%"], 0),
        ("relaxed_accuracy", "Blue", ["blue"], 1),
        ("relaxed_accuracy", "0", ["0"], 1),
        ("relaxed_accuracy", "0.001", ["0"], 0),
        ("relaxed_accuracy", "nan", ["5"], 0),
        ("relaxed_accuracy", "2019", ["2000", "yes"], 1),
        ("multiple_choice", "B", ["B"], 1),
        ("multiple_choice", "(b)", ["B"], 1),
        ("multiple_choice", "B. two dogs", ["B"], 1),
        ("multiple_choice", "The answer is B.", ["B"], 1),
        ("multiple_choice", "Answer: C", ["B"], 0),
        ("multiple_choice", "A dog", ["A"], 0),
        ("multiple_choice", "A or B", ["A"], 0),
        ("multiple_choice", "", ["A"], 0),
        ("multiple_choice", "Two dogs.", ["B", "two dogs"], 1),
        ("multiple_choice", "B", ["(B) two dogs"], 1),
        ("multiple_choice", "B\nBecause C", ["B"], 1),
        ("multiple_choice", "Because A.\nC", ["C"], 0),
        ("multiple_choice", "Because A.\nC", ["A"], 0),
    ],
)
def test_golden_scores(name, prediction, references, expected):
    assert METRICS[name]([prediction], [references]) == [pytest.approx(expected)]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The Red, car!", "red car"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("1,000 km", "1000 km"),
        ("3.5", "3.5"),
        ("e.g.", "eg"),
        ("two-story", "2 story"),
        ("left / right", "left right"),
        ("none", "0"),
        ("ten", "10"),
        ("a\nb", "b"),
        ("c-d- ", "c d"),
        ("what's up?", "what's up"),
        ("yall'll", "y'all'll"),
        ("hes", "he's"),
        ("shell", "shell"),
    ],
)
def test_the_vqa_normalizer(text, expected):
    assert normalize(text) == expected


def test_contractions_are_the_scripts():
    assert APOSTROPHES["ow's'at"] == APOSTROPHES["'ows'at"] == APOSTROPHES["'ow'sat"] == "'ow's'at"
    assert APOSTROPHES["somebody'd"] == "somebodyd" and len(APOSTROPHES) == 114
    assert not {"well", "were", "its", "ill", "id", "hell", "shell", "shed", "wed"} & set(
        APOSTROPHES
    )


def test_edit_distance_is_the_tables():
    def by_table(a, b):
        row = list(range(len(b) + 1))
        for i, c in enumerate(a, 1):
            new = [i]
            for j, d in enumerate(b, 1):
                new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (c != d)))
            row = new
        return row[-1]

    rng = random.Random(0)
    for _ in range(300):
        a, b = ("".join(rng.choices("abcé", k=rng.randrange(70))) for _ in range(2))
        assert edit_distance(a, b) == by_table(a, b), (a, b)


def test_letters():
    assert [
        letter(t)
        for t in (
            "b",
            "(C)",
            "option D",
            "The correct answer is (a).",
            "B, I think",
            "because",
            "Answer A dog",
        )
    ] == ["B", "C", "D", "A", "B", None, None]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("B\nBecause it is red.", "B"),
        ("\nb \r\nIt is.", "B"),
        ("Answer:\nB", "B"),
        ("a\u00a0\n", "A"),
        ("C）", "C"),
        ("（C）", "C"),
        ("Ｃ．两只狗", "C"),
        ("C、两只狗", "C"),
        ("**B**", "B"),
        ("**Answer:** B", "B"),
        ("The correct option is C.", "C"),
        ("The best of them is C", "C"),
        ("The one that fits is (c).", "C"),
        ("The ring is red.\nAnswer: D", "D"),
        ("I think the answer is B, since A is small.", "B"),
        ("The answer is not A, it is B.", "B"),
        ("The answer to question A is: B", "B"),
        ("B, not A", "B"),
        # an article, a pronoun, an initial, a denial, several letters
        ("A cat", None),
        ("The answer is A cat.", None),
        ("It shows A dog.", None),
        ("A cat is a pet", None),
        ("It is a", None),
        ("It is C. elegans", None),
        ("The painter is C. Monet.", None),
        ("The answer is not B.", None),
        ("A and B", None),
        ("(A) or (B)", None),
        ("The answer is A or B.", None),
        ("A, B and C", None),
        ("The first is A.\nThe last is B.", None),
        ("Two dogs: A and a B.", None),
    ],
)
def test_a_letter_is_chosen_where_the_text_ends_with_it_and_not_where_it_is_a_word(text, expected):
    assert letter(text) == expected


def test_pope_by_hand():
    answers = [
        "Yes, there is.",
        "No",
        "yes",
        "There is not one.",
        "no. Yes",
        "I see nothing",
        "Nope",
    ]
    assert [says_yes(a) for a in answers] == [True, False, True, False, False, True, True]
    labels = ["yes", "yes", "no", "no", "no", "yes", "no"]
    rows = [{"prediction": a, "references": [r]} for a, r in zip(answers, labels)]
    # TP 2, FP 2, TN 2, FN 1
    found = {name: m["score"] for name, m in score(rows, ["pope"]).items()}
    assert found == pytest.approx(
        {
            "pope": 4 / 7,
            "pope_precision": 1 / 2,
            "pope_recall": 2 / 3,
            "pope_f1": 4 / 7,
            "pope_yes_ratio": 4 / 7,
        }
    )
    assert [r["scores"]["pope"] for r in rows] == [1, 0, 0, 1, 1, 1, 0]
    assert score([{"prediction": "yes", "references": [" Yes\n"]}], ["pope"])["pope"]["score"] == 1


def test_what_is_not_defined_is_left_out_and_said(capsys):
    rows = [{"prediction": "no", "references": ["yes"]}, {"prediction": "no", "references": ["no"]}]
    found = score(rows, ["pope"])
    assert set(found) == {"pope", "pope_recall", "pope_f1", "pope_yes_ratio"}
    assert "pope_precision is not defined" in capsys.readouterr().err
    assert all(math.isfinite(x) for m in found.values() for x in m.values())


@pytest.fixture(scope="module")
def captions() -> tuple[list[str], list[list[str]]]:
    rng = random.Random(0)
    words = "there is a red circle at the top left and a blue square near the yellow ring . two green crosses".split()
    text = lambda: " ".join(rng.choices(words, k=rng.randrange(1, 16)))
    return [text() for _ in range(150)] + [""], [
        [text() for _ in range(rng.randrange(1, 4))] for _ in range(151)
    ]


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_corpus_metrics_are_sacrebleus(captions, name):
    sacrebleu = pytest.importorskip(
        "sacrebleu", reason="the oracle of this test; pip install -e '.[metrics]'"
    )
    predictions, references = captions
    scores, statistics, rule = measure(find([name])[name], predictions, references)
    streams = [[rs[i] if i < len(rs) else None for rs in references] for i in range(3)]
    corpus, sentence = getattr(sacrebleu, f"corpus_{name}"), getattr(sacrebleu, f"sentence_{name}")
    sums = resampled(statistics, seed=3, rounds=20)
    overall = rule(sums)[""]
    assert overall[0] == pytest.approx(corpus(predictions, streams).score, abs=1e-9)
    assert scores == pytest.approx(
        [sentence(p, rs).score for p, rs in zip(predictions, references)], abs=1e-9
    )
    rng = np.random.default_rng(3)  # a resample is the package's score of the resampled corpus
    chosen = [rng.integers(0, 151, 151) for _ in range(20)][-1]
    again = corpus(
        [predictions[i] for i in chosen], [[s[i] for i in chosen] for s in streams]
    ).score
    assert overall[-1] == pytest.approx(again, abs=1e-9)


def test_rouge_is_rouge_scores(captions):
    scorer = pytest.importorskip(
        "rouge_score.rouge_scorer", reason="the oracle of this test; pip install -e '.[metrics]'"
    )
    predictions, references = captions
    predictions = [p.replace(".", ".\n") for p in predictions]  # sentences, for Lsum
    found = find(["rouge"])
    assert list(found) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    for name, metric in found.items():
        theirs = [
            scorer.RougeScorer([name]).score_multi(rs, p)[name].fmeasure
            for p, rs in zip(predictions, references)
        ]
        assert metric(predictions, references) == pytest.approx(theirs, abs=1e-9)


def test_ten_thousand_predictions_take_seconds():
    pytest.importorskip("sacrebleu", reason="pip install -e '.[metrics]'")
    pytest.importorskip("rouge_score", reason="pip install -e '.[metrics]'")
    rng = random.Random(0)
    words = "there is a red circle at the top left and blue square near yellow ring of two green crosses".split()
    text = lambda: " ".join(rng.choices(words, k=rng.randrange(1, 12)))
    rows = [{"prediction": text(), "references": [text()]} for _ in range(10_000)]
    start = time.process_time()
    found = score(
        rows,
        [
            "exact_match",
            "token_f1",
            "anls",
            "relaxed_accuracy",
            "multiple_choice",
            "bleu",
            "chrf",
            "rouge",
        ],
    )
    # 4 s where it was measured; three times that on a busy machine
    assert len(found) == 11 and time.process_time() - start < 15


def test_intervals():
    scores, statistics, rule = measure(
        lambda p, r: [1.0] * 30 + [0.0] * 70, ["x"] * 100, [["x"]] * 100
    )
    sums = resampled(statistics)
    m = interval(rule(sums)[""], 100)
    assert m["score"] == 0.3 and m["n"] == 100 and 0.18 < m["low"] < 0.25 < 0.35 < m["high"] < 0.42
    assert np.array_equal(sums, resampled(statistics)) and not np.array_equal(
        sums, resampled(statistics, seed=1)
    )
    means = rule(sums)[""][1:]
    # the standard error of a proportion
    assert means.std() == pytest.approx((0.3 * 0.7 / 100) ** 0.5, rel=0.1)
    assert interval(np.array([7.0, *range(1000)]), 9) == pytest.approx(
        {"score": 7, "low": 24.975, "high": 974.025, "n": 9}
    )


def test_the_resamples_are_those_of_the_seed():
    rng = random.Random(0)
    rows = [{"prediction": "a" * rng.randrange(1, 60), "references": ["a" * 40]} for _ in range(40)]
    found = [score(rows, ["anls"], seed)["anls"] for seed in (0, 1, 1)]
    assert (
        found[0]["score"] == found[1]["score"]
        and found[0]["low"] != found[1]["low"]
        and found[1] == found[2]
    )


def test_a_users_own_metric(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from llava_min.evaluation.metrics import Corpus\n"
        "def length(predictions, references):\n    return [len(p) for p in predictions]\n"
        "ratio = Corpus(lambda p, r: [(len(a), len(a), len(b[0])) for a, b in zip(p, r)],\n"
        "               lambda s: {'': s[:, 0] / s[:, 1]})\n"
        "number = 3\n"
        "def greedy(predictions, references):\n"
        "    for r in references:\n        r[:] = ['b']\n    predictions[:] = ['b'] * "
        "len(predictions)\n    return [0] * len(predictions)\n"
    )
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prediction": "abc", "references": ["a"]},
        {"prediction": "a", "references": ["abcde"]},
    ]
    found = score(rows, ["mine:length", "mine:ratio"])
    assert found["mine:length"]["score"] == 2 and found["mine:ratio"]["score"] == 4 / 6
    assert rows[0]["scores"] == {"mine:length": 3, "mine:ratio": 3}
    # what one does to its texts, the next does not see
    found = score(rows, ["mine:greedy", "mine:length", "exact_match"])
    assert (
        found["mine:length"]["score"],
        found["exact_match"]["score"],
        rows[0]["references"],
    ) == (2, 0, ["a"])
    for name in ("mine:absent", "nothing_here:x", "mine:number"):
        with pytest.raises(UserError, match=name) as e:
            find([name])
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "bad, says",
    [
        (lambda p, r: 1 / 0, "ZeroDivisionError"),
        (lambda p, r: [1.0], "shape"),
        (lambda p, r: [math.nan, 1.0], "not finite"),
        (lambda p, r: ["x", "y"], "ValueError"),
        (lambda p, r: [[1.0], [1.0]], "shape"),
    ],
)
def test_a_metric_that_fails_is_named_and_scores_nothing(bad, says, capsys, monkeypatch):
    monkeypatch.setitem(METRICS, "bad", bad)
    metrics.load.cache_clear()
    rows = [{"prediction": "a", "references": ["a"]}, {"prediction": "b", "references": ["a"]}]
    assert set(score(rows, ["bad", "exact_match"])) == {"exact_match"}
    assert set(rows[0]["scores"]) == {"exact_match"}
    said = capsys.readouterr().err
    assert "metric bad failed" in said and says in said
    metrics.load.cache_clear()


def test_vqa_wants_ten_references_and_pope_yes_or_no(capsys):
    assert score(
        [{"prediction": "a", "references": ["a"]}], ["vqa", "pope", "exact_match"]
    ).keys() == {"exact_match"}
    said = capsys.readouterr().err
    assert "takes 10" in said and "takes yes or no" in said


def one_line(name: str) -> str:
    """What loading the metric says instead."""
    with pytest.raises(UserError) as e:
        find([name])
    assert "\n" not in str(e.value)
    return str(e.value)


def test_what_is_not_installed_or_not_on_disk_is_one_line(monkeypatch, tmp_path):
    metrics.load.cache_clear()
    with monkeypatch.context() as patch:
        for module in (
            "sacrebleu",
            "rouge_score",
            "rouge_score.rouge_scorer",
            "bert_score",
            "transformers",
        ):
            patch.setitem(sys.modules, module, None)
        for name, package in (
            ("bleu", "sacrebleu"),
            ("rougeL", "rouge-score"),
            ("bertscore", "bert-score"),
            ("nli", "transformers"),
        ):
            assert f"metrics: {name} needs {package} (" in one_line(name) and one_line(
                name
            ).endswith("pip install 'llava_min[metrics]'")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, package, repository in (
        ("nli", "transformers", "roberta-large-mnli"),
        ("bertscore", "bert_score", "roberta-large"),
    ):
        pytest.importorskip(package, reason="what runs this metric; pip install -e '.[metrics]'")
        assert one_line(name).endswith(f"is not on disk; hf download FacebookAI/{repository}")
        cached = tmp_path / f"models--FacebookAI--{repository}"  # a download that broke off
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("abc")
        (cached / "snapshots" / "abc").mkdir(parents=True)
        (cached / "snapshots" / "abc" / "config.json").write_text('{"model_type": "roberta"}')
        assert f"its model FacebookAI/{repository} cannot be loaded (" in one_line(name)
    monkeypatch.setattr(metrics.library, "need_model", lambda *a: "/port5/model")
    assert "a T5 model" in one_line("bertscore")
    assert "choose" in one_line("blue")
    metrics.load.cache_clear()


@pytest.fixture
def roberta(tmp_path, monkeypatch):
    """The tokenizer and the classifier of a tiny folder with random weights, which the metrics take
    for theirs.
    """
    transformers = pytest.importorskip(
        "transformers", reason="what runs these metrics; pip install -e '.[test]'"
    )
    import torch
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<mask>",
        *sorted(ByteLevel.alphabet()),
        "re",
        "red",
        "Ġred",
    ]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (tmp_path / "merges.txt").write_text("r e\nre d\nĠ red\n")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "RobertaTokenizer", "model_max_length": 64}'
    )
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=len(pieces),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=66,
        initializer_range=1.0,
        id2label={0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"},
    )
    model = transformers.RobertaForSequenceClassification(config).eval().requires_grad_(False)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(metrics.library, "need_model", lambda *a: str(tmp_path))
    return transformers.AutoTokenizer.from_pretrained(tmp_path), model


TEXTS = ["red circle", "blue ring"], [["a ring", "red ring is there"], ["red"]]


def test_nli_is_the_probability_of_entailment(roberta):
    tokenizer, model = roberta
    one = lambda r, p: float(model(**tokenizer(r, p, return_tensors="pt")).logits.softmax(-1)[0, 2])
    theirs = [max(one(r, p) for r in rs) for p, rs in zip(*TEXTS)]
    nli = metrics.library.nli()
    assert nli(*TEXTS) == pytest.approx(theirs, abs=1e-5)
    assert len(nli(["red " * 999], [["blue " * 999]])) == 1, "longer than the model takes"


def test_bertscore_is_the_papers(roberta, monkeypatch):
    """Each token counts as much as the likest one of the other text is like it, the marks at its
    own ends nothing.
    """
    pytest.importorskip("bert_score", reason="what runs this metric; pip install -e '.[metrics]'")
    monkeypatch.setattr(metrics.library, "BERT_LAYERS", 2)
    tokenizer, model = roberta
    assert len(tokenizer(" red").input_ids) == 3, (
        "a word that begins a text is a piece like one inside it"
    )

    def f1(text, other):
        x, y = (
            model.roberta(
                tokenizer(f" {t}", return_tensors="pt").input_ids, output_hidden_states=True
            ).hidden_states[2][0]
            for t in (text, other)
        )
        # as padding has it
        alike = ((x / x.norm(dim=1, keepdim=True)) @ (y / y.norm(dim=1, keepdim=True)).T).clamp(
            min=0
        )
        p, r = alike.amax(1)[1:-1].mean(), alike.amax(0)[1:-1].mean()
        return float(2 * p * r / (p + r))

    theirs = [max(f1(p, r) for r in rs) for p, rs in zip(*TEXTS)]
    predictions, references = TEXTS
    found = metrics.library.bertscore()(
        [*predictions, " ", "red"], [*references, ["red"], ["", "red"]]
    )
    assert found == pytest.approx([*theirs, 0, 1], abs=1e-5)
    assert metrics.library.bertscore()(["red"], [[" "]]).tolist() == [0]
