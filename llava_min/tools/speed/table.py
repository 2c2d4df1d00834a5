"""The figures of two programs, side by side in 80 columns."""

import os
import platform
from pathlib import Path

from llava_min.tools.speed.worker import Worker

# key, label, unit, decimals, which way is better. The ratio says how many times better ours is; for
# "share" it is ours / theirs.
Rows = list[tuple[str, str, str, int, str]]


def machine(device: str) -> dict:
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    words = cpuinfo.read_text().split() if cpuinfo.exists() else []
    isa = next(
        (f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in words),
        platform.machine(),
    )
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa,
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


def surroundings(device: str, workers: list[Worker]) -> dict:
    """Where it was measured, and with which releases."""
    names = ["torch", *(worker.name for worker in workers[1:])]
    versions = (worker.records["start"][0]["version"] for worker in workers)
    return {"device": device, "machine": machine(device), "versions": dict(zip(names, versions))}


def place(r: dict) -> list[str]:
    """The machine of `surroundings`, and the releases, a line each."""
    m = r["machine"]
    return [
        m["gpu"] or f"{m['cores']} CPU cores ({m['isa']}), {m['threads']} threads",
        ", ".join(f"{name} {version}" for name, version in r["versions"].items()),
    ]


def ratios(rows: Rows, a: dict, b: dict) -> dict:
    """Figure by figure, ours `a` beside theirs `b`."""
    return {
        key: b[key] / a[key] if better == "less" else a[key] / b[key]
        for key, _, _, _, better in rows
        if key in a
    }


def lines(rows: Rows, r: dict) -> list[str]:
    """The figures of one size, a line of at most 80 columns each under a heading."""
    names = [name for name in ("ours", "transformers") if name in r]
    out = [
        f"{'':36}" + "".join(f"{name:>14}" for name in names) + f"{'ratio':>12}" * ("ratio" in r)
    ]
    for key, label, unit, decimals, better in rows:
        if key in r["ours"]:
            cells = "".join(f"{r[name][key]:14,.{decimals}f}" for name in names)
            ratio = (
                f"{r['ratio'][key]:12.2f}{'' if better == 'share' else 'x'}" if "ratio" in r else ""
            )
            out.append(f"{label.format(**r):26}{unit:>10}{cells}{ratio}")
    return out
