"""The page of speed: sections of measurements, kept by device beside it, and the page that is written from all of them.

    docs/results/speed.md                    the page
    docs/results/speed/DEVICE/SECTION.json   rows, ceilings, torch, commit; and SECTION.png

A device's folder is written by that device alone, so another one adds to the page and overwrites nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from transformer_vq.bench import device
from transformer_vq.bench.plot import picture
from transformer_vq.bench.targets import TARGETS, Found
from transformer_vq.files import read_text, write_text

SECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("attention", {"lengths": (2048, 8192, 16_384), "repeats": 5}),
    "attention-long": ("attention", {"lengths": (32_768,), "repeats": 3}),
    "train": ("train", {"lengths": (512, 4096, 8192), "repeats": 9}),
    "compiled": ("train", {"lengths": (512, 4096), "repeats": 9, "compiled": True}),
    "generation": ("generation", {"positions": (1024, 16_384), "repeats": 100}),
    "quantize": ("quantize", {}),
    "images": ("images", {}),
}
"""By section: its benchmark and options, so that each takes at most about three minutes on two cores."""
ON_GPU: dict[str, dict[str, Any]] = {
    "attention": {
        "lengths": (4096, 8192, 32_768, 131_072), "compare_up_to": 131_072, "heads": 8, "width": 128, "codes": 512,
        "window": 512, "block_len": 512,
    },
    "attention-long": {
        "lengths": (262_144,), "compare_up_to": 0, "heads": 8, "width": 128, "codes": 512, "window": 512,
        "block_len": 512,
    },
    "generation": {"positions": (1024, 1_000_000), "compare_up_to": 1024},
}  # fmt: skip
COMMAND = "transformer-vq bench all --page docs/results/speed.md"

TITLES = {
    "attention": "Attention",
    "attention-long": "Attention, longer",
    "train": "Training",
    "compiled": "Training, compiled",
    "generation": "Generation",
    "quantize": "Quantizer",
    "images": "Images",
}
SPEEDUP = {
    "speedup": ("speed over theirs", ".2f"), "speedup_low": ("lower quartile", ".2f"),
    "speedup_high": ("upper", ".2f"),
}  # fmt: skip
SHOWN: dict[str, dict[str, tuple[str, str]]] = {
    "attention": {
        "tokens": ("tokens", ",.0f"), "block_len": ("block", ".0f"),
        "vq_ms": ("VQ, ms", ",.1f"), "sdpa_ms": ("SDPA, ms", ",.1f"),
        "ratio": ("SDPA / VQ", ".2f"), "ratio_low": ("lower quartile", ".2f"), "ratio_high": ("upper", ".2f"),
        "gflop": ("VQ, GFLOP", ",.1f"), "peak_mib": ("peak of the process, MiB", ",.0f"),
    },
    "train": {
        "length": ("tokens of a row", ",.0f"), "rows": ("rows", ",.0f"), "vq_ms": ("ours, ms", ",.0f"),
        "llama_ms": ("Llama, ms", ",.0f"), "ratio": ("Llama / ours", ".2f"), "ratio_low": ("lower quartile", ".2f"),
        "ratio_high": ("upper", ".2f"), "gflop": ("ours, GFLOP", ",.1f"), "compiled_ms": ("compiled, ms", ",.0f"),
        "compiled": ("ours / compiled", ".2f"), "compiled_low": ("lower quartile", ".2f"),
        "compiled_high": ("upper", ".2f"),
    },
    "generation": {
        "position": ("position", ",.0f"), "milliseconds": ("ours, ms a token", ".2f"), "low": ("lower quartile", ".2f"),
        "high": ("upper", ".2f"), "llama_ms": ("Llama, ms", ".2f"), "llama_ratio": ("Llama / ours", ".2f"),
        "mib": ("must be read, MiB", ".1f"),
    },
    "quantize": {
        "implementation": ("", ""), "milliseconds": ("ms", ",.0f"), "low": ("lower quartile", ",.0f"),
        "high": ("upper", ",.0f"), "peak_mib": ("peak memory, MiB", ",.0f"), **SPEEDUP,
    },
    "images": {
        "implementation": ("", ""), "images_per_s": ("images/s", ",.0f"), "low": ("lower quartile", ",.0f"),
        "high": ("upper", ",.0f"), **SPEEDUP,
    },
}  # fmt: skip


def folder(page: Path) -> Path:
    """Of this device's numbers."""
    facts = device.about()
    threads = "" if facts["kind"] == "cuda" else f"-{facts['threads']}-threads"
    return page.with_suffix("") / (re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-") + threads)


def missing(page: Path) -> list[str]:
    """Sections of this device that are not there yet."""
    return [name for name in SECTIONS if not (folder(page) / f"{name}.json").is_file()]


def record(page: Path, section: str) -> None:
    """Measure one section on this device, and keep it."""
    benchmark, options = SECTIONS[section]
    facts = device.about()
    if facts["kind"] == "cuda":
        options = options | ON_GPU.get(section, {})
    module = import_module(f"transformer_vq.bench.{benchmark}")
    ceilings, rows = device.ceilings(), module.run(**options)
    target = folder(page)
    target.mkdir(parents=True, exist_ok=True)
    found = {"bench": benchmark, "options": options, **facts, "ceilings": ceilings._asdict(), "rows": rows}
    if hasattr(module, "lines") and len(rows) > 1:
        picture(module, rows, ceilings, target / f"{section}.png", f"{TITLES[section]}: {facts['device']}")
    write_text(target / f"{section}.json", json.dumps(found, indent=1) + "\n")


def write_page(page: Path) -> None:
    """From everything that lies beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    folders = sorted(path for path in page.with_suffix("").glob("*") if any(path.glob("*.json")))
    devices = {path: {file.stem: json.loads(read_text(file)) for file in path.glob("*.json")} for path in folders}
    write_text(page, "\n".join(_page(page, devices)) + "\n")


def _page(page: Path, devices: Mapping[Path, Mapping[str, Found]]) -> list[str]:
    text = [
        "# Speed",
        "",
        "Medians of runs that take turns in one process; ratios are medians over turns, with quartiles. This page is",
        "written by one command, which measures the device that it runs on and leaves the sections of others alone:",
        "",
        f"```bash\n{COMMAND}\n```",
        "",
        "How to run and read it: [benchmarks](../how-to/benchmarks.md).",
        "",
        "## Targets",
        "",
    ]
    kinds = {path: next(iter(found.values()))["kind"] for path, found in devices.items()}
    for kind, name in (("cpu", "CPU"), ("cuda", "GPU")):
        ours = [path for path in devices if kinds[path] == kind]
        text += [f"### {name}", "", *_targets(kind, [devices[path] for path in ours]), ""]
        if not ours:
            text += ["Not measured yet; on a machine with such a device, the command above fills the column.", ""]
    for path, found in devices.items():
        text += _device(page, path, found)
    return text


def _targets(kind: str, devices: list[Mapping[str, Found]]) -> list[str]:
    names = [_name(next(iter(found.values()))) for found in devices] or ["measured"]
    out = [f"| | wanted | {' | '.join(names)} |", f"|---|--:|{'--:|' * len(names)}"]
    for what, section, wanted, find in TARGETS[kind]:
        values = [find(found[section]) if section in found else None for found in devices] or [None]
        out.append(f"| {what} | {wanted} | {' | '.join('' if v is None else f'{v:.2f}' for v in values)} |")
    return out


def _name(found: Found) -> str:
    return str(found["device"]) + ("" if found["kind"] == "cuda" else f", {found['threads']} threads")


def _device(page: Path, path: Path, sections: Mapping[str, Found]) -> list[str]:
    first = next(iter(sections.values()))
    text = [f"## {_name(first)}", ""]
    for name in SECTIONS:
        if name not in sections:
            continue
        found, place = sections[name], path.relative_to(page.parent).as_posix()
        text += [f"### {TITLES[name]}", "", *_rows(found), ""]
        for other, why in sorted(_absent(found).items()):
            text += [f"- {other}: absent, {why}"]
        if _absent(found):
            text += [""]
        if (path / f"{name}.png").is_file():
            text += [f"![{TITLES[name]}: time over size, log-log, above the roofline]({place}/{name}.png)", ""]
        roof = found["ceilings"]
        ceilings = f"{roof['flops'] / 1e9:,.0f} GFLOP/s and {roof['bandwidth'] / 1e9:,.1f} GB/s"
        text += [
            f"`transformer-vq bench {found['bench']}` with {_options(found['options'])}; torch {found['torch']}, "
            f"commit `{found['commit']}`; ceilings {ceilings}. [Numbers]({place}/{name}.json)",
            "",
        ]
    return text


def _rows(found: Found) -> list[str]:
    columns = {
        key: column
        for key, column in SHOWN[found["bench"]].items()
        if any(r.get(key) is not None for r in found["rows"])
    }
    out = [f"| {' | '.join(title for title, _ in columns.values())} |", f"|{'--:|' * len(columns)}"]
    for row in found["rows"]:
        cells = ["–" if row.get(key) is None else format(row[key], form) for key, (_, form) in columns.items()]
        out.append(f"| {' | '.join(cells)} |")
    for row in found["rows"]:
        more = [
            f"{n} {o['ms']:,.1f} ms, {o['ratio']:.2f} × ours" for n, o in row.get("others", {}).items() if "ms" in o
        ]
        if more:
            out += ["", f"At {row['tokens']:,} tokens also: {'; '.join(more)}."]
    return out


def _absent(found: Found) -> dict[str, str]:
    return {n: o["absent"] for row in found["rows"] for n, o in row.get("others", {}).items() if "absent" in o}


def _options(options: Found) -> str:
    numbers = {k: v if isinstance(v, list) else [v] for k, v in options.items() if not isinstance(v, bool)}
    words = [f"{key.replace('_', ' ')} {', '.join(f'{x:,}' for x in found)}" for key, found in numbers.items()]
    return "; ".join(words + [key for key, value in options.items() if value is True]) or "its defaults"
