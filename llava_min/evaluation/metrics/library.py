"""Metrics that a package computes: BLEU and chrF by sacrebleu, ROUGE by rouge-score, BERTScore by
bert-score, and entailment of the answer by an NLI model that transformers runs.

The packages are optional and no model is downloaded: UserError names what is missing before any
weight is read.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import numpy as np

from llava_min.errors import UserError, escape_controls, shorten
from llava_min.evaluation.metrics.words import words

# bert-score's default for English, and the layer it reads
BERT, BERT_LAYERS = "FacebookAI/roberta-large", 17
NLI = "FacebookAI/roberta-large-mnli"


def need(metric: str, module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as e:  # the package, or one that it needs
        raise UserError(
            f"{metric} needs {package} ({escape_controls(e)}); pip install 'llava_min[metrics]'",
            "metrics",
        ) from None


def need_model(metric: str, repository: str) -> str:
    """The folder of a hub model that is on disk."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(repository, local_files_only=True)
    except LocalEntryNotFoundError:
        raise UserError(
            f"{metric}: its model {repository} is not on disk; hf download {repository}", "metrics"
        ) from None


@contextmanager
def reading(metric: str, repository: str) -> Iterator[None]:
    """Within, any error is a UserError: an interrupted download leaves incomplete files."""
    try:
        yield
    except Exception as e:
        raise UserError(
            f"{metric}: its model {repository} cannot be loaded ({shorten(e, 400)}); if its files "
            f"are damaged, hf download {repository} --force-download",
            "metrics",
        ) from None


def tokenizer_of(folder: str, **options):
    """The tokenizer of a RoBERTa, with its limit, which some folders do not record."""
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    tokenizer.model_max_length = min(tokenizer.model_max_length, 512)
    return tokenizer


def bleu() -> tuple[Callable, Callable]:
    """0 to 100: corpus BLEU; of an example, BLEU with effective order, as sacrebleu advises."""
    sacrebleu = need("bleu", "sacrebleu", "sacrebleu")
    return by_sacrebleu(sacrebleu.BLEU(force=True), sacrebleu.BLEU(effective_order=True))


def chrf() -> tuple[Callable, Callable]:
    """0 to 100. chrF2."""
    sacrebleu = need("chrf", "sacrebleu", "sacrebleu")
    return by_sacrebleu(sacrebleu.CHRF(), sacrebleu.CHRF())


def by_sacrebleu(corpus, sentence) -> tuple[Callable, Callable]:
    """The Corpus of two sacrebleu metrics; the statistics, which have no public name, are those
    that sacrebleu's own bootstrap sums.
    """

    def rows(predictions: list[str], references: list[list[str]]) -> list[tuple[float, ...]]:
        most = max(map(len, references))
        streams = [[rs[i] if i < len(rs) else None for rs in references] for i in range(most)]
        statistics = corpus._extract_corpus_statistics(predictions, streams)
        return [(sentence._compute_score_from_stats(list(s)).score, *s) for s in statistics]

    def overall(sums: np.ndarray) -> dict[str, np.ndarray]:
        scores = [corpus._compute_score_from_stats(row).score for row in sums.tolist()]
        return {"": np.array(scores)}

    return rows, overall


def rouge(kind: str) -> Callable:
    """0 to 1: the F-measure of rouge-score against the best reference, without stemming, on the
    words of any script. rougeLsum treats each line as a sentence.
    """
    tokenizer = SimpleNamespace(tokenize=lambda text: list(words(text)))
    rouge_scorer = need(kind, "rouge_score.rouge_scorer", "rouge-score")
    scorer = rouge_scorer.RougeScorer([kind], tokenizer=tokenizer)

    def metric(predictions: list[str], references: list[list[str]]) -> list[float]:
        return [
            scorer.score_multi(rs, p)[kind].fmeasure
            for p, rs in zip(predictions, references, strict=True)
        ]

    return metric


def bertscore() -> Callable:
    """0 to 1: F1 against the best reference (Zhang et al. 2020, https://arxiv.org/abs/1904.09675),
    not rescaled; 0 where either text is empty.
    """
    bert_score = need("bertscore", "bert_score", "bert-score")
    folder = need_model("bertscore", BERT)
    if "t5" in folder:  # bert-score would read it as a T5, with random weights
        raise UserError(
            'bertscore: bert-score takes every path with "t5" in it for a T5 model, and its model '
            f"is in {folder}; move the cache and set HF_HOME",
            "metrics",
        )
    with reading("bertscore", BERT):
        scorer = bert_score.BERTScorer(model_type=folder, num_layers=BERT_LAYERS)
        # RoBERTa was trained with a space before every word; transformers 5 ignores bert-score's
        # own request for it
        scorer._tokenizer = tokenizer_of(folder, add_prefix_space=True)

    def metric(predictions: list[str], references: list[list[str]]) -> np.ndarray:
        full = [
            [r for r in rs if r.strip()] if p.strip() else []
            for p, rs in zip(predictions, references, strict=True)
        ]
        scores = np.zeros(len(predictions))
        # bert-score fails on an empty text with transformers 5
        if some := [i for i, rs in enumerate(full) if rs]:
            found = scorer.score([predictions[i] for i in some], [full[i] for i in some])
            scores[some] = found[2].numpy()  # precision, recall, F1
        return scores

    return metric


def nli() -> Callable:
    """0 to 1: the probability that the reference entails the prediction, for the best reference;
    a pair is truncated to 512 tokens.
    """
    transformers = need("nli", "transformers", "transformers")
    import torch

    folder, device = need_model("nli", NLI), "cuda" if torch.cuda.is_available() else "cpu"
    with reading("nli", NLI):
        tokenizer = tokenizer_of(folder)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        model = model.eval().to(device)
        labels = {name.lower(): i for i, name in model.config.id2label.items()}
        entailment = labels["entailment"]

    @torch.no_grad()
    def metric(predictions: list[str], references: list[list[str]]) -> list[float]:
        pairs = [(r, p) for p, rs in zip(predictions, references, strict=True) for r in rs]
        found: list[float] = []
        for i in range(0, len(pairs), 32):
            batch = tokenizer(
                pairs[i : i + 32], padding=True, truncation=True, return_tensors="pt"
            ).to(device)
            found += model(**batch).logits.softmax(-1)[:, entailment].tolist()
        ends = np.cumsum([len(rs) for rs in references])
        return [max(found[end - len(rs) : end]) for end, rs in zip(ends, references)]

    return metric
