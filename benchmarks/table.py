"""docs/performance.md, and the table between its markers in README.md, from benchmarks/results/.

python benchmarks/table.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OVER = "zoo's tokens/s over llama.cpp's"
RESULTS = ROOT / "benchmarks/results"
BEGIN, END = "<!-- performance: made by benchmarks/table.py -->", "<!-- /performance -->"
Run = dict[str, Any]


def ms(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 1000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value or "")
    )


def measured_on(run: Run) -> str:
    return (
        f"{run['device']}, torch {run['torch']}, triton {run['triton']}, transformers {run['transformers']}, "
        f"{run['date'][:10]}; a device copy moves {run['copy TB/s']:.2f} TB/s."
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def merged(runs: list[Run]) -> tuple[Run, dict[str, Run]]:
    """The newest run, and per shape everything known of it; newer figures take the place of older ones."""
    rows: dict[str, Run] = {}
    for run in runs:
        for row in run["rows"]:
            rows.setdefault(row["shape"], {}).update(row)
    newest = max(runs, key=lambda r: (len(r["rows"]), r["date"]))
    return newest, rows


def speed(rows: dict[str, Run]) -> str:
    """Two tables of a card: a step of decoding, and a prompt."""
    steps, prompts = [], []
    for name, r in rows.items():
        theirs, compiled = r.get("transformers decode ms"), r.get("transformers compiled decode ms")
        steps.append([
            name, f"{r['active GB']:.2f}", *(f"{ms(x)} ms" if x else "" for x in (theirs, compiled)), f"**{ms(r['decode ms'])} ms**",
            f"**{r['of copy']:.0%}**",
        ])  # fmt: skip
        their, times = r.get("transformers prefill ms"), []
        for what in ("prefill", "prefill captured"):
            taken = r[f"{what} ms"]
            ratio = r.get(f"{what} ratio", their / taken if their else None)
            times.append(f"{ms(taken)} ms" + (f" ({ratio:.2f}x)" if ratio else ""))
        prompts.append([name, f"{ms(their)} ms" if their else "", *times])
    decode = [
        "decode, batch 1",
        "GB per token",
        "transformers",
        "compiled, static cache",
        "zoo",
        "of copy bandwidth",
    ]
    return f"{table(decode, steps)}\n\n{table(['prompt of 2048 tokens', 'transformers', 'zoo', 'zoo, captured'], prompts)}"


def short(rows: dict[str, Run]) -> str:
    """What README.md shows: a step of decoding, of shapes that transformers was timed at."""
    lines = []
    for name, r in rows.items():
        if theirs := r.get("transformers decode ms"):
            compiled = r.get("transformers compiled decode ms")
            lines.append([name, f"{ms(theirs)} ms", f"{ms(compiled)} ms" if compiled else "", f"**{ms(r['decode ms'])} ms**", f"{r['of copy']:.0%}"])  # fmt: skip
    return table(["a token decoded, bf16", "transformers", "compiled", "zoo", "of copy bandwidth"], lines)


def by_batch(rows: dict[str, Run]) -> str:
    batches = {n: r for n, r in rows.items() if "decode ms by batch" in r}
    if not batches:
        return ""
    sizes = max((list(r["decode ms by batch"]) for r in batches.values()), key=len)
    lines = []
    for n, r in batches.items():
        read = r.get("GB by batch", {})
        lines.append(
            [
                n,
                *(
                    ms(r["decode ms by batch"].get(b)) + (f" ({read[b]:.3g} GB)" if b in read else "")
                    for b in sizes
                ),
            ]
        )
        if theirs := r.get("transformers decode ms by batch"):
            lines.append(["transformers", *(ms(theirs.get(b)) for b in sizes)])
    read = (
        "In brackets: weights that a step reads, where each token chooses its experts evenly and by itself. A mixture's step of 16 tokens cannot "
        "be as fast as one of a single token: it reads so many times as much.\n\n"
    )
    said = read if any("GB by batch" in r for r in batches.values()) else ""
    return f"### Decode by batch, ms per step\n\n{said}" + table(["batch", *map(str, sizes)], lines)


def other(load: Run | None, rows: dict[str, Run]) -> str:
    parts = [found] if (found := by_batch(rows)) else []
    long = [
        [n, ms(r["prefill 32768 ms"]) + " ms", ms(r.get("transformers prefill 32768 ms")), f"{ms(r['decode ms at 32768'])} ms", f"{r['cache GB at 32768']:.2f} GB"]
        for n, r in rows.items() if "prefill 32768 ms" in r
    ]  # fmt: skip
    if long:
        head = ["32768 tokens", "prefill", "transformers, ms", "decode", "cache"]
        parts.append("### Long context\n\n" + table(head, long))
    memory = [
        [n, f"{r['memory over weights and cache']:.1%}"]
        for n, r in rows.items()
        if "memory over weights and cache" in r
    ]
    parts.append("### Memory of decoding over weights and cache\n\n" + table(["shape", "more"], memory))
    if load:
        lines = [[k.replace(" GB/s", ""), f"{v:.2f}"] for k, v in load.items() if "GB/s" in k]
        beside = ", ".join(f"{v:.2f} {k.split(', ')[1]}" for k, v in load.items() if " of read" in k)
        parts.append(
            f"### Loading {load['GB']:.1f} GB to the GPU, GB/s\n\n" + table(["", "GB/s"], lines)
            + f"\n\nMedians of {load['rounds']} rounds in which each took its turn; in a round `zoo.load` has {beside} of the rate of "
            "reading the files from first to last (median; the disk varies by a third)."
        )  # fmt: skip
    return "\n\n".join(parts)


WHAT = {
    "dense": "dense, renamed and fused",
    "moe": "mixture of experts, stacked",
    "export": "export of the dense one",
    "transposed": "GPT-2's transposed weights",
    "interleaved": "gpt-oss in bf16: transposed, rows of gate and up alternating",
    "pickle": "`pytorch_model.bin`",
    "meta": "Meta's rank files, rows in interleaved RoPE order",
    "fp8": "fp8 to bf16",
    "mxfp4": "mxfp4 to bf16",
    "cast": "bf16 to fp32",
}


def converting(found: Run, newest: list[Run], parts: Run) -> str:
    """The section about benchmarks/convert.py: all cases, the newest run of some on each machine, and ranks beside one process."""
    m, rows = found["machine"], []
    lately = " ".join(
        f"{n['machine']['cpu']}, {n['machine']['cores']} cores, {n['machine']['date'][:10]}: "
        + "; ".join(
            f"{r['case']} {r['ratio']:.2f} times `cp -r` and {r['cpu_ratio']:.2f} of its CPU seconds, {r['rss_mib']:.0f} MiB"
            for r in n["results"]
        )
        + "."
        for n in newest
    )
    ranks = ", ".join(f"{r['case']} {r['ratio']:.2f}" for r in parts["results"])
    for r in found["results"]:
        u = r.get("upstream")
        rows.append([
            WHAT[r["case"]], f"{r['source_tensors']:,}", f"{r['output_bytes'] / 1e9:.1f}", ms(r["seconds"]["cp"]), ms(r["seconds"]["zoo"]),
            f"{r['ratio']:.2f}", f"{r['goal']:.2f}", f"{r['rss_mib']:.0f}",
            f"{u['ratio']:.1f} x, {u['rss_mib']:,.0f} MiB" if u else "",
        ])  # fmt: skip
    head = [
        "", "tensors", "GB written", "`cp -r`, s", "zoo, s", "times `cp`", "goal", "peak RSS, MiB", "transformers, load and save",
    ]  # fmt: skip
    return (
        "\n## Converting\n\nHow bytes are copied (in the kernel, through a buffer, from mapped memory; one thread or several) is found while it "
        f"works, and `--debug` says what was found. With that, medians of "
        f"{len(newest[0]['results'][0]['runs'])} pairs (`benchmarks/results/convert-ways.json`): {lately} Two ranks on the 2 cores of the last, "
        f"in times of one process with two threads (`benchmarks/parts.py`): {ranks}. The table is from before.\n\n"
        f"{m['cpu']}, {m['cores']} cores, {m['memory_mib'] / 1024:.0f} GiB, {m['date'][:10]}; "
        f"`{m['command']}`. Medians of {len(found['results'][0]['runs'])} pairs, start-up included, source in the page cache. "
        "Where more is written than read, `cp` copies what is written.\n\n" + table(head, rows) + "\n"
    )


def on_cpu(runs: list[Run]) -> str:
    """The section about benchmarks/cpu.py: the newest run on each processor."""
    out = (
        "## CPU\n\nMedians of pairs, bf16. *GB/s*: weights that a token visits, and what one of torch's matrix-vector products "
        "reads; a prompt of 8 tokens counts as a token. *Rate*: of what one of torch's large bf16 products reaches, ours and "
        "transformers'; nothing can be faster by more than 1 over the latter.\n"
    )
    for run in {r["device"]: r for r in runs}.values():
        lines = [
            [
                r["what"], ms(r["zoo ms"]), ms(r["transformers ms"]), f"{r['ratio']:.2f}x",
                f"{r['GB/s']:.1f} of {r['GB/s of one product']:.1f}" if "GB/s" in r else "",
                ", ".join(f"{share:.0%}" for key, share in r.items() if key.endswith(" of one product's rate")),
            ]
            for r in run["rows"]
        ]  # fmt: skip
        out += (
            f"\n{run['device']}: {run['threads']} threads, torch {run['torch']}, transformers {run['transformers']}, "
            f"{run['date'][:10]}.\n\n"
            + table(["", "zoo, ms", "transformers, ms", "faster", "GB/s", "rate"], lines)
            + "\n"
        )
    return out


def products(run: Run) -> str:
    """The section about benchmarks/gpu_codes.py."""
    found: dict[str, dict[int, Run]] = {}
    for r in run["rows"]:
        found.setdefault(r["what"], {})[r["rows"]] = r
    lines = [
        [
            what, *(f"{1e3 * r[n]['ms']:.0f} ({1e3 * r[n]['bf16 ms']:.0f})" if n in r else "" for n in (1, 16, 2048)),
            f"{r[1]['of copy']:.0%}" if 1 in r else "",
        ]
        for what, r in found.items()
    ]  # fmt: skip
    return (
        "### One product with codes, us\n\nIn brackets that of bf16. Columns: rows of x, or tokens; of one row the codes' share of copy bandwidth. "
        "A star: inputs in an order of their own.\n\n"
        + table(["", "1", "16", "2048", "of copy"], lines)
        + f"\n\n{measured_on(run)}\n\n"
    )


def carried(run: Run) -> str:
    """The section about benchmarks/cpu_codes.py."""
    lines = [
        [
            r["what"], ms(r["ms per token"]), ms(r["bf16, ms"]), f"{r['faster']:.2f}x", f"{r['bytes of bf16']:.2f}x",
            f"{r['widened, ms']:.0f}",
        ]
        for r in run["rows"]
    ]  # fmt: skip
    return (
        "\n### Quantised weights as they are stored\n\nA token decoded, beside the same model in bf16 (medians of pairs), and how many times "
        "fewer bytes it reads; *widened*: each matrix is made bf16 first.\n\n"
        + table(["", "zoo, ms", "bf16, ms", "faster", "bytes", "widened, ms"], lines)
        + f"\n\n{run['device']}: {run['threads']} threads, torch {run['torch']}, {run['date'][:10]}; `{run['command']}`.\n\n"
    )


def blocks(run: Run) -> str:
    """The section about benchmarks/gguf_speed.py."""
    models = {name: r for name, r in run.items() if isinstance(r, dict) and "types" in r}
    lines = [
        [
            name, *(f"{r['tokens/s'][side]:.1f}" for side in ("zoo", "llama.cpp", "zoo from fp32")),
            f"{r[OVER]:.2f}", f"{r['the same, by CPU seconds']:.2f}",
        ]
        for name, r in models.items()
    ]  # fmt: skip
    return (
        "\n### A GGUF's blocks, beside llama.cpp\n\nTokens decoded in a second (medians of pairs, taken in turn), and how many zoo makes in the time, and of the "
        "CPU seconds, in which llama.cpp makes one. llama.cpp was built with AVX2, FMA and F16C (built for the machine itself it ended in an illegal "
        f"instruction there); zoo's kernels are compiled for the machine. The load was {run['load'][0]:.1f} before.\n\n"
        + table(
            ["", "zoo, a second", "llama.cpp", "zoo from fp32", "zoo / llama.cpp", "by CPU seconds"], lines
        )
        + f"\n\n{run['cpu']}, {run['cores']} cores: threads: {run['threads']}, {run['date'][:10]}; `{run['command']}`.\n\n"
    )


def main() -> None:
    on_gpu: dict[str, list[Run]] = {}
    for run in json.loads((RESULTS / "gpu.json").read_text()):
        on_gpu.setdefault(run["device"], []).append(run)
    first, *others = on_gpu.values()  # the card that goals were set on comes first
    newest, rows = merged(first)
    loads = [r["load"] for r in first if "load" in r]
    converted: Run = json.loads((RESULTS / "convert.json").read_text())
    ways: list[Run] = json.loads((RESULTS / "convert-ways.json").read_text())
    parts: Run = json.loads((RESULTS / "parts.json").read_text())
    where = measured_on(newest)
    note = (
        "Random weights of released shapes, both sides in one run (`make bench-gpu`). Decode is a captured CUDA graph "
        "with a static cache after 2048 tokens. *Captured* prefill is a pass recorded once for its shape "
        "(`model.captured`): what is left when the host's time for launching kernels is not counted. Where the models of both sides fit on the card, "
        "prompts took turns, and the ratio is the median over 15 rounds: the host's speed varies by 2 from second to second. "
        "Each prompt, of both sides, came after a rest of 0.3 s: one after the other they take an H100 to its 700 W, and its clock from "
        "1.98 to 1.3-1.65 GHz. Linear attention is computed by transformers' own code: flash-linear-attention and causal-conv1d "
        "are not installed there."
    )
    cpus: list[Run] = json.loads((RESULTS / "cpu.json").read_text())
    codes: Run = json.loads((RESULTS / "cpu-codes.json").read_text())
    forms: list[Run] = [json.loads((RESULTS / "gpu-codes-forms.json").read_text())]
    lying: Run = json.loads((RESULTS / "gguf-speed.json").read_text())
    parity, shapes = (json.loads((RESULTS / f"gpu-{name}.json").read_text()) for name in ("parity", "shapes"))
    agree = sum(not f["failed"] for f in parity["families"])
    right = (
        f"The numbers are held to transformers' in fp32 and bf16 by `gpu_parity.py` ({agree} of {len(parity['families'])} tiny "
        f"models agree), and the kernels at random shapes to their plain twins by `gpu_shapes.py` ({len(shapes['differ'])} of "
        f"{shapes['results compared']:,} results differ)."
    )
    beside = ""
    for runs in others:
        latest, found = merged(runs)
        beside += f"## {latest['device']}\n\n{speed(found)}\n\n{measured_on(latest)}\n\n"
        if batches := by_batch(found):
            beside += f"{batches}\n\n"
        beside += "".join(products(run) for run in forms if run["device"] == latest["device"])
    page = (
        f"# Performance\n\nMade by `benchmarks/table.py` from `benchmarks/results/`. Models are in bf16 unless said.\n\n## {newest['device']}\n\n"
        f"{speed(rows)}\n\n{where}\n\n### How it was measured\n\n{note}\n\n{right}\n\n"
        f"{other(loads[-1] if loads else None, rows)}\n\n{beside}{on_cpu(cpus)}{carried(codes)}{blocks(lying)}{converting(converted, ways, parts)}"
    )
    (ROOT / "docs/performance.md").write_text(page)
    readme = ROOT / "README.md"
    text = readme.read_text()
    if BEGIN in text:
        moved = {r["case"]: r for r in converted["results"]}
        dense = max(
            (r for run in ways for r in run["results"] if r["case"] == "dense"), key=lambda r: r["ratio"]
        )
        said = (
            f"Converting a checkpoint of {dense['output_bytes'] / 1e9:.0f} GB takes {dense['ratio']:.1f} times "
            f"as long as `cp -r` of it and {dense['rss_mib']:.0f} MiB of memory; loading and saving it with "
            f"transformers takes {moved['dense']['upstream']['ratio']:.0f} times as long and {moved['dense']['upstream']['rss_mib']:,.0f} MiB."
        )
        made = f"{BEGIN}\n{said}\n\n{short(rows)}\n\n{where}\n{END}"
        text = re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: made, text, flags=re.S)
        readme.write_text(text)


if __name__ == "__main__":
    main()
