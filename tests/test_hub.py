"""hub.py: where a checkpoint comes from. What its files may hold is tried in test_weights.py."""

import pytest

from llava_min.errors import UserError
from llava_min.hub import find_folder

EVIL = "\x1b]0;owned\x07\x1b[2J\u202e\r\n"


def test_find_folder(tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (f"{tmp_path}/a b", f"{tmp_path}/a b/", "~/a b"):
        assert find_folder(source) == tmp_path / "a b"
    (tmp_path / "file").write_text("")
    for source, says in (
        ("nobody/no-such-model", "the hub did not give it"),
        ("llava-hf/llava-1.5-7b-hf", "the hub did not give it"),
        ("no-such-folder", "no such folder"),
        ("./no/such/folder", "no such folder"),
        ("/no/such", "no such folder"),
        (str(tmp_path / "file"), "a file"),
        ("~nobody-here/x", "cannot be looked up"),
        ("x" * 5000, "cannot be looked up"),
        ("a\0b", "no such folder"),
        (EVIL, "no such folder"),
        ("../..x/y/z", "no such folder"),
        ("a/b/c", "no such folder"),
        (" ", "no such folder"),
        ("-x/y\n", "no such folder"),
        ("https://huggingface.co/a/b", "no such folder"),
    ):
        with pytest.raises(UserError) as e:
            find_folder(source)
        assert says in str(e.value) and str(e.value).isprintable() and len(str(e.value)) < 1000, (
            str(e.value)
        )


def test_a_hub_id_takes_safetensors_where_there_are_any(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_folder("a/b", "main") == tmp_path
    assert [a[:2] for a in asked] == [("a/b", "main")] * 2 and asked[1][2] == ["pytorch_model*.bin"]
    assert not any(".bin" in p or ".py" in p for p in asked[0][2])
    (tmp_path / "model.safetensors").write_text("")
    find_folder("a/b")
    assert len(asked) == 3
