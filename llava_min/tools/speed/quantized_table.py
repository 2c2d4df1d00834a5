"""The figures of `bench --quantize`, in lines of at most 80 columns."""

import textwrap

from llava_min.errors import escape_controls, shorten
from llava_min.tools.speed.table import place
from llava_min.tools.speed.worker import MIB

PEER = "Q4_0"  # llama.cpp's row


def heading(r: dict) -> list[str]:
    """What is measured, and the columns of `speed_line`."""
    where, releases = place(r)
    how = f"{r['size']} {r['dtype']}{', our greedy step compiled' * r['compile']}"
    return [
        f"{shorten(how)}, on {where}",
        releases,
        f"{r['prompt_tokens']} tokens read, {r['new_tokens']} new ones; medians of {r['rounds']}; "
        "ratios to the first row",
        "",
        f"{'disk':>14}{'peak memory':>13}{'quantize':>12}{'peak':>8}{'prefill':>12}{'decode':>13}",
        f"{'MiB':>14}{'MiB':>13}{'s':>12}{'MiB':>8}{'tokens/s':>12}{'tokens/s':>13}",
    ]


def speed_line(row: dict) -> str:
    """Size, memory and speed of one form of the checkpoint, each beside its ratio."""
    ratio = row["ratio"]
    out = f"{row['name']:6}"
    out += f"{size(row['disk_bytes'] / MIB):>8}{ratio['disk_bytes']:5.2f}"
    out += f"{size(row['peak_mib']):>8}{ratio['peak_mib']:5.2f}"
    if "quantize_s" in row:
        out += f"{row['quantize_s']:7.1f}"
        out += f"{size(row['quantize_peak_mib']):>8}{ratio['quantize_peak_mib']:5.2f}"
    else:
        out += " " * 20
    out += f"{size(row['prefill_tokens_s']):>7}{ratio['prefill_tokens_s']:5.2f}x"
    return out + f"{size(row['decode_tokens_s']):>7}{ratio['decode_tokens_s']:5.2f}x"


def size(x: float) -> str:
    """A number in at most seven characters."""
    return f"{x:,.1f}" if x < 100 else f"{x:,.0f}"


def notes(r: dict) -> list[str]:
    """What to know of single rows."""
    names, out = [row["name"] for row in r["variants"]], []
    if "awq4" in names and r["calibration_data"] == r["data"]:
        out.append("awq4 is calibrated on the records that it is judged by")
    if PEER in names:
        version = r["versions"]["llama-cpp-python"]
        out.append(f"{PEER} is llama.cpp's (llama-cpp-python {version}), without the tower")
        if r["variants"][-1].get("crashed"):
            out.append("  (it crashed with AMX: prefill without its kernels for this CPU)")
    return out


def quality_table(r: dict) -> list[str]:
    """Perplexity and answers on the data."""
    rows = [row for row in r["variants"] if "perplexity" in row]
    if not rows:
        return []
    plain = rows[0]["name"]
    out = ["", f"{r['records']} records of {shorten(r['data'], 50)}", ""]
    out.append(f"{'':6}{'perplexity':>20}{f'answers as {plain}':>18}{'exact match':>14}")
    for row in rows:
        line = f"{row['name']:6}{row['perplexity']:14,.4g}{row['ratio']['perplexity']:6.2f}"
        same = f"{row['agreement']:.3f}" if "agreement" in row else ""
        match = "" if row["exact_match"] is None else f"{row['exact_match']:.3f}"
        out.append(f"{line}{same:>18}{match:>14}".rstrip())
    return out


def answers(r: dict) -> list[str]:
    """The one question, and what each form of the checkpoint answers, side by side."""
    rows = [row for row in r["variants"] if "answer" in row]
    if not rows:
        return []
    out = ["", *wrapped("", r["question"])]
    for row in rows:
        out += wrapped(row["name"], "(no answer)" if row["answer"] is None else row["answer"])
    return out


def wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        escape_controls(text) or "(empty)",
        80,
        initial_indent=f"{name:6}",
        subsequent_indent=" " * 6,
        break_on_hyphens=False,
    )
