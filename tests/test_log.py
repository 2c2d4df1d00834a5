"""The progress line and metrics.jsonl."""

import json

from llava_min.log import Log, brief, clock


def test_every_number_is_kept_and_the_line_fits_the_terminal(tmp_path, capsys):
    log = Log(tmp_path, total=9000)
    log.write(step=0, eval_exact_match=0.5)
    log.step(8000, loss=0.123456, lr=0.00014567, grad_norm=12.3456, tokens_per_s=59760.1, rows_per_s=314.2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 0, "eval_exact_match": 0.5} and lines[1]["loss"] == 0.123456 and lines[1]["step"] == 8000
    line = capsys.readouterr().err.strip()
    assert line.startswith("step 8000/9000 · loss 0.123 · lr 0.00015 · grad 12.3 · tok/s 59760 · rows/s 314 ·") and len(line) <= 100


def test_numbers_are_brief():
    assert [brief(x) for x in (0, 1e-5, 0.5, 123.45, 12345.6)] == ["0", "1e-05", "0.5", "123", "12346"]
    assert [clock(x) for x in (5, 65, 3661)] == ["0:05", "1:05", "1:01:01"]
