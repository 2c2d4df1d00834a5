"""The views of a record: labels are LLaVA's, rows may be joined, batches are the same with any
number of workers.
"""

import gc
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import sentencepiece
import torch
from conftest import hf_config
from PIL import Image
from test_processor import bytes_folder
from test_records import GOOD, IMAGE, images, png, record, refused, written  # noqa: F401  images: a fixture

from llava_min.config import LlavaConfig
from llava_min.data.dataset import Dataset, Record, collate, evaluation_batch, join
from llava_min.data.image import ImageConfig
from llava_min.data.loader import loader
from llava_min.data.processor import IGNORE, Processor
from llava_min.data.records import read_records
from llava_min.data.sampler import plan
from llava_min.data.tokenizer import Tokenizer
from llava_min.llava import Llava
from llava_min.toy import vocab as toy_vocab


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(
        toy_vocab.tokenizer_model(toy_vocab.words()[:300], [], 700)
    )
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(folder)
    image = tokenizer.add_special("<image>")
    return Processor(
        tokenizer, ImageConfig(28, (0.5,) * 3, (0.5,) * 3, "pad"), "llava_hf", image, 4
    )


def records_of(images: Path) -> list[Record]:
    data = [
        GOOD,
        record(
            "Hi there you",
            "Ho",
            "And this <image>?",
            "A dog, and two cats.",
            image="b.png",
            id="r2",
        ),
        record("Only text", "Yes.", id="r3"),
        record("<image>\n<image>\nSame?", "No.", image=["a.png", "sub/c.png"], id="r4"),
    ]
    return read_records(written(images / "x.json", data))


def test_training_view(images, processor):
    records = records_of(images)
    items = [Dataset(records, processor)[i] for i in range(4)]
    batch = collate(items)
    B, T = batch["input_ids"].shape
    assert (B, T) == (4, max(len(x["input_ids"]) for x in items)) and batch[
        "pixel_values"
    ].shape == (4, 3, 28, 28)
    for row, x in enumerate(items):
        n = len(x["input_ids"])
        assert (
            batch["input_ids"][row, :n].tolist() == x["input_ids"]
            and batch["labels"][row, :n].tolist() == x["labels"]
        )
        assert (batch["labels"][row, n:] == -100).all() and (
            batch["input_ids"][row, n:] != processor.image_token_id
        ).all()
        learnt = processor.tokenizer.decode(
            [t for t in x["labels"] if t != -100], skip_special=False
        )
        said = [m["content"] for m in records[row].messages[1::2]]
        assert learnt.replace("</s>", "|").replace(" ", "") == "".join(
            s + "|" for s in said
        ).replace(" ", "")
    pictures = [p for r in records for p in r.open_images()]
    for got, im in zip(batch["pixel_values"], pictures, strict=True):
        assert torch.equal(got, processor("<image>", im)["pixel_values"][0])
    assert "pixel_values" not in collate([items[2]])


def test_evaluation_view_is_the_start_of_the_training_view(images, processor):
    records = records_of(images)
    batch, prompts, references = evaluation_batch(records, processor)
    assert prompts == ["What is it?", "And this ?", "Only text", "Same?"]
    assert references == [["A cat."], ["A dog, and two cats."], ["Yes."], ["No."]]
    for row, r in enumerate(records):
        ids = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
        whole = processor.training(r.messages, [r.open_images()] if r.images else None)
        n = len(ids)
        assert whole["input_ids"][:n] == ids
        last = [t for t in whole["labels"][n:] if t != -100]
        assert last == whole["input_ids"][n:] and batch["attention_mask"][row, -n:].all()
        one = evaluation_batch([r], processor)[0]
        assert one["input_ids"][0].tolist() == ids and ("pixel_values" in one) == bool(r.images)
    assert len(batch["pixel_values"]) == 4


def test_too_long_is_refused_before_training_and_nothing_is_cut(images, processor):
    records = records_of(images)
    lengths = [len(Dataset(records, processor)[i]["input_ids"]) for i in range(4)]
    longest = max(lengths)
    assert [
        len(Dataset(records, processor, max_length=longest)[i]["input_ids"]) for i in range(4)
    ] == lengths
    message = refused(
        lambda: Dataset(records, processor, max_length=longest - 1),
        f"max_length: 1 of 4 records have more than {longest - 1} tokens",
        f"({longest})",
    )
    assert records[lengths.index(longest)].id in message


@pytest.mark.parametrize("template", ["llava_hf", "vicuna_v1"])
def test_the_bound_that_spares_counting_tokens_is_one(processor, template):
    p = Processor(
        processor.tokenizer, processor.image_config, template, processor.image_token_id, 4
    )
    for text in ("a", "  ", "\n\n\n", "猫🙂" * 40, "\x01\x02" * 40, "Z" * 50):
        for turns in (1, 20):
            messages = [
                {"role": "user", "content": text + "?"},
                {"role": "assistant", "content": text + "!"},
            ] * turns
            d = Dataset([Record("x", messages)], p, max_length=10**6)
            assert (
                d.tokens(d.records[0], 0)
                == len(p.training(messages)["input_ids"])
                <= d.tokens(d.records[0], 10**6)
            )


def test_the_bound_holds_where_nfc_makes_text_longer(tmp_path):
    folder = bytes_folder(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(spec | {"normalizer": {"type": "NFC"}}))
    p = Processor(
        Tokenizer.load(folder), ImageConfig(28, (0.5,) * 3, (0.5,) * 3, "pad"), "chatml", 500, 4
    )
    d = Dataset(
        [
            Record(
                "x",
                [
                    {"role": "user", "content": "\U0001d160" * 40},
                    {"role": "assistant", "content": "a"},
                ],
            )
        ],
        p,
        max_length=10**6,
    )
    assert 480 < d.tokens(d.records[0], 0) <= d.tokens(d.records[0], 10**6)


def test_pictures_in_memory(processor):
    r = Record(
        "x",
        [
            {"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "It."},
        ],
        [Image.new("RGB", (5, 5), "red")],
    )
    assert Dataset([r], processor)[0]["pixel_values"].shape == (1, 3, 28, 28)
    assert evaluation_batch([r], processor)[0]["pixel_values"].shape == (1, 3, 28, 28)


# ---- labels: LLaVA's preprocess_v1 and preprocess_plain, written anew from what they do


class Reference:
    """tokenizer_image_token and the two ways to mask, over SentencePiece itself; a picture is the
    one id −200.
    """

    def __init__(self, model: Path, legacy: bool):
        self.sp, self.legacy = sentencepiece.SentencePieceProcessor(model_file=str(model)), legacy

    def bare(self, text: str) -> list[int]:
        """Ids without the dummy space: what follows a byte that merges with nothing."""
        space, newline, *ids = self.sp.encode("\n" + text)
        assert (space, newline) == tuple(self.sp.encode("\n"))
        return ids

    def tokens(self, text: str) -> list[int]:
        """The slow Llama tokenizer: `</s>` is found first, and what follows it has a dummy space if
        `legacy`.
        """
        ids = [self.sp.bos_id()]
        for k, part in enumerate(text.split("</s>")):
            ids += [self.sp.eos_id()] if k else []
            if part:
                ids += self.sp.encode(part) if self.legacy or not k else self.bare(part)
        return ids

    def image_tokens(self, text: str) -> list[int]:
        first, *rest = [self.tokens(chunk) for chunk in text.split("<image>")]
        return first + [id for chunk in rest for id in (-200, *chunk[1:])]

    def v1(self, system: str, turns: list[str]) -> tuple[list[int], list[int]] | None:
        """None where the original finds that its counts do not agree, and learns nothing."""
        text = system + " "
        for k, value in enumerate(turns):
            if "<image>" in value:
                value = ("<image>\n" + value.replace("<image>", "").strip()).strip()
            text += f"ASSISTANT: {value}</s>" if k % 2 else f"USER: {value} "
        ids = self.image_tokens(text)
        labels, at = [IGNORE, *ids[1:]], 1
        for k, part in enumerate(text.split("</s>")):
            halves = part.split(" ASSISTANT: ")
            if not part or len(halves) != 2:
                break
            whole, asked = (
                len(self.image_tokens(part)),
                len(self.image_tokens(halves[0] + " ASSISTANT: ")) - 2,
            )
            if k and not self.legacy:
                whole, asked = whole - 1, asked - 1
            labels[at : at + asked] = [IGNORE] * asked
            at += whole
        return (ids, labels) if at == len(ids) else None

    def plain(self, caption: str) -> tuple[list[int], list[int]]:
        ids = self.image_tokens("<image>" + caption + "\n")
        return ids, [IGNORE, IGNORE, *ids[2:]]


def spoken(rng: random.Random) -> str:
    words = "a cat is on the mat What colour ? red , 3.14 (left) USER: assistant «né» 猫 🙂 x\ty don't </div> https://a.b".split(
        " "
    )
    text = "".join(
        rng.choice(words) + rng.choice([" ", " ", " ", "  ", "\n", "", "   ", " \n"])
        for _ in range(rng.randint(1, 12))
    )
    return rng.choice(["", "", " ", "\n"]) + text + rng.choice(["", "", ".", "  "])


def llama_model() -> Path:
    path = Path(__file__).parents[2] / "shared" / "assets" / "tokenizers" / "llama_tokenizer.model"
    if not path.exists():
        pytest.skip(f"needs {path.name} in ../shared/assets/tokenizers")
    return path


TINY = Path(__file__).parents[1] / "llava_min" / "tiny" / "tokenizer.model"


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "modern"])
@pytest.mark.parametrize("which", ["llama", "tiny"])
def test_labels_are_those_of_preprocess_v1_and_plain(tmp_path, images, which, legacy):
    model = llama_model() if which == "llama" else TINY
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.model").write_bytes(model.read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, theirs = Tokenizer.load(tmp_path / "t"), Reference(model, legacy)
    image = tokenizer.add_special("<image>")
    v1, plain = (
        Processor(tokenizer, ImageConfig(28, (0.5,) * 3, (0.5,) * 3, "pad"), name, image, 1)
        for name in ("vicuna_v1", "plain")
    )

    rng, data, talks = random.Random(0), [], []
    for k in range(300):
        turns = [spoken(rng) for _ in range(2 * rng.choice((1, 1, 2, 3, 5)))]
        if k % 3:
            turns[0] = rng.choice(
                [
                    f"<image>\n{turns[0]}",
                    f"{turns[0]}\n<image>",
                    f"{turns[0]} <image> so",
                    "<image>",
                ]
            )
        talks.append(turns)
        data.append(record(*turns, id=k, **({"image": "a.png"} if k % 3 else {})))
    records, compared = read_records(written(tmp_path / "x.json", data), images), 0
    assert theirs.bare("USER") != theirs.sp.encode("USER")

    def ours(p: Processor, r: Record) -> tuple[list[int], list[int]]:
        ids, labels = p.encode(Dataset([r], p).pieces(r))
        return [-200 if i == image else i for i in ids], labels

    system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."
    for k, (r, turns) in enumerate(zip(records, talks)):
        for text in (system, "", "Be brief."):
            if text != system:
                r.messages = [{"role": "system", "content": text}, *r.messages[-len(turns) :]]
            if (want := theirs.v1(text, turns)) is not None:
                assert ours(v1, r) == want, (turns, text)
                compared += 1
        if k % 3:
            caption = turns[1]
            assert ours(
                plain,
                Record(
                    "x", r.messages[1:2] + [{"role": "assistant", "content": caption}], r.images
                ),
            ) == theirs.plain(caption)
    # its counts are made for Llama's two tokens of a first USER
    assert compared == 900 or which == "tiny" and compared > 300


# ---- long records


def long_talk(images: Path, *words: int) -> Record:
    """A conversation with an image in every question but the second, and answers of so many words."""
    turns = [
        x for k, n in enumerate(words) for x in ("<image>\nWhat?" if k != 1 else "So?", "red " * n)
    ]
    data = record(*turns, image=["a.png"] * (len(words) - (len(words) > 1)), id=f"long{len(words)}")
    return read_records(written(images / "long.json", [data]), images)[0]


def test_long_records_lose_whole_turns_from_the_end_and_are_told(images, processor, capsys):
    whole, short_one = long_talk(images, 5, 5, 5, 40), records_of(images)[0]
    size = lambda n: len(
        processor.encode(Dataset([whole], processor).pieces(Record("x", whole.messages[: 2 * n])))[
            0
        ]
    )
    capped = size(3)
    for room, turns, pictures in (
        (size(4), 4, 3),
        (size(4) - 1, 3, 2),
        (size(3), 3, 2),
        (size(3) - 1, 2, 1),
        (size(2) - 1, 1, 1),
        (size(1), 1, 1),
    ):
        capsys.readouterr()
        d = Dataset([short_one, whole], processor, max_length=room, too_long="shorten")
        kept, item = d.records[1], d[1]
        assert (
            kept.messages == whole.messages[: 2 * turns]
            and kept.images == whole.images[:pictures]
            and kept.id == whole.id
        )
        assert len(item["input_ids"]) <= room and item["input_ids"].count(
            processor.image_token_id
        ) == 4 * pictures == 4 * len(item["pixel_values"])
        assert item["labels"][-1] == processor.tokenizer.eos_id
        told = capsys.readouterr().err
        assert (f"1 of 2 records lost their last turns: long4 ({size(4)})" in told) == (turns < 4)
    system = {"role": "system", "content": "Be brief."}
    with_system = Record("s", [system, *whole.messages], whole.images)
    assert (
        Dataset([with_system], processor, max_length=capped + 8, too_long="shorten")
        .records[0]
        .messages
        == with_system.messages[:7]
    )
    capsys.readouterr()
    d = Dataset(
        [short_one, long_talk(images, 90), whole], processor, max_length=capped, too_long="shorten"
    )
    assert [r.id for r in d.records] == ["r1", "long4"]
    assert (
        "1 of 3 records are left out, as a single turn of theirs is longer: long1"
        in capsys.readouterr().err
    )


def test_a_record_that_the_template_cannot_hold_is_found_before_training(images, processor):
    p = Processor(processor.tokenizer, processor.image_config, "plain", processor.image_token_id, 4)
    refused(lambda: Dataset(records_of(images)[:3], p), "record r2: template: plain")
    assert len(Dataset(records_of(images)[:1], p)) == 1


# ---- packing


def test_packed_rows_are_the_records_one_after_the_other(images, processor):
    d = Dataset(records_of(images), processor)
    items = [d[i] for i in range(4)]
    batch = collate([join([items[3], items[2], items[0]]), join([items[1]])])
    T = sum(len(items[i]["input_ids"]) for i in (3, 2, 0))
    assert batch["segments"].shape == (2, T) and batch["segments"].dtype == torch.int64
    assert (batch["segments"] == -1).sum(1).tolist() == [0, T - len(items[1]["input_ids"])]
    for row, members in enumerate(((3, 2, 0), (1,))):
        for k, i in enumerate(members):
            here = batch["segments"][row] == k
            assert batch["input_ids"][row][here].tolist() == items[i]["input_ids"]
            assert batch["labels"][row][here].tolist() == [IGNORE, *items[i]["labels"][1:]]
    assert torch.equal(
        batch["pixel_values"], torch.cat([items[i]["pixel_values"] for i in (3, 0, 1)])
    )
    assert "segments" not in collate(items)
    assert join([{"input_ids": [5, 6], "labels": [5, 6]}] * 2)["labels"] == [IGNORE, 6, IGNORE, 6]


@pytest.mark.parametrize("template", ["llava_hf", "vicuna_v1"])
def test_packed_is_unpacked_in_loss_and_gradients(images, processor, template):
    config = hf_config()
    config["text_config"] |= {"vocab_size": 1024, "max_position_embeddings": 2048}
    torch.manual_seed(0)
    model = Llava(
        LlavaConfig.from_hf(config | {"image_token_index": processor.image_token_id})
    ).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    p = Processor(
        processor.tokenizer, processor.image_config, template, processor.image_token_id, 4
    )
    data = Dataset(records_of(images) * 2, p)
    steps = plan(
        lengths := data.lengths(exact=True), 2, packing=int(1.6 * max(map(abs, lengths))), seed=1
    )
    assert any(len(row) > 1 for step in steps for row in step[0][0])

    def gradients(packing: bool) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        micros = [micro for step in steps for micro in step[0]]
        if not packing:
            micros = [[(i,) for micro in micros for row in micro for i in row]]
        total = 0.0
        for batch, errors in loader(data, micros, packing=packing):
            assert not errors and ("segments" in batch) == packing
            loss = model.loss(
                batch["input_ids"],
                batch["labels"],
                batch["pixel_values"].double(),
                **({"segments": batch["segments"]} if packing else {}),
            )
            loss.backward()
            total += float(loss.detach())
        return total, {n: q.grad.clone() for n, q in model.named_parameters() if q.grad is not None}

    (packed, a), (single, b) = gradients(True), gradients(False)
    assert packed == pytest.approx(single, rel=1e-12) and a.keys() == b.keys() and len(a) > 20
    for name in a:
        # a key's bias has no gradient
        assert (a[name] - b[name]).norm() <= 1e-12 * b[name].norm() + 1e-12, name


# ---- loading


def damaged(images: Path) -> list[Record]:
    """Eight records; the pictures of the third and the fourth are cut short."""
    data = []
    for i in range(8):
        whole = png((i, 9, 9), (30, 20))
        (images / f"p{i}.png").write_bytes(whole[:50] if i in (2, 3) else whole)
        data.append(record("<image>\nWhat?", f"It is {i}.", image=f"p{i}.png", id=f"n{i}"))
    return read_records(written(images / "d.json", data), images)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_batches_are_the_same_with_any_number_of_workers_and_leave_the_random_state_alone(
    images, processor
):
    data = Dataset(records_of(images) * 3, processor)
    micros = [micro for step in plan(data.lengths(), 2, 2, epochs=2, seed=2) for micro in step[0]]
    want = [collate([data[i] for (i,) in micro]) for micro in micros]
    before = torch.get_rng_state(), random.getstate()
    for workers in (0, 1, 2):
        got = list(loader(data, micros, workers))
        assert all(same(a, b) and errors == [] for (a, errors), b in zip(got, want, strict=True))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    rest = list(loader(data, micros[5:], 1))  # as a resumed run goes on
    assert all(same(a, b) for (a, _), b in zip(rest, want[5:], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_cannot_be_decoded_is_one_line_or_is_left_out(images, processor, workers):
    data = Dataset(damaged(images), processor)
    micros = [[(0,), (1,)], [(2,), (4,)], [(3,)], [(5, 2, 6)]]
    before, batches = pids(), loader(data, micros, workers)
    assert same(next(batches)[0], collate([data[0], data[1]]))
    refused(lambda: next(batches), "record n2: ", "p2.png", "damaged")
    assert pids() == before  # nobody is left behind
    got = list(loader(data, micros, workers, packing=True, skip=True))
    assert [len(errors) for _, errors in got] == [0, 1, 1, 1] and "record n3: " in got[2][1][0]
    assert same(got[1][0], collate([join([data[4]])])) and same(
        got[3][0], collate([join([data[5], data[6]])])
    )
    empty = got[2][0]  # the rank runs the step along with the others and adds nothing
    assert (
        (empty["labels"] == IGNORE).all()
        and empty["input_ids"].shape == (1, 2)
        and "pixel_values" not in empty
    )


def pids() -> set[int]:
    return {child.pid for child in multiprocessing.active_children()}


class Slow(Dataset):
    """Counts what has been asked for."""

    made = multiprocessing.Value("i", 0)

    def __getitem__(self, i: int) -> dict:
        with self.made:
            self.made.value += 1
        return super().__getitem__(i)


def test_workers_are_a_bounded_number_of_batches_ahead_and_deaf_to_signals(images, processor):
    data = Slow(records_of(images) * 20, processor)
    Slow.made.value = 0
    before = pids()
    batches = loader(data, [[(i,)] for i in range(80)], 2)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL and len(pids() - before) == 2
    for _ in range(400):  # until they rest
        made = Slow.made.value
        time.sleep(0.05)
        if made == Slow.made.value and made >= 5:
            break
    assert 5 <= made <= 1 + 2 * 2 + 1
    for pid in pids() - before:
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(pid, s)
    assert len(list(batches)) == 79 and Slow.made.value == 80 and pids() == before


def test_a_killed_worker_is_one_line(images, processor):
    before, batches = (
        pids(),
        loader(Dataset(records_of(images) * 20, processor), [[(i,)] for i in range(80)], 1),
    )
    next(batches)
    (worker,) = pids() - before
    os.kill(worker, signal.SIGKILL)
    message = refused(lambda: list(batches), "workers: one of 1", "was killed", "lower workers")
    assert "Traceback" not in message and pids() == before  # nobody is left behind


def test_where_the_system_starts_no_more_processes(images, processor, monkeypatch, capsys):
    fork, made = os.fork, []
    # a BlockingIOError in life
    refuse = lambda: made.append(0) or (fork() if len(made) == 1 else os.strerror(os.dup(1 << 20)))
    monkeypatch.setattr(os, "fork", refuse)
    before = pids()
    refused(
        lambda: list(loader(Dataset(records_of(images), processor), [[(0,)]], 2)),
        "workers: the system starts no more processes (",
        "and 2 were asked for",
    )
    gc.collect()
    # the first is taken down
    assert len(made) == 2 and pids() == before and "Traceback" not in capsys.readouterr().err


def test_a_process_that_ends_with_workers_at_work_ends_at_once(tmp_path):
    code = (
        "import time, torch\nfrom llava_min.data.loader import loader\n"
        "class D(torch.utils.data.Dataset):\n    def __getitem__(self, i): return "
        "{'input_ids': [1, 2], 'labels': [1, 2]}\n"
        "batches = loader(D(), [[(i,)] for i in range(100)], "
        "2)\nnext(batches)\nprint(time.time())\nraise KeyError('a fault')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[1],
    )
    assert (
        done.returncode == 1
        and "KeyError: 'a fault'" in done.stderr
        and time.time() - float(done.stdout) < 4
    )


class Broken(Dataset):
    def __getitem__(self, i: int) -> dict:
        raise RuntimeError("a fault")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_is_not_taken_for_a_bad_record_or_a_killed_worker(images, processor, workers):
    with pytest.raises(RuntimeError, match="a fault"):
        next(loader(Broken(records_of(images), processor), [[(0,)]], workers, skip=True))


# ---- the documentation's snippets


def snippets() -> list[str]:
    return re.findall(
        r"```python\n(.*?)```",
        (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8"),
        re.S,
    )


def test_the_snippets_of_the_documentation(tmp_path, monkeypatch):
    textocr, tables = snippets()
    assert all(len(code.rstrip().split("\n")) <= 20 for code in (textocr, tables))
    monkeypatch.chdir(tmp_path)

    rows = [
        {"filename": f"{k}.jpg", "caption_condensed": text}
        for k, text in enumerate(("A sign says «Stop».", " ", "A shop."))
    ]
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, split: (
        rows if (name, split) == ("jimmycarter/textocr-gpt4v", "train") else None
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    exec(textocr, {})
    (tmp_path / "train_images").mkdir()
    for row in rows:
        Image.new("RGB", (5, 4)).save(tmp_path / "train_images" / row["filename"])
    got = read_records("textocr.json", "train_images")
    assert [r.messages[0]["content"][1]["text"] for r in got] == [
        "Describe this image in detail."
    ] * 2
    assert [r.messages[1]["content"] for r in got] == ["A sign says «Stop».", "A shop."] and got[
        1
    ].open_images()[0].size == (5, 4)

    (tmp_path / "tables").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (5, 4)).save(tmp_path / "tables" / f"{name}.png")
    (tmp_path / "tables" / "a.csv").write_text(
        'Name,Price\n"Tea, green",3\nA|B,"4\n5"\n', encoding="utf-8"
    )
    (tmp_path / "tables" / "b.csv").write_text("x\n", encoding="utf-8")
    exec(tables, {})
    a, b = read_records("tables/tables.jsonl")
    assert a.messages == [
        {
            "role": "user",
            "content": [IMAGE, {"type": "text", "text": "Write this table as Markdown."}],
        },
        {
            "role": "assistant",
            "content": "| Name | Price |\n| --- | --- |\n| Tea, green | 3 |\n| A\\|B | 4 5 |",
        },
    ]
    assert b.messages[1]["content"] == "| x |\n| --- |" and [
        len(r.open_images()) for r in (a, b)
    ] == [
        1,
        1,
    ]
