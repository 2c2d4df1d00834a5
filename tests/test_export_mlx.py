"""export --to hf in a reader that is not transformers': mlx-vlm, on the CPU.

python -m venv mlx && mlx/bin/pip install 'mlx[cpu]' mlx-vlm
MLX_PYTHON=mlx/bin/python python -m pytest tests/test_export_mlx.py
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from llava_min import load
from llava_min.tools import export
from llava_min.toy import draw

PYTHON = os.environ.get("MLX_PYTHON", sys.executable)
THEIRS = """
import json, sys
import mlx.core as mx
import numpy as np
from mlx_vlm import load

folder, given, out = sys.argv[1:]
model, processor = load(folder)
logits = {}
with np.load(given) as data:
    for i in range(len(data.files) // 2):
        ids, pixels = (mx.array(data[f"{name}{i}"]) for name in ("ids", "pixels"))
        found = model(ids, pixels, None)
        logits[f"logits{i}"] = np.array(found.logits.astype(mx.float32))
np.savez(out, **logits)
"""


@pytest.fixture(scope="module")
def mlx():
    code = "import importlib.util as u, sys; sys.exit(not (u.find_spec('mlx_vlm')))"
    if subprocess.run([PYTHON, "-c", code]).returncode:
        pytest.skip("mlx-vlm is not here: pip install 'mlx[cpu]' mlx-vlm, or name MLX_PYTHON")


def test_logits_in_mlx_vlm(tmp_path, mlx):
    """100 drawn images: its next token is ours each time, and its logits ours."""
    export.main(["tiny", str(tmp_path / "hf"), "--to", "hf", "--dtype", "fp32"])
    model, processor = load(tmp_path / "hf", dtype="fp32")
    inputs, right = {}, []
    for i, (record, image) in enumerate(draw.generate("questions", 100, seed=7)):
        talk = [{"role": "user", "content": record["conversations"][0]["value"]}]
        batch = processor.chat(talk, images=[image])
        inputs |= {f"ids{i}": batch["input_ids"].numpy()}
        inputs |= {f"pixels{i}": batch["pixel_values"].numpy()}
        right.append(model(batch["input_ids"], batch["pixel_values"]))
    np.savez(tmp_path / "in.npz", **inputs)
    places = [str(tmp_path / x) for x in ("hf", "in.npz", "out.npz")]
    done = subprocess.run([PYTHON, "-c", THEIRS, *places], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    worst = 0.0
    with np.load(tmp_path / "out.npz") as found:
        for i, ours in enumerate(right):
            theirs = torch.from_numpy(found[f"logits{i}"])
            worst = max(worst, float((theirs - ours).abs().max() / ours.abs().max()))
            assert int(theirs[0, -1].argmax()) == int(ours[0, -1].argmax())
    print(json.dumps({"images": len(right), "largest difference, of the largest logit": worst}))
    assert worst < 1e-3
